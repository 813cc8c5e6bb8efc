"""Hooks of mkdocs: what the site shows beside the pages in docs/.

Pages link to the repository as they lie there, so that the links hold on any host of it:
`../mlm/rules/gates.py`, `../results/claim/README.md`. On the site the result pages are pages, too,
every room of the package has a page made from its docstrings, and links to a module lead there.
Links to files that the site does not show become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("results/**/*.md", "results/**/*.png", "data/README.md")
"""Files outside docs/ that the site shows, where they lie in the repository."""
_LINK = re.compile(r"(```.*?^```)|(!?)\[((?:`[^`]*`|[^\[\]`])*)\]\(([^)\s]+)\)", re.M | re.S)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#")


def rooms(root: Path = ROOT) -> list[str]:
    """The packages of `mlm`; mkdocs.yml names the page of each in its navigation."""
    return sorted(path.parent.name for path in root.glob("mlm/*/__init__.py"))


def room_page(room: str) -> str:
    """The Markdown of a room's page: its docstrings, as mkdocstrings shows them."""
    return f"# mlm.{room}\n\n::: mlm.{room}\n"


def site_path(path: str, root: Path = ROOT) -> str | None:
    """Where the site shows a file of the repository, with an anchor; None = it does not."""
    if path.startswith("docs/") and path.endswith((".md", ".svg", ".png")):
        return path.removeprefix("docs/")
    if path == "data/README.md" or (path.startswith("results/") and path.endswith((".md", ".png"))):
        return path if (root / path).is_file() else None
    if found := re.fullmatch(r"mlm/(\w+)/(?:(\w+)\.py)?", path):
        room, module = found.groups()
        name = f"#mlm.{room}.{module}" if module and module != "__init__" else ""
        return f"api/{room}.md{name}" if (root / "mlm" / room).is_dir() else None
    return None


def relinked(markdown: str, page: str, root: Path = ROOT) -> str:
    """The page's text with links as the site needs them.

    Args:
        markdown: the text of a page.
        page: its path in the repository, such as docs/idea.md.
    """
    here = site_path(page, root) or page

    def link(match: re.Match[str]) -> str:
        block, picture, text, target = match.groups()
        if block or _ELSEWHERE.match(target):
            return match[0]
        path, _, anchor = target.partition("#")
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        whole += "/" * path.endswith("/")
        shown = site_path(whole, root)
        if shown is None:
            return text
        path, _, own = shown.partition("#")
        anchor = f"#{anchor or own}" if anchor or own else ""
        return f"{picture}[{text}]({posixpath.relpath(path, posixpath.dirname(here))}{anchor})"

    return _LINK.sub(link, markdown)


def on_files(files: Files, config: Any) -> Files:
    """Add the result pages and one page for every room."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=room_page(room)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to where the site shows what they name."""
    source = page.file.src_uri
    if source.startswith("api/"):
        return markdown
    return relinked(
        markdown, source if source.startswith(("results/", "data/")) else f"docs/{source}"
    )
