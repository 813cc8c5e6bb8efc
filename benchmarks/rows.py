"""Rows of a table that are ordinary runs on the language model of another run, made once each."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlm.base.errors import UserError
from mlm.base.files import atomic_path
from mlm.runs.base import made_from
from mlm.runs.identity import base_identity, checkpoint_mark, identity
from mlm.runs.run import Run
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about


def language_model(path: Path) -> RunFolder:
    """The run folder at `path`.

    Raises:
        UserError: it is none, or holds no language model.
    """
    folder = RunFolder(path)
    folder.load_config()  # it is a run folder
    if not folder.checkpoint("lm").exists():
        raise UserError(f"{path} holds no language model; run train.py --stages lm")
    return folder


def prepare(path: Path, source: RunFolder, tuned: Path | None = None) -> RunFolder:
    """A run folder at `path` with the language model and the vocabulary of `source`.

    `tuned`: a row whose long-term memory is made, and whose hand-made rules are tuned; neither is
    done again where nothing that it depends on differs.
    """
    folder = RunFolder(path)
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    with atomic_path(folder.checkpoint("lm")) as whole:  # another process may be reading it
        shutil.copyfile(source.checkpoint("lm"), whole)
    if not folder.vocabulary.exists():
        copy = shutil.copytree if source.vocabulary.is_dir() else shutil.copyfile
        copy(source.vocabulary, folder.vocabulary)
    for name in ("tuning.json", "checkpoints/memory.safetensors"):
        known, mine = (tuned or path) / name, path / name
        if known.exists() and not mine.exists():
            with atomic_path(mine) as whole:
                shutil.copyfile(known, whole)
    return folder


def take_rules(run: Run, source: RunFolder) -> bool:
    """Take a run's learned rules from another folder; whether they were there.

    They must have been trained with the same settings and seed, on the adaptation base that the run
    has.
    """
    rules = run.config.meta.rules
    if not rules or not made_from(run.folder.checkpoint("memory"), base_identity(run)):
        return False
    base, mark = checkpoint_mark(run.folder, "memory"), identity(run)
    known = {rule: source.checkpoint(rule) for rule in rules}
    if not all(made_from(path, mark) for path in known.values()):
        return False
    if any(load_about(path, "").get("base") != base for path in known.values()):
        return False
    for rule, path in known.items():
        with atomic_path(run.folder.checkpoint(rule)) as whole:
            shutil.copyfile(path, whole)
    return True
