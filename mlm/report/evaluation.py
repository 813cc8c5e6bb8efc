"""The evaluation of a run as rows: totals, by position, recurrence and article, rule by rule.

All statistics are paired per article: a gain is the static model's loss minus the rule's on the
same words, and intervals come from resampling articles. Letters: N words, A articles.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mlm.base.errors import UserError
from mlm.base.files import parse_json, write_text
from mlm.base.names import CACHE, EOS, LEARNED, PROTOCOLS, STATIC, rule_order
from mlm.report.losses import LossTable
from mlm.report.occurrences import Interval, Recurrence, recurrence_rows
from mlm.report.tables import Row, evaluation_markdown, format_totals

#: Pairs (rule, against) whose gains are compared, where both were measured.
COMPARISONS = (
    *((rule + end, "rms" + end) for rule in LEARNED for end in ("", CACHE)),
    ("three_levels", "two_levels"),
    ("four_levels", "three_levels"),
    ("rms", "sgd"),
)


FIRST_BIN = 200  # words; bins of this size, then doubling


RESAMPLES = 9999


GRID = 2.0**-20
"""Nats that articles are rounded to before they are resampled. BCa counts resamples below the
estimate; those that hold the same articles as it must not fall on either side by rounding."""


POSITION_RESAMPLES = 1999  # there are many bins, and their bands are read by eye


_KIND_ORDER = ("total", "comparison", "novelty", "occurrence", "distance", "position", "article")


def bootstrap_interval(
    statistic: Callable[..., Any],
    *samples_A: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[float] | None:
    """Return the paired 95 % bootstrap interval of `statistic(*samples_A, axis=...)`.

    Articles are the units resampled, jointly over the samples. Bias-corrected and accelerated
    (BCa), or by percentiles where BCa is not defined (all articles alike). None for fewer than
    two articles or a statistic that is not finite.
    """
    if len(samples_A[0]) < 2:
        return None
    samples_A = tuple(np.round(np.asarray(sample_A) / GRID) * GRID for sample_A in samples_A)
    with warnings.catch_warnings():
        # scipy warns when BCa is degenerate; the percentile interval then takes its place.
        warnings.simplefilter("ignore")
        result = stats.bootstrap(
            samples_A,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=1000,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
        interval = [float(bound) for bound in result.confidence_interval]
        if not np.isfinite(interval).all():
            interval = [
                float(q) for q in np.quantile(result.bootstrap_distribution, [0.025, 0.975])
            ]
    return interval if np.isfinite(interval).all() else None


def mean_gain(gain_A: np.ndarray, words_A: np.ndarray, axis: int = -1) -> np.ndarray:
    """Nats gained per word: a ratio of sums, so that every word counts alike."""
    return gain_A.sum(axis=axis) / words_A.sum(axis=axis)


def gain_ratio(gain_A: np.ndarray, against_A: np.ndarray, axis: int = -1) -> np.ndarray:
    return gain_A.sum(axis=axis) / against_A.sum(axis=axis)


def position_edges(longest: int) -> list[int]:
    """Return bin edges 0, 200, 400, 800, ... of word positions, covering `longest` words."""
    edges = [0, FIRST_BIN]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


@dataclass(frozen=True)
class PositionBin:
    """Words at positions `start` to `stop` (exclusive) of their articles, under one rule."""

    start: int
    stop: int
    articles: int
    words: int
    nll: float
    gain: float
    interval: list[float] | None


def position_gains(
    table: LossTable,
    rule: str,
    protocol: str,
    *,
    resamples: int = POSITION_RESAMPLES,
    seed: int = 0,
) -> list[PositionBin]:
    """Return the nats per word that `rule` gains over static, by position in the article."""
    loss_N = table.loss(rule, protocol)
    gain_N = table.loss(STATIC, protocol) - loss_N
    edges = position_edges(int(table.words_A.max()))
    bin_N = np.searchsorted(edges, table.position_N, side="right") - 1
    bins = []
    for place, (start, stop) in enumerate(itertools.pairwise(edges)):
        inside = bin_N == place
        ordinal = table.ordinal_N[inside]
        words_A = np.bincount(ordinal)
        gain_A = np.bincount(ordinal, gain_N[inside])[words_A > 0]
        words_A = words_A[words_A > 0]
        interval = _gain_interval(rule, gain_A, words_A, resamples, seed)
        bins.append(
            PositionBin(
                start=start,
                stop=stop,
                articles=len(words_A),
                words=int(words_A.sum()),
                nll=float(loss_N[inside].sum()),
                gain=float(mean_gain(gain_A, words_A)),
                interval=interval,
            )
        )
    return bins


def _gain_interval(
    rule: str, gain_A: np.ndarray, words_A: np.ndarray, resamples: int, seed: int
) -> list[float] | None:
    """The interval of nats gained per word; [0, 0] for static, which by definition gains 0."""
    if rule == STATIC:
        return [0.0, 0.0] if len(words_A) > 1 else None
    return bootstrap_interval(mean_gain, gain_A, words_A, resamples=resamples, seed=seed)


def interval_of(rule: str, resamples: int = POSITION_RESAMPLES, seed: int = 0) -> Interval:
    """What gives the paired interval of a rule's nats gained per word, in a bin of words."""
    return lambda gain_A, words_A: _gain_interval(rule, gain_A, words_A, resamples, seed)


