"""Natural spelling -> WikiText's tokenised form, word by word, with places in the user's text."""

from mlm.spelling.canonical import (
    MARKER,
    canonical_characters,
    canonical_text,
    spelling_nats,
)
from mlm.spelling.feed import FORMS, Word, WordFeed
from mlm.spelling.guess import guess_form
from mlm.spelling.natural import detokenise

__all__ = [
    "FORMS",
    "MARKER",
    "Word",
    "WordFeed",
    "canonical_characters",
    "canonical_text",
    "detokenise",
    "guess_form",
    "spelling_nats",
]
