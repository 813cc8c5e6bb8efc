"""What the golden run computes: small worlds in float64, each case a dictionary of tensors.

All calls into mlm are in this file. Texts, weights and settings are made up here, from generators
whose numbers are the same everywhere, so that only mlm decides what comes out.

Letters: V vocabulary, E embedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlm import kernels
from mlm.base.names import HAND_MADE, LEARNED
from mlm.experimental.through import ThroughLearned, ThroughRMS
from mlm.extensions import (
    Boundaries,
    Extensions,
    IntraSegment,
    NGramEmbeddings,
    NGramMemory,
    NGramReadOut,
    SurpriseWeighting,
    WordCoupling,
)
from mlm.extensions.boundaries import SURE, learn_boundaries
from mlm.extensions.learned_basis import learn_bases
from mlm.extensions.ngram_embeddings import NGrams, most_frequent
from mlm.extensions.ngram_memory import STEPS as ROW_STEPS
from mlm.extensions.ngram_read_out import ReadOut, learn_read_out
from mlm.extensions.word_coupling import couple, coupling_of
from mlm.kernels.switches import use
from mlm.models.base import AdaptationBase, fold_low_rank
from mlm.models.language_model import Weights
from mlm.models.low_rank import DIRECTIONS
from mlm.models.module import ModuleModel
from mlm.models.recurrent import BaseModel, RecurrentLM
from mlm.models.snail import snail_like
from mlm.reading.cache import CacheSetting
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.pes import Evolution
from mlm.reading.scoring import Scores, score_protocol
from mlm.reading.second_order import second_order
from mlm.reading.step import begin, prepared
from mlm.rules.family import HAND_MADE_RULES, learned_rule, open_slow, start_at
from mlm.rules.protocol import Bound, LoadedRule, Parameters, as_parameters
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, MetaConfig, ModelConfig
from mlm.store.run_folder import RunFolder
from mlm.text.streams import LaneStream, Segment, Text
from mlm.training.directions import add_low_rank
from mlm.training.fisher import estimate_fisher
from mlm.training.language_model import LMTrainer
from mlm.training.meta import MetaTrainer
from mlm.training.tuning import TuneText, tune

Found = dict[str, Tensor]
Case = Callable[[], Found]

PROTOCOLS = ("article", "stream")
ENGINES = ("compiled", "eager")
EOS = 0
VOCABULARY = 24
PLAIN = RecurrentLM(VOCABULARY, 6, 7, 2)
"""Read under every rule."""
RICH = RecurrentLM(VOCABULARY, 12, 12, 1)
"""Read with what can be switched on."""
RICH_DYNAMIC = (
    "softmax.low",
    "softmax.bias",
    "lstm.0.input.low",
    "lstm.0.recurrent",
    "lstm.0.bias",
)
SEGMENT = 8
LOSS = 3.2
"""Of the text, in nats per token, as the long-term memory has it."""
SETTINGS: dict[str, dict[str, float]] = {
    "sgd": {"rate": 0.3},
    "momentum": {"rate": 0.1, "momentum": 0.7, "decay": 0.02},
    "rms": {"rate": 0.01, "decay": 0.02},
    "adam": {"rate": 0.01, "decay": 0.02, "momentum": 0.5, "square": 0.05},
}


@contextlib.contextmanager
def quietly(engine: str = "compiled") -> Iterator[None]:
    """One thread, one engine, float32 factors never rounded: the state of a fresh process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    use(bfloat16=False)
    try:
        with kernels.eager() if engine == "eager" else contextlib.nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


# -- where --------------------------------------------------------------------------------------

_place = {"device": torch.device("cpu")}


def device() -> torch.device:
    """Where everything is computed."""
    return _place["device"]


@contextlib.contextmanager
def computed_on(where: torch.device) -> Iterator[None]:
    """Everything on another device inside the block."""
    before = dict(_place)
    memories = (plain_memory, rich_memory, plain_some)
    for memory in memories:
        memory.cache_clear()
    _place["device"] = where
    try:
        yield
    finally:
        _place.update(before)
        for memory in memories:
            memory.cache_clear()


