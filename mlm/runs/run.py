"""A run: its folder, settings, device and texts, and what must hold before a stage begins."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mlm.base.errors import UserError
from mlm.base.processes import cores_each, ranks
from mlm.base.terminal import say
from mlm.kernels.processor import multiplies_bfloat16
from mlm.kernels.switches import use, use_threads
from mlm.models.base import AdaptationBase, choose_dynamic, fold_low_rank
from mlm.models.low_rank import check_rank
from mlm.settings.config import Config
from mlm.settings.sections import AdaptConfig
from mlm.store.models import check_vocabulary, load_base
from mlm.store.run_folder import RunFolder
from mlm.text.corpora import open_corpus
from mlm.text.streams import Text
from mlm.text.tokens import Prepared, TokenFile, prepare
from mlm.text.vocabulary import Vocabulary, load_vocabulary
from mlm.training.language_model import resolve_precision
from mlm.training.tuning import TuneText


def choose_device(wanted: str) -> torch.device:
    """The device to compute on; a CUDA device is told to compute as the CPU does.

    Raises:
        UserError: CUDA asked for and absent.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device. Use --device cpu")
    if wanted == "cuda":
        # Else cuDNN's LSTM, by default, rounds float32 factors to 10 bits of mantissa.
        torch.backends.cudnn.allow_tf32 = False
        # Weights are values here, not a module's: it has no memory of its own to lay them out in.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
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
    words, spelling = 0, 0.0
    for a in chosen:
        if max_words and words >= max_words:
            break
        articles.append(file.tokens[file.offsets[a] : file.offsets[a + 1]])
        words += int(file.words[a])
        spelling += float(file.unknown_in(a).nats().sum())
    if not words:
        raise UserError(f"{file.path}: no article with a word in it; check the corpus")
    return Text(articles, words, eos, spelling)


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
    results: Path | None = None
    """Where scores go; None = the run folder."""

    @property
    def fresh(self) -> bool:
        """Whether nothing of what the folder holds is kept."""
        return "lm" in self.config.stages and not self.config.resume

    @property
    def begun(self) -> bool:
        """Whether what the folder holds is trained on, or read with."""
        last = self.folder.checkpoint("lm_last")
        return not self.fresh and ("lm" not in self.config.stages or last.exists())

    def with_config(self, config: Config) -> Run:
        """The same run with other settings of how it is computed; its texts stay open."""
        found = dataclasses.replace(self, config=config)
        if "data" in vars(self):
            vars(found)["data"] = self.data
        return found

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
        if self.folder.vocabulary.exists() and self.begun:
            mine = load_vocabulary(self.folder.vocabulary)
            check_vocabulary(self.folder.path, {"vocabulary": mine.hash}, found.vocabulary.hash)
        marks, recorded = marks_of(found), self.folder.text if self.begun else {}
        other = [name for name, mark in recorded.items() if marks.get(name, mark) != mark]
        if other:
            raise UserError(
                f"{self.folder.path} was trained with another text than {self.config.corpus} is "
                f"now ({', '.join(other)}). Name the text it was trained with (--corpus), wherever "
                "it lies now, or train again with another --out"
            )
        return found

    @cached_property
    def text_marks(self) -> dict[str, str]:
        """Hashes of the vocabulary and of the splits: those recorded, for the text may be gone."""
        recorded = self.folder.text if self.begun else {}
        if self.folder.released:  # what it was trained with is no part of it
            return {"train": "", "valid": "", "vocabulary": self.vocabulary.hash, **recorded}
        return recorded or marks_of(self.data)

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
        text = as_text(file, chosen, self.data.vocabulary.eos_id)
        return dataclasses.replace(text, noise=self.data.vocabulary.noise)

    def validation_text(self, max_words: int) -> Text:
        """The first articles of the validation split."""
        file = self.data.splits["valid"]
        return as_text(file, range(len(file)), self.data.vocabulary.eos_id, max_words)

    @cached_property
    def judged_text(self) -> Text:
        """The beginning of the validation split that rules and their settings are judged on."""
        return self.validation_text(self.config.evaluation.tune_words)

    @cached_property
    def tune_text(self) -> TuneText:
        """`judged_text` as tuning reads it."""
        text = self.judged_text
        return TuneText(text.articles, text.eos, self.config.evaluation.lanes)

    @cached_property
    def base(self) -> AdaptationBase:
        """The adaptation base from the run folder, as this run reads with it.

        Raises:
            UserError: see `stored_base`.
        """
        return self.ready(self.stored_base)

    @cached_property
    def stored_base(self) -> AdaptationBase:
        """The adaptation base as the run folder holds it: without what follows from settings.

        Raises:
            UserError: made for other dynamic weights, extensions, M or rank than the settings say.
        """
        path, adapt = self.folder.checkpoint("memory"), self.config.adapt
        made_with = [extension.name for extension in self.config.extensions.of_base()]
        base = load_base(path, self.vocabulary.hash, made_with).to(self.device)
        wanted = choose_dynamic(base.weights, adapt.dynamic)
        if (base.segment, base.dynamic) != (adapt.update_every, wanted):
            raise UserError(
                f"{path} was made for M = {base.segment} and the weights "
                f"{', '.join(base.dynamic)}, but the settings say M = {adapt.update_every} and "
                f"{', '.join(wanted)}; run `--stages meta` again"
            )
        check_rank(path, base.weights, adapt.rank)
        return base

    def ready(self, base: AdaptationBase) -> AdaptationBase:
        """A long-term memory as this run reads with it: guarded, and in its fastest form."""
        base = self.folded(base.guarded(self.config.adapt.guard, self.vocabulary.size))
        extensions = self.config.extensions.active(base.weights)
        return dataclasses.replace(base, extensions=extensions).derived()

    def folded(self, base: AdaptationBase) -> AdaptationBase:
        """A base in its fastest form."""
        # What else is learned, or was, is stored in terms of the plain form.
        return fold_low_rank(base) if set(self.config.meta.learn) <= {"rule"} else base


