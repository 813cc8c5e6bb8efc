"""The word-loss page: one HTML file, offline, in which every word is coloured by how much better
or worse one rule predicted it than another.

The interactive form of the right half of Figure 2 of Wolf et al. 2018 (arXiv 1803.10631).
Letters: N words.
"""

from __future__ import annotations

import base64
import html
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mlm.base.errors import UserError
from mlm.base.files import write_text
from mlm.base.names import CACHE, CACHE_TEXT, EOS, RULE_TEXTS, STATIC, rule_label
from mlm.page.top_k import TopK
from mlm.report.drawing import rule_style
from mlm.report.figure2 import letter
from mlm.report.losses import LossTable, column_name, opening_pairs
from mlm.report.word_picture import (
    BETTER,
    CLIP_PERCENTILE,
    COLOUR_POWER,
    ROUND_ENDS,
    UNDERLINED,
    WORSE,
)

WORD_LIMIT = 300_000
"""Words of a page, unless another number is asked for."""

FINEST = 1000
"""Losses are kept in thousandths of a nat, or coarser where the largest would not fit."""

SCRIPTS = ("data", "view", "colours", "text", "word", "charts", "strip", "panel", "save", "hand")
"""The parts of the page's script, in order."""


@dataclass(frozen=True)
class WordLossPage:
    """The page of one split: its first articles, at most `words` words (the last one cut there).

    `all_words` is the number of words that the split has, where the table holds only the first of
    them. `html()` is the file; in a notebook the object shows itself. Raises `UserError` if the
    table has nothing to compare.
    """

    table: LossTable
    words: int = WORD_LIMIT
    heading: str = "Word losses"
    top_k: TopK | None = None
    all_words: int | None = None

    def html(self) -> str:
        """Return the whole page: no script, style, font or picture from elsewhere."""
        here = Path(__file__).parent
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(here),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        scripts = [(here / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
        # `tojson` writes <, >, & and ' as \u00xx, so that no word can end the script element.
        return environment.get_template("page.html.jinja").render(
            heading=self.heading,
            split=self.table.split,
            data=self.data(),
            style=(here / "page.css").read_text(encoding="utf-8"),
            script="\n".join(scripts),
        )

    def data(self) -> dict[str, Any]:
        """Return what the page's script reads: numbers of words and losses as base64."""
        if self.words < 1:
            raise UserError(f"a page of {self.words} words shows nothing; ask for at least 1")
        table = self.table
        protocols = table.compared_protocols()
        shown = min(self.words, len(table.word_N))
        words = [str(word) for word in table.word_N[:shown]]
        number = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
        largest = max(float(loss_N[:shown].max()) for loss_N in table.losses.values())
        scale = int(np.clip(65535 / max(largest, 1e-9), 1, FINEST))
        return {
            "split": table.split,
            "heading": self.heading,
            "eos": number.get(EOS, -1),
            "vocabulary": list(number),
            "words": _packed(np.array([number[word] for word in words]), "<u4"),
            "articles": self._articles(shown),
            "all_articles": len(table.articles),
            "all_words": max(self.all_words or 0, len(table.word_N)),
            "scale": scale,
            "protocols": [self._protocol(name, shown, scale) for name in protocols],
            "top_k": self.top_k and self.top_k.packed(table, shown),
            "colours": {"better": BETTER, "worse": WORSE},
            "power": COLOUR_POWER,
            "percentile": CLIP_PERCENTILE,
            "round_ends": ROUND_ENDS,
            "underlined": UNDERLINED,
        }

    def _articles(self, shown: int) -> list[dict[str, Any]]:
        """The articles that begin within the first `shown` words."""
        table, found = self.table, []
        for place, (start, words) in enumerate(zip(table.start_A, table.words_A, strict=True)):
            if start < shown:
                found.append(
                    {
                        "letter": letter(place),
                        "title": table.title(table.articles[place]),
                        "start": int(start),
                        "words": int(min(words, shown - start)),
                        "of": int(words),
                    }
                )
        return found

    def _protocol(self, name: str, shown: int, scale: int) -> dict[str, Any]:
        """The rules of a protocol with their losses, in steps of 1 / `scale` nats."""
        rules = []
        names = self.table.rules(name)
        for rule in names:
            loss_N = self.table.losses[column_name(rule, name)][:shown]
            steps_N = np.clip(np.rint(loss_N.astype(np.float64) * scale), 0, 65535)
            style = rule_style(rule, names)
            rules.append(
                {
                    "name": rule,
                    "label": rule_label(rule),
                    "about": about(rule),
                    "colour": style["color"],
                    "losses": _packed(steps_N, "<u2"),
                }
            )
        return {"name": name, "pairs": opening_pairs(self.table, name), "rules": rules}

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        document = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{document}" title="{html.escape(self.heading, quote=True)}" '
            'style="width:100%;height:720px;border:1px solid #8888;border-radius:6px"></iframe>'
        )


def about(rule: str) -> str:
    """Return what a rule does, in one line; empty for a rule that is not known."""
    base = rule.removesuffix(CACHE)
    if base == STATIC and rule != base:
        return CACHE_TEXT.about
    text = RULE_TEXTS[base].about if base in RULE_TEXTS else ""
    return text if rule == base else f"{text}; with {CACHE_TEXT.about}".removeprefix("; ")


def _packed(numbers: np.ndarray, form: str) -> str:
    return base64.b64encode(numbers.astype(form).tobytes()).decode("ascii")


def write_page(
    table: LossTable,
    path: Path,
    *,
    words: int = WORD_LIMIT,
    top_k: TopK | None = None,
    all_words: int | None = None,
) -> Path:
    """Write the page of `table` (see `WordLossPage`) to `path`, atomically; return the path."""
    page = WordLossPage(table, words, top_k=top_k, all_words=all_words)
    write_text(path, page.html())
    return path
