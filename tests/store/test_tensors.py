"""Checkpoints: every byte is checked, and the last good one is kept until there is another."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from safetensors.torch import save_file
from torch import Tensor

from mlm.base.errors import UserError
from mlm.store import tensors as module
from mlm.store.models import load_base, load_lm
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about, load_latest, load_tensors, previous, save_tensors
from mlm.store.versions import written_now

SOME = {"one": torch.arange(12.0).reshape(3, 4), "two": torch.ones(5, dtype=torch.int64)}


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    body = bytearray(path.read_bytes())
    body[place] ^= 1 << bit
    path.write_bytes(body)


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """In header, description, checksum or tensors: one message, for tensors and description."""
    path = tmp_path / "rule.safetensors"
    save_tensors(path, SOME, {"step": 3, "cursor": [1, 2]})
    whole, random = path.read_bytes(), np.random.default_rng(0)
    named = whole.index(b"checksum")
    for place in [
        0,
        7,
        *range(named, named + 8),
        *random.integers(0, len(whole), 150),
        len(whole) - 1,
    ]:
        flip(path, int(place), int(random.integers(8)))
        for load in (load_about, load_tensors):
            with pytest.raises(UserError) as refused:
                load(path, "")
            assert str(refused.value).startswith(f"{path} is damaged (")
            assert "delete it and run its stage again" in str(refused.value)
        path.write_bytes(whole)
    found, about = load_tensors(path, "")
    assert about["step"] == 3
    assert all(torch.equal(found[name], tensor) for name, tensor in SOME.items())


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1])
def test_a_file_cut_short_is_damaged(length: int, tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    save_tensors(path, SOME, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(path, "")


def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lm_last.safetensors"
    for step in (1, 2, 3):
        save_tensors(path, SOME, {"step": step}, keep_previous=True)
    assert load_latest(path, "")[1]["step"] == 3
    flip(path, -20)
    with pytest.raises(UserError, match=f"put the checkpoint before it .*{previous(path)}"):
        load_tensors(path, "")
    assert load_latest(path, "")[1]["step"] == 2
    assert "going on from the checkpoint before it" in capsys.readouterr().err
    assert load_tensors(path, "")[1]["step"] == 2
    save_tensors(path, SOME, {"step": 4}, keep_previous=True)
    flip(path, -20)
    flip(previous(path), -20)
    with pytest.raises(UserError, match="is damaged") as refused:
        load_latest(path, "")
    assert "put the checkpoint" not in str(refused.value)


def test_what_does_not_come_back_from_the_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good file stays, with the one before it."""
    path = tmp_path / "lm_last.safetensors"
    for step in (1, 2):
        save_tensors(path, SOME, {"step": step}, keep_previous=True)
    real = module._checked

    def faulty(file: Path) -> object:
        flip(file, -20)
        return real(file)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_checked", faulty)
        with pytest.raises(UserError, match="what came back from the disk differs"):
            save_tensors(path, SOME, {"step": 3}, keep_previous=True)
    assert load_tensors(path, "")[1]["step"] == 2
    assert load_tensors(previous(path), "")[1]["step"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_system_without_links_keeps_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "lm_last.safetensors"
    for step in (1, 2):
        save_tensors(path, SOME, {"step": step}, keep_previous=True)
    assert load_latest(path, "")[1]["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_without_a_checksum_is_read_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lm.safetensors"
    about = json.dumps({"step": 1, **written_now(False, SOME)})
    save_file(SOME, path, metadata={"mlm": about})
    assert load_tensors(path, "")[1]["step"] == 1
    assert load_tensors(path, "")[1]["step"] == 1
    assert capsys.readouterr().err.count(f"note: {path} has no checksum") == 1


Change = Callable[[dict[str, Tensor], str], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "missing": (lambda tensors, name: tensors.pop(name), "is missing"),
    "shape": (lambda t, name: t.update({name: t[name][:-1].clone()}), "has the shape"),
    "dtype": (lambda t, name: t.update({name: t[name].long()}), "holds int64"),
    "nan": (lambda t, name: t[name].view(-1)[0].fill_(float("nan")), "is not finite"),
    "infinite": (lambda t, name: t[name].view(-1)[-1].fill_(float("inf")), "is not finite"),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("lm", "embedding"),
        ("lm", "lstm.0.bias"),
        ("memory", "theta_0/softmax.bias"),
        ("memory", "rms/lstm.0.recurrent"),
    ],
)
def test_tensors_that_no_model_has_are_refused(
    case: str, file: str, name: str, finished: Finished, tmp_path: Path
) -> None:
    """By a checksum that holds, as another program may write it."""
    path = RunFolder(finished.folder).checkpoint(file)
    tensors, about = load_tensors(path, "")
    change, said = CHANGES[case]
    change(tensors, name)
    other = tmp_path / path.name
    save_tensors(other, tensors, about, of_model=file == "lm")
    load = load_lm if file == "lm" else load_base
    with pytest.raises(UserError) as refused:
        load(other, about["vocabulary"])
    assert str(refused.value).startswith(f"{other} is damaged ({name} {said}")


def test_a_fisher_below_zero_is_refused(finished: Finished, tmp_path: Path) -> None:
    tensors, about = load_tensors(RunFolder(finished.folder).checkpoint("memory"), "")
    tensors["rms/lstm.0.bias"][0] = -1.0
    save_tensors(tmp_path / "memory.safetensors", tensors, about)
    with pytest.raises(UserError, match=r"is damaged \(the Fisher of lstm.0.bias"):
        load_base(tmp_path / "memory.safetensors", about["vocabulary"])


@pytest.mark.parametrize("case", ["missing", "shape", "nan"])
def test_a_rule_of_other_parameters_is_refused(
    case: str, finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    path = RunFolder(folder).checkpoint("three_levels")
    tensors, about = load_tensors(path, "")
    change, said = CHANGES[case]
    change(tensors, "update")
    save_tensors(path, tensors, about)
    error = command("evaluate", folder, "--no-draw").error
    assert f"{path} is damaged (update {said}" in error


def test_resuming_from_a_damaged_state_goes_on_from_the_one_before(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """And ends at the same weights."""
    folder = finished.copy(tmp_path / "run")
    last = RunFolder(folder).checkpoint("lm_last")
    flip(last, -100)
    outcome = command("train", "--out", folder, "--resume", "--stages", "lm")
    assert outcome.code == 0, outcome.err
    assert "is damaged" in outcome.err
    assert "going on from the checkpoint before it" in outcome.err
    for name in ("lm", "lm_last"):
        one, two = (
            load_tensors(RunFolder(f).checkpoint(name), "")[0] for f in (folder, finished.folder)
        )
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


@pytest.mark.parametrize("start", ["weights/", "state/"])
def test_a_training_state_of_another_kind_is_refused(
    start: str, finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    last = RunFolder(folder).checkpoint("lm_last")
    tensors, about = load_tensors(last, "")
    name = next(name for name in tensors if name.startswith(start))
    tensors[name] = tensors[name].to(torch.int32)
    save_tensors(last, tensors, about)
    error = command("train", "--out", folder, "--resume", "--stages", "lm").error
    assert f"{last} is damaged (" in error
    assert f"{name} has another shape or kind" in error
