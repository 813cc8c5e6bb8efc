"""The pictures of a run, drawn from its folder alone, each beside a CSV of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mlm.base.errors import UserError, command_of
from mlm.base.files import parse_json
from mlm.base.names import STATIC, rule_label, rule_order
from mlm.report.drawing import (
    PAPER,
    Look,
    new_figure,
    project_style,
    rule_style,
    save_figure,
)
from mlm.report.evaluation import PositionBin, interval_of, position_gains
from mlm.report.figure2 import figure2
from mlm.report.losses import LossTable, compared, default_split, splits
from mlm.report.occurrences import (
    FIRST_LOSSES,
    OCCURRENCES,
    SHARED_OCCURRENCES,
    Recurrence,
    first_loss_label,
    recurrence_rows,
)
from mlm.report.word_picture import passage_rows, word_picture

__all__ = [
    "draw_all",
    "figure2",
    "gain_by_occurrence",
    "gain_by_position",
    "training_curves",
    "word_picture",
]

PICTURES = ("figure2", "gain_by_occurrence", "gain_by_position", "words", "training")
"""What `draw_all` draws, in order."""


def draw_all(
    run_dir: Path,
    split: str | None = None,
    articles: int = 8,
    *,
    first: int = 1,
    protocol: str | None = None,
    passage: tuple[int, int] | None = None,
    pair: tuple[str | None, str | None] = (None, None),
    only: Sequence[str] = (),
    look: Look = PAPER,
    beside: Mapping[str, Callable[[LossTable, str], list[Path]]] = MappingProxyType({}),
) -> list[Path]:
    """Draw every picture of a run from its folder; return the paths written.

    Into `figures/`: figure2 (`articles` successive articles from number `first`), words_start and
    words_middle (of the longest of them), gain_by_occurrence, gain_by_position and, if the run has
    `metrics.jsonl`, training. `passage` (the numbers of an article and of a word) draws the words
    from there too. Articles and words are counted from 1.
    `protocol` None draws figure2 from `stream`, the words from `article`, as far as measured;
    `pair` None compares the best learned rule with static. `only` names the pictures to draw.
    `beside` makes more of the table and the suffix of its files, by name.
    `split` None takes `valid`, else the first in the file; another split's files get its name as a
    suffix. Raises `UserError` if the folder lacks what a picture needs.
    """
    known = (*PICTURES, *beside)
    _check_asked(run_dir, articles, only, known)
    path = run_dir / "losses.parquet"
    table = LossTable.load(path, split)
    for measured in table.compared_protocols():
        compared(table, measured, pair)
    start = table.articles.index(table.numbered(first))
    among = table.articles[start : start + articles]
    if passage is not None:  # before anything is drawn
        passage_rows(table, table.numbered(passage[0]), passage[1] - 1, 1)
    suffix = "" if table.split == default_split(splits(path)) else f"_{table.split}"
    folder = run_dir / "figures"
    words = {"protocol": protocol, "passage": passage, "pair": pair}
    draw = {
        "figure2": lambda: figure2(
            table,
            folder,
            articles=articles,
            first=first,
            protocol=protocol,
            pair=pair,
            suffix=suffix,
            look=look,
        ),
        "gain_by_occurrence": lambda: gain_by_occurrence(table, folder, suffix=suffix, look=look),
        "gain_by_position": lambda: gain_by_position(table, folder, suffix=suffix, look=look),
        "words": lambda: word_pictures(table, folder, among, suffix=suffix, look=look, **words),
        "training": lambda: training_curves(run_dir, look),
    }
    chosen = only or known
    paths = [path for name in PICTURES if name in chosen for path in draw[name]()]
    more = [make for name, make in beside.items() if name in chosen]
    return paths + [path for make in more for path in make(table, suffix)]


def _check_asked(run_dir: Path, articles: int, only: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UserError` unless there are such a folder, articles to draw and these pictures."""
    if articles < 1:
        raise UserError(f"cannot draw {articles} articles; ask for at least 1 (--articles)")
    if not run_dir.is_dir():
        raise UserError(
            f"run folder {run_dir} not found; name the folder given to "
            f"`{command_of('train')} --out`"
        )
    odd = [name for name in only if name not in known]
    if odd:
        raise UserError(f"no picture {odd[0]!r}; choose from {', '.join(known)} (--only)")


