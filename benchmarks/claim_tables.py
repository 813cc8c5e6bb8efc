"""Tables and pictures of the claim, from word losses side by side. Letters: N words, A articles."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import record
from mlm.config import CACHE, PROTOCOLS
from mlm.figure2 import figure2, letter
from mlm.losses import STATIC, LossTable, column_name
from mlm.plots import gain_by_position
from mlm.report import (
    bootstrap_interval,
    evaluate_rows,
    gain_ratio,
    half_gains,
    mean_gain,
    position_edges,
    write_evaluation,
)

Seeds = dict[str, list[str]]
"""The columns of each learned rule's seeds, by the name of their mean."""
RIVAL, LEARNED_RULE, TWO = "rms", "three_levels", "two_levels"
LONG = 10_000
"""Words beyond which a gain should still grow."""
START = 200
"""Words that count as an article's start."""
ARTICLES = 8
"""Successive articles of Figure 2."""


class Gains:
    """Gains over the ordinary static model, summed by article."""

    def __init__(self, table: LossTable, protocol: str) -> None:
        self.table, self.protocol = table, protocol
        self.static_N = table.loss(STATIC, protocol)

    def sums(self, rule: str, inside_N: np.ndarray | None = None) -> np.ndarray:
        """Nats gained in each article (A,), at the words `inside_N` only."""
        gain_N = self.static_N - self.table.loss(rule, self.protocol)
        if inside_N is not None:
            gain_N = gain_N * inside_N
        return np.bincount(self.table.ordinal_N, gain_N)

    def ratio(self, rule: str, against: str) -> dict[str, Any]:
        """How many times as much a rule gains as another."""
        pair = self.sums(rule), self.sums(against)
        return {
            "found": float(gain_ratio(*pair)),
            "found interval": bootstrap_interval(gain_ratio, *pair),
        }

    def more(
        self, rule: str, against: str | None, inside_N: np.ndarray | None = None
    ) -> dict[str, Any]:
        """How many more nats per word a rule gains than another (None = static)."""
        inside_N = np.ones(len(self.static_N)) if inside_N is None else inside_N
        words_A = np.bincount(self.table.ordinal_N, inside_N)
        gain_A = self.sums(rule, inside_N)
        if against is not None:
            gain_A = gain_A - self.sums(against, inside_N)
        some = words_A > 0
        pair = gain_A[some], words_A[some]
        return {
            "found": float(mean_gain(*pair)),
            "found interval": bootstrap_interval(mean_gain, *pair),
        }

    def growth(self, rule: str) -> dict[str, Any] | None:
        """In articles of more than `LONG` words: gain per word beyond it minus that before it."""
        table = self.table
        long_A = table.words_A > LONG
        if not long_A.any():
            return None
        after_N = table.position_N >= LONG
        words = [np.bincount(table.ordinal_N, part)[long_A] for part in (~after_N, after_N)]
        gains = [self.sums(rule, part)[long_A] for part in (~after_N, after_N)]

        def difference(
            before: np.ndarray,
            after: np.ndarray,
            words_before: np.ndarray,
            words_after: np.ndarray,
            axis: int = -1,
        ) -> np.ndarray:
            late = after.sum(axis=axis) / words_after.sum(axis=axis)
            return late - before.sum(axis=axis) / words_before.sum(axis=axis)

        return {
            "found": float(difference(gains[0], gains[1], words[0], words[1])),
            "found interval": bootstrap_interval(difference, *gains, *words),
            "note": f"{int(long_A.sum())} articles",
        }


