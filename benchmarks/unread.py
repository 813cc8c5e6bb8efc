"""Articles that a language model's training never reached, as a corpus of their own.

    python -m benchmarks.unread data/wikipedia data/long --skip 20000000 --longer 12000
    python -m benchmarks.unread data/wikipedia data/fresh --skip 25000000 --articles 60

`--train-words N` reads whole articles from the start of the training split until the next one
would pass N words; what stands behind them was read by no stage. The long ones among them tell
whether a gain still grows where the test split has too few articles; any tell what a test split no
longer can that was read again and again. Writes OUT/test.txt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mlm.base.errors import UserError, run_cli
from mlm.base.files import write_text
from mlm.base.terminal import say
from mlm.text.corpora import Article, count_words, open_corpus
from mlm.text.tokens import limited


@dataclass(frozen=True)
class Options:
    """Write the long articles that training did not reach."""

    corpus: Annotated[str, tyro.conf.Positional]
    """A corpus's name or path."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the new corpus."""
    skip: int
    """Words that training read: `--train-words`."""
    longer: int = 0
    """Words that an article must have."""
    articles: int = 32
    """Articles to take, the first ones; 0 = all."""


def unread(corpus: str, skip: int, longer: int = 0) -> Iterator[Article]:
    """Articles of the training split behind the first `skip` words, of `longer` words or more."""
    every = open_corpus(corpus).articles("train")
    read = sum(1 for _ in limited(open_corpus(corpus).articles("train"), skip)) if skip else 0
    for place, article in enumerate(every):
        if place >= read and count_words(article.text) >= longer:
            yield article


def tuned_articles(words_A: Iterable[int], words: int) -> int:
    """How many articles hold the first `words` words, the last one whole: those that a run of
    `--evaluation.tune-words` reads; 0 words = all."""
    read, number = 0, 0
    for count in words_A:
        if words and read >= words:
            break
        read, number = read + count, number + 1
    return number


def write_untuned(corpus: str, words: int, path: Path) -> None:
    """Write the validation articles behind the first `words` words to a file, if it is not there
    with just these.

    Raises:
        UserError: there are none.
    """
    every = list(open_corpus(corpus).articles("valid"))
    begin = tuned_articles((count_words(article.text) for article in every), words)
    if begin == len(every):
        raise UserError(
            f"{corpus}: no validation article is left behind the {words:,} words that are "
            "tuned on; tune on fewer (--evaluation.tune-words), or leave --valid out"
        )
    text = "".join(article.text for article in every[begin:])
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def main() -> None:
    """Write them.

    Raises:
        UserError: training read all of them.
    """
    options = tyro.cli(Options, description=__doc__)
    found = []
    for article in unread(options.corpus, options.skip, options.longer):
        found.append(article)
        if len(found) == options.articles:
            break
    if not found:
        raise UserError(
            f"{options.corpus}: no article of {options.longer:,} words behind the first "
            f"{options.skip:,} words; lower --longer or --skip"
        )
    write_text(options.out / "test.txt", "".join(article.text for article in found))
    words = sum(count_words(article.text) for article in found)
    say(f"{options.out / 'test.txt'}: {len(found)} articles, {words:,} words")


if __name__ == "__main__":
    run_cli(main)
