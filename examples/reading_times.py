"""Does learning while reading make surprisal a better predictor of human reading times?

    python -m examples.reading_times --times FILE.tsv --model wikipedia-small

FILE is a reading-time corpus in the layout of Natural Stories (Futrell et al. 2021), which you
bring: tab-separated, one word a line in reading order, with the columns `word`, `zone` (its place
in the story), `item` (the story) and `gmeanItemRT` (geometric mean of its reading times, ms).

A story's words, joined by spaces, are the text that the model reads. Two least-squares models then
predict the logarithm of a word's reading time, of all words but the first and the last of a
sentence (where readers pause for other reasons; `--sentence-ends` keeps them) and the first two
of a story:

* baseline: length in characters, log frequency, their product, zone, story, and length and log
  frequency of the two words before;
* the same and the surprisal, in bits, of the word and of the two before.

Each is fitted on all stories but one and predicts the one left out. The result is by how many nats
the second predicts 1,000 words better, with a bootstrap interval over stories. A story's effect is
its mean, which is taken from all variables: so it is defined for the story left out, too. What a
rule adds to static is divided into what it adds at words that the story has had before and at words
new to it; the two add up.

Frequencies come from `--frequencies`: a corpus whose training text is counted (a folder), or a
table FILE.tsv (word, tab, count); upper and lower case are one word. Without it they are the
language model's own: the sum of the log-softmax of its output bias over the pieces of the word.
That is a rough unigram estimate, and a baseline with rough frequencies leaves more for surprisal to
explain: give counts of a large text for a figure to publish.
"""

from __future__ import annotations

import json
import math
import platform
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import tyro

import mlm
from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.names import rule_label
from mlm.report.evaluation import bootstrap_interval, mean_gain
from mlm.spelling import detokenise
from mlm.store.run_folder import commit, machine
from mlm.text.corpora import NAMED, open_corpus
from mlm.text.tokens import limited

COLUMNS = {
    "word": pa.string(),
    "zone": pa.int64(),
    "item": pa.int64(),
    "gmeanItemRT": pa.float64(),
}
BEFORE = 2
"""Words before a word whose properties predict its reading time, too (spill-over)."""
COLUMNS_SHOWN = (
    "model",
    "protocol",
    "rule",
    "bits per word",
    "nats per 1,000 words",
    "over static",
    "stories better",
    "at words read before",
    "at new words",
)
PER = 1000
COUNTED = 6_000_000
"""Words of a corpus that are counted for frequencies."""


@dataclass(frozen=True)
class Options:
    """Predict reading times from surprisal, without and with learning."""

    times: Path
    """Reading times, tab-separated, in the layout of Natural Stories."""
    model: tuple[str, ...]
    """Released models' names, run folders, or models on the Hugging Face hub."""
    rules: tuple[str, ...] = ()
    """Rules to compare with the static model; none = all that a model has settings for."""
    protocols: tuple[Literal["article", "stream"], ...] = ("article", "stream")
    """Whether every story starts afresh, or the stories are one long text."""
    sentence_ends: bool = False
    """Predict the first and the last word of a sentence, too."""
    frequencies: str | None = None
    """A corpus to count, a folder or a known name, or a file of counts: word, tab, count."""
    json: Path | None = None
    """File for the table, with machine and versions."""


class Corpus(NamedTuple):
    """Words N in reading order, story after story."""

    words: list[str]
    zone_N: np.ndarray
    story_N: np.ndarray
    log_time_N: np.ndarray


class Scored(NamedTuple):
    """What the model's table says of the corpus's words N."""

    bits_N: np.ndarray
    """Surprisal."""
    sentence_N: np.ndarray


class Result(NamedTuple):
    """What surprisal adds to the baseline, at the words N that are predicted."""

    bits_per_word: float
    """Of all words."""
    nats_N: np.ndarray
    """Gain in log-likelihood."""
    story_N: np.ndarray
    """The word's story, 0, 1, ..."""
    again_N: np.ndarray
    """Whether the story has had the word before."""


