"""Stage 2: train the meta-learner, or the weights it starts from.

Letters: B lanes, M tokens per segment, A articles.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError, uninterrupted
from mlm.base.names import rule_label
from mlm.base.processes import ranks
from mlm.base.progress import adam_tensors, load_adam, saved_by_the_clock
from mlm.base.schedule import cosine
from mlm.base.terminal import progress_bar
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.reading.meta_gradient import MetaGradient, meta_gradient, whole_of
from mlm.reading.pes import Evolution
from mlm.reading.second_order import second_order
from mlm.reading.step import (
    Reader,
    begin,
    prepared,
)
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import Parameters
from mlm.settings.sections import MetaConfig
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import (
    damaged,
    entry,
    fitting,
    going_on_from,
    load_latest,
    save_tensors,
)
from mlm.text.streams import MixedLanes, Segment, Text

EXTENSION_GAIN = "gain_with_extension_per_word"
"""In metrics.jsonl: nats per word gained on validation with what an extension learned."""


def _norm(tensors: Parameters) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def weights_to_learn(base: AdaptationBase, learn: Sequence[str]) -> tuple[str, ...]:
    """Names of the language model's weights that meta-training moves.

    `theta_0`: those that adapt; `static`: those that never do. Low-rank changes start at zero and
    stay there.
    """
    found = [
        name for name in base.static if ("theta_0" if name in base.dynamic else "static") in learn
    ]
    return tuple(found)


def reptile(base: AdaptationBase, reader: Reader, learn: Sequence[str]) -> Weights:
    """theta_0 minus the lanes' mean weights: a step along minus this moves towards them.

    Reptile (Nichol et al. 2018, eq. 2), with where reading has led as the inner solution.
    """
    return {n: base.weights[n] - reader.weights[n].mean(0) for n in learn if n in base.dynamic}


class MetaTrainer:
    """State of stage 2 for one rule: parameters, Adam, readers, cursor; saved and resumed.

    Each of several processes (`mlm.base.processes`) reads its own of the lanes.
    """

    def __init__(
        self,
        base: AdaptationBase,
        rule: LinearGates,
        start: Parameters,
        text: Text,
        settings: MetaConfig,
        seed: int,
    ) -> None:
        self.rule, self.settings = rule, settings
        self.learn = weights_to_learn(base, settings.learn)
        own = {n: base.weights[n].clone() for n in self.learn}
        self.base = dataclasses.replace(base, weights={**base.weights, **own})
        self.parameters = {n: p.clone() for n, p in start.items()}
        self.trained = {**self.parameters, **{f"weights/{n}": w for n, w in own.items()}}
        """What Adam moves, in its order."""
        groups = [
            {"params": list(self.parameters.values()), "peak": settings.learning_rate},
            {"params": list(own.values()), "peak": settings.weight_rate},
        ]
        self.optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.99))
        self.lanes = MixedLanes(text, settings.lanes, settings.stream_share, base.segment, seed + 2)
        share = ranks().share_lanes(settings.lanes, "meta")
        self.mine = np.arange(share.start, share.stop)
        """The lanes that this process reads."""
        self.reader = begin(self.base, len(self.mine), rule.bind(self.parameters, self.base))
        self.evolution: Evolution | None = None
        if settings.gradient == "pes":
            self.evolution = Evolution(
                self.base,
                rule,
                self.parameters,
                len(self.mine),
                pairs=settings.pes_pairs,
                sigma=settings.pes_sigma,
                seed=seed + 3,
                # in thousandths, of either memory
                scale={n: 10.0 for n in start if n.split("/")[-1] == "flush_scale"},
                ewc=settings.ewc,
            )
        self.step = 0
        self.judged = -1
        """The step at which the validation gain was last measured."""
        self.best: tuple[float, Parameters] = (-math.inf, {})
        """(gain, what was trained) of the best step so far."""
        self.flushed = 0
        """How often the guard reset a lane."""

    def gradient(self, unroll: Sequence[Segment]) -> MetaGradient:
        """The meta-gradient of an unroll of all lanes, as `settings.gradient` says."""
        found = self._own_gradient(unroll)
        if ranks().world == 1:
            return found
        tensors = [*found.gradients.values(), *found.weights.values()]
        numbers = torch.tensor([found.loss, float(found.flushed)]).to(tensors[0])
        ranks().sum_([*tensors, numbers])
        return found._replace(loss=float(numbers[0]), flushed=round(float(numbers[1])))

    def _own_gradient(self, unroll: Sequence[Segment]) -> MetaGradient:
        """What the lanes that this process reads contribute to it."""
        mode, ewc = self.settings.gradient, self.settings.ewc
        some = [segment.select(self.mine) for segment in unroll]
        if self.evolution is not None:
            found = self.evolution.step(self.parameters, some, whole_of(unroll, 0))
            return MetaGradient(*found[:3], {}, self.reader, found.flushed)
        learn = self.learn
        if self.settings.theta_0 == "reptile":
            learn = tuple(n for n in learn if n not in self.base.dynamic)
        state, whole = (self.parameters, self.reader, some), whole_of(unroll, 1)
        if mode == "second":
            found = second_order(self.base, self.rule, *state, learn, ewc, whole)
        else:
            assert mode != "pes"
            mode = "reverse" if mode == "auto" else mode  # stages choose, here nothing is known
            bound = self.rule.bind(self.parameters, self.base)
            base = prepared(self.base, bound)
            found = meta_gradient(base, bound, *state, mode, learn, ewc, whole)
        if self.settings.theta_0 == "reptile":
            share = len(self.mine) / self.settings.lanes
            moved = reptile(self.base, found.reader, self.learn)
            found.weights.update({n: w * share for n, w in moved.items()})
        return found

    def train_step(self) -> tuple[float, int]:
        """One meta-update; returns (meta-loss in nats per token, tokens read).

        Raises:
            UserError: loss or gradient is not finite; nothing is moved by it.
        """
        device = self.reader.age.device
        unroll = [self.lanes.next().to(device) for _ in range(self.settings.unroll)]
        found = self.gradient(unroll)
        self.rule.mask(found.gradients)
        parts = [found.gradients, found.weights]
        norms = [_norm(part) for part in parts]
        if not all(map(math.isfinite, (found.loss, *norms))):
            raise UserError(
                f"stage 2, rule {self.rule.name}, step {self.step}: loss {found.loss}, gradient "
                f"norm {max(norms)}. The best parameters so far are kept; lower "
                f"--meta.learning-rate (now {self.settings.learning_rate})"
            )
        self._move(parts, norms)
        self.reader = found.reader
        if self.settings.theta_0 == "gradient":
            self._carry_along()
        self.step += 1
        self.flushed += found.flushed
        return found.loss, sum(int(s.mask.sum()) for s in unroll)

    def _move(self, parts: Sequence[Parameters], norms: Sequence[float]) -> None:
        """One step of Adam; the gradients of the rule and of the weights are clipped apart."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(self.step, self.settings.steps)
        if "rule" not in self.settings.learn:
            parts[0].clear()
        self._before = {n: self.base.weights[n].clone() for n in self.learn}
        for gradients, norm, prefix in zip(parts, norms, ("", "weights/"), strict=True):
            shrink = min(1.0, self.settings.clip / max(norm, 1e-12))
            for name, value in gradients.items():
                self.trained[prefix + name].grad = value * shrink
        self.optimizer.step()
        self.rule.project(self.parameters)

    def _carry_along(self) -> None:
        """Move the lanes by what theta_0 moved: their distance from it is what they have learned.

        The readers' weights are written in place: they are this trainer's own.
        """
        for name in self.learn:
            if name in self.base.dynamic:
                self.reader.weights[name].add_(self.base.weights[name] - self._before[name])

    def save(self, run: RunFolder, identity: str) -> None:
        """Write everything the next step depends on, and the best parameters so far."""
        lanes = self.settings.lanes
        tensors = {f"reader/{n}": t for n, t in self.reader.tensors_of_all(lanes).items()}
        tensors |= {f"best/{n}": p for n, p in self.best[1].items()}
        for name, parameter in self.trained.items():
            tensors[f"parameters/{name}"] = parameter
        tensors |= adam_tensors(self.optimizer, self.trained)
        if self.evolution is not None:
            own = self.evolution.state_tensors(lanes)
            tensors |= {f"evolution/{n}": t for n, t in own.items()}
        about = {
            "identity": identity,
            "step": self.step,
            "judged": self.judged,
            "gain": self.best[0] if self.best[1] else None,
            "cursor": self.lanes.state_dict(),
            "flushed": self.flushed,
        }
        path = run.checkpoint(f"{self.rule.name}_last")
        save_tensors(path, tensors, about, keep_previous=True)

    def load(self, run: RunFolder, identity: str) -> None:
        """Continue from `save`, if there is one and it was made under the same `identity`."""
        path = run.checkpoint(f"{self.rule.name}_last")
        if not path.exists():
            return
        tensors, about = load_latest(path, "nothing to resume")
        if about.get("identity") != identity:
            return
        with going_on_from(path):
            self._go_on(tensors, about)
        numbers = [entry(path, about, k, int) for k in ("step", "judged", "flushed")]
        self.step, self.judged, self.flushed = numbers
        gain = entry(path, about, "gain", float | None)
        if gain is not None:
            self.best = (gain, self.best[1])
        if not 0 <= self.step <= self.settings.steps:
            raise damaged(path, f"step {self.step} of {self.settings.steps}")

    def _go_on(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Take over what `save` wrote."""
        device = self.reader.age.device
        found = fitting(tensors, self.trained, "parameters/")
        for name, parameter in self.trained.items():
            parameter.copy_(found[name])
        load_adam(self.optimizer, self.trained, tensors)
        if self.evolution is not None:
            own = {n: t for n, t in tensors.items() if n.startswith("evolution/")}
            self.evolution.load_state_tensors(
                {n.removeprefix("evolution/"): t for n, t in own.items()}, self.settings.lanes
            )
        kept = {n: tensors[f"reader/{n}"] for n in self.reader.tensors()}
        reader = self.reader.of_share(kept, self.settings.lanes)
        like = {n: t for n, t in self.reader.tensors().items() if not n.startswith("extras/")}
        fitting(reader.tensors(), like)  # what extensions remember grows
        self.reader = reader
        self.lanes.load_state_dict(about["cursor"])
        if about["gain"] is not None:
            best = fitting(tensors, self.trained, "best/")
            self.best = (-math.inf, {n: t.to(device) for n, t in best.items()})


def train_meta(
    trainer: MetaTrainer,
    judge: Callable[[MetaTrainer], float],
    run: RunFolder,
    budget: int,
    text: Text,
    judged_per_word: float,
    identity: str,
    resume: bool = False,
    quiet: bool = False,
    minutes: float = 5.0,
) -> tuple[Parameters, float]:
    """Train one rule; keep the step at which `judge` (validation gain, nats per token) is best.

    `judge` is called exactly `budget` times, the start included. Writes rows of metrics.jsonl and
    `checkpoints/<rule>_last.safetensors`, which is saved at every judgement, so many `minutes`
    after the last save, and when interrupted; `identity` names what the run depends on.

    Args:
        text: what is trained on.
        judged_per_word: tokens per word of the text that `judge` measures on.

    Returns:
        the best of what was trained (`MetaTrainer.trained`) and its gain.
    """
    name, steps = trainer.rule.name, trainer.settings.steps
    marks = sorted({round(k * steps / max(1, budget - 1)) for k in range(budget)})
    if resume:
        trainer.load(run, identity)
    run.keep_rows(lambda row: not _ahead(row, trainer))
    save = functools.partial(trainer.save, run, identity)
    bar = progress_bar(rule_label(name), steps, initial=trainer.step, quiet=quiet)
    with bar, saved_by_the_clock(save, minutes) as tick:
        while True:
            if trainer.step in marks and trainer.step > trainer.judged:
                _judge(trainer, judge, run, judged_per_word, identity)
            if trainer.step >= steps:
                break
            clock = time.perf_counter()
            with uninterrupted():
                loss, tokens = trainer.train_step()
                speed = tokens / text.tokens_per_word / (time.perf_counter() - clock)
                run.log(
                    stage="meta",
                    rule=name,
                    step=trainer.step,
                    train_loss=loss,
                    words_per_second=speed,
                    flushed=trainer.flushed or None,
                )
            tick()
            gain = trainer.best[0] * judged_per_word
            told = f"on validation {gain:.3f} nats per word gained"
            reset = f", {trainer.flushed} lanes reset by the guard" if trainer.flushed else ""
            bar.set_postfix_str(told + reset, refresh=False)
            bar.update()
    buffers.clear()
    gain, best = trainer.best
    return best, gain


def _ahead(row: dict[str, Any], trainer: MetaTrainer) -> bool:
    """Whether a row of metrics.jsonl is of this rule and lies beyond where `trainer` stands."""
    if (row.get("stage"), row.get("rule")) != ("meta", trainer.rule.name):
        return False
    reached = trainer.judged if "gain" in row else trainer.step
    return trainer.judged < 0 or row["step"] > reached or EXTENSION_GAIN in row


def _judge(
    trainer: MetaTrainer,
    judge: Callable[[MetaTrainer], float],
    run: RunFolder,
    judged_per_word: float,
    identity: str,
) -> None:
    """Measure the gain on validation, keep the parameters if it is the best, save."""
    buffers.clear()  # those of an unroll, which reading has no use for
    gain = judge(trainer)
    finite = math.isfinite(gain)
    if not finite and not trainer.best[1]:
        raise UserError(
            f"stage 2, rule {trainer.rule.name}, step {trainer.step}: the validation loss is not "
            "finite. Tune again with a larger --budget, or choose another --meta.start"
        )
    with uninterrupted():
        run.log(
            stage="meta",
            rule=trainer.rule.name,
            step=trainer.step,
            gain=gain if finite else None,
            gain_per_word=gain * judged_per_word if finite else None,
        )
        trainer.judged = trainer.step
        if gain > trainer.best[0]:
            trainer.best = (gain, {n: p.clone() for n, p in trainer.trained.items()})
        trainer.save(run, identity)
