"""The form of a text, guessed from how its first lines look."""

from __future__ import annotations

import itertools
import re

from mlm.spelling.layout import FENCE, HEADING

#: Characters that are looked at.
SEEN = 20_000

_TITLE = re.compile(r"= (= )*[^=\s].* =( =)*")
_MARK = re.compile(r"(?<=\S )@[-,.]@(?= \S)")
_SPACED = re.compile(r"(?<=\S )[,.](?=\s)")
_ATTACHED = re.compile(r"(?<=\w)[,.](?=\s)")


def guess_form(text: str) -> str:
    """The most likely of the forms of `text`, from its first 20,000 characters.

    `wikitext`: the first line is a title between `=` signs, or most commas and periods stand
    between spaces, or there are marks such as `@-@`. `markdown`: a line is a heading (`# Title`)
    or a fence. `wrapped`: most lines that another follows are filled, that is, the next line's
    first word would not have fitted within the longest line. Otherwise `plain`.
    """
    lines = [line.strip() for line in text[:SEEN].removeprefix("\ufeff").splitlines()]
    first = next(filter(None, lines), "")
    spaced, attached = len(_SPACED.findall(text[:SEEN])), len(_ATTACHED.findall(text[:SEEN]))
    if _TITLE.fullmatch(first) or _MARK.search(text[:SEEN]) or spaced > max(2, 9 * attached):
        return "wikitext"
    for line in lines:
        word = line.split(None, 1)
        if (len(word) == 2 and HEADING.fullmatch(word[0])) or FENCE.fullmatch(line):
            return "markdown"
    return "wrapped" if _wrapped(lines) else "plain"


def _wrapped(lines: list[str]) -> bool:
    """Whether the lines look like paragraphs broken at a fixed width."""
    pairs = [(a, b) for a, b in itertools.pairwise(lines) if a and b]
    width = max((len(line) for line, _ in pairs), default=0)
    if len(pairs) < 3 or not 40 <= width <= 120:
        return False
    filled = sum(len(a) + 1 + len(b.split(None, 1)[0]) > 0.85 * width for a, b in pairs)
    return filled >= 0.7 * len(pairs)
