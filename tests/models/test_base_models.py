"""Every base model against slow references: QRNN, modules of the user's own, SNAIL; one weight
tied in two places; an example that runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from worlds import EOS, TinyBase, articles, made_up_rms, segments, tiny_base

from examples import own_model
from mlm import kernels
from mlm.base.errors import UserError
from mlm.models.base import AdaptationBase, choose_dynamic, lanes_of
from mlm.models.language_model import Weights
from mlm.models.module import ModuleModel
from mlm.models.recurrence import LanePooling, plain_operations
from mlm.models.recurrent import BaseModel, RecurrentLM, RecurrentState
from mlm.models.snail import SnailShape, SnailState, snail_like
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles
from mlm.reading.static import static_loss
from mlm.reading.step import begin, read
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS, SGD
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, ModelConfig
from mlm.store.models import load_base, load_lm, save_base, save_lm
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors
from mlm.text.streams import Segment, Text
from mlm.training.directions import add_low_rank
from mlm.training.fisher import estimate_fisher
from mlm.training.language_model import LMTrainer, shape_of

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}
"""A few hundred float64 operations of size one: rounding stays below 1e-13."""
LENGTHS = (11, 23, 3, 1, 17)
"""Articles that end inside a segment, one shorter than a segment, one of a single token."""
Cell = Literal["lstm", "qrnn", "snail"]
TEXT = Text(articles((60, 35, 80, 50)), 225, EOS)


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _ids(lanes: int, steps: int, seed: int) -> Tensor:
    return torch.randint(12, (lanes, steps), generator=torch.Generator().manual_seed(seed))


def _busy(base: AdaptationBase, lanes: int) -> Weights:
    """Weights of lanes that have read: away from theta_0, each lane elsewhere."""
    own = lanes_of(base.start(), lanes)
    return {
        n: (w + 0.1 * _random(*w.shape, seed=k)).requires_grad_()
        for k, (n, w) in enumerate(own.items())
    }


# ---------------------------------------------------------------- the slow reference

Lane = Callable[[Weights, list[int], list[int], Any], tuple[Tensor, Any]]
"""(weights, inputs, targets, state) of one lane -> losses (M,), state; state None = the start."""


def _unroll(base: AdaptationBase, lane: Lane, update, phi: Weights, pieces: list[Segment]):
    """Meta-loss of a hand-unrolled loop in which autograd sees every update of the weights.

    First order, as `reference.unroll`, for any model that reads one lane. Returns the mean loss
    over the tokens of all segments but the first, and the lanes' last weights.
    """
    total, tokens, finals = torch.zeros((), dtype=torch.float64), 0, []
    for b in range(len(pieces[0].new)):
        theta, state, age = base.start(), None, 0
        for t, piece in enumerate(pieces):
            if bool(piece.new[b]):
                theta, state, age = base.start(), None, 0
            ids = piece.inputs[b].tolist(), piece.targets[b].tolist()
            count = int(piece.mask[b].sum())
            losses, _ = lane({**base.weights, **theta}, *ids, state)
            if t:
                total, tokens = total + losses[:count].sum(), tokens + count
            leaves = {n: w.detach().requires_grad_() for n, w in theta.items()}
            again, after = lane({**base.weights, **leaves}, *ids, state)
            found = torch.autograd.grad(again[:count].sum() / len(again), list(leaves.values()))
            loss = float(losses[:count].detach().mean())
            theta = {
                n: update(phi, n, theta[n], g, base.weights[n], loss, age)
                for n, g in zip(leaves, found, strict=True)
            }
            state, age = after, age + 1
        finals.append(theta)
    return total / tokens, finals


def _assert_meta_gradient(base: AdaptationBase, lane: Lane) -> None:
    """Losses, weights and all three meta-gradients of learned gates, eight updates, three lanes."""
    rule = LinearGates()
    phi = rule.start_at_rms(base, 0.02, 0.05)
    phi = {n: p + 0.1 * _random(*p.shape, seed=k) for k, (n, p) in enumerate(phi.items())}
    pieces = segments(base, LENGTHS, 3, 8)
    assert any(bool(p.new.any()) for p in pieces[1:]), "the test must cross article borders"
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    loss, finals = _unroll(base, lane, reference.gates(base, rule), leaves, pieces)
    want = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for mode in ("reverse", "checkpoint", "forward"):
        found = meta_gradient(base, rule.bind(phi, base), phi, begin(base, 3), pieces, mode)
        assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
        for name, g in want.items():
            assert float(g.abs().max()) > 1e-9, f"{name}: nothing to compare"
            torch.testing.assert_close(found.gradients[name], g, rtol=0, atol=1e-10)
        for b, theta in enumerate(finals):
            for name, w in theta.items():
                torch.testing.assert_close(found.reader.weights[name][b], w.detach(), **EXACT)


def _recurrent_lane(shape: RecurrentLM) -> Lane:
    """Either cell, one token at a time (QRNN: Bradbury et al. 2017, eqs. 1 and 4).

    State: (outputs, cells, last input). The softmax uses `untied` instead of the embedding if the
    weights hold it.
    """

    def lane(w: Weights, inputs: list[int], targets: list[int], state):
        zeros = [torch.zeros(n, dtype=torch.float64) for _, n in shape.layer_sizes()]
        h, c, before = state or (zeros, zeros, torch.zeros(shape.embedding, dtype=torch.float64))
        h, c, losses = list(h), list(c), []
        out = {**w, "embedding": w.get("untied", w["embedding"])}
        for token, target in zip(inputs, targets, strict=True):
            word = x = reference.embedding(w, shape, token)
            for k in range(shape.layers):
                if shape.cell == "lstm":
                    h[k], c[k] = reference.lstm_step(w, k, x, h[k], c[k])
                else:
                    window = torch.cat([before, x]) if k == 0 else x
                    z, f, o = (w[f"qrnn.{k}.input"] @ window + w[f"qrnn.{k}.bias"]).chunk(3)
                    f = torch.sigmoid(f)
                    c[k] = f * c[k] + (1 - f) * torch.tanh(z)
                    h[k] = torch.sigmoid(o) * c[k]
                x = h[k]
            losses.append(-reference.log_probability(out, shape, x)[target])
            before = word
        h, c = ([t.detach() for t in part] for part in (h, c))
        return torch.stack(losses), (h, c, before.detach())

    return lane


# ---------------------------------------------------------------- QRNN


def _qrnn_state(base: TinyBase, lanes: int) -> RecurrentState:
    zero = base.model.initial_state(lanes, dtype=torch.float64)
    return zero.of([_random(*t.shape, seed=9 + k) for k, t in enumerate(zero.tensors())])


def _of_lane(base: AdaptationBase, own: Weights, b: int) -> Weights:
    return {**base.weights, **{n: w[b] for n, w in own.items()}}


@pytest.mark.parametrize("cutoffs", [(), (4, 9)])
@pytest.mark.parametrize(
    "dynamic", [(), ("qrnn.0.input",), ("qrnn.1.bias", "softmax.bias"), ("embedding",), None]
)
def test_a_qrnn_equals_its_reference(dynamic, cutoffs, engine) -> None:
    """Losses, state and gradient of every lane's own weights, for any choice of dynamic weights."""
    base, lanes = tiny_base(dynamic, cutoffs=cutoffs, cell="qrnn"), 3
    own, state = _busy(base, lanes), _qrnn_state(base, lanes)
    ids, targets = _ids(lanes, 6, 1), _ids(lanes, 6, 2)
    share = torch.ones(lanes, 6, dtype=torch.float64)
    now = base.model.read({**base.weights, **own}, ids, targets, state, share)
    losses = []
    for b in range(lanes):
        start = list(state.c), [c[b] for c in state.c], state.x[0][b]
        words = ids[b].tolist(), targets[b].tolist()
        lane = _recurrent_lane(base.model)
        loss, (_, cells, last) = lane(_of_lane(base, own, b), *words, start)
        losses.append(loss)
        got = torch.cat([t[b] for t in now.state.tensors()])
        torch.testing.assert_close(got, torch.cat([*cells, last]), **EXACT)
    torch.testing.assert_close(now.nll, torch.stack(losses), **EXACT)
    if not own:
        return
    got = torch.autograd.grad(now.total, list(own.values()))
    want = torch.autograd.grad(torch.stack(losses).sum(), list(own.values()))
    for name, a, b in zip(own, got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.skipif(kernels.numba is None, reason="numba is not installed")
def test_the_pooling_kernel_equals_its_eager_twin(dtype: torch.dtype, atol: float) -> None:
    def everything() -> list[Tensor]:
        inputs = _random(3, 9, 15, seed=1).to(dtype), _random(3, 5, seed=2).to(dtype)
        leaves = [x.requires_grad_() for x in inputs]
        outputs = LanePooling.apply(*leaves)
        total = torch.stack([(o * _random(*o.shape, seed=3)).sum() for o in outputs]).sum()
        return [*outputs, *torch.autograd.grad(total, leaves)]

    found = everything()
    with kernels.eager():
        expected = everything()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


def _second(total: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradient of half the squared length of the gradient: H g."""
    first = torch.autograd.grad(total, leaves, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum() / 2, leaves)


def test_a_qrnn_of_plain_operations_has_second_derivatives() -> None:
    base = tiny_base(None, cell="qrnn")
    own, state, ids = _busy(base, 1), _qrnn_state(base, 1), _ids(1, 4, 1)
    with plain_operations():
        nll = base.model.read(own, ids, ids, state, torch.ones(1, 4).double()).nll
        found = _second(nll.sum(), list(own.values()))
    start = list(state.c), [c[0] for c in state.c], state.x[0][0]
    words = ids[0].tolist()
    loss, _ = _recurrent_lane(base.model)(_of_lane(base, own, 0), words, words, start)
    for got, want in zip(found, _second(loss.sum(), list(own.values())), strict=True):
        assert float(want.abs().max()) > 1e-6, "nothing to compare"
        torch.testing.assert_close(got, want, **EXACT)


def test_the_meta_gradient_through_a_qrnn() -> None:
    base = tiny_base(("qrnn.0.input", "qrnn.0.bias", "qrnn.1.input", "softmax.bias"), cell="qrnn")
    _assert_meta_gradient(base, _recurrent_lane(base.model))


def test_the_state_of_a_qrnn_keeps_selects_and_is_made_again() -> None:
    """Cells and last input; a lane that is not kept is zero even if it was not a number."""
    base = tiny_base((), cell="qrnn")
    state = _qrnn_state(base, 3)
    assert [tuple(t.shape) for t in state.tensors()] == [(3, 6), (3, 4), (3, 4)]
    state.tensors()[2][1] = float("nan")
    kept = state.keep(torch.tensor([True, False, True]))
    for before, after in zip(state.tensors(), kept.tensors(), strict=True):
        assert not after[1].any()
        assert torch.equal(after[[0, 2]], before[[0, 2]])
    some = state.select(torch.tensor([2]))
    assert all(
        torch.equal(a[0], b[2]) for a, b in zip(some.tensors(), state.tensors(), strict=True)
    )
    again = kept.of(kept.tensors())
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), kept.tensors(), strict=True))
    assert (len(again.h), len(again.c), len(again.x)) == (0, 2, 1)


def test_sets_of_dynamic_weights_mean_either_cell() -> None:
    for cell in ("lstm", "qrnn"):
        weights = tiny_base((), cell=cell).weights
        chosen = choose_dynamic(weights, "lstm,softmax.bias")
        assert set(chosen) == {n for n in weights if n != "embedding"}
    assert choose_dynamic(weights, "qrnn.*.input") == ("qrnn.0.input", "qrnn.1.input")
    assert choose_dynamic(weights, "low") == ("softmax.low",)
    for names, wanted in (
        (weights, "qrnn.0.input.low"),
        (SnailShape(12, 4, 2, 1, 8).layout(), "low"),
    ):
        with pytest.raises(UserError, match=rf"'{wanted}' matches no weight"):
            choose_dynamic(names, wanted)


def test_a_low_rank_change_of_the_softmax_over_a_qrnn() -> None:
    """Its directions are those of what the softmax sees; a D of W P^-1 is a change by W."""
    base, names = tiny_base((), cell="qrnn"), ("softmax.low",)
    weights = add_low_rank(base.weights, base.model, names, 4, TEXT, 1000)
    assert weights.keys() - base.weights.keys() == {"softmax.low", "softmax.directions"}
    change = 0.1 * _random(12, 4)
    low = torch.linalg.solve(weights["softmax.directions"], change, left=False)
    ids, state = _ids(2, 6, 1), _qrnn_state(base, 2)
    got = base.model.read({**weights, "softmax.low": low}, ids, ids, state).nll
    for b in range(2):
        words = ids[b].tolist()
        start = list(state.c), [c[b] for c in state.c], state.x[0][b]
        untied = {**base.weights, "untied": base.weights["embedding"] + change}
        want, _ = _recurrent_lane(base.model)(untied, words, words, start)
        torch.testing.assert_close(got[b], want, **EXACT)


# ---------------------------------------------------------------- stage 1, files


def _trainer(cell: Cell, dropout: float = 0.1, text: Text = TEXT) -> LMTrainer:
    lm = LMTrainingConfig(
        lanes=3, segment=6, epochs=2.0, precision="float32", learning_rate=0.01,
        dropout_embedding=dropout, dropout_input=dropout, dropout_output=dropout,
        dropout_hidden=dropout, ar=1.0, tar=1.0,
    )  # fmt: skip
    model = ModelConfig(cell=cell, embedding=8, hidden=6, layers=2, context=8)
    config = Config(model=model, lm=lm)
    return LMTrainer(config, shape_of(config, 12), text, torch.device("cpu"))


@pytest.mark.parametrize("cell", ["lstm", "qrnn", "snail"])
def test_training_resumes_bit_for_bit(cell: Cell, tmp_path) -> None:
    run = RunFolder(tmp_path)
    whole, half, rest = (_trainer(cell) for _ in range(3))
    losses = [whole.train_step()[0] for _ in range(12)]
    parts = [half.train_step()[0] for _ in range(5)]
    half.save(run, "v")
    rest.load(run, "v")
    parts += [rest.train_step()[0] for _ in range(7)]
    assert losses == parts
    assert all(torch.equal(w, rest.weights[n]) for n, w in whole.weights.items())
    other: Cell = "lstm" if cell == "qrnn" else "qrnn"
    with pytest.raises(UserError, match="made with other settings"):
        _trainer(other).load(run, "v")


@pytest.mark.parametrize("cell", ["lstm", "qrnn", "snail"])
def test_training_learns_and_the_file_knows_the_model(cell: Cell, tmp_path) -> None:
    text = Text([np.tile([3, 7, 7, 1], 96)] * 3, 1152, EOS)
    trainer = _trainer(cell, 0.0, text)
    before = static_loss(trainer.weights, trainer.shape, text, 3, 6)
    for _ in range(trainer.steps):
        trainer.train_step()
    weights = {n: w.detach() for n, w in trainer.weights.items()}
    assert static_loss(weights, trainer.shape, text, 3, 6) < before - 0.5
    save_lm(tmp_path / "lm.safetensors", weights, trainer.shape, "v")
    again, shape, _ = load_lm(tmp_path / "lm.safetensors", "v")
    assert shape == trainer.shape
    assert all(torch.equal(w, weights[n]) for n, w in again.items())
    base = AdaptationBase(
        shape, weights, ("softmax.bias",), {"softmax.bias": weights["softmax.bias"].abs()}, 2.0, 5
    )
    save_base(tmp_path / "memory.safetensors", base, "v")
    assert load_base(tmp_path / "memory.safetensors", "v").model == shape


def test_a_file_that_names_no_cell_holds_an_lstm(tmp_path, monkeypatch) -> None:
    def before_cells(shape: RecurrentLM) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(shape).items() if k != "cell"}

    monkeypatch.setattr("mlm.store.models._record", before_cells)
    shape = RecurrentLM(12, 4, 6, 2, (4, 9))
    weights = shape.initial_weights(torch.Generator().manual_seed(0))
    save_lm(tmp_path / "lm.safetensors", weights, shape, "v")
    _, about = load_tensors(tmp_path / "lm.safetensors", "")
    assert "cell" not in about["shape"]
    assert load_lm(tmp_path / "lm.safetensors", "v")[1] == shape


def test_only_an_lstm_has_recurrent_weights_to_drop() -> None:
    config = Config(lm=LMTrainingConfig(weight_drop=0.5))
    validate(config)
    model = dataclasses.replace(config.model, cell="qrnn")
    with pytest.raises(UserError, match=r"weight-drop is 0.5; a qrnn has no recurrent weights"):
        validate(dataclasses.replace(config, model=model))


# ---------------------------------------------------------------- modules of the user's own


class OwnGRU(nn.Module):
    """Cho et al. 2014 in PyTorch's form; its state does not start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 4)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.softmax = nn.Linear(5, 12)
        self.double()

    def initial_state(self, lanes: int) -> tuple[Tensor, ...]:
        return (torch.full((lanes, 1, 5), 0.25),)

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...]):
        y, h = self.gru(self.embedding(tokens), state[0].transpose(0, 1).contiguous())
        return self.softmax(y), (h.transpose(0, 1),)