# -- made up ------------------------------------------------------------------------------------


class Dice:
    """Whole numbers by a linear congruence, the same in every version of every library."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def throw(self, low: int, high: int) -> int:
        """From low to high - 1."""
        for _ in range(2):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return low + (self.state >> 33) % (high - low)


def made_up_articles(number: int, seed: int, longest: int = 6) -> list[np.ndarray]:
    """A heading, then up to `longest` lines of sentences that the article says again and again."""
    dice, found = Dice(seed), []
    for _ in range(number):
        own = [[dice.throw(1, 20) for _ in range(dice.throw(3, 6))] for _ in range(3)]
        words = [dice.throw(20, VOCABULARY), dice.throw(20, VOCABULARY), EOS]
        for _ in range(dice.throw(longest - 2, longest + 1)):
            words += own[dice.throw(0, 3)] + own[dice.throw(0, 3)] + [EOS]
        found.append(np.array(words))
    return found


def made_up_text(number: int, seed: int) -> Text:
    """Such articles as a training text."""
    articles = made_up_articles(number, seed)
    return Text(articles, sum(map(len, articles)), EOS)


def between(low: float, high: float, *sizes: int, seed: int) -> Tensor:
    """Uniform numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*sizes, generator=generator, dtype=torch.float64) * (high - low) + low


