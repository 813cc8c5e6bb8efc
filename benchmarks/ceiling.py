"""How near to the ceiling is adapting: to training with shared weights, and to the machine?

    python -m benchmarks.ceiling --size S

Training the language model on the library's fused LSTM (stage 1, all lanes share the weights) is
the ceiling of what weights per lane can reach. Beside it, turn by turn in one process: static
scoring, meta-training, and adapting while scoring, all LSTM weights of every lane. `ms` is the time
of a segment of all lanes, `floor ms` the time below which this machine cannot go (see `floor`).
Prints a table and writes it to <out>/ceiling_SIZE.json. Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from benchmarks.output import HOME
from benchmarks.timing import (
    BYTES,
    EOS,
    SIZES,
    Machine,
    Step,
    Work,
    measure_machine,
    random_articles,
    ratio,
    reading,
    record,
    side_by_side,
    speed,
    threads,
    world,
)
from mlm.base.errors import run_cli
from mlm.models.recurrent import RecurrentLM
from mlm.reading.meta_gradient import GradientMode
from mlm.reading.static import StaticReader
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.runs.run import choose_device
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, MetaConfig
from mlm.text.streams import Segment, Text
from mlm.training.language_model import LMTrainer, resolve_precision
from mlm.training.meta import MetaTrainer

TRAINING, TRAINING_BF16, STATIC = "static training", "static training, bf16", "static scoring"
META, RULE, GATES = "meta-training", "adapting, RMS", "adapting, learned gates"
STATIC_SEGMENT = 64
"""Tokens per step of stage 1."""
RATE, DECAY = 3e-3, 8e-3
SHOWN = (
    "what",
    "M",
    "threads",
    "tokens/s",
    "/ f32 training",
    "/ bf16 training",
    "time / static",
    "ms",
    "floor ms",
    "floor / actual",
)
"""Columns printed; the file also has what the floor is made of."""


@dataclass(frozen=True)
class Options:
    """Adapting against training with shared weights and against the machine."""

    size: Literal["S", "M", "L"] = "S"
    """Sizes of the model: S = 1 x 256, M = 2 x 650, L = AWD-LSTM's 3 x 1150. Everybody's lanes are
    in memory at once: 16 of L take some 25 GiB; give fewer --lanes where that is too much."""
    rounds: int = 5
    """Times that every row has its turn."""
    lanes: int = 16
    """B: articles side by side."""
    segments: tuple[int, ...] = (20, 64)
    """M of the adapting rows."""
    unroll: int = 10
    """Updates per meta-gradient."""
    updates: int = 4
    """Segments per turn of the other rows."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice, as runs of these sizes have (`--size small` and `awd`)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA if there is one."""
    out: Path = HOME / "ceiling"
    """Folder of ceiling_SIZE.json."""


# -- the work -------------------------------------------------------------------------------


def _text(shape: RecurrentLM, lanes: int, segment: int, segments: int) -> Text:
    """An article per lane, all equally long: no lane is ever padded."""
    articles = random_articles(shape, lanes, segment * segments)
    return Text(articles, lanes * segment * segments, EOS)


def training(
    shape: RecurrentLM, options: Options, precision: Literal["float32", "bfloat16"]
) -> Work:
    """Steps of stage 1 by its own trainer, without dropout."""
    settings = LMTrainingConfig(
        lanes=options.lanes,
        segment=STATIC_SEGMENT,
        dropout_input=0.0,
        dropout_hidden=0.0,
        dropout_output=0.0,
        precision=precision,
    )
    text = _text(shape, options.lanes, STATIC_SEGMENT, 32)
    trainer = LMTrainer(Config(lm=settings), shape, text, choose_device(options.device))
    return lambda: sum(trainer.train_step()[1] for _ in range(options.updates))


def _again(step: Step, segments: list[Segment], updates: int) -> Work:
    """A turn: the next few segments of articles that are open already."""
    step(segments[0])
    later = segments[1 : updates + 1]

    def work() -> int:
        for segment in later:
            step(segment)
        return sum(segment.targets.numel() for segment in later)

    return work


def static_scoring(shape: RecurrentLM, options: Options) -> Work:
    """`StaticReader`, the baseline of every evaluation."""
    device, updates = choose_device(options.device), options.updates
    base, segments = world(shape, STATIC_SEGMENT, options.lanes, device=device, number=updates + 1)
    reader = StaticReader(base, options.lanes)
    return _again(lambda segment: reader.read(segment).nll, segments, updates)


