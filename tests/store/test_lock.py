"""One writer at a time: others are refused by the holder's name, and reading is free."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command, Finished
from tiny import as_flags, tiny_config

from mlm.base.errors import UserError
from mlm.base.files import atomic_path, leftovers
from mlm.store.lock import LOCK, check_writable, only_writer

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from mlm.store.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that writes this folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_writer_is_refused_by_the_holders_name(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """In training and in scoring; one that only reads is not."""
    folder = finished.copy(tmp_path / "run")
    with holder(folder) as other:
        try:
            with pytest.raises(UserError) as refused, only_writer(folder):
                pass
            name = f"{folder} is being written by process {other.pid} on "
            assert name in str(refused.value)
            for script, *more in (
                ("train", "--out", str(folder), "--resume"),
                ("train", "--out", str(folder), "--stages", "meta"),
                ("evaluate", str(folder)),
            ):
                assert name in command(script, *more).error
            results = tmp_path / "results"
            words = ("--rules", "static", "--protocols", "article", "--no-draw")
            outcome = command("evaluate", folder, "--out", results, *words)
            assert outcome.code == 0, outcome.err
            assert (results / "evaluation.json").exists()
        finally:
            os.kill(other.pid, signal.SIGKILL)
    with only_writer(folder):  # a holder that was killed holds nothing
        assert json.loads((folder / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not (folder / LOCK).exists()


def test_a_refused_training_leaves_no_folder(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    config = tiny_config(finished.corpus, tmp_path / "a" / "run", adapt__dynamic="none.such")
    assert command("train", *as_flags(config)).error
    assert not (tmp_path / "a").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Its temporary files, and nothing of the user's."""
    left = []
    for name in ("config.json", "checkpoints/lm.safetensors", "on-a/figures/one.png"):
        with contextlib.suppress(KeyboardInterrupt), atomic_path(tmp_path / name) as temporary:
            left.append(temporary)
            raise KeyboardInterrupt
    for file in left:  # as kill -9 leaves it
        file.write_text("half", encoding="utf-8")
    mine = tmp_path / "checkpoints" / ".mine"
    mine.write_text("kept", encoding="utf-8")
    assert sorted(leftovers(tmp_path)) == sorted(left)
    with only_writer(tmp_path):
        assert {p for p in tmp_path.rglob("*") if p.is_file()} == {mine, tmp_path / LOCK}


def test_a_process_may_ask_twice(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        with only_writer(tmp_path / "run"):
            (tmp_path / "run" / "file").touch()
        assert (tmp_path / "run" / LOCK).exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_where_nobody_may_write_is_found_before_the_work(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file is no folder"):
        check_writable(tmp_path / "file" / "run")

    def scored(*_: object) -> None:
        raise AssertionError("scored before it was known whether results can be written")

    monkeypatch.setattr("mlm.reader.model.score_protocol", scored)
    monkeypatch.setattr("mlm.reader.model.ready_rule", scored)
    read_only = PermissionError(13, "Permission denied")

    def refused(*_: object, **__: object) -> None:
        raise read_only

    monkeypatch.setattr("tempfile.TemporaryFile", refused)  # root may write where others may not
    folder = finished.copy(tmp_path / "run")
    for more in ((), ("--out", tmp_path / "results")):
        error = command("evaluate", folder, *more).error
        assert "cannot be written (Permission denied); choose another folder" in error
    assert not (tmp_path / "results").exists()