def evaluate_rows(
    table: LossTable,
    *,
    corpus: str,
    words_per_second: Mapping[tuple[str, str], float],
    settings: Mapping[tuple[str, str], Mapping[str, Any]],
    bytes_A: Sequence[int] | None = None,
    unknown_A: Sequence[int] | None = None,
    comparisons: Sequence[tuple[str, str]] = COMPARISONS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    resets: Mapping[tuple[str, str], int] | None = None,
) -> list[Row]:
    """Return the rows of `evaluation.json` for every rule and protocol in `table`.

    `words_per_second`, `settings` and `resets` (how often the guard reset a lane) are keyed by
    (rule, protocol) and may lack entries. `bytes_A`
    holds the UTF-8 bytes of each article, in the table's order; by default they are counted from
    the words, as of the canonical text (`mlm.spelling.canonical_text`). `unknown_A` says how many
    words of each are outside the vocabulary (default: none); their losses hold their spellings'
    price. Raises `UserError` if a protocol has rules but no static losses to pair them with.
    """
    sizes_A = _word_bytes(table) if bytes_A is None else list(bytes_A)
    if len(sizes_A) != len(table.start_A):
        raise ValueError(f"{len(sizes_A)} byte counts for {len(table.start_A)} articles")
    counts_A = list(zip(sizes_A, unknown_A or [0] * len(sizes_A), strict=True))
    rows: list[Row] = []
    seen = Recurrence.of(table)
    for protocol in PROTOCOLS:
        rules = table.rules(protocol)
        if rules and STATIC not in rules:
            raise UserError(
                f"{table.source}: protocol {protocol!r} has rules {', '.join(rules)} but not "
                f"{STATIC!r}, which gains are measured against; evaluate {STATIC!r} too"
            )
        for rule in rules:
            key = (rule, protocol)
            common = {
                "rule": rule,
                "protocol": protocol,
                "split": table.split,
                "corpus": corpus,
                "words_per_second": _finite(words_per_second.get(key)),
                "settings": dict(settings.get(key, {})),
            }
            own = _rule_rows(table, rule, protocol, common, counts_A, resamples, seed)
            own[0]["resets"] = (resets or {}).get(key, 0)
            interval = interval_of(rule, min(resamples, POSITION_RESAMPLES), seed)
            rows += own + recurrence_rows(table, seen, rule, protocol, interval)
        for rule, against in comparisons:
            if rule in rules and against in rules:
                rows.append(_comparison(table, protocol, rule, against, resamples, seed))
    return _in_order(rows)


def _word_bytes(table: LossTable) -> list[int]:
    """UTF-8 bytes of each article's canonical text: a space or a newline after every word."""
    blank_N = np.append(True, table.word_N[:-1] == EOS)  # at a line's end: the line has no word
    blank_N[table.start_A] = True
    size_N = [
        int(blank) if word == EOS else len(word.encode()) + 1
        for word, blank in zip(table.word_N, blank_N, strict=True)
    ]
    return np.add.reduceat(np.array(size_N, dtype=np.int64), table.start_A).tolist()


