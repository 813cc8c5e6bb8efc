"""Surprise: what was not expected teaches more, and only learned rules, and never the objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Finished
from tiny import perplexities
from worlds import bigram_memory, segments, tiny_memory

from mlm.gates import LinearGates
from mlm.learner import RMS, SGD, Parameters, Signal
from mlm.memory import LongTerm
from mlm.rollout import begin, meta_gradient, score_segment, step
from mlm.rules import start_at
from mlm.second_order import second_order
from mlm.stage_meta import seen_by
from mlm.streams import Segment

S = 0.4
LENGTHS = (11, 23, 3, 1, 17)
WORLDS = pytest.mark.parametrize(
    "world", [{}, {"cutoffs": (6, 9)}, {"cell": "qrnn"}], ids=["lstm", "adaptive", "qrnn"]
)
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


def _surprised(memory: LongTerm) -> LongTerm:
    return dataclasses.replace(memory, surprise=S)


def _weights_of_tokens(memory: LongTerm, nll: torch.Tensor) -> torch.Tensor:
    """F' of the module's docstring."""
    return 1 - S + S * nll.detach() / memory.loss


def _own_gradient(memory: LongTerm, reader: Any, piece: Segment, weigh: bool) -> dict[str, Any]:
    """By autograd: every token's loss, times its weight, over M."""
    theta = {n: reader.weights[n].clone().requires_grad_() for n in memory.dynamic}
    full = {**memory.weights, **theta}
    share = piece.mask.double() / memory.segment
    now = memory.shape.read(full, piece.inputs, piece.targets, reader.state)
    if weigh:
        share = share * _weights_of_tokens(memory, now.nll)
    found = torch.autograd.grad((now.nll * share).sum(), list(theta.values()), allow_unused=True)
    pairs = zip(theta.items(), found, strict=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs}


@WORLDS
def test_a_token_teaches_as_much_as_its_loss_says(world: dict[str, Any], engine: str) -> None:
    memory = tiny_memory(**world)
    bound = RMS().bind(SETTING, memory)
    reader = begin(memory, 3)
    for piece in segments(memory, LENGTHS, 3, 4):
        usual, more = (score_segment(m, reader, piece) for m in (memory, _surprised(memory)))
        plain = score_segment(_surprised(memory), reader, piece, plain=True)
        torch.testing.assert_close(more.nll, usual.nll, rtol=0, atol=1e-12)
        for weigh, found in ((True, more), (False, usual), (False, plain)):
            for name, want in _own_gradient(memory, reader, piece, weigh).items():
                torch.testing.assert_close(
                    found.gradients[name], want, rtol=1e-9, atol=1e-12, msg=name
                )
        assert any(
            not torch.allclose(more.gradients[n], g, rtol=1e-3) for n, g in usual.gradients.items()
        )
        reader = step(memory, bound, reader, piece).after


def test_any_module_teaches_so() -> None:
    memory = bigram_memory()
    piece = segments(memory, LENGTHS, 3, 1)[0]
    found = score_segment(_surprised(memory), begin(memory, 3), piece)
    want = _own_gradient(memory, begin(memory, 3), piece, True)
    for name, g in want.items():
        torch.testing.assert_close(found.gradients[name], g, rtol=1e-9, atol=1e-12)


def _unroll(memory: LongTerm) -> tuple[LinearGates, Parameters, list[Segment]]:
    rule = LinearGates("three_levels")
    return rule, start_at(rule, RMS(), SETTING, memory), segments(memory, LENGTHS, 3, 7)


