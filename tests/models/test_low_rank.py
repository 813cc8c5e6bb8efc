"""Low-rank dynamic weights: equal to the dense matrix W + D P per lane, in float64."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import Command, Finished
from worlds import EOS, TinyBase, articles, segments, tiny_base

from mlm import kernels
from mlm.base.errors import UserError
from mlm.models.base import (
    AdaptationBase,
    choose_dynamic,
    fold_low_rank,
    has_low_rank,
    lanes_of,
    unfold_low_rank,
)
from mlm.models.output_layer import token_nll
from mlm.models.recurrent import RecurrentLM, initial_state, score
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles
from mlm.reading.step import begin, read
from mlm.rules.family import open_slow, start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.runs.identity import identity
from mlm.runs.rules import load_learned
from mlm.runs.run import open_run
from mlm.store.models import load_base, save_base
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors, save_tensors
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank, principal_directions, second_moments
from mlm.training.fisher import estimate_fisher

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}
"""A few hundred float64 operations of size one: rounding stays below 1e-13."""
RANK = 3
LOW = tuple(f"lstm.{k}.{part}.low" for k in (0, 1) for part in ("input", "recurrent"))
LOW = (*LOW, "softmax.low")
LENGTHS = (11, 23, 3, 1, 17)


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _text(lengths: tuple[int, ...] = LENGTHS) -> Text:
    return Text(articles(lengths), sum(lengths), EOS)


def _low_memory(dynamic: tuple[str, ...], rank: int = RANK, **shape: Any) -> TinyBase:
    """A tiny memory whose low-rank changes among `dynamic` have their directions."""
    plain = tiny_base((), **shape)
    weights = add_low_rank(plain.weights, plain.model, dynamic, rank, _text(), 1000)
    rms = {n: _random(*weights[n].shape, seed=50 + k).abs() for k, n in enumerate(dynamic)}
    return TinyBase(plain.model, weights, dynamic, rms, 2.3, plain.segment)


def _busy(base: AdaptationBase, lanes: int) -> dict[str, torch.Tensor]:
    """Weights of lanes that have read: away from theta_0, each lane elsewhere."""
    own = lanes_of(base.start(), lanes)
    return {
        n: (w + 0.1 * _random(*w.shape, seed=k)).requires_grad_()
        for k, (n, w) in enumerate(own.items())
    }


def _ids(lanes: int, seed: int, steps: int = 6) -> torch.Tensor:
    return torch.randint(12, (lanes, steps), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["compiled", "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways the engine computes."""
    if request.param == "eager":
        monkeypatch.setattr(kernels, "usable", lambda *tensors: False)


