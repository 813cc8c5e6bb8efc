"""Tables of the documentation that are made from the code: settings and error messages.

`benchmarks.readme` puts them between markers, as it does with run files:

    <!-- settings: GROUP -->       the flags of a group that users set, or of a section
    <!-- presets: KIND -->         the settings that --size or --rule changes
    <!-- errors: PATH ... -->      every message of a `UserError` in these folders or files
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from mlm.cli.flags import Setting, settings_of
from mlm.settings.config import Config
from mlm.settings.flags import GROUPS, SHORT, flag
from mlm.settings.presets import RULE_SETTINGS, SIZES, settings

ROOT = Path(__file__).resolve().parent.parent


def _values(setting: Setting) -> str:
    """What a flag takes, for a reader."""
    several = "several of: " if get_origin(setting.kind) is tuple else ""
    if setting.choices:
        return several + ", ".join(f"`{choice}`" for choice in setting.choices)
    kinds = [k for k in get_args(setting.kind) or (setting.kind,) if k not in (NoneType, ...)]
    names = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}
    return several + ", ".join(names[kind] for kind in kinds)


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


def settings_table(*section: str) -> list[str]:
    """Flags with what they take, their defaults and meanings.

    Args:
        section: words of a group of user settings (`mlm.settings.flags.GROUPS`), or the name of a
            section of the tree of settings, whose research settings are meant.
    """
    name = " ".join(section)
    known = {setting.path: setting for setting in settings_of(Config())}
    if name in GROUPS:
        paths = [path for path in GROUPS[name].values() if path in known]
    else:
        paths = [p for p in known if p.startswith(f"{name}.") and p not in SHORT]
    lines = ["| flag | takes | default | meaning |", "| :-- | :-- | :-- | :-- |"]
    for setting in (known[path] for path in paths):
        meaning = setting.help.replace("<", "&lt;")
        cells = (f"`{flag(setting.path)}`", _values(setting), _shown(setting.value), meaning)
        lines.append(_row(*cells))
    return lines


def presets_table(kind: str) -> list[str]:
    """The settings that `size` or `rule` changes, one column for each of its values."""
    names = SIZES if kind == "size" else RULE_SETTINGS
    columns = [{s.path: s.value for s in settings_of(settings(**{kind: name}))} for name in names]
    lines = [_row("flag", *(f"`--{kind} {name}`" for name in names))]
    lines.append(f"|{' :-- |' * (1 + len(names))}")
    for path in columns[0]:
        values = [_shown(column[path]) for column in columns]
        if path != kind and len(set(values)) > 1:
            lines.append(_row(f"`{flag(path)}`", *values))
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
            match node:
                case ast.Call(ast.Name("UserError"), [first, *_]):
                    if (text := _template(first)) is not None:
                        yield file, " ".join(text.split())


def errors_table(*folders: str) -> list[str]:
    """Every message below some folders, with the file that raises it."""
    lines = ["| message | raised in |", "| :-- | :-- |"]
    for folder in folders:
        for file, text in messages(ROOT / folder):
            plain = text.replace("<", "&lt;").replace("`", "'").replace("*", r"\*")
            lines.append(_row(plain, f"`{file.relative_to(ROOT).as_posix()}`"))
    return lines
