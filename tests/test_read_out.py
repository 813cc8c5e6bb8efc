"""The read-out of phrases: through what what is recalled enters the softmax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from tiny import perplexities
from worlds import EOS, TinyMemory, tiny_memory

from mlm.checkpoint import RunFolder, load_tensors
from mlm.errors import UserError
from mlm.gates import LinearGates
from mlm.learner import RMS
from mlm.lm import Weights
from mlm.phrases import AGAIN, SAID, STEPS, ReadOut, phrases
from mlm.pipeline import run_stages
from mlm.read_out import (
    NAMES,
    UNITS,
    Learner,
    learn_read_out,
    nothing_learned,
    read_out_of,
    taken,
    with_read_out,
)
from mlm.rollout import learning_at_once, recollection, score_segment
from mlm.run import open_run
from mlm.scoring import score_articles
from mlm.stage_meta import identity, load_learned, seen_by
from mlm.streams import LaneStream
from mlm.training import Text

ORDERS = len(STEPS)
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


def _world(**world: Any) -> TinyMemory:
    memory = tiny_memory(layers=1, **world)
    told = phrases(memory.weights["embedding"], 1000)  # whose steps are made for wide embeddings
    told = told._replace(steps=told.steps / 10)
    return dataclasses.replace(memory, phrases=told, surprise=0.25)


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


def test_what_is_recalled_is_read_through_it(engine: str) -> None:
    """The article's rows alone, and what is written stays as it was."""
    memory = _world()
    bound = RMS().bind(SETTING, memory)
    able = with_read_out(memory, _some(memory.shape.embedding))
    read_out = read_out_of(able)
    assert able.phrases is not None
    assert memory.phrases is not None
    assert read_out is not None
    learner = Learner(memory, bound, 2)
    stream = LaneStream(_articles(2, 0), 2, memory.segment, EOS)
    for _ in range(6):
        learner.gradient(next(stream))
    reader, piece = learner.reader, next(stream)
    assert reader.history is not None
    weights: Weights = {**memory.weights, **reader.weights}
    plainly = memory.shape.read(weights, piece.inputs, piece.targets, reader.state)
    state = plainly.output.detach()
    plain, found = (
        m.phrases.recall(reader.history, piece.inputs, state) for m in (memory, able) if m.phrases
    )
    assert torch.equal(plain.own, plain.rows)
    assert torch.equal(found.own, plain.own)
    assert torch.equal(found.within, plain.within)
    assert float(found.own.abs().max()) > 1e-3
    visited = 1 - found.rates
    gate = 1 + (state * read_out.gate).sum(2, keepdim=True)
    assert float((gate - 1).abs().median()) > 1e-2
    seen = torch.cat([state, plain.own, visited], 2)
    by_hand = (
        gate * (plain.own + plain.own @ read_out.map.t())
        + visited @ read_out.known.t()
        + state * (visited @ read_out.hold.t())
        + visited.max(2, keepdim=True).values
        * ((seen @ read_out.inner.t()).clamp(min=0) @ read_out.outer.t())
    )
    torch.testing.assert_close(found.rows, by_hand)
    first = next(LaneStream(_articles(1, 5), 1, memory.segment, EOS))
    start = learner.memory.phrases and learner.memory.phrases.begin(1)
    assert start is not None
    new = able.phrases.recall(start, first.inputs, state[:1])
    new_T = (new.rates == 1).all(2)
    assert bool(new_T.any())
    assert not bool(new.rows[new_T].any()), "nothing is added where all contexts are new"
    idle = nothing_learned(able.phrases)
    assert bool(idle.inner.any())
    torch.testing.assert_close(idle.said(plain.own, visited, state), plain.own)
    losses, gradients = [], []
    for hand in (False, True):
        theta = {n: w.clone().requires_grad_() for n, w in reader.weights.items()}
        full = {**memory.weights, **theta}
        told = recollection(able, reader, piece)
        if hand:
            full, told = {**full, SAID: by_hand, AGAIN: found.within}, None
        now = able.shape.read(full, piece.inputs, piece.targets, reader.state, recall=told)
        losses.append(now.nll.detach())
        gradients.append(torch.autograd.grad(now.nll.sum(), list(theta.values())))
    torch.testing.assert_close(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert read_out_of(dataclasses.replace(memory, phrases=None)) is None
    assert with_read_out(tiny_memory(), read_out).phrases is None


@pytest.mark.parametrize("surprise", [0.0, 0.25])
def test_its_gradient_is_that_of_the_loss(surprise: float, engine: str) -> None:
    """Of the tokens' own losses, what lanes have learned so far being a constant."""
    memory = dataclasses.replace(_world(), surprise=surprise)
    bound = RMS().bind(SETTING, memory)
    start = _some(memory.shape.embedding)
    learner = Learner(with_read_out(memory, start), bound, 3)
    stream = LaneStream(_articles(4, 1, 23), 3, memory.segment, EOS)
    for _ in range(5):
        learner.gradient(next(stream))
    reader, piece = learner.reader, next(stream)
    assert not bool(piece.mask.all()), "an article ends"
    assert not bool(piece.new.any())
    found, total = learner.gradient(piece)
    way, small = _some(memory.shape.embedding, 8), 1e-5
    losses = []
    for factor in (-small, 0.0, small):
        moved = with_read_out(learner.memory, _moved(start, way, factor))
        losses.append(float(score_segment(moved, reader, piece).nll.sum()))
    assert losses[1] == pytest.approx(total, rel=1e-12)
    slope = (losses[2] - losses[0]) / (2 * small)
    each = [float((g * v).sum()) for g, v in zip(found, way, strict=True)]
    assert min(map(abs, each)) > 1e-4
    assert sum(each) == pytest.approx(slope, rel=1e-6)


def test_it_learns_what_phrases_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Articles that it did not learn from are predicted better; the seed decides the order."""
    monkeypatch.setattr("mlm.read_out.TOKENS", 60)
    memory = _world()
    bound = RMS().bind(SETTING, memory)
    texts, held = _articles(12, 9), _text(500, 2)
    found = learn_read_out(memory, bound, held, 60_000, seed=0)
    some, same, other = (learn_read_out(memory, bound, held, 3000, seed) for seed in (0, 0, 1))
    assert _equal(some, same)
    assert not _equal(some, other)
    without, with_it = (
        score_articles(m, bound, texts, EOS, 4).total
        for m in (memory, with_read_out(memory, found))
    )
    assert with_it < 0.992 * without
    further = learn_read_out(with_read_out(memory, found), bound, held, 1000, seed=0)
    assert 0 < _most(_moved(further, found, -1)) < 0.2 * _most(found)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    memory = _world()
    broken = dataclasses.replace(memory, weights={**memory.weights})
    broken.weights["softmax.bias"] = broken.weights["softmax.bias"] * float("nan")
    with pytest.raises(UserError, match="read-out-words: after"):
        learn_read_out(broken, RMS().bind(SETTING, broken), _text(3, 2), 100, seed=0)


def test_only_where_phrases_are_remembered() -> None:
    memory = tiny_memory()
    with pytest.raises(ValueError, match="none are remembered"):
        Learner(memory, RMS().bind(SETTING, memory), 1)
    able = with_read_out(_world(), _some(4))
    assert read_out_of(seen_by(LinearGates("three"), able)) is not None
    assert read_out_of(seen_by(RMS(), able)) is None


def test_it_learns_in_place_and_only_from_what_is_recalled(engine: str) -> None:
    """The lanes read with the very tensors that move."""
    memory = _world()
    bound = RMS().bind(SETTING, memory)
    learner = Learner(memory, bound, 1)
    assert learner.memory.phrases is not None
    assert learner.memory.phrases.read_out is learner.read_out
    assert learning_at_once(memory, bound) is memory
    before = ReadOut(*(t.clone() for t in learner.read_out))
    article = np.array([1, 2, 3, 4, 5, 6])
    learner.learn([next(LaneStream([article], 1, 5, EOS)) for _ in range(3)], 1e-3)
    assert _equal(before, learner.read_out), "nothing is recalled in an article's beginning"


def test_a_run_learns_it_and_keeps_it_where_it_gains(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    rules = "--meta.rules", "three_levels", "--evaluation.rules", "static", "three_levels"
    words = ("--out", folder, *rules, "--adapt.phrases")
    found = {}
    for number in ("0", "3000"):
        stages = "--stages", "meta", "evaluate"
        done = command("train", *words, "500", "--meta.read-out-words", number, *stages)
        assert done.code == 0, done.err
        found[number] = perplexities(folder)
        tensors, about = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
        rows = RunFolder(folder).rows()
        gains = [r["read_out_gain_per_word"] for r in rows if "read_out_gain_per_word" in r]
        assert len(gains) == (number != "0")
        best = max(r["gain_per_word"] for r in rows if "gain_per_word" in r)
        kept, others = taken(tensors)
        assert len(tensors) - len(others) == (0 if kept is None else len(NAMES))
        assert (kept is not None) == (number != "0" and gains[0] > best)
    assert kept is not None
    assert about["gain"] > 0
    for key, value in found["0"].items():
        assert (found["3000"][key] == value) == (key[1] != "three_levels")
    run = open_run(RunFolder(folder).load_config(), quiet=True)
    learned = load_learned(run, "three_levels", run.memory)
    assert learned.parameters.keys() == others.keys()
    mine = read_out_of(learned.memory)
    assert mine is not None
    assert _equal(mine, kept)
    again = "500", "--meta.read-out-words", "3000", "--stages", "meta", "--resume"
    assert command("train", *words, *again).code == 0
    rows = RunFolder(folder).rows()
    assert [r["read_out_gain_per_word"] for r in rows if "read_out_gain_per_word" in r] == gains
    once_more, _ = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    assert all(torch.equal(t, tensors[n]) for n, t in once_more.items())
    error = command("train", *words, "0", "--meta.read-out-words", "10").error
    assert "--meta.read-out-words is 10; it reads phrases out, and none are remembered" in error


def test_a_rule_trained_on_goes_on_from_its_read_out(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """Whether it learns more or not; and settings without one are what they were."""
    folder = finished.copy(tmp_path / "run")
    words = "--out", folder, "--meta.rules", "three_levels", "--adapt.phrases", "500"
    done = command("train", *words, "--meta.read-out-words", "3000", "--stages", "meta")
    assert done.code == 0, done.err
    first, _ = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    config = RunFolder(folder).load_config()
    meta = dataclasses.replace(config.meta, start="three_levels", steps=0, read_out_words=0)
    again = dataclasses.replace(config, meta=meta, stages=("meta",), overwrite=True)
    assert identity(open_run(config, quiet=True)) != identity(open_run(again, quiet=True))
    run_stages(again, quiet=True)
    second, _ = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    for name in NAMES:
        assert torch.equal(first[name], second[name])
