"""The stages in order, each from what the one before left in the run folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.checkpoint import (
    RunFolder,
    check_vocabulary,
    load_lm,
    load_memory,
    load_tensors,
    save_memory,
    save_tensors,
)
from mlm.config import LEARNED, RULES, Config, to_dict
from mlm.errors import UserError
from mlm.files import write_text
from mlm.gates import LinearGates
from mlm.learner import RMS, SGD, Bound, Parameters
from mlm.lm import LMShape, initial_weights
from mlm.memory import LongTerm, choose_dynamic
from mlm.meta import MetaTrainer, estimate_fisher, static_of, train_meta, validation_gain
from mlm.scoring import Scores, check_finite, score_protocol, word_losses
from mlm.text import open_corpus
from mlm.tokens import Prepared, TokenFile, encode_split, prepare
from mlm.training import Text, shape_of, train_lm
from mlm.tuning import TuneText, tune
from mlm.vocabulary import Vocabulary, load_vocabulary


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def choose_device(wanted: str) -> torch.device:
    """The device to compute on.

    Raises:
        UserError: CUDA asked for and absent.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device. Use --device cpu")
    return torch.device(wanted)


def run_path(config: Config) -> Path:
    """The run folder: --out, or runs/<corpus>."""
    return config.out or Path("runs") / (Path(config.corpus).resolve().stem or "corpus")


def as_text(file: TokenFile, chosen: Sequence[int], eos: int, max_words: int = 0) -> Text:
    """Some articles of a token file; with `max_words` the first of them up to that many words.

    Raises:
        UserError: they hold not one token.
    """
    articles: list[np.ndarray] = []
    words = 0
    for a in chosen:
        if max_words and words >= max_words:
            break
        articles.append(file.tokens[file.offsets[a] : file.offsets[a + 1]])
        words += int(file.words[a])
    if not words:
        raise UserError(f"{file.path}: no article with a word in it; check the corpus")
    return Text(articles, words, eos)


def split_training(file: TokenFile, held_out: float) -> tuple[range, range]:
    """(articles for stage 1, held-out articles for stage 2): the last share is held out.

    Raises:
        UserError: fewer than two training articles.
    """
    number = len(file)
    if number < 2:
        raise UserError(
            f"the training split holds {number} article(s); at least 2 are needed, one of them "
            "held out for meta-training"
        )
    keep = min(number - 1, max(1, number - math.ceil(held_out * number)))
    return range(keep), range(keep, number)


@dataclass(frozen=True)
class Run:
    """A run folder with its settings, device and texts."""

    config: Config
    folder: RunFolder
    device: torch.device
    quiet: bool = False

    # -- texts ------------------------------------------------------------------------------

    @cached_property
    def data(self) -> Prepared:
        """Vocabulary and token files of training and validation text, built if need be."""
        text = self.config.text
        found = prepare(
            open_corpus(self.config.corpus),
            text.vocabulary,
            text.vocabulary_size,
            text.data_dir,
            splits=("train", "valid"),
            max_train_words=text.train_words,
            progress=not self.quiet,
        )
        if self.folder.vocabulary.exists() and "lm" not in self.config.stages:
            mine = load_vocabulary(self.folder.vocabulary)
            check_vocabulary(self.folder.path, {"vocabulary": mine.hash}, found.vocabulary.hash)
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the run's checkpoints."""
        if self.folder.vocabulary.exists():
            return load_vocabulary(self.folder.vocabulary)
        return self.data.vocabulary

    def training_text(self, part: int) -> Text:
        """Articles of stage 1 (part 0) or those held out for stage 2 (part 1)."""
        file = self.data.splits["train"]
        chosen = split_training(file, self.config.text.held_out)[part]
        return as_text(file, chosen, self.data.vocabulary.eos_id)

    def validation_text(self, max_words: int) -> Text:
        """The first articles of the validation split."""
        file = self.data.splits["valid"]
        return as_text(file, range(len(file)), self.data.vocabulary.eos_id, max_words)

    @cached_property
    def tune_text(self) -> TuneText:
        """What every rule's settings are judged on."""
        text = self.validation_text(self.config.evaluation.tune_words)
        return TuneText(text.articles, text.eos, self.config.evaluation.lanes)

    @cached_property
    def memory(self) -> LongTerm:
        """theta_0 and Fisher from the run folder.

        Raises:
            UserError: made for other dynamic weights or another M than the settings say.
        """
        path, adapt = self.folder.checkpoint("memory"), self.config.adapt
        memory = load_memory(path, self.vocabulary.hash).to(self.device)
        wanted = choose_dynamic(memory.weights, adapt.dynamic)
        if (memory.segment, memory.dynamic) != (adapt.segment, wanted):
            raise UserError(
                f"{path} was made for M = {memory.segment} and the weights "
                f"{', '.join(memory.dynamic)}, but the settings say M = {adapt.segment} and "
                f"{', '.join(wanted)}; run `--stages meta` again"
            )
        return memory


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


