"""Evaluation rows as Markdown and as a table for the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlm.base.names import STATIC, rule_label, rule_order, rule_texts
from mlm.report.occurrences import SHARED_OCCURRENCES, bin_label, first_loss_label

Row = dict[str, Any]

BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
"""What begins and ends bold letters in a terminal."""


_PROTOCOL_MEANING = {
    "article": "weights and state reset at each article",
    "stream": "one long text, nothing reset",
}


def _number(value: float | None, pattern: str = ".2f") -> str:
    return "–" if value is None else format(value, pattern).replace("-", "−")


def _interval(bounds: Sequence[float] | None, pattern: str = ".3f") -> str:
    return (
        "" if bounds is None else f"[{_number(bounds[0], pattern)}, {_number(bounds[1], pattern)}]"
    )


def _with_interval(
    value: float | None, bounds: Sequence[float] | None, pattern: str = ".3f"
) -> str:
    return f"{_number(value, pattern)} {_interval(bounds, pattern)}".rstrip()


def escape_markdown(text: str) -> str:
    """Return `text` such that Markdown shows it as it is, in a table cell too."""
    return re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", text).replace("\n", " ")


def _table(header: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first `left` columns are flush left, the others flush right."""
    rule = [":--" if place < left else "--:" for place in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *body)] + [""]


def _of(rows: Sequence[Row], kind: str, **where: str) -> list[Row]:
    return [
        row
        for row in rows
        if row["kind"] == kind and all(row.get(name) == value for name, value in where.items())
    ]


