"""The fake CUDA device refuses what CUDA refuses, and accepts what it accepts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCudaTensor, fake_cuda
from torch import Tensor
from worlds import segments, tiny_base

from mlm import kernels
from mlm.reading.static import StaticReader
from mlm.runs.run import choose_device

Operation = Callable[[Tensor, Tensor], object]
"""Of a CUDA tensor (3, 4) and a CPU tensor of the same numbers."""


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The fake one."""
    with fake_cuda() as found:
        yield found


@pytest.fixture
def both() -> tuple[Tensor, Tensor]:
    """(on the device, on the CPU)."""
    here = torch.arange(12.0).view(3, 4)
    return here.to("cuda"), here


REFUSED: dict[str, Operation] = {
    "sum": lambda x, y: x + y,
    "sum in place": lambda x, y: x.add_(y),
    "the CPU's sum in place with one number": lambda x, y: y.add_(x[0, 0]),
    "product": lambda x, y: x @ y.T,
    "linear": lambda x, y: F.linear(y, x),
    "cat": lambda x, y: torch.cat([x, y]),
    "where": lambda x, y: torch.where(x > 1, x, y),
    "mask": lambda x, y: x.masked_fill(y > 1, 0.0),
    "gather": lambda x, y: x.gather(1, y.long() % 4),
    "embedding": lambda x, y: F.embedding(y.long() % 3, x),
    "index_select": lambda x, y: x.index_select(0, y.long().flatten() % 3),
    "the CPU's items by the device's index": lambda x, y: y[x.long()[0] % 3],
    "values of other devices": lambda x, y: x.__setitem__(x[:, 0] >= 0, y),
    "out": lambda x, y: torch.mul(x, x, out=y),
    "addcmul": lambda x, y: x.addcmul_(x, y),
    "equal": lambda x, y: torch.equal(x, y),
    "numpy": lambda x, y: x.numpy(),
    "the CPU's generator": lambda x, y: torch.rand(
        2, generator=torch.Generator().manual_seed(0), device=x.device
    ),
    "the device's generator": lambda x, y: torch.rand(2, generator=torch.Generator("cuda")),
    "noise in place": lambda x, y: x.normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name: str, both: tuple[Tensor, Tensor]) -> None:
    with pytest.raises((RuntimeError, TypeError), match="device"):
        REFUSED[name](*both)


ACCEPTED: dict[str, Operation] = {
    "one number": lambda x, y: x * y[1, 2],
    "one number first": lambda x, y: y[1, 2] - x,
    "where": lambda x, y: torch.where(x > 1, x, y[1, 2]),
    "index": lambda x, y: x[torch.tensor([2, 0])],
    "mask as an index": lambda x, y: x[y > 3],
    "mask with one number": lambda x, y: x.masked_fill(x > 3, y[0, 1]),
    "copy": lambda x, y: x.copy_(y + 1),
    "copy back": lambda x, y: y.copy_(x + 1),
    "set a row": lambda x, y: x.index_fill(0, torch.tensor([0], device=x.device), 2.0),
    "set by an index": lambda x, y: x.index_put((torch.tensor([1]),), y[2, 3]),
    "new": lambda x, y: x.new_zeros(2) + torch.ones(2, device="cuda") + torch.zeros_like(x)[0, :2],
    "tensor": lambda x, y: torch.tensor([1.0, 2.0], device=x.device) + x.new_tensor([3.0, 4.0]),
    "to another's place": lambda x, y: y.to(x) + x,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_cuda_accepts_gives_the_cpus_numbers(name: str, both: tuple[Tensor, Tensor]) -> None:
    there, here = both
    found = ACCEPTED[name](there.clone(), here.clone())
    same = torch.tensor([1.0, 2.0])
    if name in ("new", "tensor", "to another's place"):  # they name the device
        want = {"new": torch.ones(2), "tensor": same + same + 2, "to another's place": 2 * here}
        assert isinstance(found, FakeCudaTensor)
        assert torch.equal(found.cpu(), want[name])
        return
    want = ACCEPTED[name](here.clone(), here.clone())
    assert isinstance(found, Tensor)
    assert isinstance(want, Tensor)
    assert found.is_cuda == (name != "copy back")
    assert torch.equal(found.cpu(), want)


def test_a_tensor_says_where_it_is(both: tuple[Tensor, Tensor]) -> None:
    there, _ = both
    assert there.device == torch.device("cuda:0")
    assert there.is_cuda
    assert (there.t() @ there).device.type == "cuda"
    assert there.cpu().device.type == "cpu"
    assert there[1].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert float(there.sum()) == 66.0
    assert torch.rand(2, generator=torch.Generator("cuda"), device="cuda").is_cuda


def test_gradients_of_any_order_cross_devices(both: tuple[Tensor, Tensor]) -> None:
    there, here = (x.clone().requires_grad_() for x in both)
    loss = ((here.to("cuda") * there).sin().sum().cpu()) ** 2
    own, other = torch.autograd.grad(loss, [there, here], create_graph=True)
    assert own.is_cuda
    assert other.device.type == "cpu"
    (second,) = torch.autograd.grad(own.sum(), there)
    x, y = (both[1].clone().requires_grad_() for _ in range(2))
    (want,) = torch.autograd.grad((x * y).sin().sum() ** 2, x, create_graph=True)
    (want_second,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(own.detach().cpu(), want.detach())
    torch.testing.assert_close(second.cpu(), want_second)


def test_autocast_multiplies_in_bfloat16_and_adds_in_float32(both: tuple[Tensor, Tensor]) -> None:
    there, _ = both
    with torch.autocast("cuda", torch.bfloat16):
        product = there @ there.t()
        assert product.dtype == torch.bfloat16
        assert product.sum().dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (there @ there.t()).dtype == torch.float32
    assert (there @ there.t()).dtype == torch.float32


def test_a_model_on_cuda_is_read_in_full_precision_without_cudnns_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = tiny_base().to(choose_device("cuda"))
        (segment,) = segments(base, (7, 5), 2, 1)
        StaticReader(base, 2).read(segment.to(torch.device("cuda")))
    assert not torch.backends.cudnn.allow_tf32


def test_kernels_refuse_a_tensor_on_cuda(both: tuple[Tensor, Tensor]) -> None:
    there, here = both
    assert kernels.usable(here) == (kernels.numba is not None)
    assert not kernels.usable(there)
    assert not kernels.usable(here, there)
    with pytest.raises(TypeError, match="numpy"):
        kernels.share_out(lambda *_: None, 1, 1, there)