def marks_of(data: Prepared) -> dict[str, str]:
    """Hashes of the content of the vocabulary and of the splits."""
    splits = {name: file.source_hash for name, file in data.splits.items()}
    return {"vocabulary": data.vocabulary.hash, **splits}


def open_run(config: Config, quiet: bool = False) -> Run:
    """The run of these settings, nothing written yet; threads as its first stage wants them.

    Raises:
        UserError: the device is absent, or cannot train in the precision of stage 1.
    """
    device = choose_device(config.device)
    if "lm" in config.stages:
        resolve_precision(config.lm.precision, device)
    lower = in_bfloat16(config.adapt)
    use(kernels=config.adapt.kernels == "auto", bfloat16=lower)
    if config.adapt.precision == "bfloat16" and not lower and device.type == "cpu":
        say(
            "--adapt.precision bfloat16: this processor is faster in float32, which is used instead"
        )
    use_threads(threads_of(config, first="lm" in config.stages))
    return Run(config, RunFolder(run_path(config)), device, quiet)


def in_bfloat16(adapt: AdaptConfig) -> bool:
    """Whether lanes' products have bfloat16 factors: asked for, and the processor is fast at it."""
    return adapt.precision == "bfloat16" and multiplies_bfloat16()


MANY_UNITS = 256
"""Models of fewer units are faster on one thread, except in stage 1 with its many lanes."""


def threads_of(config: Config, first: bool) -> int:
    """CPU threads of stage 1 (`first`) or of the stages after it; 0 = PyTorch's choice.

    Several processes share the cores of their machine: torchrun would leave one to each.
    """
    few = max(config.model.embedding, config.model.hidden) < MANY_UNITS
    many = cores_each() if ranks().world > 1 else 0
    return config.threads or (1 if few and not first else many)
