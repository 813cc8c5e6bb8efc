"""Tensors with a JSON description in safetensors files: atomic to write, checked when read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.files import MARK, atomic_path, parse_json
from mlm.base.kinds import as_kind, shown, type_problem
from mlm.base.processes import ranks
from mlm.base.terminal import note
from mlm.store.compact import pack, unpack
from mlm.store.released import BLANK, is_released
from mlm.store.streaming import write_signed
from mlm.store.versions import differences, written_now


class DamagedCheckpoint(UserError):
    """A file whose content cannot be right."""


CHECKSUM = "checksum"
"""Of the whole file, in its description; computed with `BLANK` in its place."""

_CHUNK = 1 << 20


def save_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    of_model: bool = False,
    packed: Collection[str] = (),
    coarse: Collection[str] = (),
    keep_previous: bool = False,
) -> None:
    """Write tensors and a JSON description to a safetensors file, atomically.

    What was written is read back before it takes the file's place. Of several processes the first
    writes its tensors.

    Args:
        of_model: it depends on nothing but the language model (`mlm.store.versions`).
        packed: names of those to keep in less space, less exactly (`mlm.store.compact`).
        coarse: names of those among them that are kept in eight bits.
        keep_previous: the file that is there stays, as `previous(path)`.

    Raises:
        UserError: what is read back differs from what was written.
    """
    own = (path, tensors, about, of_model, packed, coarse, keep_previous)
    ranks().on_first(lambda: _save(*own))


def _save(
    path: Path,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    of_model: bool,
    packed: Collection[str],
    coarse: Collection[str],
    keep_previous: bool,
) -> None:
    """What `save_tensors` does, in one process."""
    plain = dict(tensors)
    about = {**about, **written_now(of_model, plain), CHECKSUM: BLANK}
    if packed:
        less, about["packing"] = pack({n: plain.pop(n).detach().cpu() for n in packed}, coarse)
        plain |= less
    with atomic_path(path) as temporary:
        write_signed(temporary, plain, about)
        try:
            _checked(temporary)
        except ValueError as error:
            raise UserError(
                f"{path} was not written: what came back from the disk differs ({error}). Check "
                "disk and memory, or choose another folder; files already complete are kept"
            ) from None
        if keep_previous and path.exists():
            _keep(path)


def _header(file: IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The header of an open safetensors file, and what the file says about itself.

    Raises:
        ValueError: it has none.
        KeyError: it says nothing.
    """
    start = file.read(8)
    length, size = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size
    if len(start) < 8 or length > size - 8:
        raise ValueError("cut short")
    head = start + file.read(length)
    about = parse_json(parse_json(head[8:])["__metadata__"]["mlm"])
    if not isinstance(about, dict):
        raise ValueError("no description")
    return head, about


def _checked(path: Path) -> tuple[dict[str, Any], str]:
    """What a file says about itself, and the checksum of all its bytes.

    Raises:
        ValueError: they are not those that were written.
        KeyError, TypeError: it is another kind of file.
    """
    with open(path, "rb") as file:
        head, about = _header(file)
        said = about.get(CHECKSUM)
        if isinstance(said, str) and len(said) == len(BLANK):
            head = head.replace(said.encode(), BLANK.encode(), 1)
        digest = hashlib.sha256(head)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if said is None:
        last = next(reversed(about.values()), None)
        if isinstance(last, str) and len(last) == len(BLANK):  # its name was damaged
            raise ValueError("its checksum has no name")
        if not is_released(path.parent.parent):  # there config.json holds the checksums
            note(f"{path} has no checksum, so that damage to it would go unnoticed")
    elif found != said:
        raise ValueError("its checksum does not match its content")
    return about, found


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _keep(path: Path) -> None:
    """Give the file at `path` the name `previous(path)` besides, where links are known."""
    link = path.with_name(f".{path.name}{MARK}kept")
    with suppress(OSError):
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous(path))


def damaged(path: Path, why: object) -> DamagedCheckpoint:
    """The message about a file whose content cannot be right, with the ways out."""
    before, other = previous(path), ""
    with suppress(OSError, ValueError, KeyError, TypeError):
        _checked(before)
        other = f", or put the checkpoint before it in its place: {before}"
    return DamagedCheckpoint(f"{path} is damaged ({why}); delete it and run its stage again{other}")


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file that `save_tensors` wrote, and what it says about itself."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise UserError(f"{path} is missing: {what}")
    try:
        about, checksum = _checked(path)
        with safe_open(path, framework="pt") as file:
            other = differences(about, file.keys())
            if other:
                way = "install that version" if "packing" in about else "run its stage again"
                raise UserError(f"{path} was written by another version of mlm ({other}); {way}")
            yield file, about | {CHECKSUM: checksum}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from None


def load_about(path: Path, what: str) -> dict[str, Any]:
    """What a file that `save_tensors` wrote says about itself, and its `CHECKSUM`.

    Raises:
        UserError: missing or damaged (its bytes are not those written), with what makes it.
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


def load_latest(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote last, or before that if the last file is damaged.

    The sound file then takes the place of the damaged one.

    Raises:
        UserError: missing, or damaged both.
    """
    if ranks().world > 1:
        ranks().on_first(lambda: _load_latest(path, what) and None)
    return _load_latest(path, what)


def _load_latest(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `load_latest` does, in one process."""
    try:
        return load_tensors(path, what)
    except DamagedCheckpoint as error:
        before = previous(path)
        try:
            found = load_tensors(before, what)
        except UserError:
            raise error from None
        os.replace(before, path)
        note(f"{str(error).partition(';')[0]}; going on from the checkpoint before it")
        return found


def entry(path: Path, about: Mapping[str, Any], name: str, kind: Any) -> Any:
    """An entry of a file's description, of this annotated type.

    Raises:
        UserError: it is not there, or of another type.
    """
    value = as_kind(kind, about.get(name))
    problem = type_problem(kind, value)
    if problem:
        raise damaged(path, f"{name} is {shown(value)}; {problem}")
    return value


@contextmanager
def going_on_from(path: Path) -> Iterator[None]:
    """Take over what a file holds; what does not fit is damaged, or of another version.

    Raises:
        UserError: instead of the errors of what cannot be taken over.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise damaged(path, f"or another version of mlm wrote it: {e}") from None


def fitting(
    tensors: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
    prefix: str = "",
    lanes: int | None = None,
) -> dict[str, Tensor]:
    """The tensors `prefix` + name for all names of `like`, each of its shape and kind.

    Args:
        lanes: so many lanes have the tensors, whatever `like` has; None = as many.

    Raises:
        KeyError, ValueError: one is missing or does not fit.
    """
    found = {name: tensors[prefix + name] for name in like}
    for name, tensor in like.items():
        shape = tensor.shape if lanes is None else (lanes, *tensor.shape[1:])
        if (found[name].shape, found[name].dtype) != (shape, tensor.dtype):
            raise ValueError(f"{prefix}{name} has another shape or kind")
    return found


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not what a model or a rule computes with.

    Args:
        sizes: those that must be there, in floating point, by name.

    Raises:
        UserError: one is missing, of another shape or kind, or not finite.
    """
    for name, size in sizes.items():
        if name not in tensors:
            raise damaged(path, f"{name} is missing")
        found = tensors[name]
        if tuple(found.shape) != tuple(size):
            raise damaged(path, f"{name} has the shape {tuple(found.shape)}, not {tuple(size)}")
        if not found.is_floating_point():
            raise damaged(path, f"{name} holds {str(found.dtype).removeprefix('torch.')}")
    for name, found in tensors.items():
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise damaged(path, f"{name} is not finite")
