"""Losses of every rule and extension on a device, against the CPU's.

Random weights and random text that repeats itself; everything that can be switched on is. Made on
the CPU, so that both devices read the same. Letters: E embedding, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mlm.base.names import HAND_MADE, LEARNED, PROTOCOLS, STATIC
from mlm.extensions import (
    Boundaries,
    IntraSegment,
    NGramEmbeddings,
    NGramMemory,
    NGramReadOut,
    SurpriseWeighting,
)
from mlm.extensions.ngram_embeddings import NGrams, most_frequent
from mlm.extensions.ngram_memory import STEPS
from mlm.extensions.ngram_read_out import UNITS, ReadOut
from mlm.extensions.word_coupling import couple
from mlm.models.base import AdaptationBase, choose_dynamic, fold_low_rank
from mlm.models.extension import Extension
from mlm.models.recurrent import RecurrentLM
from mlm.reading.cache import CacheSetting
from mlm.reading.scoring import score_protocol
from mlm.rules.family import HAND_MADE_RULES, learned_rule, open_slow, start_at
from mlm.rules.protocol import Bound, as_parameters
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank

EOS = 0
TOLERANCE = 1e-4
"""Nats: of any token in float64, of the mean in float32."""
SETTINGS: dict[str, dict[str, float]] = {
    "sgd": {"rate": 0.1},
    "momentum": {"rate": 0.05, "momentum": 0.7, "decay": 0.02},
    "rms": {"rate": 3e-3, "decay": 0.02},
    "adam": {"rate": 3e-3, "decay": 0.02, "momentum": 0.5, "square": 0.05},
}
EXTENSIONS: dict[str, Extension] = {
    "boundaries": Boundaries(on=True),
    "intra-segment": IntraSegment(on=True),
    "n-gram memory": NGramMemory(tokens=64, steps=tuple(step / 4 for step in STEPS)),
    "n-gram read-out": NGramReadOut(words=1),
    "n-gram embeddings": NGramEmbeddings(),
    "surprise weighting": SurpriseWeighting(share=0.3),
}
"""What can be read with, but word coupling, which changes weights."""
COUPLING = "word coupling"


@dataclasses.dataclass(frozen=True)
class Place:
    """Sizes of what is read."""

    model: RecurrentLM = dataclasses.field(default_factory=lambda: RecurrentLM(1000, 64, 64, 2))
    segment: int = 20
    articles: int = 4
    tokens: int = 160
    lanes: int = 3


SMALL = Place(RecurrentLM(30, 8, 8, 1), 6, 2, 12, 2)
"""For tests."""


class Case(NamedTuple):
    """One way to read."""

    name: str
    rule: str
    parts: tuple[str, ...] = ()
    cell: str = "lstm"


def cases() -> Iterator[Case]:
    """Every rule, every extension, all of them together, and the other base models."""
    for rule in (STATIC, *HAND_MADE, *LEARNED):
        yield Case(rule, rule)
    for part in (COUPLING, *EXTENSIONS):
        needs = ("n-gram memory", part) if part == "n-gram read-out" else (part,)
        yield Case(f"four_levels, {part}", "four_levels", needs)
    everything = (COUPLING, *EXTENSIONS)
    yield Case("four_levels, everything", "four_levels", everything)
    yield Case("rms, everything", "rms", everything)
    yield Case("rms, adaptive softmax", "rms", cell="adaptive")
    yield Case("three_levels, qrnn", "three_levels", cell="qrnn")


def _random(seed: int, *sizes: int) -> torch.Tensor:
    """Numbers between -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*sizes, generator=generator, dtype=torch.float64) * 2 - 1


