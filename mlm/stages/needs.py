"""Peak memory and work of every part of a stage, from settings and the sizes of texts alone.

What is large is counted: weights, what every lane has of its own, logits, hidden states. The
coefficients are those of the operations as they are written; `benchmarks.memory` compares the sums
with measured peaks. Letters: B lanes, M tokens per segment, N numbers of a lane.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from mlm.base.names import CACHE, HAND_MADE, LEARNED
from mlm.models.base import AdaptationBase, choose_dynamic
from mlm.models.extension import Extension, Extent, Need
from mlm.models.low_rank import DIRECTIONS, LOW, base_of
from mlm.models.recurrence import leaves_cache
from mlm.models.recurrent import BaseModel
from mlm.page.top_k import TOP_K_WORDS
from mlm.reading.meta_gradient import snapshot_spacing
from mlm.reading.needs import (
    FLOAT,
    cache_bytes,
    distribution_bytes,
    extension_bytes,
    hidden_bytes,
    output_bytes,
    segment_bytes,
    weights_bytes,
)
from mlm.rules.family import HAND_MADE_RULES
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import UpdateRule
from mlm.runs.rules import rule_to_train
from mlm.runs.run import in_bfloat16
from mlm.settings.config import Config
from mlm.training.fisher import FISHER_LANES

MODES = ("reverse", "checkpoint", "forward")
"""First-order meta-gradients, fastest first."""


class Lengths(NamedTuple):
    """Sizes of a text."""

    tokens: int
    words: int
    articles: int
    longest: int
    """Tokens of the longest article."""

    @property
    def tokens_per_word(self) -> float:
        """See `mlm.text.streams.Text`."""
        return self.tokens / max(1, self.words)


class Effort(NamedTuple):
    """What takes time."""

    products: float = 0.0
    """Multiplications with addition."""
    moved: float = 0.0
    """Bytes read or written outside of products."""
    segments: float = 0.0
    """Steps of the loop over segments."""

    def times(self, factor: float) -> Effort:
        """As much of it."""
        return Effort(*(factor * x for x in self))

    def plus(self, other: Effort) -> Effort:
        """Both."""
        return Effort(*(a + b for a, b in zip(self, other, strict=True)))


class Phase(NamedTuple):
    """A part of a stage; of a stage's parts only one is in memory at once."""

    name: str
    bytes: float
    work: Effort = Effort()
    lanes: str | None = None
    """The setting whose lanes it is proportional to."""


