"""Check a model's promises on a text: mlm audit runs/pydocs [--corpus TEXT] [--help]"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlm.base.errors import UserError
from mlm.base.names import check_rules
from mlm.cli.flags import options_of
from mlm.cli.inputs import open_sources

if TYPE_CHECKING:
    from mlm.reader import TrainedModel
    from mlm.reader.audit import Check, Document, Training
    from mlm.settings.config import Config

HELP = """\
usage: {script} MODEL [FLAGS]

Check on a model and a text what the numbers rest on: no loss depends on what comes later, every
prediction sums to one, lanes and chunks change nothing, every word and byte is counted, and no
scored document stands in the training text. Exit code 1 if a check fails.

examples:
  {script} runs/pydocs
  {script} wikipedia-small --corpus book.txt --rules static best
"""


@dataclass(frozen=True)
class Options:
    """What `mlm audit` asks for."""

    model: str = "wikipedia-small"
    """A released model, a run folder, or a model on the hub."""
    corpus: str | None = None
    """A text file, or a corpus as for training; by default the one of the run."""
    split: Literal["train", "valid", "test"] = "valid"
    """Of a corpus that has splits."""
    rules: tuple[str, ...] = ("static", "best")
    """Rules to check."""
    protocols: tuple[Literal["article", "stream"], ...] = ("article", "stream")
    """Protocols to check."""
    audit_words: int = 2000
    """So many words of the text are read; the training text is searched for all of it."""
    seed: int = 0
    """Chooses the places where the text is changed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int = 0
    """CPU threads; 0 = chosen by the model's size."""


def main() -> None:
    """Parse the command line, check, print the table."""
    options = options_of(HELP, Options(), ("model",))
    if options is not None:
        check_rules(options.rules)
        audit_model(options)


def audit_run(model: str, config: Config, corpus: str | None) -> None:
    """What `evaluate.py RUN --audit` does: all checks with the rules and texts of an evaluation."""
    evaluation = config.evaluation
    audit_model(
        Options(
            model,
            corpus,
            evaluation.split,
            tuple(dict.fromkeys(["static", *evaluation.rules])),
            evaluation.protocols,
            device=config.device,
            threads=config.threads,
        )
    )


def audit_model(options: Options) -> None:
    """Run all checks and print them one by one; exit with 1 if one fails."""
    from mlm.reader import load
    from mlm.reader.audit import audit

    model = load(options.model, device=options.device, threads=options.threads)
    rules = model.resolved(options.rules)
    documents, training = _documents(model, options), _training(model)
    print(f"model {model.name}: {len(documents):,} document(s) of {_corpus(model, options)}")
    print(f"training text: {'not available' if training is None else model.config.corpus}\n")
    checks = []
    for check in audit(
        model,
        documents,
        rules,
        options.protocols,
        training,
        options.audit_words,
        options.seed,
    ):
        checks.append(check)
        print(format_check(check), flush=True)
    print(f"\n{format_verdict(checks)}")
    if any(check.passed is False for check in checks):
        raise SystemExit(1)


def _corpus(model: TrainedModel, options: Options) -> str:
    return options.corpus or model.config.corpus


def _released(model: TrainedModel) -> bool:
    from mlm.store.run_folder import RunFolder

    return RunFolder(model.folder).released


def _documents(model: TrainedModel, options: Options) -> list[Document]:
    """The documents to score.

    Raises:
        UserError: there is no such text, or no word in it.
    """
    from mlm.reader.audit import Document
    from mlm.text.corpora import NAMED, open_corpus

    name = _corpus(model, options)
    if name not in (*NAMED, model.config.corpus) and Path(name).expanduser().is_file():
        return _of_file(name)
    if _released(model) and options.corpus is None and name not in NAMED:
        raise UserError(f"{model.name} holds no text; name one with --corpus, such as a text file")
    try:
        articles = list(open_corpus(name).articles(options.split))
    except UserError as error:
        if options.corpus:
            raise
        raise UserError(f"{error}. Or name another text with --corpus") from None
    found = [Document(a.title, a.text, "wikitext") for a in articles if a.text.strip()]
    if not found:
        raise UserError(
            f"{name}, split {options.split}: no article with a word in it; check the corpus"
        )
    return found


def _of_file(name: str) -> list[Document]:
    """The articles of a file in WikiText form, or any other text file as one document."""
    from mlm.reader.audit import Document
    from mlm.text.articles import split_articles

    (source,) = open_sources([name])
    text = "".join(chunk for chunks in source.read() for chunk in chunks)
    if source.form == "wikitext":
        try:
            articles = list(split_articles(text.splitlines(keepends=True), name))
        except UserError:  # tokenised as WikiText is, without its titles
            articles = []
        if articles:
            return [Document(a.title, a.text, "wikitext") for a in articles]
    return [Document(source.name, text, source.form)]


def _training(model: TrainedModel) -> Training | None:
    """The model's training text; None where it is not here."""
    from mlm.text.corpora import open_corpus
    from mlm.text.tokens import limited

    if _released(model):  # a corpus of that name here may be another one
        return None
    config = model.config

    def articles() -> Iterator[str]:
        corpus = open_corpus(config.corpus).articles("train")
        return (article.text for article in limited(corpus, config.text.train_words))

    try:
        next(articles())
    except (UserError, OSError, StopIteration):
        return None
    return articles


def format_check(check: Check) -> str:
    """A check as two lines for the terminal: verdict and worst deviation, then what was done."""
    verdict = {True: "pass", False: "FAIL", None: "not checked"}[check.passed]
    about = textwrap.wrap(check.about, 84, initial_indent=" " * 13, subsequent_indent=" " * 13)
    return "\n".join([f"{verdict:<13}{check.name}; worst: {check.worst}", *about])


def format_verdict(checks: Sequence[Check]) -> str:
    """How many checks failed or could not be done."""
    failed = sum(check.passed is False for check in checks)
    unknown = sum(check.passed is None for check in checks)
    passed = len(checks) - failed - unknown
    return f"{passed} passed, {failed} failed, {unknown} not checked"