def _gru_lane(w: Weights, inputs: list[int], targets: list[int], state):
    """The GRU of PyTorch's documentation, one token at a time."""
    h, losses = torch.full((5,), 0.25, dtype=torch.float64) if state is None else state, []
    for token, target in zip(inputs, targets, strict=True):
        x = w["embedding.weight"][token]
        a = (w["gru.weight_ih_l0"] @ x + w["gru.bias_ih_l0"]).chunk(3)
        b = (w["gru.weight_hh_l0"] @ h + w["gru.bias_hh_l0"]).chunk(3)
        r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        h = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h
        logits = w["softmax.weight"] @ h + w["softmax.bias"]
        losses.append(-torch.log_softmax(logits, 0)[target])
    return torch.stack(losses), h.detach()


class OwnLSTM(nn.Module):
    """The built-in LSTM's sizes out of `nn.LSTM`s, with a tied softmax."""

    def __init__(self, shape: RecurrentLM) -> None:
        super().__init__()
        self.sizes = [hidden for _, hidden in shape.layer_sizes()]
        self.embedding = nn.Embedding(shape.vocabulary, shape.embedding)
        self.layers = nn.ModuleList(nn.LSTM(i, h, batch_first=True) for i, h in shape.layer_sizes())
        self.softmax = nn.Linear(shape.embedding, shape.vocabulary)
        self.softmax.weight = self.embedding.weight

    def initial_state(self, lanes: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(lanes, h) for h in self.sizes for _ in "hc")

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...]):
        x, after = self.embedding(tokens), []
        for k, layer in enumerate(self.layers):
            x, pair = layer(x, tuple(s.unsqueeze(0) for s in state[2 * k : 2 * k + 2]))
            after += [s[0] for s in pair]
        return self.softmax(x), tuple(after), x


