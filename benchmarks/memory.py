"""Predicted peaks of memory, and times, against measured ones.

    python -m benchmarks.memory
    python -m benchmarks.memory --cases tiny modes/forward --device cuda

Every stage of every case runs in a process of its own, on synthetic text. Its peak is the most that
the process had in memory (VmHWM), on a GPU the most that was allocated there
(`torch.cuda.max_memory_allocated`). What `mlm.stages.fit` predicts before the stage begins should
come within a quarter of it. Times are those of the whole stage, with the loading of kernels and
libraries, which predictions leave out; a factor of two is what they aim at, for stages of minutes.
Written is one file, <out>/memory.json.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import HOME
from benchmarks.timing import versions
from benchmarks.wikitext103_shape import write
from mlm.base.errors import run_cli
from mlm.base.files import write_text
from mlm.runs.machine import resident_bytes
from mlm.runs.run import open_run
from mlm.settings.flags import replaced
from mlm.settings.presets import settings
from mlm.stages.fit import predicted, seconds, sizes_of
from mlm.stages.order import run_stages
from mlm.store.run_folder import commit, machine

FRACTION = 0.003
"""Of WikiText-103, that is read."""
WITHIN = 0.25
SHORT: dict[str, Any] = {
    "overwrite": True, "lm.epochs": 0.05, "lm.validations": 1, "lm.validation_words": 2000,
    "adapt.fisher_words": 3000, "evaluation.tune_words": 4000, "evaluation.budget": 2,
    "meta.steps": 2, "meta.rules": ("three_levels",), "evaluation.max_articles": 8,
    "evaluation.rules": ("static", "rms", "three_levels"), "evaluation.resamples": 99,
    "evaluation.protocols": ("article",),
}  # fmt: skip
"""Every case: few steps, which need as much memory as many."""
LARGER: dict[str, Any] = {
    "text.vocabulary_size": 4000, "model.embedding": 256, "model.hidden": 512, "model.layers": 2,
    "meta.lanes": 4, "meta.unroll": 16, "evaluation.lanes": 8,
}  # fmt: skip
WORDS: dict[str, Any] = {
    "text.vocabulary": "word", "text.vocabulary_size": 0, "model.embedding": 128,
    "model.hidden": 256, "model.layers": 3, "model.adaptive_above": 5000,
    "model.cutoffs": (2000, 6000), "lm.lanes": 20, "lm.segment": 35, "lm.dropout_input": 0.5,
    "lm.weight_drop": 0.5, "lm.ar": 2.0, "lm.tar": 1.0, "meta.lanes": 4, "meta.unroll": 8,
}  # fmt: skip
BEST: dict[str, Any] = {
    "rule": "best", "text.vocabulary_size": 2000, "model.embedding": 192, "model.hidden": 192,
    "meta.unroll": 10, "meta.rules": ("four_levels",), "extensions.learned_basis.words": 5000,
    "extensions.ngram_read_out.words": 5000, "evaluation.rules": ("static", "rms", "four_levels"),
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "reverse": {**LARGER, "meta.gradient": "reverse"},
    "modes/checkpoint": {**LARGER, "meta.gradient": "checkpoint"},
    "modes/forward": {**LARGER, "meta.gradient": "forward"},
    "modes/pes": {**LARGER, "meta.gradient": "pes"},
    "all weights": {**LARGER, "adapt.dynamic": "all", "meta.lanes": 2, "meta.unroll": 8},
    "float32": {**LARGER, "lm.precision": "float32", "lm.lanes": 64},
    "adaptive": WORDS,
    "best": BEST,
    "cache": {
        "evaluation.rules": ("static", "rms+cache"), "evaluation.cache_words": 20_000,
        "text.vocabulary_size": 4000, "model.embedding": 256, "model.hidden": 256,
    },
}  # fmt: skip
"""Settings by name. A name with a slash takes the language model of the case `reverse`."""


def _config(name: str, values: dict[str, Any], text: Path, out: Path, stage: str) -> Any:
    """The settings of a stage of a case."""
    rule = values.get("rule", "default")
    more = {"corpus": str(text), "out": out, "stages": (stage,), "text.data_dir": out.parent}
    return replaced(settings("tiny", rule), {**SHORT, **values, **more})


def probe(config: Any) -> dict[str, Any]:
    """What a stage was predicted to take, and what it took, in this process."""
    run = open_run(config, quiet=True)
    sizes, threads = sizes_of(run), torch.get_num_threads()
    (want,) = predicted(sizes, run.device, resident_bytes())
    estimate, cuda = seconds(want.work, run.device, threads), run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin, busy = time.perf_counter(), time.process_time()
    run_stages(config, quiet=True)
    took, busy = time.perf_counter() - begin, time.process_time() - busy
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM")
    return {
        "part": want.largest.name,
        "predicted MB": want.bytes / 1e6,
        "counted MB": want.largest.bytes / 1e6,
        "peak MB": peak / 1e6,
        "predicted / peak": want.bytes / peak,
        "predicted s": estimate,
        "seconds": took,
        "processor seconds": busy,
    }


def _alone(name: str, stage: str, device: str, text: Path, out: Path) -> dict[str, Any]:
    """`probe` in a fresh process."""
    words = [name, stage, device, str(text), str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--probe", *words],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": done.stderr[-1500:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(names: list[str], device: str, work: Path) -> list[dict[str, Any]]:
    """Rows of all stages of these cases."""
    text = work / "text"
    write(text, FRACTION)
    rows = []
    for name in names:
        shared = name.partition("/")[0] == "modes"
        out = work / ("reverse" if shared else name.replace(" ", "_"))
        made = (out / "checkpoints" / "lm.safetensors").exists()
        stages = ("meta",) if shared else ("lm", "meta", "evaluate")
        for stage in ("lm", *stages) if shared and not made else stages:
            row = {"case": name, "stage": stage, **_alone(name, stage, device, text, out)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure the cases that are asked for and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HOME / "memory")
    parser.add_argument("--probe", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        name, stage, device, text, out = given.probe
        values = {**CASES[name], "device": device}
        print(json.dumps(probe(_config(name, values, Path(text), Path(out), stage))))
        return
    with tempfile.TemporaryDirectory(dir=_made(given.out)) as work:
        rows = measure(given.cases, given.device, Path(work))
    ratios = [row["predicted / peak"] for row in rows if "predicted / peak" in row]
    found = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": rows,
        "within a quarter": sum(abs(ratio - 1) <= WITHIN for ratio in ratios),
        "of": len(rows),
    }
    write_text(given.out / "memory.json", json.dumps(found, indent=1) + "\n")
    print(f"{found['within a quarter']} of {found['of']} within a quarter of the peak")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    run_cli(main)
