"""Files written tensor by tensor: what the library would have written, read back by it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from mlm.store.released import BLANK
from mlm.store.streaming import TYPES, write_signed


def _tensors() -> dict[str, torch.Tensor]:
    found = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in TYPES}
    found |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3)}
    return found | {"strided": torch.arange(12.0).view(3, 4).t()}


def test_the_tensors_and_what_is_said_of_them_come_back(tmp_path: Path) -> None:
    path, tensors = tmp_path / "some.safetensors", _tensors()
    write_signed(path, tensors, {"sum": BLANK, "é": [1]})
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
        about = json.loads(file.metadata()["mlm"])
    data = path.read_bytes().replace(about["sum"].encode(), BLANK.encode(), 1)
    assert about == {"sum": hashlib.sha256(data).hexdigest(), "é": [1]}


def test_the_bytes_of_the_tensors_are_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    kinds = ("torch.float32", "torch.float64", "torch.bool")
    tensors = {n: t for n, t in _tensors().items() if str(t.dtype) in kinds}
    write_signed(path, tensors, {})
    ours, its = path.read_bytes(), save({n: t.contiguous() for n, t in tensors.items()})
    bodies = [data[8 + int.from_bytes(data[:8], "little") :] for data in (ours, its)]
    assert bodies[0] == bodies[1]


def test_a_type_that_is_not_kept_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    with pytest.raises(KeyError):
        write_signed(path, {"odd": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not path.exists()
