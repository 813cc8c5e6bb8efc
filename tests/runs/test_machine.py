"""What the machine has: the memory that is free, measured pace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlm.runs.machine import free_bytes, pace, resident_bytes

CPU = torch.device("cpu")


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, 8e6 * 1024),
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "5\n",
                "sys/fs/cgroup/user/memory.max": "4000000000\n",
                "sys/fs/cgroup/user/memory.current": "1000000000\n",
                "sys/fs/cgroup/user/memory.stat": "anon 3\ninactive_file 500000000\n",
            },
            3.5e9,
        ),
        (
            {
                "proc/self/cgroup": "0::/somewhere/else\n",
                "sys/fs/cgroup/memory.max": "2000000000\n",
                "sys/fs/cgroup/memory.current": "500000000\n",
            },
            1.5e9,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/job\n3:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "400000000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            },
            0.6e9,
        ),
    ],
    ids=["no limit", "version 2, above", "a container", "version 1"],
)
def test_free_memory_is_the_least_that_system_and_control_groups_leave(
    tmp_path: Path, files: dict[str, str], want: float
) -> None:
    system = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"}
    assert free_bytes(CPU, _machine(tmp_path, {**system, **files})) == pytest.approx(want)


def test_the_machine_is_measured_in_units_that_make_sense() -> None:
    speed = pace(CPU, torch.get_num_threads())
    assert 1e8 < speed.products < 1e14
    assert 1e8 < speed.moved < 1e13
    assert 1e7 < resident_bytes() <= resident_bytes("VmHWM")


def test_where_the_system_says_nothing_free_memory_is_unknown(tmp_path: Path) -> None:
    assert free_bytes(CPU, tmp_path) is None