def read_times(path: Path) -> Corpus:
    """Read a corpus of reading times.

    Raises:
        UserError: no such file or columns, fewer than two stories, or a time that is not positive.
    """
    layout = f"{path}: not in the layout of Natural Stories"
    try:
        table = csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=csv.ConvertOptions(column_types=COLUMNS, include_columns=list(COLUMNS)),
        )
    except FileNotFoundError:
        raise UserError(f"no file {path}; --times is a table of reading times") from None
    except (pa.ArrowInvalid, KeyError) as error:
        detail = str(error).splitlines()[0].strip("'\"")
        raise UserError(
            f"{layout} ({detail}); it needs the tab-separated columns {', '.join(COLUMNS)}"
        ) from None
    words = table["word"].to_pylist()
    zone, story, time = (table[name].to_numpy() for name in ("zone", "item", "gmeanItemRT"))
    if bad := [word for word in words if not word or word.split() != [word]]:
        raise UserError(f"{layout}: {bad[0]!r} is not one word")
    if not (time > 0).all():
        raise UserError(f"{path}: reading times must be positive; line {np.argmin(time > 0) + 2}")
    if len(np.unique(story)) < 2:
        raise UserError(f"{path}: one story only; each is predicted from the others")
    if len(np.unique(story)) != 1 + np.count_nonzero(np.diff(story)):
        raise UserError(f"{path}: words of a story (`item`) must follow each other")
    return Corpus(words, zone, story, np.log(time))


def bare(word: str) -> str:
    """A word as frequencies count it: without punctuation around it, in lower case."""
    return word.strip(string.punctuation + "“”‘’–—…").lower() or word


def counts_of(corpus: str) -> Counter[str]:
    """How often the first words of a corpus's training text come, in natural spelling.

    Raises:
        UserError: no such corpus, or it has no training split.
    """
    counts: Counter[str] = Counter()
    for article in limited(open_corpus(corpus).articles("train"), COUNTED):
        for line in article.text.splitlines():
            counts.update(map(bare, detokenise(line.split()).split()))
    return counts


def _table_of(path: Path) -> Counter[str]:
    """Counts from a file: word, tab, count."""
    counts: Counter[str] = Counter()
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            word, _, count = line.partition("\t")
            counts[bare(word)] += int(count)
    except ValueError:
        raise UserError(f"{path}: every line must be a word, a tab and its count") from None
    return counts


def counted(name: str) -> Callable[[str], float]:
    """Log frequency of a word, from a corpus or a file of counts; of words not in it, that of half
    a count.

    Raises:
        UserError: no such file or corpus, or it holds no counts.
    """
    path = Path(name)
    if not path.exists() and name not in NAMED:
        raise UserError(f"no file {path}; --frequencies is a table of counts, or a corpus's folder")
    counts = _table_of(path) if path.is_file() else counts_of(name)
    total = math.log(counts.total())
    return lambda word: math.log(counts.get(bare(word), 0.5)) - total


def by_bias(model: mlm.TrainedModel) -> Callable[[str], float]:
    """Log frequency of a word by the model's output bias: the sum over its pieces."""
    log_p = model.weights["softmax.bias"].double().log_softmax(0).cpu().numpy()
    return lambda word: float(log_p[model.vocabulary.encode_line(bare(word))].sum())