NAMES = {
    "embedding": "embedding.weight",
    "lstm.{k}.input": "layers.{k}.weight_ih_l0",
    "lstm.{k}.recurrent": "layers.{k}.weight_hh_l0",
    "lstm.{k}.bias": "layers.{k}.bias_ih_l0",
    "softmax.bias": "softmax.bias",
}
"""The built-in LSTM's weights in `OwnLSTM`; its `bias_hh_l0` stays zero."""


def _named(shape: RecurrentLM) -> dict[str, str]:
    return {a.format(k=k): b.format(k=k) for a, b in NAMES.items() for k in range(shape.layers)}


def _twins(dynamic: tuple[str, ...]) -> tuple[TinyBase, AdaptationBase]:
    """The same LSTM built in and as a module."""
    mine = tiny_base(dynamic)
    model, names = ModuleModel(OwnLSTM(mine.model).double()), _named(mine.model)
    weights = {n: torch.zeros_like(w) for n, w in model.weights().items()}
    weights |= {names[n]: w for n, w in mine.weights.items()}
    rms = {names[n]: r for n, r in mine.rms.items()}
    chosen = tuple(names[n] for n in dynamic)
    return mine, AdaptationBase(model, weights, chosen, rms, mine.loss, mine.segment)


def _gru_memory(dynamic: str = "gru.*,softmax.bias") -> AdaptationBase:
    torch.manual_seed(0)
    model = ModuleModel(OwnGRU())
    weights = {n: 2 * w for n, w in model.weights().items()}
    chosen = choose_dynamic(weights, dynamic)
    rms = made_up_rms(weights, chosen, torch.Generator().manual_seed(1))
    return AdaptationBase(model, weights, chosen, rms, 2.3, 5)


