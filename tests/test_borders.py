"""Borders of articles, told by the hidden state: the fit, FLUSH, streams, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from worlds import EOS, made_up_rms, tiny_memory

from mlm.borders import learn_borders
from mlm.checkpoint import load_memory, load_tensors, save_memory
from mlm.config import PROTOCOLS
from mlm.gates import LinearGates
from mlm.learner import RMS, Parameters, Signal
from mlm.lm import LMShape, initial_weights
from mlm.memory import Borders, LongTerm
from mlm.meta import validation_gain
from mlm.rollout import Reader, Step, begin, meta_gradient, score_segment, step
from mlm.rules import start_at
from mlm.scoring import score_articles, score_protocol, score_stream
from mlm.second_order import second_order
from mlm.stage_meta import seen_by
from mlm.streams import LaneStream, Segment
from mlm.training import Text
from mlm.tuning import TuneText

SETTING = {"rate": torch.tensor(0.004).double(), "decay": torch.tensor(0.02).double()}
HEADING = [8, 7, EOS]


def _articles(number: int, seed: int = 0) -> list[np.ndarray]:
    """A heading of words that lines do not have, then lines of other words."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        lines = [[*random.integers(1, 7, random.integers(3, 9)), EOS] for _ in range(4)]
        found.append(np.array([*HEADING, *np.concatenate(lines)]))
    return found


@pytest.fixture(scope="module")
def memory() -> LongTerm:
    """A tiny model, untrained: what it read last is in its hidden state all the same."""
    generator = torch.Generator().manual_seed(0)
    shape = LMShape(12, 16, 16, 1)
    weights = {n: w.double() for n, w in initial_weights(shape, generator).items()}
    articles = _articles(600)
    text = Text(articles, sum(map(len, articles)), EOS)
    borders = learn_borders(shape, weights, text)
    rms = made_up_rms(weights, tuple(weights), generator)
    return LongTerm(shape, weights, tuple(weights), rms, 2.3, 5, borders=borders)


def _first_lines(articles: list[np.ndarray]) -> list[int]:
    """Positions, in the joined text, that follow the line end of a heading."""
    starts = np.cumsum([0, *map(len, articles)])[:-1]
    return [int(start) + len(HEADING) for start in starts]


def test_it_tells_headings_from_other_lines(memory: LongTerm) -> None:
    articles = _articles(30, seed=1)
    ids = torch.from_numpy(np.concatenate(articles)).unsqueeze(0)
    inputs = torch.cat([torch.tensor([[EOS]]), ids[:, :-1]], 1)
    state = memory.shape.initial_state(1, dtype=torch.float64)
    output = memory.shape.read(memory.static, inputs, ids, state).output
    assert memory.borders is not None
    found = [
        k
        for k in range(ids.shape[1])
        if memory.borders.opened(
            inputs[:, k : k + 1], torch.ones(1, 1, dtype=torch.bool), output[:, k : k + 1]
        )
    ]
    assert found == _first_lines(articles)
    silent = torch.zeros_like(inputs, dtype=torch.bool)
    assert not memory.borders.opened(inputs, silent, output).any(), "masked tokens do not count"


def test_articles_that_begin_as_all_lines_do_are_not_told_apart() -> None:
    plain = tiny_memory(layers=1)
    random = np.random.default_rng(0)
    lines = [np.array([*random.integers(1, 7, 6), EOS]) for _ in range(400)]
    articles = [np.concatenate(lines[k : k + 8]) for k in range(0, 400, 8)]
    found = learn_borders(plain.shape, plain.static, Text(articles, 2800, EOS))
    assert float(found.weights[-1]) < 0
    text = np.concatenate(articles)
    bound = RMS().bind(SETTING, plain)
    told = dataclasses.replace(plain, borders=found)
    unaware, aware = (score_articles(m, bound, [text], EOS, 1).nll[0] for m in (plain, told))
    np.testing.assert_array_equal(aware, unaware)


