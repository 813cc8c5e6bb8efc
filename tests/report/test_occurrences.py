"""What happens when a word comes back: counted by hand, and against the totals."""

from __future__ import annotations

import numpy as np
import pytest
from fake_run import made_up_losses, made_up_words

from mlm.report.evaluation import evaluate_rows
from mlm.report.losses import LossTable
from mlm.report.occurrences import Recurrence, bin_label, first_loss_label
from mlm.report.tables import evaluation_markdown

TEXT = ["a", "b", "a", "<eos>", "a", "<eos>", "a"]


def rows_of(table: LossTable, kind: str, rule: str) -> list[dict]:
    rows = evaluate_rows(table, corpus="x", words_per_second={}, settings={}, resamples=99)
    return [r for r in rows if (r["kind"], r["rule"], r["protocol"]) == (kind, rule, "article")]


def test_occurrences_are_counted_within_each_article():
    seen = Recurrence.of(made_up_losses([TEXT, ["a", "a"]]))
    assert seen.number_N.tolist() == [1, 1, 2, 1, 3, 2, 4, 1, 2]
    assert seen.distance_N.tolist() == [0, 0, 2, 0, 2, 2, 2, 0, 1]
    assert seen.first_N.tolist() == [0, 1, 0, 3, 0, 3, 0, 7, 7]
    assert seen.count_N.tolist() == [4, 1, 4, 2, 4, 2, 4, 2, 2]


def test_occurrences_agree_with_counting_one_by_one():
    rng = np.random.default_rng(3)
    table = made_up_losses([made_up_words(n, rng) for n in (400, 1, 90)])
    seen, last = Recurrence.of(table), dict[tuple, list[int]]()
    for row, key in enumerate(zip(table.article_N, table.word_N, strict=True)):
        before = last.setdefault(key, [])
        assert seen.number_N[row] == len(before) + 1
        assert seen.distance_N[row] == (row - before[-1] if before else 0)
        assert seen.first_N[row] == (before[0] if before else row)
        before.append(row)


def test_rows_by_occurrence_are_of_words_that_come_back_often_enough():
    table = made_up_losses([TEXT], rules=("static", "rms"))
    table.losses["static"][:] = [6, 1, 5, 1, 4, 1, 3]
    table.losses["rms"][:] = [5.5, 1, 4, 1, 2, 1, 0]
    rows = rows_of(table, "occurrence", "rms")
    assert [(r["first_loss_from"], r["first_loss_to"]) for r in rows] == [(5, 10)] * 4
    assert [(r["from"], r["to"], r["words"]) for r in rows] == [
        (1, 2, 1),
        (2, 3, 1),
        (3, 4, 1),
        (4, 5, 1),
    ]
    assert [r["nats_per_word_gained"] for r in rows] == [0.5, 1, 2, 3]
    assert [r["nll"] for r in rows] == [5.5, 4, 2, 0]
    assert {r["interval"] for r in rows} == {None}  # one article


def test_new_words_and_words_seen_before_add_up_to_the_total():
    rng = np.random.default_rng(4)
    table = made_up_losses([made_up_words(n, rng) for n in (400, 300, 90)])
    (total,) = rows_of(table, "total", "rms")
    new, seen = rows_of(table, "novelty", "rms")
    assert new["words"] + seen["words"] == total["words"]
    assert new["nll"] + seen["nll"] == pytest.approx(total["nll"])
    assert new["share_of_words"] + seen["share_of_words"] == pytest.approx(1)
    assert new["share_of_gain"] + seen["share_of_gain"] == pytest.approx(1)
    distances = rows_of(table, "distance", "rms")
    assert sum(r["words"] for r in distances) == seen["words"]
    low, high = seen["interval"]
    assert low < seen["nats_per_word_gained"] < high


def test_static_gains_nothing_whenever_a_word_comes_back():
    for row in rows_of(made_up_losses([TEXT, TEXT]), "distance", "static"):
        assert (row["nats_per_word_gained"], row["interval"]) == (0, [0, 0])
        assert row["share_of_gain"] is None


def test_bins_are_named_as_readers_write_them():
    assert [bin_label(1, 2), bin_label(5, 9), bin_label(3201, None)] == [
        "1",
        "5 to 8",
        "3,201 or more",
    ]
    assert [first_loss_label(0, 2), first_loss_label(2, 5), first_loss_label(10, None)] == [
        "below 2 nats",
        "2 to 5 nats",
        "10 nats or more",
    ]


def test_the_tables_show_what_the_rows_hold():
    table = made_up_losses([TEXT, TEXT], rules=("static", "rms"), protocols=("article",))
    rows = evaluate_rows(table, corpus="x", words_per_second={}, settings={}, resamples=99)
    text = evaluation_markdown(rows)
    for row in rows:
        if row["kind"] in ("occurrence", "distance") and row["rule"] == "rms":
            gain = f"{row['nats_per_word_gained']:.3f}".replace("-", "−")
            name = bin_label(row["from"], row["to"])
            assert any(name in line and gain in line for line in text.splitlines()), name
    new = next(line for line in text.splitlines() if line.startswith("| new |"))
    assert " 43 % |" in new  # 3 of 7 words