def _rule_rows(
    table: LossTable,
    rule: str,
    protocol: str,
    common: Row,
    counts_A: Sequence[tuple[int, int]],
    resamples: int,
    seed: int,
) -> list[Row]:
    """The total, position and article rows of one rule in one protocol.

    Args:
        counts_A: bytes and unknown words of every article.
    """
    loss_N, static_N = table.loss(rule, protocol), table.loss(STATIC, protocol)
    nll_A = np.add.reduceat(loss_N, table.start_A)
    gain_A = np.add.reduceat(static_N, table.start_A) - nll_A
    words_A = table.words_A
    interval = _gain_interval(rule, gain_A, words_A, resamples, seed)
    rows = [
        {"kind": "total", **common, "articles": len(words_A)}
        | _measures(nll_A.sum(), words_A.sum(), np.sum(counts_A, 0), gain_A.sum(), interval)
        | _largest(table, gain_A)
    ]
    # Bytes are known per article only, so a bin of positions has no bits per byte.
    for part in position_gains(
        table, rule, protocol, resamples=min(resamples, POSITION_RESAMPLES), seed=seed
    ):
        rows.append(
            {"kind": "position", **common, "from": part.start, "to": part.stop}
            | {"articles": part.articles}
            | _measures(part.nll, part.words, None, part.gain * part.words, part.interval)
        )
    for place, article in enumerate(table.articles):
        rows.append(
            {"kind": "article", **common, "article": article, "title": table.title(article)}
            | _measures(nll_A[place], words_A[place], counts_A[place], gain_A[place], None)
        )
    return rows


def _largest(table: LossTable, gain_A: np.ndarray) -> Row:
    """The article that gains most, and its share of the gain of all; None where there is none."""
    total, most = float(gain_A.sum()), int(gain_A.argmax())
    share = float(gain_A[most]) / total if total > 0 else None
    return {"largest_article": table.articles[most] if share else None, "largest_share": share}


def _measures(
    nll: float,
    words: int,
    counts: Sequence[int] | np.ndarray | None,
    gain: float,
    interval: list[float] | None,
) -> Row:
    """The numbers every row has; `gain` is in nats in all, `counts` bytes and unknown words."""
    nll, words = float(nll), int(words)
    size, unknown = (None, None) if counts is None else map(int, counts)
    return {
        "words": words,
        "unknown_words": unknown,
        "bytes": size,
        "nll": nll,
        "word_perplexity": perplexity(nll, words),
        "bits_per_byte": nll / math.log(2) / size if size else None,
        "nats_per_word_gained": float(gain) / words,
        "interval": interval,
    }


def perplexity(nll: float, words: int) -> float | None:
    """Return exp(nll / words), or None without words or beyond what a float can hold."""
    if not words or not nll / words < 700:
        return None
    return math.exp(nll / words)


def half_gains(static_N: np.ndarray, loss_N: np.ndarray) -> tuple[float | None, float | None]:
    """Return the gains in perplexity in the first and the second half of an article's words, as
    beside Figure 2 of Wolf et al. 2018 (arXiv 1803.10631); None for a half without words."""
    middle = len(static_N) // 2
    gains = []
    for half in (slice(None, middle), slice(middle, None)):
        words = len(static_N[half])
        before = perplexity(float(static_N[half].sum()), words)
        after = perplexity(float(loss_N[half].sum()), words)
        gains.append(None if before is None or after is None else before - after)
    return gains[0], gains[1]


def _comparison(
    table: LossTable, protocol: str, rule: str, against: str, resamples: int, seed: int
) -> Row:
    """How much more `rule` gains than `against`: nats per word, and as a ratio of the gains."""
    static_N = table.loss(STATIC, protocol)
    gain_A, against_A = (
        np.add.reduceat(static_N - table.loss(name, protocol), table.start_A)
        for name in (rule, against)
    )
    words_A = table.words_A
    more_A = gain_A - against_A
    gained = _gain_interval(against, against_A, words_A, resamples, seed)
    # A ratio of gains means something only where the gain divided by is surely positive.
    ratio = gained is not None and gained[0] > 0
    total = float(against_A.sum())
    return {
        "kind": "comparison",
        "protocol": protocol,
        "split": table.split,
        "rule": rule,
        "against": against,
        "ratio": _finite(gain_A.sum() / total) if total > 0 else None,
        "interval": (
            bootstrap_interval(gain_ratio, gain_A, against_A, resamples=resamples, seed=seed)
            if ratio
            else None
        ),
        "difference": float(mean_gain(more_A, words_A)),
        "difference_interval": bootstrap_interval(
            mean_gain, more_A, words_A, resamples=resamples, seed=seed
        ),
    }


