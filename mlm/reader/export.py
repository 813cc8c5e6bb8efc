"""Export: a run folder in the compact, read-only form of a released model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mlm.base.errors import UserError
from mlm.base.files import write_text
from mlm.base.names import CACHE, HAND_MADE, LEARNED, PROTOCOLS, STATIC, rule_label, rule_order
from mlm.extensions.learned_basis import folded_matrices
from mlm.models.low_rank import LOW
from mlm.report.evaluation import read_evaluation
from mlm.report.tables import totals_markdown
from mlm.runs.base import made_from
from mlm.runs.identity import base_identity, checkpoint_mark, identity
from mlm.runs.rules import (
    BESIDE,
    TUNING,
    cache_window,
    current_identity,
    of_learned,
    ready_rules,
    tuned_settings,
)
from mlm.runs.run import Run
from mlm.settings.config import Config
from mlm.settings.record import to_dict
from mlm.store.card import Card, card_text
from mlm.store.models import save_base
from mlm.store.released import RELEASE, check_empty, portable, sign_files
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about, load_tensors, save_tensors

FACTS = ("step", "valid_loss")
"""What is told of stage 1 from the language model's file."""


def export(
    run: str | Path, folder: str | Path, rules: Sequence[str] = (), card: Card | None = None
) -> Path:
    """Write a run folder as a released model: what reading needs, and nothing else.

    Args:
        run: a run folder whose stage 2 is done, or a released model, which is copied.
        folder: the new folder; it must not exist, or be empty.
        rules: those to keep; by default all that are trained or tuned.
        card: what the README says of the model.

    Raises:
        UserError: no such run or rule, stage 2 is not done, or the folder is not empty.
    """
    source, folder = RunFolder(Path(run)), Path(folder)
    check_empty(folder)
    config = source.load_config()
    with _whole(folder) as place:
        if source.released:
            if rules or card:
                raise UserError(f"{run} is a released model; export the run that it was made from")
            shutil.copytree(source.path, place, dirs_exist_ok=True)
        else:
            _write(_source(source, config), RunFolder(place), rules, card or Card(folder.name))
    return folder


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that takes the name `folder` once all is written, or vanishes."""
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".export-") as home:
        place = Path(home) / "model"
        place.mkdir()
        yield place
        if folder.exists():
            folder.rmdir()
        os.replace(place, folder)


def _source(folder: RunFolder, config: Config) -> Run:
    """The run to export.

    Raises:
        UserError: its adaptation base is missing, or made from something else.
    """
    run = Run(dataclasses.replace(config, out=folder.path), folder, torch.device("cpu"), quiet=True)
    path = folder.checkpoint("memory")
    load_about(path, "stage 2 is not done; run `--stages meta` first")
    if not made_from(path, base_identity(run)):
        raise UserError(
            f"{path} was made with other settings or from another language model than the run's; "
            "run `--stages meta` again"
        )
    return run


def _chosen(run: Run, wanted: Sequence[str]) -> list[str]:
    """The rules to export, in order.

    Raises:
        UserError: one is neither trained nor tuned.
    """
    ready = {rule for protocol in PROTOCOLS for rule in ready_rules(run, protocol)}
    missing = [rule for rule in wanted if rule not in ready]
    if missing:
        raise UserError(
            f"--rules: {', '.join(missing)} is neither trained nor tuned in {run.folder.path}; "
            f"choose from {', '.join(sorted(ready, key=rule_order))}"
        )
    chosen = {STATIC, *wanted, *(rule.removesuffix(CACHE) for rule in wanted)} if wanted else ready
    return sorted(chosen, key=rule_order)


def _write(run: Run, target: RunFolder, wanted: Sequence[str], card: Card) -> None:
    """All files of the model, config.json last."""
    rules = _chosen(run, wanted)
    tuned = {k: s for k, s in tuned_settings(run).items() if k.partition("/")[0] in rules}
    evaluation = dataclasses.replace(
        run.config.evaluation, rules=tuple(rules), protocols=_protocols(run.config, rules, tuned)
    )
    config = portable(dataclasses.replace(run.config, evaluation=evaluation))
    copy = Run(config, target, run.device, quiet=True)
    run.vocabulary.save(target.vocabulary, as_json=True)
    facts = _tensors(run, copy, [rule for rule in rules if rule in LEARNED])
    for key, setting in tuned.items():
        if key.partition("/")[0].endswith(CACHE):
            setting["window"] = cache_window(run)
    entries = {
        key: {"identity": identity(run, of_learned(key)), "setting": setting}
        for key, setting in tuned.items()
    }
    write_text(target.path / TUNING, json.dumps(entries, indent=1) + "\n")
    rows = [
        row
        for row in read_evaluation(run.folder.path)
        if row["kind"] == "total"
        and row["rule"] in rules
        and row.get("identity") == current_identity(run, row["rule"], row["protocol"])
    ]
    write_text(target.path / "README.md", _readme(copy, card, facts, rules, totals_markdown(rows)))
    record = run.folder.load_record()
    for told in (record, *record.get("history", ())):
        told["command"] = re.sub(r"[^\s=]*[/\\]", "", told["command"])
    record["config"] = to_dict(config)
    record[RELEASE] = {"title": card.title, "licence": card.licence, "training": facts}
    write_text(target.config_file, sign_files(target.path, record))


def _protocols(config: Config, rules: Sequence[str], tuned: dict[str, Any]) -> tuple[Any, ...]:
    """Protocols of the run in which all rules are ready; the run's if there are none."""
    tuning = [rule for rule in rules if rule in HAND_MADE or rule.endswith(CACHE)]
    own = config.evaluation.protocols
    return tuple(p for p in own if all(f"{rule}/{p}" in tuned for rule in tuning)) or own


