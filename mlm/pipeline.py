"""The stages in order, each from what the one before left in the run folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlm.config import Config
from mlm.errors import UserError
from mlm.tokens import TokenFile
from mlm.training import Text


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
    return config.out or Path("runs") / (Path(config.corpus).name or "corpus")


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