def _groups(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The (split, protocol) pairs that have totals, sorted."""
    return sorted({(row["split"], row["protocol"]) for row in _of(rows, "total")})


def _size(total: Row) -> str:
    """Words and articles of a table, and the share of unknown words."""
    unknown = total.get("unknown_words")
    share = f" ({100 * unknown / total['words']:.2f} % unknown)" if unknown else ""
    return f"{total['words']:,} words{share}, {total.get('articles', 0):,} articles"


def _about_unknown(total: Row) -> list[str]:
    """What an unknown word costs, where there are any."""
    text = (
        "An unknown word is outside the vocabulary. It costs its token and its spelling, log2 257 "
        "bits for every byte and one end, under every rule alike."
    )
    return [text] if total.get("unknown_words") else []


def _share(row: Row) -> str:
    """The share of a rule's gain that comes from the article that gains most."""
    share = row.get("largest_share")
    return "" if row["rule"] == STATIC else _percent(share)


def _any_reset(totals: Sequence[Row]) -> bool:
    """Whether the guard reset a lane under any rule."""
    return any(row.get("resets") for row in totals)


def _wrapped(text: str) -> list[str]:
    """`text` in lines of at most 100 characters, none of which ends within brackets."""
    kept = re.sub(r"\([^()]*\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    lines = textwrap.wrap(kept, 100, subsequent_indent="  ")
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def format_totals(rows: Sequence[Row], *, bold: bool = False) -> str:
    """Return the totals as a table for the terminal, one block per split and protocol.

    With `bold`, the row of the lowest loss stands out (ANSI).
    """
    lines: list[str] = []
    names = {row["rule"] for row in _of(rows, "total")}
    width = max([24, *(len(rule_label(name)) + 1 for name in names)])
    for split, protocol in _groups(rows):
        totals = sorted(
            _of(rows, "total", split=split, protocol=protocol), key=lambda r: rule_order(r["rule"])
        )
        first = totals[0]
        lines += [
            f"{first.get('corpus', '')} {split}, protocol {protocol} "
            f"({_PROTOCOL_MEANING.get(protocol, '')}): {_size(first)}".lstrip(),
            *(f"  {line}" for line in textwrap.wrap(" ".join(_about_unknown(first)), 98)),
            f"  {'rule':<{width}}{'perplexity':>11}{'bits/byte':>11}{'nats gained per word':>25}"
            f"{'1 article':>11}{'words/s':>10}" + (f"{'resets':>9}" if _any_reset(totals) else ""),
        ]
        best = min(totals, key=lambda row: row["nll"])
        for row in totals:
            gain = (
                ""
                if row["rule"] == STATIC
                else _with_interval(row["nats_per_word_gained"], row["interval"])
            )
            shown = (
                f"  {rule_label(row['rule']):<{width}}{_number(row['word_perplexity']):>11}"
                f"{_number(row['bits_per_byte'], '.3f'):>11}{gain:>25}{_share(row):>11}"
                f"{_number(row['words_per_second'], ',.0f'):>10}"
                + (f"{row.get('resets', 0):>9,}" if _any_reset(totals) else "")
            )
            lines.append(f"{BOLD}{shown}{PLAIN}" if bold and row is best else shown)
        lines.append("")
    if any(_share(row) for row in _of(rows, "total")):
        lines.append("1 article: the share of the gain that comes from the article that gains most")
    for text in rule_texts(names):
        lines += _wrapped(f"{text.label}: {text.about}")
    return "\n".join(lines).rstrip()


def evaluation_markdown(rows: Sequence[Row]) -> str:
    """Return all rows as the text of `evaluation.md`."""
    lines = [
        "# Evaluation",
        "",
        "Perplexity is per word, line ends included. A gain is the static model's loss minus the "
        "rule's on the same words, each scored before it is learned from. Brackets: 95 % bootstrap "
        "interval over articles, paired. Largest article: the share of the gain that comes from "
        "the article that gains most. Bits per byte count the bytes of the canonical text.",
        "",
        *_rules(rows),
    ]
    if _any_reset(_of(rows, "total")):
        lines += ["Resets: how often the guard started a lane that diverged from theta_0 anew.", ""]
    for split, protocol in _groups(rows):
        here = {"split": split, "protocol": protocol}
        totals = _of(rows, "total", **here)
        corpus = totals[0].get("corpus", "")
        meaning = _PROTOCOL_MEANING.get(protocol, "")
        lines += [
            f"## {escape_markdown(f'{corpus} {split}'.strip())}, protocol {protocol}",
            "",
            " ".join(
                (
                    f"{meaning[:1].upper()}{meaning[1:]}. {_size(totals[0])}.",
                    *_about_unknown(totals[0]),
                )
            ),
            "",
            *_totals_table(totals),
            *_settings(totals),
            *_comparison_table(_of(rows, "comparison", **here)),
            *_novelty_table(_of(rows, "novelty", **here)),
            *_occurrence_table(_of(rows, "occurrence", **here)),
            *_distance_table(_of(rows, "distance", **here)),
            *_position_table(_of(rows, "position", **here)),
            *_article_table(_of(rows, "article", **here)),
        ]
    return "\n".join(lines).rstrip() + "\n"


def totals_markdown(rows: Sequence[Row]) -> str:
    """Return the totals alone as Markdown, a table for each split and protocol."""
    lines: list[str] = []
    for split, protocol in _groups(rows):
        totals = _of(rows, "total", split=split, protocol=protocol)
        corpus = escape_markdown(f"{totals[0].get('corpus', '')} {split}".strip())
        about = [f"{corpus}, protocol {protocol}: {_size(totals[0])}", *_about_unknown(totals[0])]
        lines += [". ".join(about), "", *_totals_table(totals)]
    return "\n".join(lines)


def _rules(rows: Sequence[Row]) -> list[str]:
    """What every rule of the tables is, once."""
    texts = rule_texts({row["rule"] for row in rows})
    lines = [f"* {escape_markdown(text.label)}: {escape_markdown(text.about)}" for text in texts]
    return ["Rules:", "", *lines, ""] if lines else []


def _totals_table(totals: Sequence[Row]) -> list[str]:
    header = ["rule", "perplexity", "bits per byte", "nats gained per word"]
    header += ["largest article", "words/s"]
    body = []
    for row in totals:
        fixed = row["rule"] == STATIC
        body.append(
            [
                escape_markdown(rule_label(row["rule"])),
                _number(row["word_perplexity"]),
                _number(row["bits_per_byte"], ".4f"),
                ""
                if fixed
                else _with_interval(row["nats_per_word_gained"], row["interval"], ".4f"),
                _share(row),
                _number(row["words_per_second"], ",.0f"),
            ]
        )
    if _any_reset(totals):  # lanes that diverged and started again from theta_0
        header.append("resets")
        for cells, row in zip(body, totals, strict=True):
            cells.append(f"{row.get('resets', 0):,}")
    return _table(header, body)


def _settings(totals: Sequence[Row]) -> list[str]:
    lines = []
    for row in totals:
        if row.get("settings"):
            values = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row["settings"].items()
            )
            lines.append(f"* {escape_markdown(rule_label(row['rule']))}: {escape_markdown(values)}")
    return ["Settings:", "", *lines, ""] if lines else []


def _comparison_table(comparisons: Sequence[Row]) -> list[str]:
    if not comparisons:
        return []
    body = [
        [
            escape_markdown(f"{rule_label(row['rule'])} against {rule_label(row['against'])}"),
            _with_interval(row["difference"], row["difference_interval"], ".4f"),
            _with_interval(row["ratio"], row["interval"], ".3f"),
        ]
        for row in comparisons
    ]
    header = ["pair", "more nats gained per word", "ratio of the gains"]
    return ["### Rule against rule", "", *_table(header, body)]


def _by_rule(rows: Sequence[Row]) -> list[str]:
    return sorted({row["rule"] for row in rows} - {STATIC}, key=rule_order)


def _binned_table(
    rows: Sequence[Row], names: Mapping[tuple[Any, ...], Sequence[str]], header: Sequence[str]
) -> list[str]:
    """A table of bins: what names each (`names`, by its bounds), words, static loss, gains."""
    rules = _by_rule(rows)
    cells = {(_bounds(row), row["rule"]): row for row in rows}
    body = []
    for bounds, cells_left in names.items():
        static = cells.get((bounds, STATIC))
        words = next(row["words"] for row in rows if _bounds(row) == bounds)
        gains = [
            _with_interval(cell["nats_per_word_gained"], cell["interval"])
            if (cell := cells.get((bounds, rule)))
            else "–"
            for rule in rules
        ]
        loss = _number(static["nll"] / static["words"] if static else None)
        body.append([*cells_left, f"{words:,}", loss, *gains])
    labels = map(escape_markdown, map(rule_label, rules))
    return _table([*header, "words", "static loss", *labels], body, left=len(header))


def _bounds(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("first_loss_from", "first_loss_to", "from", "to"))


def _novelty_table(rows: Sequence[Row]) -> list[str]:
    """Words new to their article and words seen before, with their shares of the gain."""
    rules = _by_rule(rows)
    if not rules:
        return []
    body = []
    for start in sorted({row["from"] for row in rows}):
        here = {row["rule"]: row for row in rows if row["from"] == start}
        share = _percent(next(iter(here.values())).get("share_of_words"))
        gains = [
            f"{_with_interval(row['nats_per_word_gained'], row['interval'])}, "
            f"{_percent(row.get('share_of_gain'))}"
            if (row := here.get(rule))
            else "–"
            for rule in rules
        ]
        body.append(["new" if start == 1 else "seen before", share, *gains])
    header = ["the word is", "share of words", *map(escape_markdown, map(rule_label, rules))]
    about = "New: the word's first occurrence in its article. Percentages: shares of the gain."
    title = "### Nats gained per word, new words and words seen before"
    return [title, "", about, "", *_table(header, body)]


def _percent(share: float | None) -> str:
    return _number(share, ".0%").replace("%", " %")


def _occurrence_table(rows: Sequence[Row]) -> list[str]:
    """What words of a static first loss gain at their first, second, ... occurrence."""
    if not _by_rule(rows):
        return []
    names = {
        _bounds(row): (
            first_loss_label(row["first_loss_from"], row.get("first_loss_to")),
            bin_label(row["from"], row.get("to")),
        )
        for row in rows
    }
    about = (
        f"Words that their article has at least {SHARED_OCCURRENCES} times, grouped by the static "
        f"loss of the first of these occurrences: occurrences 1 to {SHARED_OCCURRENCES} are of the "
        "same words. The static loss is in nats per word."
    )
    table = _binned_table(rows, names, ["first static loss", "occurrence"])
    return ["### Nats gained per word, by occurrence in the article", "", about, "", *table]


def _distance_table(rows: Sequence[Row]) -> list[str]:
    """What words gain by how long ago the article had them."""
    if not _by_rule(rows):
        return []
    names = {_bounds(row): (bin_label(row["from"], row.get("to")),) for row in rows}
    table = _binned_table(rows, names, ["words since"])
    return ["### Nats gained per word, by words since the last occurrence", "", *table]


def _position_table(positions: Sequence[Row]) -> list[str]:
    rules = _by_rule(positions)
    if not rules:
        return []
    cells = {(row["from"], row["rule"]): row for row in positions}
    body = []
    for start in sorted({row["from"] for row in positions}):
        any_rule = next(row for row in positions if row["from"] == start)
        body.append(
            [f"{start + 1:,} to {any_rule['to']:,}", f"{any_rule['articles']:,}"]
            + [f"{any_rule['words']:,}"]
            + [
                _with_interval(cell["nats_per_word_gained"], cell["interval"])
                if (cell := cells.get((start, rule)))
                else "–"
                for rule in rules
            ]
        )
    header = [
        "word of the article",
        "articles",
        "words",
        *map(escape_markdown, map(rule_label, rules)),
    ]
    return ["### Nats gained per word, by position in the article", "", *_table(header, body)]


def _article_table(articles: Sequence[Row]) -> list[str]:
    """Nats gained per word in each article, counted from 1 as on the page."""
    rules = _by_rule(articles)
    if not rules:
        return []
    cells = {(row["article"], row["rule"]): row for row in articles}
    body = []
    for number, index in enumerate(sorted({row["article"] for row in articles}), 1):
        any_rule = next(row for row in articles if row["article"] == index)
        static = cells.get((index, STATIC))
        loss = _number(static["nll"] / static["words"] if static and static["words"] else None)
        found = (cells.get((index, rule), {}).get("nats_per_word_gained") for rule in rules)
        gains = [_number(gain, ".3f") for gain in found]
        title = escape_markdown(any_rule["title"])
        body.append([str(number), title, f"{any_rule['words']:,}", loss, *gains])
    labels = map(escape_markdown, map(rule_label, rules))
    header = ["", "article", "words", "static loss", *labels]
    return ["### Nats gained per word, by article", "", *_table(header, body, left=2)]
