"""No number moves: rules, extensions, meta-gradients and trainers against `golden.json`.

On the machine that wrote the file every byte must be the same, on others (and where kernels are
compiled in this process) the numbers to 1e-6 of their size; see `stored`. A change that is meant to
move numbers writes the file anew (`make`).
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from fake_cuda import fake_cuda

from .stored import allowed, differences, entries, kernels_from_cache, load, machine
from .world import CASES, ENGINES, compute, computed_on


@functools.cache
def _stored() -> dict[str, Any]:
    return load()


def test_the_file_has_all_cases() -> None:
    assert list(_stored()["cases"]) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_no_number_moved(name: str) -> None:
    stored, found = _stored()["cases"][name], entries(compute(name))
    bits = _stored()["machine"] == machine() and kernels_from_cache()
    moved = differences(found, stored, bits, allowed(name))
    assert not moved, "\n".join([f"{name}, by {'bytes' if bits else 'numbers'}:", *moved])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_number_is_another_on_cuda(name: str) -> None:
    compiled = f"/{ENGINES[0]}"
    stored = {n: e for n, e in _stored()["cases"][name].items() if not n.endswith(compiled)}
    with fake_cuda() as device, computed_on(device):
        found = entries(compute(name))
    moved = differences(found, stored, False, allowed(name))
    assert not moved, "\n".join([f"{name}, on CUDA:", *moved])