def test_the_meta_gradient_through_a_module() -> None:
    _assert_meta_gradient(_gru_memory(), _gru_lane)


DYNAMIC = ("embedding", "softmax.bias", "lstm.0.input", "lstm.1.recurrent", "lstm.1.bias")


GATES = LinearGates()
SETTING = {"rate": torch.tensor(0.05).double(), "decay": torch.tensor(0.1).double()}


def test_a_modules_static_losses_and_fisher_equal_the_built_in_lstms() -> None:
    """`nn.LSTM` and a tied softmax, in a module, under the same weights."""
    mine, theirs = _twins(DYNAMIC)
    names, texts = _named(mine.model), articles(LENGTHS)
    text = Text(texts, sum(LENGTHS), EOS)
    ours, other = (
        estimate_fisher(dataclasses.replace(m, rms={}, loss=0.0), text, 60) for m in (mine, theirs)
    )
    for name in DYNAMIC:
        torch.testing.assert_close(other.rms[names[name]], ours.rms[name], **EXACT)
    one, two = (score_articles(m, None, texts, EOS, 3).nll for m in (mine, theirs))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [SGD(), RMS(), GATES], ids=lambda rule: rule.name)
def test_a_module_adapts_as_the_built_in_lstm_does(rule: SGD | RMS | LinearGates) -> None:
    """Losses while reading, and meta-gradients."""
    mine, theirs = _twins(DYNAMIC)
    texts, pieces = articles(LENGTHS), segments(mine, LENGTHS, 3, 8)
    phi = {n: v for n, v in SETTING.items() if n == "rate" or isinstance(rule, RMS)}
    if isinstance(rule, LinearGates):
        phi = rule.start_at_rms(mine, 0.05, 0.1)
    found = []
    for base in (mine, theirs):
        bound = rule.bind(phi, base)
        nll = score_articles(base, bound, texts, EOS, 3).nll
        found.append((nll, meta_gradient(base, bound, phi, begin(base, 3), pieces)))
    (ours, my_gradient), (other, gradient) = found
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=0, atol=1e-10)
    assert gradient.loss == pytest.approx(my_gradient.loss, rel=1e-12)
    for name, g in my_gradient.gradients.items():
        assert float(g.abs().max()) > 1e-9, f"{name}: nothing to compare"
        torch.testing.assert_close(gradient.gradients[name], g, rtol=0, atol=1e-10)


