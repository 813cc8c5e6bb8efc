"""A run that is killed again and again at random moments, and what must come of it: equal bits.

    PYTHONPATH=tests python -m tests.stages.kills --kills 200 --home runs/kills

One process imports everything and then starts every attempt by `fork`, before it computes anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import scipy.stats  # noqa: F401 (imported here, so that no attempt has to)
import sentencepiece  # noqa: F401
import torch
import torch._dynamo
from safetensors.torch import load_file
from tiny import tiny_config, write_corpus

from mlm.base.errors import run_cli
from mlm.settings.config import Config
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder

ENDS = ("lm", "memory", "four_levels", "evaluation")
"""What the stages leave, in order."""
CODES: dict[int, int] = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit status of a run that such a signal stops."""


def all_parts(home: Path) -> Config:
    """A run of seconds with all the parts of `--rule best`, each of which learns for some steps."""
    return tiny_config(
        write_corpus(home / "toy", train=9, valid=2, test=1, sentences=9),
        home / "whole",
        stages=("lm", "meta", "evaluate"),
        text__vocabulary_size=310,
        lm__epochs=1.0,
        lm__dropout_input=0.2,
        adapt__dynamic="softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
        adapt__rank=16,
        adapt__fisher_words=150,
        meta__rules=("four_levels",),
        meta__steps=2,
        meta__lanes=2,
        meta__unroll=2,
        evaluation__rules=("static", "rms", "rms+cache", "four_levels"),
        evaluation__tune_words=40,
        evaluation__resamples=9,
        extensions__word_coupling__directions=4,
        extensions__boundaries__on=True,
        extensions__intra_segment__on=True,
        extensions__learned_basis__words=250,
        extensions__ngram_memory__tokens=64,
        extensions__ngram_read_out__words=100,
        extensions__surprise_weighting__share=0.25,
    )


def attempt(config: Config, log: Path, after: float, number: int) -> int | None:
    """Run the stages, send the signal `number` after so many seconds; the exit status.

    Negative = the signal that ended it.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 1
        try:
            run_cli(lambda: run_stages(config, quiet=True) and None)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(f"Traceback: {error!r}", flush=True)
        finally:
            os._exit(code)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def again(config: Config, minutes: float) -> Config:
    """The run, or what is left of it: what a scheduler's script asks for."""
    begun = RunFolder(config.out or Path()).config_file.exists()
    return dataclasses.replace(config, resume=begun, checkpoint_minutes=minutes)


def plain(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as text in an order of their own, without the speeds, which no two runs share."""
    kept = ({k: v for k, v in row.items() if k != "words_per_second"} for row in rows)
    return sorted(json.dumps(row, sort_keys=True) for row in kept)


def differences(one: Path, two: Path) -> list[str]:
    """Names of files, or of what is in them, that are not equal bit for bit."""
    found = []
    found_in = [list((run / "checkpoints").glob("[!.]*")) for run in (one, two)]
    # The checkpoint before the last is of whatever step was saved then.
    names = [{f.name for f in files if ".previous." not in f.name} for files in found_in]
    if names[0] != names[1]:
        found.append(f"files {sorted(names[0] ^ names[1])}")
    for name in sorted(names[0] & names[1]):
        a, b = (load_file(run / "checkpoints" / name) for run in (one, two))
        found += [f"{name}: {n}" for n in sorted(a.keys() ^ b.keys())]
        found += [f"{name}: {n}" for n in a.keys() & b.keys() if not torch.equal(a[n], b[n])]
    rows = [json.loads((run / "evaluation.json").read_text()) for run in (one, two)]
    found += ["evaluation.json"] * (plain(rows[0]) != plain(rows[1]))
    metrics = [plain(RunFolder(run).rows()) for run in (one, two)]
    found += ["metrics.jsonl"] * (metrics[0] != metrics[1])
    tuned = [json.loads((run / "tuning.json").read_text()) for run in (one, two)]
    found += ["tuning.json"] * (tuned[0] != tuned[1])
    losses = [pq.read_table(run / "losses.parquet") for run in (one, two)]
    found += ["losses.parquet"] * (not losses[0].equals(losses[1]))
    left = [str(file) for file in two.rglob("unfinished_*")]
    return found + left


def stage_of(folder: Path) -> str:
    """The first stage that has not left what it makes."""
    made = [folder / "checkpoints" / f"{name}.safetensors" for name in ENDS[:-1]]
    made.append(folder / "evaluation.json")
    return next((n for n, file in zip(ENDS, made, strict=True) if not file.exists()), "end")


def kill_runs(home: Path, kills: int, seed: int, signals: Sequence[int]) -> Counter[str]:
    """Stop runs so often, each time go on, and compare those that end with an undisturbed one.

    Returns:
        how often which stage was stopped; runs that ended, under "runs".

    Raises:
        AssertionError: a run differs from the undisturbed one, or an attempt fails of itself.
    """
    rng, log, found = random.Random(seed), home / "log", Counter[str]()
    config = all_parts(home)
    whole, folder = config.out or Path(), home / "stopped"
    config = dataclasses.replace(config, out=folder)
    clock = time.monotonic()
    first = attempt(dataclasses.replace(config, out=whole), log, 600, signal.SIGKILL)
    assert first == 0, log.read_text()
    usual = time.monotonic() - clock  # seconds of an attempt; follows the machine's load
    while (left := kills - found.total() + found["runs"]) > 0:
        shutil.rmtree(folder, ignore_errors=True)
        while True:
            log.write_text("")
            minutes, number = rng.choice((1e-9, 1e-3, 5.0)), rng.choice(signals)
            after = rng.uniform(0, usual) if left > 0 else 600.0
            clock = time.monotonic()
            code = attempt(again(config, minutes), log, after, number)
            usual = (usual + time.monotonic() - clock) / 2 if code == 0 else 1.02 * usual
            if code == 0:
                break
            assert code in (CODES[number], -number), f"{code}:\n{log.read_text()}"
            found[stage_of(folder)] += 1
            left -= 1
        found["runs"] += 1
        differ = differences(whole, folder)
        assert not differ, f"seed {seed}, {dict(found)}: {differ}"
        print(dict(found), flush=True)
    return found


def main() -> None:
    """Parse the command line; stop runs; print how often each stage was stopped."""
    parser = argparse.ArgumentParser(
        description="Stop runs at random moments; compare what is left."
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["KILL"])
    parser.add_argument("--home", type=Path, required=True)
    words = parser.parse_args()
    numbers = [signal.Signals["SIG" + name] for name in words.signals]
    torch.set_num_threads(1)
    found = kill_runs(words.home, words.kills, words.seed, numbers)
    print(f"{found.total() - found['runs']} stops, {found['runs']} runs: {dict(found)}")


if __name__ == "__main__":
    main()
