"""Runs that are stopped at random moments and go on: equal bits, whatever stopped them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("stops", "signals"),
    [
        (3, "KILL TERM"),
        pytest.param(200, "KILL", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
        pytest.param(50, "TERM INT", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_a_run_stopped_anywhere_goes_on_to_equal_bits(
    stops: int, signals: str, tmp_path: Path
) -> None:
    """`kill -9`, SIGTERM and Ctrl-C in all stages with the parts of `--rule best`."""
    words = ["--kills", str(stops), "--home", str(tmp_path / "kills"), "--signals", *signals.split()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs.kills", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"^(\d+) stops, (\d+) runs", done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert int(found[1]) >= stops
    assert int(found[2]) >= 1