@dataclass(frozen=True)
class RunSizes:
    """A run as formulas see it."""

    config: Config
    shape: BaseModel
    fused: bool
    """Whether the compiled kernels serve (`mlm.kernels.usable`)."""
    half: bool
    """Whether stage 1 multiplies in bfloat16."""
    train: Lengths
    """Articles of stage 1."""
    held_out: Lengths
    """Articles of stage 2."""
    valid: Lengths
    tune: Lengths
    """Validation articles that settings are judged on."""
    scored: Lengths
    tail_shares: tuple[float, ...] = ()
    """Of an adaptive softmax: which share of the tokens each tail has."""

    def with_config(self, config: Config) -> RunSizes:
        """The same run with other settings of the same model and text."""
        return dataclasses.replace(self, config=config)

    # -- sizes ------------------------------------------------------------------------------

    @cached_property
    def meta_weights(self) -> dict[str, torch.Tensor]:
        """All weights of the adaptation base without content."""
        found = {
            n: torch.empty(size, device="meta") for n, (size, _) in self.shape.layout().items()
        }
        for name in self.dynamic:
            if name.endswith(LOW):
                matrix = name.removesuffix(LOW)
                inputs = found[base_of(matrix)].shape[1]
                rank = min(self.config.adapt.rank, inputs)
                outputs = len(found["softmax.bias" if matrix == "softmax" else matrix])
                found[name] = torch.empty(outputs, rank, device="meta")
                found[matrix + DIRECTIONS] = torch.empty(rank, inputs, device="meta")
        return found

    @cached_property
    def dynamic(self) -> tuple[str, ...]:
        """Names of the weights that adapt."""
        return choose_dynamic(self.shape.layout(), self.config.adapt.dynamic)

    @cached_property
    def base(self) -> AdaptationBase:
        """The adaptation base without content."""
        weights = self.meta_weights
        rms = {n: weights[n] for n in self.dynamic}
        return AdaptationBase(
            self.shape, weights, self.dynamic, rms, 0.0, self.config.adapt.update_every
        )

    @cached_property
    def model_numbers(self) -> int:
        """Of the language model."""
        return self.shape.size

    @cached_property
    def base_numbers(self) -> int:
        """Of the adaptation base: weights, what changes them, and the Fisher."""
        found = {id(w): w.numel() for w in self.meta_weights.values()}
        return sum(found.values()) + self.own

    @cached_property
    def own(self) -> int:
        """N of the weights alone."""
        return sum(self.meta_weights[n].numel() for n in self.dynamic)

    @cached_property
    def largest(self) -> int:
        """Of the largest tensor that adapts."""
        return max(self.meta_weights[n].numel() for n in self.dynamic)

    def kept(self, rule: UpdateRule) -> int:
        """N with what a rule remembers beside the weights."""
        return self.own + sum(w.numel() for w in rule.state(self.base).values())

    def factors(self, rule: UpdateRule) -> float:
        """Numbers that a rule bound to the base holds, which all lanes share."""
        if not isinstance(rule, LinearGates):
            return 2.0 * self.own
        parameters = sum(p.numel() for p in rule.initial(self.base).values())
        return (8.0 + 8.0 * rule.slow) * self.own + 6.0 * parameters

    @cached_property
    def learned(self) -> tuple[LinearGates, ...]:
        """The rules that stage 2 trains."""
        meta = self.config.meta
        start: UpdateRule = HAND_MADE_RULES.get(meta.start, LinearGates())
        return tuple(rule_to_train(meta, name, start) for name in meta.rules)

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """Those that the settings ask for."""
        return self.config.extensions.enabled()

    def extent(self, lanes: int, text: Lengths, numbers: int, longest: int | None = None) -> Extent:
        """What extensions are told of such reading."""
        return Extent(
            lanes,
            self.config.adapt.update_every,
            text.tokens,
            text.longest if longest is None else longest,
            text.articles,
            self.shape.vocabulary,
            self.shape.embedding,
            numbers,
            text.tokens_per_word,
        )

    @property
    def reweights(self) -> bool:
        """Whether an extension weighs tokens: meta-training then scores segments twice."""
        return any(extension.reweights for extension in self.extensions)

    # -- one segment ------------------------------------------------------------------------

    def reading_bytes(self, lanes: int) -> float:
        """A segment read under weights of the lanes' own, beside these and their gradients."""
        extent = self.extent(lanes, self.scored, self.own)
        return segment_bytes(self.shape, extent, self.fused, self.tail_shares)

    def lane_bytes(self, lanes: int, text: Lengths, longest: int) -> float:
        """What extensions hold of lanes that read so many tokens."""
        return extension_bytes(self.extensions, self.extent(lanes, text, self.own, longest))

    def adapting_bytes(self, rule: UpdateRule, lanes: int, text: Lengths, longest: int) -> float:
        """Lanes that a rule writes, and what they share of it."""
        total = weights_bytes(lanes, self.kept(rule), self.own) + FLOAT * self.factors(rule)
        total += self.reading_bytes(lanes)
        if isinstance(rule, LinearGates):
            total += self.lane_bytes(lanes, text, longest)
        return total

    # -- time -------------------------------------------------------------------------------

    @cached_property
    def products(self) -> float:
        """Of one token, forward."""
        found = 0.0
        for name, (size, _) in self.shape.layout().items():
            if len(size) == 2 and "tail" not in name:
                found += math.prod(size)
        for share, (lo, hi, width) in zip(
            self.tail_shares, self.shape.clusters()[1:], strict=False
        ):
            found += share * width * (hi - lo)
        return found

    def static_work(self, tokens: float, lanes: int, steps: int, passes: float) -> Effort:
        """Reading under shared weights."""
        return Effort(passes * self.products * tokens, 0.0, tokens / (lanes * steps))

    @cached_property
    def streamed(self) -> float:
        """Bytes of recurrent weights that leave the cache, read for one token, there and back."""
        size = 2.0 if in_bfloat16(self.config.adapt) else FLOAT
        own = (self.meta_weights[n] for n in self.dynamic if n.endswith(".recurrent"))
        return 2 * size * sum(w.numel() for w in own if leaves_cache(w))

    def adapting_work(
        self, tokens: float, lanes: int, copies: float, scored: float = 1.0
    ) -> Effort:
        """Reading under the lanes' own weights, of which so many copies are moved per update;
        every segment is scored `scored` times."""
        steps = self.config.adapt.update_every
        moved = FLOAT * copies * self.own * tokens / steps + scored * self.streamed * tokens
        return Effort(scored * 3 * self.products * tokens, moved, tokens / (lanes * steps))


