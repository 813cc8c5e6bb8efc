"""Files: ordinary permissions, JSON that cannot be read, names that are no text."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlm.base.files import parse_json, readable, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The permissions that new files lack."""
    usual = os.umask(request.param)
    yield request.param
    os.umask(usual)


def test_files_have_the_permissions_that_the_user_wants(umask: int, tmp_path: Path) -> None:
    for _ in range(2):  # a new file, then a replaced one
        write_text(tmp_path / "table.md", "x")
        mode = stat.S_IMODE((tmp_path / "table.md").stat().st_mode)
        assert oct(mode) == oct(0o666 & ~umask)


@pytest.mark.parametrize("text", ["[" * 200_000, b"\xff", b"", "{", b'{"a": "\xff"}'])
def test_json_that_cannot_be_read_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (any message)
        parse_json(text)


def test_a_name_that_is_no_text_can_be_written() -> None:
    assert readable("größe.txt") == "größe.txt"
    assert readable(os.fsdecode(b"caf\xe9.txt")) == "caf\ufffd.txt"
