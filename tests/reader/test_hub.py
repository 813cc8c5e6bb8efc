"""Models on the hub: found in its local cache by revision, saved and pushed as others are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from conftest import Command, Finished
from huggingface_hub import constants
from tiny import corpus_text, write_corpus

from mlm.base.errors import UserError
from mlm.reader import TrainedModel, load
from mlm.reader.export import export
from mlm.reader.hub import HubModel
from mlm.store import released
from mlm.store.card import Card
from mlm.store.released import find_model, released_models
from mlm.store.run_folder import RunFolder

Contents = Callable[[Path], dict[str, bytes]]
FIRST, SECOND = "1" * 40, "2" * 40


@dataclass(frozen=True)
class Toy(HubModel):
    """A stand-in for a trained model."""

    folder: Path
    rule: str = "static"

    @classmethod
    def load_folder(cls, folder: Path, name: str | None = None, **how: Any) -> Self:
        RunFolder(folder).load_config()
        return cls(folder, **how)


@pytest.fixture(scope="module")
def model(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(finished.folder, tmp_path_factory.mktemp("hub") / "model", ["rms"], Card("First"))


@pytest.fixture
def cache(model: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two revisions of a model, and no network."""
    home = tmp_path / "cache"
    place = home / "models--user--toy"
    (place / "refs").mkdir(parents=True)
    second = export(finished.folder, tmp_path / "second", ["static"], Card("Second"))
    for revision, folder in ((FIRST, model), (SECOND, second)):
        for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
            blob = place / "blobs" / f"{revision[0]}{number}"
            link = place / "snapshots" / revision / file.relative_to(folder)
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs" / "main").write_text(SECOND, encoding="utf-8")
    (place / "refs" / "v1").write_text(FIRST, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return home


def title(folder: Path) -> str:
    return RunFolder(folder).load_record()[released.RELEASE]["title"]


def test_a_hub_id_is_found_in_the_cache_by_revision(cache: Path) -> None:
    assert title(find_model("user/toy")) == "Second"
    assert title(find_model("user/toy", "main")) == "Second"
    assert title(find_model("user/toy", "v1")) == title(find_model("user/toy", FIRST)) == "First"
    assert Toy.from_pretrained("user/toy", revision="v1").folder.name == FIRST
    other = cache.rename(cache.with_name("elsewhere"))
    assert title(Toy.from_pretrained("user/toy", cache_dir=other, rule="rms").folder) == "Second"


def test_evaluate_reads_from_the_hub_and_writes_to_runs(
    cache: Path, command: Command, tmp_path: Path, contents: Contents
) -> None:
    before = contents(cache)
    text = write_corpus(tmp_path / "else", train=1, valid=1, test=1)
    words = ("--corpus", text, "--rules", "static", "--protocols", "article", "--no-draw")
    outcome = command("evaluate", "user/toy", *words)
    assert outcome.code == 0, outcome.err
    assert list((tmp_path / "runs" / "toy").glob("on-else-*/losses.parquet"))
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("user/none", None, "is no run folder, and the hub did not give it ("),
        ("user/toy", "v2", "is no run folder, and the hub did not give it ("),
        ("user/plain", None, "what the hub has of that name is no model that `mlm export` wrote"),
        ("runs/pydocs", None, "runs/pydocs is no run folder. Name a model"),
        ("/nowhere/at/all", None, "/nowhere/at/all is no run folder. Name a model"),
        ("wikipedia-smal", None, "wikipedia-smal is no run folder. Name a model"),
        ("../user", None, "../user is no run folder. Name a model"),
    ],
)
def test_a_name_that_means_nothing_gives_one_message(
    name: str, revision: str | None, reason: str, cache: Path, finished: Finished
) -> None:
    """Also what somebody else keeps on the hub, and a run folder that is not exported."""
    plain = cache / "models--user--plain"
    shutil.copytree(finished.folder, plain / "snapshots" / FIRST)
    (plain / "refs").mkdir()
    (plain / "refs" / "main").write_text(FIRST, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        find_model(name, revision)
    assert reason in str(refused.value)
    assert "the folder of a run, such as runs/pydocs, or a model on the hub, such as user/name" in (
        str(refused.value)
    )


def test_a_released_models_name_wins_over_a_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """And evaluates from anywhere, without a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(released, "FOLDER", tmp_path / "package")
    shutil.copytree(model, tmp_path / "package" / "wikipedia-small")
    assert released_models() == ("wikipedia-small",)
    (tmp_path / "wikipedia-small").mkdir()
    assert find_model("wikipedia-small") == tmp_path / "package" / "wikipedia-small"
    assert find_model(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"released with mlm \(wikipedia-small\)"):
        find_model("none")
    with pytest.raises(UserError, match="only hub ids have revisions"):
        find_model("wikipedia-small", "main")
    assert Toy.from_pretrained("wikipedia-small").folder.name == "wikipedia-small"
    text = write_corpus(tmp_path / "else", train=1, valid=1, test=1)
    words = ("--corpus", text, "--rules", "static", "--protocols", "article", "--no-draw")
    assert command("evaluate", "wikipedia-small", *words).code == 0
    assert list((tmp_path / "runs" / "wikipedia-small").glob("on-else-*/evaluation.json"))


def test_a_model_is_saved_and_loaded(
    finished: Finished, model: Path, tmp_path: Path, contents: Contents
) -> None:
    Toy(finished.folder).save_pretrained(tmp_path / "once")
    once = Toy.from_pretrained(tmp_path / "once", rule="rms")
    assert once.rule == "rms"
    once.save_pretrained(tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


def test_saving_never_touches_another_model(
    finished: Finished, model: Path, tmp_path: Path, contents: Contents
) -> None:
    there = shutil.copytree(model, tmp_path / "there")
    with pytest.raises(UserError, match="not empty"):
        Toy(finished.folder).save_pretrained(there)
    assert contents(there) == contents(model)


def test_what_is_pushed_is_the_exported_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    pushed: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **more: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path: Path, **more: Any) -> str:
            pushed.update(more, files=contents(folder_path))
            return "address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert Toy(model).push_to_hub("user/toy", branch="v1") == "address"
    assert pushed["files"] == contents(model)
    assert (pushed["repo_id"], pushed["revision"]) == ("user/toy", "v1")


def test_a_trained_model_is_saved_and_loaded(finished: Finished, tmp_path: Path) -> None:
    """It reads as before, to float16's rounding, and twice the same."""
    model = load(finished.folder)
    model.save_pretrained(tmp_path / "model")
    again, twice = (TrainedModel.from_pretrained(tmp_path / "model") for _ in range(2))
    assert again.rules == model.rules
    assert again.best == model.best
    assert again.name == str(tmp_path / "model")
    text = corpus_text(1, seed=7)
    bits = [m.score_many([text])["surprisal"].to_numpy() for m in (model, again, twice)]
    assert abs(bits[0].mean() - bits[1].mean()) < 3e-3
    np.testing.assert_array_equal(bits[1], bits[2])