# -- the stages -----------------------------------------------------------------------------------


def stage_1(sizes: RunSizes) -> list[Phase]:
    """The language model: weights, their gradients, Adam's moments, and one segment."""
    config, lm = sizes.config, sizes.config.lm
    lanes = min(lm.lanes, sizes.train.articles)
    total = FLOAT * 4.0 * sizes.model_numbers + hidden_bytes(sizes.shape, lanes, lm.segment)
    shape, shares = sizes.shape, sizes.tail_shares
    if sizes.half and sizes.fused and not shape.cutoffs:
        total += output_bytes(shape, lanes, lm.segment, 0.5, shares) + FLOAT * sizes.model_numbers
    else:
        total += output_bytes(shape, lanes, lm.segment, 3.0, shares)
    extent = sizes.extent(lanes, sizes.train, sizes.own)
    total += sum(e.making(extent, extent).bytes for e in sizes.extensions if e.of_model)
    tokens = lm.epochs * sizes.train.tokens
    work = sizes.static_work(tokens, lanes, lm.segment, 3.0)
    if lm.through != "none":
        total += FLOAT * lanes * 5.0 * sizes.own + sizes.reading_bytes(lanes)
        work = work.plus(sizes.adapting_work(tokens, lanes, 6.0))
    work = work.plus(sizes.static_work(lm.validations * sizes.valid.tokens, lanes, lm.segment, 1.0))
    return [Phase("stage 1", total, work, "lm.lanes" if config.lm.lanes > 1 else None)]


def stage_2(sizes: RunSizes) -> list[Phase]:
    """The adaptation base, a tuned starting point, and every rule."""
    config, base = sizes.config, FLOAT * sizes.base_numbers
    evaluation, text = config.evaluation, sizes.held_out
    words = config.adapt.fisher_words * text.tokens_per_word
    lanes = min(FISHER_LANES, text.articles)
    numbers = 2 * sizes.own + sizes.largest
    fisher = FLOAT * (lanes * numbers + sizes.own) + sizes.reading_bytes(lanes)
    found = [
        Phase(
            "stage 2 (Fisher)",
            base + fisher,
            sizes.adapting_work(min(text.tokens, words), lanes, 4.0),
        )
    ]
    texts = [sizes.extent(lanes, some, sizes.own) for some in (text, sizes.train)]
    for extension in (e for e in sizes.extensions if not e.of_model):
        need = extension.making(*texts)
        if need != Need():
            reading = sizes.reading_bytes(lanes) if need.tokens else 0.0
            work = sizes.adapting_work(need.tokens, lanes, 6.0)
            found.append(Phase(_called(extension), base + need.bytes + reading, work))
    if config.meta.start in HAND_MADE and config.lm.through != "learned":
        rule = HAND_MADE_RULES[config.meta.start]
        tuned = sizes.adapting_bytes(rule, evaluation.lanes, sizes.tune, sizes.tune.longest)
        work = sizes.adapting_work(evaluation.budget * sizes.tune.tokens, evaluation.lanes, 6.0)
        found.append(Phase("stage 2 (tuning)", base + tuned, work, "evaluation.lanes"))
    for rule in sizes.learned:
        found += _of_rule(sizes, rule, base)
    return found


