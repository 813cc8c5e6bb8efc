"""Stage `evaluate`: every rule in every protocol on a split, as word losses and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlm.base.errors import UserError
from mlm.base.names import CACHE, STATIC, rule_label, rule_order
from mlm.reading.scoring import Scores, check_finite, score_protocol, word_losses
from mlm.report.evaluation import (
    evaluate_rows,
    merge_evaluation,
    read_evaluation,
    write_evaluation,
)
from mlm.report.losses import LossTable, column_name, write_losses
from mlm.report.tables import format_totals
from mlm.runs.rules import check_learned, ready_rule
from mlm.runs.run import Run, open_run, say
from mlm.settings.config import Config
from mlm.text.corpora import open_corpus, results_name
from mlm.text.tokens import TokenFile, encode_split
from mlm.text.vocabulary import Vocabulary

WHOLE = "whole"
"""What results call the split of a text that is not divided into splits."""


@dataclass(frozen=True)
class SplitText:
    """The articles of a split that have words, as tokens of the run's own vocabulary."""

    split: str
    file: TokenFile
    vocabulary: Vocabulary
    chosen: list[int]
    """Places of the articles in the split."""

    @property
    def articles(self) -> list[np.ndarray]:
        """Tokens of every article."""
        return [np.asarray(self.file.article(a), dtype=np.int64) for a in self.chosen]

    @property
    def titles(self) -> list[str]:
        """Title of every article."""
        return [self.file.titles[a] for a in self.chosen]

    @property
    def words_A(self) -> list[int]:
        """Words of every article."""
        return [int(self.file.words[a]) for a in self.chosen]

    def table(self, losses: dict[str, np.ndarray]) -> LossTable:
        """The losses of all words, by column, beside the words."""
        words = [word for tokens in self.articles for word in self.vocabulary.words(tokens)]
        return LossTable(
            split=self.split,
            article_N=np.repeat(self.chosen, self.words_A).astype(np.int32),
            position_N=np.concatenate([np.arange(n) for n in self.words_A]).astype(np.int32),
            word_N=np.array(words, dtype=object),
            titles=dict(zip(self.chosen, self.titles, strict=True)),
            losses=losses,
        )


def _is_another(run: Run, corpus: str) -> bool:
    """Whether a corpus is not the run's own."""
    own = run.config.corpus
    return corpus != own and Path(corpus).resolve() != Path(own).resolve()


def results_folder(run: Run, corpus: str) -> Path:
    """Where the results on a corpus go: another than the run's own has a folder in the run's."""
    folder = run.results or run.folder.path
    return folder / results_name(corpus) if _is_another(run, corpus) else folder


def _split_text(run: Run, corpus: str) -> SplitText:
    """The split to score; all articles of another text that is not divided into splits.

    Raises:
        UserError: it has no word.
    """
    evaluation, cache = run.config.evaluation, run.config.text.data_dir
    source = open_corpus(corpus, whole=_is_another(run, corpus))
    file = encode_split(source, evaluation.split, run.vocabulary, cache, progress=not run.quiet)
    number = min(len(file), evaluation.max_articles or len(file))
    chosen = [a for a in range(number) if file.words[a] > 0]
    if not chosen:
        raise UserError(f"{corpus}, split {evaluation.split}: no article with a word in it")
    split = WHOLE if getattr(source, "whole", False) else evaluation.split
    return SplitText(split, file, run.vocabulary, chosen)


class RuleScores(NamedTuple):
    """One rule in one protocol."""

    name: str
    losses_N: np.ndarray
    """Nats of every word."""
    seconds: float
    setting: dict[str, Any]
    """What the tables show of it."""
    resets: int
    """How often the guard reset a lane."""


def _tell_resets(scores: Scores, name: str, protocol: str, titles: list[str]) -> None:
    """Report what the guard did to the person at the terminal."""
    if not scores.flushes:
        return
    article, token = min(scores.flushes)
    say(
        f"{rule_label(name)}, protocol {protocol}: the guard reset the weights "
        f"{len(scores.flushes)} times, first at token {token} of {titles[article]!r}"
    )


