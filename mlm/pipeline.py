"""The stages in order, each from what the one before left in the run folder."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mlm.checkpoint import (
    load_lm,
    load_tensors,
    save_memory,
    save_tensors,
)
from mlm.config import LEARNED, RULES, AdaptConfig, Config, to_dict
from mlm.errors import UserError
from mlm.files import write_text
from mlm.gates import LinearGates
from mlm.learner import RMS, SGD, Bound, Parameters
from mlm.lm import LMShape, Weights
from mlm.lowrank import add_low_rank
from mlm.memory import LongTerm, choose_dynamic, has_low_rank
from mlm.meta import MetaTrainer, estimate_fisher, static_of, train_meta, validation_gain
from mlm.run import Run, check_folder, check_text, clear, open_run, say, use_threads
from mlm.scoring import Scores, check_finite, score_protocol, word_losses
from mlm.text import open_corpus
from mlm.tokens import TokenFile, encode_split
from mlm.training import Text, shape_of, train_lm
from mlm.tuning import tune

# -- stages ---------------------------------------------------------------------------------


def stage_lm(run: Run) -> None:
    """Stage 1: the static language model."""
    vocabulary = run.data.vocabulary
    shape = shape_of(run.config, vocabulary.size)
    text = run.training_text(0)
    valid = run.validation_text(run.config.lm.validation_words)
    if not (run.config.resume and run.folder.checkpoint("lm_last").exists()):
        vocabulary.save(run.folder.vocabulary)
    say(
        f"stage 1: {text.words:,} words ({text.tokens:,} tokens) in {len(text.articles)} articles, "
        f"vocabulary {vocabulary.size:,}"
    )
    train_lm(run.config, shape, text, valid, run.folder, vocabulary.hash, run.device, run.quiet)


def identity(run: Run) -> str:
    """Hash of what a stage-2 result depends on; a changed one is not reused."""
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text", "adapt", "meta", "evaluation", "seed")}
    for name in ("rules", "protocols", "split", "lanes", "max_articles", "resamples"):
        keys["evaluation"].pop(name)
    for part, name in (("adapt", "threads"), ("adapt", "kernels"), ("meta", "gradient")):
        keys[part].pop(name)  # how it is computed; results agree to rounding
    if not has_low_rank(run.config.adapt.dynamic):
        keys["adapt"].pop("rank")
    path = run.folder.checkpoint("lm")
    weights = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    return hashlib.sha256(json.dumps([keys, weights]).encode()).hexdigest()[:16]


def new_memory(
    weights: Weights, shape: LMShape, adapt: AdaptConfig, text: Text, quiet: bool = True
) -> LongTerm:
    """theta_0 with the low-rank changes that are asked for, and its Fisher, from held-out text."""
    dynamic = choose_dynamic(weights, adapt.dynamic)
    weights = add_low_rank(weights, shape, dynamic, adapt.rank, text, adapt.fisher_words)
    return estimate_fisher(
        weights, shape, dynamic, text, adapt.segment, adapt.fisher_words, quiet=quiet
    )


def build_memory(run: Run) -> LongTerm:
    """theta_0 and its Fisher, estimated after stage 1 and kept in the run folder."""
    weights, shape, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    weights = {n: w.to(run.device) for n, w in weights.items()}
    memory = new_memory(weights, shape, run.config.adapt, run.training_text(1), run.quiet)
    save_memory(run.folder.checkpoint("memory"), memory, run.data.vocabulary.hash)
    return memory


def tuned_settings(run: Run, memory: LongTerm, rule: SGD | RMS, protocol: str) -> dict[str, float]:
    """The best settings of a hand-made rule on validation; remembered in tuning.json."""
    path = run.folder.path / "tuning.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not tuned yet, or damaged: tune again
        known = {}
    key, mark = f"{rule.name}/{protocol}", identity(run)
    if known.get(key, {}).get("identity") == mark:
        return known[key]["setting"]
    budget = run.config.evaluation.budget
    say(f"tuning {rule.name} on validation, protocol {protocol}: {budget} settings")
    trials = tune(memory, rule, run.tune_text, protocol, budget)
    known[key] = {
        "identity": mark,
        "setting": trials[0].setting,
        "trials": [{**t.setting, "nll": t.nll if math.isfinite(t.nll) else None} for t in trials],
    }
    write_text(path, json.dumps(known, indent=1) + "\n")
    return trials[0].setting


def gates_rule(run: Run, name: str) -> LinearGates:
    """The meta-learner of this name: with FLUSH (three_levels) or without."""
    meta = run.config.meta
    return LinearGates(name, name == "three_levels", meta.features, meta.per_tensor, meta.free_copy)


def stage_meta(run: Run) -> None:
    """Stage 2: Fisher, a tuned starting point, then the meta-learner."""
    memory = build_memory(run)
    meta = run.config.meta
    start_rule = RMS() if meta.start == "rms" else SGD()
    start = tuned_settings(run, memory, start_rule, "article")
    text, tune_text = run.training_text(1), run.tune_text
    static = static_of(memory, tune_text, run.config.evaluation.protocols)
    mark = identity(run)
    for name in meta.rules:
        rule = gates_rule(run, name)
        first: Parameters
        if meta.start == "rms":
            first = rule.start_at_rms(memory, start["rate"], start["decay"])
        else:
            first = rule.start_at_sgd(memory, start["rate"])
        trainer = MetaTrainer(memory, rule, first, text, meta, run.config.seed)
        best, gain = train_meta(
            trainer,
            lambda p, rule=rule: validation_gain(memory, rule, p, tune_text, static),
            run.folder,
            run.config.evaluation.budget,
            text.tokens_per_word,
            mark,
            run.config.resume,
            run.quiet,
        )
        about = {
            "rule": {
                "flush": rule.flush,
                "features": list(rule.features),
                "per_tensor": rule.per_tensor,
                "free_copy": rule.free_copy,
            },
            "dynamic": list(memory.dynamic),
            "columns": list(rule.columns),
            "gain": gain,
            "identity": mark,
        }
        save_tensors(run.folder.checkpoint(name), best, about)
        say(f"{name}: {gain * text.tokens_per_word:.3f} nats per word gained on validation")


def load_gates(run: Run, name: str, memory: LongTerm) -> tuple[LinearGates, Parameters]:
    """A trained meta-learner from the run folder.

    Raises:
        UserError: missing, or trained for other dynamic weights.
    """
    path = run.folder.checkpoint(name)
    tensors, about = load_tensors(path, "train the meta-learner first (`--stages meta`)")
    if tuple(about["dynamic"]) != memory.dynamic:
        raise UserError(
            f"{path} was trained for the weights {', '.join(about['dynamic'])}, but those that "
            f"adapt now are {', '.join(memory.dynamic)}; run `--stages meta` again"
        )
    settings = {**about["rule"], "features": tuple(about["rule"]["features"])}
    parameters: dict[str, Tensor] = {n: t.to(run.device) for n, t in tensors.items()}
    return LinearGates(name, **settings), parameters


def _load_learned(run: Run) -> None:
    """Load the memory and every meta-learner to score: what is amiss shows now, not hours later.

    Raises:
        UserError: see `Run.memory` and `load_gates`.
    """
    memory = run.memory
    for name in set(run.config.evaluation.rules) & set(LEARNED):
        load_gates(run, name, memory)


def bound_rule(
    run: Run, memory: LongTerm, name: str, protocol: str
) -> tuple[Bound | None, dict[str, Any]]:
    """(the rule ready to read, its settings for the table); None = static."""
    if name == "static":
        return None, {}
    if name in ("sgd", "rms"):
        rule = SGD() if name == "sgd" else RMS()
        setting = tuned_settings(run, memory, rule, protocol)
        like = next(iter(memory.rms.values()))
        return rule.bind({k: like.new_tensor(v) for k, v in setting.items()}, memory), setting
    rule, parameters = load_gates(run, name, memory)
    count = sum(p.numel() for p in parameters.values())
    return rule.bind(parameters, memory), {
        "parameters": count,
        "features": ", ".join(rule.features),
    }


def _evaluation_file(run: Run, corpus: str) -> TokenFile:
    """The split to score, encoded with the run's own vocabulary."""
    evaluation, cache = run.config.evaluation, run.config.text.data_dir
    source = open_corpus(corpus)
    return encode_split(source, evaluation.split, run.vocabulary, cache, progress=not run.quiet)


