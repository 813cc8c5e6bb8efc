"""Relative links, anchors and pictures of every page lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from benchmarks.readme import ROOT, pages

_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINKS = (
    re.compile(r"\]\(\s*<?([^)\s>]+)"),  # [text](target), ![text](target "title")
    re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE),  # [name]: target
    re.compile(r"""<[^>]*\b(?:href|src)=["']([^"']+)"""),
)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures within the repository; none of code."""
    text = _CODE.sub("", text)
    found = [target for pattern in _LINKS for target in pattern.findall(text)]
    return [target for target in found if not _ELSEWHERE.match(target)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings, and those it sets itself."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", plain, re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = (f"{name}-{k}" if k else name for k in range(len(found) + 1))
        found.add(next(one for one in same if one not in found))
    return found | set(re.findall(r"""\b(?:id|name)=["']([^"']+)""", plain))


def broken(page: Path, root: Path) -> list[str]:
    """Links of `page` that lead nowhere, or out of the repository at `root`."""

    def leads(link: str) -> bool:
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page.resolve()
        if not target.is_relative_to(root.resolve()) or not target.exists():
            return False
        return not anchor or anchor in anchors(target.read_text(encoding="utf-8"))

    return [link for link in links(page.read_text(encoding="utf-8")) if not leads(link)]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    assert not broken(ROOT / page, ROOT)


def test_every_result_page_is_reached_from_its_index() -> None:
    index = ROOT / "results" / "README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in links(index.read_text())
    }
    written = {ROOT / page for page in pages() if page.startswith("results/")}
    assert {p for p in written if p.name != "evaluation.md"} <= linked | {index}
    assert index.stat().st_size < 5_000, "an index, not a page"


def test_what_is_broken_is_found(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    (root / "there").mkdir(parents=True)
    (tmp_path / "outside.md").write_text("# Outside\n", encoding="utf-8")
    (root / "there" / "b.md").write_text(
        "# A `word`, (two)\n\n## Same\n\n## Same\n\n```bash\n# no heading\n```\n", encoding="utf-8"
    )
    good = ("there/b.md#a-word-two", "there/b.md#same-1", "#top", "there/", "https://a.b/c#d")
    bad = ("none.md", "there/b.md#no-heading", "there/b.md#same-2", "#bottom", "../outside.md")
    page = root / "a.md"
    lines = ["# Top", *(f"[x]({link})" for link in (*good, *bad)), "`[x](code.md)`"]
    page.write_text("\n\n".join([*lines, '<img src="no.png">', "[y]: no.md"]), encoding="utf-8")
    assert broken(page, root) == [*bad, "no.md", "no.png"]
