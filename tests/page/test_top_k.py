"""What was expected where a word stands: the second file, and what the page gets of it."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fake_run import made_up_losses

from mlm.base.errors import UserError
from mlm.page.page import WordLossPage
from mlm.page.top_k import SCHEMA, TopK, write_top_k


def row(article: int, position: int, split: str = "valid", **changes) -> dict:
    usual = {
        "split": split,
        "rule": "rms",
        "protocol": "article",
        "article": article,
        "position": position,
        "pieces": ["wo", "rd"],
        "rank_before": 7,
        "rank_after": 1,
        "entropy_before": 2.5,
        "entropy_after": 0.5,
        "pieces_before": ["the", "a"],
        "pieces_after": ["wo", "the"],
        "probabilities_before": [0.5, 0.25],
        "probabilities_after": [0.75, 0.125],
    }
    return usual | changes


def table_of(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def test_rows_of_a_split_come_back_in_order_and_others_stay(tmp_path: Path):
    path = tmp_path / "top_k.parquet"
    assert TopK.load(path, "valid") is None
    write_top_k(path, "valid", table_of(row(1, 0), row(0, 2), row(0, 1)))
    write_top_k(path, "test", table_of(row(0, 0, "test")))
    write_top_k(path, "valid", table_of(row(1, 5), row(0, 3)))
    found = TopK.load(path, "valid")
    assert found is not None
    assert (found.rule, found.protocol) == ("rms", "article")
    assert found.rows["position"].to_pylist() == [3, 5]
    assert TopK.load(path, "test") is not None
    assert TopK.load(path, "train") is None


def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path):
    path = tmp_path / "top_k.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"evaluate\.py with --top-k again"):
        TopK.load(path, "valid")
    write_top_k(path, "valid", table_of(row(0, 0)))  # replaced
    assert TopK.load(path, "valid") is not None


def test_the_page_gets_the_rows_of_its_words_only():
    table = made_up_losses([["a", "b", "c"], ["d", "e"]])
    rows = table_of(row(0, 2), row(1, 0, pieces=["d"]), row(1, 9), row(7, 0))
    data = WordLossPage(table, words=4, top_k=TopK("rms", "article", rows)).data()["top_k"]
    assert np.frombuffer(base64.b64decode(data["rows"]), "<u4").tolist() == [2, 3]
    own = np.frombuffer(base64.b64decode(data["own"]["values"]), "<i4").reshape(2, -1)
    names = [[data["pieces"][i] for i in one if i >= 0] for one in own]
    assert names == [["wo", "rd"], ["d"]]
    chance = np.frombuffer(base64.b64decode(data["probability_after"]["values"]), "<f4")
    assert chance.tolist() == [0.75, 0.125] * 2
    assert WordLossPage(table, words=2, top_k=TopK("rms", "article", rows)).data()["top_k"] is None