def made_up_weights(shape: BaseModel) -> Weights:
    """Fresh ones whose embeddings are as long as a trained model's."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: w.double() for n, w in shape.initial_weights(generator).items()}
    for name in weights:
        weights[name] *= 6.0 if name == "embedding" else 1.0
    return weights


def long_term(shape: BaseModel, weights: Weights, dynamic: tuple[str, ...]) -> AdaptationBase:
    """A long-term memory with a made-up Fisher."""
    rms = {n: between(0.01, 0.21, *weights[n].shape, seed=k) for k, n in enumerate(dynamic, 50)}
    return AdaptationBase(shape, weights, dynamic, rms, LOSS, SEGMENT).to(device())


@functools.cache
def plain_memory() -> AdaptationBase:
    """All weights of two layers adapt."""
    weights = made_up_weights(PLAIN)
    return long_term(PLAIN, weights, tuple(weights))


@functools.cache
def rich_memory(rank: int = 99, related: bool = False) -> AdaptationBase:
    """Matrices adapt in bases of their own, or, with a small rank, by changes of it."""
    weights = made_up_weights(RICH)
    weights = add_low_rank(weights, RICH, RICH_DYNAMIC, rank, made_up_text(12, 5), 500)
    for name, value in weights.items():
        if name.endswith(DIRECTIONS):  # eigenvectors, whose signs are anybody's
            at = value.abs().argmax(1, keepdim=True)
            weights[name] = value * value.gather(1, at).sign()
    if related:
        bare = AdaptationBase(RICH, weights, RICH_DYNAMIC, {}, LOSS, SEGMENT)
        weights = couple(bare, between(-0.4, 0.4, VOCABULARY, 3, seed=8)).weights
    return fold_low_rank(long_term(RICH, weights, RICH_DYNAMIC))


LIKELY = SURE
"""Log odds from which on a border is believed in."""


def made_up_borders(width: int) -> Tensor:
    """A regression that believes in a border at some line ends, and nearly does at another."""
    return between(-7.5, 7.5, width + 1, seed=3)


def made_up_read_out(width: int, orders: int) -> ReadOut:
    """Every part of it does something."""
    units = 5
    sizes = {
        "map": (width, width),
        "gate": (width,),
        "known": (width, orders),
        "hold": (width, orders),
        "inner": (units, 2 * width + orders),
        "outer": (width, units),
    }
    return ReadOut(**{n: between(-0.2, 0.2, *s, seed=70 + len(n)) for n, s in sizes.items()})


def made_up_ngrams(width: int) -> NGrams:
    """The most frequent contexts of a text, with rows of any kind."""
    text = made_up_text(6, 1)
    contexts = most_frequent(text.articles, EOS, 40)
    rows = between(-0.5, 0.5, len(contexts) + 1, width, seed=9)
    rows[-1] = 0
    return NGrams(contexts, rows)


EXTENSIONS = Extensions(
    word_coupling=WordCoupling(directions=3),
    boundaries=Boundaries(on=True),
    intra_segment=IntraSegment(on=True),
    ngram_memory=NGramMemory(tokens=50, steps=tuple(step / 4 for step in ROW_STEPS)),
    ngram_read_out=NGramReadOut(words=1),
    surprise_weighting=SurpriseWeighting(share=0.3),
)
"""Steps of n-gram memory are made for wider embeddings."""
PARTS = {
    "related": "word_coupling",
    "borders": "boundaries",
    "at_once": "intra_segment",
    "phrases": "ngram_memory",
    "read_out": "ngram_read_out",
    "ngrams": "ngram_embeddings",
    "surprise": "surprise_weighting",
}


def with_parts(base: AdaptationBase, *parts: str) -> AdaptationBase:
    """The memory with some of what can be switched on."""
    width = base.weights["embedding"].shape[1]
    weights: Weights = {}
    if "ngrams" in parts:
        weights |= NGramEmbeddings().weights(made_up_ngrams(width))
    if "read_out" in parts:
        weights |= NGramReadOut().weights(made_up_read_out(width, len(ROW_STEPS)))
    if "borders" in parts:
        weights |= Boundaries().weights(made_up_borders(RICH.embedding), EOS)
    wanted = {PARTS[part] for part in parts}
    extensions = tuple(e for e in EXTENSIONS if e.name in wanted)
    whole = base.with_weights({n: w.to(device()) for n, w in weights.items()})
    return dataclasses.replace(whole, extensions=extensions).derived()


ALL = ("related", "borders", "at_once", "surprise", "phrases", "read_out", "ngrams")
"""Everything that can be switched on."""


def extended(*parts: str, rank: int = 99) -> AdaptationBase:
    """The rich memory with some of `ALL`."""
    return with_parts(rich_memory(rank, "related" in parts), *parts)


# -- rules --------------------------------------------------------------------------------------


def shaken(parameters: Parameters, seed: int = 11) -> Parameters:
    """Every number moved, so that no part of a rule is without effect."""
    return {
        n: p + between(-0.15, 0.15, *p.shape, seed=seed + k).to(p.device)
        for k, (n, p) in enumerate(parameters.items())
    }


def rule_of(
    name: str, base: AdaptationBase, *more: str, free_copy: bool = False, rate: float = 0.01
) -> tuple[Any, Parameters]:
    """A rule and its parameters; `more` are features of a learned one's gates.

    Args:
        rate: of RMS, as which learned rules start before they are shaken.
    """
    if name in HAND_MADE:
        return HAND_MADE_RULES[name], as_parameters(SETTINGS[name], base)
    start = HAND_MADE_RULES["rms"]
    rule = learned_rule(
        name,
        features=("fisher", "loss", "age", *more),  # type: ignore[arg-type]
        per_tensor=True,
        free_copy=free_copy,
        hidden=3,
        start=start,
    )
    first = as_parameters({**SETTINGS["rms"], "rate": rate}, base)
    parameters = start_at(rule, start, first, base)
    if rule.slow:
        open_slow(parameters)
    parameters = shaken(parameters)
    rule.project(parameters)
    return rule, parameters


def bound_rule(name: str, base: AdaptationBase, **settings: Any) -> Bound:
    """Ready to read with this memory."""
    rule, parameters = rule_of(name, base, **settings)
    return rule.bind(parameters, base)


# -- reading ------------------------------------------------------------------------------------


def articles_to_score() -> list[np.ndarray]:
    """Three of different lengths."""
    return made_up_articles(3, 2, longest=4)


def scores_of(
    base: AdaptationBase, bound: Bound | None, protocol: str, cache: Sequence[CacheSetting] = ()
) -> Scores:
    """The articles read once."""
    return score_protocol(base, bound, articles_to_score(), EOS, protocol, 2, cache=cache)


def losses(scores: Scores) -> Tensor:
    """Of every token."""
    return torch.from_numpy(np.concatenate(scores.nll))


def read_in_all_ways(base: AdaptationBase, bind: Callable[[], Bound | None]) -> Found:
    """The losses of every token in both protocols, by both engines."""
    found = {}
    for engine in ENGINES if device().type == "cpu" else ENGINES[-1:]:
        with quietly(engine):
            bound = bind()
            for protocol in PROTOCOLS:
                found[f"{protocol}/{engine}"] = losses(scores_of(base, bound, protocol))
    return found


def read_under(name: str) -> Found:
    """A rule of the family on the plain memory."""
    base = plain_memory()
    return read_in_all_ways(base, lambda: bound_rule(name, base))


def read_static() -> Found:
    """theta_0 alone."""
    return read_in_all_ways(plain_memory(), lambda: None)


def read_with_coordinates() -> Found:
    """Gates that see every weight's own gradient and distance, and learn COPY apart."""
    base = plain_memory()
    rule, parameters = rule_of("three_levels", base, "gradient", "distance", free_copy=True)
    return read_in_all_ways(base, lambda: rule.bind(parameters, base))


