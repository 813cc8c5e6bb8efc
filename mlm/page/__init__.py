"""The page that shows every word in a colour, made from run files alone."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.page.folder import draw_run
    from mlm.page.page import WordLossPage, write_page
    from mlm.page.passage import passage_in_colours
    from mlm.page.top_k import TopK

__all__ = ["TopK", "WordLossPage", "draw_run", "passage_in_colours", "write_page"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "folder": "draw_run",
        "page": "WordLossPage write_page",
        "passage": "passage_in_colours",
        "top_k": "TopK",
    },
)
