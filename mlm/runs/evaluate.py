"""runs.evaluate"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm.base.errors import UserError
from mlm.base.names import CACHE
from mlm.reading.scoring import Scores, check_finite, score_protocol, word_losses
from mlm.runs.rules import check_learned, ready_rule
from mlm.runs.run import Run, open_run, say
from mlm.settings.config import Config
from mlm.text.corpora import open_corpus
from mlm.text.tokens import TokenFile, encode_split


def _evaluation_file(run: Run, corpus: str) -> TokenFile:
    """The split to score, encoded with the run's own vocabulary."""
    evaluation, cache = run.config.evaluation, run.config.text.data_dir
    source = open_corpus(corpus)
    return encode_split(source, evaluation.split, run.vocabulary, cache, progress=not run.quiet)


def _resets(scores: Scores, name: str, protocol: str, titles: list[str]) -> dict[str, int]:
    """Report what the guard did: to the person at the terminal, and for the table."""
    if not scores.flushes:
        return {}
    article, token = min(scores.flushes)
    say(
        f"{name}, protocol {protocol}: the guard reset the weights {len(scores.flushes)} times, "
        f"first at token {token} of {titles[article]!r}"
    )
    return {"guard resets": len(scores.flushes)}


def _passes(rules: Sequence[str]) -> list[list[str]]:
    """The rules that one reading serves: a rule, and the same with a cache on top."""
    found: dict[str, list[str]] = {}
    for name in sorted(rules, key=lambda name: name.endswith(CACHE)):
        found.setdefault(name.removesuffix(CACHE), []).append(name)
    return list(found.values())


def stage_evaluate(run: Run, corpus: str | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Score every rule in every protocol on a split; write tables and word losses.

    Another corpus than the run's own gets a folder of its own inside the run folder.

    Returns:
        where the results are, and all rows of its evaluation.json.
    """
    from mlm.report.evaluation import (
        evaluate_rows,
        merge_evaluation,
        read_evaluation,
        write_evaluation,
    )
    from mlm.report.losses import STATIC, LossTable, column_name, rule_order, write_losses

    evaluation = run.config.evaluation
    folder = run.folder.path
    if corpus and corpus != run.config.corpus:
        folder = folder / f"on-{open_corpus(corpus).name}"
    corpus = corpus or run.config.corpus
    existing = read_evaluation(folder)
    file = _evaluation_file(run, corpus)
    vocabulary = run.vocabulary
    check_learned(run)
    number = min(len(file), evaluation.max_articles or len(file))
    chosen = [a for a in range(number) if file.words[a] > 0]
    if not chosen:
        raise UserError(f"{corpus}, split {evaluation.split}: no article with a word in it")
    articles = [np.asarray(file.article(a), dtype=np.int64) for a in chosen]
    titles = [file.titles[a] for a in chosen]
    words = int(sum(file.words[a] for a in chosen))
    rules = sorted({STATIC, *evaluation.rules}, key=rule_order)
    columns: dict[str, np.ndarray] = {}
    speed, settings = {}, {}
    for protocol in evaluation.protocols:
        for names in _passes(rules):
            ready = [ready_rule(run, name, protocol) for name in names]
            title = None if run.quiet else f"{evaluation.split}, {protocol}, {names[-1]}"
            scores: Scores = score_protocol(
                ready[-1].base,
                ready[-1].bound,
                articles,
                vocabulary.eos_id,
                protocol,
                evaluation.lanes,
                title,
                ready[-1].cache,
            )
            resets = _resets(scores, names[0], protocol, titles)
            for name, one in zip(names, ready, strict=True):
                mine = scores.cached[0] if one.cache else scores
                check_finite(mine, name, protocol, titles)
                parts = [
                    word_losses(nll, tokens, vocabulary.starts_word)
                    for nll, tokens in zip(mine.nll, articles, strict=True)
                ]
                columns[column_name(name, protocol)] = np.concatenate(parts)
                speed[name, protocol] = words / mine.seconds
                settings[name, protocol] = {**one.setting, **resets}
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
    from mlm.report.tables import format_totals

    print(format_totals(rows), flush=True)
    print(f"\ntables: {folder / 'evaluation.md'}", flush=True)


def draw(folder: Path, split: str | None = None) -> None:
    """Draw the pictures of a folder with results; print their paths."""
    from mlm.report.plots import draw_all

    print("pictures:", *draw_all(folder, split), sep="\n  ", flush=True)


def evaluate_run(config: Config, corpus: str | None, pictures: bool) -> None:
    """What `evaluate.py` does: score, print, draw."""
    run = open_run(config)
    folder, rows = stage_evaluate(run, corpus)
    show(folder, rows)
    if pictures:
        draw(folder, config.evaluation.split)
