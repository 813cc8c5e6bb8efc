"""The stages in order, each from what the one before left in the run folder."""

from __future__ import annotations

from mlm.kernels.switches import use_threads
from mlm.runs.rules import check_learned
from mlm.runs.run import Run, marks_of, open_run, threads_of
from mlm.settings.config import Config
from mlm.stages.checks import check_folder, check_plan, check_text, remove_results
from mlm.stages.evaluate import score_and_draw
from mlm.stages.fit import fitted, with_recorded_choices
from mlm.stages.language_model import stage_lm
from mlm.stages.meta import stage_meta
from mlm.stages.plan import TITLES, StagePlan, done_before
from mlm.store.lock import only_writer
from mlm.store.models import load_lm


def run_stages(config: Config, quiet: bool = False) -> Run:
    """Run the chosen stages in order; print the table, and where page and figures are."""
    run = open_run(config, quiet)
    if not run.folder.released:
        with only_writer(run.folder.path):
            return _run(run)
    return _run(run)


def _run(run: Run) -> Run:
    """What `run_stages` does, alone in the folder."""
    run = with_recorded_choices(run)
    check_folder(run)
    if {"lm", "meta"} & set(run.config.stages):
        check_text(run)
        check_plan(run)
    run, takes = fitted(run)
    config = run.config
    plan = StagePlan([*TITLES], config.stages, takes, done=done_before(run))
    plan.announce(run.folder.path)
    if "lm" not in config.stages:
        _check_models(run)
    elif not config.resume:
        remove_results(run)
    trained = "lm" not in config.stages
    if trained or not (config.resume and run.folder.checkpoint("lm_last").exists()):
        run.folder.save_config(config, None if trained else marks_of(run.data))
    if plan.begin("lm"):
        stage_lm(run)
    use_threads(threads_of(config, first=False))
    if plan.begin("meta"):
        stage_meta(run)
    score_and_draw(run, plan)
    return run


def _check_models(run: Run) -> None:
    """Load what the first stage needs: settings are recorded only once they are known to fit.

    Raises:
        UserError: missing or damaged weights, or made with other settings.
    """
    stages = run.config.stages
    if "meta" in stages:
        load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    elif "evaluate" in stages:
        check_learned(run)
