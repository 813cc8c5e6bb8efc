"""Sequences of multi-query associative recall (MQAR), with and without keys that are bound again.

A sequence binds keys to values, `k1 v7 k4 v2 ...`, and asks later for every key once, `k4 v2`: the
model reads `k4` and has to predict `v2`. Keys and values are drawn anew for every sequence, so that
nothing but the sequence itself says which value belongs to which key (Arora et al. 2023, "Zoology",
arXiv 2312.04927). In the forgetting variant some keys are bound to another value behind all pairs,
and the last value counts. A query stands in one of the slots of two tokens behind the pairs; slot s
= 1, 2, ... is drawn with probability proportional to s^(a - 1), and a slot without a query holds
blanks. As a language model reads it, the answer stands in the text behind its query; no key is
asked for twice, so that it helps nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm.base.errors import UserError
from mlm.base.files import write_text

BLANK = "."
POWER = 0.01
"""a: near to the first slots, a long tail, as in the published figures."""
HEAD = " \n = recall = \n \n"
"""What makes a sequence an article; its words and line ends are tokens before the sequence."""
HEAD_TOKENS = 6


class Size(NamedTuple):
    """Of a sequence."""

    length: int
    """Tokens."""
    pairs: int
    """Different keys."""
    again: int = 0
    """Keys that are bound a second time."""

    @property
    def task(self) -> str:
        """The name of its task."""
        return "forgetting" if self.again else "MQAR"


SIZES = (
    *(Size(64, 4), Size(64, 8), Size(64, 16), Size(128, 32), Size(256, 64)),
    *(Size(64, 4, 4), Size(64, 9, 4), Size(128, 16, 4), Size(256, 36, 4)),
)
"""Those of the published tests up to 256 tokens: 4 keys are bound again in the variant."""


class Query(NamedTuple):
    """A key that is asked for."""

    answer: int
    """Place of the token to predict, in the sequence."""
    value: int
    """Place of the value that was last bound to the key."""
    bound_again: bool
    old: int
    """Place of the value that was bound to it first; `value` if there is no other."""


class Recall(NamedTuple):
    """A sequence."""

    size: Size
    words: list[str]
    queries: list[Query]

    @property
    def article(self) -> str:
        """The sequence as an article in WikiText's form."""
        return f"{HEAD} {' '.join(self.words)} \n"


def key(number: int) -> str:
    """The word of a key."""
    return f"k{number}"


def value(number: int) -> str:
    """The word of a value."""
    return f"v{number}"


def recall_sequence(size: Size, words: int, rng: np.random.Generator) -> Recall:
    """A sequence of half of `words` keys and half of them values.

    Raises:
        UserError: its pairs and queries do not fit into its length, or the words do not suffice.
    """
    length, pairs, again = size
    half, context = words // 2, 2 * (pairs + again)
    slots = (length - context) // 2
    if length % 2 or again > pairs or slots < pairs:
        raise UserError(
            f"{pairs} pairs, {again} bound again, in {length} tokens: the length must be even and "
            f"at least {2 * context - 2 * again}, and no more keys than there are be bound again"
        )
    if half < pairs + again:
        raise UserError(f"{words} words: use at least {2 * (pairs + again)} for {pairs} pairs")
    keys = rng.choice(half, pairs, replace=False).tolist()
    values = rng.choice(half, pairs + again, replace=False).tolist()
    bound = np.concatenate([np.arange(pairs), rng.choice(pairs, again, replace=False)])
    weights = np.arange(1, slots + 1) ** (POWER - 1)
    chosen = rng.choice(slots, pairs, replace=False, p=weights / weights.sum())
    text = [w for k, v in zip(bound, values, strict=True) for w in (key(keys[k]), value(v))]
    text += [BLANK] * (length - context)
    queries = []
    for k, slot in sorted(enumerate(chosen), key=lambda found: found[1]):
        at, places = context + 2 * int(slot), np.flatnonzero(bound == k)
        old, last = (2 * int(place) + 1 for place in (places[0], places[-1]))
        text[at : at + 2] = key(keys[k]), text[last]
        queries.append(Query(at + 1, last, len(places) > 1, old))
    return Recall(size, text, queries)


def recall_sequences(
    sizes: Sequence[Size], tokens: int, words: int, seed: int, split: int
) -> list[Recall]:
    """Sequences of all sizes, about `tokens` tokens of each, in random order."""
    rng = np.random.default_rng([seed, split])
    wanted = [size for size in sizes for _ in range(max(1, tokens // size.length))]
    return [recall_sequence(wanted[k], words, rng) for k in rng.permutation(len(wanted))]


def write_sequences(path: Path, sequences: Iterable[Recall]) -> None:
    """Write a split."""
    write_text(path, "".join(sequence.article for sequence in sequences))
