"""Surprise weighting: what was not expected teaches more, but learned rules only, and never the
objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Finished
from tiny import perplexities
from worlds import bigram_base, segments, tiny_base, with_extensions

import mlm.reading.meta_gradient
from mlm.extensions import SurpriseWeighting
from mlm.models.base import AdaptationBase
from mlm.models.language_model import own_weights
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.second_order import second_order
from mlm.reading.step import begin, score_segment, step
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS, SGD
from mlm.rules.protocol import Parameters, Signal
from mlm.text.streams import Segment

S = 0.4
LENGTHS = (11, 23, 3, 1, 17)
WORLDS = pytest.mark.parametrize(
    "world", [{}, {"cutoffs": (6, 9)}, {"cell": "qrnn"}], ids=["lstm", "adaptive", "qrnn"]
)
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


def _surprised(base: AdaptationBase) -> AdaptationBase:
    return with_extensions(base, SurpriseWeighting(share=S))


def _weights_of_tokens(base: AdaptationBase, nll: torch.Tensor) -> torch.Tensor:
    """F' of the module's docstring."""
    return 1 - S + S * nll.detach() / base.loss


def _own_gradient(base: AdaptationBase, reader: Any, piece: Segment, weigh: bool) -> dict[str, Any]:
    """By autograd: every token's loss, times its weight, over M."""
    theta = {n: reader.weights[n].clone().requires_grad_() for n in base.dynamic}
    full = {**base.weights, **theta}
    share = piece.mask.double() / base.segment
    now = base.model.read(own_weights(full), piece.inputs, piece.targets, reader.state)
    if weigh:
        share = share * _weights_of_tokens(base, now.nll)
    found = torch.autograd.grad((now.nll * share).sum(), list(theta.values()), allow_unused=True)
    pairs = zip(theta.items(), found, strict=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs}


@WORLDS
def test_a_token_teaches_as_much_as_its_loss_says(world: dict[str, Any], engine: str) -> None:
    base = tiny_base(**world)
    bound = RMS().bind(SETTING, base)
    reader = begin(base, 3)
    for piece in segments(base, LENGTHS, 3, 4):
        usual, more = (score_segment(m, reader, piece) for m in (base, _surprised(base)))
        plain = score_segment(_surprised(base), reader, piece, plain=True)
        torch.testing.assert_close(more.nll, usual.nll, rtol=0, atol=1e-12)
        for weigh, found in ((True, more), (False, usual), (False, plain)):
            for name, want in _own_gradient(base, reader, piece, weigh).items():
                torch.testing.assert_close(
                    found.gradients[name], want, rtol=1e-9, atol=1e-12, msg=name
                )
        assert any(
            not torch.allclose(more.gradients[n], g, rtol=1e-3) for n, g in usual.gradients.items()
        )
        reader = step(base, bound, reader, piece).after


def test_any_module_teaches_so() -> None:
    base = bigram_base()
    piece = segments(base, LENGTHS, 3, 1)[0]
    found = score_segment(_surprised(base), begin(base, 3), piece)
    want = _own_gradient(base, begin(base, 3), piece, True)
    for name, g in want.items():
        torch.testing.assert_close(found.gradients[name], g, rtol=1e-9, atol=1e-12)


def _unroll(base: AdaptationBase) -> tuple[LinearGates, Parameters, list[Segment]]:
    rule = LinearGates("three_levels")
    return rule, start_at(rule, RMS(), SETTING, base), segments(base, LENGTHS, 3, 7)


