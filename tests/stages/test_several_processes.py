"""Several processes give the run of one: the same trajectory, the same table, to 1e-6."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stages.kills import all_parts
from tiny import as_flags, tiny_config, write_corpus
from together import stages_in_double, together, trainers_in_parts

from mlm.settings.config import Config

ROOT = Path(__file__).parents[2]
OF_THEIR_OWN = ("words_per_second", "identity", "identity_against")
"""Speeds, and hashes of bits."""


def _plain(value: Any) -> Any:
    """A row without what no two runs share."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in OF_THEIR_OWN}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _near(one: Any, two: Any) -> None:
    """Numbers agree to 1e-6, all else is equal."""
    if isinstance(one, float) and isinstance(two, float):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-6)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            _near(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            _near(a, b)
    else:
        assert one == two


def _same_run(one: Path, two: Path) -> None:
    """Trajectories, tuned settings and tables of two runs."""
    lines = [(run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for run in (one, two)]
    found = [[_plain(json.loads(line)) for line in some] for some in lines]
    assert found[0]
    _near(*found)
    for name in ("tuning.json", "evaluation.json"):
        tables = [_plain(json.loads((run / name).read_bytes())) for run in (one, two)]
        assert tables[0]
        _near(*tables)


def _small(home: Path) -> Config:
    """All stages in seconds."""
    rules = ("static", "rms", "rms+cache", "three_levels")
    return tiny_config(
        write_corpus(home / "toy", train=8, valid=3, sentences=12),
        home / "one",
        stages=("lm", "meta", "evaluate"),
        lm__epochs=1.0,
        lm__dropout_hidden=0.2,
        meta__lanes=4,
        adapt__fisher_words=200,
        meta__rules=("three_levels",),
        meta__steps=2,
        evaluation__rules=rules,
        evaluation__budget=2,
        evaluation__tune_words=60,
    )


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path: Path) -> None:
    """All stages, from text to table."""
    config = _small(tmp_path)
    assert stages_in_double(config) == 0
    two = dataclasses.replace(config, out=tmp_path / "two")
    assert together(2, tmp_path / "said", stages_in_double, two) == [0, 0]
    _same_run(tmp_path / "one", tmp_path / "two")
    left = {p.name for p in (tmp_path / "two").iterdir()}
    assert left == {p.name for p in (tmp_path / "one").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_all_parts_of_the_best_rule(world: int, tmp_path: Path) -> None:
    """N-gram embeddings, learned bases, word coupling, read-out, boundaries and caches, too."""
    config = all_parts(tmp_path)
    more = {"lm": 4, "meta": 4}
    for name, lanes in more.items():
        own = dataclasses.replace(getattr(config, name), lanes=lanes)
        config = dataclasses.replace(config, **{name: own})
    assert stages_in_double(config) == 0
    other = dataclasses.replace(config, out=tmp_path / "several")
    together(world, tmp_path / "said", stages_in_double, other)
    _same_run(config.out or Path(), tmp_path / "several")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3])  # there are three lanes
def test_processes_train_as_one_in_every_way(world: int, tmp_path: Path) -> None:
    """Every cell, every meta-gradient; saved by all of them, and gone on with."""
    one = trainers_in_parts(tmp_path / "one")
    for several in together(world, tmp_path / "said", trainers_in_parts, tmp_path / "several"):
        assert several.keys() == one.keys()
        for name, mine in one.items():
            assert several[name].keys() == mine.keys()
            for what, tensor in mine.items():
                near = torch.allclose(several[name][what], tensor, rtol=1e-6, atol=1e-6)
                assert near, (name, what, several[name][what] - tensor)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("signalled", [(0, 1), (1,)])
def test_sigterm_stops_all_and_another_number_goes_on(
    signalled: tuple[int, ...], tmp_path: Path
) -> None:
    """Saved once, in the same step, whoever is told; then 4 processes, then one end the run."""
    config = _small(tmp_path)
    assert stages_in_double(config) == 0
    parts = dataclasses.replace(config, out=tmp_path / "parts")
    stopped = together(2, tmp_path / "said", stages_in_double, parts, 3, signalled)
    assert stopped == [143, 143]
    more = dataclasses.replace(parts, resume=True)
    assert together(4, tmp_path / "said", stages_in_double, more, 5, (0, 2)) == [143] * 4
    assert stages_in_double(more) == 0
    _same_run(tmp_path / "one", tmp_path / "parts")


def _torchrun(number: int, *words: str) -> subprocess.Popen[str]:
    """`torchrun --standalone train.py`."""
    own = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*own, f"--nproc_per_node={number}", "train.py", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _workers(agent: int) -> list[int]:
    """The processes that an agent has started."""
    listing = Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="ascii")
    return [int(pid) for pid in listing.split()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_process_ends_the_job_with_its_reason_and_nothing_saved_is_lost(
    tmp_path: Path,
) -> None:
    """`kill -9` of one of two in stage 1, then one process goes on."""
    config = _small(tmp_path)
    lm = dataclasses.replace(config.lm, epochs=60.0, validations=60)
    config = dataclasses.replace(config, lm=lm, stages=("lm",))
    job = _torchrun(2, *as_flags(config))
    out = config.out or Path()
    while not (out / "checkpoints" / "lm_last.safetensors").exists():
        time.sleep(0.1)
        assert job.poll() is None, job.communicate()[0]
    os.kill(_workers(job.pid)[1], signal.SIGKILL)
    clock = time.monotonic()
    said = job.communicate()[0]
    assert time.monotonic() - clock < 60
    assert job.returncode != 0
    assert "another process of this job has ended" in said or "Signal 9 (SIGKILL)" in said
    rows = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    reached = json.loads(rows[-1])["step"]
    command = [sys.executable, "train.py", "--out", str(out), "--resume"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(r)["step"] for r in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] > reached


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_bad_command_line_is_one_message_of_many_processes(tmp_path: Path) -> None:
    """Not one for each."""
    job = _torchrun(2, "--corpus", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    said = job.communicate()[0]
    assert job.returncode != 0
    assert len(re.findall(r"^error: ", said, re.MULTILINE)) == 1
    assert "nowhere" in said
    assert not (tmp_path / "run").exists()
