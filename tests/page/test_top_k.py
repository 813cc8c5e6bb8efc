"""What was expected where a word stands: the second file, and what the page gets of it."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fake_run import made_up_losses

from mlm.base.errors import UserError
from mlm.page.folder import draw_run
from mlm.page.page import WordLossPage
from mlm.page.top_k import SCHEMA, TopK, write_top_k
from mlm.report.losses import write_losses


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


def always(*of: str) -> bool:
    return True


def never(*of: str) -> bool:
    return False


def table_of(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def test_rows_of_a_split_come_back_in_order_and_others_stay(tmp_path: Path):
    path = tmp_path / "top_k.parquet"
    assert TopK.load(path, "valid") is None
    assert write_top_k(path, [table_of(row(1, 0), row(0, 2), row(0, 1))], never) == set()
    assert write_top_k(path, [table_of(row(0, 0, "test"))], always) == set()
    assert write_top_k(path, [table_of(row(1, 5), row(0, 3))], always) == set()
    found = TopK.load(path, "valid")
    assert found is not None
    assert (found.rule, found.protocol) == ("rms", "article")
    assert found.rows["position"].to_pylist() == [3, 5]
    assert TopK.load(path, "test") is not None
    assert TopK.load(path, "train") is None


def test_rows_that_do_not_stand_any_more_go(tmp_path: Path):
    path = tmp_path / "top_k.parquet"
    assert write_top_k(path, [], never) == set()
    assert not path.exists()
    sgd, stream = row(0, 0, rule="sgd"), row(0, 0, protocol="stream")
    write_top_k(path, [table_of(one) for one in (row(0, 0), sgd, stream)], always)
    before = path.read_bytes()
    assert write_top_k(path, [], always) == set()
    assert path.read_bytes() == before
    new = [table_of(row(0, 4, protocol="stream"))]
    gone = write_top_k(path, new, lambda split, rule, protocol: rule == "rms")
    assert gone == {("valid", "sgd", "article")}
    found = [TopK.load(path, "valid", ("rms", p)) for p in ("article", "stream")]
    assert [one and one.rows["position"].to_pylist() for one in found] == [[0], [4]]
    assert write_top_k(path, [], never) == {("valid", "rms", p) for p in ("article", "stream")}
    assert not path.exists()


def test_the_rule_that_the_page_opens_on_comes_first(tmp_path: Path):
    path = tmp_path / "top_k.parquet"
    rules = ("three_levels", "rms", "sgd")
    write_top_k(path, [table_of(row(0, 0, rule=rule)) for rule in rules], always)
    for first, want in ((("rms", "article"), "rms"), (("rms", "stream"), "sgd")):
        found = TopK.load(path, "valid", first)
        assert found is not None
        assert found.rule == want
    table = made_up_losses([["a", "b", "c"]])
    table.losses["three_levels"] = table.losses["rms"] - 1
    write_losses(tmp_path / "losses.parquet", table)
    (page,) = draw_run(tmp_path, only=("page",))
    assert '"rule": "three_levels"' in page.read_text(encoding="utf-8")


def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path):
    path = tmp_path / "top_k.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"evaluate\.py with --top-k again"):
        TopK.load(path, "valid")
    assert write_top_k(path, [], always) == set()
    assert path.read_bytes() == b"PAR1 nonsense", "left alone, where there is nothing new"
    write_top_k(path, [table_of(row(0, 0))], always)  # replaced
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
