"""Public names of a package that are loaded when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, so that importing it or a light module is quick.

    Args:
        homes: names that a module of the package defines, separated by spaces, by that module.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}
    here = sys.modules[package]

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(here, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(here), *home})

    return __getattr__, __dir__
