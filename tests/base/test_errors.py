"""Signals end a command between steps, with its own exit code and one line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mlm.base.errors import Terminated, command_of, going_on, run_cli, uninterrupted


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted;"), (signal.SIGTERM, 143, "interrupted by SIGTERM;")],
)
def test_a_signal_waits_for_the_step_and_ends_the_command(
    number: int, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = []

    def main() -> None:
        with going_on(lambda: "again, please"):
            for _ in range(3):
                with uninterrupted():
                    with uninterrupted():
                        _send(number)
                    steps.append("whole")
            steps.append("never")

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == code
    assert steps == ["whole"]
    line = f"{said} everything saved so far is kept. To go on: again, please\n"
    assert capsys.readouterr().err == line
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_is_an_interruption() -> None:
    with pytest.raises(SystemExit, match="143"):
        run_cli(lambda: _send(signal.SIGTERM))
    assert issubclass(Terminated, KeyboardInterrupt)


def test_an_error_within_a_step_is_what_is_seen_of_it() -> None:
    def step() -> None:
        with uninterrupted():
            _send(signal.SIGINT)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        step()
    with uninterrupted():
        pass  # the signal is not held over to the next step


def test_other_threads_and_other_handlers_are_left_alone() -> None:
    seen = []

    def block() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    usual = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGINT)
        block()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert seen == [usual, mine]


@pytest.mark.parametrize(
    ("started", "train", "show"),
    [
        ("train.py", "python train.py", "python visualize.py"),
        ("/opt/bin/evaluate.py", "python train.py", "python visualize.py"),
        ("mlm score", "mlm train", "mlm show"),
        ("/usr/bin/notebook", "mlm train", "mlm show"),
    ],
)
def test_commands_are_named_as_they_are_started(
    started: str, train: str, show: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "x"])
    assert (command_of("train"), command_of("show")) == (train, show)
    assert command_of("export") == "mlm export"


def _by_numpy() -> None:
    np.empty(1 << 58, np.uint8)


def _by_torch() -> None:
    torch.empty(1 << 58, dtype=torch.uint8)


def _by_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")


@pytest.mark.parametrize("work", [_by_numpy, _by_torch, _by_a_gpu])
def test_no_memory_left_is_one_line(
    work: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(work)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")
    assert "--evaluation.lanes" in line


def test_another_error_of_the_run_time_keeps_its_traceback() -> None:
    def work() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(work)