def align(corpus: Corpus, score: Callable[[list[str]], pa.Table]) -> Scored:
    """The model's table of the stories, joined to their words by document and character offsets.

    Args:
        score: gives the table of words of some texts.

    Raises:
        UserError: the table lacks a word.
    """
    texts: list[str] = []
    places: list[tuple[int, int, int]] = []
    for k, word in enumerate(corpus.words):
        if not k or corpus.story_N[k] != corpus.story_N[k - 1]:
            texts.append("")
        gap = " " if texts[-1] else ""
        start = len(texts[-1]) + len(gap)
        texts[-1] += gap + word
        places.append((len(texts) - 1, start, start + len(word)))
    keys = ("doc_id", "char_start", "char_end")
    table = score(texts)
    columns = (table[name].to_pylist() for name in (*keys, "surprisal", "sent_id"))
    found = {(d, s, e): (bits, sent) for d, s, e, bits, sent in zip(*columns, strict=True)}
    if missing := [k for k, place in enumerate(places) if place not in found]:
        raise UserError(
            f"the model's table lacks {len(missing)} words of the stories, such as "
            f"{corpus.words[missing[0]]!r} (story {corpus.story_N[missing[0]]})"
        )
    bits, sentences = zip(*(found[place] for place in places), strict=True)
    return Scored(np.array(bits), np.array(sentences))


def before(values_N: np.ndarray, lag: int) -> np.ndarray:
    """The value of the word `lag` places before; the first ones get what is never used."""
    return np.roll(values_N, lag)


def baseline(corpus: Corpus, log_frequency_N: np.ndarray) -> np.ndarray:
    """Predictors (N, P) of the baseline."""
    length = np.array([float(len(word)) for word in corpus.words])
    columns = [length, log_frequency_N, length * log_frequency_N, corpus.zone_N.astype(float)]
    for lag in range(1, BEFORE + 1):
        columns += [before(length, lag), before(log_frequency_N, lag)]
    return np.stack(columns, axis=1)


def usable(story_N: np.ndarray, sentence_N: np.ndarray | None = None) -> np.ndarray:
    """Words with two words of their own story before them, that neither begin nor end a sentence.

    sentence_N: the number of every word's sentence within its story; None keeps their ends.
    """
    kept = (np.arange(len(story_N)) >= BEFORE) & (story_N == before(story_N, BEFORE))
    if sentence_N is not None:
        place = np.stack([story_N, sentence_N])
        changes = (place[:, 1:] != place[:, :-1]).any(axis=0)
        kept &= ~np.append(True, changes) & ~np.append(changes, True)
    return kept


def log_likelihood(X_NP: np.ndarray, y_N: np.ndarray, story_N: np.ndarray) -> np.ndarray:
    """Log-likelihood (N,) of each time by a regression fitted on the other stories, nats."""
    X, y = X_NP.astype(float), y_N.astype(float)
    stories = np.unique(story_N)
    for story in stories:
        here = story_N == story
        X[here] -= X[here].mean(axis=0)
        y[here] -= y[here].mean()
    X /= X.std(axis=0) + 1e-12
    found = np.empty(len(y))
    for story in stories:
        here = story_N == story
        weights, *_ = np.linalg.lstsq(X[~here], y[~here], rcond=None)
        variance = np.square(y[~here] - X[~here] @ weights).mean()
        wrong = np.square(y[here] - X[here] @ weights)
        found[here] = -0.5 * (np.log(2 * np.pi * variance) + wrong / variance)
    return found


def again(corpus: Corpus) -> np.ndarray:
    """(N,) whether a word stood in its story before, whatever its case and punctuation."""
    pairs = list(zip(corpus.story_N.tolist(), map(bare, corpus.words), strict=True))
    first = {pair: k for k, pair in reversed(list(enumerate(pairs)))}
    return np.array([first[pair] < k for k, pair in enumerate(pairs)])


def added(
    corpus: Corpus, baseline_NP: np.ndarray, bits_N: np.ndarray, keep_N: np.ndarray
) -> Result:
    """What the surprisal of the words to keep, and of those before them, adds to the baseline."""
    lags = [before(bits_N, lag) for lag in range(BEFORE + 1)]
    y, story = corpus.log_time_N[keep_N], corpus.story_N[keep_N]
    both = np.column_stack([baseline_NP, *lags])[keep_N]
    gain = log_likelihood(both, y, story) - log_likelihood(baseline_NP[keep_N], y, story)
    _, which = np.unique(story, return_inverse=True)
    return Result(float(bits_N.mean()), gain, which, again(corpus)[keep_N])


