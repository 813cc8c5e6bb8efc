"""Synthetic text of WikiText-103's shape, to try a full-size run where that text is not at hand.

    python -m benchmarks.wikitext103_shape --out DIR
    python -m benchmarks.wikitext103_shape --fraction 0.01 --out DIR

The whole has 28,475 articles, 103,227,021 words and 267,735 types, line ends and `<unk>` counted as
in WikiText; validation and test have 60 articles each. It is in WikiText's own form: titles,
headings, paragraphs. Words are drawn by Zipf's law, a part of them from a few dozen that an article
uses again and again, so that there is something to adapt to; every type occurs. A fraction has so
many of the articles and words, and types by its square root. The same seed gives the same files.

A trial at full size on a CPU (stage 1 for about an hour, two steps of stage 2, 60 articles):

    python train.py --size awd --corpus DIR --out runs/shape --stages lm --epochs 0.01 \\
        --lm.validations 2 --lm.validation-words 20000
    python train.py --out runs/shape --stages meta --train-rules three_levels --meta-steps 2 \\
        --adapt.fisher-words 20000 --budget 2 --evaluation.tune-words 10000
    python evaluate.py runs/shape --rules static rms three_levels --budget 2

Each command says first what it needs and how long it takes. The days of a whole run are what
`python train.py --size awd --corpus DIR` predicts before stage 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.output import HOME
from mlm.base.errors import UserError, run_cli
from mlm.base.files import atomic_path

ARTICLES, WORDS, TYPES = 28_475, 103_227_021, 267_735
OTHERS = {"valid": (60, 217_646), "test": (60, 245_569)}
"""Articles and words of the other splits."""
TOPIC, SHARE = 40, 0.15
"""Types that an article uses again and again, and the share of its words that they are."""
MARKS = (",", ".", "the", "of", "and", "in")
"""The most frequent types."""
UNKNOWN = 0.004
"""Share of `<unk>`."""
PARAGRAPH, SECTION = 110, 5
"""Words of a paragraph, paragraphs of a section: on average."""
SMALLEST = 30
"""Words of an article."""


class Words:
    """Types in the order of their frequency, and how to draw them."""

    def __init__(self, types: int) -> None:
        found = (_spelled(k, "etaoinshrdlu") for k in itertools.count())
        others = (name for name in found if name not in MARKS)
        self.names = np.array([*MARKS, *itertools.islice(others, types - len(MARKS))])
        shares = 1 / (np.arange(1, types + 1) + 2.7)  # Mandelbrot
        self.below = np.cumsum(shares / shares.sum())

    def draw(self, number: int, random: np.random.Generator) -> np.ndarray:
        """So many types (N,)."""
        return np.searchsorted(self.below, random.random(number)).clip(max=len(self.names) - 1)


def _spelled(number: int, letters: str) -> str:
    """A word of at least two letters, another for every number."""
    number += len(letters)
    found = ""
    while number:
        number, k = divmod(number, len(letters))
        found += letters[k]
    return found


def article(words: Words, size: int, must: np.ndarray, random: np.random.Generator) -> str:
    """An article of exactly `size` words, line ends counted, with the types that `must` occur."""
    types = words.draw(size, random)
    topic = words.draw(TOPIC, random)
    again = random.random(size) < SHARE
    types[again] = random.choice(topic, int(again.sum()))
    title = " ".join(words.names[topic[:2]])
    lines = ["", f" = {title} = ", ""]
    left = size - 3 - 4
    places = random.choice(left // 2, min(len(must), left // 4), replace=False)
    types[places] = must[: len(places)]
    spelled = words.names[types].astype(object)
    spelled[random.random(size) < UNKNOWN] = "<unk>"
    spelled[places] = words.names[must[: len(places)]]
    at = 0
    for k in range(1, size):
        if left <= 0:
            break
        if k % (SECTION + 1) == 0 and left > 20:
            lines += [f" = = {' '.join(spelled[at : at + 2])} = = ", ""]
            at, left = at + 2, left - 8
        length = min(left - 1, 10 + int(random.exponential(PARAGRAPH - 10)))
        text = " ".join(spelled[at : at + length])
        lines.append(f" {text} " if text else "")
        at, left = at + length, left - length - 1
        if left > 0:
            lines.append("")
            left -= 1
    return "".join(line + "\n" for line in lines)


def articles(
    words: Words, number: int, total: int, every: bool, random: np.random.Generator
) -> Iterator[str]:
    """So many articles of `total` words together; with `every`, all types occur."""
    lengths = np.exp(random.normal(0, 0.8, number))
    sizes = SMALLEST + np.floor(lengths / lengths.sum() * (total - SMALLEST * number)).astype(int)
    sizes[np.argmax(sizes)] += total - sizes.sum()
    order = random.permutation(len(words.names)) if every else np.zeros(0, dtype=int)
    # Long articles take more of the types that must occur.
    ends = np.round(np.cumsum(sizes) / total * len(order)).astype(int)
    for size, lo, hi in zip(sizes, [0, *ends[:-1]], ends, strict=True):
        yield article(words, int(size), order[lo:hi], random)


def write(folder: Path, fraction: float = 1.0, seed: int = 0) -> None:
    """The three splits, as `wiki.train.tokens` and so on.

    Raises:
        UserError: a fraction that leaves no text, or more than all.
    """
    if not 1e-4 <= fraction <= 1:
        raise UserError(f"--fraction {fraction}: it must be from 0.0001 to 1")
    # `<unk>`, `=` and the line end are types, too.
    types = max(50, round(TYPES * math.sqrt(fraction)) - 3)
    words = Words(types)
    parts = {"train": (ARTICLES, WORDS), **OTHERS}
    for k, (split, (number, total)) in enumerate(parts.items()):
        share = fraction if split == "train" else min(1.0, max(0.05, fraction))
        number, total = max(3, round(number * share)), round(total * share)
        random = np.random.default_rng([seed, k])
        with atomic_path(folder / f"wiki.{split}.tokens") as path, open(path, "w") as file:
            for text in articles(words, number, total, split == "train", random):
                file.write(text)


def main() -> None:
    """Write the files that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fraction", type=float, default=1.0, help="of the whole (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HOME / "wikitext103_shape")
    given = parser.parse_args()
    write(given.out, given.fraction, given.seed)
    print(given.out)


if __name__ == "__main__":
    run_cli(main)
