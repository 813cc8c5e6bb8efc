"""The package: what the wheel holds, the installed command, names of `mlm`, the lists of needs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from tiny import as_flags, tiny_config, write_corpus

import mlm
from mlm.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: Extras that nothing else needs and that no test installs.
ADAPTERS = {"harness", "spacy", "test-adapters", "browser"}
LITTLE = {
    "lm__epochs": 0.3,
    "lm__validations": 1,
    "adapt__fisher_words": 100,
    "adapt__kernels": "eager",  # a new environment has no compiled kernels, which take a minute
    "meta__rules": ("two_levels",),
    "meta__steps": 1,
    "evaluation__budget": 1,
    "evaluation__rules": ("static", "two_levels"),
    "evaluation__protocols": ("article",),
    "evaluation__max_articles": 2,
    "evaluation__resamples": 9,
    "stages": ("lm", "meta"),
}


RELEASED = tuple(
    f"mlm/released/stand-in/{name}"
    for name in (
        "config.json",
        "README.md",
        "tuning.json",
        "vocabulary/vocabulary.json",
        "checkpoints/memory.safetensors",
    )
)
"""Files of a released model that is added to the sources."""


class Installed(NamedTuple):
    """An environment of its own that holds the wheel and nothing else."""

    python: Path
    command: Path

    def run(self, folder: Path, *words: object, code: int = 0) -> str:
        """What a command prints that was started in `folder`."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(word) for word in words],
            cwd=folder,
            env=plain,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr


def pip(*words: object) -> None:
    """Run pip, which asks nobody for anything."""
    quiet = ("--disable-pip-version-check", "--no-cache-dir")
    offline = ("--no-index", "--no-deps", "--quiet")
    command = (sys.executable, "-m", "pip", *quiet, *words, *offline)
    subprocess.run([str(word) for word in command], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources; no network is needed."""
    home = tmp_path_factory.mktemp("package")
    source = home / "source"
    for name in ("mlm", "tests", "benchmarks", "examples", "data"):
        kept = shutil.ignore_patterns("__pycache__", "cache")
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        shutil.copy(file, source)
    for name in (*RELEASED, "mlm/released/stand-in/losses.parquet"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}", encoding="utf-8")
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", home)
    (made,) = home.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Installed:
    """It sees the libraries of this environment, but none of its path files, which might lead to
    the checkout."""
    home = wheel.parent
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    pip("--python", python, "install", wheel)
    (packages,) = (home / "venv" / "lib").glob("*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Installed(python, python.with_name("mlm"))


def test_wheel_holds_the_package(wheel: Path) -> None:
    """Every file of mlm/, the mark of types and the licence; nothing else of the project.

    Of released models what reading needs.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in archive.namelist()}
    files = (path.relative_to(ROOT) for path in (ROOT / "mlm").rglob("*") if path.is_file())
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert found == expected | set(RELEASED)
    assert {"mlm/py.typed", "mlm/cli/train.py", "mlm/__main__.py"} <= found
    assert "licenses/LICENSE" in about
    assert f"mlm-{mlm.__version__}-" in wheel.name


@pytest.mark.slow
def test_installed_command(installed: Installed, tmp_path: Path) -> None:
    """Train, evaluate and show in another folder, with the code of the wheel."""
    python, command = installed.python, installed.command
    where = installed.run(tmp_path, python, "-c", "import mlm; print(mlm.__file__)")
    assert Path(where.strip()).is_relative_to(installed.python.parents[1])
    assert installed.run(tmp_path, command, "--version") == f"mlm {mlm.__version__}\n"
    code = "from mlm.store import released_models; print(*released_models())"
    assert "stand-in" in installed.run(tmp_path, python, "-c", code).split()
    text = installed.run(tmp_path, python, "-m", "mlm", "--help")
    assert all(c.name in text and c.summary in text and c.example in text for c in COMMANDS)
    corpus = write_corpus(tmp_path / "toy", train=5, valid=2, test=2)
    flags = as_flags(tiny_config(corpus, tmp_path / "run", **LITTLE))
    installed.run(tmp_path, command, "train", *flags)
    made = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert made["command"].startswith("mlm train --corpus ")
    assert made["commit"] is None
    assert "2 levels" in installed.run(tmp_path, command, "evaluate", "run", "--no-draw")
    drawn = installed.run(tmp_path, command, "show", "run").split()
    assert "run/words.html" in drawn
    assert all((tmp_path / path).is_file() for path in drawn)


def test_the_dispatcher_needs_no_library() -> None:
    """`mlm --help` answers at once: neither torch nor numpy nor the parser of flags is imported."""
    code = (
        "import sys; sys.argv = ['mlm', '--help']\n"
        "from mlm.cli import main; main()\n"
        "assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_unknown_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlm", "tarin"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    names = "train, evaluate, score, audit, show, export"
    message = f"error: mlm tarin: no such command; choose from {names}\n"
    assert capsys.readouterr().err == message


def test_names_of_the_package() -> None:
    """All are there, where types are checked they come from the same modules, and no more load."""
    assert set(mlm.__all__) <= set(dir(mlm))
    homes = {name: getattr(mlm, name).__module__ for name in mlm.__all__}
    tree = ast.parse((ROOT / "mlm" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "mlm.base.lazy")
        for alias in node.names
    }
    assert homes == typed
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = mlm.nothing


def _needs(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {need.name.lower(): need for need in found}


def test_requirements_are_the_packages() -> None:
    """requirements.txt is pyproject's dependencies and extras, in the same words but for pins.

    It leaves out the libraries that adapters are for.
    """
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    asked_for = {name: needs for name, needs in extras.items() if name not in ADAPTERS}
    groups = (project["dependencies"], *asked_for.values())
    asked = _needs([line for group in groups for line in group])
    listed = _needs((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert set(asked) == set(listed)
    for name, need in listed.items():
        pins = re.fullmatch(r"==([^*,]+)", str(need.specifier))
        fits = pins[1] in asked[name].specifier if pins else need.specifier == asked[name].specifier
        assert fits, f"{name}: requirements.txt {need.specifier}, pyproject {asked[name].specifier}"
        assert need.extras == asked[name].extras, name


@pytest.mark.parametrize("adapters", [False, True])
def test_every_library_used_is_asked_for(adapters: bool) -> None:
    """Imports of the package outside the standard library are dependencies; none is unused.

    Those of its adapters may be extras.
    """
    used = set()
    for file in (ROOT / "mlm").rglob("*.py"):
        if adapters != (file.parent.name == "adapters"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                used.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
    libraries = used - sys.stdlib_module_names - {"mlm"}
    needed = set(_needs(PYPROJECT["project"]["dependencies"]))
    if adapters:
        extras = PYPROJECT["project"]["optional-dependencies"]
        optional = set(_needs(extras["harness"] + extras["spacy"]))
        assert optional <= libraries <= optional | needed
    else:
        assert libraries == needed
