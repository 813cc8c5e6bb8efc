"""A text, chunk by chunk -> its words and line ends, with offsets and WikiText's forms."""

from __future__ import annotations

import re
from typing import NamedTuple

from mlm.base.errors import UserError
from mlm.spelling.canonical import canonical_characters
from mlm.spelling.layout import FORMS, LineLayout
from mlm.spelling.tokenise import CLOSERS, ENDS, Spelling, tokenise

_GAP = re.compile(r"(\s+)")
_START = re.compile(r"\s\S")
_BOM = "\ufeff"
_BLOCK = 1 << 16
_KNOWN_WORDS, _KNOWN_LENGTH = 200_000, 40


class Word(NamedTuple):
    """A word of the user's text, what white space separates, or the end of a line of it."""

    text: str
    """Exactly the text from `start` to `end`; for a line end, its white space."""
    start: int
    end: int
    forms: tuple[str, ...]
    """The model's words for it: WikiText's tokenised form. () for a line end."""
    line_end: bool
    sentence: int
    """From 0 within the document."""


class _Known(dict[str, Spelling]):
    """Words met before -> their tokenised form. Bounded; long words are not kept."""

    def __missing__(self, word: str) -> Spelling:
        spelling = tokenise(word)
        if len(word) <= _KNOWN_LENGTH:
            if len(self) >= _KNOWN_WORDS:
                self.clear()
            self[word] = spelling
        return spelling


_KNOWN = _Known()


