"""Debug mode of the buffer pool: what is given back twice, or read afterwards, is found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mlm.kernels import buffers


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors count, too."""
    monkeypatch.setattr(buffers, "MIN_BYTES", 0)
    buffers.clear()
    yield
    buffers.clear()


def test_a_buffer_released_twice_is_refused() -> None:
    x = torch.ones(2, 3)
    buffers.release([x])
    for again in (x, x.view(3, 2), x[1:]):
        with pytest.raises(RuntimeError, match="released twice"):
            buffers.release([again])
    assert buffers.acquire((2, 3), x).data_ptr() == x.data_ptr()
    buffers.release([x])


def test_a_released_buffer_holds_no_number() -> None:
    x = torch.ones(2, 3)
    buffers.release([x])
    assert bool(x.isnan().all())


def test_without_debug_mode_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "DEBUG", False)
    x = torch.ones(2, 3)
    buffers.release([x])
    assert bool((x == 1).all())