def _of_rule(sizes: RunSizes, rule: LinearGates, base: float) -> list[Phase]:
    """Training of a rule, its judgements, and what extensions learn with it."""
    meta, evaluation = sizes.config.meta, sizes.config.evaluation
    label = rule.name.replace("_", " ")
    reader = FLOAT * meta.lanes * sizes.kept(rule)
    judged = sizes.adapting_bytes(rule, evaluation.lanes, sizes.tune, sizes.tune.tokens // 4)
    tokens = evaluation.budget * len(evaluation.protocols) * sizes.tune.tokens
    found = [
        meta_part(sizes, rule),
        Phase(
            f"stage 2 (judging {label})",
            base + reader + judged,
            sizes.adapting_work(tokens, evaluation.lanes, 6.0),
            "evaluation.lanes",
        ),
    ]
    for extension in sizes.extensions:
        extent = sizes.extent(meta.lanes, sizes.held_out, sizes.kept(rule))
        need = extension.after_rule_need(extent)
        if need != Need():
            held = sizes.lane_bytes(meta.lanes, sizes.held_out, sizes.held_out.longest)
            total = base + reader + need.bytes + held + sizes.reading_bytes(meta.lanes)
            work = sizes.adapting_work(need.tokens, meta.lanes, 6.0)
            found.append(Phase(_called(extension), total, work))
    return found


def _called(extension: Extension) -> str:
    """What a part of stage 2 is called."""
    return f"stage 2 ({extension.name.replace('_', ' ')})"


def meta_part(sizes: RunSizes, rule: LinearGates) -> Phase:
    """Training of one rule by the meta-gradient that the settings name ("auto" = reverse)."""
    config, meta = sizes.config, sizes.config.meta
    mode = "reverse" if meta.gradient == "auto" else meta.gradient
    held = config.adapt.update_every * meta.unroll * meta.steps
    longest = min(held, sizes.held_out.tokens // max(1, round(meta.lanes * meta.stream_share)))
    copies = meta_copies(sizes, rule, mode)
    total = FLOAT * (sizes.base_numbers + meta.lanes * copies + sizes.factors(rule))
    if set(meta.learn) != {"rule"}:
        total += FLOAT * 6.0 * sizes.model_numbers
    total += sizes.reading_bytes(meta.lanes) + sizes.lane_bytes(meta.lanes, sizes.held_out, longest)
    tokens = float(held * meta.lanes)
    times = {"checkpoint": 1.8, "forward": 1.3, "pes": 2.0 * meta.pes_pairs, "second": 6.0}
    read = times.get(mode, 1.0)
    again = mode in MODES and sizes.reweights
    moved = {"reverse": 10.0, "checkpoint": 9.0, "forward": 24.0}.get(mode, 10.0)
    work = sizes.adapting_work(read * tokens, meta.lanes, moved, (read + again) / read)
    label = rule.name.replace("_", " ")
    name = f"stage 2 (meta-training {label}, {mode}, {meta.lanes} lanes)"
    return Phase(name, total, work, "meta.lanes")


def meta_copies(sizes: RunSizes, rule: LinearGates, mode: str) -> float:
    """Numbers a lane that one meta-gradient holds (`mlm.reading.meta_gradient`)."""
    kept, own, updates = sizes.kept(rule), sizes.own, sizes.config.meta.unroll
    update = kept + own * (1 + sizes.reweights)
    if mode == "reverse":
        return updates * update + 2 * kept + own
    if mode == "checkpoint":
        spacing = snapshot_spacing(updates)
        return math.ceil(updates / spacing) * kept + (spacing + 1) * update + 2 * kept
    if mode == "forward":
        return tangent_copies(sizes, rule) * kept + 3 * kept + update
    if mode == "pes":
        return 2 * sizes.config.meta.pes_pairs * kept + 3 * kept + own
    return updates * 8.0 * update + 4 * kept  # second order: a graph of plain operations


def tangent_copies(sizes: RunSizes, rule: LinearGates) -> float:
    """Copies of a lane's numbers in the tangent of forward mode."""
    fast = rule.has_fast_form and not rule.slow and sizes.kept(rule) == sizes.own
    if fast and not (rule.per_weight or rule.per_unit or rule.gain):
        return (1 + rule.flush) * (1 + sum(f in rule.features for f in ("loss", "age")))
    return float(sum(p.numel() for p in rule.initial(sizes.base).values()))


def scoring(sizes: RunSizes) -> list[Phase]:
    """Every rule in every protocol on the split, and the words with their losses."""
    config, base = sizes.config, FLOAT * sizes.base_numbers
    chosen, text = config.evaluation, sizes.scored
    names = {name.removesuffix(CACHE) for name in chosen.rules}
    caches = any(name.endswith(CACHE) for name in chosen.rules)
    columns = len(chosen.protocols) * (1 + len(chosen.rules))
    words = text.words * (150.0 + 24 * columns) + text.tokens * 32.0
    total, work = words, Effort()
    for rule in _rules(sizes, names):
        lanes = min(chosen.lanes, text.articles)
        need = sizes.adapting_bytes(rule, lanes, text, text.longest)
        if "stream" in chosen.protocols:
            settings = chosen.budget if rule.name in HAND_MADE else 1
            need = max(need, sizes.adapting_bytes(rule, settings, text, text.tokens))
        total = max(total, words + need)
        tuned = chosen.budget * sizes.tune.tokens * (rule.name in HAND_MADE)
        if "article" in chosen.protocols:
            work = work.plus(sizes.adapting_work(text.tokens + tuned, lanes, 6.0))
        if "stream" in chosen.protocols:
            work = work.plus(sizes.adapting_work(text.tokens, 1, 6.0))
            work = work.plus(sizes.adapting_work(tuned, chosen.budget, 6.0))
    if caches:
        total += _cache_bytes(sizes)
    if chosen.top_k:
        total += _top_k_bytes(sizes, columns, caches)
    work = work.plus(sizes.static_work(text.tokens, chosen.lanes, config.adapt.update_every, 1.0))
    return [Phase("evaluation", base + total, work, "evaluation.lanes")]


def _top_k_bytes(sizes: RunSizes, columns: int, caches: bool) -> float:
    """Log-probabilities of a segment's tokens with what they come from, and what is kept."""
    chosen = sizes.config.evaluation
    extent = sizes.extent(min(chosen.lanes, sizes.scored.articles), sizes.scored, sizes.own)
    kept = min(TOP_K_WORDS, sizes.scored.words) * columns * (100.0 + 40 * chosen.top_k)
    return distribution_bytes(extent, caches) + kept


def _cache_bytes(sizes: RunSizes) -> float:
    """The neural caches of all lanes."""
    chosen = sizes.config.evaluation
    lanes = min(chosen.lanes, max(sizes.scored.articles, sizes.tune.articles))
    extent = sizes.extent(lanes, sizes.scored, sizes.own)
    return cache_bytes(extent, chosen.cache_words * sizes.tune.tokens_per_word)


def _rules(sizes: RunSizes, names: set[str]) -> list[UpdateRule]:
    """The rules of these names that adapt."""
    meta = dataclasses.replace(sizes.config.meta, gradient="reverse")
    start = HAND_MADE_RULES.get(meta.start, LinearGates())
    found: list[UpdateRule] = [HAND_MADE_RULES[name] for name in names & set(HAND_MADE)]
    learned = sorted(names & set(LEARNED))
    return found + [rule_to_train(meta, name, start) for name in learned]


STAGES: dict[str, Callable[[RunSizes], list[Phase]]] = {
    "lm": stage_1,
    "meta": stage_2,
    "evaluate": scoring,
}
"""What a stage consists of."""
