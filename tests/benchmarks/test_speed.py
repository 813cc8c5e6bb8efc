"""The speed benchmarks on a tiny model: right, not fast; how fast only where marked `slow`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import ceiling, peers, timing
from benchmarks.contestants import CONTESTANTS, OURS, Contestant, Setting, ours, vmapped
from mlm.base.errors import UserError
from mlm.models.recurrent import RecurrentLM

TINY = RecurrentLM(50, 8, 8, 2)
SMALL = peers.Options(rounds=1, lanes=3, segment=4, updates=2, unroll=3, device="cpu")


def need(library: str | None) -> None:
    """Skip, with the reason the benchmark prints, where a library is missing."""
    missing = peers.problem(library)
    if missing:
        pytest.skip(f"{library} {missing}")


def only(*names: str) -> dict[str, Contestant]:
    """Some contestants, ours first."""
    return {name: CONTESTANTS[name] for name in (OURS, *names)}


# -- timing ---------------------------------------------------------------------------------


def test_entries_take_turns_and_the_warm_up_is_not_counted() -> None:
    calls: list[str] = []

    def work(name: str) -> timing.Work:
        return lambda: len(calls.append(name) or name)

    found = timing.side_by_side({"a": work("a"), "bb": work("bb")}, rounds=2)
    assert calls == ["a", "bb"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "bb": 2}
    assert all(seconds > 0 for times in found.values() for seconds in times)


def test_everybody_has_the_threads_that_suit_it() -> None:
    slow = {"small": 2, "large": 1}

    def work(name: str):
        def run() -> int:
            time.sleep(0.02 if torch.get_num_threads() == slow[name] else 0.001)
            return 1

        return run

    jobs = {name: work(name) for name in slow}
    with timing.threads(2):
        seconds, used = timing.best_threads(jobs, 3)
        assert torch.get_num_threads() == 2
    assert used == {"small": 1, "large": 2}
    assert all(max(times) < 0.02 for times in seconds.values())
    assert timing.best_threads(jobs, 1, 1)[1] == {"small": 1, "large": 1}


def test_a_ratio_is_taken_within_rounds() -> None:
    # Round 2 met a busy machine: both took ten times as long, the ratio is the same.
    assert timing.ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 3.0)
    assert timing.speed([0.1, 0.5, 0.25]) == 4.0


def test_a_world_has_full_lanes_and_one_border() -> None:
    base, segments = timing.world(TINY, segment=4, lanes=3, number=5)
    assert len(segments) == 5
    assert all(bool(s.mask.all()) and s.inputs.shape == (3, 4) for s in segments)
    assert [bool(s.new.any()) for s in segments] == [True, *[False] * 4]
    assert bool(segments[0].new.all())
    assert set(base.dynamic) == {n for n in base.weights if n.startswith("lstm.")}
    for rms in base.rms.values():
        assert 1e-3 <= float(rms.min()) <= float(rms.max()) <= 1e-2
    other = timing.world(TINY, segment=7, lanes=1).base
    assert all(torch.equal(w, other.weights[n]) for n, w in base.weights.items())
    assert all(torch.equal(r, other.rms[n]) for n, r in base.rms.items())


@pytest.mark.parametrize("place", ["", "../.."])
def test_a_record_tells_machine_versions_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    device = str(Path(place or tmp_path) / "cpu")
    options = dataclasses.replace(SMALL, out=tmp_path / "new", device=device)
    rows = [
        {"contestant": "a", "tokens/s": 12345.6, "ratio": timing.Ratio(2.0, 1.5, 2.5)},
        {"contestant": "b", "note": "not installed"},
    ]
    path = timing.record("speed", rows, options, more=1)
    printed = capsys.readouterr().out
    assert path == tmp_path / "new" / "speed.json"
    assert "12,346  2.00 [1.50, 2.50]" in printed
    found = json.loads(path.read_text())
    assert found["rows"][0]["ratio"] == {"median": 2.0, "low": 1.5, "high": 2.5}
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"]
    assert found["settings"]["lanes"] == 3
    assert "out" not in found["settings"]  # a path of the machine it was measured on
    assert found["settings"]["device"] == "cpu", "of any other place outside the name"
    assert found["more"] == 1


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# -- peers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # other libraries may warn
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != OURS])
def test_every_contestant_computes_the_same(name: str) -> None:
    need(CONTESTANTS[name].library)
    options = dataclasses.replace(SMALL, unroll=0)
    mine, theirs = peers.compare(TINY, options, only(name))
    assert (mine["contestant"], theirs["contestant"]) == (OURS, name)
    assert theirs["loss difference"] <= peers.TOLERANCE
    assert theirs["tokens/s"] > 0
    assert mine["ours/peer"].median == 1


def test_losses_depend_on_the_update() -> None:
    """Else equal losses would say nothing."""
    place = timing.world(TINY, SMALL.segment, SMALL.lanes)
    same, still = (
        peers.losses(CONTESTANTS[OURS], place, setting, SMALL.lanes, SMALL.updates)
        for setting in (peers.SETTING, Setting(0.0, 0.0))
    )
    change = (same - still).abs().amax((1, 2))
    assert change[0] == 0  # scored before the first update
    assert bool((change[1:] > 100 * peers.TOLERANCE).all())


@pytest.mark.parametrize("wrong", [Setting(1.01, 1.0), Setting(1.0, 2.0)], ids=["rate", "decay"])
def test_another_rule_is_refused(wrong: Setting) -> None:
    def off(base, setting, lanes):
        other = Setting(setting.rate * wrong.rate, setting.decay * wrong.decay)
        return vmapped(base, other, lanes)

    with pytest.raises(UserError, match="cheat: losses differ from ours"):
        peers.compare(TINY, SMALL, {OURS: CONTESTANTS[OURS], "cheat": Contestant(off)})


def test_not_a_number_is_refused() -> None:
    nan = torch.tensor([1.0, float("nan")])
    with pytest.raises(UserError, match="nan"):
        peers.difference("broken", nan, torch.ones(2))


def test_a_missing_library_is_a_row_without_numbers() -> None:
    absent = Contestant(ours, library="no_such_library")
    options = dataclasses.replace(SMALL, unroll=0)
    rows = peers.compare(TINY, options, {OURS: CONTESTANTS[OURS], "absent": absent})
    assert rows[1]["note"] == f"not installed: {peers.INSTALL}"
    assert "tokens/s" not in rows[1]


@pytest.mark.filterwarnings("default")
def test_meta_gradients_agree() -> None:
    need("higher")
    rows = peers.compare(TINY, SMALL, only())
    assert [row["contestant"] for row in rows] == [OURS, peers.META_OURS, peers.META_HIGHER]
    assert rows[2]["loss difference"] <= peers.TOLERANCE
    assert rows[1]["tokens/s"] > 0 < rows[2]["tokens/s"]


@pytest.mark.filterwarnings("default")
def test_another_meta_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    need("higher")
    monkeypatch.setattr(peers, "FLUSH_UNIT", peers.FLUSH_UNIT * 1.01)
    with pytest.raises(UserError, match="meta-gradient"):
        peers.compare(TINY, SMALL, only())


# -- ceiling --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_ceiling_table() -> None:
    options = ceiling.Options(
        rounds=1, lanes=3, segments=(4,), unroll=3, updates=2, threads=1, device="cpu"
    )
    rows, machines = ceiling.compare(TINY, options, small=True)
    by_name = {row["what"]: row for row in rows}
    assert {ceiling.TRAINING, ceiling.STATIC, ceiling.META, ceiling.RULE, ceiling.GATES} <= {
        *by_name
    }
    assert by_name[ceiling.TRAINING]["/ f32 training"].median == 1
    assert by_name[ceiling.STATIC]["time / static"].median == 1
    assert by_name[ceiling.META]["M"] == 4
    assert all(row["tokens/s"] > 0 and row["floor / actual"] > 0 for row in rows)
    assert list(machines) == ["1 threads"]


def test_the_floor_counts_what_its_letters_say() -> None:
    shape = RecurrentLM(7, 3, 5, 2)  # layers 3 -> 5 -> 3
    recurrent, inputs = 4 * (5 * 5 + 3 * 3), 4 * (5 * 3 + 3 * 5)
    lstm, softmax, above = recurrent + inputs, 7 * 3, 4 * 3 * 5
    static = ceiling.floor(shape, ceiling.STATIC, 2, 6)
    assert static.products == lstm + softmax
    trained = ceiling.floor(shape, ceiling.TRAINING, 2, 6)
    assert trained.products == 3 * (lstm + softmax)
    adapted = ceiling.floor(shape, ceiling.RULE, 2, 6)
    total = (lstm + softmax) + (lstm + recurrent + above + softmax)
    assert adapted.products + adapted.stepwise == total
    assert adapted.cached == 4 * 2 * 11 * recurrent
    meta = ceiling.floor(shape, ceiling.META, 2, 6)
    assert meta.streamed - adapted.streamed == 4 * 2 * 4 * lstm


def test_what_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceiling, "_free_bytes", lambda device: 1)
    options = ceiling.Options(lanes=2, segments=(4,), unroll=2, updates=1, device="cpu")
    assert ceiling.META not in [row.what for row in ceiling.rows_of(TINY, options)]
    assert "left out" in capsys.readouterr().out


# -- speed ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapting_is_faster_than_with_other_means() -> None:
    options = peers.Options(rounds=5, unroll=0, device="cpu")
    found = peers.compare(timing.SIZES["S"], options, only("torch.func", "Krause as published"))
    times = {row["contestant"]: row["ours/peer"].median for row in found}
    assert times["torch.func"] >= 4
    assert times["Krause as published"] >= 2.5


@pytest.mark.slow
def test_meta_training_keeps_up_with_static_training() -> None:
    options = ceiling.Options(device="cpu")
    shape = timing.SIZES["S"]
    with timing.threads(1):
        work = {
            "static": ceiling.training(shape, options, "float32"),
            "meta": ceiling.meta_training(shape, options, 64),
        }
        seconds = timing.side_by_side(work, rounds=5)
    assert timing.ratio(seconds["static"], seconds["meta"]).median >= 0.3
