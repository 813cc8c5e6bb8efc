"""The layout of `mlm`: rooms, sizes, docstrings, names; `lint-imports` checks who imports whom."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "mlm"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCE = {path: path.read_text(encoding="utf-8") for path in MODULES}
TREES = {path: ast.parse(source) for path, source in SOURCE.items()}
LINES, IN_A_FOLDER, OF_A_FUNCTION = 500, 9, 60

#: Names that two modules may define: what they mean is the same in both.
SHARED = {"HELP", "LANES", "Options", "PEAK", "TOKENS", "main"}


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _first_line(path: Path) -> str:
    return (ast.get_docstring(TREES[path]) or "").partition("\n")[0]


def _long(path: Path) -> list[str]:
    """Functions of more than 60 lines without a comment `# long: <reason>` above or within."""
    found, lines = [], SOURCE[path].splitlines()
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.FunctionDef):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        last = node.end_lineno or first
        begin = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        near = [lines[first - 2], *lines[(begin or first) - 1 : (begin or first) + 1]]
        if last - node.lineno + 1 > OF_A_FUNCTION and not any(
            re.search(r"# long: \w", line) for line in near
        ):
            found.append(f"{node.name} ({last - node.lineno + 1} lines)")
    return found


def _public(path: Path) -> list[str]:
    """Top-level names that a module defines, without those that begin with `_`."""
    names: list[str] = []
    for node in TREES[path].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names += [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert len(_first_line(path).split()) >= 4, f"{_name(path)}: {_first_line(path)!r}"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_and_its_functions_can_be_read_in_a_sitting(path: Path) -> None:
    assert len(SOURCE[path].splitlines()) <= LINES
    assert not _long(path)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_nine_modules_at_most(room: str) -> None:
    modules = [p for p in (PACKAGE / room).glob("*.py") if p.name != "__init__.py"]
    assert len(modules) <= IN_A_FOLDER, [p.name for p in modules]
    assert not [p for p in (PACKAGE / room).iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_one_sentence_what_it_is_for(room: str) -> None:
    sentence = (ast.get_docstring(TREES[PACKAGE / room / "__init__.py"]) or "").partition("\n\n")[0]
    assert re.fullmatch(r"[^.]+(\.\w[^.]*)*\.", sentence), sentence


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_public_names_that_exist(room: str) -> None:
    module = importlib.import_module(f"mlm.{room}")
    assert module.__all__
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert [name for name in module.__all__ if name.startswith("_")] == []


def test_a_public_name_has_one_meaning() -> None:
    homes = defaultdict(list)
    for path in MODULES:
        for name in _public(path):
            homes[name].append(_name(path))
    assert {n: at for n, at in homes.items() if len(at) > 1 and n not in SHARED} == {}


def test_tests_mirror_the_rooms() -> None:
    """Above the rooms' folders: what is about the repository, its pages and every room at once."""
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    assert folders <= {".", "benchmarks", "golden", *ROOMS}
    about_all = {
        "docs",
        "examples",
        "fake_cuda",
        "fuzz",
        "gpu",
        "house",
        "links",
        "package",
        "readme",
        "results",
        "shared",
    }
    assert {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")} <= about_all


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        ("import mlm", "torch numpy"),
        ("from mlm.text import open_corpus", "torch"),
        ("from mlm.report import format_totals, read_evaluation", "matplotlib torch"),
    ],
)
def test_light_names_load_no_heavy_library(line: str, heavy: str) -> None:
    check = f"import sys; {line}; assert not set({heavy.split()}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=TESTS.parent)