def read_extended(
    *parts: str, name: str = "four_levels", rank: int = 99, rate: float = 0.01
) -> Found:
    """A rule on the rich memory with these parts, as far as the rule sees them."""
    base = extended(*parts, rank=rank)
    rule, parameters = rule_of(name, base, rate=rate)
    base = base.for_rule(rule)
    return read_in_all_ways(base, lambda: rule.bind(parameters, base))


def log_odds_at_line_ends() -> Tensor:
    """Of the made-up borders, by the static model, in the text of protocol `stream`."""
    base = extended("borders")
    tokens = np.concatenate(articles_to_score())
    inputs = torch.from_numpy(np.array([[EOS, *tokens[:-1]]]))
    state = base.model.initial_state(1, dtype=torch.float64)
    output = base.model.read(base.static, inputs, inputs, state).output[0]
    regression = made_up_borders(RICH.embedding)
    logits = output @ regression[:-1] + regression[-1]
    return logits[inputs[0] == EOS]


def read_ngrams_statically() -> Found:
    """A language model with n-grams, and no rule."""
    return read_in_all_ways(extended("ngrams"), lambda: None)


def read_with_cache() -> Found:
    """Neural caches on top of a hand-made and of a learned rule."""
    settings = [CacheSetting(0.3, 0.1, 30), CacheSetting(1.0, 0.25, 9)]
    found = {}
    for name, base in {"rms": plain_memory(), "four_levels": extended("phrases")}.items():
        for protocol in PROTOCOLS:
            scores = scores_of(base, bound_rule(name, base), protocol, settings)
            for k, mixed in enumerate(scores.cached):
                found[f"{name}/{protocol}/{k}"] = losses(mixed)
    return found


def read_guarded() -> Found:
    """Steps so large that lanes explode; where the guard reset them, too."""
    base = dataclasses.replace(plain_memory(), limit=1.0)
    rule = HAND_MADE_RULES["rms"]
    found = {}
    for protocol in PROTOCOLS:
        wild = as_parameters({"rate": 0.6, "decay": 0.02}, base)
        scores = scores_of(base, rule.bind(wild, base), protocol)
        assert scores.flushes, "the guard has nothing to do"
        found[f"{protocol}/losses"] = losses(scores)
        found[f"{protocol}/resets"] = torch.tensor(scores.flushes)
    return found


