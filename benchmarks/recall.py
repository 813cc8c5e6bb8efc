"""Does a model that rewrites its weights remember on demand? Multi-query associative recall.

    python -m benchmarks.recall --out runs/benchmarks/recall

Sequences are those of `benchmarks.recall_data`, in the published sizes up to 256 tokens, with a
vocabulary of 1,024 words (published: 8,192, and a hundred times the training text). For every seed
a language model is trained on sequences of all sizes by stage 1, as text; rules are tuned and
trained on further sequences by stage 2, for every number of tokens M between two updates. Then test
sequences are read in protocol `article`: every sequence begins with the trained weights. Only
answers are scored: one is right if no other token is more likely. The weights are written once per
M tokens, so that a pair helps from the next segment on: distance is counted in tokens and in
segments.
Writes OUT/recall_*.json, the tables of the page, and a picture. Runs that are there already with
the same settings are not made again. Some 1.5 GB of memory.
"""

from __future__ import annotations

import mlm  # noqa: F401

# isort: split
# The package comes before torch: it tells OpenMP not to spin, which others on the machine slow.
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from benchmarks.output import HOME
from benchmarks.recall_data import (
    HEAD_TOKENS,
    SIZES,
    Query,
    Recall,
    Size,
    recall_sequences,
    write_sequences,
)
from benchmarks.recall_picture import draw
from benchmarks.rows import prepare
from benchmarks.timing import record
from mlm.base.errors import run_cli
from mlm.base.terminal import say
from mlm.kernels.switches import computing
from mlm.reader.model import TrainedModel
from mlm.reading.scoring import busy_segments
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.presets import settings
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder
from mlm.text.streams import LaneStream

BEST = "four_levels"
"""The learned rule of `--rule best`."""
COLUMNS = {
    ("lstm", "static"): "static",
    ("lstm", "static+cache"): "static+cache",
    ("lstm", "rms"): "rms",
    ("lstm", "three_levels"): "three_levels",
    ("output", "rms"): "rms, output",
    ("output", "three_levels"): "three_levels, output",
    ("best", BEST): "best",
}
"""Columns of the tables by the run and the rule in it. The runs differ in what adapts: the default
(the LSTM and the softmax's bias), the output layer, or that and the settings of `--rule best`."""
RUNS = ("lstm", "output", "best")
ONCE = ("static", "static+cache")
"""Columns that do not depend on M."""
DISTANCES = (1, 8, 16, 32, 64, 128, 256)
"""Edges of the bins of distance in tokens."""


@dataclass(frozen=True)
class Options:
    """Multi-query associative recall, and keys that are bound again."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each has data, a language model and rules of its own."""
    segments: tuple[int, ...] = (8, 20)
    """M: tokens between two updates; the tables by pairs and distance are of the first."""
    words: int = 1024
    """Half of them keys, half values; published: 8192."""
    units: int = 128
    """Of the embedding and of the LSTM."""
    train: int = 24_000
    """Training tokens of each size."""
    test: int = 2_000
    """Test tokens of each size."""
    steps: int = 16
    """Meta-updates of stage 2."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice."""
    quick: bool = False
    """A test of seconds: few short sequences, one seed, one M; its numbers mean nothing."""
    out: Path = HOME / "recall"
    """Folder of the runs, tables and pictures."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of the sequences."""
        return (Size(32, 3), Size(40, 5, 2)) if self.quick else SIZES


QUICK: dict[str, Any] = {
    "seeds": (0,),
    "segments": (8,),
    "words": 64,
    "units": 16,
    "train": 1_000,
    "test": 160,
    "steps": 2,
}


# -- training -------------------------------------------------------------------------------