# ---------------------------------------------------------------- the functions of the model


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("cutoffs", [(), (4, 9)])
@pytest.mark.parametrize(
    "dynamic",
    [*((name,) for name in LOW), LOW, ("lstm.0.input", "lstm.1.bias", "embedding", *LOW)],
    ids=lambda names: "+".join(names)[:40],
)
def test_score_equals_reference(dynamic: tuple[str, ...], cutoffs: tuple[int, ...]) -> None:
    """Losses, state and every lane's gradients, alone and beside weights that adapt themselves."""
    base, lanes = _low_memory(dynamic, cutoffs=cutoffs), 3
    leaves = _busy(base, lanes)
    ids, targets = _ids(lanes, 1), _ids(lanes, 2)
    zero = initial_state(base.model, lanes, dtype=torch.float64)
    h = tuple(_random(*x.shape, seed=20 + k) for k, x in enumerate(zero.h))
    c = tuple(_random(*x.shape, seed=30 + k) for k, x in enumerate(zero.c))
    state = zero._replace(h=h, c=c)
    nll, after = score({**base.weights, **leaves}, base.model, ids, targets, state)
    losses, states = [], []
    for b in range(lanes):
        own = {**base.weights, **{n: w[b] for n, w in leaves.items()}}
        now = [x[b] for x in h], [x[b] for x in c]
        words = ids[b].tolist(), targets[b].tolist()
        loss, *end = reference.read_lane(own, base.model, *words, *now)
        losses.append(loss)
        states.append(torch.cat([*end[0], *end[1]]))
    torch.testing.assert_close(nll, torch.stack(losses), **EXACT)
    torch.testing.assert_close(torch.cat([*after.h, *after.c], 1), torch.stack(states), **EXACT)
    got = torch.autograd.grad(nll.sum(), list(leaves.values()))
    want = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for name, a, b in zip(leaves, got, want, strict=True):
        assert float(b.abs().max()) > 1e-6, f"{name}: nothing to compare"
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("path")
def test_gradient_is_the_dense_one_along_the_directions() -> None:
    """d loss / d D = (d loss / d W) P^T, for gates and logits."""
    base, lanes = _low_memory(LOW), 2
    leaves = _busy(base, lanes)
    ids = _ids(lanes, 1)
    state = initial_state(base.model, lanes, dtype=torch.float64)
    nll, _ = score({**base.weights, **leaves}, base.model, ids, ids, state)
    got = dict(zip(leaves, torch.autograd.grad(nll.sum(), list(leaves.values())), strict=True))
    dense = {}
    for name in (n.removesuffix(".low") for n in LOW):
        whole = base.weights["embedding" if name == "softmax" else name]
        change = leaves[f"{name}.low"].detach() @ base.weights[f"{name}.directions"]
        dense[name] = (whole + change).requires_grad_()
    plain = {n: w for n, w in base.weights.items() if not n.endswith((".low", ".directions"))}
    own = {**plain, **{n: w for n, w in dense.items() if n != "softmax"}}
    total = torch.zeros((), dtype=torch.float64)
    for b in range(lanes):
        w = {n: v[b] if n in dense else v for n, v in own.items()}
        h = [x[b] for x in state.h]
        c = [x[b] for x in state.c]
        for token in ids[b].tolist():
            x = w["embedding"][token]
            for layer in range(base.model.layers):
                h[layer], c[layer] = reference.lstm_step(w, layer, x, h[layer], c[layer])
                x = h[layer]
            logits = dense["softmax"][b] @ x + w["softmax.bias"]
            total = total - torch.log_softmax(logits, 0)[token]
    want = torch.autograd.grad(total, list(dense.values()))
    for name, g in zip(dense, want, strict=True):
        along = g @ base.weights[f"{name}.directions"].t()
        torch.testing.assert_close(got[f"{name}.low"], along, **EXACT)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("cutoffs", [(), (4, 9)])
def test_no_change_leaves_the_static_model(cutoffs: tuple[int, ...]) -> None:
    """D = 0, shared or per lane: the losses of the model without low-rank changes."""
    plain, base = tiny_base((), cutoffs=cutoffs), _low_memory(LOW, cutoffs=cutoffs)
    ids, state = _ids(3, 1), initial_state(plain.model, 3, dtype=torch.float64)
    with torch.no_grad():
        want, _ = score(plain.weights, plain.model, ids, ids, state)
        shared, _ = score(base.weights, base.model, ids, ids, state)
        lanes = {**base.weights, **lanes_of(base.start(), 3)}
        each, _ = score(lanes, base.model, ids, ids, state)
    assert torch.equal(shared, want)
    torch.testing.assert_close(each, want, **EXACT)


def test_a_shared_change_equals_one_per_lane() -> None:
    base = _low_memory(LOW)
    moved = {n: _random(*base.weights[n].shape, seed=k) * 0.1 for k, n in enumerate(LOW)}
    ids, state = _ids(3, 1), initial_state(base.model, 3, dtype=torch.float64)
    shared, _ = score({**base.weights, **moved}, base.model, ids, ids, state)
    lanes = {**base.weights, **lanes_of(moved, 3)}
    each, _ = score(lanes, base.model, ids, ids, state)
    torch.testing.assert_close(shared, each, **EXACT)


