"""Tensors with a JSON description in safetensors files: atomic to write, checked when read."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.files import atomic_path
from mlm.store.compact import pack, unpack
from mlm.store.versions import differences, written_now


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    of_model: bool = False,
    packed: Collection[str] = (),
) -> None:
    """Write tensors and a JSON description to a safetensors file, atomically.

    Args:
        of_model: it depends on nothing but the language model (`mlm.store.versions`).
        packed: names of those to keep in less space, less exactly (`mlm.store.compact`).
    """
    from safetensors.torch import save

    plain = {n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}
    about = {**about, **written_now(of_model, plain)}
    if packed:
        less, about["packing"] = pack({n: plain.pop(n) for n in packed})
        plain |= less
    body = save(plain, metadata={"mlm": json.dumps(about)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(body)


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file that `save_tensors` wrote, and what it says about itself."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise UserError(f"{path} is missing: {what}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["mlm"])
            other = differences(about, file.keys())
            if other:
                way = "install that version" if "packing" in about else "run its stage again"
                raise UserError(f"{path} was written by another version of mlm ({other}); {way}")
            yield file, about
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run its stage again") from None


def load_about(path: Path, what: str) -> dict[str, Any]:
    """What a file that `save_tensors` wrote says about itself; its tensors are not read.

    Raises:
        UserError: missing or damaged (a file that was cut off is), with what makes it.
    """
    with _opened(path, what) as (_, about):
        return about


def load_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        UserError: missing or damaged, with what makes it.
    """
    with _opened(path, what) as (file, about):
        # Cloned: a tensor in the mapped file lies unaligned, and kernels then round otherwise.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        packing = about.pop("packing", None)
        return (tensors if packing is None else unpack(tensors, packing)), about