# -- what is learned or estimated besides -------------------------------------------------------


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers, one after the other, in float64."""
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def grouped(tensors: Mapping[str, Tensor], prefix: str = "") -> Found:
    """Joined by the beginning of their names, before a slash."""
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(prefix + name.partition("/")[0], []).append(tensor)
    return {name: joined(some) for name, some in groups.items()}


def learn_the_bases() -> Found:
    """Directions of inputs and of related words, two steps; then what a rule reads with them."""
    base = learn_bases(extended("related"), made_up_text(44, 3), 1800)
    bound = bound_rule("three_levels", base)
    found = {n: base.weights[n] for n in base.weights.keys() - rich_memory().static.keys()}
    return {
        "weights": joined(found[n] for n in sorted(found)),
        "losses": losses(scores_of(base, bound, "article")),
    }


def learn_the_read_out() -> Found:
    """Two steps from a made-up one, with surprise; and one from nothing."""
    some = extended("phrases", "read_out", "surprise"), 5000
    none = extended("phrases", "at_once"), 500
    found, text = {}, made_up_text(120, 4)
    for title, (base, words) in {"some": some, "none": none}.items():
        bound = bound_rule("three_levels", base)
        own = learn_read_out(base, bound, text, words, 1)
        found |= {f"{title}/{n}": t for n, t in own._asdict().items()}
    return found


def estimate_the_fisher() -> Found:
    """Of a plain memory, and of one with n-grams and changes of low rank."""
    found = {}
    for title, base in {"plain": plain_memory(), "ngrams": extended("ngrams", rank=3)}.items():
        bare = dataclasses.replace(base, rms={}, loss=0.0)
        made = estimate_fisher(bare, made_up_text(6, 6), 200, lanes=4, prior=0.04)
        found[f"{title}/rms"] = joined(made.rms.values())
        found[f"{title}/loss"] = torch.tensor(made.loss, dtype=torch.float64)
    return found


def learn_the_borders() -> Found:
    """The regression, fitted to where it no longer moves."""
    base = plain_memory()
    found = learn_boundaries(base.model, base.weights, made_up_text(40, 7), segment=16)
    return {"weights": found}


def find_related_words() -> Found:
    """Q Q^T: the signs of Q's columns are anybody's."""
    found = coupling_of(made_up_text(12, 9), VOCABULARY, 4)
    return {"projection": found @ found.t()}


# -- meta-gradients -----------------------------------------------------------------------------


def unroll(number: int, seed: int = 3) -> list[Segment]:
    """Segments of three lanes with a border inside, and one lane that reads on over borders."""
    articles = made_up_articles(6, seed)
    lanes = [LaneStream(articles[k::2], 1, SEGMENT, EOS) for k in range(2)]
    lanes.append(LaneStream([np.concatenate(articles)], 1, SEGMENT, EOS))
    found = []
    for _ in range(number):
        columns = list(zip(*(next(lane) for lane in lanes), strict=True))
        inputs, targets, mask, new = (torch.cat(column) for column in columns[:4])
        article, start = (np.concatenate(column) for column in columns[4:])
        found.append(Segment(inputs, targets, mask, new, article, start).to(device()))
    return found


def gradient_of(
    mode: str,
    base: AdaptationBase,
    name: str,
    learn: Sequence[str] = (),
    ewc: float = 0.0,
    updates: int = 12,
) -> Found:
    """Loss, gradients and the lanes afterwards, of an unroll; a short one of the second order."""
    rule, parameters = rule_of(name, base)
    base = base.for_rule(rule)
    bound = rule.bind(parameters, base)
    state = parameters, begin(base, 3, bound), unroll(6 if mode == "second" else updates)
    if mode == "second":
        found = second_order(base, rule, *state, learn, ewc)
    else:
        told = prepared(base, bound)
        found = meta_gradient(told, bound, *state, mode, learn, ewc)  # type: ignore[arg-type]
    return {
        "loss": torch.tensor(found.loss, dtype=torch.float64),
        "reader": joined(found.reader.weights.values()),
        **grouped(found.gradients),
        **({"weights": joined(found.weights.values())} if learn else {}),
    }


def gradient_by_particles() -> Found:
    """Two successive unrolls of persistent evolution strategies, with EWC."""
    base = with_parts(plain_memory(), "phrases", "surprise")
    rule, parameters = rule_of("three_levels", base)
    particles = Evolution(
        base,
        rule,
        parameters,
        3,
        pairs=2,
        sigma=0.05,
        seed=1,
        scale={"flush_scale": 10.0},
        ewc=0.1,
    )
    pieces, found = unroll(12), {}
    for k in range(2):
        now = particles.step(parameters, pieces[6 * k : 6 * k + 6])
        found[f"{k}/loss"] = torch.tensor(now.loss, dtype=torch.float64)
        found |= grouped(now.gradients, f"{k}/")
    return found


# -- training -----------------------------------------------------------------------------------

STEPS, HALF = 3, 2
"""Of every trainer, and those after which one is saved."""
MANY = 12
"""Steps after which n-grams' own steps are no longer bounded by how often they are read at once."""
Made = Callable[[], Any]