def _passes(rules: Sequence[str]) -> list[list[str]]:
    """The rules that one reading serves: a rule, and the same with a cache on top."""
    found: dict[str, list[str]] = {}
    for name in sorted(rules, key=lambda name: name.endswith(CACHE)):
        found.setdefault(name.removesuffix(CACHE), []).append(name)
    return list(found.values())


def _score_pass(
    run: Run, text: SplitText, protocol: str, names: Sequence[str]
) -> Iterator[RuleScores]:
    """What one reading of the text says of every rule that it serves (see `_passes`)."""
    ready = [ready_rule(run, name, protocol) for name in names]
    title = None if run.quiet else f"{text.split}, {protocol}, {rule_label(names[-1])}"
    articles, titles, starts = text.articles, text.titles, text.vocabulary.starts_word
    scores: Scores = score_protocol(
        ready[-1].base,
        ready[-1].bound,
        articles,
        text.vocabulary.eos_id,
        protocol,
        run.config.evaluation.lanes,
        title,
        ready[-1].cache,
    )
    _tell_resets(scores, names[0], protocol, titles)
    for name, one in zip(names, ready, strict=True):
        mine = scores.cached[0] if one.cache else scores
        check_finite(mine, name, protocol, titles)
        parts = [
            word_losses(nll, tokens, starts) for nll, tokens in zip(mine.nll, articles, strict=True)
        ]
        losses_N, resets = np.concatenate(parts), len(scores.flushes)
        yield RuleScores(name, losses_N, mine.seconds, one.setting, resets)


def stage_evaluate(run: Run, corpus: str | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Score every rule in every protocol on a split; write tables and word losses.

    Another corpus than the run's own gets a folder of its own inside the run folder.

    Returns:
        where the results are, and all rows of its evaluation.json.
    """
    evaluation = run.config.evaluation
    corpus = corpus or run.config.corpus
    folder = results_folder(run, corpus)
    existing = read_evaluation(folder)
    text = _split_text(run, corpus)
    check_learned(run)
    rules = sorted({STATIC, *evaluation.rules}, key=rule_order)
    columns: dict[str, np.ndarray] = {}
    speed, settings, resets = {}, {}, {}
    for protocol in evaluation.protocols:
        for names in _passes(rules):
            for found in _score_pass(run, text, protocol, names):
                columns[column_name(found.name, protocol)] = found.losses_N
                speed[found.name, protocol] = sum(text.words_A) / found.seconds
                settings[found.name, protocol] = found.setting
                resets[found.name, protocol] = found.resets
    table = text.table(columns)
    write_losses(folder / "losses.parquet", table)
    rows = evaluate_rows(
        table,
        corpus=Path(corpus).name,
        words_per_second=speed,
        settings=settings,
        resets=resets,
        bytes_A=[int(text.file.bytes[a]) for a in text.chosen],
        resamples=evaluation.resamples,
        seed=run.config.seed,
    )
    rows = merge_evaluation(existing, rows)
    write_evaluation(folder, rows)
    return folder, rows


def show(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Print the table of totals."""
    print(format_totals(rows), flush=True)
    print(f"\ntables: {folder / 'evaluation.md'}", flush=True)


def draw(folder: Path, split: str | None = None) -> None:
    """Draw the pictures of a folder with results; print their paths."""
    from mlm.report.plots import draw_all  # matplotlib, only where something is drawn

    print("pictures:", *draw_all(folder, split), sep="\n  ", flush=True)


def evaluate_run(
    config: Config, corpus: str | None, pictures: bool, results: Path | None = None
) -> None:
    """What `evaluate.py` does: score, print, draw; `results` None = in the run folder."""
    run = dataclasses.replace(open_run(config), results=results)
    folder, rows = stage_evaluate(run, corpus)
    show(folder, rows)
    if pictures:
        split = config.evaluation.split
        draw(folder, split if any(row["split"] == split for row in rows) else WHOLE)
