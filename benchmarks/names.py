"""What does the memory remember? Gains on names and on other words, mention by mention.

    python -m benchmarks.names runs/benchmarks/kneser_ney --corpus data/wikipedia

FOLDER holds `losses.parquet`: that of `benchmarks.kneser_ney`, which has the n-grams as well, or an
evaluated run. The training text says how frequent a word is. A word of an article is a *name* if

* it begins with a capital and has two letters or more,
* the article has it elsewhere than at the start of a sentence or of a heading,
* the article does not have it in lower case, and
* the training text has it in lower case at most a tenth as often as so.

So months, nationalities and initialisms are names, too. Other words hold a letter and no digit,
numbers a digit, marks neither, line ends among them. Mentions are counted within an article, its
title included; the distance is in words. Every gain is over the static model, on the same words.
Letters: N words, A articles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from matplotlib.axes import Axes

from benchmarks.kneser_ney import MIXED, NAME, title
from benchmarks.output import HOME
from benchmarks.timing import record
from mlm.base.errors import UserError, run_cli
from mlm.base.names import CACHE, EOS, RULES, STATIC
from mlm.base.terminal import say
from mlm.report.drawing import new_figure, project_style, rule_style, save_figure
from mlm.report.evaluation import POSITION_RESAMPLES, interval_of
from mlm.report.losses import LossTable
from mlm.report.occurrences import (
    DISTANCES,
    OCCURRENCES,
    OPEN,
    Recurrence,
    bin_label,
    measured,
    within,
)
from mlm.text.corpora import open_corpus
from mlm.text.tokens import UNK, limited

FREQUENCIES = ((0, 1), (1, 10), (10, 100), (100, 1000), (1000, OPEN))
"""Bins of how often the training text has a word."""
ENDS = frozenset({EOS, "=", ".", "!", "?", ":", ";", '"', "“", "”", "("})
"""Words behind which a capital says nothing."""
RARE = 10
"""How many times as often a name is written with a capital."""
KINDS = ("names", "other words", "numbers", "marks", UNK)


@dataclass(frozen=True)
class Options:
    """Gains on names and on other words, by mention, distance and frequency."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with losses.parquet."""
    corpus: str
    """The text that the model was trained with: its training split is counted."""
    split: str | None = None
    """Split of the losses; by default valid, else the first."""
    protocol: Literal["article", "stream"] = "article"
    rules: tuple[str, ...] = ()
    """Rules to show; none = all in the file, of mixtures with n-grams only that of static."""
    words: int = 0
    """Words of the training text to count; 0 = all."""
    resamples: int = POSITION_RESAMPLES
    """Bootstrap resamples of the articles."""
    out: Path = HOME / "names"
    """Where the table and the figure go."""


# -- kinds of words -----------------------------------------------------------------------------


def word_counts(corpus: str, words: int = 0) -> Counter[str]:
    """How often the training split has each word, spelled as it is.

    Raises:
        UserError: no such text, or it has no training split.
    """
    counts: Counter[str] = Counter()
    for article in limited(open_corpus(corpus).articles("train"), words):
        counts.update(article.text.split())
    return counts


def names_of(words: Sequence[str], counts: Mapping[str, int]) -> set[str]:
    """The names among an article's words; `counts` are those of the training text."""
    before = [EOS, *words[:-1]]
    inner = {word for word, last in zip(words, before, strict=True) if last not in ENDS}
    there = set(words)
    return {
        word
        for word in inner
        if len(word) > 1
        and word[0].isupper()
        and word.lower() not in there
        and RARE * counts.get(word.lower(), 0) <= counts.get(word, 0)
    }


def kinds_of(table: LossTable, counts: Mapping[str, int]) -> np.ndarray:
    """(N,) the kind of every word, one of `KINDS`."""
    kinds = []
    for article in table.articles:
        words = table.word_N[table.rows(article)].tolist()
        names = names_of(words, counts)
        for word in words:
            if word == UNK or word in names:
                kinds.append(UNK if word == UNK else "names")
            elif word == EOS or not any(c.isalnum() for c in word):
                kinds.append("marks")
            else:
                kinds.append("numbers" if any(c.isdigit() for c in word) else "other words")
    return np.array(kinds, dtype=object)


def groups(
    table: LossTable, counts: Mapping[str, int]
) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """What names a row, and which words are in it (N,)."""
    kind_N, seen = kinds_of(table, counts), Recurrence.of(table)
    frequency_N = np.array([counts.get(word, 0) for word in table.word_N])
    yield {"words": "all", "by": "", "which": ""}, np.ones(len(kind_N), bool)
    for kind in KINDS:
        yield {"words": kind, "by": "", "which": ""}, kind_N == kind
    by = (
        ("mention", seen.number_N, OCCURRENCES),
        ("distance", seen.distance_N, DISTANCES),
        ("times in training", frequency_N, FREQUENCIES),
    )
    for kind in KINDS[:2]:
        for what, value_N, bins in by:
            for start, stop in bins:
                name = {"words": kind, "by": what, "which": bin_label(start, stop)}
                yield name, (kind_N == kind) & within(value_N, start, stop)


# -- the table and the figure -------------------------------------------------------------------