def test_a_module_is_read_at_once_or_lane_by_lane() -> None:
    """Shared weights: one call for all lanes; the same numbers as one call per lane."""
    base = _gru_memory("*")
    assert isinstance(base.model, ModuleModel)
    ids, calls = _ids(3, 6, 1), []
    state = base.model.initial_state(3, dtype=torch.float64)
    base.model.module.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    shared = base.model.read(base.weights, ids, ids, state)
    assert calls == [3]
    each = base.model.read(lanes_of(base.weights, 3), ids, ids, state)
    assert calls == [3, 1, 1, 1]
    torch.testing.assert_close(each.nll, shared.nll, **EXACT)
    for a, b in zip(each.state.tensors(), shared.state.tensors(), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert shared.output.shape == (3, 6, 0)


def test_a_new_article_begins_at_the_modules_own_state() -> None:
    state = _gru_memory().model.initial_state(2, dtype=torch.float64)
    moved = state.of([t + 1 for t in state.tensors()])
    kept = moved.keep(torch.tensor([False, True])).tensors()[0]
    assert kept.dtype == torch.float64
    torch.testing.assert_close(kept[:, 0, 0], torch.tensor([0.25, 1.25]).double(), **EXACT)


def test_a_module_has_second_derivatives() -> None:
    base = _gru_memory("*")
    own, ids = _busy(base, 1), _ids(1, 4, 1)
    state = base.model.initial_state(1, dtype=torch.float64)
    state = state.of([torch.full_like(t, 0.25) for t in state.tensors()])
    with plain_operations():
        now = base.model.read(own, ids, ids, state, torch.ones(1, 4).double())
        found = _second(now.total, list(own.values()))
    words = ids[0].tolist()
    loss, _ = _gru_lane(_of_lane(base, own, 0), words, words, None)
    for got, want in zip(found, _second(loss.sum(), list(own.values())), strict=True):
        assert float(want.abs().max()) > 1e-6, "nothing to compare"
        torch.testing.assert_close(got, want, **EXACT)


def test_modules_that_do_not_fit_are_refused() -> None:
    class Bad(OwnGRU):
        given: Any = None

        def forward(self, tokens: Tensor, state: tuple[Tensor, ...]):
            return self.given(*super().forward(tokens, state))

    model, ids = ModuleModel(Bad()), _ids(2, 3, 1)
    weights, state = model.weights(), model.initial_state(2, dtype=torch.float64)
    for given, message in (
        (lambda logits, state: logits, "forward gives something else"),
        (lambda logits, state: (logits, state[0]), "forward gives something else"),
        (lambda logits, state: (logits[:, -1], state), "logits have another size"),
        (lambda logits, state: (logits, (state[0][:1],)), "changes the sizes of the state"),
    ):
        Bad.given = staticmethod(given)
        with pytest.raises(UserError, match=rf"Bad: .*{message}.*; a language model of your own"):
            model.read(weights, ids, ids, state)
    with pytest.raises(UserError, match=r"softmax.bias missing from the weights"):
        model.read({n: w for n, w in weights.items() if n != "softmax.bias"}, ids, ids, state)
    with pytest.raises(UserError, match=r"Linear.initial_state is missing"):
        ModuleModel(nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"a ModuleModel cannot be written to a checkpoint"):
        save_base(RunFolder.checkpoint, AdaptationBase(model, weights, (), {}, 0.0, 5), "v")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_example_of_an_own_model_runs_and_learning_pays(capsys) -> None:
    gains = own_model.main()
    assert gains["learned gates"] > gains["RMS"] > 0.05
    assert "learned gates" in capsys.readouterr().out


# ---------------------------------------------------------------- one weight in two places


@pytest.mark.parametrize("model", ["lstm", "qrnn", "module"])
def test_a_tied_embedding_has_one_gradient_and_one_update(model, engine) -> None:
    """The gradient is the sum of both uses', and both uses see the new weight."""
    cell = "qrnn" if model == "qrnn" else "lstm"
    mine = tiny_base(("embedding",), cell=cell)
    base = _twins(("embedding",))[1] if model == "module" else mine
    (name,) = base.dynamic
    first, second = segments(base, (30,), 1, 2)
    rate = torch.tensor(0.5, dtype=torch.float64)
    bound = SGD().bind({"rate": rate}, base)
    reader, nll = read(base, bound, begin(base, 1, bound), first)
    _, later = read(base, bound, reader, second)
    lane, table = _recurrent_lane(mine.model), mine.weights["embedding"]
    uses = [table.clone().requires_grad_() for _ in range(2)]
    untied = {**mine.weights, "embedding": uses[0], "untied": uses[1]}
    losses, state = lane(untied, first.inputs[0].tolist(), first.targets[0].tolist(), None)
    torch.testing.assert_close(nll[0], losses.detach(), **EXACT)
    found = torch.autograd.grad(losses.mean(), uses)
    assert all(float(g.abs().max()) > 1e-5 for g in found), "both uses matter"
    moved = {"embedding": table - rate * (found[0] + found[1])}
    torch.testing.assert_close(reader.weights[name][0], moved["embedding"], **EXACT)
    ids = second.inputs[0].tolist(), second.targets[0].tolist()
    losses, _ = lane({**mine.weights, **moved}, *ids, state)
    torch.testing.assert_close(later[0], losses, **EXACT)


# ---------------------------------------------------------------- SNAIL


def _snail_memory(dynamic: tuple[str, ...] | None = None, context: int = 7) -> AdaptationBase:
    shape = SnailShape(12, 4, 2, 2, context)
    weights = shape.initial_weights(torch.Generator().manual_seed(0))
    weights = {n: 2 * w.double() for n, w in weights.items()}
    names = tuple(weights) if dynamic is None else dynamic
    rms = made_up_rms(weights, names, torch.Generator().manual_seed(1))
    return AdaptationBase(shape, weights, names, rms, 2.3, 5)


def _snail_lane(shape: SnailShape) -> Lane:
    """Mishra et al. 2018, figure 3, one position at a time; state: the tokens before."""

    def block(w: Weights, k: int, x_S: list[Tensor]) -> list[Tensor]:
        def linear(part: str, x: Tensor) -> Tensor:
            return w[f"snail.{k}.{part}.input"] @ x + w[f"snail.{k}.{part}.bias"]

        for j, distance in enumerate(shape.dilations):
            zero, new = torch.zeros_like(x_S[0]), []
            for s, x in enumerate(x_S):
                before = x_S[s - distance] if s >= distance else zero
                a, gate = linear(f"conv{j}", torch.cat([before, x])).chunk(2)
                new.append(torch.cat([x, torch.tanh(a) * torch.sigmoid(gate)]))
            x_S = new
        triples, out = [linear("attention", x).chunk(3) for x in x_S], []
        for s, x in enumerate(x_S):
            near = range(max(0, s - shape.context + 1), s + 1)
            scores = [triples[s][0] @ triples[r][1] / math.sqrt(4 * shape.filters) for r in near]
            share = torch.softmax(torch.stack(scores), 0)
            found = torch.stack([p * triples[r][2] for p, r in zip(share, near, strict=True)])
            out.append(linear("output", torch.cat([x, found.sum(0)])))
        return out

    def lane(w: Weights, inputs: list[int], targets: list[int], state):
        tokens = [*(state or []), *inputs]
        x_S = [w["embedding"][token] for token in tokens]
        for k in range(shape.layers):
            x_S = block(w, k, x_S)
        losses = []
        for x, target in zip(x_S[-len(inputs) :], targets, strict=True):
            losses.append(-torch.log_softmax(w["embedding"] @ x + w["softmax.bias"], 0)[target])
        return torch.stack(losses), tokens[-shape.context :]

    return lane


@pytest.mark.parametrize("dynamic", [(), ("softmax.bias",), ("snail.0.conv1.input",), None])
def test_snail_equals_its_reference(dynamic) -> None:
    """With no, few and as many tokens before as it can hold; every lane's own weights."""
    base, filled = _snail_memory(dynamic), (0, 3, 7)
    assert isinstance(base.model, SnailShape)
    own, ids, targets = _busy(base, 3), _ids(3, 6, 1), _ids(3, 6, 2)
    state = SnailState(_ids(3, 7, 3), torch.tensor(filled))
    share = torch.ones(3, 6, dtype=torch.float64)
    now = base.model.read({**base.weights, **own}, ids, targets, state, share)
    losses = []
    for b, number in enumerate(filled):
        before = state.tokens[b, 7 - number :].tolist()
        words = ids[b].tolist(), targets[b].tolist()
        loss, after = _snail_lane(base.model)(_of_lane(base, own, b), *words, before)
        losses.append(loss)
        tokens, known = (t[b] for t in now.state.tensors())
        assert tokens[7 - int(known) :].tolist() == after
    torch.testing.assert_close(now.nll, torch.stack(losses), **EXACT)
    if own:
        got = torch.autograd.grad(now.total, list(own.values()))
        want = torch.autograd.grad(torch.stack(losses).sum(), list(own.values()))
        for name, a, b in zip(own, got, want, strict=True):
            torch.testing.assert_close(a, b, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_the_meta_gradient_through_snail() -> None:
    base = _snail_memory(("softmax.bias", "snail.1.attention.input", "embedding"))
    assert isinstance(base.model, SnailShape)
    _assert_meta_gradient(base, _snail_lane(base.model))


def test_snail_has_second_derivatives() -> None:
    base, ids = _snail_memory(), _ids(1, 3, 1)
    assert isinstance(base.model, SnailShape)
    own, state = _busy(base, 1), SnailState(_ids(1, 7, 3), torch.tensor([2]))
    with plain_operations():
        now = base.model.read(own, ids, ids, state, torch.ones(1, 3).double())
        found = _second(now.total, list(own.values()))
    words, before = ids[0].tolist(), state.tokens[0, 5:].tolist()
    loss, _ = _snail_lane(base.model)(_of_lane(base, own, 0), words, words, before)
    for got, want in zip(found, _second(loss.sum(), list(own.values())), strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_segments_are_only_a_schedule_while_the_context_holds_the_article() -> None:
    texts = articles((31, 12))
    base = _snail_memory((), context=32)
    base = dataclasses.replace(base, dynamic=("softmax.bias",))
    whole = score_articles(dataclasses.replace(base, segment=40), None, texts, EOS, 2)
    for m in (1, 5):
        parts = score_articles(dataclasses.replace(base, segment=m), None, texts, EOS, 2)
        for a, b in zip(whole.nll, parts.nll, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), **EXACT)


SIZES = [
    RecurrentLM(330, 16, 16, 1),
    RecurrentLM(2000, 128, 128, 1),
    RecurrentLM(4000, 256, 256, 1),
    RecurrentLM(33278, 400, 1150, 3),
    RecurrentLM(267735, 400, 1150, 3, (20_000, 60_000)),
]


@pytest.mark.parametrize("context", [64, 256])
@pytest.mark.parametrize("lstm", SIZES, ids=lambda s: f"{s.vocabulary}-{s.hidden}")
def test_snail_has_about_as_many_weights_as_the_lstm(lstm: RecurrentLM, context: int) -> None:
    shape = snail_like(lstm, context)
    assert shape.size == pytest.approx(lstm.size, rel=0.15)
    for step in (-1, 1):
        other = dataclasses.replace(shape, filters=shape.filters + step)
        assert abs(shape.size - lstm.size) <= abs(other.size - lstm.size), "the nearest there is"
    assert (shape.context, shape.layers, shape.cutoffs) == (context, lstm.layers, lstm.cutoffs)


@pytest.mark.parametrize("cell", ["lstm", "qrnn", "snail"])
def test_the_size_is_the_number_of_weights(cell: Cell) -> None:
    model = ModelConfig(cell=cell, embedding=8, hidden=6, layers=2, adaptive_above=10, cutoffs=(5,))
    shape: BaseModel = shape_of(Config(model=model), 12)
    weights = shape.initial_weights(torch.Generator().manual_seed(0))
    assert shape.size == sum(w.numel() for w in weights.values())
    assert {"embedding.tail1", "softmax.cluster"} < weights.keys()