def test_a_stream_is_read_like_articles_but_for_the_hidden_state(memory: LongTerm) -> None:
    """Weights are theta_0 from a heading on: step by step."""
    articles = _articles(6, seed=2)
    text = np.concatenate(articles)
    bound = RMS().bind(SETTING, memory)
    reader = begin(memory, 1, bound)
    flushed = []
    for k, piece in enumerate(LaneStream([text], 1, memory.segment, EOS)):
        before = reader
        now = step(memory, bound, reader, piece)
        at_theta_0 = all(
            torch.equal(now.before.weights[n][0], memory.weights[n]) for n in memory.dynamic
        )
        assert at_theta_0 == bool(now.new) == (float(now.before.age) == 0)
        if k and at_theta_0:
            assert float(now.before.state.tensors()[0].abs().sum()) > 0, "the hidden state stays"
            flushed.append(k)
            _check_beginning(memory, before, now, piece, _first_lines(articles))
        else:
            assert torch.equal(now.taught, piece.mask)
        assert not now.flushed.any(), "the guard has nothing to do with it"
        reader = now.after
    read_in = [first // memory.segment for first in _first_lines(articles)]
    assert flushed == [k for k in read_in if k]
    plain = dataclasses.replace(memory, borders=None)
    kept, dropped = (score_stream(m, bound, articles, EOS).total for m in (plain, memory))
    assert kept != dropped


def test_nobody_looks_for_borders_that_are_marked(memory: LongTerm) -> None:
    """Two articles in one are one to protocol `article`, which has no static pass beside it."""
    articles = [np.concatenate(_articles(2, seed=s)) for s in (5, 6)]
    bound = RMS().bind(SETTING, memory)
    plain = dataclasses.replace(memory, borders=None)
    for protocol in PROTOCOLS:
        aware, unaware = (
            score_protocol(m, bound, articles, EOS, protocol, 2).total for m in (memory, plain)
        )
        assert (aware == unaware) == (protocol == "article")
    rule = LinearGates("three_levels")
    phi = start_at(rule, RMS(), SETTING, memory)
    text = TuneText(articles, EOS, 2)
    gains = {
        (protocol, m is memory): validation_gain(m, rule, phi, text, {protocol: 0.0})
        for protocol in PROTOCOLS
        for m in (memory, plain)
    }
    assert gains["article", True] == gains["article", False]
    assert gains["stream", True] != gains["stream", False]


def test_what_a_lane_has_learned_hides_no_border(memory: LongTerm) -> None:
    """Also under steps that turn the weights over: the static model looks for borders."""
    articles = _articles(8, seed=3)
    wild = {"rate": torch.tensor(0.3).double(), "decay": torch.tensor(0.0).double()}
    bound = RMS().bind(wild, memory)
    reader, flushed = begin(memory, 1, bound), []
    for k, piece in enumerate(LaneStream([np.concatenate(articles)], 1, memory.segment, EOS)):
        now = step(memory, bound, reader, piece)
        reader = now.after
        if bool(now.new):
            flushed.append(k)
    assert flushed[1:] == [k // memory.segment for k in _first_lines(articles)][1:]


def _check_beginning(
    memory: LongTerm, before: Reader, now: Step, piece: Segment, first_lines: list[int]
) -> None:
    """Old weights up to the heading's end, theta_0 from there; its words and what follows teach."""
    at = int(piece.start[0])
    (end,) = (k - at for k in first_lines if at <= k < at + memory.segment)
    first = max(0, end - len(HEADING))
    plain = dataclasses.replace(memory, borders=None)
    old, new = (score_segment(plain, reader, piece) for reader in (before, now.before))
    assert not torch.equal(old.nll, new.nll)
    for k in range(int(piece.mask.sum())):
        source = new if k >= end else old
        assert torch.equal(now.scored.nll[0, k], source.nll[0, k]), (k, end)
        assert torch.equal(now.scored.output[0, k], source.output[0, k])
    assert now.taught[0].tolist() == [bool(m) and k >= first for k, m in enumerate(piece.mask[0])]
    theta = {n: w.clone().requires_grad_() for n, w in now.before.weights.items()}
    nll = memory.shape.read(
        {**memory.weights, **theta}, piece.inputs, piece.targets, now.before.state
    ).nll
    want = torch.autograd.grad((nll * now.taught).sum() / memory.segment, list(theta.values()))
    for (name, g), w in zip(now.scored.gradients.items(), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12, msg=name)


def _unroll(memory: LongTerm, number: int) -> tuple[LinearGates, Parameters, list[Segment]]:
    """A rule, its parameters, and the first segments of two streams."""
    rule = LinearGates("three_levels")
    texts = [np.concatenate(_articles(5, seed=s)) for s in (3, 4)]
    stream = LaneStream(texts, 2, memory.segment, EOS)
    return rule, start_at(rule, RMS(), SETTING, memory), [next(stream) for _ in range(number)]


@pytest.mark.parametrize("mode", ["reverse", "checkpoint", "forward"])
def test_the_meta_gradient_stops_at_a_border(memory: LongTerm, mode: Any) -> None:
    """Against autograd through the formula, borders told, inner gradients held constant."""
    rule, phi, pieces = _unroll(memory, 24)
    bound = rule.bind(phi, memory)
    found = meta_gradient(memory, bound, phi, begin(memory, 2, bound), pieces, mode)
    # the same text with its borders marked where the detector finds them, and what teaches there
    reader, marked, taught = begin(memory, 2, bound), [], []
    for piece in pieces:
        now = step(memory, bound, reader, piece)
        reader = now.after
        marked.append(piece._replace(new=now.new))
        taught.append(now.taught)
    assert sum(int(p.new.sum()) for p in marked) > 2
    assert any(int(t.sum()) < int(p.mask.sum()) for t, p in zip(taught, pieces, strict=True))
    plain = dataclasses.replace(memory, borders=None)
    want = _meta_gradient_keeping_state(plain, rule, phi, marked, taught)
    for name, g in found.gradients.items():
        torch.testing.assert_close(g, want[name], rtol=1e-8, atol=1e-10, msg=name)


def _meta_gradient_keeping_state(
    memory: LongTerm,
    rule: LinearGates,
    phi: dict[str, torch.Tensor],
    pieces: list[Any],
    taught: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """First order by autograd through the formula; weights, not states, are reset where told."""
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    reader = begin(memory, 2, rule.bind(phi, memory))
    theta, total, tokens = dict(reader.weights), torch.zeros(()).double(), 0
    for t, piece in enumerate(pieces):
        flag = {n: piece.new.view(-1, *[1] * (w.dim() - 1)) for n, w in theta.items()}
        theta = {n: torch.where(flag[n], memory.weights[n], w) for n, w in theta.items()}
        reader = reader._replace(
            weights={n: w.detach() for n, w in theta.items()}, age=reader.age * ~piece.new
        )
        scored = score_segment(memory, reader, piece, (), taught[t])
        if t:
            total = total + sum((theta[n] * g).sum() for n, g in scored.gradients.items())
            tokens += int(piece.mask.sum())
        signal = Signal(scored.loss, reader.age)
        theta = rule.formula(leaves, memory, theta, scored.gradients, signal)
        reader = reader._replace(state=scored.state, age=reader.age + 1)
    total = total * memory.segment / tokens
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), found, strict=True)
    }


