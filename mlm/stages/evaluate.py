"""Stage `evaluate`: every rule in every protocol on a split, as word losses and tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError, uninterrupted
from mlm.base.files import readable
from mlm.base.names import CACHE, STATIC, rule_label, rule_order
from mlm.base.processes import ranks
from mlm.base.terminal import detail, note, say, stands_out
from mlm.kernels import switches
from mlm.page.top_k import FILE, Expected, top_k_rows, write_top_k
from mlm.reader.model import Protocol, TrainedModel
from mlm.reading.lanes import Details
from mlm.reading.scoring import Scores, check_finite, joined_details
from mlm.report.evaluation import (
    evaluate_rows,
    merge_evaluation,
    read_evaluation,
    write_evaluation,
)
from mlm.report.losses import column_name, write_losses
from mlm.report.tables import Row, format_totals
from mlm.runs.identity import guard_mark, identity
from mlm.runs.rules import check_learned, current_identity
from mlm.runs.run import Run, open_run
from mlm.runs.split_text import SplitText
from mlm.settings.config import Config
from mlm.stages.checks import tell_shared
from mlm.stages.fit import fitted, lengths_of_file
from mlm.stages.plan import StagePlan
from mlm.store.lock import only_writer
from mlm.text.corpora import NAMED, open_corpus, results_name
from mlm.text.tokens import encode_split, source_hash
from mlm.training.kept_progress import KeptProgress

WHOLE = "whole"
"""What results call the split of a text that is not divided into splits."""
SCORES = "evaluation"
"""The stage whose progress is kept."""


def _is_another(run: Run, corpus: str) -> bool:
    """Whether a corpus is not the run's own: the text it was trained with, wherever it lies."""
    own = run.config.corpus
    if corpus == own or Path(corpus).resolve() == Path(own).resolve():
        return False
    if corpus in NAMED or run.folder.released:
        return True
    try:
        mark = source_hash(open_corpus(corpus), "train", run.config.text.train_words)
    except UserError:  # it has no training text, or is too short to divide
        return True
    return mark != run.folder.text.get("train")


def results_folder(run: Run, corpus: str) -> Path:
    """Where the results on a corpus go: another than the run's own has a folder in the run's."""
    folder = run.results or run.folder.path
    return folder / results_name(corpus) if _is_another(run, corpus) else folder


def text_to_score(run: Run, corpus: str) -> SplitText:
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
        raise UserError(
            f"{corpus}, split {evaluation.split}: no article with a word in it; check the corpus"
        )
    split = WHOLE if getattr(source, "whole", False) else evaluation.split
    return SplitText(split, file, run.vocabulary, chosen, f"{file.source_hash[:16]}-{number}")


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
    told: str = ""
    """What is said of the guard."""
    details: Details | None = None
    """Of the first pieces of words, where they are asked for (`SplitText.wanted`)."""


def _resets_told(scores: Scores, name: str, protocol: str, titles: list[str]) -> str:
    """What the person at the terminal hears of the guard."""
    if not scores.flushes:
        return ""
    article, token = min(scores.flushes)
    return (
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
    model: TrainedModel, run: Run, text: SplitText, protocol: Protocol, names: Sequence[str]
) -> Iterator[RuleScores]:
    """What one reading of the text says of every rule that it serves (see `_passes`)."""
    ready = [model.ready(name, protocol) for name in names]
    title = None if run.quiet else f"{rule_label(names[-1])}, {protocol}"
    titles = text.titles
    lanes, wanted = run.config.evaluation.lanes, text.wanted(run.config.evaluation.top_k)
    scores = model.losses(text.articles, names[-1], protocol, lanes, title, wanted)
    told = _resets_told(scores, names[0], protocol, titles)
    for name, one in zip(names, ready, strict=True):
        mine = scores.cached[0] if one.cache else scores
        check_finite(mine, name, protocol, titles)
        losses_N, resets = text.word_losses(mine.nll), len(scores.flushes)
        details = joined_details(mine.details) if wanted else None
        yield RuleScores(name, losses_N, mine.seconds, one.setting, resets, told, details)
        told = ""


