"""Whatever a user gives: no traceback, no hang, no partial output (see `fuzz`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fuzz
import fuzz_cases as cases_of
import pytest
from conftest import Finished
from hypothesis import HealthCheck, Phase, given, seed, settings

KINDS: dict[str, Any] = {
    "corpus": cases_of.corpora,
    "tokens": cases_of.byte_changes,
    "checkpoint": cases_of.checkpoints,
    "record": cases_of.configs,
    "command": cases_of.commands,
}
"""Methods of `Fuzz`, and what their cases are drawn from."""


@pytest.fixture(scope="module")
def world(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> fuzz.Fuzz:
    return fuzz.Fuzz(finished, tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, such as runs/pydocs, are nobody's; nothing is asked of a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


SLOW = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
]


def search(world: fuzz.Fuzz, kind: str, cases: int, start: int) -> None:
    """So many cases of a kind, the same every time."""
    seen = 0

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=SLOW,
    )
    @given(KINDS[kind])
    def check(case: Any) -> None:
        nonlocal seen
        seen += 1
        getattr(world, kind)(case)

    check()
    assert seen >= cases


@pytest.mark.parametrize("kind", KINDS)
def test_forty_hostile_cases(kind: str, world: fuzz.Fuzz) -> None:
    search(world, kind, 40, 0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_hostile_cases(kind: str, world: fuzz.Fuzz) -> None:
    """Other ones with another MLM_FUZZ_SEED."""
    search(world, kind, 1000, int(os.environ.get("MLM_FUZZ_SEED", "1")))
