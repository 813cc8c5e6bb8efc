"""Make the tables of the pages again, one by one: `make` for the evidence.

    python -m benchmarks.reproduce
    python -m benchmarks.reproduce names pydocs --wikipedia data/wikipedia
    python -m benchmarks.reproduce all --wikipedia data/wikipedia --long-tail data/long_tail \\
        --stories times.tsv

Without names it lists the tables: what each needs, how long it takes, how much memory. `all` stands
for those that only read with the released model; the others are made only by name. Each table is
a command of its own in a process of its own, printed before it starts, and writes to OUT/NAME. One
that was made with the same command and the same model is not made again, so after an interruption
the same command goes on with the next table. Texts that are not shipped are named by their folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.output import HOME, MADE
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.terminal import say
from mlm.store.released import find_model
from mlm.text.corpora import open_corpus

ALL = "all"


@dataclass(frozen=True)
class Options:
    """List the tables, or make some of them again."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tables to make, `all` = those that train nothing; none = list them."""
    model: str = "wikipedia-small"
    """The model that reads: a released model's name or a run folder."""
    wikipedia: str = "data/wikipedia"
    """The text that it was trained with: a folder of train, valid and test in WikiText form."""
    long_tail: str = "data/long_tail"
    """A text of another kind, in WikiText form: a folder with test."""
    stories: str = "data/natural_stories.tsv"
    """Reading times in the layout of Natural Stories: a file."""
    run: str = "runs/released"
    """Run folder of a language model, for the tables that train or tune rules on it; of a released
    model `benchmarks.unpack` makes one."""
    split: str = "test"
    """Split of the texts that is read."""
    articles: int = 12
    """Articles of each text that a trained model reads; 0 = all."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice."""
    again: bool = False
    """Make tables that are there again, too."""
    out: Path = HOME / "reproduce"
    """Where the tables go, each into a folder of its name."""


@dataclass(frozen=True)
class Table:
    """A table and the command that makes it."""

    what: str
    command: str
    """Words behind `python -m`; names in braces stand for options, and {to} for its folder."""
    page: str
    """Folder of the page that shows it."""
    minutes: int | None = None
    """On two cores, with the released model; None = not measured."""
    gb: int | None = None
    """Memory at most."""
    needs: tuple[str, ...] = ()
    """Options that name texts or a run."""
    after: tuple[str, ...] = ()
    """Tables whose files it reads."""
    apart: str = ""
    """Why `all` leaves it out."""


TRAINS, TUNES, SPEED = "trains rules", "tunes for hours", "measures this machine"
EVALUATE = (
    "mlm evaluate {model} --split {split} --max-articles {articles} --threads {threads} --no-draw "
    "--out {to} --corpus "
)
TABLES: dict[str, Table] = {
    "kneser_ney": Table(
        "every rule on Wikipedia, both protocols, beside and mixed with Kneser-Ney n-grams",
        "benchmarks.kneser_ney {model} --corpus {wikipedia} --split {split} --articles {articles} "
        "--threads {threads} --out {to}",
        minutes=13,
        gb=7,
        page="results/kneser_ney",
        needs=("wikipedia",),
    ),
    "names": Table(
        "gains on names and other words, by mention, distance and frequency",
        "benchmarks.names {out}/kneser_ney --corpus {wikipedia} --split {split} --out {to}",
        minutes=1,
        gb=1,
        page="results/names",
        needs=("wikipedia",),
        after=("kneser_ney",),
    ),
    "reading_times": Table(
        "surprisal against reading times, every rule, both protocols",
        "examples.reading_times --times {stories} --model {model} --frequencies {wikipedia} "
        "--json {to}/reading_times.json",
        minutes=4,
        gb=3,
        page="results/reading_times",
        needs=("stories", "wikipedia"),
    ),
    "long_tail": Table(
        "every rule on articles about obscure subjects",
        EVALUATE + "{long_tail}",
        minutes=6,
        gb=4,
        page="results/claim",
        needs=("long_tail",),
    ),
    "pydocs": Table(
        "every rule on Python's documentation, which every Python has",
        EVALUATE + "pydocs",
        minutes=10,
        gb=4,
        page="results/claim",
    ),
    "claim": Table(
        "the learned rule against tuned dynamic evaluation, n-gram memory, caches",
        "benchmarks.claim {run} --split {split} --threads {threads} --seeds 1 --no-fewer "
        "--no-ablate --forms all --valid --away {long_tail} pydocs --articles 40 10 10 10 "
        "--out {to}",
        gb=6,
        page="results/claim",
        needs=("run", "long_tail"),
        apart=TUNES,
    ),
    "parts": Table(
        "what each part of the rule brings",
        "benchmarks.parts {run} --threads {threads} --out {to}",
        minutes=18,
        page="results/claim",
        needs=("run",),
        after=("claim",),
        apart="reads what `claim` made",
    ),
    "claim_speed": Table(
        "the time of each rule over static scoring",
        "benchmarks.claim_speed {run} --out {to}",
        page="results/claim_256_units",
        needs=("run",),
        after=("claim",),
        apart=SPEED,
    ),
    "recall": Table(
        "associative recall: rules trained on its own texts, by pairs and by distance",
        "benchmarks.recall --threads {threads} --out {to}",
        minutes=12,
        gb=3,
        page="results/recall",
        apart=TRAINS,
    ),
    "rules": Table(
        "every way to learn to remember",
        "benchmarks.rules {run} --out {to}",
        minutes=120,
        page="results/rules",
        needs=("run",),
        apart=TRAINS,
    ),
    "pareto": Table(
        "gain against time and memory, by the weights that adapt",
        "benchmarks.pareto {run} --out {to}",
        page="results/engine",
        needs=("run",),
        apart=TRAINS,
    ),
    "ceiling": Table(
        "the engine against ordinary training",
        "benchmarks.ceiling --size S --out {to}",
        page="results/engine",
        apart=SPEED,
    ),
    "growth": Table(
        "how time and memory grow with the sizes",
        "benchmarks.growth --out {to}",
        page="results/engine",
        apart=SPEED,
    ),
    "busy": Table(
        "the engine on a busy machine",
        "benchmarks.busy --size S --out {to}",
        page="results/engine",
        apart=SPEED,
    ),
}
"""The tables, in the order in which they are made."""


