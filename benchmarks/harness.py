"""The evaluation harness's perplexity of a model beside ours, on the same articles.

    python -m benchmarks.harness wikipedia-small --corpus data/wikipedia --split valid

Needs the extra `harness` (lm_eval). Every article is read twice from the static weights: as the
harness's task `wikitext` does, in the natural spelling that it makes of a page, and as
`mlm evaluate` does, in WikiText's form. Our perplexity is then converted to the harness's count:
L nats over N strings instead of W words and E line ends. The rest is what the spelling brings.

The harness's data set holds no `<unk>`. Where the corpus does, both readings are done again without
the lines that hold one.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple

import tyro

import mlm
from benchmarks.output import HOME
from benchmarks.timing import record, versions
from mlm.base.errors import UserError, run_cli
from mlm.base.names import STATIC, rule_label
from mlm.base.terminal import say
from mlm.reader.model import BEST, TrainedModel
from mlm.report.evaluation import perplexity
from mlm.spelling import canonical_text
from mlm.text.corpora import count_words, open_corpus
from mlm.text.tokens import UNK


@dataclass(frozen=True)
class Options:
    """Compare the harness's perplexity of a model with ours."""

    model: Annotated[str, tyro.conf.Positional]
    """A released model's name or a run folder."""
    corpus: str
    """A text in WikiText form."""
    split: Literal["valid", "test"] = "valid"
    """What is read. `test` is for the end."""
    articles: int = 0
    """Articles to read, the first ones; 0 = all."""
    rules: tuple[str, ...] = (STATIC, "rms", BEST)
    """Rules to read with; none = static."""
    threads: int = 0
    """CPU threads; 0 = the model's choice."""
    out: Path = HOME / "harness"
    """Where the table goes."""


class Read(NamedTuple):
    """What a reading cost, and what it is divided by."""

    nats: float
    words: int
    """W + E by our count, N by the harness's."""
    bytes: int
    """Of the canonical text by our count, of the page by the harness's."""


def ours(model: TrainedModel, texts: Sequence[str], rule: str) -> Read:
    """Read articles as `mlm evaluate` does, in protocol `article`."""
    tokens = [model.vocabulary.encode_article(text) for text in texts]
    nll = model.losses(tokens, rule, title=rule_label(rule)).nll
    spelled = [model.vocabulary.unknown(*pair) for pair in zip(texts, tokens, strict=True)]
    nats = sum(float(n.sum() + u.nats().sum()) for n, u in zip(nll, spelled, strict=True))
    size = sum(len(canonical_text(text).encode()) for text in texts)
    return Read(nats, sum(map(count_words, texts)), size)


def harness(model: TrainedModel, pages: Sequence[str], rule: str) -> tuple[Read, dict[str, float]]:
    """Read pages as the harness's task `wikitext` does; (the reading, its metrics by name).

    Raises:
        UserError: the harness is not installed.
    """
    adapter = importlib.import_module("mlm.adapters.harness")
    metrics = importlib.import_module("lm_eval.api.metrics")
    task = importlib.import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    docs = [{"page": page} for page in pages]
    asked = [SimpleNamespace(args=(task.wikitext_detokenizer(doc),)) for doc in docs]
    found = adapter.HarnessLM(model, rule).loglikelihood_rolling(asked)
    results = [task.process_results(doc, [nats]) for doc, nats in zip(docs, found, strict=True)]
    items = {name: [result[name] for result in results] for name in results[0]}
    values = {n: metrics.weighted_perplexity(items[n]) for n in items if n != "bits_per_byte"}
    values["bits_per_byte"] = metrics.bits_per_byte(items["bits_per_byte"])
    words, size = (sum(n for _, n in items[f"{of}_perplexity"]) for of in ("word", "byte"))
    return Read(-sum(found), words, size), values


def row(own: Read, other: Read) -> dict[str, float | None]:
    """Our count, its conversion to the harness's, and what counting and spelling bring.

    These two are nats per word; they add up to the difference of the logarithms.
    """
    mine, converted = own.nats / own.words, own.nats / other.words
    return {
        "perplexity": perplexity(own.nats, own.words),
        "converted": perplexity(own.nats, other.words),
        "counting": converted - mine,
        "spelling": other.nats / other.words - converted,
        "bits per byte": own.nats / math.log(2) / own.bytes,
    }


def without_unknown(texts: Sequence[str]) -> list[str]:
    """The articles without the lines that hold `<unk>`; those without words are left out."""
    lines = [[line for line in text.split("\n") if UNK not in line.split()] for text in texts]
    return [text for text in map("\n".join, lines) if text.strip()]


def main() -> None:
    """Read everything with every rule, twice, and write."""
    options = tyro.cli(Options, description=__doc__)
    importlib.import_module("mlm.adapters.harness")  # says so if the harness is missing
    if options.articles < 0:
        raise UserError(f"--articles {options.articles}: give 0 for all, or a number of articles")
    model = mlm.load(options.model, threads=options.threads)
    rules = model.resolved(options.rules or (STATIC,))
    for rule in rules:  # one that has no settings is refused before the work
        model.ready(rule, "article")
    articles = open_corpus(options.corpus, whole=True).articles(options.split)
    every = [a.text for a in itertools.islice(articles, options.articles or None)]
    texts = {"all lines": every}
    if (kept := without_unknown(every)) and kept != every:
        texts["lines without unknown words"] = kept
    rows: list[dict[str, Any]] = []
    for name, chosen in texts.items():
        for rule in rules:
            say(f"{name}, {rule_label(rule)}")
            own, (other, values) = ours(model, chosen, rule), harness(model, chosen, rule)
            about = {"text": name, "rule": rule_label(rule), **row(own, other), **values}
            rows.append(about | {"ours": own._asdict(), "harness": other._asdict()})
    used = versions() | {"lm_eval": importlib.metadata.version("lm_eval")}
    shown = [key for key in rows[0] if key not in ("ours", "harness")]
    record("harness", rows, options, shown, versions=used, articles=len(every))


if __name__ == "__main__":
    run_cli(main)
