"""Boundaries of articles, told by the hidden state: the fit, FLUSH, streams, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from worlds import EOS, made_up_rms, tiny_base, with_extensions

from mlm.base.names import PROTOCOLS
from mlm.extensions import Boundaries
from mlm.extensions.boundaries import learn_boundaries
from mlm.models.base import AdaptationBase
from mlm.models.recurrent import RecurrentLM, initial_weights
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles, score_protocol, score_stream
from mlm.reading.second_order import second_order
from mlm.reading.step import Reader, Step, begin, score_segment, step
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Parameters, Signal
from mlm.store.models import load_base, save_base
from mlm.store.tensors import load_tensors
from mlm.text.streams import LaneStream, Segment, Text
from mlm.training.judge import validation_gain
from mlm.training.tuning import TuneText

SETTING = {"rate": torch.tensor(0.004).double(), "decay": torch.tensor(0.02).double()}
HEADING = [8, 7, EOS]
BOUNDARIES = Boundaries(on=True)
REGRESSION, LINE_END = BOUNDARIES.key("regression"), BOUNDARIES.key("line_end")


def _articles(number: int, seed: int = 0) -> list[np.ndarray]:
    """A heading of words that lines do not have, then lines of other words."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        lines = [[*random.integers(1, 7, random.integers(3, 9)), EOS] for _ in range(4)]
        found.append(np.array([*HEADING, *np.concatenate(lines)]))
    return found


@pytest.fixture(scope="module")
def base() -> AdaptationBase:
    """A tiny model, untrained: what it read last is in its hidden state all the same."""
    generator = torch.Generator().manual_seed(0)
    shape = RecurrentLM(12, 16, 16, 1)
    weights = {n: w.double() for n, w in initial_weights(shape, generator).items()}
    articles = _articles(600)
    text = Text(articles, sum(map(len, articles)), EOS)
    regression = learn_boundaries(shape, weights, text)
    rms = made_up_rms(weights, tuple(weights), generator)
    plain = AdaptationBase(shape, weights, tuple(weights), rms, 2.3, 5)
    return with_extensions(plain.with_weights(BOUNDARIES.weights(regression, EOS)), BOUNDARIES)


def _first_lines(articles: list[np.ndarray]) -> list[int]:
    """Positions, in the joined text, that follow the line end of a heading."""
    starts = np.cumsum([0, *map(len, articles)])[:-1]
    return [int(start) + len(HEADING) for start in starts]


def test_it_tells_headings_from_other_lines(base: AdaptationBase) -> None:
    articles = _articles(30, seed=1)
    reader, old = BOUNDARIES.begin(base, 1), torch.ones(1)
    found = []
    for k, piece in enumerate(LaneStream([np.concatenate(articles)], 1, 1, EOS)):
        silent = piece._replace(mask=torch.zeros_like(piece.mask))
        restart, after = BOUNDARIES.restart(base, reader, piece, old)
        if restart is not None:
            found.append(k)
        masked, _ = BOUNDARIES.restart(base, reader, silent, old)
        assert masked is None, "masked tokens do not count"
        reader = after
    assert found == _first_lines(articles)


@pytest.mark.slow
def test_articles_that_begin_as_all_lines_do_are_not_told_apart() -> None:
    plain = tiny_base(layers=1)
    random = np.random.default_rng(0)
    lines = [np.array([*random.integers(1, 7, 6), EOS]) for _ in range(400)]
    articles = [np.concatenate(lines[k : k + 8]) for k in range(0, 400, 8)]
    found = learn_boundaries(plain.model, plain.static, Text(articles, 2800, EOS))
    assert float(found[-1]) < 0
    text = np.concatenate(articles)
    bound = RMS().bind(SETTING, plain)
    told = with_extensions(plain.with_weights(BOUNDARIES.weights(found, EOS)), BOUNDARIES)
    unaware, aware = (score_articles(m, bound, [text], EOS, 1).nll[0] for m in (plain, told))
    np.testing.assert_array_equal(aware, unaware)


