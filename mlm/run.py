"""A run: its folder, settings, device and texts, and what must hold before a stage begins."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mlm.checkpoint import RunFolder, check_vocabulary, load_memory
from mlm.config import CACHE, LEARNED, AdaptConfig, Config
from mlm.errors import UserError
from mlm.files import write_text
from mlm.half import use_half
from mlm.kernels import use_kernels
from mlm.lowrank import check_rank, turned
from mlm.memory import BASIS, RELATED, LongTerm, choose_dynamic
from mlm.phrases import of_corpus, phrases
from mlm.processor import multiplies_bfloat16
from mlm.related import no_basis
from mlm.text import open_corpus
from mlm.tokens import Prepared, TokenFile, prepare
from mlm.training import Text, resolve_precision, shape_of
from mlm.tuning import TuneText
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
            UserError: made for other dynamic weights, another M or rank than the settings say.
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
        check_rank(path, memory.weights, adapt.rank)
        found = {
            "--adapt.related": (RELATED in memory.weights, adapt.related > 0),
            "--adapt.borders": (memory.borders is not None, adapt.borders),
        }
        for flag, (made, wanted) in found.items():
            if made != wanted:
                raise UserError(
                    f"{path} was made with{'' if made else 'out'} {flag}, but the settings say "
                    "otherwise; run `--stages meta` again"
                )
        return self.ready(memory)

    def ready(self, memory: LongTerm) -> LongTerm:
        """A long-term memory as this run reads with it: guarded, and in its fastest form."""
        memory = guarded(memory, self.config.adapt, self.vocabulary.size)
        # What else is learned, or was, is stored in terms of the plain form.
        if set(self.config.meta.learn) <= {"rule"}:
            memory = turned(memory)
        if self.config.adapt.at_once and "softmax" + BASIS not in memory.weights:
            raise no_basis("--adapt.at-once")
        adapt = self.config.adapt
        own = of_corpus(memory.weights)
        if adapt.phrases:
            own = phrases(memory.weights["embedding"], adapt.phrases, own and own.ngrams)
        return dataclasses.replace(
            memory, at_once=adapt.at_once, surprise=adapt.surprise, phrases=own
        )


def guarded(memory: LongTerm, adapt: AdaptConfig, vocabulary_size: int) -> LongTerm:
    """The memory with the loss above which a lane starts afresh (--adapt.guard)."""
    limit = adapt.guard * math.log(vocabulary_size) if adapt.guard else math.inf
    return dataclasses.replace(memory, limit=limit)


def open_run(config: Config, quiet: bool = False) -> Run:
    """The run of these settings, nothing written yet; threads as its first stage wants them.

    Raises:
        UserError: the device is absent, or cannot train in the precision of stage 1.
    """
    device = choose_device(config.device)
    if "lm" in config.stages:
        resolve_precision(config.lm.precision, device)
    use_kernels(config.adapt.kernels == "auto")
    lower = in_half(config.adapt)
    use_half(lower)
    if config.adapt.precision == "bfloat16" and not lower and device.type == "cpu":
        say(
            "--adapt.precision bfloat16: this processor is faster in float32, which is used instead"
        )
    use_threads(config.threads if "lm" in config.stages else config.adapt.threads or config.threads)
    return Run(config, RunFolder(run_path(config)), device, quiet)


def in_half(adapt: AdaptConfig) -> bool:
    """Whether lanes' products have bfloat16 factors: asked for, and the processor is fast at it."""
    return adapt.precision == "bfloat16" and multiplies_bfloat16()


def use_threads(number: int) -> None:
    """Let PyTorch use so many CPU threads; 0 changes nothing."""
    if number:
        torch.set_num_threads(number)


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
                f"--evaluation.rules: {name} is not trained in this run; add it to --meta.rules "
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
    if longest < config.adapt.segment:
        raise UserError(
            f"--adapt.segment {config.adapt.segment}: no held-out article is as long; the longest "
            f"has {longest} tokens. Use a smaller M, more text, or a larger --text.held-out"
        )
    shape = shape_of(config, run.data.vocabulary.size)
    choose_dynamic(shape.layout(), config.adapt.dynamic)


def clear(run: Run) -> None:
    """Remove what an earlier run left, so that no file of one model stands beside another's."""
    for file in run.folder.results():
        file.unlink()
    write_text(run.folder.metrics_file, "")
