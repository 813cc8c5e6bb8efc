"""Stage 2: estimate the Fisher, then train the meta-learner by its first-order gradient.

Letters: B lanes, M tokens per segment, A articles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mlm import buffers
from mlm.checkpoint import RunFolder, adam_tensors, load_adam, load_tensors, save_tensors
from mlm.config import MetaConfig
from mlm.errors import UserError, uninterrupted
from mlm.gates import LinearGates
from mlm.learner import Parameters
from mlm.lm import LMShape, Weights
from mlm.memory import LongTerm
from mlm.rollout import Reader, begin, meta_gradient, open_articles, score_segment
from mlm.scoring import score_articles
from mlm.streams import LaneStream, Segment
from mlm.training import Text, cosine
from mlm.tuning import TuneText


@torch.no_grad()
def estimate_fisher(
    weights: Weights,
    shape: LMShape,
    dynamic: tuple[str, ...],
    text: Text,
    segment: int,
    words: int,
    lanes: int = 16,
    quiet: bool = True,
) -> LongTerm:
    """Long-term memory: theta_0 with the diagonal empirical Fisher of its dynamic weights.

    The mean over segments of the squared per-segment gradient (Krause et al. 2018, eq. 5), read
    statically on the first `words` words of `text`.
    """
    memory = LongTerm(shape, weights, dynamic, {}, 0.0, segment)
    stream = LaneStream(text.articles, min(lanes, len(text.articles)), segment, text.eos)
    reader = begin(memory, stream.lanes)
    squares = {n: torch.zeros_like(weights[n]) for n in dynamic}
    segments, tokens, total = 0, 0, 0.0
    wanted = min(text.tokens, int(words * text.tokens_per_word))
    device = weights[dynamic[0]].device
    with tqdm(total=wanted, desc="Fisher", unit="tok", unit_scale=True, disable=quiet) as bar:
        for raw in stream:
            piece = raw.to(device)
            reader = open_articles(memory.start(), reader, piece.new)
            scored = score_segment(memory, reader, piece)
            reader = reader._replace(state=scored.state)
            full = piece.mask.all(1)
            for n, gradient in scored.gradients.items():
                squares[n] += gradient[full].square().sum(0)
            segments += int(full.sum())
            count = int(piece.mask.sum())
            total += float(scored.nll.sum())
            tokens += count
            bar.update(count)
            if tokens >= wanted and segments:
                break
    if not segments:
        raise UserError(
            f"no held-out article is as long as one segment (--adapt.segment {segment}); use a "
            "smaller M or more text"
        )
    rms = {n: (s / segments).sqrt() for n, s in squares.items()}
    if not all(bool(r.isfinite().all()) for r in rms.values()):
        raise UserError(
            "the Fisher is not finite: the language model's loss is NaN; train it again"
        )
    return LongTerm(shape, weights, dynamic, rms, total / tokens, segment)


class MixedLanes:
    """Held-out articles in lanes: some reset at every border, some one long text each."""

    def __init__(
        self, text: Text, lanes: int, stream_share: float, segment: int, seed: int
    ) -> None:
        self.long = round(lanes * stream_share)
        self.parts: list[LaneStream] = []
        if self.long < lanes:
            self.parts.append(LaneStream(text.articles, lanes - self.long, segment, text.eos, seed))
        if self.long:
            filled = [np.asarray(a) for a in text.articles if len(a)]
            order = np.random.default_rng([seed, 1]).permutation(len(filled))
            # With fewer articles than lanes every lane still gets a text of its own.
            need = max(len(order), self.long)
            order = np.resize(order, need)
            texts = [
                np.concatenate([filled[a] for a in order[k :: self.long]]) for k in range(self.long)
            ]
            self.parts.append(LaneStream(texts, self.long, segment, text.eos, seed))

    def __iter__(self) -> Iterator[Segment]:
        while True:
            yield self.next()

    def next(self) -> Segment:
        """The next segment of every lane."""
        pieces = [next(part) for part in self.parts]
        if len(pieces) == 1:
            return pieces[0]
        columns = list(zip(*pieces, strict=True))
        inputs, targets, mask, new = (torch.cat(column) for column in columns[:4])
        article, start = (np.concatenate(column) for column in columns[4:])
        return Segment(inputs, targets, mask, new, article, start)

    def state_dict(self) -> list[dict[str, list[int]]]:
        """The cursors as plain integers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, cursors: list[dict[str, list[int]]]) -> None:
        """Continue where `state_dict` was taken."""
        for part, cursor in zip(self.parts, cursors, strict=True):
            part.load_state_dict(cursor)


