"""A CUDA device that is none: tensors that say `cuda:0`, hold CPU data, and refuse what CUDA does.

Inside `fake_cuda()` programs run as on a machine with one GPU: `device="cuda"` is understood, and
an operation between tensors of the two devices fails unless real CUDA accepts it. So are found, on
a CPU, a tensor made on the wrong device, a random generator of the wrong device, `.numpy()` of a
GPU's tensor, and a compiled CPU kernel that is handed one. What it cannot find: rounding, speed,
memory, and operations that CUDA lacks.

A tensor whose C++ device is CUDA cannot have a gradient where PyTorch is built without CUDA
(autograd asks for the device's streams). So it is "meta" there, which autograd takes for granted,
and "cuda:0" for everybody who asks in Python; inside the block nothing else may be on "meta".
Autocast, which asks in C++, is done here: products in bfloat16, softmax and sums in float32.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
CPU = torch.device("cpu")
MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
    "cpu! (in {})"
)

CPU_SCALARS = """
    add sub rsub mul div true_divide floor_divide remainder fmod pow atan2 logaddexp logaddexp2
    maximum minimum fmax fmin eq ne lt le gt ge logical_and logical_or logical_xor bitwise_and
    bitwise_or bitwise_xor hypot copysign xlogy
""".split()  # noqa: SIM905
"""Binary operations; of theirs, one operand may be a CPU tensor without dimensions
(`TensorIteratorConfig::allow_cpu_scalars`), unless it is what is written."""


class FakeCudaTensor(torch.Tensor):
    """A tensor on the fake device; `held` is the CPU tensor that holds its data."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> FakeCudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),  # type: ignore[arg-type]
            dtype=inner.dtype,
            device=META,
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor without its history."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: FakeCudaTensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def get_device(self) -> int:
        """Its number."""
        return 0

    def data_ptr(self) -> int:
        """Of its data."""
        return self.held.data_ptr()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {CUDA}"


# -- operations ---------------------------------------------------------------------------------


def _compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU data, refused where CUDA refuses it."""
    wanted = kwargs.get("device")
    there = wanted is None or _meant(wanted) == META
    mine: dict[int, Any] = {}
    plain: list[Tensor] = []

    def lowered(x: Any) -> Any:
        if isinstance(x, FakeCudaTensor):
            mine[id(x.held)] = x
            return x.held
        if isinstance(x, Tensor):
            plain.append(x)
        return [lowered(y) for y in x] if isinstance(x, list | tuple) else x

    inner = [lowered(x) for x in args]
    more = {key: lowered(x) for key, x in kwargs.items()}
    if not mine and (wanted is None or not there):
        return func(*args, **kwargs)
    if mine and plain:
        _check_devices(func, args, plain)
    if wanted is not None:
        more["device"] = CPU
    found = func(*inner, **more)
    if torch.Tag.inplace_view in func.tags:  # of the wrapper, too
        with no_dispatch():
            func(*args, **kwargs)
    if func._schema.is_mutable and any(x.held.shape != x.shape for x in mine.values()):
        raise NotImplementedError(f"{func} resizes a tensor on the fake device")
    mine |= {id(x): x for x in plain}

    def wrapped(x: Any) -> Any:
        if isinstance(x, Tensor):
            known = mine.get(id(x))
            return known if known is not None else FakeCudaTensor(x) if there else x
        return type(x)(map(wrapped, x)) if isinstance(x, list | tuple) else x

    return wrapped(found)


def _on_cpu(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeCudaTensor)


def _check_devices(func: Any, args: Sequence[Any], plain: list[Tensor]) -> None:
    """Refuse an operation on tensors of both devices, unless CUDA accepts it."""
    packet = func.overloadpacket.__name__
    name, writes = packet.rstrip("_"), packet.endswith("_")
    scalars = all(x.dim() == 0 for x in plain)
    accepted = False
    if name in ("copy", "_to_copy"):
        accepted = True
    elif name in ("index", "_unsafe_index"):  # indices may lie on the CPU, the indexed may not
        accepted = not _on_cpu(args[0])
    elif name in ("index_put", "_index_put_impl", "_unsafe_index_put"):
        value = args[2]
        accepted = not _on_cpu(args[0]) and (not _on_cpu(value) or value.dim() == 0)
    elif name in ("masked_fill", "fill"):  # the value may, if it is one number
        accepted = not any(map(_on_cpu, args[:-1])) and scalars
    elif name == "where":
        accepted = scalars
    elif name in CPU_SCALARS:
        outs = [args[0]] if writes else []
        accepted = scalars and len(plain) == 1 and not any(map(_on_cpu, outs))
    if not accepted:
        raise RuntimeError(MIXED.format(func))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


# -- calls --------------------------------------------------------------------------------------

_Generator = torch.Generator


class FakeGenerator(_Generator):
    """A random generator of either device; the numbers are the CPU's."""

    where: torch.device

    def __new__(cls, device: Any = "cpu") -> FakeGenerator:
        made = super().__new__(cls)
        made.where = CUDA if torch.device(device).type == "cuda" else CPU
        return made

    device = property(lambda self: self.where)  # type: ignore[assignment]

    def manual_seed(self, seed: int) -> FakeGenerator:
        """The same generator, sown."""
        super().manual_seed(seed)
        return self

    def set_state(self, new_state: Tensor) -> FakeGenerator:
        """The same generator, in a state that lies on the CPU for either device."""
        if isinstance(new_state, FakeCudaTensor):
            raise TypeError("RNG state must be a torch.ByteTensor")
        super().set_state(new_state)
        return self