def _meta(base: AdaptationBase, name: str = "three_levels", **settings: Any) -> MetaTrainer:
    rule, parameters = rule_of(name, base)
    usual = {"lanes": 4, "unroll": 4, "steps": 4, "pes_pairs": 2, "weight_rate": 1e-3}
    config = MetaConfig(**{**usual, **settings})
    own = base.for_rule(rule)
    return MetaTrainer(own, rule, parameters, made_up_text(6, 8), config, seed=0)


BOTH = ("rule", "theta_0", "static")
META: dict[str, Callable[[], MetaTrainer]] = {
    "everything on": lambda: _meta(extended(*ALL), "four_levels"),
    "theta_0": lambda: _meta(with_parts(plain_some(), "surprise"), learn=BOTH, ewc=0.1),
    "reptile": lambda: _meta(plain_some(), learn=BOTH, theta_0="reptile"),
    "second order": lambda: _meta(plain_some(), learn=BOTH, gradient="second", stream_share=0.0),
    "particles": lambda: _meta(plain_some(), gradient="pes"),
}


@functools.cache
def plain_some() -> AdaptationBase:
    """The plain memory, of which some weights never adapt."""
    weights = made_up_weights(PLAIN)
    names = ("embedding", "softmax.bias", "lstm.0.recurrent", "lstm.1.input", "lstm.1.bias")
    return long_term(PLAIN, weights, names)


def _lm_config(**changes: Any) -> Config:
    usual = {"lanes": 3, "segment": SEGMENT, "epochs": 1.0, "precision": "float32"}
    usual |= {"learning_rate": 0.02, "ar": 0.5, "tar": 0.5, "dropout_hidden": 0.0}
    usual |= {"dropout_input": 0.0, "dropout_output": 0.0}
    ngrams = NGramEmbeddings(contexts=changes.pop("ngrams", 0))
    return Config(
        lm=LMTrainingConfig(**{**usual, **changes}),
        model=ModelConfig(12, 12),
        extensions=Extensions(ngram_embeddings=ngrams),
    )


def in_double(trainer: LMTrainer) -> LMTrainer:
    """The trainer with everything it holds in float64, where all machines agree."""
    seen: set[int] = set()
    rest: list[Any] = [trainer]
    while rest:
        here = rest.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, Tensor):
            if here.dtype == torch.float32:
                here.data = here.data.double()
        elif isinstance(here, Mapping):
            rest += here.values()
        elif isinstance(here, list | tuple):
            rest += here
        elif hasattr(here, "__dict__"):
            rest += vars(here).values()
    return trainer


def _usual(shape: BaseModel, **changes: Any) -> LMTrainer:
    config = _lm_config(**changes)
    return in_double(LMTrainer(config, shape, made_up_text(6, 8), device()))


def _through_rms() -> LMTrainer:
    config = _lm_config(through="rms", ar=0.0, tar=0.0)
    return in_double(ThroughRMS(config, RICH, made_up_text(6, 8), device()))


def _through_learned(ngrams: int = 0) -> LMTrainer:
    """Through a rule with everything on that stage 1 goes through."""
    parts = ("related", "at_once", "surprise", "phrases")
    base = extended(*parts).to(device(), torch.float32)
    rule, parameters = rule_of("four_levels", base)
    own = LoadedRule(rule, {n: p.float() for n, p in parameters.items()}, base)
    more = {"ngrams": ngrams, "init": Path("some")} if ngrams else {}
    config = _lm_config(through="learned", ar=0.0, tar=0.0, **more)
    return in_double(ThroughLearned(config, RICH, made_up_text(6, 8), device(), own))


