"""Compact tensors: half the space, the same numbers but for rounding, whatever their size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlm.store.compact import ERROR, pack, unpack
from mlm.store.tensors import load_tensors, save_tensors


def numbers(scale: float = 1.0, number: int = 5000) -> torch.Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-30, 1e9, 1e37])
def test_numbers_of_any_size_keep_eleven_bits(scale: float) -> None:
    tensor = numbers(scale)
    stored, packing = pack({"w": tensor})
    assert stored["w"].dtype == torch.float16
    again = unpack(stored, packing)["w"]
    assert again.dtype == torch.float32
    assert float(((again - tensor).abs() / tensor.abs()).max()) <= ERROR / 2


def test_what_would_lose_too_much_stays_float32() -> None:
    """Such as a Fisher of which most numbers are far below the largest."""
    tensor = numbers(1e-12)
    tensor[0] = 1.0
    stored, packing = pack({"rms": tensor})
    assert torch.equal(stored["rms"], tensor)
    assert torch.equal(unpack(stored, packing)["rms"], tensor)


def test_what_is_no_number_stays_as_it_is() -> None:
    tensor = torch.tensor([1.0, float("nan"), float("inf")])
    stored, packing = pack({"w": tensor})
    assert stored["w"] is tensor
    assert unpack(stored, packing)["w"] is tensor


def test_constant_tensors_take_no_space() -> None:
    tensors = {"low": torch.zeros(30, 40), "one": torch.ones(7), "scalar": torch.tensor(0.3)}
    tensors |= {"ids": torch.arange(5), "empty": torch.zeros(0, 3), "zero": torch.zeros(1)}
    stored, packing = pack(tensors)
    assert {"low", "one"}.isdisjoint(stored)
    again = unpack(stored, packing)
    assert list(again) == sorted(tensors)
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        torch.testing.assert_close(again[name], tensor, rtol=ERROR, atol=0)


def test_packing_twice_changes_nothing() -> None:
    once = unpack(*pack({"w": numbers(1e-3)}))
    assert torch.equal(unpack(*pack(once))["w"], once["w"])


def fisher(octaves: float = 8.0) -> torch.Tensor:
    """Positive numbers that lie within so many octaves, and a zero."""
    tensor = torch.exp2(torch.linspace(-octaves - 3, -3, 5000))
    tensor[7] = 0
    return tensor


def test_coarse_numbers_take_eight_bits() -> None:
    """Their logarithms are kept, so that small and large ones lose the same share."""
    tensor = fisher()
    stored, packing = pack({"rms": tensor, "w": tensor}, coarse=["rms"])
    assert stored["rms"].dtype == torch.uint8
    assert stored["w"].dtype == torch.float16
    again = unpack(stored, packing)["rms"]
    assert again.dtype == torch.float32
    assert again[7] == 0
    assert float(((again - tensor).abs()[tensor > 0] / tensor[tensor > 0]).max()) < 0.012
    twice = unpack(*pack({"rms": again}, coarse=["rms"]))["rms"]
    torch.testing.assert_close(twice, again, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "tensor",
    [fisher(60), -fisher(), numbers()],
    ids=["octaves", "negative", "both signs"],
)
def test_eight_bits_are_refused_where_they_are_too_few(tensor: torch.Tensor) -> None:
    again = unpack(*pack({"w": tensor}, coarse=["w"]))["w"]
    kept = tensor.abs() > float(tensor.abs().max()) * 2**-25
    torch.testing.assert_close(again[kept], tensor[kept], rtol=ERROR, atol=0)


def test_two_coarse_numbers_are_kept() -> None:
    tensor = torch.tensor([0.0, 0.3, 0.0])
    torch.testing.assert_close(unpack(*pack({"w": tensor}, coarse=["w"]))["w"], tensor)


def test_files_keep_some_tensors_in_less_space(tmp_path: Path) -> None:
    """Only those that are named; who reads the file notices nothing."""
    tensors = {"large": numbers(), "steps": numbers(number=3), "zeros": torch.zeros(4, 4)}
    path = tmp_path / "rule.safetensors"
    save_tensors(path, tensors, {"identity": "mine"}, packed=["large", "zeros"])
    kept = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert kept == {"large": torch.float16, "steps": torch.float32}
    again, about = load_tensors(path, "")
    assert about["identity"] == "mine"
    assert "packing" not in about
    assert torch.equal(again["steps"], tensors["steps"])
    torch.testing.assert_close(again["large"], tensors["large"], rtol=ERROR, atol=0)
    assert torch.equal(again["zeros"], tensors["zeros"])
