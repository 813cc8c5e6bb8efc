"""What a session makes once, and the order of its tests (see `shared`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared import LONGEST, made_once

TESTS = Path(__file__).parent


class Folders:
    """The folders of one process of a session."""

    def __init__(self, base: Path) -> None:
        self.base = base
        base.mkdir(exist_ok=True)

    def getbasetemp(self) -> Path:
        """Where all of them are."""
        return self.base

    def mktemp(self, name: str) -> Path:
        """A new one."""
        (self.base / name).mkdir()
        return self.base / name


def made_in(base: Path, worker: str, make) -> Path:
    return made_once(Folders(base), worker, "run", make)  # type: ignore[arg-type]


def test_processes_take_copies_of_what_one_has_made(tmp_path: Path) -> None:
    """Text names the place of the copy, in a file as old as the first."""
    made = []

    def make(home: Path) -> None:
        made.append(home)
        (home / "below").mkdir()
        (home / "below" / "config.json").write_text(f'{{"out": "{home}/run", "n": 3}}')
        (home / "weights").write_bytes(bytes(range(256)))

    own = [made_in(tmp_path / worker, worker, make) for worker in ("gw0", "gw1")]
    assert made == [tmp_path / "run"]
    for folder in own:
        text = folder / "below" / "config.json"
        assert text.read_text() == f'{{"out": "{folder}/run", "n": 3}}'
        assert text.stat().st_mtime_ns == (made[0] / "below/config.json").stat().st_mtime_ns
        assert (folder / "weights").read_bytes() == bytes(range(256))
    alone = made_in(tmp_path / "alone", "master", make)
    assert made[1:] == [alone] == [tmp_path / "alone" / "run"]


def test_what_one_process_could_not_make_another_makes_anew(tmp_path: Path) -> None:
    def fail(home: Path) -> None:
        (home / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        made_in(tmp_path / "gw0", "gw0", fail)
    own = made_in(tmp_path / "gw1", "gw1", lambda home: (home / "whole").touch())
    assert [file.name for file in own.iterdir()] == ["whole"]


def test_a_place_in_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Its length may be written elsewhere."""
    with pytest.raises(UnicodeDecodeError):
        made_in(tmp_path / "gw0", "gw0", lambda h: (h / "w").write_bytes(b"\xff" + bytes(h)))


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)