LANGUAGE: dict[str, Callable[[], LMTrainer]] = {
    "lstm": lambda: _usual(PLAIN, dropout_hidden=0.2, dropout_output=0.2, weight_drop=0.3),
    "qrnn": lambda: _usual(RecurrentLM(VOCABULARY, 8, 8, 2, cell="qrnn"), dropout_embedding=0.1),
    "snail": lambda: _usual(snail_like(RecurrentLM(VOCABULARY, 8, 8, 1), 16)),
    "adaptive softmax": lambda: _usual(RecurrentLM(VOCABULARY, 8, 8, 1, (10, 16))),
    "lstm with n-grams": lambda: _usual(RICH, epochs=2.0, ngrams=40, init=Path("some")),
    "through rms": _through_rms,
    "through a learned rule": _through_learned,
    "through a learned rule with n-grams": lambda: _through_learned(40),
}


def _steps(trainer: Any, number: int) -> list[float]:
    return [trainer.train_step()[0] for _ in range(number)]


def _resumed(make: Made) -> Any:
    """A trainer that loads what another left, and goes on."""
    first, second = make(), make()
    _steps(first, HALF)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        first.save(run, "x")
        second.load(run, "x")
    return second


def _trained(make: Made, left: Callable[[Any], Found], steps: int = STEPS) -> Found:
    """What so many steps leave.

    Raises:
        AssertionError: a trainer that was resumed leaves something else.
    """
    whole, rest = make(), _resumed(make)
    means = _steps(whole, steps)
    assert _steps(rest, steps - HALF) == means[HALF:], "the losses after resuming"
    found = left(whole)
    for name, value in left(rest).items():
        assert torch.equal(value, found[name]), f"{name} after resuming"
    return {"losses": torch.tensor(means, dtype=torch.float64), **found}


def _left_by_meta(trainer: MetaTrainer) -> Found:
    return grouped(trainer.trained) | {"reader": joined(trainer.reader.weights.values())}


def _left_by_stage_1(trainer: LMTrainer) -> Found:
    floats = [t for t in trainer.more_tensors().values() if t.is_floating_point()]
    found = {"weights": joined(trainer.weights.values())}
    return found | ({"more": joined(floats)} if floats else {})


# -- a module of the user's own -----------------------------------------------------------------


