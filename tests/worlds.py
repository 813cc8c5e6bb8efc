"""Small float64 worlds for the tests: a model, a long-term memory, segments with ragged ends."""

from __future__ import annotations

import numpy as np
import torch

from mlm.lm import LMShape, initial_weights
from mlm.memory import LongTerm
from mlm.streams import LaneStream, Segment

EOS = 0


def tiny_memory(
    dynamic: tuple[str, ...] | None = None,
    *,
    layers: int = 2,
    cutoffs: tuple[int, ...] = (),
    segment: int = 5,
    seed: int = 0,
) -> LongTerm:
    """A model of a dozen words with a made-up Fisher, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = LMShape(12, 4, 6, layers, cutoffs)
    weights = {n: w.double() * 2 for n, w in initial_weights(shape, generator).items()}
    names = tuple(weights) if dynamic is None else dynamic
    rms = {
        n: torch.rand(weights[n].shape, generator=generator, dtype=torch.float64) * 0.2 + 0.01
        for n in names
    }
    return LongTerm(shape, weights, names, rms, 2.3, segment)


def articles(lengths: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Random articles over the dozen words."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 12, size=n) for n in lengths]


def segments(memory: LongTerm, lengths: tuple[int, ...], lanes: int, number: int) -> list[Segment]:
    """The first `number` segments of an endless training stream."""
    stream = LaneStream(articles(lengths), lanes, memory.segment, EOS, seed=3)
    return [next(stream) for _ in range(number)]
