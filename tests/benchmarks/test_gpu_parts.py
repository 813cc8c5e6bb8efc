"""The benchmark for a GPU, small, on the CPU and on the fake CUDA device."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda

from benchmarks import gpu, gpu_awd, gpu_losses
from benchmarks.gpu import Clock, Part, Setup
from mlm import kernels

CPU = torch.device("cpu")


QUICK = ("static", "rms", "mlp", "four_levels, everything", "rms, adaptive softmax")


def _cases() -> list[Any]:
    """Each with its name; a few of them by default."""
    return [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else [pytest.mark.slow])
        for case in gpu_losses.cases()
    ]


@pytest.mark.parametrize("case", _cases())
def test_every_rule_and_extension_reads_on_cuda_as_on_the_cpu(case: gpu_losses.Case) -> None:
    with fake_cuda() as device, kernels.eager():
        row = gpu_losses.compare(case, device, gpu_losses.SMALL, [torch.float64])
    assert row["float64, any token"] < 1e-9


@pytest.mark.slow
def test_both_stages_run_on_cuda(tmp_path: Path) -> None:
    end = time.perf_counter() + 200

    def left() -> float:
        return end - time.perf_counter()

    with fake_cuda() as device:
        first = gpu_awd.stage_1(device, True, tmp_path, left)
        second = gpu_awd.stage_2(device, True, tmp_path, left)
    assert first["precision"] == "torch.bfloat16"
    assert first["loss of a step after --resume"] == first["loss of the same step"]
    assert all("loss" in row for row in second["meta"].values())
    assert len({round(row["loss"], 5) for row in second["meta"].values()}) == 1


def test_a_part_that_fails_and_one_without_time_leave_their_reason(tmp_path: Path) -> None:
    def fail(options: Setup, clock: Clock) -> dict[str, object]:
        raise RuntimeError("out of memory")

    def late(options: Setup, clock: Clock) -> dict[str, object]:
        return {"time": clock.left()}

    options = Setup(CPU, True, 60.0, tmp_path)
    parts = {"bad": Part(0.5, fail), "good": Part(0.5, late)}
    gpu.run_parts(options, parts)
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "out of memory" in found["bad"]["error"]
    assert found["good"]["time"] > 50
    rushed = gpu.run_parts(Setup(CPU, True, 1.0, tmp_path), parts)["parts"]
    assert all("skipped" in own for own in rushed.values())


def test_reading_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(gpu_losses.cases()))
    own = gpu_losses.read

    def read(case, base, protocol, place):
        more = 1e-3 if base.weights["embedding"].is_cuda else 0.0
        return [nll + more for nll in own(case, base, protocol, place)]

    monkeypatch.setattr(gpu_losses, "read", read)
    with fake_cuda() as device, kernels.eager():
        assert not gpu_losses.compare(case, device, gpu_losses.SMALL)["equal"]
