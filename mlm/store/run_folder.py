"""The run folder: its paths, settings, metrics and what it says about how it was made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mlm
from mlm.base.errors import UserError
from mlm.base.files import naming, write_text
from mlm.settings.config import Config
from mlm.settings.record import from_dict, to_dict
from mlm.store.released import RELEASE, check_files, is_released, portable
from mlm.store.versions import FORMAT

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
    "figures/*.csv",
)
"""What the stages leave in a run folder (and in its `on-*` folders) that belongs to one model."""
ENTRIES = ("format", "config", "command", "versions", "machine", "commit")
"""Of config.json; that of a released model has one more."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; a run explains itself from this folder alone."""

    path: Path

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
        """Append one row to metrics.jsonl."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps({k: v for k, v in row.items() if v is not None}, allow_nan=False)
        with naming(self.metrics_file), open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a half-written last line is ignored."""
        if not self.metrics_file.exists():
            return []
        found = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def keep_rows(self, keep: Any) -> None:
        """Rewrite metrics.jsonl with the rows for which `keep(row)` holds (resume)."""
        rows = [json.dumps(row) + "\n" for row in self.rows() if keep(row)]
        write_text(self.metrics_file, "".join(rows))

    @property
    def released(self) -> bool:
        """Whether this is a released model, which is only read."""
        return is_released(self.path)

    def save_config(self, config: Config) -> None:
        """Write config.json: settings, command, versions, machine, commit."""
        record = {
            "format": FORMAT,
            "config": to_dict(config),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": machine(),
            "commit": commit(),
        }
        write_text(self.config_file, json.dumps(record, indent=1) + "\n")

    def load_record(self) -> dict[str, Any]:
        """All of config.json.

        Raises:
            UserError: no run folder, damaged, or of another version.
        """
        if not self.config_file.exists():
            raise UserError(
                f"{self.path} is no run folder (it has no config.json). Make one with "
                f"`python train.py --out {self.path}`"
            )
        try:
            record = json.loads(self.config_file.read_text(encoding="utf-8"))
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
            return record
        except (ValueError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.config_file} is damaged ({error}). Restore it, or train again with another "
            "--out"
        )

    def load_config(self) -> Config:
        """The settings the run was made with; of a released model, whose files are checked first,
        without any path but its folder's.

        Raises:
            UserError: no run folder, or a damaged config.json or file of a released model.
        """
        record = self.load_record()
        if RELEASE in record:
            check_files(self.path, record)
        try:
            config = from_dict(record["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None
        return replace(portable(config), out=self.path) if RELEASE in record else config


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
    root = Path(mlm.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
