"""Natural spelling -> WikiText's tokenised form, word by word, with places in the user's text."""

from mlm.spelling.feed import FORMS, Word, WordFeed
from mlm.spelling.guess import guess_form
from mlm.spelling.natural import detokenise

__all__ = ["FORMS", "Word", "WordFeed", "detokenise", "guess_form"]
