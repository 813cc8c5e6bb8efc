"""Reads the flags of a script, and prints their help.

Parsing is tyro's, of a flat dataclass made from the tree of settings; the help is made here, so
that what users set fits on two screens.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from mlm.base.errors import UserError
from mlm.settings.checks import check_options
from mlm.settings.flags import GROUPS, SHORT, aliases, flag
from mlm.settings.presets import PRESETS

WIDTH, COLUMN = 100, 34
"""Widest help, and the column in which explanations begin."""


class Setting(NamedTuple):
    """One setting: its place in the tree, its type, explanation and value."""

    path: str
    kind: Any
    help: str
    value: Any

    @property
    def choices(self) -> tuple[str, ...]:
        """The values it may have, or each of them, if they are few."""
        kind = get_args(self.kind)[0] if get_origin(self.kind) is tuple else self.kind
        return get_args(kind) if get_origin(kind) is Literal else ()


def _explanations(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(tree.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(words))):
                found[name] = " ".join(words.split())
    return found


def settings_of(tree: Any, path: str = "") -> list[Setting]:
    """All settings of a tree, in its order."""
    kinds, texts = get_type_hints(type(tree)), _explanations(type(tree))
    found: list[Setting] = []
    for field in dataclasses.fields(tree):
        value, here = getattr(tree, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            found += settings_of(value, f"{here}.")
        else:
            found.append(Setting(here, kinds[field.name], texts.get(field.name, ""), value))
    return found


# -- reading ------------------------------------------------------------------------------------


def today(words: Iterable[str]) -> list[str]:
    """The words of a command line with `flag=value` parted, and today's flags for earlier ones;
    `--no-boundaries.on` switches off what `--boundaries.on` switches on.

    Raises:
        UserError: a flag that is gone.
    """
    names, found = aliases(), []
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--adapt.threads":
            raise UserError("--adapt.threads is gone: use --threads, which counts for every stage")
        parted = equals and name.startswith("--")
        section, dot, switch = name.removeprefix("--no-").rpartition(".")
        if dot and name.startswith("--no-"):
            name = word = f"--{section}.no-{switch}"  # as tyro calls it
        found += [names.get(name, name), value] if parted else [names.get(word, word)]
    return found


def without_preset(words: Sequence[str]) -> list[str]:
    """The words with --size and --rule for --preset, which names both.

    Raises:
        UserError: an unknown preset, or one beside --size or --rule.
    """
    if "--preset" not in words:
        return list(words)
    at = words.index("--preset")
    name = "".join(words[at + 1 : at + 2])
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown; choose from {', '.join(PRESETS)}")
    if {"--size", "--rule"} & set(words):
        raise UserError("--preset names a size and a rule; use --size and --rule without it")
    size, rule = PRESETS[name]
    return [*words[:at], "--size", size, "--rule", rule, *words[at + 2 :]]


def values_of(words: Sequence[str], name: str) -> tuple[str, ...] | None:
    """The values of a flag on the command line, before it is parsed; None = it is not there."""
    if name not in words:
        return None
    after = words[len(words) - words[::-1].index(name) :]
    return tuple(itertools.takewhile(lambda word: not word.startswith("--"), after))


def parse(
    script: str, words: Sequence[str], settings: Sequence[Setting], positional: Sequence[str] = ()
) -> dict[str, Any]:
    """The values of these settings, by path, as the command line says; exits with 2 if it cannot
    be read. `positional` are paths that need no flag."""
    import tyro

    fields: list[Any] = []
    for setting in settings:
        name = setting.path.replace(".", "__")
        if setting.path in positional:
            how = tyro.conf.Positional
        else:
            how = tyro.conf.arg(name=flag(setting.path)[2:], help=setting.help)
        usual = dataclasses.field(default=setting.value)
        fields.append((name, Annotated[setting.kind, how], usual))
    kind = dataclasses.make_dataclass("Flags", fields, frozen=True)
    found = tyro.cli(kind, prog=script, args=list(words))
    return {s.path: getattr(found, s.path.replace(".", "__")) for s in settings}


# -- help ---------------------------------------------------------------------------------------


def name_of_script() -> str:
    """How this script was called, for its help."""
    name = sys.argv[0]
    return f"python {Path(name).name}" if name.endswith(".py") else name


def wants_help(words: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return bool({"-h", "--help", "--help-all"} & set(words))


def _invocation(setting: Setting) -> str:
    """A flag and what follows it."""
    name = flag(setting.path)
    if isinstance(setting.value, bool):
        return f"--no-{name[2:]}" if setting.value else name
    several = " ..." if get_origin(setting.kind) is tuple else ""
    if setting.choices:
        listed = f"{name} {{{','.join(setting.choices)}}}{several}"
        return listed if len(listed) < COLUMN - 3 else f"{name} NAME{several}"
    kinds = [k for k in get_args(setting.kind) or (setting.kind,) if k not in (NoneType, ...)]
    what = {int: "N", float: "X"}.get(kinds[0], "PATH" if kinds[0].__name__ == "Path" else "NAME")
    return f"{name} {what}{several}"


def _usual(value: Any) -> str:
    """A default in brackets, where there is something to say."""
    if isinstance(value, bool):
        return " [on]" if value else ""
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return f" [{' '.join(map(str, value))}]"
    return f" [{value:g}]" if isinstance(value, float) else f" [{value}]"


def _lines(setting: Setting, width: int) -> list[str]:
    """A setting as help shows it."""
    text, invocation = setting.help, _invocation(setting)
    if any(c not in invocation + text + _usual(setting.value) for c in setting.choices):
        text += f" Choose from {', '.join(setting.choices)}."
    text += _usual(setting.value)
    wrapped = textwrap.wrap(text, width - COLUMN, break_on_hyphens=False) or [""]
    first = f"  {invocation}"
    if len(first) > COLUMN - 2:
        return [first, *(" " * COLUMN + line for line in wrapped)]
    return [f"{first:<{COLUMN}}{wrapped[0]}", *(" " * COLUMN + line for line in wrapped[1:])]


def help_text(head: str, settings: Sequence[Setting], everything: bool) -> str:
    """`head`, then the flags that users set in their groups, then, if asked for, all others."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    by_path = {s.path: s for s in settings}
    lines = [head.rstrip()]
    for title, group in GROUPS.items():
        own = [by_path[path] for path in group.values() if path in by_path]
        if own:
            lines += ["", f"{title}:", *(line for s in own for line in _lines(s, width))]
    others = [s for s in settings if s.path not in SHORT]
    if not everything:
        lines += ["", f"--help-all explains {len(others)} research settings, too."]
        return "\n".join(lines)
    lines += ["", "research settings:"]
    for section, group in itertools.groupby(others, lambda s: s.path.rpartition(".")[0]):
        lines += ["", f"  {section}", *(line for s in group for line in _lines(s, width))]
    return "\n".join(lines)


def options_of(head: str, usual: Any, positional: tuple[str, ...]) -> Any | None:
    """What the command line of a script with few flags says; None = its help was printed.

    Args:
        head: of the help; `{script}` stands for the script's name.
        usual: the options with their defaults, a dataclass whose first field is positional.

    Raises:
        UserError: values that make no sense.
    """
    script, words = name_of_script(), today(sys.argv[1:])
    settings = settings_of(usual)
    if wants_help(words):
        print(all_flags_help(head.format(script=script), settings[1:]))
        return None
    options = type(usual)(**parse(script, words, settings, positional=positional))
    check_options(options)
    return options


def all_flags_help(head: str, settings: Sequence[Setting]) -> str:
    """`head`, then all flags, for a script with few of them."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return "\n".join(
        [head.rstrip(), "", "flags:", *(x for s in settings for x in _lines(s, width))]
    )
