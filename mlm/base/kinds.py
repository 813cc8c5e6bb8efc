"""Whether values from files and command lines are of the kinds that fields are annotated with."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_hints = functools.cache(get_type_hints)

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a table",
}


def kinds(tree: Any, path: str = "") -> dict[str, Any]:
    """The annotated types of a tree of dataclasses, by the paths of its leaves."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(tree):
        value, here = getattr(tree, field.name), f"{path}{field.name}"
        nested = dataclasses.is_dataclass(value)
        found |= kinds(value, f"{here}.") if nested else {here: _hints(type(tree))[field.name]}
    return found


def as_kind(kind: Any, value: Any) -> Any:
    """A value of a JSON file as one of this kind: lists are tuples, texts may be paths.

    What cannot be one stays as it is, for `type_problem` to name.
    """
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(as_kind(inner, one) for inner, one in _inner(kind, value))
    if Path in (kind, *get_args(kind)) and isinstance(value, str):
        return Path(value)
    return value


def _inner(kind: Any, value: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """The elements of a list with their kinds, as far as it has as many as its kind asks for."""
    kinds_of = get_args(kind)
    if Ellipsis in kinds_of:
        return zip(itertools.repeat(kinds_of[0]), value, strict=False)
    return zip(kinds_of, value, strict=False) if len(value) == len(kinds_of) else iter(())


def type_problem(kind: Any, value: Any) -> str | None:
    """What a value has to be instead, in words; None if it is of its kind."""
    if get_origin(kind) is Literal:
        of_kind = isinstance(value, str) and value in get_args(kind)
        return None if of_kind else f"choose from {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return "it must be a list"
        inner = list(_inner(kind, value))
        if Ellipsis not in get_args(kind) and len(value) != len(get_args(kind)):
            return f"it must be a list of {len(get_args(kind))}"
        return next(filter(None, (type_problem(*one) for one in inner)), None)
    if NoneType in get_args(kind):
        return None if value is None else type_problem(get_args(kind)[0], value)
    if kind in (str, Path):
        return _name_problem(kind, value)
    of_kind = type(value) is kind or (kind is float and type(value) is int)
    return None if of_kind else f"it must be {_NAMES[kind]}"


def _name_problem(kind: Any, value: Any) -> str | None:
    """Why a value is no text or path; texts are names of files, or of what files hold."""
    if not isinstance(value, kind):
        return "it must be a path" if kind is Path else "it must be text"
    try:
        bad = "\0" in str(value) or not os.fsencode(value)
    except UnicodeEncodeError:
        bad = True
    return "no file can have such a name here" if bad and str(value) else None


def shown(value: Any) -> str:
    """A value of any kind, at most a line of it."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
