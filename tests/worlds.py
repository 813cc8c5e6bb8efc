"""Small float64 worlds for the tests: a model, a long-term memory, segments with ragged ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pytest
import torch

from mlm.experimental.through import ThroughTrainer
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension
from mlm.models.language_model import Weights
from mlm.models.module import ModuleModel
from mlm.models.recurrent import EMBEDDING_BOUND, RecurrentLM, initial_weights
from mlm.reading.cache import CacheSetting
from mlm.reading.lanes import Details
from mlm.reading.scoring import score_articles
from mlm.rules.protocol import Bound
from mlm.store.run_folder import RunFolder
from mlm.text.streams import LaneStream, Segment
from mlm.training.language_model import LMTrainer

EOS = 0
Base = TypeVar("Base", bound=AdaptationBase)


def with_extensions(base: Base, *extensions: Extension) -> Base:
    """The same base, read with these alone, and with the weights that they derive."""
    found = dataclasses.replace(base, extensions=extensions).derived()
    assert isinstance(found, type(base))
    return found


@dataclass(frozen=True)
class TinyBase(AdaptationBase):
    """A memory whose model has recurrent layers: its sizes may be asked for."""

    model: RecurrentLM


def made_up_rms(weights: Weights, names: Sequence[str], generator: torch.Generator) -> Weights:
    """A Fisher's root for some weights, every number between 0.01 and 0.21."""
    return {
        n: torch.rand(weights[n].shape, generator=generator, dtype=torch.float64) * 0.2 + 0.01
        for n in names
    }


def tiny_base(
    dynamic: tuple[str, ...] | None = None,
    *,
    layers: int = 2,
    cutoffs: tuple[int, ...] = (),
    segment: int = 5,
    seed: int = 0,
    cell: Literal["lstm", "qrnn"] = "lstm",
) -> TinyBase:
    """A model of a dozen words with a made-up Fisher, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = RecurrentLM(12, 4, 6, layers, cutoffs, cell)
    weights = {n: w.double() * 2 for n, w in initial_weights(shape, generator).items()}
    if cell == "lstm":  # gates that are not saturated, in every layer
        weights["lstm.0.input"] *= EMBEDDING_BOUND * math.sqrt(4 / 6)
    names = tuple(weights) if dynamic is None else dynamic
    rms = made_up_rms(weights, names, generator)
    return TinyBase(shape, weights, names, rms, 2.3, segment)


class _Bigrams(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(12, 12, dtype=torch.float64)

    def initial_state(self, lanes: int) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(lanes, 1, dtype=torch.float64),)

    def forward(
        self, tokens: torch.Tensor, state: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        return self.table(tokens), state


def bigram_base() -> AdaptationBase:
    """A long-term memory of a module that stage 1 did not train."""
    model = ModuleModel(_Bigrams())
    weights = model.weights()
    rms = {n: torch.ones_like(w) for n, w in weights.items()}
    return AdaptationBase(model, weights, tuple(weights), rms, 2.3, 5)


def written_out(
    base: AdaptationBase,
    rule: Bound | None,
    text: np.ndarray,
    at: np.ndarray,
    cache: Sequence[CacheSetting] = (),
) -> list[np.ndarray]:
    """(T, V) nats of every token of the dozen at places `at` of a text, with each cache, too.

    The loss of a token does not depend on those behind it: each is put there and scored.
    """
    changed = [np.where(np.arange(len(text)) == t, v, text) for t in at for v in range(12)]
    scores = score_articles(base, rule, changed, EOS, len(changed), cache=cache)
    found = []
    for column in (scores, *scores.cached):
        nll = [own[t] for own, t in zip(column.nll, np.repeat(at, 12), strict=True)]
        found.append(np.reshape(nll, (len(at), 12)))
    return found


def agree(details: Details, nats_TV: np.ndarray, came_T: np.ndarray) -> None:
    """Check the details of tokens against the losses of all tokens at their places."""
    best = details.best.shape[1]
    own_T1 = np.take_along_axis(nats_TV, came_T[:, None], 1)
    np.testing.assert_array_equal(details.came, came_T)
    np.testing.assert_array_equal(details.rank, 1 + (nats_TV < own_T1 - 1e-12).sum(1))
    np.testing.assert_array_equal(details.pieces, nats_TV.argsort(1)[:, :best])
    np.testing.assert_allclose(details.best, np.sort(nats_TV, 1)[:, :best], atol=1e-9)
    entropy = (np.exp(-nats_TV) * nats_TV).sum(1)
    np.testing.assert_allclose(details.entropy, entropy, atol=1e-9)


def articles(lengths: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Random articles over the dozen words."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 12, size=n) for n in lengths]


def segments(
    base: AdaptationBase, lengths: tuple[int, ...], lanes: int, number: int
) -> list[Segment]:
    """The first `number` segments of an endless training stream."""
    stream = LaneStream(articles(lengths), lanes, base.segment, EOS, seed=3)
    return [next(stream) for _ in range(number)]


def gradients_of_a_step(trainer: ThroughTrainer, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """What every weight's gradient is in the next step of stage 1, which Adam then leaves out."""
    seen: Weights = {}

    def look() -> None:
        for name, weight in trainer.weights.items():
            assert weight.grad is not None, name
            seen[name] = weight.grad.clone()

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_descend", look)
        trainer.train_step()
    return seen


def check_resumed(make: Callable[[], LMTrainer], folder: Path) -> None:
    """Eight steps of stage 1 are four, then four of a trainer that loads what those left."""
    whole, half, rest = make(), make(), make()
    for _ in range(8):
        whole.train_step()
    for _ in range(4):
        half.train_step()
    half.save(RunFolder(folder), "words")
    rest.load(RunFolder(folder), "words")
    for _ in range(4):
        rest.train_step()
    for name, value in whole.weights.items():
        assert torch.equal(rest.weights[name], value), name
    if isinstance(whole, ThroughTrainer) and isinstance(rest, ThroughTrainer):
        for name, value in whole.reader.weights.items():
            assert torch.equal(rest.reader.weights[name], value), name
    more = rest.more_tensors()
    for name, value in whole.more_tensors().items():
        assert name.startswith("reader/") or torch.equal(more[name], value), name
