"""Tiny runs, trained once for the whole session, and the scripts as functions."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest
import torch
from shared import longest_first, made_once
from tiny import tiny_config, write_corpus

from mlm import kernels
from mlm.base.errors import run_cli
from mlm.kernels import buffers
from mlm.kernels.switches import use
from mlm.settings.config import Config
from mlm.stages.order import run_stages

if TYPE_CHECKING:
    from mlm.reader import TrainedModel

buffers.DEBUG = True

# One process on each core: with two threads in each they only wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # pytest was started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that take longest come first."""
    longest_first(items)


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message of a command that failed as it should.

        Asserts a non-zero exit code, no traceback, and exactly one line `error: ...`, the last.
        """
        assert self.code not in (0, None), f"it succeeded:\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        found = [line for line in lines if line.startswith("error: ")]
        assert len(found) == 1, self.err
        assert lines[-1] == found[0], self.err
        return found[0]


@pytest.fixture(params=["compiled", "eager"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to compute on a CPU: kernels, tensor operations."""
    if request.param == "compiled":
        if kernels.numba is None:
            pytest.skip("numba is not installed")
        yield request.param
        return
    with kernels.eager():
        yield request.param


class Command(Protocol):
    """`command("train", "--out", folder)` runs `python train.py --out FOLDER` in this process."""

    def __call__(self, script: str, *words: object) -> Outcome: ...


@pytest.fixture
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that exploded reads one segment under theta_0: as at an article border."""
    from mlm.reading import step

    monkeypatch.setattr(step, "REST", 1)
    monkeypatch.setattr(step, "LONGER", 1)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a script's `main` as its last lines do (`run_cli`), without a new process."""

    def run(script: str, *words: object) -> Outcome:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            run_cli(module.main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        finally:
            use(bfloat16=False)  # of the process, which ends with a command but for tests
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


class Finished(NamedTuple):
    """A run of all stages, for reading only; `copy` one to change it."""

    config: Config
    folder: Path
    corpus: Path
    cached: list[str]
    """Names of the token files that the run needed."""

    def copy(self, target: Path) -> Path:
        """A copy of the run folder."""
        return Path(shutil.copytree(self.folder, target))


def _finished_config(home: Path) -> Config:
    return tiny_config(home / "toy", home / "run")


def _make_finished(home: Path) -> None:
    write_corpus(home / "toy")
    run_stages(_finished_config(home), quiet=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Finished:
    """The tiny run: all four stages on the tiny corpus."""
    home = made_once(tmp_path_factory, worker_id, "finished", _make_finished)
    cached = sorted(file.name for file in (home / "cache").rglob("*.tokens"))
    return Finished(_finished_config(home), home / "run", home / "toy", cached)


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """All files below a folder with their bytes, to see what a command changed."""

    def read(folder: Path) -> dict[str, bytes]:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return read


def _make_model(home: Path) -> None:
    config = tiny_config(
        write_corpus(home / "toy"),
        home / "run",
        stages=("lm", "meta", "evaluate"),
        lm__epochs=2.0,
        adapt__dynamic="softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
        adapt__rank=16,
        meta__rules=("four_levels",),
        meta__steps=1,
        evaluation__rules=("static", "rms", "rms+cache", "four_levels"),
        extensions__word_coupling__directions=4,
        extensions__boundaries__on=True,
        extensions__intra_segment__on=True,
        extensions__learned_basis__words=200,
        extensions__ngram_memory__tokens=256,
        extensions__ngram_read_out__words=200,
        extensions__surprise_weighting__share=0.25,
    )
    run_stages(config, quiet=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> TrainedModel:
    """A tiny trained model with every extension that learned rules read with."""
    from mlm.reader import load

    return load(made_once(tmp_path_factory, worker_id, "reader", _make_model) / "run")