def _finite(number: Any) -> float | None:
    """A float for JSON, which knows no NaN or infinity."""
    return None if number is None or not math.isfinite(number) else float(number)


_TEXTS = ("split", "protocol", "rule")
_KEYS = {
    "total": ("words", "articles", "nll"),
    "comparison": (),
    "novelty": ("words", "articles", "nll", "from"),
    "occurrence": ("words", "articles", "nll", "from", "first_loss_from"),
    "distance": ("words", "articles", "nll", "from"),
    "position": ("words", "articles", "nll", "from", "to"),
    "article": ("words", "nll", "article"),
}
"""Kinds of rows and the numbers that each must have."""
_MAY_LACK = ("word_perplexity", "bits_per_byte", "nats_per_word_gained", "words_per_second")


def read_evaluation(run_dir: Path) -> list[Row]:
    """Return the rows of `evaluation.json` (none if there is no such file).

    Raises `UserError` if the file is not a JSON list of rows.
    """
    path = run_dir / "evaluation.json"
    if not path.exists():
        return []
    try:
        rows = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and evaluate again") from error
    if not isinstance(rows, list) or not all(map(_is_row, rows)) or not _can_be_shown(rows):
        raise UserError(f"{path} is not a list of evaluation rows; delete it and evaluate again")
    return rows


def _is_row(row: Any) -> bool:
    """Whether this is a row as `evaluate_rows` makes them."""

    def number(name: str) -> bool:
        return isinstance(row.get(name), int | float)

    if not isinstance(row, dict) or row.get("kind") not in _KEYS:
        return False
    texts = [*_TEXTS, *{"comparison": ["against"], "article": ["title"]}.get(row["kind"], ())]
    kind, pair = row["kind"], row.get("interval")
    return (
        all(isinstance(row.get(name), str) for name in texts)
        and all(number(name) for name in _KEYS[kind])
        and all(row.get(name) is None or number(name) for name in _MAY_LACK)
        and (pair is None or (isinstance(pair, list) and len(pair) == 2))
    )


def _can_be_shown(rows: Sequence[Row]) -> bool:
    """Whether every table can be made of these rows, and a file."""
    try:
        json.dumps(rows, allow_nan=False)
        format_totals(rows)
        evaluation_markdown(rows)
        _in_order(rows)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return True


def merge_evaluation(existing: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return the rows of both, `new` replacing `existing` of the same split, protocol and rule.

    Where the static losses of a split changed (another model), all its old rows go, because their
    gains were measured against something else; so do comparisons with a replaced rule.
    """
    replaced = {(row["split"], row["protocol"], row["rule"]) for row in new}

    def static_nll(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
        return {
            (row["split"], row["protocol"]): row["nll"]
            for row in rows
            if row["kind"] == "total" and row["rule"] == STATIC
        }

    old, now = static_nll(existing), static_nll(new)
    changed = {
        k[0] for k in old.keys() & now.keys() if not math.isclose(old[k], now[k], rel_tol=1e-3)
    }
    kept = [
        row
        for row in existing
        if row.get("split") not in changed
        and (row.get("split"), row.get("protocol"), row.get("rule")) not in replaced
        and (row.get("split"), row.get("protocol"), row.get("against")) not in replaced
    ]
    return _in_order([*kept, *new])


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Totals first, then comparisons, positions, articles; splits, protocols and rules in order."""

    def key(row: Row) -> tuple[Any, ...]:
        kind = row["kind"]
        return (
            _KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER),
            str(row.get("split")),
            str(row.get("protocol")),
            rule_order(str(row.get("rule"))),
            row.get("first_loss_from", 0),
            row.get("from", row.get("article", 0)) or 0,
        )

    return sorted(rows, key=key)


def write_evaluation(run_dir: Path, rows: Sequence[Row]) -> list[Path]:
    """Write `evaluation.json` (one row a line) and `evaluation.md`; return their paths."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    as_json, as_markdown = run_dir / "evaluation.json", run_dir / "evaluation.md"
    write_text(as_json, "[\n" + ",\n".join(lines) + "\n]\n")
    write_text(as_markdown, evaluation_markdown(rows))
    return [as_json, as_markdown]
