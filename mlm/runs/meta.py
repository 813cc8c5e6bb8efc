"""Stage 2: long-term memory, tuned and learned rules; made, kept in the run folder, loaded.

Letters: A articles.
"""

from __future__ import annotations

import dataclasses

from mlm.extensions.phrases import ReadOut
from mlm.extensions.read_out import as_tensors, learn_read_out, read_out_of, with_read_out
from mlm.rules.family import (
    describe,
)
from mlm.rules.protocol import Parameters
from mlm.runs.base import build_base
from mlm.runs.identity import identity
from mlm.runs.rules import _parted, new_rule, seen_by, starting_point
from mlm.runs.run import Run, say
from mlm.store.tensors import save_tensors
from mlm.text.streams import Text
from mlm.training.judge import static_of, validation_gain
from mlm.training.meta import READ_OUT_GAIN, MetaTrainer, train_meta


def meta_text(run: Run) -> Text:
    """The training articles that --meta.text names."""
    wanted = run.config.meta.text
    if wanted != "all":
        return run.training_text(1 if wanted == "held_out" else 0)
    parts = [run.training_text(part) for part in (0, 1)]
    articles = [article for part in parts for article in part.articles]
    return Text(articles, sum(part.words for part in parts), parts[0].eos)


def stage_meta(run: Run) -> None:
    """Stage 2: Fisher, a tuned starting point, then the meta-learner."""
    base, meta = build_base(run), run.config.meta
    text, tune_text = meta_text(run), run.tune_text
    static = static_of(base, tune_text, run.config.evaluation.protocols)
    mark = identity(run)
    for name in meta.rules:
        start = starting_point(run, base)
        rule, first = new_rule(meta, name, start)
        own = dataclasses.replace(
            start.base,
            borders=base.borders,  # what a hand-made start does not see
            at_once=base.at_once,
            surprise=base.surprise,
            phrases=base.phrases,
        )
        own = with_read_out(seen_by(rule, own), read_out_of(start.base))
        trainer = MetaTrainer(own, rule, first, text, meta, run.config.seed)
        best, gain = train_meta(
            trainer,
            lambda t: validation_gain(t.base, t.rule, t.parameters, tune_text, static),
            run.folder,
            run.config.evaluation.budget,
            text.tokens_per_word,
            mark,
            run.config.resume,
            run.quiet,
        )
        about = {
            "rule": describe(rule),
            "dynamic": list(base.dynamic),
            "columns": list(rule.columns),
            "gain": gain,
            "identity": mark,
        }
        read_out = read_out_of(own)
        if meta.read_out_words:
            found, gained = _read_out(run, trainer, best, text, static)
            if gained > gain:
                read_out, gain = found, gained
                about["gain"] = gain
        save_tensors(run.folder.checkpoint(name), {**best, **as_tensors(read_out)}, about)
        say(f"{name}: {gain * text.tokens_per_word:.3f} nats per word gained on validation")
        if trainer.flushed:
            say(f"{name}: the guard reset a lane {trainer.flushed} times during training")


def _read_out(
    run: Run, trainer: MetaTrainer, best: Parameters, text: Text, static: dict[str, float]
) -> tuple[ReadOut, float]:
    """What the best rule learns of how to read phrases out, and its gain on validation with it."""
    parameters, own = _parted(best)
    base = dataclasses.replace(trainer.base, weights={**trainer.base.weights, **own})
    rule, meta = trainer.rule, run.config.meta
    bound = rule.bind(parameters, base)
    seed = run.config.seed + 4
    found = learn_read_out(base, bound, text, meta.read_out_words, seed, run.quiet)
    able = with_read_out(base, found)
    gained = validation_gain(able, rule, parameters, run.tune_text, static)
    row = {READ_OUT_GAIN: gained * text.tokens_per_word}
    run.folder.log(stage="meta", rule=rule.name, step=trainer.step, **row)
    return found, gained
