"""A component of a spaCy pipeline, `mlm_surprisal`: `token._.surprisal` (extra `spacy`).

spaCy's tokens are not the model's words: of "Hello," it makes two. A word is therefore divided into
the parts that the model itself divides it into, as far as their spelling can be found in the text.
The first part bears the correction for the boundary before the word, the last that for the one
behind it: so the parts add up to the word's surprisal.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlm.base.errors import UserError
from mlm.reader import load

try:
    from spacy.language import Language  # pyright: ignore[reportMissingImports]
    from spacy.tokens import Doc, Span, Token  # pyright: ignore[reportMissingImports]
except ImportError:
    raise UserError("spaCy is not installed; install mlm with its extra `spacy`") from None

_MARKS = {"@-@": "-", "@,@": ",", "@.@": "."}  # WikiText's marks of what joins two words


class Part(NamedTuple):
    """Some characters of a text and their surprisal in bits."""

    start: int
    end: int
    bits: float


class SurprisalPipe:
    """Scores documents; sets `surprisal` of tokens and spans, None where the model's words do not
    tell.

    Args:
        model: what `mlm.load` takes, or what it has given.
        rule: how the weights are rewritten while a document is read.
        form: how the texts are written.
        attribute: the name below `._.`, so that a pipeline can hold components of several rules.
    """

    def __init__(
        self, model: Any, rule: str = "best", form: Any = "plain", attribute: str = "surprisal"
    ) -> None:
        self.model = load(model) if isinstance(model, str) else model
        self.rule, self.form, self.key = rule, form, f"mlm.{attribute}"

        def of_token(token: Token) -> float | None:
            start = token.idx
            return _between(token.doc.user_data.get(self.key), start, start + len(token.text))

        def of_span(span: Span) -> float | None:
            return _between(span.doc.user_data.get(self.key), span.start_char, span.end_char)

        Token.set_extension(attribute, getter=of_token, force=True)
        Span.set_extension(attribute, getter=of_span, force=True)

    def __call__(self, doc: Doc) -> Doc:
        """Read a document, from the static weights on."""
        table = self.model.score_many([doc.text], rule=self.rule, form=self.form, stats=("pieces",))
        doc.user_data[self.key] = divide(table.to_pylist())
        return doc


def divide(rows: Sequence[dict[str, Any]]) -> list[Part]:
    """The parts of all words of one document, in order.

    Args:
        rows: of the model's table, with the column `pieces`.
    """
    found: list[Part] = []
    before = 0.0  # -log P(a word begins) where the word begins, bits
    for row in rows:
        after = before + row["surprisal"] - row["surprisal_plain"]
        forms: list[list[dict[str, Any]]] = []
        for piece in row["pieces"]:
            if piece["piece"].startswith(" ") or not forms:
                forms.append([])
            forms[-1].append(piece)
        spelled = ["".join(piece["piece"] for piece in form).strip() for form in forms]
        bits: list[float] = [sum(piece["bits"] for piece in form) for form in forms]
        bits[0] -= before
        bits[-1] += after
        edges = _edges(row["word"], [_MARKS.get(form, form) for form in spelled])
        if edges is None:
            edges, bits = [0, len(row["word"])], [row["surprisal"]]
        starts = [row["char_start"] + edge for edge in edges]
        found += map(Part, starts[:-1], starts[1:], bits)
        before = after
    return found


def _edges(word: str, forms: Sequence[str]) -> list[int] | None:
    """Where the forms of a word begin in it, and its end; None if they do not spell it.

    Other typography, such as curly quotes, counts as the same.
    """
    edges, spelled = [0], "".join(forms)
    same = len(word) == len(spelled) and all(
        a == b or not (a.isalnum() or b.isalnum()) for a, b in zip(word, spelled, strict=True)
    )
    for form in forms:
        edges.append(edges[-1] + len(form))
    return edges if same else None


def _between(parts: Sequence[Sequence[Any]] | None, start: int, end: int) -> float | None:
    """Bits of the parts between two places; None if there are none, or if one is cut."""
    if not parts:
        return None
    first = bisect.bisect_right(parts, start, key=lambda part: part[1])
    last = bisect.bisect_left(parts, end, key=lambda part: part[0])
    inside = parts[first:last]
    if not inside or inside[0][0] < start or inside[-1][1] > end:
        return None
    return float(sum(bits for *_, bits in inside))


@Language.factory(
    "mlm_surprisal", default_config={"rule": "best", "form": "plain", "attribute": "surprisal"}
)
def make_surprisal_pipe(
    nlp: Language, name: str, model: str, rule: str, form: str, attribute: str
) -> SurprisalPipe:
    """What `nlp.add_pipe("mlm_surprisal", config={"model": ...})` makes."""
    return SurprisalPipe(model, rule, form, attribute)
