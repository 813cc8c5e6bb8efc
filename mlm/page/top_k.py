"""What a model expected where every word stands, before and after adaptation (`top_k.parquet`).

One row per word of a split, rule and protocol; words may be left out. Ranks, entropies and the
likeliest pieces are those of the word's first piece: `before` under the static model, `after` under
the rule. Letters: W words of the file, K likeliest pieces.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlm.base.errors import UserError
from mlm.base.files import atomic_path
from mlm.base.names import rule_order
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


TOP_K_WORDS = 20_000
"""Words of a split that evaluation stores, the first ones: about 5 MB of a page with K = 5."""


class Placed(NamedTuple):
    """Words of a split."""

    article: np.ndarray
    """(W,) index in the split."""
    position: np.ndarray
    """(W,) word within its article."""
    pieces: list[list[int]]
    """Numbers of each word's own pieces."""


class Expected(NamedTuple):
    """What was expected where W words stand, of their first pieces."""

    rank: np.ndarray
    """(W,); 1 = the most likely."""
    entropy: np.ndarray
    """(W,) nats."""
    pieces: np.ndarray
    """(W, K) numbers of the likeliest."""
    probabilities: np.ndarray
    """(W, K)."""


@dataclass(frozen=True)
class TopK:
    """The rows of one split, rule and protocol, ordered by article, then position."""

    rule: str
    protocol: str
    rows: pa.Table

    @classmethod
    def load(cls, path: Path, split: str, first: tuple[str, str] = ("", "")) -> TopK | None:
        """Read rows of a split; None if there is no such file or it has none of the split.

        Of several rules and protocols `first` is taken, if it is there.
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
        pairs = sorted((p, rule_order(r), r) for s, r, p in _whose(table) if s == split)
        found = [(rule, protocol) for protocol, _, rule in pairs]
        if not found:
            return None
        rule, protocol = first if first in found else found[0]
        own = table.filter(_of(split, rule, protocol))
        return cls(rule, protocol, own.sort_by([(n, "ascending") for n in ("article", "position")]))

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


def top_k_rows(
    of: tuple[str, str, str],
    placed: Placed,
    before: Expected,
    after: Expected,
    names: Sequence[str],
) -> pa.Table:
    """The rows of W words: `of` names split, rule and protocol, `names` spells every piece."""
    words, spelled = len(placed.pieces), pa.array(names, pa.string())
    columns: dict[str, Any] = {
        name: pa.repeat(pa.scalar(value), words)
        for name, value in zip(("split", "rule", "protocol"), of, strict=True)
    }
    own = pa.array(placed.pieces, pa.list_(pa.int32()))
    columns |= {"article": placed.article, "position": placed.position}
    columns["pieces"] = pa.ListArray.from_arrays(own.offsets, spelled.take(own.values))
    for time, found in zip(TIMES, (before, after), strict=True):
        number, best = found.pieces.shape
        ends = pa.array(np.arange(number + 1) * best, pa.int32())
        pieces = spelled.take(pa.array(found.pieces.ravel()))
        chances = pa.array(found.probabilities.ravel(), pa.float32())
        columns[f"rank_{time}"], columns[f"entropy_{time}"] = found.rank, found.entropy
        columns[f"pieces_{time}"] = pa.ListArray.from_arrays(ends, pieces)
        columns[f"probabilities_{time}"] = pa.ListArray.from_arrays(ends, chances)
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in SCHEMA], schema=SCHEMA)


def write_top_k(
    path: Path, rows: Sequence[pa.Table], stands: Callable[[str, str, str], bool]
) -> set[tuple[str, str, str]]:
    """Write new rows to `top_k.parquet`, atomically, and drop what does not stand any more.

    Args:
        rows: tables that are each of one split, rule and protocol; they replace those there.
        stands: whether the rows there of a split, rule and protocol may stay.

    Returns:
        whose rows go without new ones. A file that cannot be read is replaced if there are new
        rows, and left alone otherwise; one without a row goes.
    """
    old, new = SCHEMA.empty_table(), pa.concat_tables([SCHEMA.empty_table(), *rows])
    if path.exists():
        try:
            with open(path, "rb") as file:
                old = pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA)
        except (pa.ArrowException, OSError, ValueError):
            pass
    given, there = _whose(new), _whose(old)
    kept = {one for one in there - given if stands(*one)}
    if not given and kept == there:
        return set()
    parts = [old.filter(_of(*one)) for one in sorted(kept)]
    whole = pa.concat_tables([*parts, new])
    if not whole.num_rows:
        path.unlink()
        return there
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(whole, file, compression="zstd")
    return there - given - kept


def _whose(rows: pa.Table) -> set[tuple[str, str, str]]:
    """Splits, rules and protocols of the rows."""
    found = rows.select(["split", "rule", "protocol"]).group_by(["split", "rule", "protocol"])
    return {(r["split"], r["rule"], r["protocol"]) for r in found.aggregate([]).to_pylist()}


def _of(split: str, rule: str, protocol: str) -> Any:
    """The rows of a split, rule and protocol."""
    known = pc.field("split") == split, pc.field("rule") == rule
    return known[0] & known[1] & (pc.field("protocol") == protocol)


def _numbers(lists: list[list[str]], names: dict[str, int]) -> dict[str, Any]:
    """Pieces by their number in `names`, which grows by those that are new."""
    return _rectangle([[names.setdefault(p, len(names)) for p in row] for row in lists], -1, "<i4")


def _rectangle(lists: list[list[Any]], filling: float, form: str) -> dict[str, Any]:
    width = max(map(len, lists))
    full = np.array([[*row, *[filling] * (width - len(row))] for row in lists])
    return {"width": width, "values": _base64(full, form)}


def _base64(numbers: np.ndarray, form: str) -> str:
    return base64.b64encode(numbers.astype(form).tobytes()).decode("ascii")