def _tensors(run: Run, copy: Run, learned: Sequence[str]) -> dict[str, Any]:
    """Write base and rules, marked as made for the new folder; what is told of their training."""
    path = run.folder.checkpoint("lm")
    about = load_about(path, "") if path.exists() else {}
    facts: dict[str, Any] = {name: about[name] for name in FACTS if name in about}
    base = run.stored_base
    # A matrix that adapts in a basis of its own is stored once: `load_base` finds its changes.
    follow = [name + LOW for name in folded_matrices(base)]
    kept = {name: w for name, w in base.weights.items() if name not in follow}
    base = dataclasses.replace(base, weights=kept)
    facts["weights"] = sum(w.numel() for w in base.static.values())
    made_with = [extension.name for extension in run.config.extensions.of_base()]
    path, vocabulary = copy.folder.checkpoint("memory"), run.vocabulary.hash
    save_base(path, base, vocabulary, base_identity(run), made_with, packed=True)
    mark = checkpoint_mark(copy.folder, "memory")
    gains = facts["gains"] = {}
    for name in learned:
        tensors, about = load_tensors(run.folder.checkpoint(name), "")
        about["base"] = mark
        gains[name] = about.get("gain")
        # A rule's own parameters are few, and logarithms: an error in them is one of the steps.
        large = [name for name in tensors if name.startswith(BESIDE)]
        save_tensors(copy.folder.checkpoint(name), tensors, about, packed=large)
    return facts


def _readme(run: Run, card: Card, facts: dict[str, Any], rules: Sequence[str], table: str) -> str:
    """The model card."""
    model, text = run.config.model, run.config.text
    return card_text(
        card,
        cell=model.cell.upper() if model.cell != "snail" else "SNAIL",
        layers=model.layers,
        hidden=model.hidden if model.layers > 1 else model.embedding,
        embedding=model.embedding,
        weights=facts["weights"],
        vocabulary=f"{run.vocabulary.size:,} tokens ({text.vocabulary})",
        every=run.config.adapt.update_every,
        corpus=run.config.corpus,
        rules={rule: rule_label(rule) for rule in rules},
        table=table,
    )
