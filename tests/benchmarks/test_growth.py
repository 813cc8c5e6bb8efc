"""The growth benchmark on tiny models: right, not fast."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth, growth_unroll
from benchmarks.growth import ADAPTING, META, STATIC, AxisName, Options
from benchmarks.growth_picture import draw, linear
from benchmarks.growth_unroll import (
    MODES,
    Cost,
    LiveBytes,
    Place,
    Stamped,
    exponent,
    formula,
    probe,
)
from benchmarks.timing import world
from mlm.models.recurrent import RecurrentLM
from mlm.reading.meta_gradient import GradientMode

TINY = Place(RecurrentLM(30, 8, 8, 1), lanes=2, segment=3)
QUICK = Options(rounds=1, updates=1, unroll=2)
LENGTHS = (2, 8)
SIZES: dict[AxisName, tuple[int, int]] = {
    "lanes": (1, 3),
    "hidden": (4, 8),
    "segment": (2, 4),
    "vocabulary": (20, 40),
}


def here(mode: GradientMode, updates: int, rounds: int) -> Cost:
    """The cost in this process, whose resident peak is not this one's own."""
    return probe(mode, updates, rounds, TINY)._replace(resident=None)


@pytest.fixture(scope="module")
def unroll_rows() -> list[dict[str, Any]]:
    """The axis of unrolls, as short as it gets."""
    return growth_unroll.unroll_axis(here, 1, TINY, LENGTHS, read=10, far=(50, 8))


# -- axes of time ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axis",
    ["lanes", *(pytest.param(axis, marks=pytest.mark.slow) for axis in SIZES if axis != "lanes")],
)
def test_an_axis_of_time_has_a_row_for_every_size(axis: AxisName, tmp_path: Path) -> None:
    sizes = SIZES[axis]
    rows = growth.time_axis(axis, TINY, sizes, QUICK)
    assert [(row["what"], row["size"]) for row in rows] == [
        (what, size) for what in (STATIC, ADAPTING, META) for size in sizes
    ]
    for row in rows:
        place = TINY.moved(axis, row["size"])
        tokens = place.lanes * place.segment
        assert 0 < row["us/token"] < math.inf
        assert row["ms/segment"] == pytest.approx(row["us/token"] * tokens / 1e3)
        assert row["dynamic weights"] == place.weights
    assert [math.isfinite(row.get("exponent", math.nan)) for row in rows] == [False, True] * 3
    paths = draw(axis, rows, tmp_path / axis)
    assert [path.suffix for path in paths] == [".png", ".svg", ".pdf", ".csv"]
    assert len(list(csv.DictReader(paths[-1].read_text().splitlines()))) == len(rows)


def test_a_place_counts_the_bytes_of_its_weights() -> None:
    base = world(TINY.shape, TINY.segment, TINY.lanes, number=1).base
    weights = sum(weight.numel() for weight in base.start().values())
    assert TINY.weights == weights == 4 * 8 * (8 + 8 + 1)
    assert TINY.moved("hidden", 16).shape == RecurrentLM(30, 16, 16, 1)
    assert TINY.moved("vocabulary", 99).shape == RecurrentLM(99, 8, 8, 1)
    rows = growth.time_axis("lanes", TINY, (1, 2), QUICK)
    by_kind = {row["what"]: row for row in rows}  # of 2 lanes
    assert by_kind[STATIC]["bytes per update"] is None
    assert by_kind[ADAPTING]["bytes per lane"] == 4 * weights * 3
    assert by_kind[ADAPTING]["bytes per update"] == 4 * weights * (2 * 3 + 3)
    assert by_kind[META]["bytes per lane"] == 4 * weights * 2 * QUICK.unroll