def chosen(names: Sequence[str], options: Options) -> list[str]:
    """The tables to make, each behind those whose files it reads and that are not there.

    Raises:
        UserError: there is no such table.
    """
    if odd := [name for name in names if name not in (*TABLES, ALL)]:
        raise UserError(f"no table {odd[0]!r}; choose from {', '.join(TABLES)} or {ALL}")
    wanted = {name for name in names if name != ALL}
    if ALL in names:
        wanted |= {name for name, table in TABLES.items() if not table.apart}
    for name in list(wanted):
        wanted |= {other for other in TABLES[name].after if not made(other, options)}
    return [name for name in TABLES if name in wanted]


def command(name: str, options: Options) -> list[str]:
    """The words behind `python -m` that make a table."""
    values = {**dataclasses.asdict(options), "to": options.out / name}
    return [word.format(**values) for word in TABLES[name].command.split()]


def _mark(name: str, options: Options) -> str:
    """Hash of the command and of what the model's folder says of it."""
    record = find_model(options.model) / "config.json"
    digest = hashlib.sha256(json.dumps(command(name, options)).encode())
    digest.update(b"" if TABLES[name].apart else record.read_bytes())
    return digest.hexdigest()


def made(name: str, options: Options) -> bool:
    """Whether the table is there, of this command and this model."""
    try:
        found = json.loads((options.out / name / MADE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and found.get("mark") == _mark(name, options)


def check(names: Sequence[str], options: Options) -> None:
    """What the tables need is there.

    Raises:
        UserError: it is not; before anything is made.
    """
    for need in dict.fromkeys(need for name in names for need in TABLES[name].needs):
        value, flag = getattr(options, need), "--" + need.replace("_", "-")
        users = ", ".join(name for name in names if need in TABLES[name].needs)
        try:
            if need in ("stories", "run"):
                _check_there(need, Path(value))
            else:
                open_corpus(value).fingerprint(options.split)
        except UserError as error:
            raise UserError(
                f"{flag}: {error}. It is not shipped; give it with {flag}, or leave out what "
                f"needs it: {users}"
            ) from None
    find_model(options.model)


def _check_there(need: str, path: Path) -> None:
    """What is no corpus is there.

    Raises:
        UserError: it is not.
    """
    if need == "run" and not (path / "config.json").is_file():
        raise UserError(
            f"no run folder {path} (`python -m benchmarks.unpack` makes one of a released model)"
        )
    if need != "run" and not path.is_file():
        raise UserError(f"no file {path}")


def listing(names: Sequence[str], options: Options | None = None) -> list[str]:
    """A Markdown table of some tables; with `options` whether they are there."""
    head = "| table | what | needs | minutes | GB | page |" + " made |" * bool(options)
    lines = [head, "| :-- | :-- | :-- | --: | --: | :-- |" + " :-- |" * bool(options)]
    for name in names:
        table = TABLES[name]
        needs = [f"`--{need.replace('_', '-')}`" for need in table.needs]
        needs += [table.apart] * bool(table.apart)
        costs = [_cost(table.minutes), _cost(table.gb)]
        cells = [f"`{name}`", table.what, ", ".join(needs), *costs, f"`{table.page}`"]
        cells += ["yes" if made(name, options) else ""] if options else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cost(value: int | None) -> str:
    return "not measured" if value is None else str(value)


def tables_block(*_: str) -> list[str]:
    """The listing for a page."""
    return listing(list(TABLES))


def make(name: str, options: Options) -> None:
    """Make a table in a process of its own.

    Raises:
        UserError: its command failed.
    """
    table, words = TABLES[name], command(name, options)
    to = options.out / name
    costs = f"minutes: {_cost(table.minutes)}, GB at most: {_cost(table.gb)}"
    say(f"{name}: {table.what}; {costs}")
    say(f"python -m {shlex.join(words)}")
    (to / MADE).unlink(missing_ok=True)
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *words])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.wait()
        raise
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        raise UserError(
            f"{name}: its command failed with exit code {code}, see above; the same command goes on"
        )
    minutes, gb = (time.monotonic() - begun) / 60, usage.ru_maxrss / 2**20
    found = {"mark": _mark(name, options), "minutes": minutes, "GB": gb}
    write_text(to / MADE, json.dumps(found) + "\n")
    say(f"{name}: {to}, {minutes:.1f} minutes, {gb:.1f} GB")


def main() -> None:
    """List, or check what is needed and make one after the other."""
    options = tyro.cli(Options, description=__doc__)
    if not options.names:
        print("\n".join(listing(list(TABLES), options)))
        return
    names = chosen(options.names, options)
    left = [name for name in names if options.again or not made(name, options)]
    check(left, options)
    for name in names:
        if name not in left:
            say(f"{name}: is there, {options.out / name}")
    for line in listing(left) if left else ():
        say(line)
    known = sum(TABLES[name].minutes or 0 for name in left)
    say(f"together about {known} minutes on two cores, as far as measured")
    for name in left:
        make(name, options)


if __name__ == "__main__":
    run_cli(main)