def test_the_adaptive_softmax_stays_a_distribution() -> None:
    """`softmax.low` covers head and clusters; within a tail nothing changes."""
    base = _low_memory(("softmax.low",), cutoffs=(4, 9))
    assert base.weights["softmax.low"].shape == (4 + 2, RANK)
    moved = {**base.weights, "softmax.low": _random(6, RANK)}
    output, words = _random(1, 1, 4).expand(12, 1, 4), torch.arange(12).unsqueeze(1)
    before = token_nll(base.weights, base.model, output, words)[:, 0]
    after = token_nll(moved, base.model, output, words)[:, 0]
    assert float((-after).exp().sum()) == pytest.approx(1.0, abs=1e-12)
    shift = after - before
    torch.testing.assert_close(shift[4:9], shift[4].expand(5), **EXACT)
    assert abs(float(shift[4] - shift[9])) > 1e-3
    assert abs(float(shift[0] - shift[1])) > 1e-3


# ---------------------------------------------------------------- directions


def _vectors(base: TinyBase, text: Text) -> dict[str, np.ndarray]:
    """(N, I) vectors that each matrix multiplies, read one lane and one token at a time."""
    w, found = base.weights, {}
    for article in text.articles:
        h = [torch.zeros(size, dtype=torch.float64) for _, size in base.model.layer_sizes()]
        c = [torch.zeros_like(x) for x in h]
        for token in [EOS, *article.tolist()[:-1]]:
            x = w["embedding"][token]
            for layer in range(base.model.layers):
                found.setdefault(f"lstm.{layer}.input", []).append(x)
                found.setdefault(f"lstm.{layer}.recurrent", []).append(h[layer])
                h[layer], c[layer] = reference.lstm_step(w, layer, x, h[layer], c[layer])
                x = h[layer]
            found.setdefault("softmax", []).append(x)
    return {name: torch.stack(rows).numpy() for name, rows in found.items()}


@pytest.mark.parametrize("segment", [4, 64])
def test_second_moments_are_those_of_the_vectors_each_matrix_multiplies(segment: int) -> None:
    base, text = tiny_base(()), _text()
    names = [name.removesuffix(".low") for name in LOW]
    with torch.no_grad():
        got = second_moments(base.weights, base.model, names, text, 1000, 2, segment)
    for name, x in _vectors(base, text).items():
        np.testing.assert_allclose(got[name], x.T @ x / len(x), rtol=0, atol=1e-12)


def test_directions_are_the_principal_ones() -> None:
    x = _random(40, 6) @ torch.diag(torch.tensor([1.0, 5, 0.2, 3, 0.1, 2]).double()) + 0.3
    moment = x.t() @ x / 40
    found = principal_directions(moment, 3)
    assert found.shape == (3, 6)
    _, sizes, best = np.linalg.svd(x.numpy() / 40**0.5, full_matrices=False)
    length = np.diag(sizes[:3] ** -0.5)  # an eigenvalue is a squared singular value
    np.testing.assert_allclose(np.abs(found.numpy() @ best[:3].T), length, atol=1e-10)
    torch.testing.assert_close(found @ found.t(), torch.from_numpy(length**2), **EXACT)
    assert principal_directions(moment, 100).shape == (6, 6)
    few = principal_directions(moment[:, :1] * moment[:1], 6)  # one direction only, then none
    assert float(few.norm(dim=1).max() / few.norm(dim=1).min()) == pytest.approx(10**1.5)
    assert bool(principal_directions(torch.zeros(3, 3), 3).isfinite().all())
    with pytest.raises(UserError, match="not finite"):
        principal_directions(moment * float("nan"), 3)


def test_sizes_and_start() -> None:
    """Rank is at most the number of inputs; only what is asked for is made; inputs stay."""
    plain = tiny_base(())
    before = dict(plain.weights)
    names = ("lstm.1.input.low", "softmax.low", "softmax.bias")
    found = add_low_rank(plain.weights, plain.model, names, 5, _text(), 20)
    assert set(plain.weights) == set(before)
    new = {n: tuple(w.shape) for n, w in found.items() if n not in before}
    assert new == {
        "lstm.1.input.low": (16, 5),
        "lstm.1.input.directions": (5, 6),
        "softmax.low": (12, 4),
        "softmax.directions": (4, 4),
    }
    assert all(not found[n].any() for n in new if n.endswith(".low"))
    assert add_low_rank(plain.weights, plain.model, ("embedding",), 5, _text(), 20) is plain.weights