def identity(run: Run, *parts: Any) -> str:
    """Hash of what a stage-2 result depends on; a changed one is not reused."""
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text", "adapt", "meta", "evaluation", "seed")}
    for name in ("rules", "protocols", "split", "lanes", "max_articles", "resamples"):
        keys["evaluation"].pop(name)
    path = run.folder.checkpoint("lm")
    weights = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    return hashlib.sha256(json.dumps([keys, weights, *parts]).encode()).hexdigest()[:16]


def build_memory(run: Run) -> LongTerm:
    """theta_0 and its Fisher, estimated after stage 1 and kept in the run folder."""
    weights, shape, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    weights = {n: w.to(run.device) for n, w in weights.items()}
    adapt = run.config.adapt
    memory = estimate_fisher(
        weights,
        shape,
        choose_dynamic(weights, adapt.dynamic),
        run.training_text(1),
        adapt.segment,
        adapt.fisher_words,
        quiet=run.quiet,
    )
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
            identity(run),
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
            "identity": identity(run),
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
    rules = ("static", *(name for name in evaluation.rules if name != "static"))
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


def open_run(config: Config, quiet: bool = False) -> Run:
    """The run of these settings, nothing written yet."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return Run(config, RunFolder(run_path(config)), choose_device(config.device), quiet)


def run_stages(config: Config, quiet: bool = False) -> Run:
    """Run the chosen stages in order; print the table and the paths of the pictures."""
    run = open_run(config, quiet)
    _check_folder(run)
    if {"lm", "meta"} & set(config.stages):
        _check_text(run)
    if "lm" not in config.stages:
        _check_models(run)
    elif not config.resume:
        _clear(run)
    if not (config.resume and run.folder.checkpoint("lm_last").exists()):
        run.folder.save_config(config)
    if "lm" in config.stages:
        stage_lm(run)
    if "meta" in config.stages:
        stage_meta(run)
    if "evaluate" in config.stages:
        show(*stage_evaluate(run))
    if "draw" in config.stages:
        draw(run.folder.path, config.evaluation.split if "evaluate" in config.stages else None)
    return run


def _check_folder(run: Run) -> None:
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
    for name in config.evaluation.rules if "evaluate" in config.stages else ():
        known = name in trained or (not fresh and folder.checkpoint(name).exists())
        if name in LEARNED and not known:
            raise UserError(
                f"--evaluation.rules: {name} is not trained in this run; add it to --meta.rules "
                "(with --stages meta), or leave it out"
            )


def _check_text(run: Run) -> None:
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
    if longest < config.adapt.segment:
        raise UserError(
            f"--adapt.segment {config.adapt.segment}: no held-out article is as long; the longest "
            f"has {longest} tokens. Use a smaller M, more text, or a larger --text.held-out"
        )
    shape = shape_of(config, run.data.vocabulary.size)
    small = LMShape(
        len(shape.cutoffs) + 1, 1, 1, shape.layers, tuple(range(1, len(shape.cutoffs) + 1))
    )
    choose_dynamic(initial_weights(small, torch.Generator()), config.adapt.dynamic)


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


def _clear(run: Run) -> None:
    """Remove what an earlier run left, so that no file of one model stands beside another's."""
    for file in run.folder.results():
        file.unlink()
    write_text(run.folder.metrics_file, "")