class GRU(nn.Module):
    """A small model by PyTorch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.softmax = nn.Linear(6, VOCABULARY)

    def initial_state(self, lanes: int) -> tuple[Tensor, ...]:
        """Lanes come first."""
        return (torch.zeros(lanes, 1, 6),)

    def forward(self, tokens: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """Logits and the state after the tokens."""
        output, h = self.gru(self.embedding(tokens), state[0].transpose(0, 1).contiguous())
        return self.softmax(output), (h.transpose(0, 1),)


def module_memory() -> AdaptationBase:
    """A long-term memory of it."""
    module = GRU().double()
    for k, weight in enumerate(module.parameters()):
        weight.data = between(-0.8, 0.8, *weight.shape, seed=90 + k)
    model = ModuleModel(module)
    weights = model.weights()
    names = tuple(weights)
    rms = {n: between(0.01, 0.21, *weights[n].shape, seed=k) for k, n in enumerate(names, 50)}
    return AdaptationBase(model, weights, names, rms, LOSS, SEGMENT).to(device())


def read_own_module() -> Found:
    """Under a hand-made rule and a learned one."""
    base, found = module_memory(), {}
    for name in ("rms", "three_levels"):
        for protocol in PROTOCOLS:
            scores = scores_of(base, bound_rule(name, base), protocol)
            found[f"{name}/{protocol}"] = losses(scores)
    return found


def tune_rules() -> Found:
    """Settings tried and what they scored, by a budget of four."""
    text, base, found = TuneText(articles_to_score(), EOS, 2), plain_some(), {}
    for name in ("rms", "momentum"):
        for protocol in PROTOCOLS:
            trials = tune(base, HAND_MADE_RULES[name], text, protocol, 4)
            rows = [[*trial.setting.values(), trial.nll] for trial in trials]
            found[f"{name}/{protocol}"] = torch.tensor(rows, dtype=torch.float64)
    return found


# -- all of it ----------------------------------------------------------------------------------


def _reading_cases() -> dict[str, Case]:
    part = functools.partial
    found: dict[str, Case] = {"static": read_static}
    found |= {name: part(read_under, name) for name in (*HAND_MADE, *LEARNED)}
    found["gates that see gradient and distance"] = read_with_coordinates
    found["full rank"] = read_extended
    found["low rank"] = part(read_extended, rank=3)
    found["low rank, rms"] = part(read_extended, rank=3, name="rms")
    for one in ("related", "borders", "surprise", "at_once", "phrases", "ngrams"):
        found[f"with {one}"] = part(read_extended, one)
    found["with ngrams, static"] = read_ngrams_statically
    found["with ngrams, rms"] = part(read_extended, "ngrams", name="rms")
    found["with ngrams and phrases"] = part(read_extended, "ngrams", "phrases")
    found["with phrases and a read-out"] = part(read_extended, "phrases", "read_out")
    found["with at_once and related"] = part(read_extended, "at_once", "related")
    found["with at_once, large steps"] = part(
        read_extended, "at_once", name="three_levels", rate=WILD
    )
    found["everything on"] = part(read_extended, *ALL)
    found["everything on, two levels"] = part(read_extended, *ALL, name="two_levels")
    found["everything on, rms"] = part(read_extended, *ALL, name="rms")
    return found


WILD = 0.6
"""A step size with which words fall by as much at once as they may."""


def _gradient_cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    learn = ("embedding", "lstm.0.recurrent", "lstm.0.input", "lstm.1.recurrent")
    part = functools.partial
    for mode in ("reverse", "checkpoint", "forward", "second"):
        for_text = part(gradient_of, mode)
        found[mode] = lambda f=for_text: f(plain_some(), "three_levels")
        found[f"{mode}, learn and ewc"] = lambda f=for_text: f(
            plain_some(), "three_levels", learn, 0.1
        )
        parts = ("phrases", "surprise", "borders", *(["at_once"] if mode != "second" else []))
        found[f"{mode}, extended"] = lambda f=for_text, p=parts: f(extended(*p), "three_levels")
        if mode in ("reverse", "checkpoint"):
            found[f"{mode}, everything on"] = lambda f=for_text: f(extended(*ALL), "four_levels")
    found["reverse, adaptive"] = lambda: gradient_of("reverse", plain_some(), "adaptive")
    found["reverse, lstm"] = lambda: gradient_of("reverse", plain_some(), "lstm")
    found["forward, momentum"] = lambda: gradient_of("forward", plain_some(), "surprise", updates=5)
    found["pes"] = gradient_by_particles
    return found


def _cases() -> dict[str, Case]:
    part = functools.partial
    found = {f"read: {name}": case for name, case in _reading_cases().items()}
    found["read: with a cache"] = read_with_cache
    found["read: guarded"] = read_guarded
    found["read: own module"] = read_own_module
    found["tune"] = tune_rules
    found["learn: bases"] = learn_the_bases
    found["learn: read-out"] = learn_the_read_out
    found["learn: fisher"] = estimate_the_fisher
    found["learn: borders"] = learn_the_borders
    found["learn: related words"] = find_related_words
    found |= {f"meta-gradient: {name}": case for name, case in _gradient_cases().items()}
    for name, make in META.items():
        found[f"meta-training: {name}"] = part(_trained, make, _left_by_meta)
    for name, make in LANGUAGE.items():
        steps = MANY if name == "lstm with n-grams" else STEPS
        found[f"stage 1: {name}"] = part(_trained, make, _left_by_stage_1, steps)
    return found


CASES = _cases()


def compute(name: str) -> Found:
    """The case of this name."""
    with quietly():
        return CASES[name]()
