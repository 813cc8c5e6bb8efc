"""What a model expected where every word stands, before and after adaptation (`top_k.parquet`).

One row per word of one split, rule and protocol; words may be left out. Ranks, entropies and the
likeliest pieces are those of the word's first piece: `before` under the static model, `after` under
the rule. Letters: W words of the file, K likeliest pieces.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlm.base.errors import UserError
from mlm.base.files import atomic_path
from mlm.report.losses import LossTable

FILE = "top_k.parquet"
"""Its name in a folder with results."""

TIMES = ("before", "after")

_PIECES = pa.list_(pa.string())

SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("rule", pa.string()),
        ("protocol", pa.string()),
        ("article", pa.int32()),
        ("position", pa.int32()),
        ("pieces", _PIECES),
        *((f"rank_{time}", pa.int32()) for time in TIMES),
        *((f"entropy_{time}", pa.float32()) for time in TIMES),
        *((f"pieces_{time}", _PIECES) for time in TIMES),
        *((f"probabilities_{time}", pa.list_(pa.float32())) for time in TIMES),
    ]
)
"""Entropies are in nats; `pieces` are the word's own."""


@dataclass(frozen=True)
class TopK:
    """The rows of one split, rule and protocol, ordered by article, then position."""

    rule: str
    protocol: str
    rows: pa.Table

    @classmethod
    def load(cls, path: Path, split: str) -> TopK | None:
        """Read the rows of a split; None if there is no such file or it has none of the split.

        Raises `UserError` if the file cannot be read as such a table.
        """
        if not path.is_file():
            return None
        try:
            with open(path, "rb") as file:
                table = pq.read_table(file, columns=SCHEMA.names)
            table = table.select(SCHEMA.names).cast(SCHEMA)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); delete it, or run "
                "evaluate.py with --top-k again"
            ) from error
        table = table.filter(pc.field("split") == split)
        if not table.num_rows:
            return None
        rule, protocol = table["rule"][0].as_py(), table["protocol"][0].as_py()
        same = (pc.field("rule") == rule) & (pc.field("protocol") == protocol)
        table = table.filter(same).sort_by([("article", "ascending"), ("position", "ascending")])
        return cls(rule, protocol, table)

    def packed(self, table: LossTable, shown: int) -> dict[str, Any] | None:
        """Return the rows of the first `shown` words of `table` for the page's script.

        None if there are none. Piece lists of different lengths are filled up with -1.
        """
        starts = dict(zip(table.articles, table.start_A.tolist(), strict=True))
        lengths = dict(zip(table.articles, table.words_A.tolist(), strict=True))
        article_W, position_W = (self.rows[n].to_numpy() for n in ("article", "position"))
        inside_W = np.array(
            [p < lengths.get(int(a), 0) for a, p in zip(article_W, position_W, strict=True)], bool
        )
        row_W = np.array([starts.get(int(a), 0) for a in article_W], np.int64) + position_W
        keep = np.flatnonzero(inside_W & (row_W < shown))
        if not len(keep):
            return None
        rows = self.rows.take(pa.array(keep))
        names: dict[str, int] = {}
        found: dict[str, Any] = {"rule": self.rule, "protocol": self.protocol}
        found["rows"] = _base64(row_W[keep], "<u4")
        own = rows["pieces"].to_pylist()
        found["own"] = _numbers(own, names)
        for time in TIMES:
            found[f"rank_{time}"] = _base64(rows[f"rank_{time}"].to_numpy(), "<u4")
            found[f"entropy_{time}"] = _base64(rows[f"entropy_{time}"].to_numpy(), "<f4")
            found[f"best_{time}"] = _numbers(rows[f"pieces_{time}"].to_pylist(), names)
            found[f"probability_{time}"] = _rectangle(
                rows[f"probabilities_{time}"].to_pylist(), 0.0, "<f4"
            )
        found["pieces"] = list(names)
        return found


def write_top_k(path: Path, split: str, rows: pa.Table) -> None:
    """Write the rows of a split to `top_k.parquet`, atomically; those of other splits stay.

    A file that cannot be read is replaced.
    """
    kept = []
    if path.exists():
        try:
            with open(path, "rb") as file:
                old = pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA)
            kept = [old.filter(pc.field("split") != split)]
        except (pa.ArrowException, OSError, ValueError):
            kept = []
    whole = pa.concat_tables([*kept, rows.cast(SCHEMA)])
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(whole, file, compression="zstd")


def _numbers(lists: list[list[str]], names: dict[str, int]) -> dict[str, Any]:
    """Pieces by their number in `names`, which grows by those that are new."""
    return _rectangle([[names.setdefault(p, len(names)) for p in row] for row in lists], -1, "<i4")


def _rectangle(lists: list[list[Any]], filling: float, form: str) -> dict[str, Any]:
    width = max(map(len, lists))
    full = np.array([[*row, *[filling] * (width - len(row))] for row in lists])
    return {"width": width, "values": _base64(full, form)}


def _base64(numbers: np.ndarray, form: str) -> str:
    return base64.b64encode(numbers.astype(form).tobytes()).decode("ascii")
