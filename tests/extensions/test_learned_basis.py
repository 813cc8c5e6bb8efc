"""Learned bases: the same static model, gradients that let theta_0 follow, training, files."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from worlds import EOS, articles, segments, tiny_base, with_extensions

from mlm import kernels
from mlm.extensions import LearnedBasis, WordCoupling, learned_basis
from mlm.extensions.learned_basis import (
    BasisTrainer,
    basis_gradients,
    basis_parameters,
    follow_weights,
    learn_bases,
    read_by,
    with_bases,
)
from mlm.extensions.word_coupling import COUPLING, couple
from mlm.models.base import AdaptationBase, fold_low_rank
from mlm.models.extension import Plan
from mlm.models.language_model import OutputTerms, own_weights
from mlm.reading.scoring import score_articles
from mlm.reading.step import begin, step
from mlm.rules.hand_made import RMS
from mlm.store.tensors import load_tensors
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}
DYNAMIC = ("softmax.low", "softmax.bias", "lstm.0.input.low", "lstm.0.recurrent")
SETTING = {"rate": torch.tensor(0.05).double(), "decay": torch.tensor(0.02).double()}


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _base(together: bool) -> AdaptationBase:
    plain = tiny_base(())
    text = Text(articles((11, 23, 9)), 43, EOS)
    weights = add_low_rank(plain.weights, plain.model, DYNAMIC, 99, text, 1000)
    if together:
        bare = dataclasses.replace(plain, weights=weights, dynamic=DYNAMIC)
        weights = couple(bare, torch.linalg.qr(_random(12, 3))[0]).weights
    rms = {n: _random(*weights[n].shape, seed=50 + k).abs() for k, n in enumerate(DYNAMIC)}
    found = AdaptationBase(plain.model, weights, DYNAMIC, rms, 2.3, plain.segment)
    coupling = [WordCoupling(directions=3)] if together else []
    return with_extensions(fold_low_rank(found), *coupling)


def _elsewhere(base: AdaptationBase) -> dict[str, torch.Tensor]:
    """R and Q away from where they start."""
    return {
        n: p + 0.1 * _random(*p.shape, seed=k)
        for k, (n, p) in enumerate(basis_parameters(base).items())
    }


@pytest.mark.parametrize("together", [True, False])
def test_other_bases_are_the_same_static_model_that_learns_otherwise(together: bool) -> None:
    base = _base(together)
    other = with_bases(base, _elsewhere(base))
    texts = articles((21, 13))

    def losses(base: AdaptationBase, adapts: bool) -> np.ndarray:
        rule = RMS().bind(SETTING, base) if adapts else None
        return np.concatenate(score_articles(base, rule, texts, EOS, 2).nll)

    np.testing.assert_allclose(losses(other, False), losses(base, False), atol=1e-11)
    first = base.segment  # nothing is learned before the second segment
    adapted, before = losses(other, True), losses(base, True)
    np.testing.assert_allclose(adapted[:first], before[:first], atol=1e-11)
    assert np.abs(adapted - before).max() > 1e-3
    same = with_bases(base, basis_parameters(base))
    for name, w in base.weights.items():
        torch.testing.assert_close(same.weights[name], w, **EXACT)


@pytest.mark.parametrize("together", [True, False])
def test_another_language_model_in_the_same_bases(together: bool) -> None:
    base = with_bases(_base(together), _elsewhere(_base(together)))
    plain = {n: w + 0.1 * _random(*w.shape, seed=7) for n, w in base.static.items()}
    moved = follow_weights(base, plain)
    texts = articles((21, 13))
    static = dataclasses.replace(base, weights={**base.weights, **plain})
    want = np.concatenate(score_articles(static, None, texts, EOS, 2).nll)
    rule = RMS().bind(SETTING, moved)
    adapted = np.concatenate(score_articles(moved, rule, texts, EOS, 2).nll)
    first = base.segment  # reading that adapts goes by L_0, which must be the same model
    np.testing.assert_allclose(adapted[:first], want[:first], atol=1e-11)
    assert np.abs(adapted - want).max() > 1e-3
    for name in ("softmax.basis", *([COUPLING] if together else [])):
        assert moved.weights[name] is base.weights[name]


@pytest.mark.parametrize("path", ["compiled", "eager"])
@pytest.mark.parametrize("together", [True, False])
def test_the_gradient_is_that_of_the_loss_with_theta_0_following(together: bool, path: str) -> None:
    """Against autograd through R, Q -> L_0 -> loss, what the lanes have learned held."""
    first = _base(together)
    now = _elsewhere(first)
    base = with_bases(first, now)
    rule = RMS().bind(SETTING, base)
    reader = begin(base, 3, rule)
    *before, piece = segments(base, (11, 23, 3, 1, 17), 3, 4)
    for other in before:
        reader = step(base, rule, reader, other).after
    with kernels.eager() if path == "eager" else contextlib.nullcontext():
        scored = step(base, rule, reader, piece, learn=read_by(base)).scored
    sums = {
        n: scored.shared[n] if n in scored.shared else scored.gradients[n].sum(0)
        for n in read_by(base)
    }
    got = basis_gradients(base, first, sums)

    leaves = {n: p.clone().requires_grad_() for n, p in now.items()}
    moving = with_bases(first, leaves)
    learned = {n: reader.weights[n] - base.weights[n] for n in base.dynamic}
    opened = piece.new.view(-1, *[1] * 2)
    weights = dict(moving.weights)
    for name, d in learned.items():
        kept = torch.where(opened if d.dim() == 3 else opened[..., 0], 0.0, d)
        weights[name] = moving.weights[name] + kept
    state = reader.state.keep(~piece.new)
    with kernels.eager():
        share = piece.mask.double() / piece.inputs.shape[1]
        terms = OutputTerms(coupling=weights.get(COUPLING))
        own = own_weights(weights)
        now = base.model.read(own, piece.inputs, piece.targets, state, share, lambda _: terms)
    want = torch.autograd.grad(now.total, list(leaves.values()))
    for name, g in zip(leaves, want, strict=True):
        assert float(g.abs().max()) > 1e-5, name
        torch.testing.assert_close(got[name], g, rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize("together", [True, False])
def test_the_lanes_keep_what_they_learned_when_the_bases_move(together: bool) -> None:
    base = _base(together)
    bases = BasisTrainer(base, 3)
    pieces = segments(base, (11, 23, 3, 1, 17), 3, 6)
    for k in (0, 2, 4):
        reader = bases.reader  # which reads on without a step
        for piece in pieces[k : k + 2]:
            reader = step(bases.base, bases.rule, reader, piece).after
        learned = {n: reader.weights[n] - bases.base.weights[n] for n in base.dynamic}
        bases.learn(pieces[k : k + 2], 0.03)
        for name, d in learned.items():
            now = bases.reader.weights[name] - bases.base.weights[name]
            torch.testing.assert_close(now, d, **EXACT)
    low = "softmax.low"
    assert float((bases.base.weights[low] - base.weights[low]).abs().max()) > 1e-3


def _text() -> Text:
    """Words that come in pairs, one pair in an article: 1 then 2, 3 then 4, ..."""
    random = np.random.default_rng(0)
    pairs = [np.tile([2 * p + 1, 2 * p + 2, EOS], 8) for p in random.integers(0, 5, 60)]
    return Text(pairs, sum(map(len, pairs)), EOS)


def test_learning_bases_makes_reading_learn_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule gains more with learned bases; the static model and the Fisher stay."""
    monkeypatch.setattr(learned_basis, "PEAK", 5e-3)
    monkeypatch.setattr(learned_basis, "TOKENS", 10)
    base, text = _base(True), _text()
    found = learn_bases(base, text, 3000)
    again = learn_bases(base, text, 3000)
    for name, w in found.weights.items():
        torch.testing.assert_close(again.weights[name], w, **EXACT)
    assert all(torch.equal(found.rms[n], base.rms[n]) for n in base.dynamic)

    def loss(base: AdaptationBase, adapts: bool) -> float:
        rule = RMS().bind(SETTING, base) if adapts else None
        return score_articles(base, rule, text.articles, EOS, 4).total

    assert loss(found, False) == pytest.approx(loss(base, False), rel=1e-10)
    gains = [loss(base, False) - loss(m, True) for m in (base, found)]
    assert gains[1] > 1.02 * gains[0] > 0


