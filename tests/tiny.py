"""A tiny invented corpus in WikiText's form and settings that train on it in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm.report.evaluation import read_evaluation
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.flags import flag, leaves, replaced
from mlm.settings.sections import (
    AdaptConfig,
    EvaluationConfig,
    LMTrainingConfig,
    MetaConfig,
    ModelConfig,
    TextConfig,
)

SYLLABLES = ("ba", "do", "fe", "gi", "ku", "la", "mo", "ne", "pi", "ru", "sa", "ti", "vo", "zu")
COMMON = 40
"""Words that every article uses."""
OWN = 6
"""Words that only one article uses, half of its text: there is much to learn from reading it."""


def invented_words(number: int, rng: np.random.Generator) -> list[str]:
    """Different words of two to four syllables."""
    found: dict[str, None] = {}
    while len(found) < number:
        found["".join(rng.choice(SYLLABLES, size=rng.integers(2, 5)))] = None
    return list(found)


def article(title: str, own: Sequence[str], sentences: int, rng: np.random.Generator) -> str:
    """An article in WikiText's form: title, a heading, then sentences with `own` words."""
    common = invented_words(COMMON, np.random.default_rng(99))
    lines = []
    for _ in range(sentences):
        words = [str(rng.choice(own if rng.random() < 0.5 else common)) for _ in range(9)]
        lines.append(f" {' '.join(words)} , <unk> . \n")
    middle = len(lines) // 2
    head = f" \n = {title} = \n \n"
    return head + "".join(lines[:middle]) + " \n = = Part = = \n \n" + "".join(lines[middle:])


def corpus_text(articles: int, seed: int, sentences: int = 24) -> str:
    """Articles of different lengths, about `sentences` sentences of 13 words each."""
    rng = np.random.default_rng(seed)
    texts = []
    for k in range(articles):
        length = sentences * (2 + k % 3) // 3
        own = invented_words(OWN, rng)
        texts.append(article(f"{own[0].title()} {k}", own, length, rng))
    return "".join(texts)


def write_corpus(
    folder: Path,
    train: int = 12,
    valid: int = 4,
    test: int = 4,
    seed: int = 0,
    sentences: int = 24,
) -> Path:
    """Write `train.txt`, `valid.txt` and `test.txt` of so many articles; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, (split, number) in enumerate({"train": train, "valid": valid, "test": test}.items()):
        text = corpus_text(number, 10 * seed + k, sentences)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def tiny_config(corpus: Path, out: Path, **changes: Any) -> Config:
    """Settings that run all stages in seconds; `changes` as `lm__epochs=2.0`, `seed=1` or
    `extensions__boundaries__on=True`."""
    config = Config(
        corpus=str(corpus),
        out=out,
        device="cpu",
        text=TextConfig(vocabulary_size=330, held_out=0.3, data_dir=corpus.parent / "cache"),
        model=ModelConfig(embedding=16, hidden=16),
        lm=LMTrainingConfig(
            epochs=6.0, lanes=4, segment=16, learning_rate=0.02, validations=3, precision="float32"
        ),
        adapt=AdaptConfig(update_every=20, fisher_words=500),
        meta=MetaConfig(lanes=3, unroll=4, steps=3),
        evaluation=EvaluationConfig(lanes=3, budget=3, tune_words=200, resamples=49),
    )
    values = {name.replace("__", "."): value for name, value in changes.items()}
    return validate(replaced(config, values))


def as_flags(config: Config) -> list[str]:
    """The command line of `train.py` that means `config`."""
    usual, words = leaves(Config()), list[str]()
    for path, value in leaves(config).items():
        if value == usual[path]:
            continue
        name = flag(path)
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        else:
            words += [name, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def perplexities(folder: Path) -> dict[tuple[str, str], float]:
    """What a run's rules scored, by protocol and rule."""
    rows = read_evaluation(folder)
    return {(r["protocol"], r["rule"]): r["word_perplexity"] for r in rows if r["kind"] == "total"}