@pytest.mark.parametrize("mode", ["reverse", "checkpoint", "forward"])
def test_the_meta_gradient_is_of_the_losses_themselves(mode: Any, engine: str) -> None:
    """Against autograd through the formula, with what surprise weighs as inner gradients."""
    base = _surprised(tiny_base(layers=1))
    rule, phi, pieces = _unroll(base)
    bound = rule.bind(phi, base)
    found = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces, mode)
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    reader = begin(base, 3, bound)
    theta, total = dict(reader.weights), torch.zeros(()).double()
    for t, piece in enumerate(pieces):
        flag = {n: piece.new.view(-1, *[1] * (w.dim() - 1)) for n, w in theta.items()}
        theta = {n: torch.where(flag[n], base.weights[n], w) for n, w in theta.items()}
        reader = reader._replace(
            weights={n: w.detach() for n, w in theta.items()},
            age=reader.age * ~piece.new,
            state=reader.state.keep(~piece.new),
        )
        inner = _own_gradient(base, reader, piece, True)
        if t:
            outer = _own_gradient(base, reader, piece, False)
            total = total + sum((theta[n] * g).sum() for n, g in outer.items())
        scored = score_segment(base, reader, piece)
        theta = rule.formula(leaves, base, theta, inner, Signal(scored.loss, reader.age))
        reader = reader._replace(state=scored.state, age=reader.age + 1)
    total = total * base.segment / sum(int(p.mask.sum()) for p in pieces[1:])
    want = torch.autograd.grad(total, list(leaves.values()))
    for (name, g), w in zip(found.gradients.items(), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(("mode", "learn", "times"), [
    ("reverse", (), 7), ("checkpoint", (), 7), ("checkpoint", ("softmax.bias",), 7 + 5),
])  # fmt: skip
def test_a_segment_is_scored_twice_only_where_it_is_walked_back(
    mode: Any, learn: tuple[str, ...], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass of `checkpoint` needs the objective's gradient only for weights to learn."""
    base, plain = _surprised(tiny_base(layers=1)), []
    rule, phi, pieces = _unroll(base)
    bound = rule.bind(phi, base)

    def counted(*words: Any, **named: Any) -> Any:
        plain.append(named.get("plain", False))
        return score_segment(*words, **named)

    monkeypatch.setattr(mlm.reading.meta_gradient, "score_segment", counted)
    meta_gradient(base, bound, phi, begin(base, 3, bound), pieces, mode, learn)
    assert plain == [True] * times


@pytest.mark.parametrize("mode", ["reverse", "checkpoint"])
def test_theta_0_is_trained_by_the_losses_themselves(mode: Any) -> None:
    base = _surprised(tiny_base(("softmax.bias", "lstm.0.bias"), layers=1))
    rule, phi, pieces = _unroll(base)
    bound = rule.bind(phi, base)
    learn = ("softmax.bias", "embedding")
    found = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces, mode, learn)
    reader, want = begin(base, 3, bound), {n: torch.zeros_like(base.weights[n]) for n in learn}
    for t, piece in enumerate(pieces):
        now = step(base, bound, reader, piece)
        again = score_segment(base, now.before, piece, learn, plain=True)
        for name in learn if t else ():
            want[name] += again.of_all_lanes(name)
        reader = now.after
    scale = base.segment / found.tokens
    for name, value in want.items():
        torch.testing.assert_close(found.weights[name], value * scale, rtol=1e-9, atol=1e-12)


def test_the_second_order_meta_gradient_is_that_of_finite_differences() -> None:
    base = _surprised(tiny_base(("softmax.bias", "lstm.0.recurrent"), layers=1))
    rule, phi, pieces = _unroll(base)
    bound = rule.bind(phi, base)
    first = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces)
    found = second_order(base, rule, phi, begin(base, 3, bound), pieces)
    assert found.loss == pytest.approx(first.loss, rel=1e-12)
    for name, at in (("update", (0, 0)), ("update", (1, 2)), ("flush", (1, 0))):
        sides = []
        for sign in (1, -1):
            moved = {n: p.clone() for n, p in phi.items()}
            moved[name][at] += sign * 1e-5
            bound = rule.bind(moved, base)
            reader = begin(base, 3, bound)
            sides.append(meta_gradient(base, bound, moved, reader, pieces).loss)
        want = (sides[0] - sides[1]) / 2e-5
        assert float(found.gradients[name][at]) == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_hand_made_rules_read_as_published() -> None:
    base = _surprised(tiny_base())
    assert base.for_rule(RMS()).extensions == base.for_rule(SGD()).extensions == ()
    assert base.for_rule(LinearGates("three")).extensions == (SurpriseWeighting(share=S),)


@pytest.mark.slow
def test_a_run_with_surprise_weighting(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """A rule scored with and without; hand-made rules stay as they are."""
    folder = finished.copy(tmp_path / "run")
    rules = "--train-rules", "three_levels", "--rules", "static", "rms", "three_levels"
    words = ("--out", folder, *rules, "--surprise-weighting.share")
    found = {}
    for s in ("0.5", "0"):
        done = command("train", *words, s, "--stages", "meta", "evaluate")
        assert done.code == 0, done.err
        found[s] = perplexities(folder)
    for key, value in found["0"].items():
        assert (found["0.5"][key] == value) == (key[1] != "three_levels")
    error = command("train", *words, "2").error
    assert "--surprise-weighting.share is 2.0; it must be in [0, 1]" in error
