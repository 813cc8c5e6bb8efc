"""The pages of docs/ say what is there: files, functions, flags, messages, files of a run."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import re
from pathlib import Path

import pytest
from conftest import Command, Finished

from benchmarks.readme import ROOT
from benchmarks.reference import ASKS, CURES, SAID, messages
from mlm.cli.flags import settings_of
from mlm.models.extension import Extension
from mlm.settings.config import Config
from mlm.settings.flags import flag

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
assert _spec
assert _spec.loader
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods and constants of a source file, methods as `Class.method`."""
    if file.suffix != ".py":
        return set(re.findall(r"^\s*function (\w+)", file.read_text("utf-8"), re.M))
    found: set[str] = set()

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found.add(inside + child.name)
                visit(child, f"{inside}{child.name}.")
            elif isinstance(child, ast.Assign):
                found.update(ast.unparse(child.targets[0]).split(", "))

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


def steps(page: str) -> list[tuple[str, str]]:
    """(file, name) of every step of a walk."""
    row = r"^\| \d+ \| \[`([^`]+)`\]\([^)]*\) \| `([^`]+)` \|"
    return re.findall(row, page, re.M)


def test_walks_lead_to_what_is_there() -> None:
    text = (DOCS / "walks.md").read_text(encoding="utf-8")
    walks = text.split("\n## ")[1:]
    assert len(walks) == 3
    for walk in walks:
        found = steps(walk)
        assert len(found) > 4, walk
        rows = re.findall(r"^\| \d+ \|", walk, re.M)
        assert len(rows) == len(found), "a step names a file and something in it"
        for file, name in found:
            assert name in names_in(ROOT / file), f"{file} has no {name}"
    for constant in ("CLIP_PERCENTILE", "COLOUR_POWER"):
        assert f"`{constant}`" in text
        assert constant in names_in(ROOT / "mlm" / "report" / "word_picture.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_are_there(page: Path) -> None:
    """Code spans that look like a path of the repository name one."""
    spans = re.findall(
        r"`((?:mlm|tests|benchmarks|examples|\.ci)/[\w./]*)`", page.read_text("utf-8")
    )
    assert [span for span in spans if not (ROOT / span).exists()] == []


@pytest.mark.parametrize("page", ["write_an_extension", "write_a_rule", "page"])
def test_code_of_a_page_does_what_the_page_says(page: str) -> None:
    """Its blocks run in order, the assertions among them."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert "assert " in blocks[-1]
    exec(compile("\n".join(blocks), page, "exec", dont_inherit=True), {"__name__": page})


def test_every_method_of_an_extension_is_on_its_page() -> None:
    page = (DOCS / "extensions.md").read_text(encoding="utf-8")
    own = page.partition("## Write your own")[2]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", own, re.M))))
    public = {name for name in vars(Extension) if not name.startswith("_")}
    assert named == public - {"constants", "key"}


def test_every_flag_is_on_the_page_of_settings(command: Command) -> None:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    written = set(re.findall(r"^\| `(--[\w.-]+)`", page, re.M))
    shown = set(re.findall(r"^  (--[\w.-]+)", command("train", "--help-all").out, re.M))
    named = {re.sub(r"^--(\w+\.)?no-", r"--\1", flag) for flag in shown}  # switches that are on
    assert named - {"--help", "--help-all"} == written
    assert written == {flag(setting.path) for setting in settings_of(Config())}
    assert all(setting.help for setting in settings_of(Config()))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_flags_of_train_are_there(page: Path) -> None:
    """Flags in code spans, that is: those in commands are parsed by tests/test_readme.py."""
    known = {flag(setting.path) for setting in settings_of(Config())}
    spans = re.findall(r"`(--[a-z-]+\.[\w.-]+|--(?:size|rule)\b)", page.read_text("utf-8"))
    named = {"--lm.epochs", "--hidden-bias.rate"}  # an earlier name, one that a page makes up
    assert set(spans) - named <= known


def test_every_message_is_on_the_page_of_errors() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    markers = re.findall(r"<!-- errors: (.*?) -->", page)
    read = {ROOT / path for marker in markers for path in marker.split()}
    raising = {file for file, _ in messages(ROOT / "mlm")}
    assert [f for f in raising if not read & {f, *f.parents}] == []


def test_messages_of_settings_and_of_damage_are_collected() -> None:
    found = {text for _, text in messages(ROOT / "mlm")}
    assert "… names … twice; name each once" in found
    assert "--learned-basis.words goes with --meta.learn rule only" in found
    assert "… is damaged (…); delete it and run its stage again…" in found


def test_no_message_is_made_where_nobody_collects_it() -> None:
    """Its text stands where it is raised, or is a join of what functions of `COLLECT` found."""
    for file in (ROOT / "mlm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Name(name), [first, *_]) if name in SAID:
                    text = ast.unparse(first)
                    literal = isinstance(first, ast.Constant | ast.JoinedStr)
                    assert literal or text.startswith("'; '.join("), (file, node.lineno)


def test_every_message_says_what_to_do() -> None:
    """Itself, or on the page of errors; no cure is of a message that is gone."""
    found = {text for _, text in messages(ROOT / "mlm")}
    assert len(found) > 150
    assert [text for text in found if not ASKS.search(text) and text not in CURES] == []
    assert set(CURES) - found == set()
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert [cure for cure in CURES.values() if cure not in page] == []


def test_every_file_of_a_run_is_on_its_page(finished: Finished) -> None:
    page = (DOCS / "run_folder.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.+?) \|", page, re.M)
    patterns = [
        span.replace("RULE", "*") for cell in cells for span in re.findall(r"`(.+?)`", cell)
    ]
    files = [f for f in finished.folder.rglob("*") if f.is_file()]
    names = [file.relative_to(finished.folder).as_posix() for file in files]
    assert [n for n in names if not any(fnmatch.fnmatch(n, p) for p in patterns)] == []
    unused = [p for p in patterns if not any(fnmatch.fnmatch(n, p) for n in names)]
    assert unused == ["unfinished_*.safetensors", "top_k.parquet", "on-CORPUS/"]


def test_every_page_and_room_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    wanted = [page.name for page in PAGES] + [f"api/{room}.md" for room in hooks.rooms()]
    wanted += [page.relative_to(ROOT).as_posix() for page in ROOT.glob("results/**/README.md")]
    assert [
        name for name in wanted if not re.search(rf"[-:] {re.escape(name)}$", config, re.M)
    ] == []
    assert set(re.findall(r"api/(\w+)\.md", config)) == set(hooks.rooms())


def test_links_lead_where_the_site_shows_them() -> None:
    """A module to its docstrings, a result to its page, what the site has not to plain text."""
    text = (
        "[`a`](../mlm/rules/gates.py) [b](../mlm/rules/) [c](../results/README.md#x) "
        "[d](rules.md#y) [e](../train.py) ![f](../results/engine/pareto.png) [g](https://a.b/) "
        "[h](../mlm/none/x.py) [i](#z)\n```\n[j](../train.py)\n```\n"
    )
    assert hooks.relinked(text, "docs/idea.md") == (
        "[`a`](api/rules.md#mlm.rules.gates) [b](api/rules.md) [c](results/README.md#x) "
        "[d](rules.md#y) e ![f](results/engine/pareto.png) [g](https://a.b/) "
        "h [i](#z)\n```\n[j](../train.py)\n```\n"
    )
    text = "[a](../../docs/idea.md) [b](../claim/README.md)"
    assert hooks.relinked(text, "results/rules/README.md") == (
        "[a](../../idea.md) [b](../claim/README.md)"
    )


def test_the_site_loads_nothing_from_elsewhere() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.search(r"^  font: false$", config, re.M)
    assert "http" not in config