def stage_evaluate(run: Run, corpus: str | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Score every rule in every protocol on a split; write tables and word losses.

    Another corpus than the run's own gets a folder of its own inside the run folder.

    Returns:
        where the results are, and all rows of its evaluation.json.
    """
    from mlm.losses import LossTable, column_name, write_losses
    from mlm.report import evaluate_rows, merge_evaluation, read_evaluation, write_evaluation

    evaluation = run.config.evaluation
    folder = run.folder.path
    if corpus and corpus != run.config.corpus:
        folder = folder / f"on-{open_corpus(corpus).name}"
    corpus = corpus or run.config.corpus
    existing = read_evaluation(folder)
    file = _evaluation_file(run, corpus)
    memory, vocabulary = run.memory, run.vocabulary
    _load_learned(run)
    number = min(len(file), evaluation.max_articles or len(file))
    chosen = [a for a in range(number) if file.words[a] > 0]
    if not chosen:
        raise UserError(f"{corpus}, split {evaluation.split}: no article with a word in it")
    articles = [np.asarray(file.article(a), dtype=np.int64) for a in chosen]
    titles = [file.titles[a] for a in chosen]
    words = int(sum(file.words[a] for a in chosen))
    rules = [r for r in RULES if r in {"static", *evaluation.rules}]
    columns: dict[str, np.ndarray] = {}
    speed, settings = {}, {}
    for protocol in evaluation.protocols:
        for name in rules:
            rule, setting = bound_rule(run, memory, name, protocol)
            title = None if run.quiet else f"{evaluation.split}, {protocol}, {name}"
            scores: Scores = score_protocol(
                memory, rule, articles, vocabulary.eos_id, protocol, evaluation.lanes, title
            )
            check_finite(scores, name, protocol, titles)
            parts = [
                word_losses(nll, tokens, vocabulary.starts_word)
                for nll, tokens in zip(scores.nll, articles, strict=True)
            ]
            columns[column_name(name, protocol)] = np.concatenate(parts)
            speed[name, protocol] = words / scores.seconds
            settings[name, protocol] = setting
    table = LossTable(
        split=evaluation.split,
        article_N=np.repeat(chosen, [int(file.words[a]) for a in chosen]).astype(np.int32),
        position_N=np.concatenate([np.arange(file.words[a]) for a in chosen]).astype(np.int32),
        word_N=np.array([w for a in articles for w in vocabulary.words(a)], dtype=object),
        titles=dict(zip(chosen, titles, strict=True)),
        losses=columns,
    )
    write_losses(folder / "losses.parquet", table)
    rows = evaluate_rows(
        table,
        corpus=Path(corpus).name,
        words_per_second=speed,
        settings=settings,
        bytes_A=[int(file.bytes[a]) for a in chosen],
        resamples=evaluation.resamples,
        seed=run.config.seed,
    )
    rows = merge_evaluation(existing, rows)
    write_evaluation(folder, rows)
    return folder, rows


def show(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Print the table of totals."""
    from mlm.report import format_totals

    print(format_totals(rows), flush=True)
    print(f"\ntables: {folder / 'evaluation.md'}", flush=True)


def draw(folder: Path, split: str | None = None) -> None:
    """Draw the pictures of a folder with results; print their paths."""
    from mlm.plots import draw_all

    print("pictures:", *draw_all(folder, split), sep="\n  ", flush=True)


def evaluate_run(config: Config, corpus: str | None, pictures: bool) -> None:
    """What `evaluate.py` does: score, print, draw."""
    run = open_run(config)
    folder, rows = stage_evaluate(run, corpus)
    show(folder, rows)
    if pictures:
        draw(folder, config.evaluation.split)


def run_stages(config: Config, quiet: bool = False) -> Run:
    """Run the chosen stages in order; print the table and the paths of the pictures."""
    run = open_run(config, quiet)
    check_folder(run)
    if {"lm", "meta"} & set(config.stages):
        check_text(run)
    if "lm" not in config.stages:
        _check_models(run)
    elif not config.resume:
        clear(run)
    if not (config.resume and run.folder.checkpoint("lm_last").exists()):
        run.folder.save_config(config)
    if "lm" in config.stages:
        stage_lm(run)
    use_threads(config.adapt.threads)
    if "meta" in config.stages:
        stage_meta(run)
    if "evaluate" in config.stages:
        show(*stage_evaluate(run))
    if "draw" in config.stages:
        draw(run.folder.path, config.evaluation.split if "evaluate" in config.stages else None)
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
        _load_learned(run)
