"""One word of natural spelling -> the words of WikiText's tokenised form.

The rules are those of the Moses tokeniser for English with split hyphens (Koehn et al. 2007), as
WikiText used it, and WikiText's own marks inside numbers (Merity et al. 2016): `well @-@ known`,
`1 @,@ 000`, `3 @.@ 5`. `docs/spelling.md` lists them and says where this module differs.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from mlm.spelling.canonical import canonical_characters

#: Marks that end a sentence.
ENDS = frozenset(".!?。！？؟।")
#: Marks that may stand between the end of a sentence and the next space.
CLOSERS = frozenset("\"')]}»")

_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys("“”„‟", '"'),
        **dict.fromkeys("‘’‚‛ʼ´", "'"),
        **dict.fromkeys("\u2010\u2011", "-"),  # hyphen, non-breaking hyphen
        **dict.fromkeys("\u00ad\u200b\u2060\ufeff"),  # soft hyphen, zero-width space, joiners
        "…": "...",
    }
)
_DASHES = re.compile(r"(?<!-)-{2,3}(?!-)")

# A word's shape has one character for each of its own: a letter, 0 digit, m mark that belongs to
# the character before it, j zero-width joiner, r half of a flag, * any other sign.
_CHUNK = r"(?>[amj0`-]+|\.(?!\.)|(?<=0),(?=0))++"
_PIECES = re.compile(
    rf"\.{{2,}}|(?<=[amj0])'(?=a){_CHUNK}|{_CHUNK}|rr?m*+|\*m*+(?>j+\*m*+)*+j*+|[',]"
)
_INSIDE = re.compile(r"(?<=[amj0])-(?=[a0])|(?<=0)[.,](?=0)")
_DOTTED = re.compile(r"'?(?:am*){1,2}(?:\.(?:am*){1,2})+")


class _Shapes(dict[int, str]):
    """Code points -> characters of a shape; filled as they are met."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        if category[0] == "L" or category == "Nl":
            shape = "a"
        elif category[0] == "M" or category == "Cf" or 0x1F3FB <= code <= 0x1F3FF:
            shape = "m"  # the last are tones of skin
        elif category == "Nd":
            shape = "0"
        else:
            shape = "r" if 0x1F1E6 <= code <= 0x1F1FF else "*"
        self[code] = shape
        return shape


_SHAPES = _Shapes({**{ord(sign): sign for sign in ".,'`-"}, 0x200D: "j"})


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Abbreviations that keep their period, whatever follows.
_ALWAYS = _words(
    "Adm Bros Brig Capt Cmdr Co Col Corp Cpl Dr Drs Ens Fr Ft Gen Gov Hon Inc Jr Lt Ltd Maj Messrs "
    "Mlle Mme Mr Mrs Ms Msgr Mt Op Pfc Prof Pvt Rep Rev Sen Sens Sfc Sgt Sr St Supt "
    "al cf v viz vs"
)
# Those that keep it before a number.
_BEFORE_DIGIT = _words("Art No Nos Nr pp")
# Those that keep it before a small letter.
_BEFORE_SMALL = _words(
    "Assn Ave Blvd Dept Etc Rd Univ approx assn ave b c ca cent d dept ed eds esp est etc f fl ft "
    "hr hrs lb lbs lit m mm op pl r sing sp spp sq subsp univ var"
)


class Spelling(NamedTuple):
    """A word of natural spelling, tokenised.

    A final period may belong to an abbreviation. If what follows decides that, `before` says what
    must follow ("digit" or "small") for `kept` to be the words instead of `forms`.
    """

    forms: tuple[str, ...]
    size: int
    """UTF-8 bytes in plain typography."""
    ends: bool
    """A sentence ends with `forms`; none ends with `kept`."""
    before: str = ""
    kept: tuple[str, ...] = ()

    def followed_by(self, following: str) -> tuple[tuple[str, ...], bool]:
        """The words and whether a sentence ends, given what follows in the line ("" = nothing)."""
        first = following[:1]
        if first.isdigit() if self.before == "digit" else first.islower():
            return self.kept, False
        return self.forms, self.ends


def plain_typography(word: str) -> str:
    """`word` with plain quotes, apostrophes, hyphens and dots, in Unicode's composed form."""
    if not word.isascii():
        # Invisible characters alone stay as they are: no word is without a form.
        word = unicodedata.normalize("NFC", word.translate(_TYPOGRAPHY)) or word
    return _DASHES.sub("—", word) if "--" in word else word


def ends_sentence(forms: tuple[str, ...]) -> bool:
    """Whether a sentence ends with these words: with `.`, `!` or `?`, perhaps closed by marks."""
    last = len(forms) - 1
    while last > 0 and forms[last] in CLOSERS:
        last -= 1
    return forms[last] in ENDS


def _keeps(chunk: str, shape: str) -> str:
    """When a final period stays with `chunk`: "always", "digit", "small" or "" (never)."""
    if chunk in _ALWAYS or (len(chunk) == 1 and chunk.isupper()) or _DOTTED.fullmatch(shape):
        return "always"
    if chunk in _BEFORE_DIGIT:
        return "digit"
    return "small" if chunk in _BEFORE_SMALL else ""


def tokenise(word: str) -> Spelling:
    """Tokenise a word: what white space separates in natural spelling. Linear in its length."""
    word = plain_typography(canonical_characters(word))
    shape = word.translate(_SHAPES)
    forms: list[str] = []
    before, period = "", False
    for match in _PIECES.finditer(shape):
        start, end = match.span()
        if end - start == 1 or shape[start : start + 2] == "..":
            forms.append(word[start:end])
            continue
        for sign in _INSIDE.finditer(shape, start, end):
            forms += (word[start : sign.start()], f"@{word[sign.start()]}@")
            start = sign.end()
        period = shape[end - 1] == "."
        if not period:
            forms.append(word[start:end])
            continue
        before = _keeps(word[start : end - 1], shape[start : end - 1])
        if before == "always":
            forms.append(word[start:end])
        else:
            forms += (word[start : end - 1], ".")
    made, size = tuple(forms), len(word.encode())
    if before in ("digit", "small") and period and shape.endswith(".") and made[-1] == ".":
        return Spelling(made, size, True, before, (*made[:-2], made[-2] + "."))
    return Spelling(made, size, ends_sentence(made))