def _named(*places: Any, names: str) -> frozenset[Any]:
    """Functions by their names, of every place that has them."""
    found = (getattr(place, name, None) for place in places for name in names.split())
    return frozenset(call for call in found if call is not None)


LOWER = _named(
    torch, Tensor, F,
    names="matmul __matmul__ __rmatmul__ mm bmm mv addmm baddbmm linear lstm gru lstm_cell",
)  # fmt: skip
"""In bfloat16 under autocast."""
UPPER = _named(
    torch, Tensor, F,
    names="cross_entropy nll_loss log_softmax softmax logsumexp exp log sum pow norm cumsum prod",
)  # fmt: skip
"""In float32 under autocast."""
_DATA = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_ITEMS = (Tensor.__getitem__, Tensor.__setitem__)
_NUMPY = (Tensor.numpy, Tensor.__array__)


class _Calls(TorchFunctionMode):
    """What does not get through to operations: factories, `.to`, `.numpy`, generators, autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast: list[torch.dtype | None] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        first = args[0] if args else None
        fake = isinstance(first, FakeCudaTensor)
        if func in _NUMPY and fake:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if func is Tensor.tolist and fake:
            return first.cpu().tolist()
        if func is Tensor.cuda:
            func, args = Tensor.to, (first, CUDA)
        if func in _ITEMS and fake:
            args = (first, _indices(args[1]), *args[2:])
        if func in _DATA:
            return self._data(func, args, kwargs)
        args = tuple(map(_meant, args))
        kwargs = {key: _meant(x) for key, x in kwargs.items()}
        generator = kwargs.get("generator")
        if generator is not None:
            _check_generator(generator, fake or kwargs.get("device") == META)
        if self.autocast and self.autocast[-1] is not None:
            args, kwargs = self._cast(func, args, kwargs)
        elif func is torch.lstm and fake:
            _warn_of_weights(args)
        return func(*args, **kwargs)

    def _data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A tensor of Python's numbers."""
        device = kwargs.pop("device", None)
        if func is Tensor.new_tensor:
            like, args = args[0], args[1:]
            device = like.device if device is None else device
            func = torch.tensor
            kwargs.setdefault("dtype", like.dtype)
        if args and isinstance(args[0], FakeCudaTensor):
            return args[0].to(**kwargs) if device is None else args[0].to(_meant(device), **kwargs)
        found = func(*args, **kwargs)
        return found.to(META) if device is not None and _meant(device) == META else found

    def _cast(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Arguments as autocast hands them on."""
        wanted = self.autocast[-1] if func in LOWER else torch.float32 if func in UPPER else None

        def cast(x: Any) -> Any:
            ready = isinstance(x, FakeCudaTensor) and x.dtype in (torch.float32, torch.bfloat16)
            return x.to(wanted) if ready and wanted is not None else x

        return tree_map(cast, (args, kwargs))


def _indices(index: Any) -> Any:
    """Lists among indices as tensors, which C++ would make on "meta", without data."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list | np.ndarray) else index


def _meant(x: Any) -> Any:
    """CUDA in the words of PyTorch's C++ part."""
    if isinstance(x, torch.device) and x.type == "cuda":
        return META
    return META if isinstance(x, str) and x in ("cuda", "cuda:0") else x


def _check_generator(generator: Any, there: bool) -> None:
    its = getattr(generator, "where", CPU).type
    if its != ("cuda" if there else "cpu"):
        want = "cuda" if there else "cpu"
        raise RuntimeError(f"Expected a '{want}' device type for generator but found '{its}'")


def _warn_of_weights(args: tuple[Any, ...]) -> None:
    """cuDNN's warning of weights that do not lie side by side."""
    places = {weight.held.untyped_storage().data_ptr() for weight in args[2]}
    if len(places) > 1:
        warnings.warn(
            "RNN module weights are not part of single contiguous chunk of memory. This means they "
            "need to be compacted at every call, possibly greatly increasing memory usage. To "
            "compact weights again call flatten_parameters().",
            UserWarning,
            stacklevel=2,
        )


def _autocast(calls: _Calls) -> Callable[..., Any]:
    real = torch.autocast

    @contextlib.contextmanager
    def on_device(dtype: torch.dtype | None, enabled: bool) -> Iterator[None]:
        calls.autocast.append((dtype or torch.float16) if enabled else None)
        try:
            yield
        finally:
            calls.autocast.pop()

    def autocast(device_type: str, dtype: Any = None, enabled: bool = True, **more: Any) -> Any:
        if device_type != "cuda":
            return real(device_type, dtype, enabled, **more)
        return on_device(dtype, enabled)

    return autocast


BYTES = 1 << 37
"""Of the fake device's memory, all of it free."""


def _queries() -> Mapping[str, Any]:
    """Of `torch.cuda`, what programs ask."""
    properties = types.SimpleNamespace(name="fake", total_memory=BYTES, multi_processor_count=1)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "fake",
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "mem_get_info": lambda device=None: (BYTES, BYTES),
    }


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """One GPU, inside the block."""
    calls = _Calls()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **_queries()))
        absent = mock.patch.object(torch.backends.cudnn, "is_acceptable", return_value=False)
        stack.enter_context(absent)
        stack.enter_context(mock.patch.object(torch, "Generator", FakeGenerator))
        stack.enter_context(mock.patch.object(torch, "autocast", _autocast(calls)))
        stack.enter_context(_Operations())
        stack.enter_context(calls)
        yield torch.device("cuda")
