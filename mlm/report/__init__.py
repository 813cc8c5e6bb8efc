"""Tables, statistics and pictures of a run, made from its files alone."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.report.evaluation import (
        bootstrap_interval,
        evaluate_rows,
        merge_evaluation,
        position_gains,
        read_evaluation,
        write_evaluation,
    )
    from mlm.report.losses import LossTable, column_name, splits, write_losses
    from mlm.report.plots import draw_all
    from mlm.report.tables import Row, evaluation_markdown, format_totals

__all__ = [
    "LossTable",
    "Row",
    "bootstrap_interval",
    "column_name",
    "draw_all",
    "evaluate_rows",
    "evaluation_markdown",
    "format_totals",
    "merge_evaluation",
    "position_gains",
    "read_evaluation",
    "splits",
    "write_evaluation",
    "write_losses",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "evaluation": "bootstrap_interval evaluate_rows merge_evaluation "
        "position_gains read_evaluation write_evaluation",
        "losses": "LossTable column_name splits write_losses",
        "plots": "draw_all",
        "tables": "Row evaluation_markdown format_totals",
    },
)