def claims(table: LossTable, seeds: Seeds, chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """What is claimed, what was found, in which protocol."""
    rows: list[dict[str, Any]] = []
    models = {name.rpartition(": ")[0]: name for name in seeds if name.endswith(LEARNED_RULE)}

    def add(
        what: str, protocol: str, asked: str, found: dict[str, Any] | None, **more: Any
    ) -> None:
        if found is not None:
            rows.append({"what": what, "protocol": protocol, "asked": asked, **more, **found})

    for protocol in PROTOCOLS:
        gains = Gains(table, protocol)
        rival = f"RMS ({chosen[protocol]})"
        for model, rule in models.items():
            title = "3 levels" + (", LM trained through" if model else "")
            each = [gains.ratio(name, RIVAL)["found"] for name in seeds[rule]]
            add(
                f"{title}: times the gain of {rival}",
                protocol,
                "1.5" if model else "1.25",
                gains.ratio(rule, RIVAL),
                seeds=" ".join(f"{value:.3f}" for value in each),
            )
            cached = gains.more(rule + CACHE, RIVAL + CACHE)
            cached["seeds"] = " ".join(
                f"{gains.more(name, RIVAL + CACHE)['found']:.3f}" for name in seeds[rule + CACHE]
            )
            add(f"{title} + cache: more than {rival} + cache", protocol, "> 0", cached)
            prefix = rule.removesuffix(LEARNED_RULE)
            start_N = table.position_N < START
            add(f"{title}: first {START} words", protocol, "> 0", gains.more(rule, None, start_N))
            add(
                f"{title}: more than 2 levels, first {START} words",
                protocol,
                "> 0",
                gains.more(rule, prefix + TWO, start_N),
            )
            add(f"{title}: beyond {LONG:,} words", protocol, "> 0", gains.growth(rule))
    return rows


def positions(table: LossTable, seeds: Seeds) -> list[dict[str, Any]]:
    """Gain of each rule by position in the article."""
    rows = []
    edges = position_edges(int(table.words_A.max()))
    rules = [RIVAL, *(name for name in seeds if not name.endswith(CACHE))]
    for protocol in PROTOCOLS:
        gains = Gains(table, protocol)
        for start, stop in itertools.pairwise(edges):
            inside_N = (table.position_N >= start) & (table.position_N < stop)
            row: dict[str, Any] = {
                "protocol": protocol,
                "from": start,
                "to": stop,
                "articles": int((table.words_A > start).sum()),
                "words": int(inside_N.sum()),
            }
            for rule in rules:
                found = gains.more(rule, None, inside_N)
                row |= {rule: found["found"], f"{rule} interval": found["found interval"]}
            rows.append(row)
    return rows


def halves(table: LossTable, protocol: str, number: int = ARTICLES) -> list[dict[str, Any]]:
    """Perplexity gained in the two halves of the first articles, as beside the 2018 figure."""
    rows = []
    for place, article in enumerate(table.articles[:number]):
        words = table.rows(article)
        loss = {
            rule: table.loss(rule, protocol)[words] for rule in (STATIC, RIVAL, TWO, LEARNED_RULE)
        }
        row: dict[str, Any] = {"article": letter(place), "words": words.stop - words.start}
        for name, against in ((TWO, STATIC), (LEARNED_RULE, STATIC), (RIVAL, STATIC)):
            first, second = half_gains(loss[against], loss[name])
            row |= {f"{name}, 1st half": first, f"{name}, 2nd half": second}
        row["three_levels over two_levels"] = float(
            np.exp(loss[TWO].mean()) - np.exp(loss[LEARNED_RULE].mean())
        )
        rows.append(row)
    return rows


def _only(table: LossTable, rules: Sequence[str]) -> LossTable:
    """The table with these rules' columns."""
    names = [column_name(rule, p) for p in PROTOCOLS for rule in rules]
    return dataclasses.replace(table, losses={n: table.losses[n] for n in names})


def _pairs(seeds: Seeds) -> Iterator[tuple[str, str]]:
    """Which rules' gains are compared."""
    for name, every in seeds.items():
        rival = RIVAL + CACHE if name.endswith(CACHE) else RIVAL
        yield name, rival
        yield from ((one, rival) for one in every)
        if name.endswith(LEARNED_RULE):
            yield name, name.replace(LEARNED_RULE, TWO)


def write_tables(
    merged: Mapping[str, tuple[LossTable, Seeds]], options: Any, chosen: Mapping[str, str]
) -> None:
    """Tables and pictures of every corpus; the claim's rows, all corpora together."""
    rows = []
    out = Path(options.out)
    for corpus, (table, seeds) in merged.items():
        rows += [{"corpus": corpus, **row} for row in claims(table, seeds, chosen)]
        folder = out / corpus
        write_evaluation(
            folder,
            evaluate_rows(
                table, corpus=corpus, words_per_second={}, settings={}, comparisons=[*_pairs(seeds)]
            ),
        )
        about = {"corpus": corpus, "split": table.split}
        there = dataclasses.replace(options, out=folder)
        record("positions", positions(table, seeds), there, **about)
        record("halves", halves(table, "stream"), there, **about)
        shown = [STATIC, RIVAL, *(s for s in seeds if not s.endswith(CACHE))]
        gain_by_position(_only(table, shown), folder / "figures")
        figure2(_only(table, [STATIC, TWO, LEARNED_RULE]), folder / "figures", protocol="stream")
    record("claims", rows, options, rival=dict(chosen))
