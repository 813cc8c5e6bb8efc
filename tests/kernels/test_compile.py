"""Compiled code is kept from process to process, for as long as it is what would be compiled."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlm import kernels
from mlm.kernels import compile, ngram, recurrent, softmax, update
from mlm.kernels.compile import compiled_in
from mlm.rules import moments

pytestmark = pytest.mark.skipif(kernels.numba is None, reason="numba is not installed")

KERNEL = """
import constants_of_a_test
from constants_of_a_test import SIZE, grown
from mlm.kernels.compile import jit

@jit
def kernel(x):
    return grown(x) * SIZE + constants_of_a_test.OTHER
"""
CONSTANTS = """
from mlm.kernels.compile import jit
SIZE, OTHER = {size}, {other}

@jit
def grown(x):
    return x + {more}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Write a kernel and, in another file, what it is made of; import both as in a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kernel_of_a_test.py").write_text(KERNEL)

    def again(size: int, other: int, more: int) -> ModuleType:
        text = CONSTANTS.format(size=size, other=other, more=more)
        (tmp_path / "constants_of_a_test.py").write_text(text)
        for name in ("kernel_of_a_test", "constants_of_a_test"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return importlib.import_module("kernel_of_a_test")

    return again


def test_what_another_file_gives_is_compiled_anew(load: Callable[..., ModuleType]) -> None:
    for size, other, more in ((2, 5, 1), (3, 5, 1), (3, 6, 1), (3, 6, 2), (2, 5, 1)):
        found = load(size, other, more)
        assert found.kernel(10) == (10 + more) * size + other
    assert sum(found.kernel.stats.cache_hits.values()) == 1, "as it was at first"


def test_a_constant_of_another_module_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(k for k in vars(moments).values() if "TILE" in _names(k))
    before, own = compiled_in(kernel), compiled_in(kernels.relax)
    monkeypatch.setattr(moments, "TILE", moments.TILE + 1)
    assert compiled_in(kernel) != before
    assert compiled_in(kernels.relax) == own
    monkeypatch.setattr(update, "TILE", update.TILE + 1)
    assert compiled_in(kernels.relax) != own


def _names(kernel: object) -> tuple[str, ...]:
    """What a kernel takes from its module."""
    function = getattr(kernel, "py_func", None)
    return function.__code__.co_names if function is not None else ()


def _compiled(module: ModuleType) -> dict[str, Any]:
    """The compiled functions that a module names."""
    return {n: f for n, f in vars(module).items() if hasattr(f, "targetoptions")}


@pytest.mark.parametrize("module", [compile, ngram, recurrent, softmax, update, moments])
def test_what_a_kernel_calls_is_in_its_own_code(module: ModuleType) -> None:
    """Else it depends on what else the process has compiled how a kernel rounds."""
    known = _compiled(module)
    for name, kernel in known.items():
        for part in set(_names(kernel)) & known.keys():
            assert known[part].targetoptions["forceinline"], (name, part)


ROUNDING = """
import hashlib, numpy as np
from mlm.kernels import compile, ngram, recurrent, softmax, update
draw = np.random.default_rng(0).random
one, two = (draw((3, 330), np.float32) for _ in range(2))
rows = [draw(size, np.float32) for size in ((3, 330), (330,), (4, 330), (4, 3))]
out = np.empty((2, 3, 330), np.float32)
update.relax_both(0, 1, one, two, *rows, *out)
print(hashlib.sha256(out.tobytes()).hexdigest(), sum(update.relax_both.stats.cache_hits.values()))
"""


@pytest.mark.slow
def test_a_kernel_from_the_cache_rounds_as_the_one_just_compiled(tmp_path: Path) -> None:
    """330 weights: the last of them fill no vector."""
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", ROUNDING],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout.split())
    assert [hits for _, hits in said] == ["0", "1"]
    assert said[0][0] == said[1][0]
