"""Tables of word losses -> files: Parquet, TSV, neural-complexity's form, a page of words.

Rows are written as they come, and a file appears only when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlm.base.errors import UserError
from mlm.base.files import atomic_path
from mlm.base.names import EOS, STATIC
from mlm.page.page import WORD_LIMIT, write_page
from mlm.report.losses import LossTable, column_name

Write = Callable[[pa.Table], None]
"""Takes further rows, losses in bits."""

ROW_GROUP = 1 << 16
"""Rows that are held before they are written to a Parquet file."""

_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def in_nats(table: pa.Table) -> pa.Table:
    """The table with bits as nats: surprisals, entropy, and what the likeliest pieces cost."""
    for place, field in enumerate(table.schema):
        column = table[field.name].combine_chunks()
        if field.name.startswith("surprisal") or field.name == "entropy":
            new = pa.array(column.to_numpy(zero_copy_only=False) * math.log(2), field.type)
        elif field.name == "top_k":
            new = _top_k_in_nats(column)
        else:
            continue
        metadata = {k: v.replace(b"bits", b"nats") for k, v in (field.metadata or {}).items()}
        field = field.with_type(new.type).with_metadata(metadata)
        table = table.set_column(place, field, new)
    return table


def _top_k_in_nats(column: pa.Array) -> pa.Array:
    kind = pa.list_(pa.struct([("piece", pa.string()), ("nats", pa.float64())]))
    rows = [
        row and [{"piece": e["piece"], "nats": e["bits"] * math.log(2)} for e in row]
        for row in column.to_pylist()
    ]
    return pa.array(rows, kind)


def check_output(path: Path, suffixes: tuple[str, ...], flag: str) -> None:
    """Refuse a file name before anything is computed for it.

    Raises:
        UserError: another ending, or a folder of that name.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{flag} {path}: its name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")


@contextlib.contextmanager
def table_file(path: Path, units: str = "bits") -> Iterator[Write]:
    """Write all columns to a `.parquet` or `.tsv` file.

    In a TSV file `\\n`, `\\r`, `\\t` and `\\\\` in words are escaped with a backslash, nothing is
    quoted, `top_k` is JSON, and what is missing is empty.
    """
    kind = _parquet if path.suffix.lower() == ".parquet" else _tsv
    with atomic_path(path) as temporary, kind(temporary) as write:
        yield (lambda table: write(in_nats(table))) if units == "nats" else write


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    held: list[pa.Table] = []
    with contextlib.ExitStack() as stack:
        writers: list[pq.ParquetWriter] = []

        def flush() -> None:
            whole = pa.concat_tables(held)
            held.clear()
            if not writers:
                # Opened here: Arrow encodes names as UTF-8, whatever the file system says.
                file = stack.enter_context(open(path, "wb"))
                writer = pq.ParquetWriter(file, whole.schema, compression="zstd")
                writers.append(stack.enter_context(writer))
            writers[0].write_table(whole)

        def write(table: pa.Table) -> None:
            held.append(table)
            if sum(part.num_rows for part in held) >= ROW_GROUP:
                flush()

        yield write
        if held:
            flush()


@contextlib.contextmanager
def _tsv(path: Path) -> Iterator[Write]:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        begun = False

        def write(table: pa.Table) -> None:
            nonlocal begun
            if not begun:
                file.write("\t".join(table.column_names) + "\n")
                begun = True
            columns = [[_cell(v) for v in table[n].to_pylist()] for n in table.column_names]
            file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))

        yield write


def _cell(value: Any) -> str:
    """A value as it stands in a TSV file."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str):
        return value.translate(_ESCAPES)
    if isinstance(value, list):
        pairs = [[e["piece"], round(e["bits" if "bits" in e else "nats"], 6)] for e in value]
        return json.dumps(pairs, ensure_ascii=False).translate(_ESCAPES)
    return str(value)


@contextlib.contextmanager
def neural_complexity_file(path: Path) -> Iterator[Write]:
    """Write what the program neural-complexity prints (van Schijndel & Linzen 2018), for scripts
    that read it.

    The columns are `word sentid sentpos wlen surp entropy`, separated by tabs in a `.tsv` file and
    by spaces, as there, in any other. Sentences are counted from 0 through all documents, positions
    from 0 within a sentence. A line end is `<eos>`, which that program leaves out. `surp` is the
    column `surprisal`; `entropy` must be among the statistics. Both are in bits.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else " "
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as f:
        f.write(separator.join(("word", "sentid", "sentpos", "wlen", "surp", "entropy")) + "\n")
        yield _NeuralComplexity(f, separator).write


class _NeuralComplexity:
    """Where the count of sentences stands."""

    def __init__(self, file: TextIO, separator: str) -> None:
        self.file, self.separator = file, separator
        self.here: tuple[int, int] | None = None
        self.sentence, self.position = -1, 0

    def write(self, table: pa.Table) -> None:
        """Write further rows."""
        names = ("doc_id", "sent_id", "word", "surprisal", "entropy")
        for document, sentence, word, bits, entropy in zip(
            *(table[name].to_pylist() for name in names), strict=True
        ):
            if self.here != (document, sentence):
                self.here, self.position = (document, sentence), 0
                self.sentence += 1
            shown = word if word.strip() else EOS
            cells = (shown, self.sentence, self.position, len(shown), bits, entropy)
            self.file.write(self.separator.join(map(str, cells)) + "\n")
            self.position += 1


@contextlib.contextmanager
def page_file(path: Path, rule: str, protocol: str, titles: dict[int, str]) -> Iterator[Write]:
    """Write a page of the first words, each in the colour of what reading gained on it.

    `titles` names documents; it may be filled while rows come in.
    """
    held: list[pa.Table] = []
    words = 0
    names = ["doc_id", "word_id", "word", "surprisal_static_plain", "surprisal_plain"]

    def write(table: pa.Table) -> None:
        nonlocal words
        words += table.num_rows
        left = WORD_LIMIT - sum(part.num_rows for part in held)
        if left > 0:
            held.append(table.select(names).slice(0, left))

    yield write
    whole = pa.concat_tables(held)
    shown = [word if word.strip() else EOS for word in whole["word"].to_pylist()]
    losses = {
        column_name(r, protocol): whole[column].to_numpy() * math.log(2)
        for r, column in ((STATIC, "surprisal_static_plain"), (rule, "surprisal_plain"))
    }
    write_page(
        LossTable(
            split="scored",
            article_N=whole["doc_id"].to_numpy(),
            position_N=whole["word_id"].to_numpy(),
            word_N=np.array(shown, dtype=object),
            titles=titles,
            losses=losses,
        ),
        path,
        all_words=words,
    )
