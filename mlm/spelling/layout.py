"""How a text is laid out: which of its newlines end a line, and which of its lines are headings."""

from __future__ import annotations

import re

#: What newlines mean; in `wikitext` words, too, are as they stand.
FORMS = ("plain", "wrapped", "wikitext", "markdown")

#: A heading's mark, an item's mark and a fence of Markdown, each the first word of its line.
HEADING = re.compile(r"#{1,6}")
ITEM = re.compile(r"[-*+•]|\d{1,2}[.)]")
FENCE = re.compile(r"(`{3,}|~{3,})[^`]*")

_NEWLINE = re.compile(r"\r\n|\n|\r")


class LineLayout:
    """Reads a text word by word: `begin`, then `forms` and `ends_line` for each word."""

    def __init__(self, form: str) -> None:
        self.form = form
        self._fresh = True
        """The next word begins a line."""
        self._level = 0
        """Signs of the heading that is being read; 0 outside headings."""
        self._opened = False
        """The next word is the mark of the heading."""
        self._own = False
        """The line keeps its end: a heading, an item of a list, a fence, a line between fences."""
        self._fence = ""
        """What closes the fenced lines that are being read."""

    def begin(self, word: str) -> None:
        """Meet the next word; in Markdown, the first of a line says what the line is."""
        self._opened = False
        if not self._fresh:
            return
        self._fresh = False
        if self._fence:
            if word.startswith(self._fence):
                self._fence = ""
            return
        self._own = _opens(word)
        self._opened = bool(HEADING.fullmatch(word))
        self._level = len(word) if self._opened else 0
        if fence := FENCE.fullmatch(word):
            self._fence = fence[1]

    def forms(self, word: str, forms: tuple[str, ...], gap: str, last: bool) -> tuple[str, ...]:
        """`forms` of a word, or WikiText's signs: `## Part` is `= = Part = =`."""
        if not self._level:
            return forms
        marks = ("=",) * self._level
        ends = last or _NEWLINE.search(gap) is not None
        if self._opened:
            return (*marks, *marks) if ends else marks
        if not ends:
            return forms
        return (*forms, *marks) if word.strip("#") else marks

    def ends_line(self, gap: str, following: str, last: bool) -> bool:
        """Whether the white space `gap` ends a line; `last`: nothing follows it in the text."""
        newlines = len(_NEWLINE.findall(gap))
        if not newlines:
            return False
        self._fresh, self._level = True, 0
        if newlines > 1 or last or self.form == "plain":
            return True
        if self.form == "wrapped":
            return False
        return self._own or bool(self._fence) or _opens(following)


def _opens(word: str) -> bool:
    """Whether a line of Markdown that begins with `word` stands for itself."""
    return any(mark.fullmatch(word) for mark in (HEADING, ITEM, FENCE))