def _score_passes(
    model: TrainedModel,
    run: Run,
    text: SplitText,
    protocol: Protocol,
    passes: Sequence[Sequence[str]],
) -> list[RuleScores]:
    """One reading of all processes together, or as many of one text as there are processes."""
    here = ranks()
    if here.world == 1 or protocol != "stream":
        return [one for names in passes for one in _score_pass(model, run, text, protocol, names)]
    for name in (name for names in passes for name in names):
        model.ready(name, protocol)  # tuned by all of them

    def read() -> list[RuleScores]:
        own = passes[here.rank : here.rank + 1]
        return [one for names in own for one in _score_pass(model, run, text, protocol, names)]

    return [one for part in here.parts(read) for one in part]


class _Finished:
    """What has been scored so far: `mlm.base.progress.Work`, whose steps are readings of a text."""

    def __init__(self) -> None:
        self.scores: dict[tuple[str, str], RuleScores] = {}
        """By rule and protocol."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = {}, []
        for (name, protocol), found in self.scores.items():
            column = column_name(name, protocol)
            tensors[column] = torch.from_numpy(found.losses_N)
            for part, numbers in found.details._asdict().items() if found.details else ():
                tensors[f"{column}/{part}"] = torch.from_numpy(numbers)
            rest.append([name, protocol, found.seconds, found.setting, found.resets])
        return tensors, {"scores": rest}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        for name, protocol, *rest in about["scores"]:
            column = column_name(name, protocol)
            parts = [tensors.get(f"{column}/{part}") for part in Details._fields]
            known = [part.numpy() for part in parts if part is not None]
            details = Details(*known) if known else None
            losses_N = tensors[column].numpy()
            self.scores[name, protocol] = RuleScores(name, losses_N, *rest, details=details)


def _scoring(run: Run, folder: Path, text: SplitText) -> KeptProgress:
    """Where what has been scored of a text is kept; what the scores depend on is its identity."""
    rules = [run.folder.checkpoint(n.removesuffix(CACHE)) for n in run.config.evaluation.rules]
    asked = [identity(run), guard_mark(run), text.split, text.chosen, run.config.evaluation.top_k]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for tokens in text.articles:
        digest.update(tokens.tobytes())
    for file in (run.folder.checkpoint("memory"), *sorted(set(rules))):
        digest.update(file.read_bytes() if file.exists() else b"")
    return KeptProgress(folder, SCORES, digest.hexdigest(), run.config.checkpoint_minutes)


def _scores(run: Run, text: SplitText, progress: KeptProgress) -> dict[tuple[str, str], RuleScores]:
    """Every rule in every protocol; what was scored before an interruption is not read again.

    Several processes share the articles of a reading; a stream cannot be divided, and each reads it
    under another rule.
    """
    evaluation, done = run.config.evaluation, _Finished()
    model = TrainedModel(run, run.folder.path.name, switches())
    rules = sorted({STATIC, *evaluation.rules}, key=rule_order)
    for protocol in evaluation.protocols if run.folder.released else ():
        for name in rules:  # one that cannot be tuned is refused before the others are read
            model.ready(name, protocol)
    with progress.of("scores", done):
        if done.scores:
            readings = len(rules) * len(evaluation.protocols)
            detail(f"{len(done.scores)} of {readings} readings were done before")
        for protocol in evaluation.protocols:
            left = [
                names
                for names in _passes(rules)
                if not all((name, protocol) in done.scores for name in names)
            ]
            at_once = ranks().world if protocol == "stream" else 1
            if at_once > 1:  # those that take about as long at once
                left.sort(key=lambda names: STATIC in names)
            for k in range(0, len(left), at_once):
                found = _score_passes(model, run, text, protocol, left[k : k + at_once])
                for told in filter(None, (one.told for one in found)):
                    detail(told)
                with uninterrupted():
                    done.scores |= {(one.name, protocol): one for one in found}
                    progress.save("scores", done)
    return {(n, p): done.scores[n, p] for p in evaluation.protocols for n in rules}


def _of_now(run: Run, rows: list[Row], text: SplitText) -> list[Row]:
    """The rows that stand for what the run holds now; a note says which do not."""
    marks: dict[tuple[str, str], str | None] = {}

    def current(row: Row, name: str) -> str | None:
        key = row[name], row["protocol"]
        if key not in marks:
            marks[key] = current_identity(run, *key)
        return marks[key]

    def stands(row: Row) -> bool:
        same = row["split"] != text.split or row.get("text") == text.mark
        names = {"rule": "identity", "against": "identity_against"}
        for name, mark in names.items() if same else ():
            same = same and (name not in row or row.get(mark) == (current(row, name) or 0))
        return same

    kept = [row for row in rows if stands(row)]
    gone = {(r["split"], r["protocol"], r["rule"]) for r in rows if r["kind"] == "total"}
    gone -= {(r["split"], r["protocol"], r["rule"]) for r in kept if r["kind"] == "total"}
    if gone:
        names = ", ".join(f"{rule_label(rule)} ({s}, {p})" for s, p, rule in sorted(gone))
        where = run.results or run.folder.path
        note(f"{where}: results with other settings, or of another rule or text, go: {names}")
    return kept


def _marked(run: Run, rows: list[Row], text: SplitText) -> list[Row]:
    """New rows, with what they were made with."""
    for row in rows:
        row["identity"] = current_identity(run, row["rule"], row["protocol"])
        if "against" in row:
            row["identity_against"] = current_identity(run, row["against"], row["protocol"])
        row["text"] = text.mark
    return rows


def stage_evaluate(run: Run, corpus: str | None = None) -> tuple[Path, list[dict[str, Any]]]:
    """Score every rule in every protocol on a split; write tables and word losses.

    Another corpus than the run's own gets a folder of its own inside the run folder. What is scored
    is kept until `forget_scores`.

    Returns:
        where the results are, and all rows of its evaluation.json.
    """
    with only_writer(run.results or run.folder.path):
        return _evaluate(run, corpus)


def _evaluate(run: Run, corpus: str | None) -> tuple[Path, list[Row]]:
    """What `stage_evaluate` does, alone in the folder."""
    given, corpus = corpus, corpus or run.config.corpus
    folder = results_folder(run, corpus)
    existing = read_evaluation(folder)
    text = text_to_score(run, corpus)
    if not run.folder.released and not _is_another(run, corpus):
        tell_shared(run, text.split, text.file)
    if given and folder == (run.results or run.folder.path):
        detail(f"{corpus} is the run's own text; its split {text.split} is scored")
    check_learned(run)
    words, number = sum(text.words_A), len(text.chosen)
    detail(f"{corpus}, split {text.split}: {words:,} words in {number:,} articles")
    scores = _scores(run, text, _scoring(run, folder, text))
    rows = ranks().on_first(lambda: _written(run, corpus, folder, text, existing, scores))
    return folder, rows or []


def _written(
    run: Run,
    corpus: str,
    folder: Path,
    text: SplitText,
    existing: list[Row],
    scores: Mapping[tuple[str, str], RuleScores],
) -> list[Row]:
    """All rows of the evaluation, once they and the losses are written."""
    evaluation = run.config.evaluation
    table = text.table({column_name(*key): found.losses_N for key, found in scores.items()})
    existing = _of_now(run, existing, text)
    kept = {(r["split"], column_name(r["rule"], r["protocol"])) for r in existing if "rule" in r}
    write_losses(folder / "losses.parquet", table, kept)
    _write_top_k(run, folder, text, scores, kept)
    rows = evaluate_rows(
        table,
        corpus=readable(Path(corpus).name),
        words_per_second={key: sum(text.words_A) / s.seconds for key, s in scores.items()},
        settings={key: found.setting for key, found in scores.items()},
        resets={key: found.resets for key, found in scores.items()},
        bytes_A=text.bytes_A,
        unknown_A=text.unknown_A,
        resamples=evaluation.resamples,
        seed=run.config.seed,
    )
    rows = merge_evaluation(existing, _marked(run, rows, text))
    write_evaluation(folder, rows)
    return rows


def _expected(d: Details) -> Expected:
    """What the rows of `top_k.parquet` say of them."""
    return Expected(d.rank, d.entropy, d.pieces, np.exp(-d.best))


def _write_top_k(
    run: Run,
    folder: Path,
    text: SplitText,
    scores: Mapping[tuple[str, str], RuleScores],
    kept: Collection[tuple[str, str]],
) -> None:
    """Write what was expected before the words, if it is asked for; a note says what goes.

    Rows that are there stay if those of their rule and of static in `kept`, by split and column of
    losses, do.
    """

    def stands(split: str, rule: str, protocol: str) -> bool:
        return all((split, column_name(name, protocol)) in kept for name in (STATIC, rule))

    new = []
    wanted = text.wanted(run.config.evaluation.top_k)
    if wanted:
        placed, names = text.placed(wanted), text.vocabulary.pieces
        for (rule, protocol), found in scores.items():
            before, after = scores[STATIC, protocol].details, found.details
            if rule != STATIC and before and after:
                of = text.split, rule, protocol
                new.append(top_k_rows(of, placed, _expected(before), _expected(after), names))
    gone = write_top_k(folder / FILE, new, stands)
    if gone:
        told = ", ".join(f"{rule_label(rule)} ({s}, {p})" for s, rule, p in sorted(gone))
        note(
            f"{folder / FILE}: likeliest pieces stored with other settings, or of another "
            f"rule or text, go: {told}"
        )


def forget_scores(folder: Path) -> None:
    """The evaluation is shown and drawn: no interruption can make it necessary again."""
    KeptProgress(folder, SCORES, "", 0.0).forget()


def show(folder: Path, rows: list[Row], drawn: Sequence[Path]) -> None:
    """Print the table of totals, if there is one, and where page, tables and figures are."""
    say("")
    if rows:
        print(format_totals(rows, bold=stands_out(sys.stdout)), end="\n\n")
    pages = [path for path in drawn if path.suffix == ".html"]
    figures = [path.parent for path in drawn if path.suffix != ".html"]
    tables = [path for path in [folder / "evaluation.md"] if path.exists()]
    for name, paths in {"page": pages, "tables": tables, "figures": figures}.items():
        for path in paths[:1]:
            print(f"{name:<7} {path}")
    sys.stdout.flush()


def draw(folder: Path, split: str | None = None) -> list[Path]:
    """Draw the pictures of a folder with results, and its page; return their paths."""
    from mlm.page.folder import draw_run  # matplotlib, only where something is drawn

    return ranks().on_first(lambda: draw_run(folder, split)) or []


def score_and_draw(run: Run, plan: StagePlan, corpus: str | None = None) -> None:
    """The last two stages, as far as they are chosen; print what there is to read."""
    folder, rows, drawn, split = run.folder.path, [], [], None
    scores = plan.begin("evaluate")
    if scores:
        folder, rows = stage_evaluate(run, corpus)
        split = run.config.evaluation.split
        split = split if any(row["split"] == split for row in rows) else WHOLE
    draws = False
    try:
        draws = plan.begin("draw")
        if draws:
            drawn = draw(folder, split)
    finally:
        if scores or draws:
            show(folder, rows, drawn)
    if scores:
        forget_scores(folder)


def evaluate_run(
    config: Config, corpus: str | None, pictures: bool, results: Path | None = None
) -> None:
    """What `evaluate.py` does: score, draw, print; `results` None = in the run folder."""
    run = dataclasses.replace(open_run(config), results=results)
    text = text_to_score(run, corpus or config.corpus)
    run, takes = fitted(run, lengths_of_file(text.file, config.evaluation.max_articles))
    stages = ("evaluate", "draw")
    plan = StagePlan(stages, stages[: 1 + pictures], takes, "--no-draw")
    plan.announce(results_folder(run, corpus or config.corpus))
    score_and_draw(run, plan, corpus)
