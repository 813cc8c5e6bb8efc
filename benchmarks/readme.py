"""Fill the tables of all pages from run files, so that no number is typed.

    python -m benchmarks.readme

Pages are README.md and every Markdown file below results/ and docs/. Between
`<!-- table: FOLDER SPLIT PROTOCOL -->` and `<!-- end -->` stands the table of totals of
FOLDER/evaluation.json; `<!-- pairs: ... -->` stands for the comparison of rules,
`<!-- stages: FOLDER -->` for the speed of each stage from FOLDER/metrics.jsonl,
`<!-- sets: FOLDER -->` for FOLDER/benchmarks/dynamic_sets.json,
`<!-- engine: FILE -->` for a speed benchmark's FILE, and `<!-- parts: FILE -->` for what each part
of an ablation brings. Settings and error messages come from the code (`benchmarks.reference`), the
list of tables that can be made again (`<!-- tables: all -->`) from `benchmarks.reproduce`.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reference import errors_table, presets_table, settings_table
from benchmarks.reproduce import tables_block
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.names import CACHE

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("results", "docs")
"""Where pages are, beside README.md."""
LABELS: dict[str, str] = {
    "static": "static LSTM",
    "sgd": "SGD dynamic evaluation",
    "rms": "RMS dynamic evaluation",
    "two_levels": "meta-learner, 2 levels",
    "three_levels": "**meta-learner, 3 levels**",
    "four_levels": "**meta-learner, 4 levels**",
}
ENGINE: dict[str, dict[str, str]] = {
    "peers": {
        "contestant": "contestant",
        "threads": "threads",
        "tokens/s": "tokens/s",
        "ours/peer": "times as fast as it",
        "loss difference": "loss difference",
        "note": "how",
    },
    "ceiling": {
        "what": "work",
        "M": "M",
        "tokens/s": "tokens/s",
        "/ f32 training": "of training, float32",
        "/ bf16 training": "of training, bfloat16",
        "time / static": "time over static scoring",
        "MB streamed": "MB moved",
        "MB cached": "MB from cache",
        "madds/token": "multiply-adds per token",
        "floor / actual": "floor / time",
    },
    "busy": {},
    "growth": {
        "axis": "against",
        "what": "of",
        "size": "up to",
        "us/token": "µs per token",
        "exponent": "exponent of time",
        "in weights": "in the number of weights",
        "copies": "copies of the weights held",
        "memory exponent": "exponent of memory",
        "ratio": "ratio",
    },
    "rules": {
        "row": "row",
        "rule": "rule",
        "article": "gain, article",
        "stream": "gain, stream",
        "parameters": "learned or tuned",
        "training tokens/s": "training tokens/s",
        "scoring tokens/s": "scoring tokens/s",
        "MB per lane": "MB per lane",
        "drift": "drift",
        "late gain": "late gain",
        "resets": "resets",
        "long resets": "late resets",
    },
    "claims": {
        "corpus": "text",
        "what": "claim",
        "protocol": "protocol",
        "asked": "asked",
        "found": "found",
        "seeds": "seed by seed",
        "note": "",
    },
    "claim": {
        "series": "rule",
        "model": "language model",
        "weights": "weights",
        "text": "text",
        "protocol": "protocol",
        "static": "static perplexity",
        "against": "rival",
        "ratio": "times its gain",
    },
    "rivals": {
        "form": "form",
        "weights": "weights that adapt",
        "M": "M",
        "protocol": "protocol",
        "rate": "step size",
        "decay": "decay",
        "word perplexity, tuning words": "word perplexity, tuning words",
        "rival": "the rival",
    },
    "positions": {
        "protocol": "protocol",
        "from": "from word",
        "to": "to",
        "articles": "articles",
        "words": "words",
        "rms": "RMS",
        "two_levels": "2 levels",
        "three_levels": "3 levels",
        "four_levels": "4 levels",
        "through: four_levels": "4 levels, LM trained through",
        "through with n-grams: four_levels": "4 levels, LM trained through with n-gram embeddings",
        "with n-grams: four_levels": "4 levels, LM trained with n-gram embeddings",
    },
    "kinds": {
        "protocol": "protocol",
        "word": "words",
        "which": "which",
        "share": "share",
        "static": "static",
        "rms": "RMS",
        "four_levels": "4 levels",
        "through: four_levels": "4 levels, LM trained through",
        "through with n-grams: four_levels": "4 levels, LM trained through with n-gram embeddings",
        "with n-grams: four_levels": "4 levels, LM trained with n-gram embeddings",
    },
    "halves": {
        "article": "article",
        "words": "words",
        "two_levels": "2 levels, 1st → 2nd half",
        "three_levels": "3 levels",
        "four_levels": "4 levels",
        "rms": "RMS",
        "three_levels over two_levels": "3 levels over 2",
        "2018: tokens": "2018: tokens",
        "2018: 2 levels": "2018: 2 levels",
        "2018: 3 levels over 2": "2018: 3 levels over 2",
    },
    "parts": {"rule": "rule", "article": "gain, article", "stream": "gain, stream"},
    "speed": {
        "rule": "rule",
        "M": "M",
        "threads": "threads",
        "words/s": "words/s",
        "time / static": "time over static",
        "4 levels / it": "time of 4 levels over it",
    },
    "reading": {
        "model": "model",
        "protocol": "protocol",
        "rule": "rule",
        "bits per word": "bits per word",
        "nats per 1,000 words": "nats per 1,000 words",
        "over static": "over static",
        "stories better": "stories better",
        "at words read before": "of that, at words read before",
        "at new words": "at new words",
    },
    "kneser": {
        "protocol": "protocol",
        "rule": "rule",
        "weight": "share of the n-grams",
        "word perplexity": "word perplexity",
        "bits per byte": "bits per byte",
        "gain": "nats gained over static",
        "over the mixture": "over static + Kneser-Ney",
        "times RMS": "times RMS",
    },
    "harness": {
        "text": "text",
        "rule": "rule",
        "perplexity": "word perplexity, ours",
        "converted": "ours, by the harness's count",
        "word_perplexity": "word perplexity, harness",
        "counting": "nats per word: counting",
        "spelling": "spelling",
        "bits per byte": "bits per byte, ours",
        "bits_per_byte": "harness",
        "byte_perplexity": "byte perplexity, harness",
    },
    "names": {
        "words": "words",
        "by": "by",
        "which": "",
        "share of words": "share",
        "static": "static loss",
        "static+cache": "gain of the cache",
        "static+cache: share": "share",
        "static+kneser_ney": "of static + Kneser-Ney",
        "static+kneser_ney: share": "share",
        "rms": "of RMS",
        "rms: share": "share",
        "three_levels": "of 3 levels",
        "three_levels: share": "share",
        "four_levels": "of 4 levels",
        "four_levels: share": "share",
    },
    "recall": {
        "task": "task",
        "bound": "keys bound",
        "M": "M",
        "segments": "segments between",
        "what": "",
        "answer": "answer",
        "tokens": "tokens",
        "pairs": "pairs",
        "distance": "tokens between",
        "static": "static",
        "static+cache": "cache",
        "rms": "RMS, LSTM",
        "three_levels": "3 levels, LSTM",
        "rms, output": "RMS, output layer",
        "three_levels, output": "3 levels, output layer",
        "best": "best",
    },
    "pareto": {
        "dynamic": "weights that adapt",
        "rank": "rank",
        "segment": "M",
        "rule": "meta-learner",
        "rms": "gain of RMS",
        "learned": "gain of the meta-learner",
        "time over static": "time over static",
        "MB per lane": "MB per lane",
    },
}
"""Columns of a speed benchmark and their headings, by the first word of its file's name; none: all
columns as they are."""
NAMES: dict[str, str] = {
    "RMS (all), with phrases": "RMS (all), with n-gram memory",
    "4 levels, without read-out": "4 levels, without n-gram read-out",
    "4 levels, without phrases": "4 levels, without n-gram memory",
    "4 levels, without learning at once": "4 levels, without intra-segment adaptation",
    "4 levels, without surprise": "4 levels, without surprise weighting",
    "4 levels, without borders": "4 levels, without boundary detection",
    "borders reset": "boundaries reset",
    "borders learned": "boundaries learned",
    "mlm.rollout.read": "mlm.reading.step.read",
}
"""What published files call otherwise than we do today."""
BLOCK = re.compile(r"<!-- (\w+): ([^>]*?) -->\n(?:(?!<!--).)*<!-- end -->", re.DOTALL)
"""A marker, what stands in the block now, and its end: no other marker lies between."""


def pages(root: Path = ROOT) -> list[str]:
    """README.md and every page of results/ and docs/, as paths from the root."""
    found = sorted(path for folder in FOLDERS for path in (root / folder).glob("**/*.md"))
    return ["README.md", *(path.relative_to(root).as_posix() for path in found)]


def _rows(folder: str, kind: str, split: str, protocol: str) -> list[dict]:
    path = ROOT / folder / "evaluation.json"
    if not path.exists():
        raise UserError(f"{path} is missing; publish the run first")
    wanted = {"kind": kind, "split": split, "protocol": protocol}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def label(rule: str) -> str:
    """A rule's name in tables: `through: three_levels+cache, seed 0` part by part."""
    prefix, _, rest = rule.rpartition(": ")
    cached, rest = rest.endswith(CACHE), rest.removesuffix(CACHE)
    name, _, which = rest.partition(", ")
    cached, base = cached or name.endswith(CACHE), name.removesuffix(CACHE)
    found = LABELS.get(base, base) + (f" ({which})" if which else "")
    if cached:
        found = "neural cache" if base == "static" else f"{found} + cache"
    return f"{found}, LM trained {prefix}" if prefix else found