def validation_gain(
    memory: LongTerm,
    rule: LinearGates,
    parameters: Parameters,
    text: TuneText,
    static: dict[str, float],
) -> float:
    """Nats per token gained over static, averaged over the protocols in `static`.

    The stream is read as a few parallel texts here (only to choose a step; scores are not).
    """
    bound = rule.bind(parameters, memory)
    tokens = sum(len(a) for a in text.articles)
    gains = []
    for protocol, base in static.items():
        articles = _judged(text, protocol)
        nll = score_articles(memory, bound, articles, text.eos, text.lanes).total
        gains.append((base - nll) / tokens)
    return float(np.mean(gains))


def _judged(text: TuneText, protocol: str) -> list[np.ndarray]:
    """The texts a step is judged on: the articles, or a few parallel streams of them."""
    articles = list(text.articles)
    return _joined(articles, 4) if protocol == "stream" else articles


def _joined(articles: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """Successive articles joined to at most `number` texts of about equal length."""
    total, texts, part, size = sum(len(a) for a in articles), [], [], 0
    for article in articles:
        part.append(article)
        size += len(article)
        if size >= total / number:
            texts.append(np.concatenate(part))
            part, size = [], 0
    return [*texts, np.concatenate(part)] if part else texts


def static_of(memory: LongTerm, text: TuneText, protocols: Sequence[str]) -> dict[str, float]:
    """Static losses in nats of the texts `validation_gain` reads, by protocol."""
    found = {}
    for protocol in protocols:
        articles = _judged(text, protocol)
        found[protocol] = score_articles(memory, None, articles, text.eos, text.lanes).total
    return found


class MetaTrainer:
    """State of stage 2 for one rule: parameters, Adam, readers, cursor; saved and resumed."""

    def __init__(
        self,
        memory: LongTerm,
        rule: LinearGates,
        start: Parameters,
        text: Text,
        settings: MetaConfig,
        seed: int,
    ) -> None:
        self.memory, self.rule, self.settings = memory, rule, settings
        self.parameters = {n: p.clone() for n, p in start.items()}
        self.optimizer = torch.optim.Adam(
            list(self.parameters.values()), lr=settings.learning_rate, betas=(0.9, 0.99)
        )
        self.lanes = MixedLanes(
            text, settings.lanes, settings.stream_share, memory.segment, seed + 2
        )
        self.reader = begin(memory, settings.lanes, rule.bind(self.parameters, memory))
        self.step = 0
        self.judged = -1
        """The step at which the validation gain was last measured."""
        self.best: tuple[float, Parameters] = (-math.inf, {})
        """(gain, parameters) of the best step so far."""

    def train_step(self) -> tuple[float, int]:
        """One meta-update; returns (meta-loss in nats per token, tokens read).

        Raises:
            UserError: loss or gradient is not finite; the parameters are untouched by it.
        """
        device = self.reader.age.device
        unroll = [self.lanes.next().to(device) for _ in range(self.settings.unroll)]
        bound = self.rule.bind(self.parameters, self.memory)
        found = meta_gradient(
            self.memory, bound, self.parameters, self.reader, unroll, self.settings.gradient
        )
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.gradients.values()))
        if not (math.isfinite(found.loss) and math.isfinite(norm)):
            raise UserError(
                f"stage 2, rule {self.rule.name}, step {self.step}: loss {found.loss}, gradient "
                f"norm {norm}. The best parameters so far are kept; lower --meta.learning-rate "
                f"(now {self.settings.learning_rate})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * cosine(self.step, self.settings.steps)
        shrink = min(1.0, self.settings.clip / max(norm, 1e-12))
        for name, parameter in self.parameters.items():
            parameter.grad = found.gradients[name] * shrink
        self.optimizer.step()
        self.rule.project(self.parameters)
        self.reader = found.reader
        self.step += 1
        return found.loss, sum(int(s.mask.sum()) for s in unroll)

    def save(self, run: RunFolder, identity: str) -> None:
        """Write everything the next step depends on, and the best parameters so far."""
        tensors: dict[str, Tensor] = {"reader/age": self.reader.age}
        tensors |= {f"best/{n}": p for n, p in self.best[1].items()}
        for name, parameter in self.parameters.items():
            tensors[f"parameters/{name}"] = parameter
        tensors |= adam_tensors(self.optimizer, self.parameters)
        tensors |= {f"reader/weights/{n}": w for n, w in self.reader.weights.items()}
        state = self.reader.state.tensors()
        tensors |= {f"reader/state/{k}": t for k, t in enumerate(state)}
        tensors["reader/exploded"] = self.reader.exploded
        about = {
            "identity": identity,
            "step": self.step,
            "judged": self.judged,
            "gain": self.best[0] if self.best[1] else None,
            "cursor": self.lanes.state_dict(),
        }
        save_tensors(run.checkpoint(f"{self.rule.name}_last"), tensors, about)

    def load(self, run: RunFolder, identity: str) -> None:
        """Continue from `save`, if there is one and it was made under the same `identity`."""
        path = run.checkpoint(f"{self.rule.name}_last")
        if not path.exists():
            return
        tensors, about = load_tensors(path, "nothing to resume")
        if about.get("identity") != identity:
            return
        device = self.reader.age.device
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameters/{name}"])
        load_adam(self.optimizer, self.parameters, tensors)
        state = self.reader.state
        parts = [tensors[f"reader/state/{k}"].to(device) for k in range(len(state.tensors()))]
        self.reader = Reader(
            {n: tensors[f"reader/weights/{n}"].to(device) for n in self.reader.weights},
            state.of(parts),
            tensors["reader/age"].to(device),
            tensors["reader/exploded"].to(device),
        )
        self.lanes.load_state_dict(about["cursor"])
        self.step, self.judged = about["step"], about["judged"]
        if about["gain"] is not None:
            best = {n: tensors[f"best/{n}"].to(device) for n in self.parameters}
            self.best = (about["gain"], best)


def train_meta(
    trainer: MetaTrainer,
    judge: Callable[[Parameters], float],
    run: RunFolder,
    budget: int,
    tokens_per_word: float,
    identity: str,
    resume: bool = False,
    quiet: bool = False,
) -> tuple[Parameters, float]:
    """Train one rule; keep the step at which `judge` (validation gain, nats per token) is best.

    `judge` is called exactly `budget` times, the start included. Writes rows of metrics.jsonl and
    `checkpoints/<rule>_last.safetensors`; `identity` names what the run depends on.

    Returns:
        the best parameters and their gain.
    """
    name, steps = trainer.rule.name, trainer.settings.steps
    marks = sorted({round(k * steps / max(1, budget - 1)) for k in range(budget)})
    if resume:
        trainer.load(run, identity)
    run.keep_rows(lambda row: not _ahead(row, trainer))
    with tqdm(total=steps, initial=trainer.step, desc=name, unit="step", disable=quiet) as bar:
        try:
            while True:
                if trainer.step in marks and trainer.step > trainer.judged:
                    _judge(trainer, judge, run, tokens_per_word, identity)
                if trainer.step >= steps:
                    break
                clock = time.perf_counter()
                with uninterrupted():
                    loss, tokens = trainer.train_step()
                    speed = tokens / tokens_per_word / (time.perf_counter() - clock)
                    run.log(
                        stage="meta",
                        rule=name,
                        step=trainer.step,
                        train_loss=loss,
                        words_per_second=speed,
                    )
                ppl = math.exp(min(50.0, loss * tokens_per_word))
                bar.set_postfix_str(
                    f"loss {loss:.3f}, ppl {ppl:.0f}, gain {trainer.best[0]:.3f} nats/token, "
                    f"{speed:,.0f} words/s"
                )
                bar.update()
        except KeyboardInterrupt:
            trainer.save(run, identity)
            raise
    buffers.clear()
    gain, best = trainer.best
    return best, gain


def _ahead(row: dict[str, Any], trainer: MetaTrainer) -> bool:
    """Whether a row of metrics.jsonl is of this rule and lies beyond where `trainer` stands."""
    if (row.get("stage"), row.get("rule")) != ("meta", trainer.rule.name):
        return False
    reached = trainer.judged if "gain" in row else trainer.step
    return trainer.judged < 0 or row["step"] > reached


def _judge(
    trainer: MetaTrainer,
    judge: Callable[[Parameters], float],
    run: RunFolder,
    tokens_per_word: float,
    identity: str,
) -> None:
    """Measure the gain on validation, keep the parameters if it is the best, save."""
    gain = judge(trainer.parameters)
    finite = math.isfinite(gain)
    if not finite and not trainer.best[1]:
        raise UserError(
            f"stage 2, rule {trainer.rule.name}, step {trainer.step}: the validation loss is not "
            "finite. Tune again with a larger --evaluation.budget, or choose another --meta.start"
        )
    with uninterrupted():
        run.log(
            stage="meta",
            rule=trainer.rule.name,
            step=trainer.step,
            gain=gain if finite else None,
            gain_per_word=gain * tokens_per_word if finite else None,
        )
        trainer.judged = trainer.step
        if gain > trainer.best[0]:
            trainer.best = (gain, {n: p.clone() for n, p in trainer.parameters.items()})
        trainer.save(run, identity)
