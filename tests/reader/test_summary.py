"""What the summary says of a table of words, against sums done by hand and known statistics."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mlm.reader.summary import BLOCK_WORDS, CELL, FEW_DOCUMENTS, Summary, block_interval


def table_of(documents: list[np.ndarray], gain: float = 0.5, first: int = 0) -> pa.Table:
    """Rows of documents whose static losses are given, in bits; rms gains `gain` a word."""
    static = np.concatenate(documents)
    columns = {
        "doc_id": np.repeat(np.arange(len(documents), dtype=np.int32), list(map(len, documents))),
        "word_id": np.concatenate([np.arange(len(d), dtype=np.int32) for d in documents]),
        "surprisal_plain": static - 2 * gain,
        "surprisal_static_plain": static,
        "surprisal_rms_plain": static - gain,
    }
    columns["doc_id"] = columns["doc_id"] + np.int32(first)
    return pa.table(columns)


def correlated(number: int, rho: float, seed: int) -> np.ndarray:
    """An autoregression of order 1 with variance 1."""
    noise = np.random.default_rng(seed).normal(size=number) * np.sqrt(1 - rho**2)
    series = np.empty(number)
    series[0] = noise[0] / np.sqrt(1 - rho**2)
    for t in range(1, number):
        series[t] = rho * series[t - 1] + noise[t]
    return series


def test_the_block_interval_has_the_known_width_of_correlated_means() -> None:
    """An AR(1) mean has variance (1 + rho) / (1 - rho) / n; words taken as independent, 1 / n."""
    number, rho = 20_000, 0.8
    known = 2 * 1.96 * np.sqrt((1 + rho) / (1 - rho) / number)
    widths = []
    for seed in range(5):
        series, ones = correlated(number, rho, seed), np.ones(number)
        low, high = block_interval(series, ones, 100, seed=seed) or (0.0, 0.0)
        assert low < series.mean() < high
        widths.append(high - low)
        narrow = block_interval(series, ones, 1, seed=seed) or (0.0, 0.0)
        assert narrow[1] - narrow[0] == pytest.approx(known / 3, rel=0.15)
    assert np.mean(widths) == pytest.approx(known, rel=0.15)


def test_the_block_interval_is_the_plain_loop() -> None:
    """The same draws, with blocks put together one cell after the other."""
    gain, words = np.arange(60.0) % 7, np.where(np.arange(60) == 59, 3.0, 20.0)
    generator, found = np.random.default_rng(3), []
    for _ in range(200):
        cells = [(s + k) % 60 for s in generator.integers(60, size=6) for k in range(10)]
        found.append(gain[cells].sum() / words[cells].sum())
    expected = np.quantile(found, [0.025, 0.975])
    assert block_interval(gain, words, 10, resamples=200, seed=3) == pytest.approx(expected)


def test_few_blocks_have_no_interval() -> None:
    assert block_interval(np.ones(49), np.ones(49), 10) is None
    assert block_interval(np.ones(50), np.ones(50), 10) == [1.0, 1.0]


def test_sums_do_not_depend_on_how_the_table_was_cut() -> None:
    rng = np.random.default_rng(0)
    whole = table_of([rng.gamma(2, 4, size=n) for n in (731, 1, 450, 90)])
    main = pa.array(rng.gamma(2, 4, size=whole.num_rows))  # so that cells differ
    whole = whole.set_column(2, "surprisal_plain", main)
    at_once, in_parts = Summary("best", ["rms"]), Summary("best", ["rms"])
    at_once.add(whole)
    for start in range(0, whole.num_rows, 37):
        in_parts.add(whole.slice(start, 37))
    assert in_parts.words_D == at_once.words_D == [731, 1, 450, 90]
    for rule in ("static", "best", "rms"):
        column = {"best": "surprisal_plain"}.get(rule, f"surprisal_{rule}_plain")
        assert at_once.bits(rule) == pytest.approx(whole[column].to_numpy().sum(), rel=1e-13)
        assert in_parts.bits(rule) == pytest.approx(at_once.bits(rule), rel=1e-13)
        (gain, interval), (other, as_well) = in_parts.gain(rule), at_once.gain(rule)
        assert gain == pytest.approx(other, rel=1e-9)
        assert interval == (as_well and pytest.approx(as_well, rel=1e-9))
    assert [p[:3] for p in in_parts.positions()] == [p[:3] for p in at_once.positions()]


def test_gains_by_position_are_those_of_the_bin() -> None:
    static = np.full(500, 8.0)
    table = table_of([static, static[:300]], gain=0.0)
    main = table["surprisal_plain"].to_numpy().copy()
    main[table["word_id"].to_numpy() >= 200] -= 1.5
    table = table.set_column(2, "surprisal_plain", pa.array(main))
    summary = Summary("best", ["rms"])
    summary.add(table)
    assert [p[:3] for p in summary.positions()] == [(0, 200, 400), (200, 400, 300), (400, 800, 100)]
    bits = [p[3] for p in summary.positions()]
    assert [b["static"] - b["best"] for b in bits] == [0.0, 1.5, 1.5]


def test_documents_are_resampled_where_there_are_enough() -> None:
    rng = np.random.default_rng(1)
    documents = [rng.gamma(2, 4, size=250) for _ in range(FEW_DOCUMENTS)]
    few, many = Summary("best"), Summary("best")
    few.add(table_of(documents[:-1]))
    many.add(table_of(documents))
    assert "blocks of 200 words" in "\n".join(few.lines(1000))
    assert "over documents" in "\n".join(many.lines(1000))


def test_the_lines_are_the_numbers_by_hand() -> None:
    """512 words of 8 bits, of which the rule saves one: perplexity 256 and 128."""
    summary = Summary("four_levels", [])
    summary.add(table_of([np.full(512, 8.0)], gain=0.5))
    text = "\n".join(summary.lines(2048))
    assert "1 document, 512 words (line ends counted), 2,048 bytes" in text
    rows = {line[:8].strip(): line.split() for line in text.splitlines()}
    assert rows["static"][1:] == ["256.0", "2.000"]
    assert rows["4 levels"][2:] == ["128.0", "1.750", "1.000"]
    assert "no intervals: fewer than 1,000 words" in text
    assert f"{np.log(2):.3f}" in "\n".join(summary.lines(2048, "nats"))
    assert max(map(len, text.splitlines())) <= 80


def test_static_alone_has_no_gains() -> None:
    summary = Summary("static", ["static"])
    summary.add(table_of([np.full(300, 8.0)]))
    assert summary.rules == ["static"]
    assert summary.bits("static") == 2400
    assert "gain" not in summary.lines(10)[-1]


def test_blocks_are_whole_cells() -> None:
    assert BLOCK_WORDS % CELL == 0