def shown_rules(table: LossTable, protocol: str, wanted: Sequence[str] = ()) -> list[str]:
    """The rules wanted, by default all but static and mixtures of rules that adapt."""
    there = table.rules(protocol)
    default = [r for r in there if r != STATIC and (not r.endswith(MIXED) or r == STATIC + MIXED)]
    found = list(wanted) or default
    if not found or set(found) - set(there):
        raise UserError(
            f"{table.source}, protocol {protocol}, has {', '.join(there) or 'no rules'}; choose "
            "some of them with --rules, or evaluate others first"
        )
    return found


def rows_of(
    table: LossTable,
    counts: Mapping[str, int],
    protocol: str,
    rules: Sequence[str],
    resamples: int = POSITION_RESAMPLES,
) -> list[dict[str, Any]]:
    """A row for each group of words that the text has: every rule's gain there and its share."""
    static_N = table.loss(STATIC, protocol)
    losses = {rule: table.loss(rule, protocol) for rule in rules}
    rows: list[dict[str, Any]] = []
    for name, inside_N in groups(table, counts):
        if not inside_N.any():
            continue
        row: dict[str, Any] = {**name, "share of words": float(inside_N.mean())}
        row["static"] = float(static_N[inside_N].mean())
        for rule, loss_N in losses.items():
            interval = interval_of(rule, resamples)
            found = measured(table, loss_N, static_N, inside_N, interval)
            row[rule] = found["nats_per_word_gained"]
            row[f"{rule} interval"] = found["interval"]
            row[f"{rule}: share"] = found["share_of_gain"]
        rows.append(row)
    return rows


PANELS = ("mention", "distance", "times in training")


def figure(rows: Sequence[Mapping[str, Any]], rules: Sequence[str], stem: Path) -> list[Path]:
    """Draw the gain on names by mention, distance and frequency; return the paths."""
    others = [rule for rule in rules if rule.removesuffix(CACHE) not in RULES]
    drawn = []
    with project_style():
        picture = new_figure(6.9, 3.0)
        panels = picture.subplots(1, len(PANELS), sharey=True)
        for panel, by in zip(panels, PANELS, strict=True):
            here = [row for row in rows if row["words"] == "names" and row["by"] == by]
            for rule in rules:
                drawn += _line(panel, here, rule, others)
            panel.axhline(0, color="#222222", linewidth=0.8)
            panel.set_xticks(range(len(here)), [row["which"] for row in here], fontsize=6)
            panel.tick_params(axis="x", labelrotation=35)
            panel.set_xlabel({"distance": "distance, words"}.get(by, by))
        panels[0].set_ylabel("gain over static on names,\nnats per word")
        handles = panels[0].get_legend_handles_labels()
        picture.legend(*handles, loc="outside lower left", ncols=3)
        return save_figure(picture, stem, drawn, ("png", "svg"))


def _line(
    panel: Axes, rows: Sequence[Mapping[str, Any]], rule: str, others: Sequence[str]
) -> list[dict[str, Any]]:
    """Draw one rule's gains with their intervals; return what is drawn."""
    found = []
    for row in rows:
        low, high = row[f"{rule} interval"] or (row[rule], row[rule])
        point = {"by": row["by"], "which": row["which"], "rule": rule}
        found.append(point | {"gain": row[rule], "low": low, "high": high})
    style = rule_style(rule, others)
    places = range(len(found))
    gains = [point["gain"] for point in found]
    panel.plot(places, gains, marker="o", markersize=3, label=title(rule), **style)
    low, high = ([point[k] for point in found] for k in ("low", "high"))
    panel.fill_between(places, low, high, color=style["color"], alpha=0.14, linewidth=0)
    return found


def main() -> None:
    """Count, gather, write."""
    options = tyro.cli(Options, description=__doc__)
    table = LossTable.load(options.folder / "losses.parquet", options.split)
    rules = shown_rules(table, options.protocol, options.rules)
    open_corpus(options.corpus).fingerprint("train")
    say("counting the words of the training text")
    counts = word_counts(options.corpus, options.words)
    rows = rows_of(table, counts, options.protocol, rules, options.resamples)
    if not any(row["words"] == "names" for row in rows):
        raise UserError(f"{table.source}, split {table.split}: no names; score another text")
    about = {
        "split": table.split,
        "articles": len(table.articles),
        "training words": counts.total(),
        "titles": {rule: title(rule) for rule in rules},
    }
    drawn = [rule for rule in rules if rule != NAME]
    record("names", rows, options, show=_shown(rows, drawn), **about)
    for path in figure(rows, drawn, options.out / "names"):
        print(path)


def _shown(rows: Sequence[Mapping[str, Any]], rules: Sequence[str]) -> list[str]:
    """Columns for the terminal: without intervals."""
    keep = {*rules, *(f"{rule}: share" for rule in rules)}
    return [key for key in rows[0] if key in keep or key not in _of_rules(rows)]


def _of_rules(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Columns of rules, with their intervals and shares."""
    return {key for key in rows[0] if key not in ("words", "by", "which", "share of words", STATIC)}


if __name__ == "__main__":
    run_cli(main)