# ---------------------------------------------------------------- reading and the meta-learner


def _setting(rate: float, decay: float) -> dict[str, torch.Tensor]:
    values = {"rate": rate, "decay": decay}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize("lanes", [1, 2])
def test_reading_does_not_depend_on_lanes_and_learns(lanes: int) -> None:
    base = _low_memory(LOW)
    rule = RMS().bind(_setting(0.2, 0.01), base)
    texts = [np.tile(np.array([3, 7, 7, 1]), 30), *articles((11, 0, 8))]
    one, many = (score_articles(base, rule, texts, EOS, n) for n in (3, lanes))
    for a, b in zip(one.nll, many.nll, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
    static = score_articles(base, None, texts, EOS, 3)
    assert one.nll[0].sum() < static.nll[0].sum() - 1


def test_flush_pulls_to_zero_and_an_article_starts_there() -> None:
    base = _low_memory(("softmax.low",))
    piece = segments(base, LENGTHS, 3, 1)[0]
    rule = RMS().bind(_setting(0.0, 0.1), base)
    moved = begin(base, 3)._replace(weights=lanes_of({"softmax.low": _random(12, 3)}, 3))
    kept, _ = read(base, rule, moved, piece._replace(new=torch.tensor([False] * 3)))
    z = (0.1 * base.rms["softmax.low"] / base.mean_rms).clamp(max=1)
    want = (1 - z) * moved.weights["softmax.low"]
    torch.testing.assert_close(kept.weights["softmax.low"], want, **EXACT)
    opened, _ = read(base, rule, moved, piece._replace(new=torch.tensor([True] * 3)))
    assert not opened.weights["softmax.low"].any()


def test_meta_gradient_equals_hand_unrolled_autograd() -> None:
    base = _low_memory((*LOW, "softmax.bias"))
    rule = LinearGates()
    phi = rule.start_at_rms(base, 0.02, 0.05)
    phi = {n: p + 0.1 * _random(*p.shape, seed=k) for k, (n, p) in enumerate(phi.items())}
    pieces = segments(base, LENGTHS, 3, 6)
    assert any(bool(p.new.any()) for p in pieces[1:]), "the test must cross article borders"
    got = meta_gradient(base, rule.bind(phi, base), phi, begin(base, 3), pieces)
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    loss, finals = reference.unroll(base, reference.gates(base, rule), leaves, pieces)
    want = torch.autograd.grad(loss, list(leaves.values()))
    assert got.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, g in zip(leaves, want, strict=True):
        assert float(g.abs().max()) > 1e-9, f"{name}: nothing to compare"
        torch.testing.assert_close(got.gradients[name], g, rtol=1e-9, atol=1e-13)
    for lane, theta in enumerate(finals):
        for name, w in theta.items():
            torch.testing.assert_close(got.reader.weights[name][lane], w.detach(), **EXACT)


def test_the_fisher_of_a_change_at_zero_is_alive() -> None:
    base = _low_memory(LOW)
    found = estimate_fisher(dataclasses.replace(base, rms={}, loss=0.0), _text(), 60)
    assert all(float(found.rms[name].max()) > 1e-4 for name in LOW)


# ---------------------------------------------------------------- turned: the whole matrix in D


def _pair(dynamic: tuple[str, ...], **shape: Any) -> tuple[AdaptationBase, AdaptationBase]:
    """A memory with changes of full rank, and the same turned."""
    base = _low_memory(dynamic, rank=99, **shape)
    return base, fold_low_rank(base)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("cutoffs", [(), (4, 9)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_turned_matrix_reads_as_the_change_it_holds(
    cutoffs: tuple[int, ...], shared: bool
) -> None:
    """Losses, state and gradients, where lanes differ and where they do not."""
    base, other = _pair((*LOW, "lstm.0.bias", "softmax.bias"), cutoffs=cutoffs)
    leaves = _busy(base, 3)
    if shared:
        leaves = {n: w[0].detach().requires_grad_() for n, w in leaves.items()}
    moved = {n: other.weights[n] - base.weights[n] for n in leaves}
    assert {n for n, w in moved.items() if w.any()} == {
        n for n in LOW if "recurrent" not in n and not (cutoffs and n == "softmax.low")
    }
    ids, targets = _ids(3, 1), _ids(3, 2)
    shape = base.model
    assert isinstance(shape, RecurrentLM)
    state = initial_state(shape, 3, dtype=torch.float64)
    found = []
    for here, add in ((base, 0.0), (other, 1.0)):
        own = {n: (w + add * moved[n]).detach().requires_grad_() for n, w in leaves.items()}
        nll, after = score({**here.weights, **own}, shape, ids, targets, state)
        gradients = torch.autograd.grad(nll.sum(), list(own.values()))
        found.append([nll, *after.h, *after.c, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", [LinearGates(), LinearGates("four", per_unit=True, slow=True)])
def test_a_turned_memory_is_the_same_memory(rule: LinearGates) -> None:
    """Reading, its static twin and the meta-gradient, crossing borders."""
    memories = _pair((*LOW, "softmax.bias"))
    texts = [np.tile(np.array([3, 7, 7, 1]), 30), *articles((11, 0, 8))]
    found = []
    for base in memories:
        phi = start_at(rule, RMS(), _setting(0.02, 0.05), base)
        if rule.slow:
            open_slow(phi)
        phi = {n: p + 0.1 * _random(*p.shape, seed=k) for k, (n, p) in enumerate(phi.items())}
        bound = rule.bind(phi, base)
        pieces = segments(base, LENGTHS, 3, 6)
        meta = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces)
        scores = [score_articles(base, b, texts, EOS, 3) for b in (bound, None)]
        assert scores[0].total != scores[1].total
        found.append([*(t for s in scores for t in s.nll), *meta.gradients.values()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_what_is_turned() -> None:
    base, other = _pair(LOW)
    turned_names = {n.removesuffix(".basis") for n in other.weights if n.endswith(".basis")}
    assert turned_names == {"lstm.0.input", "lstm.1.input", "softmax"}
    assert set(other.static) == set(base.static)
    assert choose_dynamic(other.weights, "all") == choose_dynamic(base.weights, "all")
    assert fold_low_rank(other).weights.keys() == other.weights.keys()
    back = unfold_low_rank(other)
    assert back.weights.keys() == base.weights.keys()
    assert all(torch.equal(w, base.weights[n]) for n, w in back.weights.items())
    # the table itself adapts too, or the rank is not full: two terms
    for kept in (_low_memory(("embedding", "softmax.low"), 99), _low_memory(LOW)):
        assert fold_low_rank(kept).weights.keys() == kept.weights.keys()


@pytest.mark.slow
def test_a_run_turns_where_only_the_rule_is_learned(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """The file keeps the plain form; weights learned in terms of it are used in it."""
    for learn in (("rule",), ("rule", "theta_0")):
        folder = finished.copy(tmp_path / "-".join(learn))
        done = command("train", "--out", folder, "--dynamic", "softmax.low", "--rank",
                       99, "--meta.learn", *learn, "--stages", "meta", "evaluate")  # fmt: skip
        assert done.code == 0, done.err
        assert (
            "softmax.directions"
            in load_base(
                folder / "checkpoints" / "memory.safetensors",
                open_run(RunFolder(folder).load_config()).vocabulary.hash,
            ).weights
        )
        run = open_run(RunFolder(folder).load_config())
        assert ("softmax.basis" in run.base.weights) == (learn == ("rule",))
    path = folder / "checkpoints" / "three_levels.safetensors"
    tensors, about = load_tensors(path, "")
    low = run.base.weights["softmax.low"]
    save_tensors(path, {**tensors, "weights/softmax.low": torch.ones_like(low)}, about)
    meta = dataclasses.replace(run.config.meta, learn=("rule",))
    other = open_run(dataclasses.replace(run.config, meta=meta))
    assert "softmax.basis" in other.base.weights
    mine, theirs = (load_learned(r, "three_levels", r.base).base.weights for r in (run, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert bool((mine["softmax.low"] == 1).all())


# ---------------------------------------------------------------- names, files, errors


def test_names_are_matched_by_patterns_that_end_in_low_only() -> None:
    plain = tiny_base(()).weights
    layers = tuple(n for n in LOW if n.startswith("lstm"))
    for weights in (plain, _low_memory(LOW).weights):  # asked for before and after they are made
        assert choose_dynamic(weights, "low") == LOW
        assert choose_dynamic(weights, "lstm.*.low") == layers
        assert choose_dynamic(weights, "softmax.low,softmax.bias") == ("softmax.bias", LOW[-1])
        assert choose_dynamic(weights, "lstm.1.input.low") == ("lstm.1.input.low",)
        for wanted in ("all", "lstm", "output", "softmax.*"):
            pool = choose_dynamic(plain, wanted)
            assert choose_dynamic(weights, wanted) == pool
            assert not [n for n in pool if n.endswith((".low", ".directions"))]
        for wanted in ("softmax.directions", "embedding.low"):
            with pytest.raises(UserError, match="matches no weight"):
                choose_dynamic(weights, wanted)
    asked = {"low": True, "bias, softmax.low": True, "all,lstm": False, "softmax.lo*": False}
    assert {wanted: has_low_rank(wanted) for wanted in asked} == asked


def test_memory_survives_the_checkpoint(tmp_path: Path) -> None:
    base = _low_memory(("softmax.bias", *LOW), cutoffs=(5,))
    save_base(tmp_path / "memory.safetensors", base, "v")
    again = load_base(tmp_path / "memory.safetensors", "v")
    assert (again.model, again.dynamic) == (base.model, base.dynamic)
    for name in ("weights", "rms"):
        one, two = getattr(base, name), getattr(again, name)
        assert set(one) == set(two)
        assert all(torch.equal(one[n], two[n]) for n in one)


def _gain(folder: Path, rule: str) -> float:
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return next(
        row["nats_per_word_gained"]
        for row in rows
        if (row["kind"], row["rule"], row["protocol"]) == ("total", rule, "article")
    )


@pytest.mark.slow
def test_a_run_with_low_rank_changes(finished: Finished, command: Command, tmp_path: Path) -> None:
    """Stage 2, evaluation and a later `evaluate.py` work from the run folder; ranks must agree."""
    folder = finished.copy(tmp_path / "run")
    dynamic = "softmax.low,lstm.*.input.low,lstm.*.recurrent.low,softmax.bias"
    words = ("--out", folder, "--dynamic", dynamic)
    stages = ("--stages", "meta", "evaluate")
    outcome = command("train", *words, "--rank", 4, *stages)
    assert outcome.code == 0, outcome.err
    base, _ = load_tensors(folder / "checkpoints" / "memory.safetensors", "")
    assert base["theta_0/softmax.directions"].shape == (4, 16)
    assert base["rms/lstm.0.recurrent.low"].shape == (64, 4)
    assert _gain(folder, "three_levels") > 0
    losses = (folder / "losses.parquet").read_bytes()
    assert command("evaluate", folder, "--no-draw").code == 0
    assert (folder / "losses.parquet").read_bytes() == losses
    error = command("train", *words, "--rank", 5, "--stages", "evaluate").error
    assert "has rank 4, but the settings say --rank 5; run `--stages meta` again" in error
    assert "--rank is 0; it must be at least 1" in command("train", "--rank", 0).error


def test_identity_knows_the_rank_where_it_matters(finished: Finished) -> None:
    def mark(dynamic: str, rank: int) -> str:
        config = RunFolder(finished.folder).load_config()
        adapt = dataclasses.replace(config.adapt, dynamic=dynamic, rank=rank)
        return identity(open_run(dataclasses.replace(config, adapt=adapt)))

    assert mark("lstm", 8) == mark("lstm", 32)
    assert mark("softmax.low", 8) != mark("softmax.low", 32)