def _signed(interval: list[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"


def totals(folder: str, split: str, protocol: str) -> list[str]:
    """The table of totals, without single seeds, and without the second name of what has two;
    without speed where none was measured."""
    found = _rows(folder, "total", split, protocol)
    timed = any(row["words_per_second"] for row in found)
    lines = [
        "| rule | word perplexity | bits per byte | nats gained per word |" + " words/s |" * timed,
        "| :-- | --: | --: | --: |" + " --: |" * timed,
    ]
    shown = set()
    for row in (r for r in found if ", seed" not in r["rule"]):
        if (loss := row["word_perplexity"]) in shown:  # the rival, under its form's name
            continue
        shown.add(loss)
        gain = "" if row["rule"] == "static" else f"{row['nats_per_word_gained']:.3f}"
        gain += "" if row["rule"] == "static" else _signed(row["interval"])
        cells = f"| {label(row['rule'])} | {row['word_perplexity']:.1f} | "
        cells += f"{row['bits_per_byte']:.3f} | {gain} |"
        lines.append(cells + f" {_cell(row['words_per_second'])} |" * timed)
    return lines


def pairs(folder: str, split: str, protocol: str) -> list[str]:
    """The table of rule against rule."""
    lines = ["| pair | more nats per word | ratio of the gains |", "| :-- | --: | --: |"]
    for row in _rows(folder, "comparison", split, protocol):
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}{_signed(row['interval'])}"
        first, second = (label(row[k]) for k in ("rule", "against"))
        names = f"{first} against {second}".replace("*", "")
        difference = f"{row['difference']:.3f}{_signed(row['difference_interval'])}"
        lines.append(f"| {names} | {difference} | {ratio} |")
    return lines


def stages(folder: str) -> list[str]:
    """Median words per second of each stage."""
    path = ROOT / folder / "metrics.jsonl"
    speeds: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "words_per_second" in row:
            name = "stage 1, static LSTM" if row["stage"] == "lm" else f"stage 2, {row['rule']}"
            speeds.setdefault(name, []).append(row["words_per_second"])
    lines = ["| stage | words/s, median |", "| :-- | --: |"]
    return lines + [f"| {n} | {statistics.median(v):,.0f} |" for n, v in speeds.items()]


def sets(folder: str) -> list[str]:
    """The table of choices of dynamic weights."""
    path = ROOT / folder / "benchmarks" / "dynamic_sets.json"
    lines = [
        "| weights that adapt | per lane | RMS | meta-learner, 3 levels | time over static |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        lines.append(
            f"| `{row['dynamic']}` | {row['weights_per_lane']:,} | "
            f"{row['rms_nats_per_word']:.3f} | {row['learned_nats_per_word']:.3f} | "
            f"{row['scoring_time_over_static']:.1f} |"
        )
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, dict):  # a ratio
        return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, str):
        return NAMES.get(value, value.replace("with n-grams", "with n-gram embeddings"))
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _with_interval(row: dict[str, Any], key: str) -> str:
    """A cell, with its interval if the row has one."""
    interval = row.get(f"{key} interval")
    if interval is None or not isinstance(row.get(key), float):
        return _cell(row.get(key))
    return f"{row[key]:.3f}{_signed(interval)}"


