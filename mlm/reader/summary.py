"""A table of word losses -> what it says of a text, in a few lines; memory does not grow with it.

Letters: N words, D documents, C cells (successive words, summed), P bins of positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mlm.base.names import STATIC, rule_label
from mlm.reader.words import column
from mlm.report.evaluation import bootstrap_interval, mean_gain, perplexity, position_edges

CELL = 20
"""Words whose gains are kept as one sum."""

BLOCK_WORDS = 200
"""Words of a block that is resampled where there are few documents; a multiple of `CELL`."""

FEW_DOCUMENTS = 10
"""With fewer, an interval over documents means nothing, and blocks are resampled instead."""

_RESAMPLES = 1999
_FEWEST_BLOCKS = 5
_MAIN = ""
_BINS = 64  # positions of up to 200 * 2**62 words


def block_interval(
    gain_C: np.ndarray,
    words_C: np.ndarray,
    block: int,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> list[float] | None:
    """The 95 % interval of sum(gain) / sum(words) by a circular block bootstrap.

    Blocks of `block` successive cells are drawn with replacement, the first cell following the last
    (Politis & Romano 1992), so that the dependence of neighbouring words widens the interval. The
    bounds are percentiles. None where there are fewer than five blocks.
    """
    cells = len(gain_C)
    if cells < _FEWEST_BLOCKS * block:
        return None
    sums = []
    for one_C in (gain_C, words_C):
        total = np.concatenate([[0.0], np.cumsum([*one_C, *one_C[: block - 1]], dtype=np.float64)])
        sums.append(total[block:] - total[:-block])
    generator, drawn = np.random.default_rng(seed), math.ceil(cells / block)
    found = np.empty(resamples)
    for k in range(resamples):
        starts = generator.integers(cells, size=drawn)
        found[k] = sums[0][starts].sum() / sums[1][starts].sum()
    return [float(bound) for bound in np.quantile(found, [0.025, 0.975])]


class _Cells:
    """Sums of `CELL` successive words each, as words come in."""

    def __init__(self) -> None:
        self.full: list[np.ndarray] = []
        self.rest = np.zeros(0)

    def add(self, values_N: np.ndarray) -> None:
        """Take in further words."""
        values_N = np.concatenate([self.rest, values_N])
        whole = len(values_N) // CELL * CELL
        self.full.append(values_N[:whole].reshape(-1, CELL).sum(1))
        self.rest = values_N[whole:]

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """(C,) sums and words of all cells; the last may hold fewer words."""
        sums_C = np.concatenate([*self.full, [self.rest.sum()]])
        words_C = np.full(len(sums_C), float(CELL))
        words_C[-1] = len(self.rest)
        keep = slice(None) if len(self.rest) else slice(-1)
        return sums_C[keep], words_C[keep]


class Summary:
    """What the words of a text cost under a rule, other rules and the static model."""

    def __init__(self, rule: str, also: Sequence[str] = (), seed: int = 0) -> None:
        """`rule` and `also` are the rules of the table: the main one and the others."""
        self.rule, self.seed = rule, seed
        self.also = tuple(r for r in dict.fromkeys(also) if r not in (STATIC, rule))
        self.words_D: list[int] = []
        self._columns = {STATIC: f"{column(STATIC)}_plain", _MAIN: "surprisal_plain"}
        self._columns |= {r: f"{column(r)}_plain" for r in self.also}
        if rule == STATIC:
            del self._columns[_MAIN]
        self._bits_D: dict[str, list[float]] = {name: [] for name in self._columns}
        self._words_P = np.zeros(_BINS, dtype=np.int64)
        self._bits_P = {name: np.zeros(_BINS) for name in self._columns}
        self._gains = {name: _Cells() for name in self._columns if name != STATIC}
        self._document: int | None = None

    def add(self, table: pa.Table) -> None:
        """Take in further rows, in the order of the text; losses in bits."""
        if not table.num_rows:
            return
        document_N = table["doc_id"].to_numpy()
        first_D = np.flatnonzero(np.diff(document_N, prepend=document_N[0] - 1))
        goes_on = int(document_N[0]) == self._document
        self._document = int(document_N[-1])
        longest = int(table["word_id"].to_numpy().max()) + 1
        edges = position_edges(longest)
        bin_N = np.searchsorted(edges, table["word_id"].to_numpy(), side="right") - 1
        bits = {name: table[where].to_numpy() for name, where in self._columns.items()}
        _extend(self.words_D, np.diff(np.append(first_D, len(document_N))), goes_on)
        self._words_P += np.bincount(bin_N, minlength=_BINS)
        for name, bits_N in bits.items():
            _extend(self._bits_D[name], np.add.reduceat(bits_N, first_D), goes_on)
            self._bits_P[name] += np.bincount(bin_N, bits_N, minlength=_BINS)
        for name, cells in self._gains.items():
            cells.add(bits[STATIC] - bits[name])

    @property
    def words(self) -> int:
        """Rows so far: words and line ends."""
        return sum(self.words_D)

    def bits(self, rule: str) -> float:
        """Bits of all words under a rule of the table."""
        return math.fsum(self._bits_D[self._name(rule)])

    def gain(self, rule: str) -> tuple[float, list[float] | None]:
        """Bits gained per word over the static model, and their 95 % interval, if it has one."""
        name = self._name(rule)
        if name == STATIC:
            return 0.0, None
        gained = (self.bits(STATIC) - self.bits(rule)) / max(1, self.words)
        if not self.by_blocks:
            gain_D = np.subtract(self._bits_D[STATIC], self._bits_D[name])
            return gained, bootstrap_interval(
                mean_gain, gain_D, np.array(self.words_D), resamples=_RESAMPLES, seed=self.seed
            )
        return gained, block_interval(
            *self._gains[name].sums(), BLOCK_WORDS // CELL, seed=self.seed
        )

    @property
    def by_blocks(self) -> bool:
        """Whether intervals come from blocks of words: there are too few documents."""
        return len(self.words_D) < FEW_DOCUMENTS

    def _name(self, rule: str) -> str:
        return _MAIN if rule == self.rule and rule != STATIC else rule

    def positions(self) -> list[tuple[int, int, int, dict[str, float]]]:
        """By position in the document: from, to (exclusive), words, and bits per word by rule."""
        used = int(np.flatnonzero(self._words_P).max(initial=-1)) + 1
        edges = position_edges(2**40)[: used + 1]
        found = []
        for place, (start, stop) in enumerate(itertools.pairwise(edges)):
            words = int(self._words_P[place])
            each = {r: float(self._bits_P[self._name(r)][place]) / words for r in self.rules}
            found.append((start, stop, words, each))
        return found

    @property
    def rules(self) -> list[str]:
        """Static, the main rule, the others: as they are shown."""
        return list(dict.fromkeys([STATIC, self.rule, *self.also]))

    def lines(self, size: int, units: str = "bits") -> list[str]:
        """The summary as aligned lines for a terminal; `size` is the text's bytes."""
        scale = math.log(2) if units == "nats" else 1.0
        names = {rule: rule_label(rule) for rule in self.rules}
        width = max(map(len, names.values())) + 2
        words, documents = self.words, len(self.words_D)
        head = f"{'rule':<{width}}{'perplexity':>11}{'bits/byte':>11}   {units} gained per word"
        lines = [
            f"{documents:,} {_noun('document', documents)}, {words:,} {_noun('word', words)} "
            f"(line ends counted), {size:,} {_noun('byte', size)}",
            "",
            head,
        ]
        for rule, label in names.items():
            ppl = perplexity(self.bits(rule) * math.log(2), words)
            lines.append(
                f"{label:<{width}}{_perplexity(ppl):>11}"
                f"{self.bits(rule) / max(1, size):>11.3f}   {self._gain_text(rule, scale)}".rstrip()
            )
        if len(names) > 1:
            lines += ["", self._how(), "", *self._position_lines(names, scale, units)]
        return lines

    def _gain_text(self, rule: str, scale: float) -> str:
        if rule == STATIC:
            return ""
        gained, interval = self.gain(rule)
        text = f"{gained * scale:.3f}"
        if interval is not None:
            text += f" [{interval[0] * scale:.3f}, {interval[1] * scale:.3f}]"
        return text.replace("-", "−")

    def _how(self) -> str:
        """How the intervals were made, or why there are none."""
        if not self.by_blocks:
            return "[ ]: 95 % interval, bootstrap over documents"
        if self.words < _FEWEST_BLOCKS * BLOCK_WORDS:
            return (
                f"no intervals: fewer than {_FEWEST_BLOCKS * BLOCK_WORDS:,} words in one sequence"
            )
        return f"[ ]: 95 % interval, bootstrap over blocks of {BLOCK_WORDS} words"

    def _position_lines(self, names: dict[str, str], scale: float, units: str) -> list[str]:
        """The table by position: words, bits per word under each rule, gain of the main rule."""
        short = [names[rule] for rule in names]
        cells: list[tuple[str, ...]] = [("position", "words", *short, "gain")]
        for start, stop, words, each in self.positions():
            numbers = [each[rule] * scale for rule in names]
            numbers.append((each[STATIC] - each[self.rule]) * scale)
            cells.append(
                (
                    f"{start:,}–{stop:,}",
                    f"{words:,}",
                    *(f"{n:.2f}".replace("-", "−") for n in numbers),
                )
            )
        widths = [max(len(row[k]) for row in cells) + 2 for k in range(len(cells[0]))]
        title = f"by position in the document, {units} per word:"
        rows = ["".join(f"{c:>{w}}" for c, w in zip(r, widths, strict=True)) for r in cells]
        return [title, *rows]


def _extend(sums_D: list, more: np.ndarray, goes_on: bool) -> None:
    """Append sums by document; the first belongs to the last document there if that goes on."""
    values = more.tolist()
    if goes_on:
        sums_D[-1] += values.pop(0)
    sums_D += values


def _perplexity(value: float | None) -> str:
    """A perplexity in at most nine characters."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"


def _noun(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
