"""Everything that a folder with results can show: the pictures, and the page beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlm.page.page import WORD_LIMIT, write_page
from mlm.page.top_k import FILE, TopK
from mlm.report.drawing import PAPER, Look
from mlm.report.losses import LossTable, default_split, splits
from mlm.report.plots import PAGE, draw_all


def draw_run(
    run_dir: Path,
    split: str | None = None,
    articles: int = 8,
    *,
    first: int = 0,
    protocol: str | None = None,
    passage: tuple[int, int] | None = None,
    pair: tuple[str | None, str | None] = (None, None),
    only: Sequence[str] = (),
    look: Look = PAPER,
    page_words: int = WORD_LIMIT,
) -> list[Path]:
    """Draw every picture (`mlm.report.draw_all`) and write `words.html` (`only`: "page"); return
    the paths.

    The page holds the first `page_words` words; that of a split which is not the default one has
    the split's name as a suffix. What `evaluate.py --top-k` stored is shown too.
    """
    paths = draw_all(
        run_dir,
        split,
        articles,
        first=first,
        protocol=protocol,
        passage=passage,
        pair=pair,
        only=only,
        look=look,
    )
    if only and PAGE not in only:
        return paths
    file = run_dir / "losses.parquet"
    table = LossTable.load(file, split)
    suffix = "" if table.split == default_split(splits(file)) else f"_{table.split}"
    top_k = TopK.load(run_dir / FILE, table.split)
    page = run_dir / f"words{suffix}.html"
    return [*paths, write_page(table, page, words=page_words, top_k=top_k)]
