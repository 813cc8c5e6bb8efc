"""Word coupling: the same static model, whose output layer moves words together."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from worlds import EOS, TinyBase, articles, segments, tiny_base, with_extensions

from mlm import kernels
from mlm.extensions import WordCoupling
from mlm.extensions.word_coupling import COUPLING, couple, coupling_of
from mlm.models.base import choose_dynamic, lanes_of
from mlm.models.extension import Plan
from mlm.models.language_model import OutputTerms, Weights, own_weights
from mlm.models.low_rank import folds
from mlm.models.recurrent import RecurrentLM, RecurrentState, initial_state, score
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles
from mlm.reading.step import begin
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.store.tensors import load_tensors
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}
DYNAMIC = ("softmax.low", "softmax.bias", "lstm.0.input.low")


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _base(coupling: torch.Tensor | None, **shape: Any) -> TinyBase:
    plain = tiny_base((), **shape)
    text = Text(articles((11, 23, 9)), 43, EOS)
    weights = add_low_rank(plain.weights, plain.model, DYNAMIC, 99, text, 1000)
    if coupling is not None:
        bare = dataclasses.replace(plain, weights=weights, dynamic=DYNAMIC)
        weights = couple(bare, coupling).weights
    rms = {n: _random(*weights[n].shape, seed=50 + k).abs() for k, n in enumerate(DYNAMIC)}
    found = TinyBase(plain.model, weights, DYNAMIC, rms, 2.3, plain.segment)
    return found if coupling is None else with_extensions(found, WordCoupling(directions=3))


@pytest.fixture
def q_VS() -> torch.Tensor:
    return torch.linalg.qr(_random(12, 3))[0] * torch.tensor([1.0, 0.5, 2.0]).double()


def _read(
    weights: Weights, shape: RecurrentLM, ids: torch.Tensor, state: RecurrentState, share: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses with the coupling among the weights, and, with a share of one, their sum."""
    terms = OutputTerms(coupling=weights.get(COUPLING))
    ones = torch.ones(ids.shape, dtype=torch.float64) if share else None
    now = shape.read(own_weights(weights), ids, ids, state, ones, lambda _: terms)
    return now.nll, now.total


