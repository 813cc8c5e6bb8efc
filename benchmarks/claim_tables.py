"""Tables and pictures of the claim, from word losses side by side. Letters: N words, A articles."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import record
from mlm.base.names import CACHE, PROTOCOLS
from mlm.report.evaluation import (
    RESAMPLES,
    bootstrap_interval,
    evaluate_rows,
    gain_ratio,
    half_gains,
    mean_gain,
    position_edges,
    write_evaluation,
)
from mlm.report.figure2 import figure2, first_to_second, letter
from mlm.report.losses import STATIC, LossTable, column_name
from mlm.report.plots import gain_by_position

Seeds = dict[str, list[str]]
"""The columns of each learned rule's seeds, by the name of their mean."""
FORM = "rms, "
"""Beginning of the names of the forms of RMS dynamic evaluation."""
RIVAL, LEARNED_RULE, THREE, TWO = "rms", "four_levels", "three_levels", "two_levels"
MEMORY = ", with n-gram memory"
"""Ending of the names of the rival's columns where it reads with the learned rule's n-gram memory,
before that of the cache."""
OTHERS = {
    "through": "through: ",
    "ngrams": "through with n-grams: ",
    "ngrams_as_usual": "with n-grams: ",
}
"""Options that name other language models, and how the names of their rules' columns begin."""
CLAIMED = {
    LEARNED_RULE: ("4 levels", "1.25"),
    THREE: ("3 levels", "1.25"),
    OTHERS["through"] + LEARNED_RULE: ("4 levels, LM trained through", "1.5"),
    OTHERS["ngrams"] + LEARNED_RULE: ("4 levels, LM trained through with n-grams", "1.5"),
    OTHERS["ngrams_as_usual"] + LEARNED_RULE: ("4 levels, LM trained with n-grams", ""),
}
"""Learned rules: how they are called, and how many times the rival's gain is asked of them."""
CONTROLS = {rule for rule, (_, asked) in CLAIMED.items() if not asked}
"""Those of which nothing is asked: left out of pictures and corpora of another kind."""
OVER_MEMORY = "1.2"
"""How many times the gain of the rival with n-gram memory is asked of learned rules."""
LONG = 10_000
"""Words beyond which a gain should still grow."""
START = 200
"""Words that count as an article's start."""
FREQUENT = 100
"""Types of the text that count as frequent words."""
PAPER = (
    (2_054, 22.4, 20.3, 0.03),
    (2_450, 10.6, 9.6, 0.59),
    (10_382, 17.8, 31.9, 0.34),
    (2_331, 10.6, 9.9, 1.19),
    (10_934, 18.7, 29.2, 1.83),
    (1_773, 14.5, 13.9, 2.31),
    (3_019, 24.0, 31.5, 3.04),
    (7_712, 15.3, 26.9, 0.95),
)
"""Articles A to H of Figure 2 of Wolf et al. 2018: tokens, gain in perplexity of 2 levels over 1 in
the first and the second half, and of 3 levels over 2."""


class Gains:
    """Gains over a static model, the ordinary one if none is named, summed by article."""

    def __init__(
        self, table: LossTable, protocol: str, resamples: int = RESAMPLES, over: str = STATIC
    ) -> None:
        self.table, self.protocol, self.resamples = table, protocol, resamples
        self.static_N = table.loss(over, protocol)

    def sums(self, rule: str, inside_N: np.ndarray | None = None) -> np.ndarray:
        """Nats gained in each article (A,), at the words `inside_N` only."""
        gain_N = self.static_N - self.table.loss(rule, self.protocol)
        if inside_N is not None:
            gain_N = gain_N * inside_N
        return np.bincount(self.table.ordinal_N, gain_N)

    def _found(self, statistic: Callable[..., Any], *samples_A: np.ndarray) -> dict[str, Any]:
        """A statistic over articles and its interval."""
        interval = bootstrap_interval(statistic, *samples_A, resamples=self.resamples)
        return {"found": float(statistic(*samples_A)), "found interval": interval}

    def ratio(self, rule: str, against: str) -> dict[str, Any]:
        """How many times as much a rule gains as another."""
        return self._found(gain_ratio, self.sums(rule), self.sums(against))

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
        return self._found(mean_gain, gain_A[some], words_A[some])

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

        found = self._found(difference, *gains, *words)
        return {**found, "note": f"{int(long_A.sum())} articles"}


