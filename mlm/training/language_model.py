"""Stage 1: the language model, trained once on the whole corpus (becomes theta_0).

Letters: B lanes, T tokens per segment.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError, uninterrupted
from mlm.base.processes import ranks
from mlm.base.progress import Tick, adam_tensors, load_adam, saved_by_the_clock
from mlm.base.schedule import cosine
from mlm.base.terminal import progress_bar
from mlm.kernels.processor import multiplies_bfloat16, trains_bfloat16
from mlm.models.language_model import State, Weights
from mlm.models.output_layer import token_nll
from mlm.models.recurrent import BaseModel, Dropout, RecurrentLM, RecurrentState
from mlm.models.snail import snail_like
from mlm.reading.static import static_loss
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig
from mlm.store.models import load_lm, save_lm
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import damaged, entry, fitting, going_on_from, load_latest, save_tensors
from mlm.text.streams import LaneStream, Segment, Text, with_noise
from mlm.training.half_precision import half_precision_loss, serves

WARM_UP = 0.02


def shape_of(config: Config, vocabulary_size: int) -> BaseModel:
    """The model that the settings ask for, with its sizes for this vocabulary."""
    cutoffs: tuple[int, ...] = ()
    if vocabulary_size > config.model.adaptive_above:
        cutoffs = tuple(c for c in config.model.cutoffs if 0 < c < vocabulary_size)
    model = config.model
    sizes = (vocabulary_size, model.embedding, model.hidden, model.layers, cutoffs)
    if model.cell == "snail":
        return snail_like(RecurrentLM(*sizes), model.context)
    return RecurrentLM(*sizes, model.cell)


def resolve_precision(wanted: str, device: torch.device) -> torch.dtype:
    """bfloat16 where asked for, or where the processor multiplies it natively.

    Raises:
        UserError: asked for, and the processor cannot train in it.
    """
    cpu = device.type == "cpu"
    if wanted == "auto":
        native = multiplies_bfloat16() if cpu else torch.cuda.is_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    if wanted == "bfloat16" and cpu and not trains_bfloat16():
        raise UserError(
            "--lm.precision bfloat16: this processor cannot train in it; oneDNN has bfloat16 LSTM "
            "layers from AVX-512 on (and no further than ONEDNN_MAX_CPU_ISA, if that is set). Use "
            "--lm.precision auto, which is float32 here"
        )
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def weights_of_run(run: RunFolder, shape: BaseModel, vocabulary_hash: str) -> Weights:
    """The weights of another run's language model, to go on from.

    Raises:
        UserError: missing, damaged, of other sizes, or from another vocabulary.
    """
    try:
        weights, its, _ = load_lm(run.checkpoint("lm"), vocabulary_hash)
    except UserError as error:
        raise UserError(f"--lm.init {run.path}: {error}") from None
    others = sorted({name.partition("/")[0] for name in weights if "/" in name})
    if others:
        raise UserError(
            f"--lm.init {run.path}: its model was trained with {', '.join(others)}, without which "
            "it is another; go on from one that has none"
        )
    if its != shape:
        raise UserError(
            f"--lm.init {run.path}: its model is {its}, but the settings say {shape}; use the same "
            "--model.* and --text.* settings"
        )
    return weights


def unigram_biases(shape: BaseModel, text: Text, noise: float = 0.0) -> Weights:
    """Softmax biases that predict every token by its share of `text`, whatever the layers say.

    Args:
        noise: the share of the tokens that noise overwrites (--lm.byte-noise).

    With Adam a bias that starts at zero takes hundreds of steps to get there. An adaptive softmax
    has the tails' shares in the head, and a bias of its own in every tail.
    """
    counts = torch.ones(shape.vocabulary, dtype=torch.int64)
    for article in text.articles:
        counts += torch.from_numpy(np.bincount(article, minlength=shape.vocabulary))
    if len(text.noise):
        each = math.ceil(noise * text.tokens / len(text.noise))
        counts += each * torch.from_numpy(np.bincount(text.noise, minlength=shape.vocabulary))
    head, *tails = (counts[lo:hi] for lo, hi, _ in shape.clusters())
    shares = torch.cat([head, *(tail.sum()[None] for tail in tails)])
    biases = {f"softmax.tail{k}.bias": tail for k, tail in enumerate(tails, start=1)}
    biases["softmax.bias"] = shares
    return {name: (n / n.sum()).log().float() for name, n in biases.items()}


class LMTrainer:
    """State of stage 1: weights, Adam, cursor, random generator; saved and resumed bit for bit.

    Each of several processes (`mlm.base.processes`) reads its own of the lanes, and all take the
    same step along the sum of their gradients.
    """

    def __init__(self, config: Config, shape: BaseModel, text: Text, device: torch.device) -> None:
        self.settings: LMTrainingConfig = config.lm
        self.shape, self.text, self.device, self.seed = shape, text, device, config.seed
        self.precision = resolve_precision(config.lm.precision, device)
        seed = torch.Generator().manual_seed(config.seed)
        start = shape.initial_weights(seed) | unigram_biases(shape, text, config.lm.byte_noise)
        self.weights = {n: w.to(device).requires_grad_() for n, w in start.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.weights.values()),
            lr=config.lm.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.lm.weight_decay,
            fused=True,
        )
        lanes = min(config.lm.lanes, len(text.articles))
        self.stream = LaneStream(text.articles, lanes, config.lm.segment, text.eos, config.seed)
        self.dropout_generator = torch.Generator(device).manual_seed(config.seed + 1)
        own = ranks().share_lanes(lanes, "lm")
        self.own = np.arange(own.start, own.stop)
        """The lanes that this process reads."""
        self.state: State = shape.initial_state(len(self.own), device)
        self.extensions = tuple(config.extensions)
        learned = {
            e.name: e.with_model(text, self.weights["embedding"].detach(), lanes)
            for e in self.extensions
        }
        self.learned = {name: part for name, part in learned.items() if part is not None}
        """What extensions learn beside the weights."""
        self.steps = max(1, math.ceil(config.lm.epochs * text.tokens / (lanes * config.lm.segment)))
        self.step = 0
        self.validated = 0
        """The step after which the validation loss was last measured."""
        self.window = (0.0, 0)
        """(nats, tokens) trained on since then."""
        self.best = math.inf
        s = config.lm
        self.dropout = Dropout(
            s.dropout_embedding, s.dropout_input, s.dropout_hidden, s.dropout_output, s.weight_drop
        )
        self.masked = self.dropout != Dropout()
        if len(self.own) < lanes:
            self.dropout = dataclasses.replace(self.dropout, lanes=(own.start, lanes))

    def loss(
        self, segment: Segment, added: list[Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """(objective, nats per token, state): cross-entropy plus AR and TAR.

        Args:
            segment: of the lanes that this process reads; its share of the means over all.
            added: (B, T, E) each, what extensions add to the hidden states.
            mask: (B, T) of all lanes.
        """
        use = self.precision == torch.bfloat16
        plain = not (self.masked or self.settings.ar or self.settings.tar)
        count = mask.sum()
        if use and plain and serves(self.shape, self.device, *added):
            shape, before = self.shape, self.state
            assert isinstance(shape, RecurrentLM)
            assert isinstance(before, RecurrentState)
            own = (self.weights, shape, segment, before, added)
            loss, state = half_precision_loss(*own, count=count)
            return loss, loss.detach(), state
        with torch.autocast(self.device.type, torch.bfloat16, enabled=use):
            hidden = self.shape.run(
                self.weights, segment.inputs, self.state, self.dropout, self.dropout_generator
            )
            output = sum(added, hidden.output)
            nll = token_nll(self.weights, self.shape, output, segment.targets)
        loss = (nll.float() * segment.mask).sum() / count
        objective = loss
        width = self.shape.embedding
        if self.settings.ar:
            squares = (hidden.output.float().square().sum(-1) * segment.mask).sum()
            objective = objective + self.settings.ar * squares / (count * width)
        if self.settings.tar and segment.mask.shape[1] > 1:
            both = segment.mask[:, 1:]
            change = (hidden.raw[:, 1:] - hidden.raw[:, :-1]).float().square().sum(-1) * both
            pairs = mask[:, 1:].sum().clamp(min=1)
            change_mean = change.sum() / (pairs * width)
            objective = objective + self.settings.tar * change_mean
        return objective, loss.detach(), hidden.state.detach()

    def next_segment(self) -> Segment:
        """The next segment of every lane, with noise; it depends on seed and step alone."""
        segment, share = next(self.stream), self.settings.byte_noise
        if share and len(self.text.noise):
            generator = np.random.default_rng([self.seed, 2, self.step])
            segment = with_noise(segment, self.text.noise, share, generator)
        return segment.to(self.device)

    def train_step(self) -> tuple[float, int]:
        """One update of the weights; returns (nats per token, tokens).

        Raises:
            UserError: the loss is not finite; the weights are untouched by it.
        """
        everything = self.next_segment()
        segment = everything.select(self.own)
        self.state = self.state.keep(~segment.new)
        added = [part.added(everything) for part in self.learned.values()]
        mine = [rows[self.own[0] : self.own[-1] + 1] for rows in added]
        objective, loss, state = self.loss(segment, mine, everything.mask)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        value = float(self._sum_up([*self.weights.values(), *added], loss))
        if not math.isfinite(value):
            raise UserError(
                f"stage 1, step {self.step}: the loss is {value}. The last checkpoint is kept; "
                f"lower --learning-rate (now {self.settings.learning_rate}) or use "
                "--lm.precision float32, then --resume"
            )
        count = int(everything.mask.sum())
        for part, rows in zip(self.learned.values(), added, strict=True):
            assert rows.grad is not None
            part.learn(rows.grad * count, self.weights["embedding"])
        self._descend()
        self.state = state
        self.step += 1
        return value, count

    def _sum_up(self, leaves: list[Tensor], loss: Tensor) -> Tensor:
        """The loss of all processes; gives the leaves the sums of their gradients.

        What has none in any process, such as a tail of the softmax that no token touched, keeps
        none: Adam does not move it.
        """
        if ranks().world == 1:
            return loss
        told = torch.tensor([leaf.grad is not None for leaf in leaves]).to(leaves[0])
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        loss = loss.to(leaves[0].dtype)
        ranks().sum_([*(leaf.grad for leaf in leaves if leaf.grad is not None), loss, told])
        for leaf, known in zip(leaves, told.tolist(), strict=True):
            leaf.grad = leaf.grad if known else None
        return loss

    def _descend(self) -> None:
        """One step of Adam along the gradients that the weights hold."""
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * cosine(self.step, self.steps, WARM_UP)
        self.optimizer.step()

    def start_from(self, run: RunFolder, vocabulary_hash: str) -> None:
        """Begin with the language model of another run (see `weights_of_run`)."""
        weights = weights_of_run(run, self.shape, vocabulary_hash)
        for name, weight in self.weights.items():
            weight.data.copy_(weights[name])

    def validation_loss(self, valid: Text) -> float:
        """Mean loss on validation, nats per token: what chooses the best weights."""
        s = self.settings
        weights = self.model()
        extensions = tuple(e for e in self.extensions if e.of_model and e.active(weights))
        more = (s.lanes, s.segment, self.precision, extensions)
        return static_loss(weights, self.shape, valid, *more)

    # -- checkpoints ------------------------------------------------------------------------

    def model(self) -> Weights:
        """The language model, as its checkpoint holds it, with what extensions learned."""
        found = {n: w.detach() for n, w in self.weights.items()}
        for part in self.learned.values():
            found |= part.weights()
        return found

    def more_tensors(self) -> dict[str, Tensor]:
        """What a kind of training carries on beside weights, Adam and state; an extension's
        tensors have its name before theirs, as its weights have."""
        return {
            f"{name}/{what}": t
            for name, part in self.learned.items()
            for what, t in part.tensors().items()
        }

    def load_more(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `more_tensors`, which are among `tensors`."""
        for name, part in self.learned.items():
            own = {n: t for n, t in tensors.items() if n.startswith(f"{name}/")}
            part.load({n.removeprefix(f"{name}/"): t for n, t in own.items()})

    def save(self, run: RunFolder, vocabulary_hash: str) -> None:
        """Write everything that the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            tensors[f"weights/{name}"] = weight
        tensors |= adam_tensors(self.optimizer, self.weights)
        state = {f"state/{k}": t for k, t in enumerate(self.state.tensors())}
        tensors |= ranks().of_all_lanes(state, self.stream.lanes)
        tensors["dropout"] = self.dropout_generator.get_state()
        tensors |= self.more_tensors()
        about = {
            "vocabulary": vocabulary_hash,
            "step": self.step,
            "steps": self.steps,
            "validated": self.validated,
            "window": list(self.window),
            "best": self.best if math.isfinite(self.best) else None,
            "cursor": self.stream.state_dict(),
        }
        path, of_model = run.checkpoint("lm_last"), self.settings.through == "none"
        save_tensors(path, tensors, about, of_model, keep_previous=True)

    def load(self, run: RunFolder, vocabulary_hash: str) -> None:
        """Continue from `save`.

        Raises:
            UserError: the checkpoint belongs to other settings or another vocabulary.
        """
        path = run.checkpoint("lm_last")
        tensors, about = load_latest(path, "nothing to resume")
        carried = [f"state/{k}" for k in range(len(self.state.tensors()))]
        sizes = {f"weights/{n}": tuple(w.shape) for n, w in self.weights.items()}
        for name, part in zip(carried, self.state.tensors(), strict=True):
            sizes[name] = (self.stream.lanes, *part.shape[1:])
        found = {
            n: tuple(t.shape) for n, t in tensors.items() if n.startswith(("weights/", "state/"))
        }
        its = about.get("vocabulary"), about.get("steps")
        if its != (vocabulary_hash, self.steps) or sizes != found:
            raise UserError(
                f"{path} was made with other settings (vocabulary, model, text or length of "
                "training). Resume with the same flags, or choose another --out"
            )
        with going_on_from(path):
            self._go_on(tensors, carried)
            self.stream.load_state_dict(about["cursor"])
        self.step = entry(path, about, "step", int)
        self.validated = entry(path, {"validated": self.step, **about}, "validated", int)
        loss, tokens = entry(path, {"window": (0.0, 0), **about}, "window", tuple[float, int])
        self.window = (loss, int(tokens))
        best = entry(path, about, "best", float | None)
        self.best = math.inf if best is None else best
        if not 0 <= self.step <= self.steps:
            raise damaged(path, f"step {self.step} of {self.steps}")

    def _go_on(self, tensors: dict[str, Tensor], carried: Sequence[str]) -> None:
        """Take over the tensors that `save` wrote; `carried` names those of the state."""
        for name, weight in fitting(tensors, self.weights, "weights/").items():
            self.weights[name].data.copy_(weight)
        load_adam(self.optimizer, self.weights, tensors)
        own = slice(self.own[0], self.own[-1] + 1)
        like = dict(zip(carried, self.state.tensors(), strict=True))
        state = fitting(tensors, like, lanes=self.stream.lanes)
        self.state = self.state.of([state[name][own].to(self.device) for name in carried])
        self.dropout_generator.set_state(tensors["dropout"])
        self.load_more(tensors)


def train_lm(
    trainer: LMTrainer,
    config: Config,
    valid: Text,
    run: RunFolder,
    vocabulary_hash: str,
    quiet: bool = False,
) -> None:
    """Stage 1: train the language model, keep the weights that do best on validation.

    Writes `checkpoints/lm.safetensors` (best) and `lm_last.safetensors` (for `--resume`), and rows
    of metrics.jsonl. The state of training is saved by the clock and when interrupted, too.
    """
    last = run.checkpoint("lm_last")
    if config.resume and last.exists():
        trainer.load(run, vocabulary_hash)
        run.save_config(config)  # not before: a refused --resume changes nothing
        run.keep_rows(lambda row: row.get("stage") != "lm" or row["step"] <= trainer.validated)
    else:
        if config.lm.init is not None:
            trainer.start_from(RunFolder(config.lm.init), vocabulary_hash)
        run.keep_rows(lambda row: row.get("stage") != "lm")
        few = _few_segments(valid, config)
        static_loss(trainer.weights, trainer.shape, few, 1, config.lm.segment)
    save = functools.partial(trainer.save, run, vocabulary_hash)
    with saved_by_the_clock(save, config.checkpoint_minutes) as tick:
        _train(trainer, config, valid, run, vocabulary_hash, tick, quiet)


def _few_segments(text: Text, config: Config) -> Text:
    """The first two segments: evaluation must work before training begins."""
    return Text([text.articles[0][: 2 * config.lm.segment]], 1, text.eos)


def _train(
    trainer: LMTrainer,
    config: Config,
    valid: Text,
    run: RunFolder,
    vocabulary_hash: str,
    tick: Tick,
    quiet: bool,
) -> None:
    per_word = trainer.text.tokens_per_word
    every = math.ceil(trainer.steps / config.lm.validations)
    read, clock, validated = 0, time.perf_counter(), ""
    with progress_bar("training", trainer.steps, initial=trainer.step, quiet=quiet) as bar:
        while True:
            due = trainer.step % every == 0 or trainer.step == trainer.steps
            if due and trainer.step > trainer.validated:
                speed = read / per_word / (time.perf_counter() - clock)
                found = _validate(trainer, valid, run, vocabulary_hash, speed)
                validated = f", on validation {found:.0f}"
                read, clock = 0, time.perf_counter()
            if trainer.step == trainer.steps:
                return
            with uninterrupted():
                loss, count = trainer.train_step()
                nats, tokens = trainer.window
                trainer.window = (nats + loss * count, tokens + count)
            tick()
            read += count
            if trainer.step % 20 == 0:
                seen = trainer.text.word_perplexity(trainer.window[0] / trainer.window[1])
                bar.set_postfix_str(f"perplexity per word {seen:.0f}{validated}", refresh=False)
            bar.update()


def _validate(
    trainer: LMTrainer, valid: Text, run: RunFolder, vocabulary_hash: str, speed: float
) -> float:
    """The word perplexity of the validation text; logged, and the weights kept if they are the
    best."""
    s = trainer.settings
    loss = trainer.validation_loss(valid)
    if not math.isfinite(loss):
        raise UserError(
            f"stage 1, step {trainer.step}: the validation loss is {loss}. The last checkpoint is "
            f"kept; lower --learning-rate (now {s.learning_rate}), then --resume"
        )
    nats, tokens = trainer.window
    perplexity = valid.word_perplexity(loss)
    row: dict[str, Any] = {
        "stage": "lm",
        "step": trainer.step,
        "tokens": trainer.step * trainer.stream.lanes * s.segment,
        "train_loss": nats / tokens,
        "valid_loss": loss,
        "valid_word_perplexity": perplexity,
        "words_per_second": speed or None,  # None: the validation was all that was left to do
        "precision": str(trainer.precision).removeprefix("torch."),
    }
    with uninterrupted():
        run.log(**row)
        trainer.validated, trainer.window = trainer.step, (0.0, 0)
        if loss < trainer.best:
            trainer.best = loss
            save_lm(
                run.checkpoint("lm"),
                trainer.model(),
                trainer.shape,
                vocabulary_hash,
                step=trainer.step,
                valid_loss=loss,
            )
        trainer.save(run, vocabulary_hash)
    return perplexity
