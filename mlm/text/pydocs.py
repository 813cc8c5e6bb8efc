"""The built-in corpus: the documentation that ships inside every Python, in WikiText's form.

One article for each topic of `pydoc_data` (`help("if")`) and for each module of the standard
library with enough docstrings. Sources are parsed with `ast`; nothing is imported or downloaded.
The text depends on the Python that runs, hence so does `version`.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mlm.base.errors import UserError

_MAKER = 1  # raise when the text made from the same Python changes


_LEAST_WORDS = 150


_GROUP = 10  # of so many articles of similar length, one goes to valid and one to test


_SHARED = 0.2  # an article with more than this share of words in others' sentences is left out


_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
    "pydoc_data", "turtledemo", "ensurepip", "encodings", "__phello__", "lib-dynload", "_vendor",
    "distutils",
}  # fmt: skip


_UNDERLINE = re.compile(r"([=\-~*^\"'`+#.])\1{2,}\s*")


_TOKEN = re.compile(
    r"\d+(?:[.,]\d+)+"  # 1.5  1,000
    r"|\w+(?:\.\w+)+(?:\(\))?"  # os.path.join()
    r"|'(?:s|t|re|ve|ll|d|m)\b"  # the team 's
    r"|\w+"
    r"|>>>|\.\.\.|--+|->|\*\*|//|::=|[<>=!:+*/%&|^-]=|<<|>>"
    r"|\S"
)


def version() -> str:
    """What the text depends on: this module, the Python version, its library's files' sizes."""
    listing = [f"{name} {path.stat().st_size}" for name, path in _sources()]
    digest = hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]
    return f"pydocs-{_MAKER}-{platform.python_implementation()}-{digest}"


def lines(split: str) -> Iterator[str]:
    """Lines of `split` ("train", "valid" or "test") in WikiText's form."""
    for title, paragraphs, home in _articles():
        if home == split:
            yield " \n"
            yield f" = {title} = \n"
            yield " \n"
            for paragraph in paragraphs:
                if paragraph.startswith("= ="):
                    yield from (" \n", f" {paragraph} \n", " \n")
                else:
                    yield f" {paragraph} \n"


def _order(title: str) -> int:
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources() -> list[tuple[str, Path]]:
    """Names and files of the library's modules, and of the topics under the name ""."""
    library = _library()
    found = []
    for folder, inner, files in os.walk(library):
        inner[:] = sorted(n for n in inner if n not in _SKIPPED and not n.startswith("config-"))
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix == ".py":
                parts = path.relative_to(library).with_suffix("").parts
                found.append((".".join(part for part in parts if part != "__init__"), path))
    topics = library / "pydoc_data" / "topics.py"
    return found + ([("", topics)] if topics.is_file() else [])


@lru_cache(maxsize=1)
def _articles() -> list[tuple[str, list[str], str]]:
    """All (title, paragraphs, split), in an order that does not follow their names.

    By falling length, one article of each ten goes to valid and one to test, so that the held-out
    splits resemble each other in length and number whatever the Python.
    """
    made: dict[str, list[str]] = {}
    for name, path in _sources():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        articles = _topics(tree) if not name else [(name, _module(tree))]
        for title, paragraphs in articles:
            if sum(len(paragraph.split()) + 1 for paragraph in paragraphs) >= _LEAST_WORDS:
                made[title] = paragraphs
    if not made:
        raise UserError(
            f"pydocs: no Python sources with documentation below {_library()}. Install the full "
            "standard library or choose another corpus with --corpus"
        )
    kept = _unlike(made)
    titles = list(kept)
    articles = []
    for start in range(0, len(titles), _GROUP):
        group = sorted(titles[start : start + _GROUP], key=_order)
        homes = ["valid", "test"] + ["train"] * (len(group) - 2)
        articles += zip(group, homes, strict=False)
    articles.sort(key=lambda article: _order(article[0][::-1]))
    return [(title, kept[title], home) for title, home in articles]


def _unlike(articles: dict[str, list[str]]) -> dict[str, list[str]]:
    """Leave out articles that repeat another: topics inside chapters, C modules' Python twins.

    Returns the rest by falling length.
    """
    seen: set[str] = set()
    kept = {}
    for title, paragraphs in sorted(articles.items(), key=lambda a: (-len(" ".join(a[1])), a[0])):
        sentences = {s for paragraph in paragraphs for s in paragraph.split(" . ")}
        words = {s: len(s.split()) for s in sentences if len(s.split()) >= 8}
        if sum(words[s] for s in words if s in seen) <= _SHARED * sum(words.values()):
            kept[title] = paragraphs
            seen.update(words)
    return kept


def _topics(tree: ast.Module) -> list[tuple[str, list[str]]]:
    """Articles of `pydoc_data.topics`: one dictionary of name -> reStructuredText."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [_topic(name, text) for name, text in topics.items()]
    return []


def _topic(name: str, text: str) -> tuple[str, list[str]]:
    paragraphs = _paragraphs(text)
    title = name
    if paragraphs and paragraphs[0].startswith("= = "):
        title = paragraphs.pop(0).removeprefix("= = ").removesuffix(" = =")
    return title, paragraphs


def _module(tree: ast.Module) -> list[str]:
    """The module's docstring, then a section for each documented class and function."""
    return _paragraphs(ast.get_docstring(tree) or "") + _members(tree.body, 2)


def _members(body: list[ast.stmt], level: int) -> list[str]:
    made = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = _paragraphs(ast.get_docstring(node) or "")
            if text and not isinstance(node, ast.ClassDef):
                text.insert(0, _tokens(f"{node.name}({ast.unparse(node.args)})"))
            inner = _members(node.body, level + 1) if isinstance(node, ast.ClassDef) else []
            if text or inner:
                mark = " ".join("=" * min(level, 4))
                made += [f"{mark} {node.name} {mark}", *text, *inner]
        elif isinstance(node, ast.If | ast.Try):
            made += _members(node.body, level)
    return made


def _tokens(text: str) -> str:
    """Text as WikiText has it: tokens joined by spaces, `@-@ @,@ @.@` inside words and numbers."""
    tokens = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token == "-" and re.match(r"\w-\w", text[max(0, match.start() - 1) :]):
            tokens.append("@-@")
        elif token[0].isdigit() and re.search(r"\d[.,]\d", token):
            tokens += re.sub(r"([.,])", r" @\1@ ", token).split()
        else:
            tokens.append(token)
    return " ".join(tokens)


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of reStructuredText or plain text, each on one line; headings as sections."""
    made = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text.expandtabs()).strip("\n")):
        rows = [row.strip() for row in block.splitlines() if row.strip()]
        if len(rows) == 2 and _UNDERLINE.fullmatch(rows[1]):
            made.append(f"= = {_tokens(rows[0])} = =")
            continue
        rows = [row for row in rows if not _UNDERLINE.fullmatch(row)]
        if rows and rows[0].startswith(">>>"):  # an example: one statement a line
            examples = re.split(r"\n(?=>>>)", "\n".join(rows))
            made += [_tokens(example) for example in examples]
        elif rows:
            made.append(_tokens(" ".join(rows)))
    # A line between '=' signs would pass for a heading.
    return [p if p.startswith("= = ") else p.lstrip("= ") for p in made if p.strip("= ")]
