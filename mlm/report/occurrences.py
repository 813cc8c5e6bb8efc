"""What happens when a word comes back: losses by occurrence, by distance, of new and known words.

An occurrence is counted within its article, words compared as they are spelled, line ends too.
Letters: N words, A articles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlm.base.names import STATIC
from mlm.report.losses import LossTable

OPEN = None
"""The upper end of a bin that has none."""

NOVELTIES = ((1, 2), (2, OPEN))
"""Bins of occurrence numbers: new to the article, seen before."""

OCCURRENCES = ((1, 2), (2, 3), (3, 4), (4, 5), (5, 9), (9, OPEN))
"""Bins of occurrence numbers, counted from 1; the end is exclusive."""

DISTANCES = ((1, 51), (51, 201), (201, 801), (801, 3201), (3201, OPEN))
"""Bins of words since the occurrence before; 1 = the word stands twice in a row."""

FIRST_LOSSES = ((0, 2), (2, 5), (5, 10), (10, OPEN))
"""Bins of the static loss (nats) of the word's first occurrence in the article."""

SHARED_OCCURRENCES = 4
"""Rows by occurrence are of words that the article has at least this often, so that the first four
bins hold the same words."""

Interval = Callable[[np.ndarray, np.ndarray], list[float] | None]
"""The interval of nats gained per word, from the nats gained and the words of every article."""


class Recurrence(NamedTuple):
    """Where every word occurred before in its article."""

    number_N: np.ndarray
    """Its occurrence's number, from 1."""
    distance_N: np.ndarray
    """Words since the occurrence before; 0 for the first."""
    first_N: np.ndarray
    """The row of the first occurrence."""
    count_N: np.ndarray
    """How often the article has the word."""

    @classmethod
    def of(cls, table: LossTable) -> Recurrence:
        """Count the occurrences of every word of a table."""
        words = pa.array(table.word_N, pa.string()).dictionary_encode()
        code_N = words.indices.to_numpy().astype(np.int64)
        key_N = table.ordinal_N.astype(np.int64) * len(words.dictionary) + code_N
        row_N = np.argsort(key_N, kind="stable")  # by article and word, then in reading order
        sorted_N = key_N[row_N]
        starts = np.flatnonzero(np.diff(sorted_N, prepend=sorted_N[0] - 1))
        sizes = np.diff(starts, append=len(row_N))
        start_N = np.repeat(starts, sizes)
        number_N, distance_N = np.empty_like(row_N), np.empty_like(row_N)
        first_N, count_N = np.empty_like(row_N), np.empty_like(row_N)
        number_N[row_N] = np.arange(len(row_N)) - start_N + 1
        distance_N[row_N] = np.where(np.arange(len(row_N)) == start_N, 0, row_N - np.roll(row_N, 1))
        first_N[row_N] = row_N[start_N]
        count_N[row_N] = np.repeat(sizes, sizes)
        return cls(number_N, distance_N, first_N, count_N)


def recurrence_rows(
    table: LossTable, seen: Recurrence, rule: str, protocol: str, interval: Interval
) -> list[dict[str, Any]]:
    """The rows of kinds `novelty`, `occurrence` and `distance` of one rule in one protocol.

    A bin without words has no row. `from` and `to` bound the bin (`to` is exclusive, None = no
    bound), `first_loss_from` and `_to` the static loss at the word's first occurrence, in nats.
    """
    loss_N, static_N = table.loss(rule, protocol), table.loss(STATIC, protocol)
    rows: list[dict[str, Any]] = []
    for name, inside_N in _bins(seen, static_N):
        if inside_N.any():
            about = {"rule": rule, "protocol": protocol, "split": table.split}
            found = measured(table, loss_N, static_N, inside_N, interval)
            rows.append({"kind": name.pop("kind")} | about | name | found)
    return rows


def measured(
    table: LossTable,
    loss_N: np.ndarray,
    static_N: np.ndarray,
    inside_N: np.ndarray,
    interval: Interval,
) -> dict[str, Any]:
    """What a rule with these losses gains on some words, at least one, and their share of all."""
    gain_N, words = static_N - loss_N, int(inside_N.sum())
    total = float(gain_N.sum())
    words_A = np.bincount(table.ordinal_N[inside_N], minlength=len(table.start_A))
    gain_A = np.bincount(table.ordinal_N[inside_N], gain_N[inside_N], len(table.start_A))
    some_A = words_A > 0
    gain = float(gain_N[inside_N].sum())
    return (
        {"articles": int(some_A.sum()), "words": words, "nll": float(loss_N[inside_N].sum())}
        | {"share_of_words": words / len(loss_N)}
        | {"share_of_gain": gain / total if total > 0 and math.isfinite(total) else None}
        | {"nats_per_word_gained": gain / words}
        | {"interval": interval(gain_A[some_A], words_A[some_A])}
    )


def _bins(seen: Recurrence, static_N: np.ndarray) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """What names a bin, and which words are in it (N,)."""
    for start, stop in NOVELTIES:
        name = {"kind": "novelty", "from": start, "to": stop}
        yield name, within(seen.number_N, start, stop)
    often_N = seen.count_N >= SHARED_OCCURRENCES
    for low, high in FIRST_LOSSES:
        group_N = often_N & within(static_N[seen.first_N], low, high)
        for start, stop in OCCURRENCES:
            name = {"kind": "occurrence", "first_loss_from": low, "first_loss_to": high}
            name |= {"from": start, "to": stop}
            yield name, group_N & within(seen.number_N, start, stop)
    for start, stop in DISTANCES:
        name = {"kind": "distance", "from": start, "to": stop}
        yield name, within(seen.distance_N, start, stop)


def within(value_N: np.ndarray, start: float, stop: float | None) -> np.ndarray:
    """Which values are in a bin (N,)."""
    return (value_N >= start) & (value_N < (np.inf if stop is None else stop))


def bin_label(start: int, stop: int | None) -> str:
    """Return a bin of whole numbers as readers write it: `4`, `5 to 8`, `9 or more`."""
    if stop is None:
        return f"{start:,} or more"
    return f"{start:,}" if stop == start + 1 else f"{start:,} to {stop - 1:,}"


def first_loss_label(low: float, high: float | None) -> str:
    """Return a bin of first static losses as readers write it: `2 to 5 nats`."""
    if high is None:
        return f"{low:g} nats or more"
    return f"below {high:g} nats" if low == 0 else f"{low:g} to {high:g} nats"
