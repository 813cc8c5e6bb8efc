"""The n-gram read-out: through what what is recalled enters the softmax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from tiny import perplexities
from worlds import EOS, Base, TinyBase, tiny_base, with_extensions

from mlm.base.errors import UserError
from mlm.extensions import NGramMemory, NGramReadOut, SurpriseWeighting
from mlm.extensions.ngram_memory import STEPS
from mlm.extensions.ngram_read_out import (
    UNITS,
    ReadOut,
    ReadOutTrainer,
    learn_read_out,
    nothing_learned,
)
from mlm.models.base import AdaptationBase
from mlm.models.language_model import OutputTerms, own_weights
from mlm.reading.scoring import score_articles
from mlm.reading.step import Extras, Telling, begin, prepared, score_segment
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.runs.identity import identity
from mlm.runs.rules import BESIDE, load_learned, parted
from mlm.runs.run import open_run
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors
from mlm.text.streams import LaneStream, Segment, Text
from mlm.training.meta import EXTENSION_GAIN

ORDERS = len(STEPS)
OWN = NGramReadOut(words=1)
KEYS = [OWN.key(name) for name in ReadOut._fields]
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


def _world(surprise: float = 0.25, **world: Any) -> TinyBase:
    # steps that are made for wide embeddings
    memory = NGramMemory(tokens=1000, steps=tuple(step / 10 for step in STEPS))
    base = tiny_base(layers=1, **world)
    return with_extensions(base, memory, OWN, SurpriseWeighting(share=surprise))


def _with(base: Base, read_out: ReadOut) -> Base:
    """The base with a read-out."""
    found = base.with_weights(OWN.weights(read_out))
    assert isinstance(found, type(base))
    return found


def _articles(number: int, seed: int, length: int = 60) -> list[np.ndarray]:
    """Each says one of two words after a 1, and always the same one."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        said = random.choice([5, 6])
        words = random.choice([1, 2, 3, 4], size=length)
        found.append(
            np.array([w for word in words for w in ((word, said) if word == 1 else (word,))])
        )
    return found


def _text(number: int, seed: int) -> Text:
    return Text(_articles(number, seed), 2 * number * 60, EOS)


def _some(width: int, seed: int = 3) -> ReadOut:
    generator = torch.Generator().manual_seed(seed)
    sizes = (width, width), (width,), (width, ORDERS), (width, ORDERS)
    sizes += (UNITS, 2 * width + ORDERS), (width, UNITS)
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) / 4 for size in sizes)
    return ReadOut(*drawn)


def _moved(start: ReadOut, way: ReadOut, factor: float) -> ReadOut:
    return ReadOut(*(a + factor * b for a, b in zip(start, way, strict=True)))


def _most(read_out: ReadOut) -> float:
    return max(float(t.abs().max()) for t in read_out)


def _equal(one: ReadOut, other: ReadOut) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _told(base: AdaptationBase, extras: Extras, piece: Segment, hidden: torch.Tensor) -> Any:
    """What is recalled, and what is added to the hidden states."""
    telling = Telling(base, base.weights, extras, piece)
    added = telling(hidden).added
    return telling.told.notes[NGramMemory.name], added