def test_a_stream_is_read_like_articles_but_for_the_hidden_state(base: AdaptationBase) -> None:
    """Weights are theta_0 from a heading on: step by step."""
    articles = _articles(6, seed=2)
    text = np.concatenate(articles)
    bound = RMS().bind(SETTING, base)
    reader = begin(base, 1, bound)
    flushed = []
    for k, piece in enumerate(LaneStream([text], 1, base.segment, EOS)):
        before = reader
        now = step(base, bound, reader, piece)
        at_theta_0 = all(
            torch.equal(now.before.weights[n][0], base.weights[n]) for n in base.dynamic
        )
        assert at_theta_0 == bool(now.new) == (float(now.before.age) == 0)
        if k and at_theta_0:
            assert float(now.before.state.tensors()[0].abs().sum()) > 0, "the hidden state stays"
            flushed.append(k)
            _check_beginning(base, before, now, piece, _first_lines(articles))
        else:
            assert torch.equal(now.taught, piece.mask)
        assert not now.flushed.any(), "the guard has nothing to do with it"
        reader = now.after
    read_in = [first // base.segment for first in _first_lines(articles)]
    assert flushed == [k for k in read_in if k]
    plain = with_extensions(base)
    kept, dropped = (score_stream(m, bound, articles, EOS).total for m in (plain, base))
    assert kept != dropped


def test_nobody_looks_for_borders_that_are_marked(base: AdaptationBase) -> None:
    """Two articles in one are one to protocol `article`, which has no static pass beside it."""
    articles = [np.concatenate(_articles(2, seed=s)) for s in (5, 6)]
    bound = RMS().bind(SETTING, base)
    plain = with_extensions(base)
    for protocol in PROTOCOLS:
        aware, unaware = (
            score_protocol(m, bound, articles, EOS, protocol, 2).total for m in (base, plain)
        )
        assert (aware == unaware) == (protocol == "article")
    rule = LinearGates("three_levels")
    phi = start_at(rule, RMS(), SETTING, base)
    text = TuneText(articles, EOS, 2)
    gains = {
        (protocol, m is base): validation_gain(m, rule, phi, text, {protocol: 0.0})
        for protocol in PROTOCOLS
        for m in (base, plain)
    }
    assert gains["article", True] == gains["article", False]
    assert gains["stream", True] != gains["stream", False]


def test_what_a_lane_has_learned_hides_no_border(base: AdaptationBase) -> None:
    """Also under steps that turn the weights over: the static model looks for borders."""
    articles = _articles(8, seed=3)
    wild = {"rate": torch.tensor(0.3).double(), "decay": torch.tensor(0.0).double()}
    bound = RMS().bind(wild, base)
    reader, flushed = begin(base, 1, bound), []
    for k, piece in enumerate(LaneStream([np.concatenate(articles)], 1, base.segment, EOS)):
        now = step(base, bound, reader, piece)
        reader = now.after
        if bool(now.new):
            flushed.append(k)
    assert flushed[1:] == [k // base.segment for k in _first_lines(articles)][1:]


def _check_beginning(
    base: AdaptationBase, before: Reader, now: Step, piece: Segment, first_lines: list[int]
) -> None:
    """Old weights up to the heading's end, theta_0 from there; its words and what follows teach."""
    at = int(piece.start[0])
    (end,) = (k - at for k in first_lines if at <= k < at + base.segment)
    first = max(0, end - len(HEADING))
    plain = with_extensions(base)
    old, new = (score_segment(plain, reader, piece) for reader in (before, now.before))
    assert not torch.equal(old.nll, new.nll)
    for k in range(int(piece.mask.sum())):
        source = new if k >= end else old
        assert torch.equal(now.scored.nll[0, k], source.nll[0, k]), (k, end)
        assert torch.equal(now.scored.output[0, k], source.output[0, k])
    assert now.taught[0].tolist() == [bool(m) and k >= first for k, m in enumerate(piece.mask[0])]
    theta = {n: w.clone().requires_grad_() for n, w in now.before.weights.items()}
    nll = base.model.read(
        {**base.weights, **theta}, piece.inputs, piece.targets, now.before.state
    ).nll
    want = torch.autograd.grad((nll * now.taught).sum() / base.segment, list(theta.values()))
    for (name, g), w in zip(now.scored.gradients.items(), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12, msg=name)


def _unroll(base: AdaptationBase, number: int) -> tuple[LinearGates, Parameters, list[Segment]]:
    """A rule, its parameters, and the first segments of two streams."""
    rule = LinearGates("three_levels")
    texts = [np.concatenate(_articles(5, seed=s)) for s in (3, 4)]
    stream = LaneStream(texts, 2, base.segment, EOS)
    return rule, start_at(rule, RMS(), SETTING, base), [next(stream) for _ in range(number)]


@pytest.mark.parametrize("mode", ["reverse", "checkpoint", "forward"])
def test_the_meta_gradient_stops_at_a_border(base: AdaptationBase, mode: Any) -> None:
    """Against autograd through the formula, borders told, inner gradients held constant."""
    rule, phi, pieces = _unroll(base, 24)
    bound = rule.bind(phi, base)
    found = meta_gradient(base, bound, phi, begin(base, 2, bound), pieces, mode)
    # the same text with its borders marked where the detector finds them, and what teaches there
    reader, marked, taught = begin(base, 2, bound), [], []
    for piece in pieces:
        now = step(base, bound, reader, piece)
        reader = now.after
        marked.append(piece._replace(new=now.new))
        taught.append(now.taught)
    assert sum(int(p.new.sum()) for p in marked) > 2
    assert any(int(t.sum()) < int(p.mask.sum()) for t, p in zip(taught, pieces, strict=True))
    plain = with_extensions(base)
    want = _meta_gradient_keeping_state(plain, rule, phi, marked, taught)
    for name, g in found.gradients.items():
        torch.testing.assert_close(g, want[name], rtol=1e-8, atol=1e-10, msg=name)


def _meta_gradient_keeping_state(
    base: AdaptationBase,
    rule: LinearGates,
    phi: dict[str, torch.Tensor],
    pieces: list[Any],
    taught: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """First order by autograd through the formula; weights, not states, are reset where told."""
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    reader = begin(base, 2, rule.bind(phi, base))
    theta, total, tokens = dict(reader.weights), torch.zeros(()).double(), 0
    for t, piece in enumerate(pieces):
        flag = {n: piece.new.view(-1, *[1] * (w.dim() - 1)) for n, w in theta.items()}
        theta = {n: torch.where(flag[n], base.weights[n], w) for n, w in theta.items()}
        reader = reader._replace(
            weights={n: w.detach() for n, w in theta.items()}, age=reader.age * ~piece.new
        )
        scored = score_segment(base, reader, piece, (), taught[t])
        if t:
            total = total + sum((theta[n] * g).sum() for n, g in scored.gradients.items())
            tokens += int(piece.mask.sum())
        signal = Signal(scored.loss, reader.age)
        theta = rule.formula(leaves, base, theta, scored.gradients, signal)
        reader = reader._replace(state=scored.state, age=reader.age + 1)
    total = total * base.segment / tokens
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), found, strict=True)
    }


