"""The compiled step of training in bfloat16, against the model's own operations in float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm import kernels
from mlm.kernels.compile import narrowed, widened
from mlm.models.output_layer import token_nll
from mlm.models.recurrent import RecurrentLM, RecurrentState
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, ModelConfig
from mlm.text.streams import Segment, Text
from mlm.training.half_precision import half_precision_loss, serves
from mlm.training.language_model import LMTrainer, shape_of

LANES, STEPS, SIZE = 6, 9, 40
SHAPE = RecurrentLM(SIZE, 16, 24, 2)
needs_kernels = pytest.mark.skipif(not kernels.usable(), reason="no compiled kernels here")


class Step:
    """Weights, a ragged segment and a state, the same at every call."""

    def __init__(self) -> None:
        seed = torch.Generator().manual_seed(3)
        start = SHAPE.initial_weights(seed)
        start["softmax.bias"] = torch.randn(SIZE, generator=seed)
        self.weights = {n: (3 * w).requires_grad_() for n, w in start.items()}
        inputs, targets = torch.randint(SIZE, (2, LANES, STEPS), generator=seed)
        lengths = torch.tensor([9, 9, 4, 9, 0, 1]).unsqueeze(1)
        none = np.zeros(LANES, dtype=np.int64)
        mask = torch.arange(STEPS) < lengths
        new = torch.zeros(LANES, dtype=torch.bool)
        self.segment = Segment(inputs, targets, mask, new, none, none)
        sizes = (24, 16)
        h = tuple(torch.randn(LANES, n, generator=seed).tanh() for n in sizes)
        c = tuple(torch.randn(LANES, n, generator=seed) for n in sizes)
        self.state = RecurrentState(h, c)
        added = torch.randn(LANES, STEPS, 16, generator=seed)
        self.added = added.requires_grad_()

    def outcome(self, loss: Tensor, state: RecurrentState) -> dict[str, Tensor]:
        """The loss, the state behind the segment and all gradients."""
        loss.backward()
        found = {n: w.grad for n, w in self.weights.items()} | {"added": self.added.grad}
        ends = {f"state {k}": t.detach().float() for k, t in enumerate(state.tensors())}
        return {"loss": loss.detach(), **ends, **{n: g for n, g in found.items() if g is not None}}

    def of_library(self, bfloat16: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden = SHAPE.run(self.weights, self.segment.inputs, self.state)
            output = hidden.output + self.added
            nll = token_nll(self.weights, SHAPE, output, self.segment.targets)
        mask = self.segment.mask
        return self.outcome((nll.float() * mask).sum() / mask.sum(), hidden.state)


@needs_kernels
def test_it_is_as_exact_as_the_library_in_bfloat16() -> None:
    exact, library, step = Step().of_library(False), Step().of_library(True), Step()
    more = (step.weights, SHAPE, step.segment, step.state, [step.added])
    found = step.outcome(*half_precision_loss(*more))
    assert found.keys() == exact.keys() == library.keys()
    for name, want in exact.items():
        error, its = ((of[name] - want).norm() / want.norm() for of in (found, library))
        assert error < 0.02, name
        assert error < 1.5 * its + 1e-3, (name, error, its)


@needs_kernels
def test_threads_change_no_bit() -> None:
    found = []
    for threads in (1, 2):
        step = Step()
        with kernels.computing(threads=threads):
            more = (step.weights, SHAPE, step.segment, step.state, [step.added])
            found.append(step.outcome(*half_precision_loss(*more)))
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=2e-2, atol=1e-5, msg=name)


@pytest.mark.skipif(kernels.numba is None, reason="numba is not installed")
def test_bits_of_bfloat16_are_those_of_torch() -> None:
    few = [0.0, -0.0, 1.0, -1.5, 3.0e38, 1e-40, 1.00390625, 1.01171875, float("inf")]
    values = torch.cat([torch.tensor(few), torch.randn(500) * 10 ** (6 * torch.randn(500))])
    want = values.bfloat16()
    bits = want.view(torch.uint16).numpy()
    assert [narrowed(v) for v in values.numpy()] == bits.tolist()
    assert [widened(b) for b in bits] == want.float().tolist()


def _trainer(**settings: object) -> LMTrainer:
    rng = np.random.default_rng(0)
    text = Text([rng.integers(1, SIZE, 60) for _ in range(6)], 360, 0)
    lm = dataclasses.replace(LMTrainingConfig(), lanes=4, segment=10, precision="bfloat16")
    config = Config(
        model=ModelConfig(embedding=16, hidden=16), lm=dataclasses.replace(lm, **settings)
    )
    return LMTrainer(config, shape_of(config, SIZE), text, torch.device("cpu"))


OFF = dict.fromkeys(
    (
        "ar",
        "tar",
        "dropout_embedding",
        "dropout_input",
        "dropout_hidden",
        "dropout_output",
        "weight_drop",
    ),
    0.0,
)


@needs_kernels
@pytest.mark.parametrize("changes", [{}, {"ar": 1.0}, {"dropout_output": 0.3}])
def test_stage_1_takes_it_where_nothing_else_is_asked_for(
    changes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def seen(*args: object, **more: object) -> object:
        taken.append(True)
        return half_precision_loss(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("mlm.training.language_model.half_precision_loss", seen)
    trainer = _trainer(**OFF | changes)
    losses = [trainer.train_step()[0] for _ in range(4)]
    assert np.isfinite(losses).all()
    assert bool(taken) == (not changes)


def test_it_serves_an_lstm_with_one_softmax_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert serves(SHAPE, cpu) == kernels.usable()
    assert not serves(RecurrentLM(SIZE, 16, 24, 2, cell="qrnn"), cpu)
    assert not serves(RecurrentLM(SIZE, 16, 24, 2, (10, 20)), cpu)
    assert not serves(SHAPE, torch.device("cuda"))
    with kernels.eager():
        assert not serves(SHAPE, cpu)