@pytest.mark.parametrize("mode", ["reverse", "checkpoint", "forward"])
def test_the_meta_gradient_is_of_the_losses_themselves(mode: Any, engine: str) -> None:
    """Against autograd through the formula, with what surprise weighs as inner gradients."""
    memory = _surprised(tiny_memory(layers=1))
    rule, phi, pieces = _unroll(memory)
    bound = rule.bind(phi, memory)
    found = meta_gradient(memory, bound, phi, begin(memory, 3, bound), pieces, mode)
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    reader = begin(memory, 3, bound)
    theta, total = dict(reader.weights), torch.zeros(()).double()
    for t, piece in enumerate(pieces):
        flag = {n: piece.new.view(-1, *[1] * (w.dim() - 1)) for n, w in theta.items()}
        theta = {n: torch.where(flag[n], memory.weights[n], w) for n, w in theta.items()}
        reader = reader._replace(
            weights={n: w.detach() for n, w in theta.items()},
            age=reader.age * ~piece.new,
            state=reader.state.keep(~piece.new),
        )
        inner = _own_gradient(memory, reader, piece, True)
        if t:
            outer = _own_gradient(memory, reader, piece, False)
            total = total + sum((theta[n] * g).sum() for n, g in outer.items())
        scored = score_segment(memory, reader, piece)
        theta = rule.formula(leaves, memory, theta, inner, Signal(scored.loss, reader.age))
        reader = reader._replace(state=scored.state, age=reader.age + 1)
    total = total * memory.segment / sum(int(p.mask.sum()) for p in pieces[1:])
    want = torch.autograd.grad(total, list(leaves.values()))
    for (name, g), w in zip(found.gradients.items(), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=name)


def test_theta_0_is_trained_by_the_losses_themselves() -> None:
    memory = _surprised(tiny_memory(("softmax.bias", "lstm.0.bias"), layers=1))
    rule, phi, pieces = _unroll(memory)
    bound = rule.bind(phi, memory)
    learn = ("softmax.bias", "embedding")
    found = meta_gradient(memory, bound, phi, begin(memory, 3, bound), pieces, "reverse", learn)
    reader, want = begin(memory, 3, bound), {n: torch.zeros_like(memory.weights[n]) for n in learn}
    for t, piece in enumerate(pieces):
        now = step(memory, bound, reader, piece)
        again = score_segment(memory, now.before, piece, learn, plain=True)
        for name in learn if t else ():
            want[name] += again.of_all_lanes(name)
        reader = now.after
    scale = memory.segment / found.tokens
    for name, value in want.items():
        torch.testing.assert_close(found.weights[name], value * scale, rtol=1e-9, atol=1e-12)


def test_the_second_order_meta_gradient_is_that_of_finite_differences() -> None:
    memory = _surprised(tiny_memory(("softmax.bias", "lstm.0.recurrent"), layers=1))
    rule, phi, pieces = _unroll(memory)
    bound = rule.bind(phi, memory)
    first = meta_gradient(memory, bound, phi, begin(memory, 3, bound), pieces)
    found = second_order(memory, rule, phi, begin(memory, 3, bound), pieces)
    assert found.loss == pytest.approx(first.loss, rel=1e-12)
    for name, at in (("update", (0, 0)), ("update", (1, 2)), ("flush", (1, 0))):
        sides = []
        for sign in (1, -1):
            moved = {n: p.clone() for n, p in phi.items()}
            moved[name][at] += sign * 1e-5
            bound = rule.bind(moved, memory)
            reader = begin(memory, 3, bound)
            sides.append(meta_gradient(memory, bound, moved, reader, pieces).loss)
        want = (sides[0] - sides[1]) / 2e-5
        assert float(found.gradients[name][at]) == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_hand_made_rules_read_as_published() -> None:
    memory = _surprised(tiny_memory())
    assert seen_by(RMS(), memory).surprise == seen_by(SGD(), memory).surprise == 0
    assert seen_by(LinearGates("three"), memory).surprise == S


def test_a_run_with_surprise(finished: Finished, command: Command, tmp_path: Path) -> None:
    """A rule scored with and without; hand-made rules stay as they are."""
    folder = finished.copy(tmp_path / "run")
    rules = "--meta.rules", "three_levels", "--evaluation.rules", "static", "rms", "three_levels"
    words = ("--out", folder, *rules, "--adapt.surprise")
    found = {}
    for s in ("0.5", "0"):
        done = command("train", *words, s, "--stages", "meta", "evaluate")
        assert done.code == 0, done.err
        found[s] = perplexities(folder)
    for key, value in found["0"].items():
        assert (found["0.5"][key] == value) == (key[1] != "three_levels")
    assert "--adapt.surprise is 2.0; it must be in [0, 1]" in command("train", *words, "2").error
