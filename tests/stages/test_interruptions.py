"""Runs that are stopped and go on: equal bits, whatever stopped them, and nothing done twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Finished
from safetensors.torch import load_file
from tiny import as_flags, tiny_config, write_corpus

from mlm.reader import model
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("stops", "signals"),
    [
        pytest.param(2, "KILL TERM", marks=pytest.mark.slow),
        pytest.param(200, "KILL", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
        pytest.param(50, "TERM INT", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_run_stopped_anywhere_goes_on_to_equal_bits(
    stops: int, signals: str, tmp_path: Path
) -> None:
    """`kill -9`, SIGTERM and Ctrl-C in all stages with the parts of `--rule best`."""
    words = [
        "--kills",
        str(stops),
        "--home",
        str(tmp_path / "kills"),
        "--signals",
        *signals.split(),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.stages.kills", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"^(\d+) stops, (\d+) runs", done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert int(found[1]) >= stops
    assert int(found[2]) >= 1


def _script(out: Path, words: Sequence[str]) -> str:
    """The job script of the documentation, for this run."""
    page = (ROOT / "docs" / "interruptions.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- script: slurm -->\n```bash\n(.*?)```", page, re.DOTALL)
    assert found
    script = found[1]
    assert "#SBATCH --signal=TERM@" in script
    quoted = " ".join(f"'{word}'" for word in words)
    for old, new in (("out=runs/mine", f"out='{out}'"), ("python", f"'{sys.executable}'")):
        assert script.count(old) == 1
        script = script.replace(old, new)
    return re.sub(r"words=\(--corpus.*?\)", lambda _: f"words=({quoted})", script)


def _stand_in(folder: Path, name: str, text: str) -> None:
    """A command of SLURM's."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.mark.slow  # two processes that import everything
def test_the_job_script_goes_on_after_sigterm(tmp_path: Path) -> None:
    """SIGTERM in stage 1, the job in the queue again, then the end: equal bits."""
    corpus = write_corpus(tmp_path / "toy")
    more: dict[str, Any] = {"stages": ("lm",), "lm__epochs": 6.0, "lm__validations": 6}
    run_stages(tiny_config(corpus, tmp_path / "whole", **more), quiet=True)
    out, slurm = tmp_path / "parts", tmp_path / "bin"
    slurm.mkdir()
    _stand_in(slurm, "srun", f'echo $$ > "{tmp_path}/pid"; exec "$@"')
    _stand_in(slurm, "scontrol", f'echo "$@" >> "{tmp_path}/queue"')
    flags = as_flags(tiny_config(corpus, out, **more))
    at = flags.index("--out")
    script = _script(out, [*flags[:at], *flags[at + 2 :]])
    env = {**os.environ, "PATH": f"{slurm}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    def submit() -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
        )

    first, end = submit(), time.monotonic() + 120
    rows = out / "metrics.jsonl"
    while not (rows.exists() and rows.read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid").read_text()), 15)
    err = first.communicate(timeout=120)[1]
    assert first.returncode == 143, err
    said = err.replace("\r", "\n").strip().splitlines()[-1]
    assert said.startswith("interrupted by SIGTERM; everything saved so far is kept. To go on:")
    assert said.endswith(f"--out {out} --resume")
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    about = load_about(out / "checkpoints" / "lm_last.safetensors", "")
    assert about["validated"] <= about["step"] < about["steps"]
    second = submit()
    err = second.communicate(timeout=120)[1]
    assert second.returncode == 0, err
    for name in ("lm", "lm_last"):
        a, b = (
            load_file(tmp_path / run / "checkpoints" / f"{name}.safetensors")
            for run in ("whole", "parts")
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a), name


@pytest.mark.slow
def test_an_evaluation_that_goes_on_reads_only_what_it_has_not_scored(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.copy(tmp_path / "run")
    for name in ("evaluation.json", "losses.parquet"):
        (folder / name).unlink()
    original, read, most = model.score_protocol, list[int](), 4

    def reading(*words: Any, **named: Any) -> Any:
        if len(read) == most:
            raise KeyboardInterrupt
        read.append(1)
        return original(*words, **named)

    monkeypatch.setattr(model, "score_protocol", reading)
    stopped = command("evaluate", folder, "--no-draw")
    assert stopped.code == 130
    assert "To go on: the same command again" in stopped.err
    assert not (folder / "evaluation.json").exists()
    monkeypatch.setattr(
        model, "score_protocol", lambda *w, **n: read.append(1) or original(*w, **n)
    )
    assert command("evaluate", folder, "--no-draw").code == 0
    assert len(read) == 2 * len(finished.config.evaluation.rules)
    rows = [json.loads((f / "evaluation.json").read_text()) for f in (finished.folder, folder)]
    for row in (*rows[0], *rows[1]):
        row.pop("words_per_second", None)
    assert rows[0] == rows[1]
    assert not list(folder.rglob("unfinished_*"))


def test_trained_rules_are_not_trained_again(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    path = RunFolder(folder).checkpoint("two_levels")
    before = path.stat().st_mtime_ns
    outcome = command("train", "--out", folder, "--resume", "--stages", "meta")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("trained before") == 2
    assert path.stat().st_mtime_ns == before
