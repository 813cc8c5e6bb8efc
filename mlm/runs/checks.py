"""runs.checks"""

from __future__ import annotations

import os

from mlm.base.errors import UserError
from mlm.base.files import write_text
from mlm.base.names import CACHE, LEARNED
from mlm.models.base import choose_dynamic
from mlm.runs.run import Run
from mlm.training.language_model import shape_of


def check_folder(run: Run) -> None:
    """Nothing is written over another run unasked, and no stage starts without what it needs.

    Raises:
        UserError: the folder is a file, holds a run already, or lacks one to go on with.
    """
    folder, config = run.folder, run.config
    path = folder.path
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        problem = "cannot be written" if above.is_dir() else "is no folder"
        raise UserError(f"--out {path}: {above} {problem}; choose another folder")
    if config.resume and not folder.config_file.exists():
        raise UserError(
            f"--resume: {path} holds no run to continue. Leave --resume out to start one, or name "
            "its folder with --out"
        )
    if "lm" in config.stages and not (config.resume or config.overwrite) and folder.results():
        raise UserError(
            f"{path} already holds a run. Continue it with --resume, replace it with "
            "--overwrite, or choose another folder with --out"
        )
    fresh = "lm" in config.stages and not config.resume
    trained = set(config.meta.rules) if "meta" in config.stages else set()
    needs = {
        "meta": (folder.checkpoint("lm"), {"lm"}),
        "evaluate": (folder.checkpoint("memory"), {"meta"}),
        "draw": (path / "losses.parquet", {"evaluate"}),
    }
    for stage in config.stages:
        file, makers = needs.get(stage, (path, {stage}))
        if not makers & set(config.stages) and (fresh or not file.exists()):
            raise UserError(
                f"--stages {stage}: {file} is missing; run --stages {' '.join(makers)} first"
            )
    scored = [rule.removesuffix(CACHE) for rule in config.evaluation.rules]
    for name in scored if "evaluate" in config.stages else ():
        known = name in trained or (not fresh and folder.checkpoint(name).exists())
        if name in LEARNED and not known:
            raise UserError(
                f"--rules: {name} is not trained in this run; add it to --train-rules "
                "(with --stages meta), or leave it out"
            )


def check_text(run: Run) -> None:
    """Text and settings that a later stage would refuse are refused before the first.

    Raises:
        UserError: too few articles, none as long as M, or no weight of the name that adapts.
    """
    config = run.config
    run.training_text(0)
    run.validation_text(config.lm.validation_words)
    if "meta" not in config.stages:
        return
    longest = max(len(article) for article in run.training_text(1).articles)
    if longest < config.adapt.update_every:
        raise UserError(
            f"--update-every {config.adapt.update_every}: no held-out article is as long; the longest "
            f"has {longest} tokens. Use a smaller M, more text, or a larger --text.held-out"
        )
    shape = shape_of(config, run.data.vocabulary.size)
    choose_dynamic(shape.layout(), config.adapt.dynamic)


def clear(run: Run) -> None:
    """Remove what an earlier run left, so that no file of one model stands beside another's."""
    for file in run.folder.results():
        file.unlink()
    write_text(run.folder.metrics_file, "")
