"""WikiText's tokenised words -> natural spelling, the way back from `mlm.spelling.tokenise`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlm.base.names import EOS

# What joins the word on its left, on its right, on both sides.
_LEFT = frozenset(",.;:!?%)]}°′″♭♯。，、！？；：،؛؟।")
_RIGHT = frozenset("([{#$£€¥")
_INSIDE = frozenset(("@-@", "@,@", "@.@"))
_BOTH = _INSIDE | frozenset("/—_⁄")
_SUFFIX = re.compile(r"'[^\W\d_].*", re.DOTALL)  # 's, 't, 'll


def detokenise(forms: Sequence[str]) -> str:
    """Natural spelling of WikiText's words; `<eos>` is a newline.

    Tokenised again it gives the same words if natural spelling has any that do. Opening and closing
    quotes are told apart by counting within the line, an apostrophe from a quote by the word before
    it: both are guesses, because WikiText's form does not hold the difference.
    """
    lines: list[list[str]] = [[]]
    for form in forms:
        if form == EOS:
            lines.append([])
        else:
            lines[-1].append(form)
    return "\n".join(_line(line) for line in lines)


def _line(words: list[str]) -> str:
    """One line in natural spelling."""
    text: list[str] = []
    quoted = single = False
    singles = words.count("'")
    joined = True  # the next word follows without a space
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        after = words[place + 1] if place + 1 < len(words) else ""
        if word == '"':
            left, right, quoted = quoted, not quoted, not quoted
        elif word == "'":
            singles -= 1
            left = single or not after or before[-1:] in ("s", "S")
            right = not left
            single = right and singles > 0
        else:
            left, right = _joins(before, word, after)
        text.append(word.strip("@") if word in _INSIDE else word)
        if not joined and not left:
            text.insert(-1, " ")
        joined = right
    return "".join(text)


def _joins(before: str, word: str, after: str) -> tuple[bool, bool]:
    """Whether a word joins the one before it and the one after it in natural spelling."""
    if word in _BOTH:
        return True, True
    if len(word) > 1 and not word.strip("."):
        opens = before in ("", '"', "(", "[")
        return not opens, opens
    if word == ":":
        return True, before.isdigit() and after.isdigit() and len(after) == 2  # a time: 17 : 10
    if word == "°":
        return True, after in ("C", "F")
    if word == "–":
        numbers = before[-1:].isdigit() and after[:1].isdigit()
        return numbers, numbers
    if word == "&":
        letters = all(len(side) == 1 and side.isupper() for side in (before, after))
        return letters, letters
    if word in _LEFT and not (word == "." and before.endswith(".")):  # not . . . -> ...
        return True, False
    if word in _RIGHT:
        return False, word in "([{#" or after[:1].isdigit()
    return bool(_SUFFIX.fullmatch(word)) and before[-1:].isalnum(), False
