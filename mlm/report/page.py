"""The word-loss page: one HTML file, offline, in which every word is coloured by how much better
or worse one rule predicted it than another.

The interactive form of the right half of Figure 2 of Wolf et al. 2018 (arXiv 1803.10631).
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
from mlm.base.names import EOS, STATIC, rule_label, rule_texts
from mlm.report.figure2 import winner
from mlm.report.losses import LossTable, column_name
from mlm.report.word_picture import BETTER, CLIP_PERCENTILE, COLOUR_POWER, WORSE

WORD_LIMIT = 60_000


_SCALE = 100  # losses are kept in hundredths of a nat


_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class WordLossPage:
    """The page of one split: its first articles, at most `words` words (the last one cut there).

    `html()` is the file; in a notebook the object shows itself. Raises `UserError` if the table
    has nothing to compare.
    """

    table: LossTable
    words: int = WORD_LIMIT
    heading: str = "Word losses"

    def html(self) -> str:
        """Return the whole page: no script, style, font or picture from elsewhere."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # `tojson` writes <, >, & and ' as \u00xx, so that no word can end the script element.
        return environment.get_template(_TEMPLATE).render(
            heading=self.heading, split=self.table.split, data=self.data()
        )

    def data(self) -> dict[str, Any]:
        """Return what the page's script reads: word numbers and losses as little-endian base64."""
        if self.words < 1:
            raise UserError(f"a page of {self.words} words shows nothing; ask for at least 1")
        table = self.table
        protocols = table.compared_protocols()
        texts = rule_texts([rule for protocol in protocols for rule in table.rules(protocol)])
        shown = min(self.words, len(table.word_N))
        words = [str(word) for word in table.word_N[:shown]]
        number = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
        articles = []
        for article, start in zip(table.articles, table.start_A.tolist(), strict=True):
            if start >= shown:
                break
            stop = table.rows(article).stop
            articles.append(
                {
                    "title": table.title(article),
                    "start": start,
                    "words": min(stop, shown) - start,
                    "of": stop - start,
                }
            )
        return {
            "eos": number.get(EOS, -1),
            "vocabulary": list(number),
            "words": _packed(np.array([number[word] for word in words]), "<u4"),
            "articles": articles,
            "all_articles": len(table.articles),
            "scale": _SCALE,
            "protocols": [
                {
                    "name": protocol,
                    "pair": (winner(table, protocol), STATIC),
                    "rules": [
                        {"name": rule, "label": rule_label(rule), "losses": losses}
                        for rule, losses in self._losses(protocol, shown)
                    ],
                }
                for protocol in protocols
            ],
            "about": {text.label: text.about for text in texts},
            "colours": {"better": BETTER, "worse": WORSE},
            "power": COLOUR_POWER,
            "percentile": CLIP_PERCENTILE,
        }

    def _losses(self, protocol: str, shown: int) -> list[tuple[str, str]]:
        packed = []
        for rule in self.table.rules(protocol):
            loss_N = self.table.losses[column_name(rule, protocol)][:shown]
            steps_N = np.clip(np.rint(loss_N * _SCALE), 0, 65535)
            packed.append((rule, _packed(steps_N, "<u2")))
        return packed

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        document = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{document}" title="{html.escape(self.heading, quote=True)}" '
            'style="width:100%;height:720px;border:1px solid #8888;border-radius:6px"></iframe>'
        )


def _packed(numbers: np.ndarray, form: str) -> str:
    return base64.b64encode(numbers.astype(form).tobytes()).decode("ascii")


def write_page(table: LossTable, path: Path, *, words: int = WORD_LIMIT) -> Path:
    """Write the page of `table` to `path`, atomically; return the path."""
    write_text(path, WordLossPage(table, words).html())
    return path