def test_the_second_order_unroll_reads_alike(base: AdaptationBase) -> None:
    rule, phi, pieces = _unroll(base, 8)
    bound = rule.bind(phi, base)
    first = meta_gradient(base, bound, phi, begin(base, 2, bound), pieces)
    second = second_order(base, rule, phi, begin(base, 2, bound), pieces)
    assert second.loss == pytest.approx(first.loss, rel=1e-12)
    assert torch.equal(second.reader.age, first.reader.age)


def test_only_a_learned_flush_sees_borders(base: AdaptationBase) -> None:
    assert base.for_rule(LinearGates("three_levels")).extensions == (BOUNDARIES,)
    for rule in (RMS(), LinearGates("two_levels", flush=False)):
        assert base.for_rule(rule).extensions == ()


def test_files(base: AdaptationBase, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    save_base(path, base, "x")
    again = load_base(path, "x").weights
    assert torch.equal(again[REGRESSION], base.weights[REGRESSION])
    assert int(again[LINE_END]) == EOS
    moved = base.to("cpu", torch.float32).weights
    assert moved[REGRESSION].dtype == torch.float32
    assert moved[LINE_END].dtype == torch.int64
    own = {n: w for n, w in base.weights.items() if not n.startswith(f"{BOUNDARIES.name}/")}
    save_base(path, dataclasses.replace(base, weights=own), "x")
    assert load_base(path, "x").weights.keys() == own.keys()


@pytest.mark.slow
def test_a_run_that_sees_borders(finished: Finished, command: Command, tmp_path: Path) -> None:
    """Stage 2 and a later `evaluate.py`; the settings must agree with what was made."""
    folder = finished.copy(tmp_path / "run")
    rules = ("--train-rules", "three_levels", "--rules", "static", "rms", "three_levels")
    words = ("--out", folder, *rules)
    done = command("train", *words, "--boundaries.on", "--stages", "meta", "evaluate")
    assert done.code == 0, done.err
    tensors, _ = load_tensors(folder / "checkpoints" / "memory.safetensors", "")
    assert tensors[f"theta_0/{REGRESSION}"].dim() == 1
    assert f"theta_0/{LINE_END}" in tensors
    losses = (folder / "losses.parquet").read_bytes()
    assert command("evaluate", folder, "--no-draw").code == 0
    assert (folder / "losses.parquet").read_bytes() == losses
    error = command("train", *words, "--boundaries.no-on", "--stages", "evaluate").error
    assert "was made with boundaries, but the settings say no extension" in error
