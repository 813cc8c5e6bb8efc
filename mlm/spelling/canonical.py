"""The canonical text, which tokens spell and bytes are counted of, and the price of spelling."""

from __future__ import annotations

import math
import re
from typing import Any

MARKER = "\u2581"
"""SentencePiece's mark of a word's start; in a text it is an underscore."""

_CHANGED = re.compile("[\u2581\ud800-\udfff]")

_SYMBOL_NATS = math.log(257)


def canonical_characters(text: str) -> str:
    """`text` with U+2581 as `_` and half of a surrogate pair, which UTF-8 lacks, as U+FFFD.

    Every other character stays: no Unicode normalisation.
    """
    if text.isascii():
        return text
    return _CHANGED.sub(lambda found: "_" if found[0] == MARKER else "\ufffd", text)


def canonical_text(text: str) -> str:
    """Words joined by single spaces, a newline after every line: what encoded `text` decodes to.

    Words are what Unicode white space separates (`str.split`); a line ends at a newline only, and
    at the end of the text.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return "".join(" ".join(canonical_characters(line).split()) + "\n" for line in lines)


def spelling_nats(size: Any) -> Any:
    """Nats of spelling a word of `size` bytes (a number or an array) that a vocabulary lacks.

    Every symbol is one of 256 bytes or the end of the word, all alike: log2 257 bits per byte and
    end. This comes on top of the loss of the token `<unk>`.
    """
    return _SYMBOL_NATS * (size + 1)
