"""Size L on one device: training by the library's LSTM, reading, meta-training, the published loop.

One after the other, each alone in memory, so that the peaks are its own. Letters: B lanes,
M tokens per segment.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.contestants import Setting, krause
from benchmarks.timing import (
    EOS,
    SIZES,
    Step,
    Work,
    clock,
    random_articles,
    reading,
    speed,
    world,
)
from mlm.models.recurrent import RecurrentLM
from mlm.reading.static import StaticReader
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, MetaConfig
from mlm.text.streams import Text
from mlm.training.language_model import LMTrainer
from mlm.training.meta import MetaTrainer

SETTING = Setting(rate=3e-3, decay=8e-3)
STATIC_SEGMENT = 64
UPDATES = 4
"""Segments per turn."""
ROUNDS = 7
TINY = RecurrentLM(50, 8, 8, 2)
"""For tests."""


def reset_peak(device: torch.device) -> None:
    """Begin to measure memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int | None:
    """Bytes in use at most since `reset_peak`; None where the device does not tell."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _text(shape: RecurrentLM, lanes: int, segment: int, number: int) -> Text:
    articles = random_articles(shape, lanes, segment * number)
    return Text(articles, lanes * segment * number, EOS)


def _training(shape: RecurrentLM, lanes: int, device: torch.device, precision: Any) -> Work:
    """Steps of stage 1, without dropout."""
    settings = LMTrainingConfig(
        lanes=lanes,
        segment=STATIC_SEGMENT,
        dropout_input=0.0,
        dropout_hidden=0.0,
        dropout_output=0.0,
        precision=precision,
    )
    text = _text(shape, lanes, STATIC_SEGMENT, 32)
    trainer = LMTrainer(Config(lm=settings), shape, text, device)
    return lambda: sum(trainer.train_step()[1] for _ in range(UPDATES))


def _again(step: Step, segments: list[Any], width: int) -> Work:
    """A turn: the next few segments of articles that are open already."""
    step(segments[0])

    def work() -> int:
        for segment in segments[1:]:
            step(segment)
        return width * sum(segment.targets.shape[1] for segment in segments[1:])

    return work


def _static(shape: RecurrentLM, lanes: int, device: torch.device) -> Work:
    base, segments = world(shape, STATIC_SEGMENT, lanes, device=device, number=UPDATES + 1)
    reader = StaticReader(base, lanes)
    return _again(lambda segment: reader.read(segment).nll, segments, lanes)


def _adapting(
    shape: RecurrentLM, lanes: int, device: torch.device, segment: int, learned: bool
) -> Work:
    base, segments = world(shape, segment, lanes, device=device, number=UPDATES + 1)
    if learned:
        gates = LinearGates()
        bound = gates.bind(gates.start_at_rms(base, *SETTING), base)
    else:
        like = next(iter(base.rms.values()))
        bound = RMS().bind({n: like.new_tensor(x) for n, x in SETTING._asdict().items()}, base)
    return _again(reading(base, bound, lanes), segments, lanes)


def _published(shape: RecurrentLM, lanes: int, device: torch.device, segment: int) -> Work:
    """Krause's loop: one article at a time."""
    base, segments = world(shape, segment, 1, device=device, number=UPDATES * lanes // 4 + 1)
    return _again(krause(base, SETTING, 1), segments, 1)


def _meta(shape: RecurrentLM, lanes: int, device: torch.device, mode: Any) -> Work:
    base = world(shape, 20, lanes, device=device).base
    settings = MetaConfig(
        lanes=lanes, unroll=10, gradient=mode, stream_share=0.0, learning_rate=1e-4
    )
    rule = LinearGates()
    start = rule.start_at_rms(base, *SETTING)
    trainer = MetaTrainer(base, rule, start, _text(shape, lanes, 20, 40), settings, 0)
    return lambda: trainer.train_step()[1]


def _works(
    shape: RecurrentLM, lanes: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Work]]]:
    """Title and maker of every row; the first is what the others are compared with."""
    yield "training, float32", lambda: _training(shape, lanes, device, "float32")
    if device.type == "cuda":
        yield "training, bfloat16", lambda: _training(shape, lanes, device, "bfloat16")
    yield "static scoring", lambda: _static(shape, lanes, device)
    for segment in (20, 64):
        for name, learned in (("RMS", False), ("gates", True)):
            yield (
                f"adapting, {name}, M={segment}",
                lambda m=segment, learned=learned: _adapting(shape, lanes, device, m, learned),
            )
    yield "published loop, M=20", lambda: _published(shape, lanes, device, 20)
    yield "published loop, M=5", lambda: _published(shape, lanes, device, 5)
    for mode in ("reverse", "checkpoint", "forward"):
        yield f"meta-training, {mode}, M=20", lambda mode=mode: _meta(shape, lanes, device, mode)


def measure(device: torch.device, small: bool, left: Callable[[], float]) -> dict[str, Any]:
    """Tokens per second and peak memory of every row that the time allows."""
    shape, lanes = (TINY, 4) if small else (SIZES["L"], 16)
    rows: list[dict[str, Any]] = []
    for title, make in _works(shape, lanes, device):
        row: dict[str, Any] = {"work": title}
        rows.append(row)
        if left() < 0:
            row["skipped"] = "time is out"
            continue
        try:
            reset_peak(device)
            row |= _timed(make(), left) | {"peak bytes": peak(device)}
        except (RuntimeError, AssertionError) as error:  # out of memory is a RuntimeError
            row["error"] = str(error)[:500]
    first = rows[0].get("tokens/s")
    for row in rows:
        if first and "tokens/s" in row:
            row["of training, float32"] = row["tokens/s"] / first
    return {"rows": rows, "lanes": lanes, "model": str(shape)}


def _timed(work: Work, left: Callable[[], float]) -> dict[str, Any]:
    """A turn to warm up, then up to `ROUNDS`, at least one."""
    work()
    found: list[float] = []
    while not found or (len(found) < ROUNDS and left() > 0):
        begin = clock()
        tokens = work()
        found.append((clock() - begin) / tokens)
    return {"tokens/s": speed(found), "rounds": len(found)}
