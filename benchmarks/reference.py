"""Tables of the documentation that are made from the code: settings and error messages.

`benchmarks.readme` puts them between markers, as it does with run files:

    <!-- settings: GROUP -->       the flags of a group that users set, or of a section
    <!-- presets: KIND -->         the settings that --size or --rule changes
    <!-- errors: PATH ... -->      every message of a `UserError` in these folders or files
"""

from __future__ import annotations

import ast
import re
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
        return "".join(map(_part, node.values))
    return None


def _part(node: ast.expr) -> str:
    """A part of a message; a command as it is called where mlm is installed."""
    match node:
        case ast.Constant(value):
            return str(value)
        case ast.FormattedValue(ast.Call(ast.Name("command_of"), [ast.Constant(name)])):
            return f"mlm {name}"
    return "…"


SAID = ("UserError", "DamagedFile", "DamagedCheckpoint", "note")
"""What messages are given to."""
COLLECT = re.compile(r"problem|^_(types|numbers|values|stage_\d)$|^check_options$")
"""Functions that collect what is said together, in one message."""


ASKS = re.compile(
    r"\b(use|give|name|choose|run|set|add|leave|train|fetch|convert|free|check|delete|remove|wait|"
    r"install|resume|lower|restore|evaluate|ask|tune|make|rename|save|need|needs|must|put|"
    r"continue|scores|divide|break|go on|load|end|let|at least|is one of|are numbered|present|"
    r"the splits are)\b",
    re.I,
)
"""What a message says that tells its reader what to do."""
CURES = {
    "….initial_state is missing: …": "Give the module the method that the message names.",
    "…: …; …": "Rename the parameter or the file that the message names.",
    "no such setting of a model to load: …": "Leave it out.",
    "… was saved with another model (…)": "Read on with that model.",
    "… is not in …, a released model. …": "Use one of the rules that the message lists.",
    "a scale of perturbations is given for …, but the parameters are …": "Name parameters only.",
    "…: … values of … for … words": "Give one value for each word.",
    "…: … losses of …, … words": "Give one loss for each word.",
    "note: … is damaged (…); what it held is tuned again": "Nothing is to be done.",
    "note: …: likeliest pieces stored with other settings, or of another rule or text, go: …": (
        "Evaluate again with `--top-k` to have them back."
    ),
    "note: …: results with other settings, or of another rule or text, go: …": (
        "Evaluate again with those rules to have their rows back."
    ),
    "note: …; building it again": "Nothing is to be done.",
    "note: …; fitting it again": "Nothing is to be done.",
    "note: …; this part begins again": "Nothing is to be done.",
    "note: …: trained with other settings; the rows in … are dropped": (
        "Train these rules again if they are wanted."
    ),
    "revision …: … is a folder; only hub ids have revisions": "Leave the revision out.",
    "… was made by another version of mlm (format …, now …); …": "The message ends with it.",
    "note: … has no checksum, so that damage to it would go unnoticed": (
        "Run its stage again: files written now have one."
    ),
    "… is missing: …": "The message ends with the command that makes it.",
    "… was written by another version of mlm (…); …": "The message ends with it.",
    "note: …; going on from the checkpoint before it": (
        "Nothing is to be done; check the disk if it comes again."
    ),
    "… is empty: no article in it. …": "Put text in WikiText's form into it.",
    "…: no column 'text'; is it … or laid out as it?": "Give a folder in the hub's layout.",
    "…: its checksum does not match its content": "Nothing: the token file is built again.",
    "…: …": "Nothing: the token file is built again.",
    "…: no token file of format …": "Nothing: the token file is built again.",
    "…: … of … bytes, cut short or overwritten": "Nothing: the token file is built again.",
    "…: larger than the training text supports. The largest possible size is …": (
        "Give --vocabulary-size at most that."
    ),
    "…: too small to hold 256 bytes and the characters of the training text. The smallest "
    "possible size is …": "Give --vocabulary-size at least that.",
    "…: SentencePiece cannot fit the training text (…)": (
        "Try another --vocabulary-size, or --vocabulary word."
    ),
    "--lm.init …: …": "The message ends with it.",
    "no learned rule can start as … does": "Start from a rule of this program.",
    "--ngram-embeddings.contexts is …; they are learned by a language model that goes on from "
    "another one (--lm.init), as usual or with --lm.through learned": (
        "Name that run with `--lm.init`, or set the contexts to 0."
    ),
    "… is …; …": "The message ends with what it must be.",
    "--learned-basis.words goes with --meta.learn rule only": "Use that.",
    "… goes with --meta.learn rule only": "Use that.",
    "--meta.gradient is …; --intra-segment.on goes with reverse, checkpoint or forward": (
        "Use one of these, or leave the extension out."
    ),
    "… has no word in it; nothing to read": "Give a text with words.",
}
"""What to do about messages that do not say so themselves."""


def messages(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, message) of every error and note for users in a file, or below a folder, whose text is
    there."""
    for file in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            match node:
                case ast.Call(ast.Name(name), [first, *_]) if name in SAID:
                    text = _template(first)
                    if text is not None:
                        text = f"note: {text}" if name == "note" else text
                        yield file, " ".join(text.split())
                case ast.FunctionDef(name=name) if COLLECT.search(name):
                    for text in filter(None, map(_template, _collected(node))):
                        yield file, " ".join(text.split())


def _collected(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function adds to a list, or returns in one."""
    for node in ast.walk(function):
        match node:
            case ast.Call(ast.Attribute(_, "append"), [first]):
                yield first
            case ast.AugAssign(value=ast.List(several) | ast.Tuple(several)):
                yield from several
            case ast.Return(ast.List(several) | ast.Tuple(several)):
                yield from several


def errors_table(*folders: str) -> list[str]:
    """Every message below some folders, with the file that raises it."""
    lines = ["| message | cure, where the message has none | raised in |", "| :-- | :-- | :-- |"]
    for folder in folders:
        for file, text in messages(ROOT / folder):
            plain = text.replace("<", "&lt;").replace("`", "'").replace("*", r"\*")
            lines.append(_row(plain, CURES.get(text, ""), f"`{file.relative_to(ROOT).as_posix()}`"))
    return lines
