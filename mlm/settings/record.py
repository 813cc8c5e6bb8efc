"""Settings: one frozen tree, every field with its meaning; presets; validation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlm.base.errors import UserError
from mlm.settings.checks import validate
from mlm.settings.config import Config


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as JSON-ready values (paths as strings, tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


PATHS = ("out", "init", "through_run")
"""Settings that are paths, where they are set."""


def _build(kind: Any, default: Any, values: dict[str, Any], where: str) -> Any:
    changes: dict[str, Any] = {}
    names = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in names:
            raise UserError(
                f"config.json: unknown setting {where}{name}; was it made by a newer mlm?"
            )
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            value = _build(type(old), old, value, f"{where}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and (isinstance(old, Path) or name in PATHS):
            value = Path(value)
        changes[name] = value
    return dataclasses.replace(default, **changes)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
        UserError: a setting this version does not know.
    """
    return validate(_build(Config, Config(), values, ""))