def adapting(shape: RecurrentLM, options: Options, segment: int, learned: bool) -> Work:
    """`read` with Krause's rule, or with the three-level gates at the same place."""
    device, updates = choose_device(options.device), options.updates
    base, segments = world(shape, segment, options.lanes, device=device, number=updates + 1)
    if learned:
        gates = LinearGates()
        bound = gates.bind(gates.start_at_rms(base, RATE, DECAY), base)
    else:
        like = next(iter(base.rms.values()))
        numbers = {"rate": like.new_tensor(RATE), "decay": like.new_tensor(DECAY)}
        bound = RMS().bind(numbers, base)
    return _again(reading(base, bound, options.lanes), segments, updates)


def meta_training(
    shape: RecurrentLM, options: Options, segment: int, gradient: GradientMode = "reverse"
) -> Work:
    """Steps of stage 2 by its own trainer: an unroll, then Adam on the gates' parameters."""
    base = world(shape, segment, options.lanes, device=choose_device(options.device)).base
    settings = MetaConfig(
        lanes=options.lanes,
        unroll=options.unroll,
        gradient=gradient,
        stream_share=0.0,
        learning_rate=1e-4,  # Adam's work is the same, and the gates stay where they were
    )
    text = _text(shape, options.lanes, segment, 4 * options.unroll)
    rule = LinearGates()
    start = rule.start_at_rms(base, RATE, DECAY)
    trainer = MetaTrainer(base, rule, start, text, settings, 0)
    return lambda: trainer.train_step()[1]


# -- the floor ------------------------------------------------------------------------------


class Floor(NamedTuple):
    """What a segment of B lanes and M tokens costs at least."""

    streamed: float
    """Bytes from or to memory."""
    cached: float
    """Bytes of recurrent weights read again at later time steps, from the cache if they fit."""
    products: float
    """Multiply-adds that can be batched over time or lanes, per token."""
    stepwise: float
    """Multiply-adds of matrix times vector, per token; their time is that of `cached`."""

    def seconds(self, machine: Machine, tokens: int, bf16: bool = False) -> float:
        """Time on this machine: the phases follow each other, each at the machine's best."""
        flops = machine.bf16_flops if bf16 else machine.flops
        moved = self.streamed / machine.copy + self.cached / machine.cached
        return moved + 2 * self.products * tokens / flops


def floor(shape: RecurrentLM, what: str, lanes: int, segment: int) -> Floor:
    """The least an engine must move and multiply per segment, if it writes gradients to memory.

    I, H: inputs and outputs of a layer. Over all layers: N = sum 4H(I + H) LSTM weights (biases
    are left out), U = sum 4H H the recurrent ones, D = N - U less the first layer's, whose inputs
    need no gradient. S = V E softmax weights, P all weights of the model. Letters count numbers of
    4 bytes:

    * forward: N + S multiply-adds per token; U of them wait for the step before, so a lane with
      weights of its own reads U at every step, at first from memory (N), then from the cache.
    * backward: N for the weights' gradients, U (again step by step) and D for the inputs'; S for
      the softmax's input, whose table is shared and fixed.
    * gradient: N written per lane. Update: weights and gradient read, weights written, 3 N per
      lane; what all lanes share (theta_0, the rule's factors) stays in the cache.
    * pullback: weights, gradient and lam read, lam written, 4 N per lane.
    * static training: N and S also for the table's gradient; the step of Adam reads weights,
      gradient and two moments and writes all but the gradient, after that was written: 8 P. Its
      recurrent products serve all lanes at once and count as batched.
    """
    layers = shape.layer_sizes()
    recurrent = sum(4 * h * h for _, h in layers)
    lstm = recurrent + sum(4 * h * i for i, h in layers)
    inputs = lstm - recurrent - 4 * layers[0][1] * layers[0][0]
    softmax = shape.vocabulary * shape.embedding
    if what in (TRAINING, TRAINING_BF16):
        return Floor(BYTES * 8 * (lstm + softmax), 0, 3 * (lstm + softmax), 0)
    if what == STATIC:
        return Floor(BYTES * (lstm + softmax), 0, lstm + softmax, 0)
    passes = 1 + 1 + 3 + (4 if what == META else 0)
    again = 2 * segment - 1  # forward and backward, less the first reading from memory
    products = (lstm - recurrent) + lstm + inputs + 2 * softmax
    return Floor(
        BYTES * lanes * passes * lstm, BYTES * lanes * again * recurrent, products, 2 * recurrent
    )


# -- the table ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row before it is timed."""

    what: str
    segment: int
    work: Work
    threads: int

    @property
    def name(self) -> str:
        """Its name among the others."""
        return f"{self.what}, M={self.segment}"

    def run(self) -> int:
        """The work, with the row's threads."""
        with threads(self.threads):
            return self.work()