def _articles(place: Place) -> list[np.ndarray]:
    """Random articles that say everything twice, with line ends."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(place.articles):
        half = random.integers(1, place.model.vocabulary, size=place.tokens // 2)
        half[:: max(2, place.segment // 2)] = EOS
        found.append(np.concatenate([half, half]))
    return found


def _text(place: Place) -> Text:
    articles = _articles(place)
    return Text(articles, sum(map(len, articles)), EOS)


def base_of(case: Case, place: Place) -> AdaptationBase:
    """What a case reads with, in float64 on the CPU."""
    shape, rich = place.model, bool(case.parts)
    if case.cell == "qrnn":
        shape = dataclasses.replace(shape, cell="qrnn")
    if case.cell == "adaptive":
        third = shape.vocabulary // 3
        shape = dataclasses.replace(shape, cutoffs=(third, 2 * third))
    generator = torch.Generator().manual_seed(1)
    weights = {n: w.double() * 3 for n, w in shape.initial_weights(generator).items()}
    dynamic = choose_dynamic(weights, "all")
    if rich:
        wanted = ("softmax.low", "softmax.bias", "lstm.0.recurrent", "lstm.0.input.low")
        weights = add_low_rank(weights, shape, wanted, shape.embedding, _text(place), 500)
        dynamic = wanted
    loss = math.log(shape.vocabulary)
    if COUPLING in case.parts:
        bare = AdaptationBase(shape, weights, dynamic, {}, loss, place.segment)
        weights = couple(bare, 0.1 * _random(2, shape.vocabulary, 4)).weights
    rms = {n: 0.02 + 0.01 * _random(3 + k, *weights[n].shape) for k, n in enumerate(dynamic)}
    base = AdaptationBase(shape, weights, dynamic, rms, loss, place.segment)
    return _with_extensions(fold_low_rank(base) if rich else base, case.parts, place)


def _with_extensions(base: AdaptationBase, parts: Sequence[str], place: Place) -> AdaptationBase:
    """Extensions with weights that do something."""
    width, more = place.model.embedding, {}
    if "boundaries" in parts:
        more |= Boundaries().weights(5 * _random(20, width + 1), EOS)
    if "n-gram read-out" in parts:
        orders = len(STEPS)
        sizes = {
            "map": (width, width),
            "gate": (width,),
            "known": (width, orders),
            "hold": (width, orders),
            "inner": (UNITS, 2 * width + orders),
            "outer": (width, UNITS),
        }
        own = {n: 0.1 * _random(30 + len(n), *size) for n, size in sizes.items()}
        more |= NGramReadOut().weights(ReadOut(**own))
    if "n-gram embeddings" in parts:
        contexts = most_frequent(_articles(place), EOS, 60)
        rows = 0.3 * _random(40, len(contexts) + 1, width)
        rows[-1] = 0
        more |= NGramEmbeddings().weights(NGrams(contexts, rows))
    found = tuple(e for name, e in EXTENSIONS.items() if name in parts)
    return dataclasses.replace(base.with_weights(more), extensions=found).derived()


def bound_rule(name: str, base: AdaptationBase) -> Bound | None:
    """A rule with parameters of which none is without effect; None = static."""
    if name == STATIC:
        return None
    if name in HAND_MADE:
        return HAND_MADE_RULES[name].bind(as_parameters(SETTINGS[name], base), base)
    start = HAND_MADE_RULES["rms"]
    features: Any = ("fisher", "loss", "age")
    rule = learned_rule(
        name, features=features, per_tensor=True, free_copy=False, hidden=3, start=start
    )
    parameters = start_at(rule, start, as_parameters(SETTINGS["rms"], base), base)
    if rule.slow:
        open_slow(parameters)
    moved = {
        n: p + 0.05 * _random(50 + k, *p.shape).to(p) for k, (n, p) in enumerate(parameters.items())
    }
    rule.project(moved)
    return rule.bind(moved, base)


def read(case: Case, base: AdaptationBase, protocol: str, place: Place) -> list[np.ndarray]:
    """Losses of every token, without a cache and with one."""
    bound = bound_rule(case.rule, base)
    own = base if bound is None else base.for_rule(bound.rule)  # type: ignore[attr-defined]
    cache = [CacheSetting(0.3, 0.1, 30)]
    scores = score_protocol(own, bound, _articles(place), EOS, protocol, place.lanes, cache=cache)
    return [np.concatenate(one.nll) for one in (scores, *scores.cached)]


def compare(
    case: Case,
    device: torch.device,
    place: Place,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
) -> dict[str, Any]:
    """How far a device's losses are from the CPU's, in nats."""
    row: dict[str, Any] = {"case": case.name}
    base = base_of(case, place)
    equal = True
    for dtype in dtypes:
        title = str(dtype).removeprefix("torch.")
        most = mean = 0.0
        for protocol in PROTOCOLS:
            here = read(case, base.to("cpu", dtype), protocol, place)
            there = read(case, base.to(device, dtype), protocol, place)
            for a, b in zip(here, there, strict=True):
                most = max(most, float(np.abs(a - b).max()))
                mean = max(mean, abs(float(a.mean() - b.mean())))
        row |= {f"{title}, any token": most, f"{title}, mean": mean}
        equal &= (most if dtype == torch.float64 else mean) <= TOLERANCE
    return row | {"equal": equal}
