"""Word losses on disk, the rows computed from them, and their tables."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import made_up_losses, made_up_words, make_run

from mlm.base.errors import UserError
from mlm.base.names import CACHE
from mlm.report.evaluation import (
    bootstrap_interval,
    evaluate_rows,
    merge_evaluation,
    position_edges,
    position_gains,
    read_evaluation,
    write_evaluation,
)
from mlm.report.losses import (
    LossTable,
    column_name,
    compared,
    opening_pairs,
    rule_and_protocol,
    splits,
    write_losses,
)
from mlm.report.tables import (
    BOLD,
    PLAIN,
    escape_markdown,
    evaluation_markdown,
    format_totals,
    totals_markdown,
)


def small_table(lengths: tuple[int, ...] = (450, 30, 700), **options) -> LossTable:
    rng = np.random.default_rng(5)
    return made_up_losses([made_up_words(n, rng) for n in lengths], **options)


def rows_of(table: LossTable, **options) -> list[dict]:
    defaults = {"corpus": "made-up", "words_per_second": {}, "settings": {}, "resamples": 199}
    return evaluate_rows(table, **(defaults | options))


def one(rows: list[dict], kind: str, rule: str, protocol: str = "article", **where) -> dict:
    found = [
        row
        for row in rows
        if (row["kind"], row["rule"], row["protocol"]) == (kind, rule, protocol)
        and all(row[name] == value for name, value in where.items())
    ]
    assert len(found) == 1
    return found[0]


# ---------------------------------------------------------------- losses.parquet


def test_column_names_and_rules_are_inverse():
    for rule in ("static", "rms", "my_rule"):
        for protocol in ("article", "stream"):
            assert rule_and_protocol(column_name(rule, protocol)) == (rule, protocol)
    assert column_name("rms", "stream") == "rms_stream"


def test_losses_survive_the_file(tmp_path: Path):
    table = small_table()
    write_losses(tmp_path / "losses.parquet", table)
    back = LossTable.load(tmp_path / "losses.parquet")
    assert list(back.word_N) == list(table.word_N)
    assert back.titles == table.titles
    assert back.losses.keys() == table.losses.keys()
    for name, loss_N in table.losses.items():
        np.testing.assert_array_equal(back.losses[name], loss_N)
    schema = pq.read_schema(tmp_path / "losses.parquet")
    assert schema.field("article").type == pa.int32()
    assert schema.field("split").type == pa.string()
    assert pa.types.is_dictionary(schema.field("title").type)
    assert schema.field("rms_stream").type == pa.float32()


def test_splits_are_kept_apart_and_replaced(tmp_path: Path):
    path = tmp_path / "losses.parquet"
    write_losses(path, small_table((40, 50), split="valid"))
    write_losses(path, small_table((60,), split="test", rules=("static", "rms"), seed=1))
    replacement = small_table((70,), split="valid", seed=2)
    write_losses(path, replacement)
    assert splits(path) == ["test", "valid"]
    assert LossTable.load(path).split == "valid"  # the default
    assert len(LossTable.load(path, "valid").word_N) == 70
    # A rule measured on valid only is absent on test, not a column of nulls.
    assert LossTable.load(path, "test").rules("article") == ["static", "rms"]


def test_columns_of_the_same_model_are_kept_and_of_another_dropped(tmp_path: Path):
    path = tmp_path / "losses.parquet"
    full = small_table()
    write_losses(path, full)
    part = dataclasses.replace(full, losses={n: full.losses[n] for n in ("static", "rms")})
    assert write_losses(path, part).losses.keys() == full.losses.keys()
    retrained = dataclasses.replace(part, losses={n: v + 0.5 for n, v in part.losses.items()})
    assert write_losses(path, retrained).losses.keys() == part.losses.keys()
    assert LossTable.load(path).losses.keys() == part.losses.keys()


def test_a_damaged_file_is_named_on_reading_and_replaced_on_writing(tmp_path: Path):
    path = tmp_path / "losses.parquet"
    with pytest.raises(UserError, match=r"not found; run `"):
        LossTable.load(path)
    write_losses(path, small_table())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"losses.parquet cannot be read"):
        LossTable.load(path)
    write_losses(path, small_table())
    assert len(LossTable.load(path).articles) == 3


def test_missing_columns_are_named(tmp_path: Path):
    path = tmp_path / "losses.parquet"
    pq.write_table(pa.table({"split": ["valid"], "word": ["a"], "static": [1.0]}), path)
    with pytest.raises(UserError, match=r"lacks the column\(s\) article, title, position"):
        LossTable.load(path)
    table = small_table().to_arrow()
    pq.write_table(table.set_column(4, "word", pa.array([[1]] * len(table))), path)
    with pytest.raises(UserError, match=r"cannot be read"):
        LossTable.load(path)


def test_another_split_and_rule_and_article_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "losses.parquet"
    write_losses(path, small_table(rules=("static", "rms"), protocols=("article",)))
    with pytest.raises(UserError, match=r"no split 'test', only valid"):
        LossTable.load(path, "test")
    table = LossTable.load(path)
    with pytest.raises(UserError, match=r"'rms' was not measured in protocol 'stream'"):
        table.loss("rms", "stream")
    with pytest.raises(UserError, match=r"no article with the index 9; ask for one of 0 to 2"):
        table.rows(9)


def test_readers_count_articles_from_1_whatever_their_indices():
    table = small_table((10, 20))
    table = dataclasses.replace(table, article_N=table.article_N * 3 + 4, titles={4: "four", 7: ""})
    assert [table.numbered(1), table.numbered(2)] == [4, 7]
    assert [table.number(4), table.number(7)] == [1, 2]
    assert table.title(7) == "article 2"
    for number in (0, 3):
        wanted = rf"no article {number}; its articles are numbered 1 to 2"
        with pytest.raises(UserError, match=wanted):
            table.numbered(number)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_refused(bad: float):
    table = small_table()
    losses = {name: loss_N.copy() for name, loss_N in table.losses.items()}
    losses["rms"][7] = bad
    with pytest.raises(UserError, match=r"1 of 1,180 losses in column 'rms'"):
        dataclasses.replace(table, losses=losses)


def test_words_out_of_order_are_refused():
    table = small_table()
    with pytest.raises(UserError, match="not in the order"):
        dataclasses.replace(table, position_N=table.position_N[::-1])
    with pytest.raises(UserError, match="not in the order"):
        dataclasses.replace(table, article_N=table.article_N[::-1])


def test_gaps_between_article_indices_are_allowed():
    """An empty article has an index but no words."""
    table = small_table((10, 20))
    table = dataclasses.replace(
        table, article_N=table.article_N * 3 + 4, titles={4: "four", 7: "seven"}
    )
    assert table.articles == [4, 7]
    assert table.rows(7) == slice(10, 30)
    assert one(rows_of(table), "article", "rms", article=7)["title"] == "seven"


def test_the_first_pair_is_the_best_learned_rule_against_static_and_its_best_rival():
    table = made_up_losses(
        [["a", "b", "c"]], rules=("static", "sgd", "rms", "two_levels", "four_levels")
    )
    loss = {"static": 9, "sgd": 8, "rms": 5, "two_levels": 4, "four_levels": 6}
    for rule, nats in loss.items():
        table.losses[rule][:] = nats
    assert opening_pairs(table, "article") == [("two_levels", "static"), ("two_levels", "rms")]
    table.losses["static+cache"] = np.full(3, 3.0)  # a cache is no learned rule, but a rival
    table.losses["mine"] = np.full(3, 2.0)
    assert opening_pairs(table, "article") == [("mine", "static"), ("mine", "static+cache")]
    hand_made = made_up_losses([["a"]], rules=("static", "sgd", "rms"))
    hand_made.losses["rms"][:] = 0
    assert opening_pairs(hand_made, "article") == [("rms", "static")]
    with pytest.raises(UserError, match="--against adam was not measured in protocol article"):
        compared(hand_made, "article", (None, "adam"))
    with pytest.raises(UserError, match="--rule rms is compared with itself"):
        compared(hand_made, "article", (None, "rms"))
    assert compared(hand_made, "article", ("sgd", "rms")) == ("sgd", "rms")
    assert compared(hand_made, "article", (None, "sgd")) == ("rms", "sgd")


# ---------------------------------------------------------------- statistics


def mean_of(gain_A: np.ndarray, words_A: np.ndarray, axis: int = -1) -> np.ndarray:
    return gain_A.sum(axis=axis) / words_A.sum(axis=axis)


def test_the_interval_equals_a_brute_force_bootstrap():
    """The slow reference: resample articles one list at a time. BCa differs from percentiles by
    its corrections, small here; 9,999 resamples leave about 2 % of the width as noise."""
    rng = np.random.default_rng(0)
    words_A = rng.integers(200, 400, 60)
    gain_A = words_A * rng.normal(0.3, 0.1, 60)
    interval = bootstrap_interval(mean_of, gain_A, words_A)
    assert interval is not None
    slow = []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        slow.append(sum(gain_A[i] for i in drawn) / sum(words_A[i] for i in drawn))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert interval == pytest.approx([low, high], abs=0.1 * (high - low))
    # and the normal theory of the mean: +- 1.96 standard errors
    error = 1.96 * (gain_A / words_A).std() / math.sqrt(60)
    assert (interval[1] - interval[0]) / 2 == pytest.approx(error, rel=0.15)


def test_the_interval_is_the_same_every_time_and_none_for_one_article():
    gain_A, words_A = np.array([1.0, 5.0, 2.0, 7.0]), np.array([10, 20, 15, 30])
    assert bootstrap_interval(mean_of, gain_A, words_A, resamples=99) == bootstrap_interval(
        mean_of, gain_A, words_A, resamples=99
    )
    assert bootstrap_interval(mean_of, gain_A[:1], words_A[:1]) is None


def test_articles_all_alike_have_an_interval_of_no_width():
    """BCa is undefined there and scipy says NaN; JSON must not."""
    interval = bootstrap_interval(mean_of, np.full(5, 2.0), np.full(5, 10), resamples=99)
    assert interval == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(
    ("longest", "edges"),
    [
        (1, [0, 200]),
        (200, [0, 200]),
        (201, [0, 200, 400]),
        (1600, [0, 200, 400, 800, 1600]),
        (1601, [0, 200, 400, 800, 1600, 3200]),
    ],
)
def test_position_edges(longest: int, edges: list[int]):
    assert position_edges(longest) == edges


def test_position_bins_take_words_from_start_to_stop_exclusive():
    table = small_table((401, 200))
    gain_N = table.loss("static", "article") - table.loss("rms", "article")
    bins = position_gains(table, "rms", "article", resamples=99)
    assert [(b.start, b.stop, b.articles, b.words) for b in bins] == [
        (0, 200, 2, 400),
        (200, 400, 1, 200),
        (400, 800, 1, 1),
    ]
    assert bins[1].gain == pytest.approx(gain_N[200:400].mean())
    assert bins[2].gain == pytest.approx(gain_N[400])
    assert bins[0].interval is not None
    assert bins[1].interval is None


# ---------------------------------------------------------------- rows


def test_totals_against_sums_by_hand():
    table = small_table()
    rows = rows_of(
        table,
        words_per_second={("rms", "article"): 1234.5},
        settings={("rms", "article"): {"step_size": 0.1}},
        bytes_A=[2000, 150, 3000],
    )
    total = one(rows, "total", "rms")
    nll = sum(float(x) for x in table.losses["rms"])
    static = sum(float(x) for x in table.losses["static"])
    assert total["nll"] == pytest.approx(nll)
    assert total["words"] == 1180
    assert total["word_perplexity"] == pytest.approx(math.exp(nll / 1180))
    assert total["bits_per_byte"] == pytest.approx(nll / math.log(2) / 5150)
    assert total["nats_per_word_gained"] == pytest.approx((static - nll) / 1180)
    assert total["interval"][0] < total["nats_per_word_gained"] < total["interval"][1]
    assert total["words_per_second"] == 1234.5
    assert total["settings"] == {"step_size": 0.1}
    fixed = one(rows, "total", "static", "stream")
    assert fixed["nats_per_word_gained"] == 0
    assert fixed["interval"] == [0, 0]


def test_bytes_are_those_of_the_canonical_text():
    words = ["<eos>", "é", "a", "<eos>", "<eos>", "<eos>", "c", "<eos>"]
    table = dataclasses.replace(small_table((5, 3)), word_N=np.array(words, dtype=object))
    rows = rows_of(table)
    assert one(rows, "total", "rms")["bytes"] == len("\né a\n\n\nc\n".encode())
    assert one(rows, "article", "rms", article=1)["bytes"] == len("\nc\n")


def test_unknown_words_stand_in_every_table():
    table = small_table()
    rows = rows_of(table, unknown_A=[0, 3, 56])
    assert one(rows, "total", "rms")["unknown_words"] == 59
    assert one(rows, "article", "rms", article=1)["unknown_words"] == 3
    for text in (evaluation_markdown(rows), format_totals(rows), totals_markdown(rows)):
        assert text.count("1,180 words (5.00 % unknown), 3 articles") == 2
        assert text.replace("\n ", "").count("its spelling") == 2
    for text in (evaluation_markdown(rows_of(table)), format_totals(rows_of(table))):
        assert "unknown" not in text


def test_the_largest_articles_share_of_a_gain_stands_in_the_tables():
    table = small_table()
    static = table.losses["static"]
    gain = np.where(table.article_N == 1, 0.9 / 30, 0.1 / 450 * (table.article_N == 0))
    table = dataclasses.replace(table, losses={"static": static, "rms": static - gain})
    rows = rows_of(table)
    total = one(rows, "total", "rms")
    assert total["largest_article"] == 1
    assert total["largest_share"] == pytest.approx(0.9, abs=1e-3)
    assert one(rows, "total", "static")["largest_share"] is None
    assert "90 %" in evaluation_markdown(rows)
    assert "90 %" in format_totals(rows)
    worse = dataclasses.replace(table, losses={"static": static, "rms": static + gain})
    assert one(rows_of(worse), "total", "rms")["largest_share"] is None


def test_articles_and_words_are_counted_from_1_and_gains_are_in_nats_alone():
    table = small_table((451, 30), titles=["first", "second"])
    table = dataclasses.replace(
        table, article_N=table.article_N * 3 + 4, titles={4: "first", 7: "second"}
    )
    rows = rows_of(table, resamples=99)
    assert not [name for row in rows for name in row if "half" in name]
    text = evaluation_markdown(rows)
    static, rms = (table.losses[name][451:].astype(float) for name in ("static", "rms"))
    start = f"| 2 | second | 30 | {static.mean():.2f} |"
    (row,) = (line for line in text.partition("stream")[0].splitlines() if line.startswith(start))
    assert f" {(static - rms).mean():.3f} |" in row
    assert "| 1 | first |" in text
    assert "| 1 to 200 |" in text
    assert "| 401 to 800 |" in text
    assert "Perplexity gained" not in text
    totals = next(line for line in text.splitlines() if line.startswith("| rule |"))
    assert totals.split(" | ")[1:4] == ["perplexity", "bits per byte", "nats gained per word"]


def test_position_and_article_rows_add_up_to_the_total():
    rows = rows_of(small_table())
    for rule in ("rms", "three_levels"):
        total = one(rows, "total", rule, "stream")
        for kind in ("position", "article"):
            parts = [
                r for r in rows if (r["kind"], r["rule"], r["protocol"]) == (kind, rule, "stream")
            ]
            assert sum(r["words"] for r in parts) == total["words"]
            assert sum(r["nll"] for r in parts) == pytest.approx(total["nll"])
            gained = sum(r["nats_per_word_gained"] * r["words"] for r in parts)
            assert gained / total["words"] == pytest.approx(total["nats_per_word_gained"])


def test_comparisons_are_paired():
    rows = rows_of(small_table((300, 250, 400, 350)))
    row = one(rows, "comparison", "three_levels", against="rms")
    gains = [one(rows, "total", r)["nats_per_word_gained"] for r in ("three_levels", "rms")]
    assert row["ratio"] == pytest.approx(gains[0] / gains[1])
    assert row["difference"] == pytest.approx(gains[0] - gains[1])
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    low, high = row["difference_interval"]
    single = one(rows, "total", "rms")["interval"]
    assert high - low < single[1] - single[0]  # pairing removes what articles share


@pytest.mark.parametrize("rule", ["four_levels", "mlp", "three_levels+cache"])
def test_every_learned_rule_is_compared_with_rms(rule: str):
    """With a neural cache, with RMS and one."""
    end = CACHE if rule.endswith(CACHE) else ""
    table = small_table((300, 250, 400, 350))
    names = {"three_levels": rule, "rms": "rms" + end}
    losses = {names.get(name, name): column for name, column in table.losses.items()}
    row = one(
        rows_of(dataclasses.replace(table, losses=losses)), "comparison", rule, against="rms" + end
    )
    assert row["difference"] > 0


def test_a_ratio_of_gains_is_left_out_where_the_gain_may_be_zero():
    table = small_table((300, 250, 400, 350))
    noise = np.random.default_rng(0).normal(0, 1, len(table.word_N)).astype(np.float32)
    noise -= noise.mean()
    losses = table.losses | {"rms": table.losses["static"] + noise + np.float32(0.001)}
    row = one(
        rows_of(dataclasses.replace(table, losses=losses)),
        "comparison",
        "three_levels",
        against="rms",
    )
    assert row["ratio"] is None
    assert row["interval"] is None
    assert row["difference"] > 0


def test_one_article_and_one_word_make_rows_without_intervals_or_nan(tmp_path: Path):
    rows = rows_of(small_table((1,)))
    write_evaluation(tmp_path, rows)
    text = (tmp_path / "evaluation.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    back = json.loads(text)
    assert one(back, "total", "rms")["interval"] is None
    article = one(back, "article", "rms")
    assert article["nats_per_word_gained"] is not None


def test_a_perplexity_beyond_floats_is_null():
    table = small_table((3,))
    losses = {name: loss_N + 1000 for name, loss_N in table.losses.items()}
    row = one(rows_of(dataclasses.replace(table, losses=losses)), "total", "rms")
    assert row["word_perplexity"] is None
    assert "–" in evaluation_markdown([row])


def test_rules_without_static_are_refused():
    table = small_table()
    losses = {name: v for name, v in table.losses.items() if name != "static_stream"}
    with pytest.raises(UserError, match=r"protocol 'stream' has rules .* but not 'static'"):
        rows_of(dataclasses.replace(table, losses=losses))


def test_one_protocol_and_one_rule_suffice():
    rows = rows_of(small_table(rules=("static", "my_rule"), protocols=("stream",)))
    assert {row["protocol"] for row in rows} == {"stream"}
    assert "my rule" in format_totals(rows)


# ---------------------------------------------------------------- files and tables


def test_merging_replaces_rows_of_the_same_rule_only():
    table = small_table()
    old = rows_of(table)
    part = dataclasses.replace(table, losses={n: table.losses[n] for n in ("static", "rms")})
    new = rows_of(part, words_per_second={("rms", "article"): 7.0})
    merged = merge_evaluation(old, new)
    assert one(merged, "total", "rms")["words_per_second"] == 7.0
    assert one(merged, "total", "sgd") == one(old, "total", "sgd")
    assert one(merged, "total", "rms", "stream") == one(old, "total", "rms", "stream")
    # what was compared with the replaced rule no longer holds
    assert not [r for r in merged if r["kind"] == "comparison" and r["protocol"] == "article"
                and "rms" in (r["rule"], r["against"])]  # fmt: skip
    kinds = [row["kind"] for row in merged]
    order = ["total", "comparison", "novelty", "occurrence", "distance", "position", "article"]
    assert kinds == sorted(kinds, key=order.index)


def test_merging_drops_the_rows_of_another_model():
    table = small_table()
    other = {name: table.losses[name] * 2 for name in ("static", "rms")}
    merged = merge_evaluation(
        rows_of(table) + rows_of(dataclasses.replace(table, split="test")),
        rows_of(dataclasses.replace(table, losses=other)),
    )
    assert {r["rule"] for r in merged if r["split"] == "valid"} == {"static", "rms"}
    assert {r["rule"] for r in merged if r["split"] == "test"} >= {"sgd", "three_levels"}


def test_evaluation_files_are_read_back_and_damage_is_named(tmp_path: Path):
    assert read_evaluation(tmp_path) == []
    rows = rows_of(small_table())
    write_evaluation(tmp_path, rows)
    assert read_evaluation(tmp_path) == rows
    for text in ('[{"kind": "tot', '{"kind": "total"}', "[1]"):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=r"evaluation.json"):
            read_evaluation(tmp_path)


def test_titles_cannot_break_the_markdown_tables(tmp_path: Path):
    table = small_table((30, 30), titles=["a | b <script>\n# c", "__init__ *x*"])
    write_evaluation(tmp_path, rows_of(table))
    text = (tmp_path / "evaluation.md").read_text()
    assert r"a \| b \<script\> \# c" in text
    assert r"\_\_init\_\_ \*x\*" in text
    assert escape_markdown("a|b") == r"a\|b"
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in tables if "init" in line}) == 1


def test_the_terminal_table_states_protocol_gain_and_interval(tmp_path: Path):
    make_run(tmp_path, splits=("valid", "test"))
    text = format_totals(read_evaluation(tmp_path))
    assert text.count("protocol article") == 2
    assert "3 levels" in text
    row = one(read_evaluation(tmp_path)[:10], "total", "rms")
    low, high = row["interval"]
    assert f"{row['nats_per_word_gained']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_row_of_the_lowest_loss_is_bold_where_asked_for():
    rows = rows_of(small_table())
    plain, bold = format_totals(rows), format_totals(rows, bold=True)
    assert BOLD not in plain
    assert bold.replace(BOLD, "").replace(PLAIN, "") == plain
    marked = [line for line in bold.splitlines() if line.startswith(BOLD)]
    best = {
        protocol: min(
            (r for r in rows if (r["kind"], r["protocol"]) == ("total", protocol)),
            key=lambda r: r["nll"],
        )
        for protocol in ("article", "stream")
    }
    assert len(marked) == len(best)
    for line, row in zip(marked, best.values(), strict=True):
        assert line.endswith(PLAIN)
        assert f"{row['word_perplexity']:.2f}" in line


def test_an_explanation_in_the_terminal_keeps_its_source_in_one_line():
    lines = format_totals(rows_of(small_table())).splitlines()
    assert any(line.endswith("(Krause et al. 2018, eqs. 5 to 8)") for line in lines)
    assert max(map(len, lines)) <= 100
