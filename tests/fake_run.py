"""Run folders with made-up losses, for the tests of tables, curves and pages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlm.report.evaluation import evaluate_rows, merge_evaluation, read_evaluation, write_evaluation
from mlm.report.losses import LossTable, column_name, write_losses

RULES = ("static", "sgd", "rms", "two_levels", "three_levels")
STRENGTH = {"static": 0.0, "sgd": 0.25, "rms": 0.4, "two_levels": 0.45, "three_levels": 0.5}


def made_up_words(length: int, rng: np.random.Generator) -> list[str]:
    """A title line, a heading and sentences in WikiText's form, `length` words in all."""
    words = [*"=T=", "<eos>", "<eos>", *"==S==", "<eos>"]
    while len(words) < length:
        sentence = [f"word{int(i)}" for i in rng.zipf(1.5, 20) % 500]
        words += [*sentence, ",", "@-@", "<unk>", ".", "<eos>"]
    return words[:length]


def made_up_losses(
    articles: Sequence[Sequence[str]],
    *,
    split: str = "valid",
    titles: Sequence[str] | None = None,
    rules: Sequence[str] = RULES,
    protocols: Sequence[str] = ("article", "stream"),
    seed: int = 0,
) -> LossTable:
    """Losses in which every rule gains on words that occurred before in the article."""
    rng = np.random.default_rng(seed)
    flat = [word for words in articles for word in words]
    seen = []
    for words in articles:
        counts: Counter[str] = Counter()
        for word in words:
            seen.append(counts[word])
            counts[word] += 1
    repeats = np.log1p(np.array(seen))
    static = rng.gamma(2.0, 2.4, len(flat)) + 0.01
    losses = {}
    for protocol in protocols:
        for rule in rules:
            change = STRENGTH.get(rule, 0.3) * (repeats - 0.4) * rng.gamma(2, 0.4, len(flat))
            losses[column_name(rule, protocol)] = np.maximum(
                static - (change if rule != "static" else 0), 0.001
            ).astype(np.float32)
    lengths = [len(words) for words in articles]
    return LossTable(
        split=split,
        article_N=np.repeat(np.arange(len(articles)), lengths).astype(np.int32),
        position_N=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        word_N=np.array(flat, dtype=object),
        titles=dict(enumerate(titles or [f"Title {i}" for i in range(len(articles))])),
        losses=losses,
    )


def make_run(
    folder: Path,
    *,
    lengths: Sequence[int] = (900, 350, 1, 1300, 420, 240, 610, 800, 505, 333),
    splits: Sequence[str] = ("valid",),
    articles: Sequence[Sequence[str]] | None = None,
    titles: Sequence[str] | None = None,
    rules: Sequence[str] = RULES,
    protocols: Sequence[str] = ("article", "stream"),
    resamples: int = 199,
) -> Path:
    """Write `losses.parquet`, `evaluation.json`, `evaluation.md` and `metrics.jsonl`."""
    for seed, split in enumerate(splits):
        rng = np.random.default_rng(seed)
        texts = articles or [made_up_words(n, rng) for n in lengths]
        table = made_up_losses(
            texts, split=split, titles=titles, rules=rules, protocols=protocols, seed=seed
        )
        table = write_losses(folder / "losses.parquet", table)
        speed = {
            (rule, protocol): 1e4 / (1 + i)
            for i, rule in enumerate(rules)
            for protocol in protocols
        }
        rows = evaluate_rows(
            table,
            corpus="made-up",
            words_per_second=speed,
            settings={("rms", "article"): {"step_size": 1e-4, "decay": 2e-3, "segment": 20}},
            resamples=resamples,
        )
        write_evaluation(folder, merge_evaluation(read_evaluation(folder), rows))
    metrics = [
        {"stage": "lm", "step": 10 * i, "tokens": 1000 * i, "train_loss": 7 - 0.1 * i}
        | ({"valid_loss": 7.2 - 0.1 * i} if i % 5 == 0 else {})
        for i in range(30)
    ] + [
        {"stage": "meta", "rule": rule, "step": i, "gain_per_word": 0.1 + 0.001 * i}
        for rule in ("two_levels", "three_levels")
        for i in range(0, 40, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder
