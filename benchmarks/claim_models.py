"""How the ratio of gains moves with the language model: one table and one picture of many claims.

    python -m benchmarks.claim_models results/claim/models.csv

A row of the list names a language model: `series` (models read with the same version of the rule),
`model`, `weights` (their number), `claims` (a claims.json of `benchmarks.claim`, from the list's
own folder), `claim` (how the rule is called there, such as `4 levels`) and `static`, the model's
static perplexity per word on the first text in protocol `article`. Where `static` is empty, that of
every text and protocol is read from TEXT/evaluation.json beside claims.json. The ratio is the
learned rule's gain over RMS dynamic evaluation's on the same model, each over its own static loss;
where it was measured, another row has the gain of RMS with n-gram memory in the denominator.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.output import HOME
from benchmarks.timing import record
from mlm.base.errors import UserError, run_cli
from mlm.base.files import parse_json
from mlm.base.names import PROTOCOLS, STATIC
from mlm.report.drawing import new_figure, project_style, rule_style, save_figure
from mlm.report.evaluation import read_evaluation

WITH_MEMORY = "with n-gram memory"
"""Ending of the rival's name where it has the learned rule's."""
COLUMNS = ("series", "model", "weights", "claims", "claim", "static")
ASKED = (1.2, 1.25)
"""Ratios that are asked for: against RMS with n-gram memory, and against RMS."""
COLOURS = ("four_levels", "rms", "two_levels", "three_levels", "mlp", "surprise")
"""Rules whose colours the texts have."""

SIGNS = (("o", "-"), ("s", "--"), ("D", ":"), ("^", "-."))
"""Marker and line of the series."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Ratios of gains by language model."""

    models: Annotated[Path, tyro.conf.Positional]
    """A CSV file with the columns series, model, weights, claims, claim and static."""
    texts: tuple[str, ...] = ()
    """Texts to draw; none = the first. The table has all of them."""
    out: Path = HOME / "claim_models"
    """Where claim_models.json and the picture go."""


def listed(path: Path) -> list[dict[str, str]]:
    """The rows of the list of models.

    Raises:
        UserError: it is not there, is no such list, or is empty.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; give a CSV file of language models") from None
    for row in rows or [{}]:
        absent = [name for name in COLUMNS if row.get(name) is None]
        if absent:
            raise UserError(
                f"{path}: no {', '.join(absent)}; every row needs the columns {', '.join(COLUMNS)}"
            )
    return rows


def _number(row: Mapping[str, str], name: str, path: Path) -> float:
    try:
        return float(row[name])
    except ValueError:
        raise UserError(
            f"{path}: {name} of {row['model']} is {row[name]!r}; give a number"
        ) from None


def _claims(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows of a claims.json, and the rival's form in each protocol.

    Raises:
        UserError: it is none.
    """
    try:
        found = parse_json(path.read_bytes())
        return found["rows"], found["rival"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no claims ({error}); name what python -m benchmarks.claim wrote"
        ) from None


def _against(what: str, claim: str, form: str) -> str | None:
    """The rival that a row compares the rule with, on the rule's own model; None = it does not."""
    known = {
        f"{claim}: times the gain of RMS ({form}){ending}": against
        for ending, against in {
            "": "RMS",
            " on that LM, over its own static loss": "RMS",
            f" {WITH_MEMORY}": f"RMS {WITH_MEMORY}",
        }.items()
    }
    return known.get(what)


def _static(folder: Path, text: str) -> dict[str, float]:
    """Static perplexity by protocol, as far as it is known."""
    rows = [row for row in read_evaluation(folder / text) if row["kind"] == "total"]
    return {row["protocol"]: row["word_perplexity"] for row in rows if row["rule"] == STATIC}


