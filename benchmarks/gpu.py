"""What a GPU computes, how fast, and in how much memory, in at most eight minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --small

Five parts, each with its share of the time; what is left over goes to the last. A part that fails
leaves its error in the file, one whose time is out is left out with the reason, and the others go
on. Written is one file, <out>/gpu.json, anew after every part.

    losses  every rule and extension against the CPU, to 1e-4 nats
    tests   tests/test_gpu.py
    speed   size L: training (cuDNN), reading, meta-training, and the published loop; peak memory
    stage_1 --size awd: steps of stage 1 on text of the form of WikiText-103
    stage_2 the same model: Fisher, RMS, steps of stage 2; peak memory

It needs torch, numpy, tqdm and safetensors (pytest for the tests), and neither corpora nor a
trained model.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_awd, gpu_losses, gpu_speed
from benchmarks.output import HOME
from benchmarks.timing import versions
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.runs.run import choose_device
from mlm.store.run_folder import commit, machine

ROOT = Path(__file__).resolve().parents[1]
LEAST = 5.0
"""Seconds below which a part is not begun."""


@dataclass(frozen=True)
class Setup:
    """Of the whole."""

    device: torch.device
    small: bool
    seconds: float
    out: Path


class Clock:
    """What is left of the time of a part."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds; below 0 when time is out."""
        return self.end - time.perf_counter()


class Part(NamedTuple):
    """One part of the benchmark."""

    share: float
    """Of the whole time."""
    run: Callable[[Setup, Clock], dict[str, Any]]


def losses(options: Setup, clock: Clock) -> dict[str, Any]:
    """Every rule and extension against the CPU."""
    place = gpu_losses.SMALL if options.small else gpu_losses.Place()
    rows, skipped = [], []
    for case in gpu_losses.cases():
        if clock.left() < 0:
            skipped.append(case.name)
            continue
        try:
            rows.append(gpu_losses.compare(case, options.device, place))
        except Exception as error:
            rows.append({"case": case.name, "equal": False, "error": _told(error)})
    equal = bool(rows) and all(row["equal"] for row in rows)
    return {"rows": rows, "time was out": skipped, "equal": equal}


def tests(options: Setup, clock: Clock) -> dict[str, Any]:
    """`tests/test_gpu.py` in a process of its own, without plugins and the project's settings."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "pytest is not installed"}
    nothing = options.out / "pytest.ini"
    write_text(nothing, "[pytest]\nmarkers =\n    gpu: needs a CUDA device\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--noconftest", "-c", str(nothing)]
    command += ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "tests/test_gpu.py"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=max(LEAST, clock.left()),
        check=False,
    )
    return {"passed": done.returncode == 0, "said": (done.stdout + done.stderr)[-3000:]}


def speed(options: Setup, clock: Clock) -> dict[str, Any]:
    """Size L side by side."""
    return gpu_speed.measure(options.device, options.small, clock.left)


def stage_1(options: Setup, clock: Clock) -> dict[str, Any]:
    """Steps of `--size awd`; the model is kept for `stage_2`."""
    return gpu_awd.stage_1(options.device, options.small, options.out, clock.left)


def stage_2(options: Setup, clock: Clock) -> dict[str, Any]:
    """What follows with that model."""
    return gpu_awd.stage_2(options.device, options.small, options.out, clock.left)


PARTS: dict[str, Part] = {
    "losses": Part(0.2, losses),
    "tests": Part(0.15, tests),
    "speed": Part(0.25, speed),
    "stage_1": Part(0.2, stage_1),
    "stage_2": Part(0.2, stage_2),
}


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"[:2000]


def run_parts(options: Setup, parts: dict[str, Part]) -> dict[str, Any]:
    """Every part in turn; time that one leaves over goes to those after it."""
    whole = Clock(options.seconds)
    found: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "settings": {
            "device": options.device.type, "small": options.small, "seconds": options.seconds
        },
        "parts": {},
    }  # fmt: skip
    rest = sum(part.share for part in parts.values())
    for name, part in parts.items():
        seconds = whole.left() * part.share / rest
        rest -= part.share
        begin = time.perf_counter()
        if seconds < LEAST:
            found["parts"][name] = {"skipped": f"{max(0.0, seconds):.0f} s are left for it"}
            continue
        try:
            own: dict[str, Any] = part.run(options, Clock(seconds))
        except Exception as error:
            own = {"error": _told(error)}
        own["seconds"] = time.perf_counter() - begin
        found["parts"][name] = own
        print(f"{name}: {json.dumps(own, default=str)[:1500]}", flush=True)
        write_text(options.out / "gpu.json", json.dumps(found, indent=1, default=str) + "\n")
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _options(words: list[str] | None = None) -> tuple[Setup, list[str]]:
    """From the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the benchmark")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all parts (450)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=HOME / "gpu")
    given = parser.parse_args(words)
    if not 0 < given.seconds <= 86_400:
        raise UserError(f"--seconds {given.seconds}: between 0 and 86400")
    device = choose_device(given.device)
    return Setup(device, given.small, given.seconds, given.out), given.parts


def main() -> None:
    """Run the parts that are asked for and write the file."""
    options, names = _options()
    found = run_parts(options, {name: PARTS[name] for name in names})
    print(options.out / "gpu.json")
    bad = [name for name, own in found["parts"].items() if "error" in own]
    if bad:
        raise UserError(f"{', '.join(bad)}: failed; the file has the reasons")


if __name__ == "__main__":
    run_cli(main)