def _over_memory(
    gains: Gains, rule: str, seeds: Seeds, form: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """How many times as much a rule gains as the rival with n-gram memory, and with caches on
    both: what is compared, and what is found."""
    title = CLAIMED[rule][0]
    for ending, cache in (("", ""), (CACHE, " + cache")):
        mine, rival = rule + ending, RIVAL + MEMORY + ending
        known = mine in seeds and rival in gains.table.rules(gains.protocol)
        if known and gains.sums(rival).sum() > 0:
            found = gains.ratio(mine, rival) | _by_seed(gains.ratio, seeds[mine], rival)
            yield f"{title}{cache}: times the gain of RMS ({form}) with n-gram memory{cache}", found


def _by_seed(
    compare: Callable[[str, str], dict[str, Any]], names: Sequence[str], against: str
) -> dict[str, str]:
    """What is found for each seed, in a cell."""
    return {"seeds": " ".join(f"{compare(name, against)['found']:.3f}" for name in names)}


def claims(
    table: LossTable,
    seeds: Seeds,
    chosen: Mapping[str, str],
    resamples: int = RESAMPLES,
    brief: bool = False,
) -> list[dict[str, Any]]:
    """What is claimed, what was found, in which protocol; `brief` = totals only."""
    rows: list[dict[str, Any]] = []

    def add(
        what: str, protocol: str, asked: str, found: dict[str, Any] | None, **more: Any
    ) -> None:
        if found is not None:
            rows.append({"what": what, "protocol": protocol, "asked": asked, **more, **found})

    for protocol in PROTOCOLS:
        gains = Gains(table, protocol, resamples)
        rival = f"RMS ({chosen[protocol]})"
        forms = [name for name in table.rules(protocol) if name.startswith(FORM)]
        others = {f"{FORM}{chosen[protocol]}", *(n for n in forms if n.endswith((CACHE, MEMORY)))}
        forms = [name for name in forms if name not in others]
        for rule, (title, asked) in CLAIMED.items():
            if rule not in seeds:
                continue
            each = seeds[rule]
            if gains.sums(RIVAL).sum() > 0:
                times = gains.ratio(rule, RIVAL) | _by_seed(gains.ratio, each, RIVAL)
                add(f"{title}: times the gain of {rival}", protocol, asked, times)
                same, own = (rule.replace(LEARNED_RULE, x) for x in (RIVAL, STATIC))
                if same not in (rule, RIVAL) and {same, own} <= {*table.rules(protocol)}:
                    what = f"{title}, seed 0: times the gain of {rival} on that LM"
                    add(what, protocol, "", gains.ratio(each[0], same))
                    alone = Gains(table, protocol, resamples, own)
                    times = alone.ratio(each[0], same)
                    add(f"{what}, over its own static loss", protocol, "", times)
                for form in forms:
                    what = f"{title}: times the gain of RMS ({form.removeprefix(FORM)})"
                    times = gains.ratio(rule, form) | _by_seed(gains.ratio, each, form)
                    add(what, protocol, "", times)
            else:
                more = gains.more(rule, RIVAL) | _by_seed(gains.more, each, RIVAL)
                add(f"{title}: more than {rival}, which loses", protocol, "> 0", more)
            for what, times in _over_memory(gains, rule, seeds, chosen[protocol]):
                add(what, protocol, OVER_MEMORY if rule in (LEARNED_RULE, THREE) else "", times)
            if rule + CACHE in seeds:
                cached = gains.more(rule + CACHE, RIVAL + CACHE) | _by_seed(
                    gains.more, seeds[rule + CACHE], RIVAL + CACHE
                )
                add(f"{title} + cache: more than {rival} + cache", protocol, "> 0", cached)
            if brief:
                continue
            start_N = table.position_N < START
            add(f"{title}: first {START} words", protocol, "> 0", gains.more(rule, None, start_N))
            if rule == THREE and TWO in seeds:
                more = gains.more(rule, TWO, start_N)
                add(f"{title}: more than 2 levels, first {START} words", protocol, "> 0", more)
            add(f"{title}: beyond {LONG:,} words", protocol, "> 0", gains.growth(rule))
    return rows


def positions(table: LossTable, seeds: Seeds, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """Gain of each rule by position in the article."""
    rows = []
    edges = position_edges(int(table.words_A.max()))
    rules = [RIVAL, *(name for name in seeds if not name.endswith(CACHE))]
    for protocol in PROTOCOLS:
        gains = Gains(table, protocol, resamples)
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


def read_before(table: LossTable) -> tuple[np.ndarray, np.ndarray]:
    """(N,) whether a word was read in its article before, and whether after the same word."""
    _, word_N = np.unique(table.word_N, return_inverse=True)
    first_N = table.position_N == 0
    before_N = np.where(first_N, -1, np.roll(word_N, 1))

    def again(*columns: np.ndarray) -> np.ndarray:
        """(N,) whether the row is there further up."""
        _, where = np.unique(np.stack(columns, 1), axis=0, return_index=True)
        found = np.ones(len(word_N), bool)
        found[where] = False
        return found

    return again(table.article_N, word_N), again(table.article_N, word_N, before_N)


def kinds(table: LossTable, seeds: Seeds) -> list[dict[str, Any]]:
    """What words of a kind cost, nats per word of the text: the rows of a rule sum to its loss."""
    names, counts = np.unique(table.word_N, return_counts=True)
    frequent_N = np.isin(table.word_N, names[np.argsort(-counts, kind="stable")[:FREQUENT]])
    word_N, pair_N = read_before(table)
    seen = {
        "new to the article": ~word_N,
        "read before, after other words": word_N & ~pair_N,
        "read before, after the same word": pair_N,
    }
    rules = [STATIC, RIVAL, *(name for name in seeds if not name.endswith(CACHE))]
    rows = []
    for protocol in PROTOCOLS:
        for title, inside_N in seen.items():
            for which, some_N in (("frequent", frequent_N), ("other", ~frequent_N)):
                here_N = inside_N & some_N
                row: dict[str, Any] = {"protocol": protocol, "word": title, "which": which}
                row["share"] = float(here_N.mean())
                for rule in rules:
                    row[rule] = float((table.loss(rule, protocol) * here_N).mean())
                rows.append(row)
    return rows


def halves(table: LossTable, protocol: str) -> list[dict[str, Any]]:
    """Perplexity gained in the halves of the first articles, beside those of the 2018 figure."""
    rows = []
    for place, (article, paper) in enumerate(zip(table.articles, PAPER, strict=False)):
        words = table.rows(article)
        there = table.rules(protocol)
        rules = [rule for rule in (RIVAL, TWO, THREE, LEARNED_RULE) if rule in there]
        losses = {rule: table.loss(rule, protocol)[words] for rule in (STATIC, *rules)}
        row: dict[str, Any] = {"article": letter(place), "words": words.stop - words.start}
        for rule in rules:
            row[rule] = first_to_second(half_gains(losses[STATIC], losses[rule]))
        if {TWO, THREE} <= {*rules}:
            over = np.exp(losses[TWO].mean()) - np.exp(losses[THREE].mean())
            row[f"{THREE} over {TWO}"] = float(over)
        size, first, second, flush = paper
        row |= {"2018: tokens": size, "2018: 2 levels": first_to_second((first, second))}
        rows.append(row | {"2018: 3 levels over 2": flush})
    return rows


def _only(table: LossTable, rules: Sequence[str]) -> LossTable:
    """The table with these rules' columns."""
    names = [column_name(rule, p) for p in PROTOCOLS for rule in rules]
    return dataclasses.replace(table, losses={n: table.losses[n] for n in names})


def _pairs(seeds: Seeds, rules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Which of the table's rules are compared in their gains."""
    for name, every in seeds.items():
        ending = CACHE if name.endswith(CACHE) else ""
        rival, remembering = RIVAL + ending, RIVAL + MEMORY + ending
        yield name, rival
        yield from ((one, rival) for one in every)
        if remembering in rules:
            yield name, remembering
    yield from (pair for pair in ((LEARNED_RULE, THREE), (THREE, TWO)) if {*pair} <= {*seeds})


def _detail_of_a_seed(row: dict[str, Any]) -> bool:
    """Positions and articles are published of means over seeds, totals of every seed."""
    return row["kind"] in ("position", "article") and ", seed" in row["rule"]


def growths(table: LossTable, corpus: str, resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """Where the gain of one seed grows in long articles."""
    what = f"{CLAIMED[LEARNED_RULE][0]}, seed 0: beyond {LONG:,} words"
    rows = []
    for protocol in PROTOCOLS:
        found = Gains(table, protocol, resamples).growth(LEARNED_RULE)
        if found is not None:
            rows.append(
                {"corpus": corpus, "what": what, "protocol": protocol, "asked": "> 0", **found}
            )
    return rows


def write_tables(
    merged: Mapping[str, tuple[LossTable, Seeds]],
    options: Any,
    chosen: Mapping[str, str],
    long: LossTable | None = None,
) -> None:
    """Tables and pictures of every corpus; the claim's rows, all corpora together.

    The first corpus is the one that is claimed about: of the others, totals and positions; of the
    long articles, growth.
    """
    rows = []
    out = Path(options.out)
    for number, (corpus, (table, seeds)) in enumerate(merged.items()):
        found = claims(table, seeds, chosen, options.resamples, brief=number > 0)
        rows += [{"corpus": corpus, **row} for row in found]
        folder = out / corpus
        totals = evaluate_rows(
            table,
            corpus=corpus,
            words_per_second={},
            settings={},
            comparisons=[*_pairs(seeds, table.rules(PROTOCOLS[0]))],
            resamples=options.resamples,
        )
        write_evaluation(folder, [row for row in totals if not _detail_of_a_seed(row)])
        about = {"corpus": corpus, "split": table.split}
        there = dataclasses.replace(options, out=folder)
        record("positions", positions(table, seeds, options.resamples), there, **about)
        shown = [STATIC, RIVAL, *(s for s in seeds if not s.endswith(CACHE) and s not in CONTROLS)]
        gain_by_position(_only(table, shown), folder / "figures")
        if number:
            continue
        record("kinds", kinds(table, seeds), there, **about)
        record("halves", halves(table, "stream"), there, **about)
        levels = [rule for rule in (TWO, THREE) if rule in seeds] or [LEARNED_RULE]
        figure2(_only(table, [STATIC, *levels]), folder / "figures", protocol="stream")
    if long is not None:
        rows += growths(long, Path(options.long).name, options.resamples)
    record("claims", rows, options, rival=dict(chosen))
