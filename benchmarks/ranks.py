"""How much faster are several processes? Every stage in one process and in N, a thread each.

    python -m benchmarks.ranks --size small --train-words 400000

`torchrun` starts this module once for every number of processes, on the built-in text or another;
each goes through all stages and notes their seconds. Start-up is not counted: every stage is run
once before on a fiftieth of the work, which compiles what is compiled. The first two rows are work
without any exchange: what two processors of this machine gain at most. Two that share a core, as
virtual ones often do, may gain nothing there. Writes ranks.json.
Letters: N processes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.output import HOME
from benchmarks.timing import record
from mlm.base.errors import UserError, run_cli
from mlm.base.files import parse_json, write_text
from mlm.base.processes import ranks, several_processes
from mlm.kernels.switches import use_threads
from mlm.runs.base import build_base
from mlm.runs.rules import tuned_rule
from mlm.runs.run import Run, open_run
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.presets import SIZES, settings
from mlm.stages.evaluate import stage_evaluate
from mlm.stages.language_model import stage_lm
from mlm.stages.meta import stage_meta
from mlm.store.lock import only_writer

AIM = 1.8
"""Of the speed of two processes over that of one."""


@dataclass(frozen=True)
class Options:
    """Measure what several processes gain."""

    corpus: str = "pydocs"
    """The text."""
    size: str = "tiny"
    """The model's and the stages' settings."""
    train_words: int = 200_000
    """Words of training text, so that a stage takes minutes; 0 = all."""
    epochs: float = 1.0
    """Of stage 1."""
    steps: int = 20
    """Of stage 2."""
    articles: int = 40
    """Read in the evaluation."""
    processes: tuple[int, ...] = (1, 2)
    """N."""
    rounds: int = 3
    """All of them by turns; ratios are of the medians."""
    worker: Path | None = None
    """Not for you: what torchrun starts writes its seconds there."""
    out: Path = HOME / "ranks"
    """Where ranks.json goes."""


def config_of(options: Options, out: Path, share: float) -> Config:
    """The run to measure, or a `share` of it."""
    if options.size not in SIZES:
        raise UserError(f"--size {options.size}: unknown; choose from {', '.join(SIZES)}")
    changes = {
        "corpus": options.corpus,
        "out": out,
        "device": "cpu",
        "threads": 1,
        "stages": ("lm", "meta", "evaluate"),
        "text.train_words": options.train_words,
        "text.data_dir": out / "cache",
        "lm.epochs": options.epochs * share,
        "lm.validations": 2,
        "meta.steps": max(1, round(options.steps * share)),
        "meta.rules": ("three_levels",),
        "evaluation.rules": ("static", "rms", "three_levels"),
        "evaluation.max_articles": options.articles if share == 1 else 2,
        "evaluation.resamples": 9,
        "evaluation.budget": 4,
    }
    return replaced(settings(options.size), changes)


def seconds_of(config: Config) -> dict[str, float]:
    """Seconds of every stage, one after the other, in a folder of its own."""
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        ranks().gather(None)
        start = time.perf_counter()
        value = work()
        ranks().gather(None)
        found[name] = time.perf_counter() - start
        return value

    for name, work in (("products", _multiply), ("copies", _copy)):
        timed(f"{name}, nothing exchanged", lambda w=work: w(ranks().world))
    run: Run = timed("tokenising", lambda: _opened(config))
    with only_writer(run.folder.path):
        run.folder.save_config(config)
        timed("stage 1", lambda: stage_lm(run))
        use_threads(1)
        base = timed("Fisher", lambda: build_base(run))
        for protocol in ("article", "stream"):
            title = f"tuning, {protocol}"
            timed(title, lambda p=protocol: tuned_rule(run, base, "rms", p))
        timed("stage 2", lambda: stage_meta(run))
        for protocol in ("article", "stream"):
            own = replaced(config, {"evaluation.protocols": (protocol,)})
            one = dataclasses.replace(run, config=own)
            timed(f"evaluation, {protocol}", lambda r=one: stage_evaluate(r))
    return found


def _multiply(processes: int) -> None:
    """A process's share of a fixed number of matrix products."""
    matrix, product = torch.ones(512, 512), torch.empty(512, 512)
    for _ in range(400 // processes):
        torch.mm(matrix, matrix, out=product)


def _copy(processes: int) -> None:
    """A process's share of a fixed number of passes over memory."""
    there, here = torch.zeros(6_000_000), torch.ones(6_000_000)
    for _ in range(400 // processes):
        there.copy_(here)


def _opened(config: Config) -> Run:
    run = open_run(config, quiet=True)
    assert run.data
    return run


def worker(options: Options, path: Path) -> None:
    """What every process that torchrun starts does."""
    with several_processes("cpu"):
        for share in (0.02, 1.0):
            found = seconds_of(config_of(options, path.parent / f"{path.stem}-{share}", share))
        write_text(path, json.dumps(found))


def started(options: Options, number: int, path: Path) -> dict[str, float]:
    """Seconds of every stage in so many processes.

    Raises:
        UserError: one of them failed.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc_per_node={number}", "-m", "benchmarks.ranks", "--worker", str(path)]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in ("worker", "processes", "rounds"):
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    if subprocess.run(words, check=False).returncode:
        raise UserError(f"{number} processes did not get to the end; see above")
    return parse_json(path.read_bytes())


def rows(options: Options) -> list[dict[str, Any]]:
    """A row for every stage."""
    taken: dict[int, list[dict[str, float]]] = {number: [] for number in options.processes}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as place:
        for turn in range(options.rounds):
            for number, found in taken.items():
                found.append(started(options, number, Path(place) / f"{number}-{turn}.json"))
    fewest, found = min(taken), []
    for stage in taken[fewest][0]:
        row: dict[str, Any] = {"stage": stage}
        for number, rounds in taken.items():
            row[f"seconds, N = {number}"] = sorted(r[stage] for r in rounds)[len(rounds) // 2]
        for number in sorted(taken)[1:]:
            alone, shared = (row[f"seconds, N = {n}"] for n in (fewest, number))
            row[f"speed, N = {number}"] = alone / shared
        found.append(row)
    return found


def main() -> None:
    """Measure, print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    if options.worker is not None:
        worker(options, options.worker)
        return
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"{options.out} holds an earlier measurement; name another --out")
    record("ranks", rows(options), options, aim=AIM)


if __name__ == "__main__":
    run_cli(main)