def meta_bytes(shape: RecurrentLM, options: Options, mode: GradientMode) -> int:
    """What an unroll keeps: copies of the weights of every lane."""
    weights = sum(4 * h * (i + h + 1) for i, h in shape.layer_sizes())
    copies = 2 * (options.unroll + 2) if mode == "reverse" else 6 + 4  # the tangent of the gates
    return copies * options.lanes * weights * BYTES


def _mode(
    shape: RecurrentLM, options: Options, segment: int, device: torch.device
) -> GradientMode | None:
    """The fastest meta-gradient that fits, None if there is none."""
    free = 0.8 * _free_bytes(device)
    for mode in ("reverse", "forward"):
        need = meta_bytes(shape, options, mode)
        if need <= free:
            return mode
        print(f"{META}, M={segment}, {mode}: left out, needs {need / 2**30:.0f} GiB")
    return None


def _free_bytes(device: torch.device) -> int:
    """Memory an unroll may take; what the system only caches files in counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 1 << 62  # not every system tells


def rows_of(shape: RecurrentLM, options: Options) -> list[Row]:
    """Everything to time, set up."""
    device = choose_device(options.device)
    first = options.threads or Config.threads or torch.get_num_threads()
    later = first
    rows = [Row(TRAINING, STATIC_SEGMENT, training(shape, options, "float32"), first)]
    if resolve_precision("auto", device) == torch.bfloat16:
        work = training(shape, options, "bfloat16")
        rows.append(Row(TRAINING_BF16, STATIC_SEGMENT, work, first))
    rows.append(Row(STATIC, STATIC_SEGMENT, static_scoring(shape, options), later))
    with threads(later):
        for segment in options.segments:
            rows.append(Row(RULE, segment, adapting(shape, options, segment, False), later))
            rows.append(Row(GATES, segment, adapting(shape, options, segment, True), later))
            mode = _mode(shape, options, segment, device)
            if mode:
                work = meta_training(shape, options, segment, mode)
                rows.append(Row(META, segment, work, later))
    return rows


def _machines(
    shape: RecurrentLM, todo: list[Row], device: torch.device, small: bool
) -> dict[int, Machine]:
    """The machine's own figures by number of threads."""
    bf16 = any(row.what == TRAINING_BF16 for row in todo)
    found = {}
    for number in sorted({row.threads for row in todo}):
        with threads(number):
            found[number] = measure_machine(shape, device, bf16, small)
    return found


def compare(
    shape: RecurrentLM, options: Options, small: bool = False
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows of the table, and the machine's own figures by number of threads."""
    device = choose_device(options.device)
    todo = rows_of(shape, options)
    before = _machines(shape, todo, device, small)
    seconds = side_by_side({row.name: row.run for row in todo}, options.rounds)
    after = _machines(shape, todo, device, small)
    # Others may have been busy on the machine at either time: the floor is what it can do.
    machines = {n: Machine(*map(max, before[n], after[n])) for n in before}
    bf16 = any(row.what == TRAINING_BF16 for row in todo)
    by_kind = {row.what: seconds[row.name] for row in todo[: 2 + bf16]}
    rows = []
    for row in todo:
        own = seconds[row.name]
        tokens = options.lanes * row.segment
        least = floor(shape, row.what, options.lanes, row.segment)
        limit = least.seconds(machines[row.threads], tokens, row.what == TRAINING_BF16)
        actual = tokens / speed(own)
        scoring = row.what in (STATIC, RULE, GATES)
        rows.append(
            {
                "what": row.what,
                "M": row.segment,
                "threads": row.threads,
                "tokens/s": speed(own),
                "/ f32 training": ratio(by_kind[TRAINING], own),
                "/ bf16 training": ratio(by_kind[TRAINING_BF16], own) if bf16 else None,
                "time / static": ratio(own, by_kind[STATIC]) if scoring else None,
                "ms": 1e3 * actual,
                "floor ms": 1e3 * limit,
                "floor / actual": limit / actual,
                "MB streamed": least.streamed / 1e6,
                "MB cached": least.cached / 1e6,
                "madds/token": float(least.products + least.stepwise),
            }
        )
    return rows, {f"{number} threads": m._asdict() for number, m in machines.items()}


def main() -> None:
    """Measure, print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    rows, machines = compare(SIZES[options.size], options)
    for name, found in machines.items():
        print(
            f"{name}: copy {found['copy'] / 1e9:.1f} GB/s, recurrent weights "
            f"{found['cached'] / 1e9:.1f} GB/s, float32 {found['flops'] / 1e9:.0f} GFLOP/s, "
            f"bfloat16 {found['bf16_flops'] / 1e9:.0f} GFLOP/s"
        )
    record(f"ceiling_{options.size}", rows, options, SHOWN, measured=machines)


if __name__ == "__main__":
    run_cli(main)