class WordFeed:
    """Reads a text in chunks of any size; the chunks do not change the words.

    A word is held back until the next one begins, in `markdown` until the one after that. Offsets
    count the characters of the text as it is given. A byte order mark at its start, white space
    there and blanks between words are in no word. Copy a feed with `copy.deepcopy`.
    """

    def __init__(self, form: str) -> None:
        """A feed of texts of one form.

        Raises:
            UserError: the form is none of `FORMS`.
        """
        if form not in FORMS:
            raise UserError(f"no form of text {form!r}; choose from {', '.join(FORMS)}")
        self.form = form
        self.canonical_bytes = 0
        """UTF-8 bytes of the words handed out so far of this document in canonical spelling: plain
        typography, one space between words, one byte for a line end. After `finish`, of the
        document that has ended, until the next one begins."""
        self._begin()

    def _begin(self) -> None:
        self._layout = LineLayout(self.form)
        self._held: list[str] = []
        self._last = ""  # the last character held
        self._at = 0  # where in the text what is held begins
        self._begun = False
        self._sentence = 0
        self._ended = False  # the sentence has ended: the next word begins another
        self._spaced = False  # a word stands before the next one in its line
        self._quoted = False  # wikitext: within double quotes of this line

    def read(self, chunk: str) -> list[Word]:
        """Read on.

        Returns:
            the words that are decided by now.
        """
        words: list[Word] = []
        for start in range(0, len(chunk), _BLOCK):
            words += self._read(chunk[start : start + _BLOCK])
        return words

    def finish(self) -> list[Word]:
        """End the document.

        Returns:
            the rest of its words. The feed is ready for the next document, from 0 on.
        """
        text = "".join(self._held)
        if not self._begun:
            self.canonical_bytes = 0
        words = self._take(text, "", True) if self._begun else []
        self._begin()
        return words

    def _read(self, chunk: str) -> list[Word]:
        if not self._begun:
            self._begun, self.canonical_bytes = True, 0
            if chunk[0] == _BOM:
                chunk, self._at = chunk[1:], 1
        # Join what is held only when a word begins in the chunk: so time is linear.
        begins = _START.search(self._last + chunk)
        self._held.append(chunk)
        self._last = chunk[-1:] or self._last
        if not begins:
            return []
        text = "".join(self._held)
        cut = _last_word(text, len(text))
        if self.form == "markdown":  # the first two words of a line say what it is
            cut = _last_word(text, cut)
        self._held = [text[cut:]]
        return self._take(text[:cut], text[cut:], False)

    def _take(self, text: str, following: str, last: bool) -> list[Word]:
        """Words of `text`, whole words each with the white space after it.

        `following` is what is known of the text after it.
        """
        parts = _GAP.split(text)
        words: list[Word] = []
        if not parts[0] and len(parts) > 1:  # white space at the very start
            if self.form == "wikitext":
                words += self._line_ends(parts[1], self._at)
            self._at += len(parts[1])
            del parts[:2]
        if parts[-1]:
            parts.append("")
        tokens, gaps = parts[:-1:2], parts[1::2]
        if self.form == "wikitext":
            return self._wikitext(words, tokens, gaps, last)
        return self._natural(words, tokens, gaps, following, last)

    def _natural(
        self, words: list[Word], tokens: list[str], gaps: list[str], following: str, last: bool
    ) -> list[Word]:
        """Words of natural spelling; a line end is all of the white space in which it stands."""
        layout, markdown = self._layout, self.form == "markdown"
        at, sentence, ended, spaced = self._at, self._sentence, self._ended, self._spaced
        size, new, known = 0, tuple.__new__, _KNOWN
        following = (following.split(None, 1) or [""])[0] if markdown else following[:1]
        final = len(tokens) if last else -1
        for number, (token, gap, nearby) in enumerate(
            zip(tokens, gaps, [*tokens[1:], following], strict=False), 1
        ):
            forms, count, ends, before, _ = spelling = known[token]
            if markdown:
                layout.begin(token)
                forms = layout.forms(token, forms, gap, number == final)
            line_end = gap != " " and layout.ends_line(gap, nearby, number == final)
            if before:
                forms, ends = spelling.followed_by("" if line_end else nearby)
            if ended:
                sentence += 1
            end = at + len(token)
            words.append(new(Word, (token, at, end, forms, False, sentence)))
            at = end + len(gap)
            size += count + spaced
            ended, spaced = ends or line_end, not line_end
            if line_end:
                words.append(new(Word, (gap, end, at, (), True, sentence)))
                size += 1
        self._at, self._sentence, self._ended, self._spaced = at, sentence, ended, spaced
        self.canonical_bytes += size
        return words

    def _wikitext(
        self, words: list[Word], tokens: list[str], gaps: list[str], last: bool
    ) -> list[Word]:
        """Words as they stand; every newline is a line end, and so is the end of the text."""
        at, new = self._at, tuple.__new__
        self.canonical_bytes += len(canonical_characters("".join(tokens)).encode())
        for token, gap in zip(tokens, gaps, strict=True):
            closes = False
            if self._ended or token == '"':
                closes = token in CLOSERS and (token != '"' or self._quoted)
                self._quoted ^= token == '"'
                if self._ended and not closes:
                    self._sentence += 1
            self._ended = token in ENDS or (self._ended and closes)
            end = at + len(token)
            words.append(new(Word, (token, at, end, (token,), False, self._sentence)))
            at = end + len(gap)
            self.canonical_bytes += self._spaced
            self._spaced = True
            if gap != " ":
                words += self._line_ends(gap, end)
        self._at = at
        if last and self._last != "\n":
            words.append(Word("", at, at, (), True, self._sentence))
            self.canonical_bytes += 1
        return words

    def _line_ends(self, gap: str, at: int) -> list[Word]:
        """The line ends of a gap of WikiText that begins at `at`, one for every newline in it."""
        places = [at + match.start() for match in re.finditer("\n", gap)]
        if places:
            # Blank lines before the first word end no sentence.
            self._ended = self._ended or self._spaced
            self._spaced = self._quoted = False
        self.canonical_bytes += len(places)
        return [Word("\n", place, place + 1, (), True, self._sentence) for place in places]


def _last_word(text: str, stop: int) -> int:
    """Where the last word of `text[:stop]` begins; 0 if there is none."""
    words = text[:stop].rsplit(None, 1)
    return len(text[:stop].rstrip()) - len(words[-1]) if words else 0
