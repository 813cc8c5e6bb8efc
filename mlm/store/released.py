"""Released models: run folders that are only read, found by name, by path or on the hub.

`config.json` of such a folder has one more entry, `released`, with the checksum of every file. What
it says of paths is ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import mlm
from mlm.base.errors import UserError
from mlm.base.files import parse_json
from mlm.settings.config import Config
from mlm.settings.flags import replaced

FOLDER = Path(mlm.__file__).with_name("released")
"""Where the package keeps models."""
RELEASE = "released"
"""The entry of config.json that only released models have."""
FETCHED = ["*.json", "*.safetensors", "*.md"]
"""The only files that a model on the hub is asked for."""
READ = ("tuning.json", "vocabulary/*", "checkpoints/*")
"""Files that reading may open."""
BLANK = "0" * 64
"""Stands for the checksum of config.json while it is computed."""


def portable(config: Config) -> Config:
    """Settings that mean the same everywhere: without paths, threads, device and precision.

    The corpus keeps its bare name. Products are float32, so that a processor's bfloat16 moves no
    number.
    """
    usual = Config()
    places = ("out", "resume", "overwrite", "device", "threads")
    through = "none" if config.lm.through == "learned" else config.lm.through
    return replaced(
        config,
        {name: getattr(usual, name) for name in places}
        | {
            "corpus": re.split(r"[/\\]", config.corpus.rstrip("/\\"))[-1] or "corpus",
            "text.data_dir": usual.text.data_dir,
            "adapt.precision": "float32",
            "lm.init": None,
            "lm.through": through,  # the adaptation base holds what that run left
            "lm.through_run": None,
        },
    )


def sign_files(folder: Path, record: dict[str, Any]) -> str:
    """The text of config.json for a folder in which all other files are there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): _digest(file.read_bytes()) for file in files}
    release = {"checksum": BLANK, "files": names, **record[RELEASE]}
    text = json.dumps({**record, RELEASE: release}, indent=1) + "\n"
    return text.replace(BLANK, _digest(text.encode()), 1)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def check_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Every file of a released model is what it was when it was written, and there are no others.

    Raises:
        UserError: names the first that is not.
    """
    try:
        own, names = str(record[RELEASE]["checksum"]), dict(record[RELEASE]["files"])
    except (KeyError, TypeError, ValueError):
        own, names = "", {}
    text = (folder / "config.json").read_bytes()
    if not own or _digest(text.replace(own.encode(), BLANK.encode(), 1)) != own:
        raise _unlike(folder / "config.json")
    there = {p.relative_to(folder).as_posix() for form in READ for p in folder.glob(form)}
    for name in sorted(names.keys() | there):
        path = folder / name
        plain = ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
        # A file, not a device: those have no end.
        same = plain and path.is_file() and _digest(path.read_bytes()) == names.get(name)
        if not same:
            raise _unlike(path)


def _unlike(path: Path) -> UserError:
    return UserError(
        f"{path} is not as it was released: damaged, missing or changed (its checksum in "
        "config.json differs). Fetch or export the model again"
    )


def is_released(folder: Path) -> bool:
    """Whether config.json says that this is a released model."""
    try:
        return RELEASE in parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: it does, or is a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; choose another folder")


def released_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(file.parent.name for file in FOLDER.glob("*/config.json")))


def find_model(name: str | Path, revision: str | None = None, **how: Any) -> Path:
    """The folder of a model: one released with the package, a run folder, or one on the hub.

    Args:
        name: a released model's name, the path of a folder, or a hub id such as `user/name`.
        revision: of a hub id: a branch, a tag or a commit.
        how: of a hub id: `cache_dir`, `token`, `force_download` and `local_files_only` as
            `huggingface_hub.snapshot_download` takes them.

    Raises:
        UserError: there is none; names those released with the package.
    """
    text = str(name)
    if text in released_models() or Path(name).is_dir():
        if revision is not None:
            raise UserError(f"revision {revision}: {text} is a folder; only hub ids have revisions")
        return FOLDER / text if text in released_models() else Path(name)
    # runs/NAME is a run folder that is not there.
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not text.startswith("runs/")
    reason = _from_hub(text, revision, how) if is_id else ""
    if isinstance(reason, Path):
        return reason
    raise UserError(
        f"{text} is no run folder{reason}. Name a model released with mlm "
        f"({', '.join(released_models()) or 'none in this version'}), the folder of a run, such as "
        "runs/pydocs, or a model on the hub, such as user/name"
    )


def _from_hub(repository: str, revision: str | None, how: Mapping[str, Any]) -> Path | str:
    """The local copy of a hub's model, fetched if need be, or why there is none."""
    from huggingface_hub import snapshot_download

    try:
        found = Path(
            snapshot_download(repository, revision=revision, allow_patterns=FETCHED, **how)
        )
    except Exception as error:  # which one depends on the version of the hub's library
        first = next(iter(str(error).splitlines()), type(error).__name__)
        return f", and the hub did not give it ({first})"
    if not is_released(found):
        return ", and what the hub has of that name is no model that `mlm export` wrote"
    return found