def test_the_exponent_is_the_slope_within_rounds() -> None:
    sizes = (1.0, 7.0, 14.0, 64.0)
    assert exponent(sizes, [[3 * x, 5 * x] for x in sizes]) == pytest.approx(1)
    assert exponent(sizes, [[x * x] for x in sizes]) == pytest.approx(2)
    assert exponent(sizes, [[9.0], [9.0], [2.0], [2.0]]) == pytest.approx(0)
    # The machine was ten times slower in the second round: the slope is the same.
    assert exponent((1, 2), [[1.0, 10.0, 1.0], [2.0, 20.0, 2.0]]) == pytest.approx(1)


def test_steep_growth_is_named() -> None:
    rows = [
        {"axis": "lanes", "what": STATIC, "exponent": 1.0},
        {"axis": "lanes", "what": META, "exponent": 1.3},
        {"axis": "hidden", "what": ADAPTING, "exponent": 2.0, "in weights": 1.0},
        {"axis": "hidden", "what": META, "exponent": 2.5, "in weights": 1.25},
        {"axis": "segment", "what": META},
    ]
    assert growth.steep(rows) == [
        "lanes, meta-training: exponent 1.30",
        "hidden, meta-training: exponent 1.25",
    ]


def test_the_dashed_lines_grow_with_what_they_are_linear_in() -> None:
    own = [{"size": 2, "linear in": 5}, {"size": 8, "linear in": 50}]
    assert linear("lanes", own, "us/token") == [1, 1]
    assert linear("unroll", own, "ms/segment") == [1, 1]
    assert linear("unroll", own, "peak MB") == [1, 4]
    assert linear("vocabulary", own, "us/token") == [1, 4]
    assert linear("hidden", own, "us/token") == [1, 10]


# -- memory ---------------------------------------------------------------------------------


def test_live_bytes_are_counted_and_forgotten() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as meter:
        first = torch.ones(250)
        assert (meter.live, meter.peak) == (1000, 1000)
        views = first.view(10, 25), first[3:], first.detach()
        assert meter.live == 1000  # one storage
        assert before.view(20, 50).sum().item() == 0  # was there already; the sum is gone
        assert meter.live == 1000
        second = first.double()
        assert meter.live == meter.peak == 3000
        del second
        assert (meter.live, meter.peak) == (1000, 3000)
        del first, views
        assert (meter.live, meter.peak) == (0, 3000)
        grown = torch.empty(0)
        torch.add(before, 1, out=grown)
        assert meter.live == 4000
        stacked = torch.cat([grown, grown])
        assert (meter.live, meter.peak) == (12_000, 12_000)
    del grown, stacked
    assert meter.live == 0


def test_live_bytes_see_what_autograd_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as meter:
        loss = x.exp().sum()  # its graph keeps exp(x)
        assert meter.live == 4004
        del loss
        assert meter.live == 0


