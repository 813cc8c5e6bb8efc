"""The run folder: config, metrics, checkpoints; atomic save, checked load."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mlm
from mlm.config import Config, from_dict, to_dict
from mlm.errors import UserError
from mlm.files import atomic_path, naming, write_text
from mlm.lm import BaseModel, LanguageModel, LMShape
from mlm.memory import Borders, LongTerm
from mlm.snail import SnailShape

RESULTS = (
    "checkpoints/*.safetensors",
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
        """A safetensors file: `lm`, `lm_last`, `memory`, `two_levels`, ..."""
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

    def save_config(self, config: Config) -> None:
        """Write config.json: settings, command, versions, machine, commit."""
        record = {
            "config": to_dict(config),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": machine(),
            "commit": commit(),
        }
        write_text(self.config_file, json.dumps(record, indent=1) + "\n")

    def load_config(self) -> Config:
        """The settings the run was made with.

        Raises:
            UserError: no run folder, or a damaged config.json.
        """
        if not self.config_file.exists():
            raise UserError(
                f"{self.path} is no run folder (it has no config.json). Make one with "
                f"`python train.py --out {self.path}`"
            )
        try:
            return from_dict(json.loads(self.config_file.read_text(encoding="utf-8"))["config"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.config_file} is damaged ({error}). Restore it, or train again with another "
                "--out"
            ) from None


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


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON description to a safetensors file, atomically."""
    from safetensors.torch import save

    plain = {n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}
    body = save(plain, metadata={"mlm": json.dumps(about)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(body)


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A file that `save_tensors` wrote, and what it says about itself."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise UserError(f"{path} is missing: {what}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {})["mlm"])
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run its stage again") from None


def load_about(path: Path, what: str) -> dict[str, Any]:
    """What a file that `save_tensors` wrote says about itself; its tensors are not read.

    Raises:
        UserError: missing or damaged (a file that was cut off is), with what makes it.
    """
    with _opened(path, what) as (_, about):
        return about


def load_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        UserError: missing or damaged, with what makes it.
    """
    with _opened(path, what) as (file, about):
        # Cloned: a tensor in the mapped file lies unaligned, and kernels then round otherwise.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, about  # noqa: SIM118


def adam_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Adam's state as plain tensors; `names` are those of its parameters, in order."""
    state = optimizer.state_dict()["state"]
    return {
        f"adam/{key}/{name}": value
        for k, name in enumerate(names)
        for key, value in state.get(k, {}).items()
    }


def load_adam(
    optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: dict[str, Tensor]
) -> None:
    """Give an optimizer the state that `adam_tensors` found, in place."""
    state = {}
    for k, name in enumerate(names):
        keys = [
            n.split("/")[1] for n in tensors if n.startswith("adam/") and n.endswith(f"/{name}")
        ]
        state[k] = {key: tensors[f"adam/{key}/{name}"] for key in keys}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_lm(
    path: Path, weights: dict[str, Tensor], shape: BaseModel, vocabulary_hash: str, **more: Any
) -> None:
    """Write a language model's weights."""
    about = {"shape": _record(shape), "vocabulary": vocabulary_hash, **more}
    save_tensors(path, weights, about)


def _record(shape: LanguageModel) -> dict[str, Any]:
    """A model's sizes, from which `_shape` makes it again.

    Raises:
        UserError: it is a module of the user's own, whose code no file holds.
    """
    if not isinstance(shape, (LMShape, SnailShape)):
        raise UserError(
            f"a {type(shape).__name__} cannot be written to a checkpoint, which holds no code. "
            "Save the tensors of `memory.weights` and `memory.rms`, and make the model anew"
        )
    return dataclasses.asdict(shape)


def _shape(about: dict[str, Any]) -> LMShape | SnailShape:
    values = {**about["shape"], "cutoffs": tuple(about["shape"]["cutoffs"])}
    return SnailShape(**values) if values.get("cell") == "snail" else LMShape(**values)


def check_vocabulary(path: Path, about: dict[str, Any], vocabulary_hash: str) -> None:
    """Refuse weights that belong to another vocabulary.

    Raises:
        UserError: the hashes differ.
    """
    if about.get("vocabulary") != vocabulary_hash:
        raise UserError(
            f"{path} belongs to another vocabulary than the text was encoded with. Use the "
            "vocabulary of its own run folder, or train again with another --out"
        )


def load_lm(
    path: Path, vocabulary_hash: str
) -> tuple[dict[str, Tensor], BaseModel, dict[str, Any]]:
    """Weights, sizes and description of a language model.

    Raises:
        UserError: missing, damaged, or from another vocabulary.
    """
    weights, about = load_tensors(path, "train the language model first (`--stages lm`)")
    check_vocabulary(path, about, vocabulary_hash)
    return weights, _shape(about), about


def save_memory(path: Path, memory: LongTerm, vocabulary_hash: str, identity: str = "") -> None:
    """Write theta_0 and the Fisher; `identity` names what they were made from."""
    tensors = {f"theta_0/{n}": w for n, w in memory.weights.items()}
    tensors |= {f"rms/{n}": r for n, r in memory.rms.items()}
    about = {
        "shape": _record(memory.shape),
        "vocabulary": vocabulary_hash,
        "dynamic": list(memory.dynamic),
        "loss": memory.loss,
        "segment": memory.segment,
        "identity": identity,
    }
    if memory.borders is not None:
        tensors["borders"] = memory.borders.weights
        about["eos"] = memory.borders.eos
    save_tensors(path, tensors, about)


def load_memory(path: Path, vocabulary_hash: str) -> LongTerm:
    """The long-term memory of a run.

    Raises:
        UserError: missing, damaged, or from another vocabulary.
    """
    tensors, about = load_tensors(path, "make it first (`--stages meta`)")
    check_vocabulary(path, about, vocabulary_hash)

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    borders = Borders(tensors["borders"], about["eos"]) if "borders" in tensors else None
    return LongTerm(
        _shape(about),
        part("theta_0/"),
        tuple(about["dynamic"]),
        part("rms/"),
        about["loss"],
        about["segment"],
        borders=borders,
    )
