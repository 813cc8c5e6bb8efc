"""The tree of settings as JSON, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, get_type_hints

from mlm.base.errors import UserError
from mlm.base.kinds import as_kind
from mlm.settings.checks import validate
from mlm.settings.config import Config


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as JSON-ready values (paths as strings, tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _build(default: Any, values: Any, where: str) -> Any:
    """A section of the tree from what a file says of it."""
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'config'} must be a table of settings")
    hints = get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in {field.name for field in dataclasses.fields(default)}:
            raise UserError(
                f"unknown setting {where}{name}; leave it out, or use the mlm that wrote it"
            )
        old = getattr(default, name)
        nested = dataclasses.is_dataclass(old)
        changes[name] = (
            _build(old, value, f"{where}{name}.") if nested else as_kind(hints[name], value)
        )
    return dataclasses.replace(default, **changes)


def from_dict(values: Any) -> Config:
    """The inverse of `to_dict`. Settings that are not there have their defaults (`missing`).

    Raises:
        UserError: a setting this version does not know, of another kind, or out of its range.
    """
    return validate(_build(Config(), values, ""))


def missing(values: Mapping[str, Any], default: Any = None, where: str = "") -> list[str]:
    """Paths of the settings that a table of settings lacks."""
    found: list[str] = []
    default = Config() if default is None else default
    for field in dataclasses.fields(default):
        old, here = getattr(default, field.name), f"{where}{field.name}"
        if field.name not in values:
            found.append(here)
        elif dataclasses.is_dataclass(old):
            found += missing(values[field.name], old, f"{here}.")
    return found