@pytest.mark.slow
def test_the_axis_of_unrolls_has_a_row_for_every_length(
    unroll_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    timed = [row for row in unroll_rows if "us/token" in row]
    assert [(row["what"], row["size"]) for row in timed] == [(m, t) for m in MODES for t in LENGTHS]
    assert all(0 < row["ms/segment"] < math.inf for row in timed)
    last = [row for row in timed if "exponent" in row]
    assert [(row["what"], row["size"]) for row in last] == [(mode, 8) for mode in MODES]
    assert all(math.isfinite(row["exponent"]) for row in last)
    assert last[2]["memory exponent"] == 0
    aged = [row for row in unroll_rows if "last fifth" in row["what"]]
    assert [row["what"].split(":")[0] for row in aged] == ["forward", "read"]
    assert [row["size"] for row in aged] == [8, 10]
    assert all(0 < row["lowest"] <= row["ratio"] <= row["highest"] for row in aged)
    suffixes = [file.suffix for file in draw("unroll", unroll_rows, tmp_path / "unroll")]
    assert suffixes == [".png", ".svg", ".pdf", ".csv"]


@pytest.mark.slow
def test_memory_of_the_modes(unroll_rows: list[dict[str, Any]]) -> None:
    """In copies of the weights, at this size with what a step needs beside them."""
    found = {(r["what"], r["size"]): r for r in unroll_rows if "peak MB" in r}
    assert set(found) == {(m, t) for m in MODES for t in LENGTHS} | {
        ("checkpoint", 50),
        ("forward", 50),
    }
    copy = 4 * TINY.weights * TINY.lanes
    for row in found.values():
        assert row["copies"] == pytest.approx(1e6 * row["peak MB"] / copy)
        assert row["measured / formula"] == pytest.approx(row["copies"] / row["formula"])
        assert row["measured / formula"] >= 1
    # Per update reverse mode keeps two copies, and a few numbers per lane.
    reverse = found["reverse", 8]["copies"] - found["reverse", 2]["copies"]
    assert 12 <= reverse < 12.5
    assert found["forward", 50]["copies"] == found["forward", 8]["copies"]
    shares = [row for row in unroll_rows if "over reverse" in row["what"]]
    assert [row["what"].split(":")[0] for row in shares] == ["checkpoint", "forward"]
    for row in shares:
        mode = row["what"].split(":")[0]
        expected = found[mode, 50]["peak MB"] / found["reverse", 8]["peak MB"]
        assert row["ratio"] == pytest.approx(expected)


def test_the_expected_copies_follow_the_mode() -> None:
    tangent = growth_unroll.tangent_copies()
    assert tangent == 6  # UPDATE and FLUSH, by a constant, loss and age
    assert formula("reverse", 200, tangent) == 400
    assert formula("checkpoint", 200, tangent) == 40
    assert formula("forward", 200, tangent) == formula("forward", 2, tangent) == 6


@pytest.mark.slow
def test_a_fresh_process_measures_alone() -> None:
    found = growth_unroll.probe_alone("reverse", 40, 1, number=1)
    assert found.seconds is not None
    assert 0 < found.seconds < math.inf
    place = growth_unroll.UNROLL
    assert 80 <= found.live / (4 * place.weights * place.lanes) <= 90
    if growth_unroll.resident_peak() is not None:  # a process that did nothing else
        assert found.resident == pytest.approx(found.live, rel=0.1)


def test_ageing_is_the_last_fifth_over_the_first() -> None:
    segments = Stamped(world(TINY.shape, 3, 2, number=11).segments)
    for _ in segments:
        pass
    assert len(segments.stamps) == 11
    segments.stamps = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 14]
    assert segments.ageing() == 3


# -- the record -----------------------------------------------------------------------------


def test_other_axes_keep_their_rows(tmp_path: Path) -> None:
    def row(axis: AxisName, value: float) -> dict[str, Any]:
        return {"axis": axis, "what": STATIC, "size": 1, "us/token": value}

    options = dataclasses.replace(QUICK, out=tmp_path)
    growth.write({"vocabulary": [row("vocabulary", 1.0)], "lanes": [row("lanes", 2.0)]}, options)
    path = growth.write({"lanes": [row("lanes", 3.0)]}, dataclasses.replace(options, rounds=9))
    found = json.loads(path.read_text())
    assert found["rows"] == [row("lanes", 3.0), row("vocabulary", 1.0)]
    rounds = {axis: about["settings"]["rounds"] for axis, about in found["axes"].items()}
    assert rounds == {"lanes": 9, "vocabulary": 1}
    assert found["axes"]["lanes"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in path.read_text()


def test_only_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "TIMED", {axis: (TINY, sizes) for axis, sizes in SIZES.items()})
    words = ["growth", "--rounds", "1", "--only", "segment", "lanes", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    growth.main()
    names = {
        f"growth_{a}.{end}" for a in ("lanes", "segment") for end in ("png", "svg", "pdf", "csv")
    }
    assert {path.name for path in tmp_path.iterdir()} == {"growth.json", *names}
    assert "meta-training" in capsys.readouterr().out