def points(path: Path) -> list[Row]:
    """A row for every model, text, protocol and rival of which ratio and static perplexity are
    known.

    Raises:
        UserError: see `listed`; a claims.json has no such row.
    """
    found: list[Row] = []
    for model in listed(path):
        file, before = path.parent / model["claims"], len(found)
        rows, forms = _claims(file)
        for row in rows:
            text, protocol = row["corpus"], row["protocol"]
            against = _against(row["what"], model["claim"], forms.get(protocol, ""))
            if not model["static"]:
                static = _static(file.parent, text).get(protocol)
            else:
                first = text == rows[0]["corpus"]
                static = _number(model, "static", path) if first else None
            if against is not None and static is not None:
                about = {"series": model["series"], "model": model["model"]}
                about |= {"weights": int(_number(model, "weights", path))}
                about |= {"text": text, "protocol": protocol, "static": static}
                ratio = {"ratio": row["found"], "ratio interval": row["found interval"]}
                found.append({**about, "against": against, **ratio})
        if len(found) == before:
            raise UserError(
                f"{file}: no ratio of {model['claim']!r} to RMS on a text whose static perplexity "
                f"is known; name another claim in {path}, or give static there"
            )
    return found


# -- the picture --------------------------------------------------------------------------------


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draw `stem`.png and .svg beside `stem`.csv: ratio against static perplexity by protocol."""
    with project_style():
        figure = new_figure(6.9, 3.2)
        panels = figure.subplots(1, len(PROTOCOLS), sharey=True)
        for panel, protocol in zip(panels, PROTOCOLS, strict=True):
            _panel(panel, [row for row in rows if row["protocol"] == protocol])
            panel.set_title(protocol)
            panel.set_xlabel("static perplexity per word")
        panels[0].set_ylabel("times the gain of the rival")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center")
        drawn = [{k: v for k, v in row.items() if k != "ratio interval"} for row in rows]
        for line, row in zip(drawn, rows, strict=True):
            line["low"], line["high"] = row["ratio interval"]
        return save_figure(figure, stem, drawn, ("png", "svg"))


def _lines(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str, str], list[Row]]]:
    """The points of one line each: by series, text and rival."""
    names = ("series", "text", "against")
    by_line = sorted(rows, key=lambda row: [row[name] for name in names])
    for key, group in itertools.groupby(by_line, key=lambda r: tuple(r[n] for n in names)):
        yield key, sorted(group, key=lambda row: row["static"])


def _panel(panel: Axes, rows: Sequence[Row]) -> None:
    texts = list(dict.fromkeys(row["text"] for row in rows))
    series = list(dict.fromkeys(row["series"] for row in rows))
    for (which, text, against), line in _lines(rows):
        colour = rule_style(COLOURS[texts.index(text) % len(COLOURS)])["color"]
        x, y = [row["static"] for row in line], [row["ratio"] for row in line]
        fill = "white" if WITH_MEMORY in against else colour
        sign, dash = SIGNS[series.index(which) % len(SIGNS)]
        label = f"over {against}, {which}" + f", {text}" * (len(texts) > 1)
        panel.plot(x, y, marker=sign, mfc=fill, color=colour, linestyle=dash, label=label)
        low, high = zip(*(row["ratio interval"] for row in line), strict=True)
        panel.vlines(x, low, high, colour, linewidth=0.8)
    for asked in ASKED:
        panel.axhline(asked, color="#777777", linewidth=0.8, linestyle=(0, (4, 3)))
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.minorticks_off()
    panel.set_xticks(sorted({round(row["static"]) for row in rows}))


def main() -> None:
    """Read, write the table, draw."""
    options = tyro.cli(Options, description=__doc__)
    rows = points(options.models)
    shown = [row for row in rows if row["text"] in (options.texts or (rows[0]["text"],))]
    if not shown:
        texts = ", ".join(dict.fromkeys(row["text"] for row in rows))
        raise UserError(f"--texts {' '.join(options.texts)}: there are {texts}")
    record("claim_models", rows, options)
    for path in draw(shown, options.out / "claim_models"):
        print(path)


if __name__ == "__main__":
    run_cli(main)
