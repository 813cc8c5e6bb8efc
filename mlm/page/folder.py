"""Everything that a folder with results can show: the pictures, and the page beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm.page.page import WORD_LIMIT, write_page
from mlm.page.top_k import FILE, TopK
from mlm.report.losses import LossTable, opening_pairs
from mlm.report.plots import draw_all


def draw_run(
    run_dir: Path,
    split: str | None = None,
    articles: int = 8,
    *,
    page_words: int = WORD_LIMIT,
    **how: Any,
) -> list[Path]:
    """Draw every picture and write `words.html` (`only`: "page"); return the paths.

    The page holds the first `page_words` words; that of a split which is not the default one has
    the split's name as a suffix. What `evaluate.py --top-k` stored is shown too. `how`: see
    `mlm.report.draw_all`.
    """

    def page(table: LossTable, suffix: str) -> list[Path]:
        protocol = table.compared_protocols()[0]
        opens_on = opening_pairs(table, protocol)[0][0], protocol
        top_k = TopK.load(run_dir / FILE, table.split, opens_on)
        return [write_page(table, run_dir / f"words{suffix}.html", words=page_words, top_k=top_k)]

    return draw_all(run_dir, split, articles, beside={"page": page}, **how)