def word_pictures(
    table: LossTable,
    folder: Path,
    among: Sequence[int],
    *,
    protocol: str | None = None,
    passage: tuple[int, int] | None = None,
    words: int = 160,
    pair: tuple[str | None, str | None] = (None, None),
    suffix: str = "",
    look: Look = PAPER,
) -> list[Path]:
    """Draw the start and the middle of the longest article in `among` (before and after the
    weights have learned from it) and a `passage` (the numbers, from 1, of an article and of a
    word); return the paths."""
    protocol = protocol or table.compared_protocols()[0]
    article = max(among, key=lambda index: table.rows(index).stop - table.rows(index).start)
    length = table.rows(article).stop - table.rows(article).start
    wanted = [("words_start", article, 0), ("words_middle", article, length // 2)]
    if passage is not None:
        number, word = passage
        wanted.append((f"words_{number}_{word}", table.numbered(number), word - 1))
    return [
        path
        for name, index, start in wanted
        for path in word_picture(
            table,
            folder,
            article=index,
            start=start,
            words=words,
            pair=compared(table, protocol, pair),
            protocol=protocol,
            name=f"{name}{suffix}",
            look=look,
        )
    ]


def gain_by_position(
    table: LossTable, folder: Path, *, suffix: str = "", look: Look = PAPER
) -> list[Path]:
    """Draw the nats per word each rule gains over static, by position in the article, with 95 %
    bootstrap bands over articles, one panel per protocol; return the paths written."""
    protocols = table.compared_protocols()
    rows: list[dict[str, Any]] = []
    with project_style():
        figure, panels = _side_by_side(len(protocols), 2.2, look, sharey=True)
        for panel, protocol in zip(panels, protocols, strict=True):
            rules = [rule for rule in table.rules(protocol) if rule != STATIC]
            for rule in rules:
                bins = position_gains(table, rule, protocol)
                _draw_bins(panel, bins, rule, rules)
                rows += [
                    {"protocol": protocol, "rule": rule, "from": b.start, "to": b.stop}
                    | {"articles": b.articles, "words": b.words, "nats_per_word_gained": b.gain}
                    | {"low": b.interval[0] if b.interval else ""}
                    | {"high": b.interval[1] if b.interval else ""}
                    for b in bins
                ]
            _position_axis(panel, position_gains(table, STATIC, protocol))
            panel.set_title(f"Protocol “{protocol}”")
            if look.narrow or protocol == protocols[0]:
                panel.set_ylabel("gain over static, nats per word")
        low, high = panels[0].get_ylim()
        panels[0].set_ylim(min(low, -0.12 * high), high)  # room for the numbers of articles
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=1 if look.narrow else 3)
        return save_figure(figure, folder / f"gain_by_position{suffix}", rows, look.formats)


def _side_by_side(number: int, height: float, look: Look, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, each so many inches high; below each other in a narrow one."""
    rows, columns = (number, 1) if look.narrow else (1, number)
    figure = new_figure(look.width, height * rows + 0.8)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **more).flat)


def gain_by_occurrence(
    table: LossTable, folder: Path, *, suffix: str = "", look: Look = PAPER
) -> list[Path]:
    """Draw the loss of words at their 1st, 2nd, ... occurrence in the article under every rule.

    Only words that their article has at least four times; a column of panels for each bin of the
    static loss at the first occurrence, a row for each protocol, or the other way round in a narrow
    picture. A band is the 95 % bootstrap
    interval over articles of the rule's gain over static, paired, seen from the static loss.
    Returns the paths written; none if no word occurs four times.
    """
    seen, protocols = Recurrence.of(table), table.compared_protocols()
    rows = [
        row
        for protocol in protocols
        for rule in table.rules(protocol)
        for row in recurrence_rows(table, seen, rule, protocol, interval_of(rule))
        if row["kind"] == "occurrence"
    ]
    groups = [g for g in FIRST_LOSSES if any(row["first_loss_from"] == g[0] for row in rows)]
    if not groups:
        return []
    with project_style():
        lines = groups if look.narrow else protocols
        figure = new_figure(look.width, 0.9 + 1.7 * len(lines))
        size = len(lines), len(groups) + len(protocols) - len(lines)
        shared = "row" if look.narrow else "col"  # the losses of a bin
        grid = figure.subplots(*size, sharex=True, sharey=shared, squeeze=False)
        by_protocol = grid.T if look.narrow else grid
        for panels, protocol in zip(by_protocol, protocols, strict=True):
            for panel, group in zip(panels, groups, strict=True):
                here = [
                    r for r in rows if (r["first_loss_from"], r["protocol"]) == (group[0], protocol)
                ]
                _draw_occurrences(panel, here, table.rules(protocol))
                titles = f"first: {first_loss_label(*group)}", f"protocol “{protocol}”"
                if panel in grid[0] or not look.narrow:
                    panel.set_title(titles[look.narrow])
                if panel in grid[:, 0]:
                    panel.set_ylabel(f"loss, nats per word\n({titles[not look.narrow]})")
        for panel in by_protocol[0]:
            panel.set_ylim(bottom=0)  # of all that share it, when everything is drawn
        figure.supxlabel(
            f"occurrence of a word that its article has {SHARED_OCCURRENCES} times or more"
            + ("" if look.narrow else "; first: its static loss when it comes first"),
            fontsize=8,
        )
        handles = grid[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=1 if look.narrow else 3)
        stem = folder / f"gain_by_occurrence{suffix}"
        return save_figure(figure, stem, _occurrence_csv(rows), look.formats)


def _draw_occurrences(panel: Axes, rows: Sequence[dict[str, Any]], rules: Sequence[str]) -> None:
    """One line per rule; `rows` are those of one protocol and one bin of first losses."""
    static = {row["from"]: row["nll"] / row["words"] for row in rows if row["rule"] == STATIC}
    starts = [start for start, _ in OCCURRENCES]
    for rule in rules:
        mine = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["from"])
        places = [starts.index(row["from"]) for row in mine]
        style = rule_style(rule, rules)
        losses = [row["nll"] / row["words"] for row in mine]
        panel.plot(places, losses, marker="o", markersize=3, label=rule_label(rule), **style)
        if rule == STATIC:
            continue
        bounds = [row["interval"] or [row["nats_per_word_gained"]] * 2 for row in mine]
        low = [static[row["from"]] - high for row, (_, high) in zip(mine, bounds, strict=True)]
        high = [static[row["from"]] - low for row, (low, _) in zip(mine, bounds, strict=True)]
        panel.fill_between(places, low, high, color=style["color"], alpha=0.14, linewidth=0)
    panel.set_xticks(range(len(starts)), [_bin_tick(*ends) for ends in OCCURRENCES])


def _bin_tick(start: int, stop: int | None) -> str:
    if stop is None:
        return f"{start}+"
    return f"{start}" if stop == start + 1 else f"{start}–{stop - 1}"


def _occurrence_csv(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn: the bins, and the losses and gains in them."""
    names = ("protocol", "rule", "first_loss_from", "first_loss_to", "from", "to")
    return [
        {name: "" if row[name] is None else row[name] for name in names}
        | {"articles": row["articles"], "words": row["words"]}
        | {"loss": row["nll"] / row["words"], "nats_per_word_gained": row["nats_per_word_gained"]}
        | {"low": row["interval"][0] if row["interval"] else ""}
        | {"high": row["interval"][1] if row["interval"] else ""}
        for row in rows
    ]


def _bin_centres(bins: Sequence[PositionBin]) -> list[float]:
    """Geometric centres; the first bin starts at word 0, so it takes half its end's place."""
    return [math.sqrt(max(b.start, b.stop / 4) * b.stop) for b in bins]


def _draw_bins(panel: Axes, bins: Sequence[PositionBin], rule: str, rules: Sequence[str]) -> None:
    centres = _bin_centres(bins)
    style = rule_style(rule, rules)
    panel.plot(
        centres, [b.gain for b in bins], marker="o", markersize=3, label=rule_label(rule), **style
    )
    known = [b.interval is not None for b in bins]
    low = [b.interval[0] if b.interval else b.gain for b in bins]
    high = [b.interval[1] if b.interval else b.gain for b in bins]
    panel.fill_between(
        centres, low, high, where=known, color=style["color"], alpha=0.14, linewidth=0
    )


def _position_axis(panel: Axes, bins: Sequence[PositionBin]) -> None:
    """A logarithmic axis of word positions, with the number of articles behind each point."""
    panel.axhline(0, color="#222222", linewidth=0.8)
    panel.set_xscale("log")
    edges = [b.stop for b in bins]
    panel.xaxis.set_major_locator(FixedLocator(edges))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    panel.set_xlabel("position, words (grey: articles as long)")
    for b, centre in zip(bins, _bin_centres(bins), strict=True):
        panel.annotate(
            f"{b.articles}",
            (centre, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color="#555555",
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`; a half-written line (a run still going on) is skipped."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _series(
    rows: Iterable[dict[str, Any]], xs: Sequence[str], y: str
) -> tuple[list[float], list[float]]:
    """The finite (x, y) of the rows that have y and the first of the keys `xs`."""
    points = []
    for row in rows:
        x = next((row[name] for name in xs if isinstance(row.get(name), int | float)), None)
        value = row.get(y)
        if x is not None and isinstance(value, int | float) and math.isfinite(value):
            points.append((float(x), float(value)))
    return [p[0] for p in points], [p[1] for p in points]


def training_curves(run_dir: Path, look: Look = PAPER) -> list[Path]:
    """Draw the losses of stage 1 and the gains of stage 2 from `metrics.jsonl`; return the paths
    (none if there is nothing to draw)."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    stage1 = [row for row in rows if row.get("stage") == "lm"]
    stage2 = [row for row in rows if row.get("stage") == "meta"]
    counted = ["tokens", "step"] if any("tokens" in row for row in stage1) else ["step"]
    curves: list[tuple[int, str, str, tuple[list[float], list[float]]]] = [
        (0, "", "train_loss", _series(stage1, counted[:1], "train_loss")),
        (0, "", "valid_loss", _series(stage1, counted[:1], "valid_loss")),
    ]
    for rule in sorted({str(row.get("rule", "")) for row in stage2}, key=rule_order):
        part = [row for row in stage2 if str(row.get("rule", "")) == rule]
        curves.append((1, rule, "gain_per_word", _series(part, ["step"], "gain_per_word")))
    curves = [curve for curve in curves if curve[3][0]]
    if not curves:
        return []
    stages = sorted({curve[0] for curve in curves})
    labels = (
        (
            "Stage 1: the language model",
            "tokens read" if counted[0] == "tokens" else "updates",
            "loss, nats per token",
        ),
        ("Stage 2: the update rule", "meta-updates", "gain, nats per word"),
    )
    table: list[dict[str, Any]] = []
    with project_style():
        figure, axes = _side_by_side(len(stages), 2.0, look)
        panels = dict(zip(stages, axes, strict=True))
        for stage, rule, name, (x, y) in curves:
            style: dict[str, Any] = {"color": "#8a8a8a" if "train" in name else "#0B5CAD"}
            style = rule_style(rule) if rule else style
            label = rule_label(rule) if rule else name.replace("_", " ")
            marker = "" if len(x) > 60 else "."
            panels[stage].plot(x, y, marker=marker, label=label, **style)
            table += [
                {"stage": "lm" if stage == 0 else "meta", "rule": rule, "curve": name}
                | {"x": x_i, "y": y_i}
                for x_i, y_i in zip(x, y, strict=True)
            ]
        for stage, panel in panels.items():
            title, x_label, y_label = labels[stage]
            panel.set(title=title, xlabel=x_label, ylabel=y_label)
            panel.xaxis.set_major_formatter(FuncFormatter(_thousands))
            panel.legend()
        return save_figure(figure, run_dir / "figures" / "training", table, look.formats)


def _thousands(value: float, _: object = None) -> str:
    """12000000 as 12 M, 3000 as 3 k."""
    for size, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"
