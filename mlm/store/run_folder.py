"""The run folder: its paths, settings, metrics and what it says about how it was made."""

from __future__ import annotations

import filecmp
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mlm
from mlm.base.errors import UserError, command_of
from mlm.base.files import naming, parse_json, write_text
from mlm.base.processes import ranks
from mlm.base.terminal import note
from mlm.settings.config import Config
from mlm.settings.flags import leaves, replaced
from mlm.settings.record import from_dict, missing, to_dict
from mlm.store.released import RELEASE, check_files, is_released, portable
from mlm.store.versions import FORMAT
from mlm.text.corpora import NAMED

RESULTS = (
    "checkpoints/*.safetensors",
    "unfinished_*.safetensors",
    "evaluation.json",
    "evaluation.md",
    "losses.parquet",
    "tuning.json",
    "words*.html",
    "figures/*.png",
    "figures/*.svg",
    "figures/*.pdf",
    "figures/*.csv",
)
"""What the stages leave in a run folder (and in its `on-*` folders) that belongs to one model."""
MADE = ("command", "versions", "machine", "commit", "dirty")
"""What config.json says of a command: of the last one, and of every one in `history`."""
ENTRIES = ("format", "config", "text", *MADE, "history")
"""Of config.json; that of a released model has one more."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; a run explains itself from this folder alone."""

    path: Path
    mark: str = ""
    """The identity that rows of metrics.jsonl are logged with."""

    @property
    def config_file(self) -> Path:
        """Resolved settings, command, versions."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per measurement."""
        return self.path / "metrics.jsonl"

    @property
    def vocabulary(self) -> Path:
        """The vocabulary the checkpoints belong to."""
        return self.path / "vocabulary"

    def checkpoint(self, name: str) -> Path:
        """A safetensors file: `lm`, `lm_last`, `base`, `two_levels`, ..."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def results(self) -> list[Path]:
        """The files of an earlier run in this folder."""
        folders = (self.path, *self.path.glob("on-*"))
        return [file for f in folders for pattern in RESULTS for file in sorted(f.glob(pattern))]

    def log(self, **row: Any) -> None:
        """Append one row to metrics.jsonl; of several processes the first does."""
        if not ranks().first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        row |= {"identity": self.mark or None}
        line = json.dumps({k: v for k, v in row.items() if v is not None}, allow_nan=False)
        with naming(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a half-written last line is ignored.

        Raises:
            UserError: another line is no row.
        """
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().splitlines()
        found = []
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
                if not isinstance(row, dict) or not isinstance(row.get("stage"), str):
                    raise ValueError("no row of measurements")
                found.append(row)
            except ValueError as error:
                if number < len(lines):
                    raise UserError(
                        f"{self.metrics_file}, line {number}, is damaged ({error}). Remove the "
                        "line; nothing but the picture of training is made from it"
                    ) from None
        return found

    def keep_rows(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite metrics.jsonl with the rows for which `keep(row)` holds (resume)."""

        def rewrite() -> None:
            rows = [json.dumps(row) + "\n" for row in self.rows() if keep(row)]
            write_text(self.metrics_file, "".join(rows))

        ranks().on_first(rewrite)

    @property
    def released(self) -> bool:
        """Whether this is a released model, which is only read."""
        return is_released(self.path)

    def save_config(self, config: Config, text: Mapping[str, str] | None = None) -> None:
        """Write config.json: settings, hashes of the text, and what made the run.

        `history` has an entry for every command since stage 1 began, this one last.

        Args:
            text: hashes of the vocabulary and of the splits; None = as before.
        """
        fresh = "lm" in config.stages and not config.resume
        before = {} if fresh or not self.config_file.exists() else self.load_record()
        made = made_now()
        entry = {"stages": list(config.stages), "seed": config.seed, **made}
        history = list(before.get("history", ()))
        if before and not history:  # a run of a version that kept the last command only
            history = [{name: before.get(name) for name in MADE}]
        record = {
            "format": FORMAT,
            "config": to_dict(replaced(config, _absolute(config))),
            "text": before.get("text", {}) if text is None else dict(text),
            **made,
            "history": history if entry in history else [*history, entry],
        }
        write_text(self.config_file, json.dumps(record, indent=1) + "\n")

    @property
    def text(self) -> dict[str, str]:
        """Hashes of the vocabulary and of the splits that the run was trained with, if known."""
        return self.load_record().get("text", {}) if self.config_file.exists() else {}

    def seed_of(self, stage: str) -> int | None:
        """The seed with which a stage was begun, if it is recorded."""
        history = self.load_record().get("history", ()) if self.config_file.exists() else ()
        return next((e.get("seed") for e in history if stage in e.get("stages", ())), None)

    def load_record(self) -> dict[str, Any]:
        """All of config.json.

        Raises:
            UserError: no run folder, damaged, or of another version.
        """
        if not self.config_file.exists():
            raise UserError(
                f"{self.path} is no run folder (it has no config.json). Make one with "
                f"`{command_of('train')} --out {self.path}`"
            )
        try:
            record = parse_json(self.config_file.read_bytes())
            written = record.get("format", "of an earlier version")
            if written != FORMAT:
                way = (
                    "install that version"
                    if RELEASE in record
                    else "train again with another --out"
                )
                raise UserError(
                    f"{self.path} was made by another version of mlm (format {written}, now "
                    f"{FORMAT}); {way}"
                )
            other = [name for name in record if name not in (*ENTRIES, RELEASE)]
            if other:
                raise ValueError(f"unknown entry {other[0]!r}")
            _check_text(record.get("text", {}))
            _check_history(record.get("history", []))
            return record
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: object) -> UserError:
        return UserError(
            f"{self.config_file} is damaged ({error}). Restore it, or train again with another "
            "--out"
        )

    def load_config(self) -> Config:
        """The settings the run was made with; of a released model, whose files are checked first,
        without any path but its folder's.

        `text.data_dir` is taken where it holds the run's vocabulary already: no other folder is
        written to because a file says so.

        Raises:
            UserError: no run folder, or a damaged config.json or file of a released model.
        """
        record = self.load_record()
        if RELEASE in record:
            check_files(self.path, record)
        try:
            config = from_dict(record["config"])
        except KeyError:
            raise self._damaged("it has no settings") from None
        except UserError as error:
            raise self._damaged(error) from None
        absent = missing(record["config"])
        if absent and RELEASE not in record:
            note(
                f"{self.config_file} does not say {', '.join(absent)}, as a run of an earlier "
                "version does not; the defaults are taken"
            )
        if RELEASE in record:
            return replace(portable(config), out=self.path)
        own = self._has_cache(config.text.data_dir)
        return config if own else replaced(config, {"text.data_dir": Config().text.data_dir})

    def _has_cache(self, folder: Path) -> bool:
        """Whether a folder holds tokens of the run's own vocabulary."""
        mine = self.vocabulary / "vocabulary.model"
        try:
            files = folder.glob("*/vocabulary.model")
            return any(filecmp.cmp(file, mine, shallow=False) for file in files)
        except (OSError, ValueError):
            return False


def _check_text(text: Any) -> None:
    """Raise ValueError unless these are hashes of a vocabulary and of splits, or none at all."""
    fine = isinstance(text, dict) and all(isinstance(mark, str) for mark in text.values())
    if not fine or (text and not {"vocabulary", "train", "valid"} <= text.keys()):
        raise ValueError("text holds no hashes of vocabulary and splits")


def _check_history(history: Any) -> None:
    """Raise ValueError unless these are commands, each with its stages and its seed."""
    for entry in history if isinstance(history, list) else [None]:
        if not isinstance(entry, dict) or not isinstance(entry.get("stages", []), list):
            raise ValueError("history holds no commands")
        if not isinstance(entry.get("seed"), int | None):
            raise ValueError("history holds no seed")


def _absolute(config: Config) -> dict[str, Any]:
    """The paths of texts and runs that the settings name, as they are found from everywhere."""
    found: dict[str, Any] = {}
    if config.corpus not in NAMED and Path(config.corpus).expanduser().exists():
        found["corpus"] = str(Path(config.corpus).expanduser().resolve())
    for name, path in leaves(config.lm).items():
        if isinstance(path, Path):
            found[f"lm.{name}"] = path.resolve()
    return found


def made_now() -> dict[str, Any]:
    """What makes a result now: `MADE`."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": machine(),
        "commit": commit(),
        "dirty": dirty(),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str | None:
    """The commit of the code, if it is a git checkout (installed, it may lie in another's)."""
    return _git("rev-parse", "--short", "HEAD")


def dirty() -> bool | None:
    """Whether the code differs from its commit; None = it is no git checkout."""
    changed = _git("status", "--porcelain", "--", "mlm")
    return None if changed is None else bool(changed)


def _git(*words: str) -> str | None:
    """What git says of the code; None = it is no checkout, or there is no git."""
    root = Path(mlm.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=root,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