def test_the_second_order_unroll_reads_alike(memory: LongTerm) -> None:
    rule, phi, pieces = _unroll(memory, 8)
    bound = rule.bind(phi, memory)
    first = meta_gradient(memory, bound, phi, begin(memory, 2, bound), pieces)
    second = second_order(memory, rule, phi, begin(memory, 2, bound), pieces)
    assert second.loss == pytest.approx(first.loss, rel=1e-12)
    assert torch.equal(second.reader.age, first.reader.age)


def test_only_a_learned_flush_sees_borders(memory: LongTerm) -> None:
    assert seen_by(LinearGates("three_levels"), memory).borders is memory.borders
    for rule in (RMS(), LinearGates("two_levels", flush=False)):
        assert seen_by(rule, memory).borders is None


def test_files(memory: LongTerm, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    save_memory(path, memory, "x")
    again = load_memory(path, "x").borders
    assert isinstance(memory.borders, Borders)
    assert isinstance(again, Borders)
    assert torch.equal(again.weights, memory.borders.weights)
    assert again.eos == EOS
    moved = memory.to("cpu", torch.float32).borders
    assert isinstance(moved, Borders)
    assert moved.weights.dtype == torch.float32
    save_memory(path, dataclasses.replace(memory, borders=None), "x")
    assert load_memory(path, "x").borders is None


def test_a_run_that_sees_borders(finished: Finished, command: Command, tmp_path: Path) -> None:
    """Stage 2 and a later `evaluate.py`; the settings must agree with what was made."""
    folder = finished.copy(tmp_path / "run")
    rules = ("--meta.rules", "three_levels", "--evaluation.rules", "static", "rms", "three_levels")
    words = ("--out", folder, *rules)
    done = command("train", *words, "--adapt.borders", "--stages", "meta", "evaluate")
    assert done.code == 0, done.err
    tensors, about = load_tensors(folder / "checkpoints" / "memory.safetensors", "")
    assert tensors["borders"].dim() == 1
    assert "eos" in about
    losses = (folder / "losses.parquet").read_bytes()
    assert command("evaluate", folder, "--no-draw").code == 0
    assert (folder / "losses.parquet").read_bytes() == losses
    error = command("train", *words, "--adapt.no-borders", "--stages", "evaluate").error
    assert "was made with --adapt.borders, but the settings say otherwise" in error
