"""Stage 2: long-term memory, tuned and learned rules; made, kept in the run folder, loaded.

Letters: A articles.
"""

from __future__ import annotations

import dataclasses
import hashlib

from mlm.base.names import rule_label
from mlm.base.progress import Progress
from mlm.base.terminal import detail, note
from mlm.models.language_model import Weights
from mlm.rules.family import (
    describe,
)
from mlm.rules.protocol import Parameters
from mlm.runs.base import build_base, made_from, progress_of
from mlm.runs.identity import checkpoint_mark, identity
from mlm.runs.rules import BESIDE, new_rule, parted, starting_point
from mlm.runs.run import Run
from mlm.store.tensors import load_about, save_tensors
from mlm.text.streams import Text
from mlm.training.judge import static_of, validation_gain
from mlm.training.meta import EXTENSION_GAIN, MetaTrainer, train_meta


def meta_text(run: Run) -> Text:
    """The training articles that --meta.text names."""
    wanted = run.config.meta.text
    if wanted != "all":
        return run.training_text(1 if wanted == "held_out" else 0)
    parts = [run.training_text(part) for part in (0, 1)]
    articles = [article for part in parts for article in part.articles]
    words, spelling = sum(p.words for p in parts), sum(p.spelling for p in parts)
    return Text(articles, words, parts[0].eos, spelling)


def stage_meta(run: Run) -> None:
    """Stage 2: Fisher, a tuned starting point, then the meta-learner.

    With --resume, rules that are trained stay as they are.
    """
    base, meta = build_base(run), run.config.meta
    text, tune_text, judged = meta_text(run), run.tune_text, run.judged_text
    static = static_of(base, tune_text, run.config.evaluation.protocols)
    mark = identity(run)
    made_with = checkpoint_mark(run.folder, "memory")
    folder = dataclasses.replace(run.folder, mark=mark)
    _forget_rules_of_another_base(run, made_with)
    for name in meta.rules:
        path, label = run.folder.checkpoint(name), rule_label(name)
        if run.config.resume and made_from(path, mark):
            progress_of(run, name, "").forget()
            detail(f"{label}: trained before")
            continue
        start = starting_point(run, base)
        rule, first = new_rule(meta, name, start)
        # a hand-made start does not see every extension, a trained one may have learned for more
        extensions = run.config.extensions.active(start.base.weights)
        own = dataclasses.replace(start.base, extensions=extensions).derived().for_rule(rule)
        trainer = MetaTrainer(own, rule, first, text, meta, run.config.seed)
        best, gain = train_meta(
            trainer,
            lambda t: validation_gain(t.base, t.rule, t.parameters, tune_text, static),
            folder,
            run.config.evaluation.budget,
            text,
            judged.tokens_per_word,
            mark,
            run.config.resume,
            run.quiet,
            run.config.checkpoint_minutes,
        )
        about = {
            "rule": describe(rule),
            "dynamic": list(base.dynamic),
            "columns": list(rule.columns),
            "identity": mark,
            "base": made_with,
        }
        progress = progress_of(run, name, f"{mark} {_digest(best)}")
        learned, gain = _learned_by_extensions(run, trainer, best, text, static, gain, progress)
        kept = {n: w for n, w in own.weights.items() if n not in base.weights} | learned
        tensors = best | {BESIDE + n: w for n, w in kept.items()}
        save_tensors(path, tensors, {**about, "gain": gain})
        progress.forget()
        gained = f"{gain * judged.tokens_per_word:.3f} nats per word gained"
        mean = ", mean of both protocols" if len(static) > 1 else ""
        detail(f"{label}: {gained} on {judged.words:,} words{mean}")
        if trainer.flushed:
            detail(f"{label}: the guard reset a lane {trainer.flushed} times during training")


def _digest(tensors: Parameters) -> str:
    """Hash of a rule's parameters, for what is learned with them."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _forget_rules_of_another_base(run: Run, made_with: str) -> None:
    """Drop the training rows of rules that were trained with another base, which is gone."""
    stale = set()
    for rule in {row.get("rule") for row in run.folder.rows() if row["stage"] == "meta"}:
        path = run.folder.checkpoint(str(rule))
        if rule in run.config.meta.rules or not path.exists():
            continue
        if load_about(path, "").get("base") != made_with:
            stale.add(rule)
    if stale:
        names = ", ".join(rule_label(str(rule)) for rule in sorted(map(str, stale)))
        file = run.folder.metrics_file
        note(f"{names}: trained with other settings; the rows in {file} are dropped")
        run.folder.keep_rows(lambda row: row.get("rule") not in stale)


def _learned_by_extensions(
    run: Run,
    trainer: MetaTrainer,
    best: Parameters,
    text: Text,
    static: dict[str, float],
    gain: float,
    progress: Progress,
) -> tuple[Weights, float]:
    """What extensions learn with the best rule, where it gains on validation, and the gain then."""
    parameters, own = parted(best)
    base, rule = trainer.base.with_weights(own), trainer.rule
    bound = rule.bind(parameters, base)  # which weights of extensions do not change
    kept: Weights = {}
    for extension in base.extensions:
        how = (run.config.seed + 4, run.quiet, progress)
        found = extension.after_rule(base, bound, text, *how)
        if not found:
            continue
        able = base.with_weights(found)
        gained = validation_gain(able, rule, parameters, run.tune_text, static)
        per_word = gained * run.judged_text.tokens_per_word
        row = {"extension": extension.name, EXTENSION_GAIN: per_word}
        folder = dataclasses.replace(run.folder, mark=identity(run))
        folder.log(stage="meta", rule=rule.name, step=trainer.step, **row)
        if gained > gain:
            base, gain, kept = able, gained, kept | found
    return kept, gain
