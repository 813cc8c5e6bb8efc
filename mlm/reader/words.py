"""Words of a text with their surprisal, as an Arrow table.

A language model predicts pieces, and a piece that begins a word holds the word's leading space. So
the sum of a word's pieces prices the end of the word before, and not its own. With b = -log P(the
next piece begins a word), the surprisal of a word of pieces i .. j-1 is

    S = sum of nll_i .. nll_{j-1} - b_i + b_j

(Pimentel and Meister 2024; Oh and Schuler 2024, "leading whitespaces"). Everything begins a word at
the start of a text: b_0 counts as 0. So all words together cost what all pieces cost, and the
boundary behind the last word.

Letters: W words, T pieces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlm.base.names import CACHE, STATIC
from mlm.reading.lanes import Details
from mlm.spelling import Word

MAIN = "surprisal"
"""The main rule's column."""
STATS = ("entropy", "rank", "top_k", "pieces")
"""What a table may tell besides: of the distribution of each word's first piece, and what each of
its pieces costs."""
SHOWN = 5
"""Pieces of `top_k`."""


def corrected(
    nll: np.ndarray, boundary: np.ndarray, first: np.ndarray, opens: bool = True
) -> np.ndarray:
    """Surprisal of words (W,), in the unit of `nll`.

    Args:
        nll: (T,) of every piece.
        boundary: (T + 1,) -log P(piece t begins a word | the pieces before it); the last is that of
            what follows.
        first: (W,) every word's first piece.
        opens: whether the text begins with the first of these words.
    """
    if not len(first):
        return np.zeros(0)
    before = boundary[first].copy()
    if opens:
        before[0] = 0.0
    after = boundary[np.append(first[1:], len(nll))]
    return np.add.reduceat(nll, first) - before + after


class Prices(NamedTuple):
    """What a rule says of T pieces, in nats."""

    nll: np.ndarray
    """(T,)."""
    boundary: np.ndarray
    """(T,) -log P(the piece begins a word)."""


def column(rule: str) -> str:
    """A rule's column beside the main one's."""
    return f"surprisal_{rule.replace(CACHE, '_cache')}"


def schema(rules: Sequence[str], stats: Sequence[str], about: Mapping[str, Any]) -> Any:
    """Of the table: its columns, their units, and whose they are.

    Args:
        rules: the first is that of `surprisal`; each of the others has a column of its own, and so
            has static in any case.
        about: what else is to be known, for the metadata.
    """

    def field(name: str, kind: Any, unit: str) -> Any:
        return pa.field(name, kind, nullable=False, metadata={"unit": unit})

    def bits(name: str, rule: str) -> list[Any]:
        fields = (
            field(name, pa.float64(), "bits, corrected for word boundaries"),
            field(f"{name}_plain", pa.float64(), "bits, sum of the word's pieces"),
        )
        return [f.with_metadata({**f.metadata, b"rule": rule.encode()}) for f in fields]

    fields = [
        field("doc_id", pa.int32(), "document, from 0"),
        field("word_id", pa.int32(), "word within the document, from 0"),
        field("sent_id", pa.int32(), "sentence within the document, from 0"),
        field("char_start", pa.int64(), "characters of the document"),
        field("char_end", pa.int64(), "characters of the document"),
        field("word", pa.string(), "the text itself"),
        field("n_tokens", pa.int32(), "pieces"),
        *bits(MAIN, rules[0]),
        *bits(column(STATIC), STATIC),
    ]
    for rule in rules[1:]:
        fields += bits(column(rule), rule) if rule != STATIC else []
    kinds = {
        "entropy": (pa.float64(), "bits, of the first piece"),
        "rank": (pa.int32(), "of the first piece; 1 = the most likely"),
        "top_k": (
            pa.list_(pa.struct([("piece", pa.string()), ("bits", pa.float64())])),
            "most likely first pieces",
        ),
    }
    piece = [("piece", pa.string()), ("bits", pa.float64()), ("rank", pa.int32())]
    kinds["pieces"] = (pa.list_(pa.struct(piece)), "every piece: bits, and rank")
    fields += [field(name, *kinds[name]) for name in STATS if name in stats]
    return pa.schema(fields, metadata={"mlm": json.dumps(dict(about))})


class Batch(NamedTuple):
    """Words of one document, one after another, with all their pieces."""

    document: int
    place: int
    """Of the first word in the document."""
    words: list[Word]
    first: np.ndarray
    """(W,) each word's first piece."""
    tokens: int
    """T."""


def rows(
    of: Any,
    batch: Batch,
    prices: Mapping[str, Prices],
    after: Mapping[str, float],
    details: Details | None,
    names: Sequence[str],
) -> Any:
    """The table of these words, at least one.

    Args:
        of: its `schema`.
        prices: by column: `surprisal`, `surprisal_static` and so on; without the latter, static is
            the main rule.
        after: by column: -log P(a word begins) behind the last piece, nats.
        names: the pieces' spellings, by token.
    """
    words, first = batch.words, batch.first
    number = len(words)
    data: dict[str, Any] = {
        "doc_id": np.full(number, batch.document, dtype=np.int32),
        "word_id": np.arange(batch.place, batch.place + number, dtype=np.int32),
        "sent_id": np.array([w.sentence for w in words], dtype=np.int32),
        "char_start": np.array([w.start for w in words], dtype=np.int64),
        "char_end": np.array([w.end for w in words], dtype=np.int64),
        "word": [w.text for w in words],
        "n_tokens": np.diff(np.append(first, batch.tokens)).astype(np.int32),
    }
    bit = math.log(2)
    static = column(STATIC)
    for name, price in {static: prices[MAIN], **prices}.items():
        boundary = np.append(price.boundary, after.get(name, after[MAIN]))
        data[name] = corrected(price.nll, boundary, first, batch.place == 0) / bit
        data[f"{name}_plain"] = np.add.reduceat(price.nll, first) / bit
    if details is not None:
        data["entropy"] = details.entropy[first] / bit
        data["rank"] = details.rank[first].astype(np.int32)
        if "top_k" in of.names:
            data["top_k"] = [
                [
                    {"piece": names[int(p)], "bits": float(b) / bit}
                    for p, b in zip(details.pieces[t], details.best[t], strict=True)
                ]
                for t in first
            ]
        if "pieces" in of.names:
            main = prices[MAIN]
            came = [
                {"piece": names[int(p)], "bits": float(b) / bit, "rank": int(r)}
                for p, b, r in zip(details.came, main.nll, details.rank, strict=True)
            ]
            ends = np.append(first[1:], len(came))
            data["pieces"] = [came[i:j] for i, j in zip(first, ends, strict=True)]
    arrays = [pa.array(data[field.name], type=field.type) for field in of]
    return pa.Table.from_arrays(arrays, schema=of)
