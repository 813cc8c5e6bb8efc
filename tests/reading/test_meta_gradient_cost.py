"""What the three ways to the meta-gradient need: live copies of the weights, time per update."""

from __future__ import annotations

import itertools
import statistics
import time
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import segments, tiny_base

from mlm.models.base import AdaptationBase
from mlm.reading.meta_gradient import GradientMode, meta_gradient, snapshot_spacing
from mlm.reading.step import begin
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import Bound, Parameters

MODES: tuple[GradientMode, ...] = ("reverse", "checkpoint", "forward")


def _gates(base: AdaptationBase) -> tuple[Bound, Parameters]:
    """Three-level gates that start as Krause's rule: a tangent of 6 copies."""
    rule = LinearGates()
    phi = rule.start_at_rms(base, 0.02, 0.05)
    return rule.bind(phi, base), phi


class Copies(TorchDispatchMode):
    """Counts the live tensors as large as the lanes' weights, in copies of these."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.live, self.most = size, 0.0, 0.0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        copies = storage.nbytes() / self.size
        if copies < 1 or id(storage) in self.seen:
            return
        self.seen.add(id(storage))
        self.live += copies
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._free, id(storage), copies)

    def _free(self, key: int, copies: float) -> None:
        self.seen.remove(key)
        self.live -= copies


def _most_copies(mode: GradientMode, updates: int) -> float:
    """Most copies of the lanes' weights alive at once in an unroll of so many updates."""
    base = tiny_base(("lstm.0.recurrent",), segment=3)
    bound, phi = _gates(base)
    reader = begin(base, 2)
    pieces = segments(base, (40, 23, 17), 2, updates)
    size = reader.weights["lstm.0.recurrent"].untyped_storage().nbytes()
    with Copies(size) as meter:
        meta_gradient(base, bound, phi, reader, pieces, mode)
    return meter.most


def test_memory_of_the_three_modes() -> None:
    """Reverse holds 2 copies per update, checkpoint 2 sqrt(2 T), forward a constant number."""
    reverse = _most_copies("reverse", 20)
    assert 40 <= reverse <= 50, reverse
    assert 18 <= _most_copies("reverse", 30) - reverse <= 22
    assert _most_copies("checkpoint", 50) <= 2 * (2 * 50) ** 0.5 + 10
    constant = _most_copies("forward", 10)
    assert constant <= 6 + 8, "6 copies of the tangent, the weights and what a step needs"
    assert _most_copies("forward", 20) <= constant + 1


@pytest.mark.slow
def test_a_thousand_updates_fit_where_forty_did() -> None:
    assert snapshot_spacing(1000) == 23
    forty = _most_copies("reverse", 40)
    assert _most_copies("checkpoint", 1000) <= 1.5 * forty
    assert _most_copies("forward", 1000) <= _most_copies("forward", 40) + 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_time_per_update_does_not_grow(mode: GradientMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of the last 300 of 1,200 updates is below 1.5 times that of the first 300.

    In time of the processor, which other programs do not take.
    """
    base = tiny_base()
    bound, phi = _gates(base)
    update, clock = bound.update, []

    def timed(*words):
        clock.append(time.process_time())
        return update(*words)

    monkeypatch.setattr(bound, "update", timed)
    pieces = segments(base, (40, 23, 3, 17), 2, 1201)
    meta_gradient(base, bound, phi, begin(base, 2), pieces, mode)
    steps = [b - a for a, b in itertools.pairwise(clock[:1201])]
    assert statistics.median(steps[-300:]) < 1.5 * statistics.median(steps[:300])