@pytest.mark.parametrize("path", ["compiled", "eager"])
def test_theta_0_is_the_same_model_and_lanes_move_by_t_times_t(
    q_VS: torch.Tensor, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients against the output layer written out, fused and not."""
    if path == "eager":
        monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    base, plain = _base(q_VS), _base(None)
    shape = base.model
    assert isinstance(shape, RecurrentLM)
    ids = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(1))
    state = initial_state(shape, 3, dtype=torch.float64)
    with torch.no_grad():
        want, _ = score(plain.static, shape, ids, ids, state)
        for weights in (
            base.static,
            base.weights,
            base.weights | lanes_of(base.start(), 3),
        ):
            nll, _ = _read(weights, shape, ids, state, share=False)
            torch.testing.assert_close(nll, want, **EXACT)
    own = {n: w + 0.1 * _random(3, *w.shape) for n, w in base.start().items()}
    leaves = {n: w.clone().requires_grad_() for n, w in own.items()}
    nll, total = _read(base.weights | leaves, shape, ids, state, share=True)
    torch.testing.assert_close(total, nll.sum(), **EXACT)
    got = torch.autograd.grad(total, list(leaves.values()))
    # the same lanes without coupling: L' = T L, so dL = T dL'
    t_VV = torch.eye(12, dtype=torch.float64) + q_VS @ q_VS.t()
    straight = plain.weights["embedding"] @ torch.linalg.inv(plain.weights["softmax.directions"])
    other = own | {"softmax.low": t_VV @ own["softmax.low"] - straight}
    start = plain.weights["lstm.0.input"] @ torch.linalg.inv(
        plain.weights["lstm.0.input.directions"]
    )
    other["lstm.0.input.low"] = own["lstm.0.input.low"] - start
    leaves = {n: w.clone().requires_grad_() for n, w in other.items()}
    same, _ = score(plain.weights | leaves, shape, ids, ids, state)
    torch.testing.assert_close(nll, same, **EXACT)
    want = dict(zip(leaves, torch.autograd.grad(same.sum(), list(leaves.values())), strict=True))
    want["softmax.low"] = t_VV @ want["softmax.low"]
    for name, g in zip(own, got, strict=True):
        torch.testing.assert_close(g, want[name], **EXACT)


def test_what_is_learned_at_a_word_moves_its_relatives() -> None:
    """Words 1 and 2 are related, 3 is not: reading 1 makes 2 likelier, too."""
    q_VS = torch.zeros(12, 1, dtype=torch.float64)
    q_VS[1:3] = 0.5**0.5
    text = [np.full(40, 1)]

    def likelihood(base: TinyBase, word: int) -> float:
        bound = RMS().bind({n: torch.tensor(0.05).double() for n in ("rate", "decay")}, base)
        scores = score_articles(base, bound, [np.r_[text[0], word]], EOS, 1)
        return -float(scores.nll[0][-1])

    alone, together = (_base(q) for q in (None, 2 * q_VS))
    gain = {word: likelihood(together, word) - likelihood(alone, word) for word in (2, 3)}
    assert gain[2] > gain[3] + 0.1


def test_the_meta_gradient_is_that_of_the_eager_twin(q_VS: torch.Tensor) -> None:
    base = _base(q_VS)
    rule = LinearGates("four", per_unit=True, slow=True)
    setting = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}
    phi = start_at(rule, RMS(), setting, base)
    phi = {n: p + 0.1 * _random(*p.shape, seed=k) for k, (n, p) in enumerate(phi.items())}
    pieces = segments(base, (11, 23, 3, 1, 17), 3, 5)

    def found() -> Any:
        bound = rule.bind(phi, base)
        return meta_gradient(base, bound, phi, begin(base, 3, bound), pieces)

    fast = found()
    with kernels.eager():
        eager = found()
    assert fast.loss == pytest.approx(eager.loss, rel=1e-12)
    for name, g in fast.gradients.items():
        torch.testing.assert_close(g, eager.gradients[name], rtol=1e-8, atol=1e-12)


def test_words_that_occur_together_are_related() -> None:
    """Two topics of three words each in a common text: the first directions tell them apart."""
    random = np.random.default_rng(0)
    topics = (1, 2, 3), (4, 5, 6)
    texts = []
    for k in range(60):
        own = random.choice(topics[k % 2], 60)
        texts.append(np.r_[own, random.integers(7, 12, 240)])
    found = coupling_of(Text(texts, 1, EOS), 12, 2)
    torch.testing.assert_close(found.t() @ found, torch.eye(2, dtype=torch.float64), **EXACT)
    leading = found[:, 0] * found[1, 0].sign()
    assert float(leading[list(topics[0])].min()) > 0.3
    assert float(leading[list(topics[1])].max()) < -0.3
    assert coupling_of(Text(texts[:2], 1, EOS), 12, 50).shape[1] <= 2
    assert coupling_of(Text([np.array([1, 2])], 1, EOS), 12, 5).shape[0] == 12, "short text"


def test_the_coupling_needs_no_array_of_articles_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(2)
    texts = [random.zipf(1.4, size=n) % 5000 for n in random.integers(200, 400, size=60)]
    text = Text(texts, 1, EOS)
    whole = coupling_of(text, 5000, 8)
    monkeypatch.setattr("mlm.kernels.buffers.NUMBERS", 60 * 150)
    tracemalloc.start()
    found = coupling_of(text, 5000, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    assert peak < 0.6 * 60 * 5000 * 8


def _problems(names: tuple[str, ...], rank: int, cutoffs: tuple[int, ...]) -> Sequence[str]:
    """What a run is told before anything is trained."""
    sizes = {n: tuple(w.shape) for n, w in tiny_base((), cutoffs=cutoffs).weights.items()}
    plan = Plan(names, folds(sizes, names, rank), ("rule",), "reverse", "none", False, ())
    return WordCoupling(directions=3).problems(plan)


def test_names_and_errors(q_VS: torch.Tensor) -> None:
    base = _base(q_VS)
    assert COUPLING not in base.static
    assert choose_dynamic(base.weights, "all") == choose_dynamic(_base(None).weights, "all")
    low = "softmax.low"
    for names, rank, cutoffs in (
        ((low,), 2, ()),
        ((low,), 99, (4, 9)),
        (("embedding", low), 99, ()),
        (("softmax.bias",), 99, ()),
    ):
        plain = tiny_base((), cutoffs=cutoffs)
        text = Text(articles((11, 23, 9)), 43, EOS)
        weights = add_low_rank(plain.weights, plain.model, names, rank, text, 1000)
        with pytest.raises(ValueError, match="does not adapt in a basis of its own"):
            couple(dataclasses.replace(plain, weights=weights, dynamic=names), q_VS)
        (problem,) = _problems(names, rank, cutoffs)
        assert "--word-coupling.directions needs --dynamic softmax.low" in problem
    assert not _problems(DYNAMIC, 99, ())
    assert base.weights[COUPLING].shape == (12, 3)


@pytest.mark.slow
def test_a_run_with_word_coupling(finished: Finished, command: Command, tmp_path: Path) -> None:
    """Stage 2 and a later `evaluate.py`; the settings must agree with what was made."""
    directions = "--word-coupling.directions"
    folder = finished.copy(tmp_path / "run")
    words = ("--out", folder, "--dynamic", "softmax.low,softmax.bias", "--rank", 99)
    rules = ("--train-rules", "three_levels", "--rules", "static", "rms", "three_levels")
    meta = ("--stages", "meta", "evaluate")
    done = command("train", *words, directions, 4, *rules, *meta)
    assert done.code == 0, done.err
    base, _ = load_tensors(folder / "checkpoints" / "memory.safetensors", "")
    assert base[f"theta_0/{COUPLING}"].shape[1] == 4
    losses = (folder / "losses.parquet").read_bytes()
    assert command("evaluate", folder, "--no-draw").code == 0
    assert (folder / "losses.parquet").read_bytes() == losses
    error = command("train", *words, directions, 0, "--stages", "evaluate").error
    assert "was made with word_coupling, but the settings say no extension" in error
    error = command("train", *words, directions, 3, "--stages", "evaluate").error
    assert "was made with other settings of --adapt, --text or an extension" in error
    learn = ("--meta.learn", "rule", "theta_0")
    error = command("train", *words, directions, 4, *learn, "--stages", "meta").error
    assert "--word-coupling.directions goes with --meta.learn rule only" in error
    lstm = ("--out", folder, "--dynamic", "lstm", directions, 4)
    error = command("train", *lstm, "--stages", "meta").error
    assert "--word-coupling.directions needs --dynamic softmax.low" in error
    assert "--word-coupling.directions is -1" in command("train", directions, -1).error