def engine(file: str) -> list[str]:
    """A speed benchmark's table, with the machine it ran on."""
    path = ROOT / file
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found["rows"]
    if path.name == "growth.json":
        rows = [row for row in rows if {"exponent", "copies", "ratio"} & row.keys()]
    if path.name == "pareto.json":
        rows = sorted(rows, key=lambda row: (row["segment"], row["time over static"]))
    columns = ENGINE.get(re.split("[_.]", path.name)[0]) or {key: key for key in rows[0]}
    columns = {k: title for k, title in columns.items() if any(k in row for row in rows)}
    text = {k for k in columns if all(isinstance(row.get(k), str | None) for row in rows)}
    lines = [
        f"| {' | '.join(columns.values())} |",
        f"| {' | '.join(':--' if k in text else '--:' for k in columns)} |",
    ]
    lines += [f"| {' | '.join(_with_interval(row, key) for key in columns)} |" for row in rows]
    machine, packages = found["machine"], found["versions"]
    used = ", ".join(f"{name} {number}" for name, number in packages.items())
    return [*lines, "", f"{machine['cpu']}, {machine['threads']} threads; {used}."]


def parts(file: str) -> list[str]:
    """What each part of a rule brings: the gain with it less the gain without."""
    rows = {row["rule"]: row for row in json.loads((ROOT / file).read_text("utf-8"))["rows"]}
    lines = ["| part | nats per word, article | stream |", "| :-- | --: | --: |"]
    for name, row in rows.items():
        whole, _, part = _cell(name).partition(", without ")
        if not part:
            continue
        found = [
            f"{rows[whole][p] - row[p]:.3f}" if row.get(p) is not None else ""
            for p in ("article", "stream")
        ]
        lines.append(f"| {part} | {found[0]} | {found[1]} |")
    return lines


KINDS: dict[str, Callable[..., list[str]]] = {
    "table": totals,
    "pairs": pairs,
    "stages": stages,
    "sets": sets,
    "engine": engine,
    "parts": parts,
    "settings": settings_table,
    "presets": presets_table,
    "errors": errors_table,
    "tables": tables_block,
}
"""What makes each kind of block."""


def fill(text: str) -> str:
    """The page with every block made anew."""

    def block(match: re.Match[str]) -> str:
        kind, words = match[1], match[2].split()
        made = KINDS[kind](*words)
        return "\n".join([f"<!-- {kind}: {match[2]} -->", *made, "<!-- end -->"])

    return BLOCK.sub(block, text)


def main() -> None:
    """Rewrite the pages whose tables have changed."""
    for page in pages():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            write_text(path, filled)
            print(path)


if __name__ == "__main__":
    run_cli(main)
