"""Every setting has a kind and, where it holds numbers, a range; both are asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from mlm.base.errors import UserError
from mlm.base.kinds import kinds, type_problem
from mlm.settings.checks import range_of, validate
from mlm.settings.config import Config
from mlm.settings.flags import flag, leaves, replaced
from mlm.settings.record import from_dict, missing, to_dict

KINDS = kinds(Config())


def numeric(path: str) -> type | None:
    """int or float, if the setting holds such numbers."""
    found = [kind for kind in (KINDS[path], *get_args(KINDS[path])) if kind in (int, float)]
    return found[0] if found else None


NUMBERS = [path for path in KINDS if numeric(path)]


def like(path: str, number: float) -> Any:
    """The number as a value of this setting."""
    several = get_origin(KINDS[path]) is tuple
    return tuple(number for _ in leaves(Config())[path]) if several else number


def in_file(path: str, value: Any) -> dict[str, Any]:
    """What config.json says of the default settings, with another value at `path`."""
    values = to_dict(Config())
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[name] = str(value) if isinstance(value, Path) else value
    return json.loads(json.dumps(values))


def refused(path: str, value: Any) -> str:
    """How a value is refused, from Python and from a file alike."""
    with pytest.raises(UserError) as from_python:
        validate(replaced(Config(), {path: value}))
    with pytest.raises(UserError) as from_file:
        from_dict(in_file(path, list(value) if isinstance(value, tuple) else value))
    parts = [str(error.value).partition("; ") for error in (from_python, from_file)]
    assert parts[0][2] == parts[1][2]
    assert parts[0][0].startswith(f"{flag(path)} is ")
    return str(from_file.value)


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_range_that_is_asked_for(path: str) -> None:
    """Both ends, what is beyond them, and what is no number."""
    allowed = range_of(path)
    assert allowed is not None, f"{path} has no range in mlm/settings/checks.py"
    assert -math.inf < allowed.low < allowed.high < math.inf
    usual = leaves(Config())[path]
    assert all(map(allowed.holds, usual if isinstance(usual, tuple) else (usual,)))
    outside: list[float] = [allowed.low - 1, allowed.high + 1]
    if numeric(path) is float:
        outside = [math.nan, math.inf, -math.inf, -1e9, 1e30, allowed.high * 1.001]
        outside += [allowed.low] * allowed.open_low + [allowed.high] * allowed.open_high
    for number in outside:
        assert "must be" in refused(path, like(path, number))


WRONG: tuple[Any, ...] = ("many", True, 2.5, 3, None, ["x"], {"a": 1}, [], "", "a\0b", "\ud800")


@pytest.mark.parametrize("path", KINDS)
def test_every_setting_refuses_values_of_other_kinds(path: str) -> None:
    kind, refusals = KINDS[path], 0
    for value in WRONG:
        given = tuple(value) if isinstance(value, list) else value
        given = Path(value) if isinstance(value, str) and Path in (kind, *get_args(kind)) else given
        problem = type_problem(kind, given)
        if problem is not None:
            refusals += 1
            assert problem in refused(path, given)
    assert refusals >= 5
    if get_origin(kind) is Literal:
        assert "choose from" in refused(path, "nonsense")


def test_each_problem_names_its_value_and_what_it_must_be() -> None:
    assert refused("lm.through_rate", 1e30) == (
        "--lm.through-rate is 1e+30; it must be above 0 and at most 1,000"
    )
    assert refused("lm.ar", -1e9).startswith("--lm.ar is -1000000000.0; it must be at least 0")
    assert refused("model.layers", 10**9) == (
        "--layers is 1000000000; it must be at least 1 and at most 256"
    )
    assert refused("text.held_out", 1.0) == "--text.held-out is 1.0; it must be in (0, 1)"
    assert refused("meta.fisher", "gone").endswith("; choose from feature, flush, off")
    assert refused("lm.lanes", True) == "--lanes is True; it must be a whole number"
    assert refused("corpus", "a\0b").endswith("; no file can have such a name here")


def test_a_file_is_a_tree_of_tables_of_known_settings() -> None:
    for values in ([], None, "x", 5, {"lm": 5}, {"lm": []}, {"wings": 2}, {"lm": {"wings": 2}}):
        with pytest.raises(UserError, match=r"must be a table of settings|unknown setting"):
            from_dict(values)


def test_what_a_file_does_not_say_is_known() -> None:
    values = to_dict(Config())
    assert missing(values) == []
    assert from_dict(values) == Config()
    del values["seed"], values["lm"]["ar"], values["extensions"]
    assert missing(values) == ["seed", "lm.ar", "extensions"]
    assert from_dict(values) == Config()