Key = tuple[str, str, str]
"""Model, protocol, rule."""


def rows(results: dict[Key, Result]) -> list[dict[str, Any]]:
    """The table: nats per 1,000 words of every protocol and rule, and what they are over static."""
    table, several = [], len({model for model, _, _ in results}) > 1
    for (model, protocol, rule), found in results.items():
        row: dict[str, Any] = {"model": Path(model).name} if several else {}
        row |= {"protocol": protocol, "rule": rule_label(rule)}
        row["bits per word"] = found.bits_per_word
        words_A = np.bincount(found.story_N)
        more = {"nats per 1,000 words": found.nats_N}
        if rule != "static":
            over_N = found.nats_N - results[model, protocol, "static"].nats_N
            more["over static"] = over_N
            more["at words read before"] = over_N * found.again_N
            more["at new words"] = over_N * ~found.again_N
            better = int((np.bincount(found.story_N, over_N) > 0).sum())
            row["stories better"] = f"{better} of {len(words_A)}"
        for name, nats_N in more.items():
            nats_A = np.bincount(found.story_N, nats_N)
            row[name] = float(mean_gain(PER * nats_A, words_A))
            row[f"{name} interval"] = bootstrap_interval(mean_gain, PER * nats_A, words_A)
            row[f"{name} by story"] = (PER * nats_A / words_A).tolist()
        table.append(row)
    return table


def as_text(table: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    head = [name for name in COLUMNS_SHOWN if any(name in row for row in table)]
    lines = [head]
    for row in table:
        cells = []
        for name in head:
            value, interval = row.get(name, ""), row.get(f"{name} interval")
            text = f"{value:.2f}" if isinstance(value, float) else value
            cells.append(text + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
        lines.append(cells)
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def save(options: Options, table: Sequence[dict[str, Any]]) -> None:
    """Write the table with all that it depends on, and no path."""
    assert options.json
    settings = {k: v.name if isinstance(v, Path) else v for k, v in asdict(options).items()}
    settings["model"] = [Path(model).name for model in options.model]
    settings["frequencies"] = options.frequencies and Path(options.frequencies).name
    del settings["json"]
    used = {"python": platform.python_version(), **{n: version(n) for n in ("torch", "numpy")}}
    found = {"machine": machine(), "versions": used, "commit": commit(), "settings": settings}
    write_text(options.json, json.dumps({**found, "rows": list(table)}, indent=1) + "\n")


def read_all(corpus: Corpus, options: Options) -> Iterator[tuple[Key, Result]]:
    """Every model, protocol and rule with what its surprisal adds."""
    frequency = counted(options.frequencies) if options.frequencies else None
    for name in options.model:
        model = mlm.load(name)
        log_frequency = frequency or by_bias(model)
        predictors = baseline(corpus, np.array([log_frequency(word) for word in corpus.words]))
        for protocol in options.protocols:
            wanted = options.rules or model.rules_in(protocol)
            for rule in model.resolved(["static", *wanted]):
                scored = align(
                    corpus,
                    lambda t, m=model, r=rule, p=protocol: m.score_many(t, rule=r, protocol=p),
                )
                sentences = None if options.sentence_ends else scored.sentence_N
                keep = usable(corpus.story_N, sentences)
                yield (name, protocol, rule), added(corpus, predictors, scored.bits_N, keep)


def main() -> None:
    """Read, score, fit, print."""
    options = tyro.cli(Options, description=__doc__)
    table = rows(dict(read_all(read_times(options.times), options)))
    print(as_text(table))
    if options.json:
        save(options, table)
        print(options.json)


if __name__ == "__main__":
    run_cli(main)
