"""Tables of the documentation that are made from the code: settings, presets, error messages.

`benchmarks.readme` puts them between markers, as it does with run files:

    <!-- settings: SECTION -->     the flags of a section of `Config`; `run` = those of no section
    <!-- presets: NAME ... -->     the settings in which these presets differ
    <!-- errors: PATH ... -->      every message of a `UserError` in these folders or files
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mlm.settings.config import Config
from mlm.settings.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
RUN = "run"
"""The section of the settings that have none."""


class Setting(NamedTuple):
    """One flag of the command line."""

    section: str
    flag: str
    values: str
    default: Any
    meaning: str


def _meanings(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _values(hint: Any) -> str:
    """What a flag takes, for a reader."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if kind in (Union, types.UnionType):
        return ", ".join(_values(one) for one in inner if one is not type(None))
    if kind is tuple:
        return f"several of: {_values(inner[0])}"
    names = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def settings(
    kind: type = Config, value: Any = None, section: str = "", prefix: str = ""
) -> Iterator[Setting]:
    """Every setting of a tree of dataclasses, in its order."""
    value = value or kind()
    hints, meanings = get_type_hints(kind), _meanings(kind)
    for field in dataclasses.fields(kind):
        own = getattr(value, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(own):
            yield from settings(type(own), own, section or field.name, f"{flag}.")
        else:
            meaning = meanings.get(field.name, "").replace("<", "&lt;")
            yield Setting(section or RUN, f"--{flag}", _values(hints[field.name]), own, meaning)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"`{one}`" for one in value)
    return f"{value:,}" if isinstance(value, int) else f"`{value}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def settings_table(section: str) -> list[str]:
    """The flags of a section with what they take, their defaults and meanings."""
    rows = [s for s in settings() if s.section == section]
    lines = ["| flag | takes | default | meaning |", "| :-- | :-- | :-- | :-- |"]
    return lines + [_row(f"`{s.flag}`", s.values, _shown(s.default), s.meaning) for s in rows]


def presets_table(*names: str) -> list[str]:
    """The settings in which the presets differ, one column each."""
    columns = [{s.flag: s.default for s in settings(value=PRESETS[name])} for name in names]
    lines = [_row("flag", *(f"`{name}`" for name in names)), f"|{' :-- |' * (1 + len(names))}"]
    for flag in columns[0]:
        values = [_shown(column[flag]) for column in columns]
        if flag != "--preset" and len(set(values)) > 1:
            lines.append(_row(f"`{flag}`", *values))
    return lines


def _template(node: ast.expr) -> str | None:
    """The text of a message, … standing for what is filled in; None = it is made elsewhere."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
        return "".join(str(part) for part in parts)
    return None


def messages(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, message) of every `UserError` in a file, or below a folder, whose text is there."""
    for file in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            made = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"
            if made and node.args and (text := _template(node.args[0])) is not None:
                yield file, " ".join(text.split())


def errors_table(*folders: str) -> list[str]:
    """Every message below some folders, with the file that raises it."""
    lines = ["| message | raised in |", "| :-- | :-- |"]
    for folder in folders:
        for file, text in messages(ROOT / folder):
            plain = text.replace("<", "&lt;").replace("`", "'").replace("*", r"\*")
            lines.append(_row(plain, f"`{file.relative_to(ROOT).as_posix()}`"))
    return lines