def test_what_is_recalled_is_read_through_it(engine: str) -> None:
    """The article's rows alone, and what is written stays as it was."""
    base = _world()
    bound = RMS().bind(SETTING, base)
    able = _with(base, _some(base.model.embedding))
    read_out = OWN.of(able.weights)
    assert read_out is not None
    learner = ReadOutTrainer(base, bound, 2)
    stream = LaneStream(_articles(2, 0), 2, base.segment, EOS)
    for _ in range(6):
        learner.gradient(next(stream))
    reader, piece = learner.reader, next(stream)
    weights = own_weights({**base.weights, **reader.weights})
    plainly = base.model.read(weights, piece.inputs, piece.targets, reader.state)
    state = plainly.output.detach()
    plain, rows = _told(base, reader.extras, piece, state)
    found, added = _told(able, reader.extras, piece, state)
    assert torch.equal(plain.rows, rows)
    assert torch.equal(found.rows, plain.rows)
    assert torch.equal(found.within, plain.within)
    assert float(found.rows.abs().max()) > 1e-3
    visited = 1 - found.rates
    gate = 1 + (state * read_out.gate).sum(2, keepdim=True)
    assert float((gate - 1).abs().median()) > 1e-2
    seen = torch.cat([state, plain.rows, visited], 2)
    by_hand = (
        gate * (plain.rows + plain.rows @ read_out.map.t())
        + visited @ read_out.known.t()
        + state * (visited @ read_out.hold.t())
        + visited.max(2, keepdim=True).values
        * ((seen @ read_out.inner.t()).clamp(min=0) @ read_out.outer.t())
    )
    torch.testing.assert_close(added.detach(), by_hand)
    first = next(LaneStream(_articles(1, 5), 1, base.segment, EOS))
    new, by_new = _told(able, begin(able, 1, bound).extras, first, state[:1])
    new_T = (new.rates == 1).all(2)
    assert bool(new_T.any())
    assert not bool(by_new[new_T].any()), "nothing is added where all contexts are new"
    idle = nothing_learned(able)
    assert bool(idle.inner.any())
    torch.testing.assert_close(idle.said(plain.rows, visited, state), plain.rows)
    losses, gradients = [], []
    for hand in (False, True):
        theta = {n: w.clone().requires_grad_() for n, w in reader.weights.items()}
        full = {**able.weights, **theta}
        telling = Telling(able, full, reader.extras, piece)
        terms = OutputTerms(added=by_hand)
        now = able.model.read(
            own_weights(full),
            piece.inputs,
            piece.targets,
            reader.state,
            tell=(lambda _, terms=terms: terms) if hand else telling,
        )
        losses.append(now.nll.detach())
        gradients.append(torch.autograd.grad(now.nll.sum(), list(theta.values())))
    torch.testing.assert_close(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert OWN.of(base.weights) is None
    alone = with_extensions(_with(tiny_base(), read_out), OWN)
    told = Telling(alone, alone.weights, {}, piece)(state)
    assert told == OutputTerms(), "nothing is recalled without n-gram memory"


@pytest.mark.parametrize("surprise", [0.0, 0.25])
def test_its_gradient_is_that_of_the_loss(surprise: float, engine: str) -> None:
    """Of the tokens' own losses, what lanes have learned so far being a constant."""
    base = _world(surprise)
    bound = RMS().bind(SETTING, base)
    start = _some(base.model.embedding)
    learner = ReadOutTrainer(_with(base, start), bound, 3)
    stream = LaneStream(_articles(4, 1, 23), 3, base.segment, EOS)
    for _ in range(5):
        learner.gradient(next(stream))
    reader, piece = learner.reader, next(stream)
    assert not bool(piece.mask.all()), "an article ends"
    assert not bool(piece.new.any())
    found, total = learner.gradient(piece)
    way, small = _some(base.model.embedding, 8), 1e-5
    losses = []
    for factor in (-small, 0.0, small):
        moved = _with(learner.base, _moved(start, way, factor))
        losses.append(float(score_segment(moved, reader, piece).nll.sum()))
    assert losses[1] == pytest.approx(total, rel=1e-12)
    slope = (losses[2] - losses[0]) / (2 * small)
    each = [float((g * v).sum()) for g, v in zip(found, way, strict=True)]
    assert min(map(abs, each)) > 1e-4
    assert sum(each) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
def test_it_learns_what_n_grams_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Articles that it did not learn from are predicted better; the seed decides the order."""
    monkeypatch.setattr("mlm.extensions.ngram_read_out.TOKENS", 60)
    base = _world()
    bound = RMS().bind(SETTING, base)
    texts, held = _articles(12, 9), _text(500, 2)
    found = learn_read_out(base, bound, held, 60_000, seed=0)
    some, same, other = (learn_read_out(base, bound, held, 3000, seed) for seed in (0, 0, 1))
    assert _equal(some, same)
    assert not _equal(some, other)
    without, with_it = (
        score_articles(m, bound, texts, EOS, 4).total for m in (base, _with(base, found))
    )
    assert with_it < 0.992 * without
    further = learn_read_out(_with(base, found), bound, held, 1000, seed=0)
    assert 0 < _most(_moved(further, found, -1)) < 0.2 * _most(found)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    base = _world()
    broken = dataclasses.replace(base, weights={**base.weights})
    broken.weights["softmax.bias"] = broken.weights["softmax.bias"] * float("nan")
    with pytest.raises(UserError, match=r"--ngram-read-out.words: after"):
        learn_read_out(broken, RMS().bind(SETTING, broken), _text(3, 2), 100, seed=0)


def test_only_where_n_grams_are_remembered() -> None:
    base = tiny_base()
    with pytest.raises(ValueError, match="n-gram memory, and there is none"):
        ReadOutTrainer(base, RMS().bind(SETTING, base), 1)
    able = _with(_world(), _some(4))
    assert OWN in able.for_rule(LinearGates("three")).extensions
    assert able.for_rule(RMS()).extensions == ()
    assert NGramReadOut().active(able.weights), "what was learned counts without the setting"
    assert not NGramReadOut().active(_world().weights)


def test_it_learns_in_place_and_only_from_what_is_recalled(engine: str) -> None:
    """The lanes read with the very tensors that move."""
    base = _world()
    bound = RMS().bind(SETTING, base)
    learner = ReadOutTrainer(base, bound, 1)
    assert all(learner.base.weights[k] is t for k, t in zip(KEYS, learner.read_out, strict=True))
    assert prepared(base, bound) is base
    before = ReadOut(*(t.clone() for t in learner.read_out))
    article = np.array([1, 2, 3, 4, 5, 6])
    learner.learn([next(LaneStream([article], 1, 5, EOS)) for _ in range(3)], 1e-3)
    assert _equal(before, learner.read_out), "nothing is recalled in an article's beginning"


@pytest.mark.slow
def test_a_run_learns_it_and_keeps_it_where_it_gains(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    rules = "--train-rules", "three_levels", "--rules", "static", "three_levels"
    words = ("--out", folder, *rules, "--ngram-memory.tokens")
    found = {}
    for number in ("0", "3000"):
        stages = "--stages", "meta", "evaluate"
        done = command("train", *words, "500", "--ngram-read-out.words", number, *stages)
        assert done.code == 0, done.err
        found[number] = perplexities(folder)
        tensors, about = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
        rows = RunFolder(folder).rows()
        gains = [r[EXTENSION_GAIN] for r in rows if r.get("extension") == OWN.name]
        assert len(gains) == (number != "0")
        best = max(r["gain_per_word"] for r in rows if "gain_per_word" in r)
        others, own = parted(tensors)
        kept = OWN.of(own)
        assert len(tensors) - len(others) == (0 if kept is None else len(KEYS))
        assert (kept is not None) == (number != "0" and gains[0] > best)
    assert kept is not None
    assert about["gain"] > 0
    for key, value in found["0"].items():
        assert (found["3000"][key] == value) == (key[1] != "three_levels")
    run = open_run(RunFolder(folder).load_config(), quiet=True)
    learned = load_learned(run, "three_levels", run.base)
    assert learned.parameters.keys() == others.keys()
    mine = OWN.of(learned.base.weights)
    assert mine is not None
    assert _equal(mine, kept)
    again = "500", "--ngram-read-out.words", "3000", "--stages", "meta", "--resume"
    assert command("train", *words, *again).code == 0
    rows = RunFolder(folder).rows()
    assert [r[EXTENSION_GAIN] for r in rows if r.get("extension") == OWN.name] == gains
    once_more, _ = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    assert all(torch.equal(t, tensors[n]) for n, t in once_more.items())
    error = command("train", *words, "0", "--ngram-read-out.words", "10").error
    assert "--ngram-read-out.words is 10; it reads n-gram memory out, and there is none" in error


def test_a_rule_trained_on_goes_on_from_its_read_out(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """Whether it learns more or not; and settings without one are what they were."""
    folder = finished.copy(tmp_path / "run")
    words = "--out", folder, "--train-rules", "three_levels", "--ngram-memory.tokens", "500"
    done = command("train", *words, "--ngram-read-out.words", "3000", "--stages", "meta")
    assert done.code == 0, done.err
    first, about = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    config = RunFolder(folder).load_config()
    meta = dataclasses.replace(config.meta, start="three_levels", steps=0)
    extensions = dataclasses.replace(config.extensions, ngram_read_out=NGramReadOut(words=0))
    again = dataclasses.replace(
        config, meta=meta, extensions=extensions, stages=("meta",), overwrite=True
    )
    assert identity(open_run(config, quiet=True)) != identity(open_run(again, quiet=True))
    run_stages(again, quiet=True)
    second, again_about = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    for name in KEYS:
        assert torch.equal(first[BESIDE + name], second[BESIDE + name])
    assert again_about["gain"] == pytest.approx(about["gain"]), "it is judged with what it has"