def test_it_needs_a_matrix_with_a_basis_of_its_own() -> None:
    with pytest.raises(ValueError, match="no matrix adapts in a basis of its own"):
        learn_bases(tiny_base(("softmax.bias",)), _text(), 100)
    for folded, known in (((), True), (("softmax",), False), (None, False)):
        plan = Plan(("softmax.bias",), folded, ("rule",), "reverse", "none", False, ())
        problems = LearnedBasis(words=100).problems(plan)
        assert any("--learned-basis.words needs a matrix" in p for p in problems) == known


@pytest.mark.slow
def test_a_run_with_learned_bases(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 and a later `evaluate.py`; bases are learned once, and anew for other settings."""
    folder = finished.copy(tmp_path / "run")
    low = "--dynamic", "softmax.low,softmax.bias,lstm.*.input.low", "--rank", 99
    rules = "--train-rules", "three_levels", "--rules", "static", "three_levels"
    words = ("--out", folder, *low, *rules, "--learned-basis.words", 1000)
    done = command("train", *words, "--stages", "meta", "evaluate")
    assert done.code == 0, done.err
    made, _ = load_tensors(folder / "checkpoints" / "memory.safetensors", "")
    basis = made["theta_0/lstm.0.input.basis"]
    products = basis @ basis.t()
    apart = products - torch.diag(products.diag())
    assert float(apart.abs().max()) > 1e-4 * float(products.abs().max()), "as orthogonal as before"
    losses = (folder / "losses.parquet").read_bytes()
    assert command("evaluate", folder, "--no-draw").code == 0
    assert (folder / "losses.parquet").read_bytes() == losses
    other = (*words[:-1], 900, "--stages", "evaluate")
    assert "was made with other settings of --adapt" in command("train", *other).error
    learn = "--stages", "meta", "--meta.learn", "rule", "theta_0"
    assert (
        "--learned-basis.words goes with --meta.learn rule only"
        in command("train", *words, *learn).error
    )
    learned: list[int] = []

    def learn_bases(base: AdaptationBase, text: Text, words: int, *more: object) -> AdaptationBase:
        learned.append(words)
        return base

    with monkeypatch.context() as patch:
        patch.setattr(learned_basis, "learn_bases", learn_bases)
        for number in (1000, 900, 900):
            words = ("--out", folder, *low, *rules, "--learned-basis.words", number)
            assert command("train", *words, "--stages", "meta").code == 0
    assert learned == [900]
    lstm = "--out", folder, "--dynamic", "lstm", "--learned-basis.words", 9, "--stages", "meta"
    assert "--learned-basis.words needs a matrix" in command("train", *lstm).error
    assert "must be at least 0" in command("train", "--learned-basis.words", -1).error