def _sequences(options: Options, seed: int) -> dict[str, list[Recall]]:
    """Of every split."""
    tokens = {"train": options.train, "valid": options.train // 20, "test": options.test}
    return {
        name: recall_sequences(options.sizes, number, options.words, seed, split)
        for split, (name, number) in enumerate(tokens.items())
    }


def common_settings(options: Options, seed: int, folder: Path) -> dict[str, Any]:
    """Settings of all runs of a seed that are not the defaults, by their places."""
    return {
        "corpus": str(folder / "corpus"),
        "seed": seed,
        "device": "cpu",
        "threads": options.threads,
        "text.vocabulary": "word",
        "text.vocabulary_size": 0,
        "text.held_out": 0.2,
        "text.data_dir": folder / "cache",
        "model.embedding": options.units,
        "model.hidden": options.units,
        "lm.epochs": 2.0,
        "lm.lanes": 8,
        "lm.segment": 32,
        "lm.learning_rate": 4e-3,
        "lm.dropout_input": 0.0,
        "lm.dropout_hidden": 0.0,
        "lm.dropout_output": 0.0,
        "lm.validations": 3,
        "lm.validation_words": 4_000,
    }


def run_settings(options: Options, name: str, segment: int) -> dict[str, Any]:
    """Settings of stage 2 of a run in `RUNS`; extensions learn from the text at hand."""
    longest = max(size.length for size in options.sizes) + HEAD_TOKENS + 1
    found: dict[str, Any] = {
        "adapt.update_every": segment,
        "adapt.fisher_words": options.train,
        "meta.rules": (BEST,) if name == "best" else ("three_levels",),
        "meta.stream_share": 0.0,
        "meta.lanes": 8,
        "meta.unroll": max(4, math.ceil(longest / segment)),
        "meta.steps": options.steps,
        "evaluation.protocols": ("article",),
        "evaluation.budget": 3 if options.quick else 12,
        "evaluation.tune_words": options.train // 5,
        "evaluation.cache_words": longest,
    }
    if name == "output":
        found |= {"adapt.dynamic": "softmax.low,softmax.bias", "adapt.rank": options.units}
    if name == "best":
        found |= {
            "extensions.learned_basis.words": options.train,
            "extensions.ngram_read_out.words": options.train,
            "extensions.word_coupling.directions": min(256, options.units),
        }
    return found


def language_model(options: Options, seed: int, folder: Path) -> RunFolder:
    """The language model of a seed, trained unless it is there."""
    config = replaced(settings(), common_settings(options, seed, folder))
    config = validate(replaced(config, {"out": folder / "lm", "stages": ("lm",)}))
    made = RunFolder(folder / "lm")
    if made.checkpoint("lm").exists() and _same(made, config):
        return made
    run_stages(dataclasses.replace(config, overwrite=True), quiet=True)
    return made


def _same(folder: RunFolder, config: Config) -> bool:
    """Whether a folder was made with these settings."""
    how = {"overwrite": False, "stages": config.stages, "threads": config.threads}
    return replaced(folder.load_config(), how) == replaced(config, how)


def trained_model(
    options: Options, seed: int, name: str, segment: int, folder: Path, lm: RunFolder
) -> TrainedModel:
    """The run of a seed, a name in `RUNS` and M, made unless it is there."""
    path, rule = folder / f"{name}-{segment}", "best" if name == "best" else "default"
    config = replaced(settings("tiny", rule), common_settings(options, seed, folder))
    config = replaced(config, run_settings(options, name, segment))
    config = validate(replaced(config, {"out": path, "stages": ("meta",)}))
    made = RunFolder(path)
    if not (made.checkpoint(config.meta.rules[0]).exists() and _same(made, config)):
        prepare(path, lm)
        run_stages(config, quiet=True)
    return TrainedModel.load_folder(path, device="cpu", threads=options.threads)


# -- scoring --------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a rule predicted in a sequence, for every token of its article."""

    guesses: np.ndarray
    """(T,) int64: the most likely token."""
    nll: np.ndarray
    """(T,) nats of the token that came."""


class Scored(NamedTuple):
    """One answer."""

    size: Size
    distance: int
    """Tokens between the value and the answer."""
    segments: int
    """Segments between them; 0 = the same one."""
    again: bool
    """Whether its key was bound again."""
    right: bool
    old: bool
    """Whether the guess is the value that was bound first, of a key that was bound again."""
    nats: float


def read_answers(
    model: TrainedModel, rule: str, sequences: Sequence[Recall], lanes: int = 16
) -> list[Answers]:
    """What a rule predicts in every sequence, in protocol `article`."""
    articles = [model.vocabulary.encode_article(one.article).astype(np.int64) for one in sequences]
    found = [Answers(np.zeros(len(a), np.int64), np.zeros(len(a))) for a in articles]
    lanes = min(lanes, len(articles))
    stream = LaneStream(articles, lanes, model.segment, model.vocabulary.eos_id)
    track = model.track(rule, "article", lanes)
    with computing(model.switches):
        for segment, keep in busy_segments(stream):
            if keep is not None:
                track.select(keep)
            nll, log_p = track.learn(segment)
            guesses = log_p.argmax(2).numpy()
            for lane, count in enumerate(segment.mask.sum(1).tolist()):
                at, own = segment.start[lane], found[segment.article[lane]]
                own.guesses[at : at + count] = guesses[lane, :count]
                own.nll[at : at + count] = nll[lane, :count].double().numpy()
    return found


def score_query(
    size: Size, query: Query, tokens: np.ndarray, answers: Answers, segment: int
) -> Scored:
    """One answer; `tokens` (T,) are those of the article."""
    answer, value, old = (place + HEAD_TOKENS for place in (query.answer, query.value, query.old))
    guess = answers.guesses[answer]
    return Scored(
        size,
        answer - value,
        answer // segment - value // segment,
        query.bound_again,
        bool(guess == tokens[value]),
        query.bound_again and bool(guess == tokens[old]),
        float(answers.nll[answer]),
    )


def score_sequences(
    model: TrainedModel, rule: str, sequences: Sequence[Recall], segment: int
) -> list[Scored]:
    """Every answer of every sequence."""
    found = []
    for one, answers in zip(sequences, read_answers(model, rule, sequences), strict=True):
        tokens = model.vocabulary.encode_article(one.article)
        found += [score_query(one.size, q, tokens, answers, segment) for q in one.queries]
    return found


# -- tables ---------------------------------------------------------------------------------

Found = Mapping[tuple[str, int, int], Sequence[Scored]]
"""Answers by column, M (0 = any) and seed."""


def _cells(
    found: Found, segment: int, wanted: Callable[[Scored], bool], key: str = "right"
) -> dict[str, Any]:
    """A row's columns: the mean over seeds of the share that is right; of several, least and
    largest, too."""
    row: dict[str, Any] = {}
    for column in COLUMNS.values():
        shares = []
        for (name, every, _), scored in found.items():
            if name == column and every in (0, segment):
                own = [float(getattr(one, key)) for one in scored if wanted(one)]
                shares += [statistics.fmean(own)] if own else []
        if shares:
            row[column] = statistics.fmean(shares)
        if len(shares) > 1:
            row[f"{column} interval"] = [min(shares), max(shares)]
    return row


def pairs_table(found: Found, sizes: Iterable[Size], segment: int) -> list[dict[str, Any]]:
    """Share of right answers by size; in the forgetting variant of keys bound again and others."""
    rows = []
    for size in sizes:
        kinds = {"": (True, False)} if not size.again else {"again": (True,), "once": (False,)}
        for kind, values in kinds.items():

            def wanted(one: Scored, size: Size = size, values: Sequence[bool] = values) -> bool:
                return one.size == size and one.again in values

            head = {"task": size.task, "bound": kind, "tokens": size.length, "pairs": size.pairs}
            head["chance"] = 1 / size.pairs
            cells = _cells(found, segment, wanted)
            rows += [head | cells] if cells else []
    return rows


def distance_table(found: Found, segment: int) -> list[dict[str, Any]]:
    """Share of right answers by distance in tokens, both tasks and all sizes together."""
    rows = []
    for low, high in itertools.pairwise(DISTANCES):
        cells = _cells(found, segment, lambda one, a=low, b=high: a <= one.distance < b)
        if cells:
            rows.append({"distance": f"{low} to {high - 1}", "from": low, "to": high} | cells)
    return rows


def segments_table(found: Found, segments: Iterable[int]) -> list[dict[str, Any]]:
    """Share of right answers by M and by distance in segments, and nats per answer."""
    rows = []
    for segment in segments:
        if not any(key[1] == segment for key in found):
            continue  # not measured yet
        for name, (low, high) in {"0": (0, 0), "1": (1, 1), "2 and more": (2, 999)}.items():

            def wanted(one: Scored, low: int = low, high: int = high) -> bool:
                return low <= one.segments <= high

            # static and cache know no segments: their answers are counted by the first M only
            cells = _cells({k: v for k, v in found.items() if k[1]}, segment, wanted)
            rows.append({"M": segment, "segments": name, "what": "share right"} | cells)
        cells = _cells(found, segment, lambda one: True, "nats")
        rows.append({"M": segment, "segments": "all", "what": "nats per answer"} | cells)
    return rows


def old_values(found: Found, segment: int) -> list[dict[str, Any]]:
    """Of keys that were bound again: how often the answer is the new, the old, or another value."""
    rows = []
    for what in ("new value", "old value"):
        key = "right" if what == "new value" else "old"
        rows.append({"answer": what} | _cells(found, segment, lambda one: one.again, key))
    return rows


# -- all ------------------------------------------------------------------------------------


def measure(options: Options, seed: int, segment: int) -> dict[tuple[str, int, int], list[Scored]]:
    """All answers of a seed with one M, by column, M and seed."""
    folder = options.out / f"seed-{seed}"
    sequences = _sequences(options, seed)
    for split, some in sequences.items():
        write_sequences(folder / "corpus" / f"{split}.txt", some)
    lm = language_model(options, seed, folder)
    found: dict[tuple[str, int, int], list[Scored]] = {}
    for name in RUNS:
        say(f"M = {segment}, seed {seed}, {name}")
        model = trained_model(options, seed, name, segment, folder, lm)
        for (of, rule), column in COLUMNS.items():
            if of != name or (column in ONCE and segment != options.segments[0]):
                continue
            key = column, segment * (column not in ONCE), seed
            found[key] = score_sequences(model, rule, sequences["test"], segment)
    return found


def write(found: Found, options: Options, seconds: float) -> None:
    """Record the tables, and the parts of the page."""
    main_segment = options.segments[0]
    tables = {
        "recall_pairs": pairs_table(found, options.sizes, main_segment),
        "recall_distance": distance_table(found, main_segment),
        "recall_segments": segments_table(found, options.segments),
        "recall_again": old_values(found, main_segment),
    }
    for name, rows in tables.items():
        show = [key for key in rows[0] if not key.endswith(" interval")]
        record(name, rows, options, show, minutes=round(seconds / 60, 1))
    draw(tables, options.out / "recall")


def main() -> None:
    """Train, read, print, draw and write."""
    options = tyro.cli(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, **QUICK)
    clock, found = time.perf_counter(), {}
    for segment in options.segments:
        for seed in options.seeds:
            found |= measure(options, seed, segment)
            write(found, options, time.perf_counter() - clock)


if __name__ == "__main__":
    run_cli(main)
