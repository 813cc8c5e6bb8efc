"""The claim's tables: readings made once, put side by side word by word."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, Finished

import benchmarks.claim
import benchmarks.claim_tables
from benchmarks.claim import merge
from benchmarks.claim_readings import Options, articles_of, forms, readings, with_own_settings
from benchmarks.claim_tables import (
    LONG,
    Gains,
    claims,
    growths,
    halves,
    kinds,
    positions,
    read_before,
)
from mlm.base.errors import UserError
from mlm.base.names import PROTOCOLS
from mlm.extensions import NGramReadOut
from mlm.kernels.processor import multiplies_bfloat16
from mlm.reader import TrainedModel
from mlm.report.evaluation import read_evaluation
from mlm.report.losses import LossTable, column_name
from mlm.runs.rules import parted
from mlm.settings.config import Config
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors

FEW = ("--seeds", 1, "--resamples", 9, "--budget", 1, "--steps", 1, "--articles", 1,
       "--segment", 20, "--rank", 99, "--lanes", 2, "--rival-segment", 20, "--rival-budget", 2,
       "--word-coupling.directions", 2, "--learned-basis.words", 300,
       "--ngram-read-out.words", 40)  # fmt: skip

NAMES = ("all", "published", "same", "seed_0", "principal")


def _table(
    words: list[int], gains: dict[str, np.ndarray | float], static: float = 5.0
) -> LossTable:
    """Articles of so many words whose static loss is the same everywhere."""
    position_N = np.concatenate([np.arange(n) for n in words])
    losses = {}
    for protocol in PROTOCOLS:
        losses[column_name("static", protocol)] = np.full(len(position_N), static)
        for rule, gain in gains.items():
            losses[column_name(rule, protocol)] = np.full(len(position_N), static) - gain
    return LossTable(
        "test",
        np.repeat(np.arange(len(words)), words).astype(np.int32),
        position_N.astype(np.int32),
        np.array(["w"] * len(position_N), dtype=object),
        {},
        losses,
    )


def _rules(**gains: np.ndarray | float) -> dict[str, np.ndarray | float]:
    plain = {"rms": 0.2, "two_levels": 0.2, "three_levels": 0.25, "four_levels": 0.3} | gains
    cached = {f"{rule}+cache": gain + 0.1 for rule, gain in plain.items()}
    return {**plain, **cached, "four_levels, seed 0": 0.2, "four_levels, seed 1": 0.4}


SEEDS = {
    "four_levels": ["four_levels, seed 0", "four_levels, seed 1"],
    "four_levels+cache": ["four_levels+cache"],
    "three_levels": ["three_levels"],
    "two_levels": ["two_levels"],
}
CHOSEN: dict[str, str] = dict.fromkeys([*PROTOCOLS], "all")


def test_ratios_of_gains_and_their_seeds() -> None:
    rows = claims(_table([300, 500], _rules()), SEEDS, CHOSEN)
    ratio = next(r for r in rows if r["what"] == "4 levels: times the gain of RMS (all)")
    assert ratio["found"] == pytest.approx(1.5)
    assert ratio["found interval"] == pytest.approx([1.5, 1.5])
    assert ratio["seeds"] == "1.000 2.000"
    assert len([r for r in rows if "4 levels: times" in r["what"]]) == 2, "one form, two protocols"
    forms = _rules(**{"rms, all": 0.2, "rms, all+cache": 0.3, "rms, same": 0.1})
    rows = claims(_table([300, 500], forms), SEEDS, CHOSEN, 9)
    found = {r["what"]: r["found"] for r in rows if r["protocol"] == "stream"}
    assert found["4 levels: times the gain of RMS (same)"] == pytest.approx(3.0)
    assert found["4 levels: times the gain of RMS (all)"] == pytest.approx(1.5)
    assert not [what for what in found if "all+cache" in what or "on that LM" in what]
    more = next(r for r in rows if r["what"] == "4 levels + cache: more than RMS (all) + cache")
    assert more["found"] == pytest.approx(0.1)


def test_the_rival_on_another_model_beside_its_first_seed() -> None:
    """Over the ordinary static loss, and over that of the other model."""
    means = {"through: static": 0.1, "through: rms": 0.3, "through: four_levels": 0.6}
    every = {"through: four_levels, seed 0": 0.5, "through: four_levels, seed 1": 0.7}
    seeds = SEEDS | {"through: four_levels": [*every]}
    rows = claims(_table([300, 500], _rules(**means, **every)), seeds, CHOSEN, 9)
    found = {r["what"]: r["found"] for r in rows if r["protocol"] == "article"}
    title = "4 levels, LM trained through"
    assert found[f"{title}: times the gain of RMS (all)"] == pytest.approx(3)
    there = f"{title}, seed 0: times the gain of RMS (all) on that LM"
    assert found[there] == pytest.approx(5 / 3)
    assert found[f"{there}, over its own static loss"] == pytest.approx(2)


def test_a_rival_that_loses_has_no_ratio() -> None:
    rows = claims(_table([300, 500], _rules(rms=-0.2)), SEEDS, CHOSEN, 9)
    assert not [r for r in rows if "times" in r["what"]]
    more = next(r for r in rows if "which loses" in r["what"])
    assert more["found"] == pytest.approx(0.5)
    assert more["seeds"] == "0.400 0.600"


def test_the_rival_with_the_same_memory() -> None:
    """A row of its own, with caches on both, too; no row as a form of the rival."""
    own = {"rms, all": 0.2, "rms, all, with n-gram memory": 0.25, "rms, with n-gram memory": 0.25}
    cached = {f"{name}+cache": gain + 0.1 for name, gain in own.items()}
    rows = claims(_table([300, 500], _rules(**own, **cached)), SEEDS, CHOSEN, 9)
    found = {r["what"]: r for r in rows if r["protocol"] == "article" and "memory" in r["what"]}
    alone = found.pop("4 levels: times the gain of RMS (all) with n-gram memory")
    assert alone["found"] == pytest.approx(0.3 / 0.25)
    assert alone["found interval"] == pytest.approx([1.2, 1.2])
    assert (alone["seeds"], alone["asked"]) == ("0.800 1.600", "1.2")
    both = found.pop("4 levels + cache: times the gain of RMS (all) with n-gram memory + cache")
    assert both["found"] == pytest.approx(0.4 / 0.35)
    assert [*found] == ["3 levels: times the gain of RMS (all) with n-gram memory"]


def test_starts_of_articles_apart() -> None:
    words = [300, 500]
    early_N = np.concatenate([np.arange(n) for n in words]) < 200
    learned_N = 0.2 + 0.5 * early_N
    table = _table(words, _rules(three_levels=learned_N))
    start = next(
        r for r in claims(table, SEEDS, CHOSEN) if "more than 2 levels, first 200" in r["what"]
    )
    assert start["found"] == pytest.approx(0.5)
    found = {r["from"]: r for r in positions(table, SEEDS) if r["protocol"] == "stream"}
    assert found[0]["three_levels"] == pytest.approx(0.7)
    assert found[200]["three_levels"] == pytest.approx(0.2)
    assert (found[0]["words"], found[200]["words"], found[400]["words"]) == (400, 300, 100)


def test_growth_is_that_of_long_articles() -> None:
    """The short article, which gains nothing, does not count."""
    words = [LONG + 100, LONG + 300, 50]
    position_N = np.concatenate([np.arange(n) for n in words])
    gain_N = np.where(position_N < LONG, 0.1, 0.4)
    gain_N[-50:] = 0
    gains = Gains(_table(words, {"four_levels": gain_N}), "article")
    growth = gains.growth("four_levels")
    assert growth is not None
    assert growth["found"] == pytest.approx(0.3)
    assert growth["note"] == "2 articles"
    rows = growths(_table(words, {"four_levels": gain_N}), "long", 9)
    assert [r["protocol"] for r in rows] == [*PROTOCOLS]
    assert rows[0]["found"] == pytest.approx(0.3)
    short = _table([50], {"four_levels": 0.1})
    assert Gains(short, "article").growth("four_levels") is None
    assert growths(short, "long", 9) == []


def test_what_words_cost_by_what_was_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two articles; what the first says is new to the second."""
    text = list("ababcaabbbcbc")
    monkeypatch.setattr(benchmarks.claim_tables, "FREQUENT", 1)
    gain_N = np.arange(13) / 10
    table = dataclasses.replace(
        _table([8, 5], _rules(four_levels=gain_N)), word_N=np.array(text, dtype=object)
    )
    word_N, pair_N = read_before(table)
    assert "".join("ny"[int(x)] for x in word_N) == "nnyynyyynynyy"
    assert "".join("ny"[int(x)] for x in pair_N) == "nnnynnnynnnny"
    rows = [r for r in kinds(table, SEEDS) if r["protocol"] == "stream"]
    found = {(r["word"], r["which"]): r for r in rows}
    pairs = found["read before, after the same word", "frequent"]  # b, of which there are 6
    assert pairs["share"] == pytest.approx(2 / 13)
    assert pairs["static"] == pytest.approx(10 / 13)
    assert pairs["four_levels"] == pytest.approx((10 - 0.3 - 0.7) / 13)
    assert found["new to the article", "other"]["share"] == pytest.approx(3 / 13)
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    assert sum(r["four_levels"] for r in rows) == pytest.approx(5 - gain_N.mean())


def test_halves_are_perplexities() -> None:
    late_N = (np.arange(100) >= 50) * 0.5
    rows = halves(_table([100, 40], _rules(two_levels=np.r_[late_N, np.zeros(40)])), "stream")
    assert rows[0]["two_levels"] == f"0.0 → {np.exp(5) - np.exp(4.5):.1f}"
    assert [row["words"] for row in rows] == [100, 40]
    assert rows[1]["2018: 2 levels"] == "10.6 → 9.6"


def test_readings_of_other_text_are_refused(tmp_path: Path) -> None:
    made = [
        (reading, _table([10 + k], dict.fromkeys(reading.columns, 0.1)))
        for k, reading in enumerate(readings(Options(tmp_path), CHOSEN))
    ]
    with pytest.raises(UserError, match="was made on other text"):
        merge(made, CHOSEN)


def test_seeds_are_seeds_and_their_mean_is_shown(tmp_path: Path) -> None:
    other, more = (tmp_path / "other",), (tmp_path / "a", tmp_path / "b")
    control = (tmp_path / "control",)
    options = Options(
        tmp_path, through=other, ngrams=more, ngrams_as_usual=control, seeds=2, away=("there",)
    )
    every = readings(options, CHOSEN)
    assert [r.seed for r in every if r.name.startswith("ordinary/seed")] == [0, 1]
    assert [r.name for r in every if r.name.startswith("through/seed")] == ["through/seed 0"]
    two = [r for r in every if r.name.startswith("ngrams/seed")]
    assert [(r.where, r.seed) for r in two] == [(more[0], 0), (more[1], 1)]
    assert [r.where for r in every if r.name == "ngrams/all"] == [more[0]], "the rival reads one"
    away = {r.name for r in every if r.travels}
    assert {"ordinary/seed 0", "ordinary/seed 1", "through/seed 0", "ngrams/seed 0"} <= away
    assert "ngrams/seed 1" not in away
    assert not [name for name in away if "as_usual" in name]
    made = [(r, _table([10], dict.fromkeys(r.columns, 0.1 + r.seed))) for r in every]
    table, seeds = merge(made, CHOSEN)
    assert seeds["four_levels"] == ["four_levels, seed 0", "four_levels, seed 1"]
    np.testing.assert_allclose(table.loss("four_levels", "stream"), 5 - 0.6, rtol=1e-6)
    np.testing.assert_allclose(table.loss("rms", "article"), table.loss("rms, all", "article"))


def test_the_rival_reads_with_the_rules_memory(finished: Finished) -> None:
    """In the forms that are the rival, with nothing else of the learned rule."""
    options = Options(finished.folder, seeds=1)
    found = {r.name: r for r in readings(options, {"article": "all", "stream": "lstm"})}
    assert {n for n in found if "memory" in n} == {
        "ordinary/all with n-gram memory",
        "ordinary/lstm with n-gram memory",
    }
    mine = found["ordinary/all with n-gram memory"]
    assert not mine.travels
    assert mine.budget == options.rival_budget
    config, plain = mine.config(options), forms(options)["all"].config(options)
    (extension,) = config.extensions.enabled()
    expected = dataclasses.replace(options.extensions.ngram_memory, hand_made=True)
    assert extension == expected
    assert plain.extensions.enabled() == ()
    assert config.adapt == plain.adapt
    alone = dataclasses.replace(options, memory=False)
    assert not [r for r in readings(alone, CHOSEN) if "memory" in r.name]


def test_a_run_lends_the_settings_of_its_own_rule(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "run")
    options = Options(folder)
    assert with_own_settings(options) == options, "it has trained none"
    RunFolder(folder).checkpoint("four_levels").touch()
    config = RunFolder(folder).load_config()
    found = with_own_settings(options)
    assert found.extensions == config.extensions != options.extensions
    assert (found.steps, found.segment, found.lanes) == (
        config.meta.steps,
        config.adapt.update_every,
        config.meta.lanes,
    )


def test_articles_of_each_text() -> None:
    assert articles_of(Options(Path("run")), 2) == [0, 0]
    assert articles_of(Options(Path("run"), articles=(5, 0)), 2) == [5, 0]
    with pytest.raises(UserError, match="names 2 numbers for 3 texts"):
        articles_of(Options(Path("run"), articles=(5, 0)), 3)


@pytest.mark.slow
def test_a_rule_that_the_run_has_trained_is_that_of_seed_0(
    model: TrainedModel, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are those of all seeds; the validation articles behind the tuning words are a
    text, and every text has its own number of articles."""
    folder = Path(shutil.copytree(model.folder, tmp_path / "run"))
    few = ("--seeds", 1, "--resamples", 9, "--rival-budget", 2, "--forms", "all", "--no-fewer",
           "--no-ablate", "--cached-seeds", 0, "--valid", "--split", "test",
           "--out", tmp_path / "out")  # fmt: skip
    trained: list[str] = []

    def counted(config: Config, quiet: bool) -> object:
        trained.append(str(config.out and config.out.name))
        return run_stages(config, quiet)

    monkeypatch.setattr(benchmarks.claim, "run_stages", counted)
    done = command("benchmarks.claim", folder, *few, "--articles", 2, 1)
    assert done.code == 0, done.err
    assert trained == ["all", "all_with_n-gram_memory"]
    read = folder / "claim" / "all" / "losses.parquet"
    since = read.stat().st_mtime_ns
    of_all = (*few, "--articles", 2, 1, "--only", "ordinary/all", "--steps", 3)
    assert command("benchmarks.claim", folder, *of_all).code == 0
    assert read.stat().st_mtime_ns == since, "hand-made rules know nothing of training"
    files = [RunFolder(f).checkpoint("four_levels") for f in (folder, folder / "claim" / "seed_0")]
    assert files[0].read_bytes() == files[1].read_bytes()
    made = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))["rows"]
    assert {r["corpus"] for r in made} == {"toy", "valid_untuned"}
    for corpus, number in {"toy": 2, "valid_untuned": 1}.items():
        rows = [r for r in read_evaluation(tmp_path / "out" / corpus) if r["kind"] == "total"]
        assert {r["articles"] for r in rows} == {number}
    done = command("benchmarks.claim", folder, *few, "--articles", 1, "--only", "ordinary/seed")
    assert done.code == 0, done.err
    assert trained == ["all", "all_with_n-gram_memory"], "only read again"
    rows = [r for r in read_evaluation(folder / "claim" / "seed_0") if r["kind"] == "total"]
    assert {r["articles"] for r in rows} == {1}
    tuning = folder / "claim" / "all" / "tuning.json"
    tuning.unlink()  # as while another process tunes the rival
    assert command("benchmarks.claim", folder, *few, "--only", "ordinary/seed").code == 0
    assert not tuning.exists(), "tuned by two processes"


@pytest.mark.slow
def test_every_reading_is_a_run_made_once(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = finished.copy(tmp_path / "run"), finished.copy(tmp_path / "other")
    for where in (folder, other):  # tune on one article
        config = RunFolder(where).load_config()
        evaluation = dataclasses.replace(config.evaluation, tune_words=100)
        RunFolder(where).save_config(dataclasses.replace(config, evaluation=evaluation))
    long = shutil.copytree(finished.corpus, tmp_path / "long")
    few = (folder, "--through", other, *FEW, "--long", long, "--out", tmp_path / "out")
    assert command("benchmarks.claim", *few, "--only", "ordinary/seed").code == 0
    assert not (tmp_path / "out").exists(), "tables of half the readings"
    done = command("benchmarks.claim", *few)
    assert done.code == 0, done.err
    home = tmp_path / "out" / finished.corpus.name
    totals = {
        (r["protocol"], r["rule"]): r["nats_per_word_gained"]
        for r in read_evaluation(home)
        if r["kind"] == "total"
    }
    tuned = json.loads((tmp_path / "out" / "rivals.json").read_text(encoding="utf-8"))["rows"]
    alone = [r for r in tuned if "memory" not in r["form"]]
    assert {r["form"] for r in alone} == {"lstm", "published", "all", "same"}
    for protocol in PROTOCOLS:
        mine = [r for r in alone if r["protocol"] == protocol]
        best = min(mine, key=lambda r: r["nll"])
        assert [r["form"] for r in mine if r["rival"]] == [best["form"]]
        assert totals[protocol, "rms"] == totals[protocol, f"rms, {best['form']}"]
        remembering = f"rms, {best['form']}, with n-gram memory"
        assert totals[protocol, "rms, with n-gram memory"] == totals[protocol, remembering]
        assert totals[protocol, remembering] != totals[protocol, "rms"]
        assert (protocol, "rms, with n-gram memory+cache") in totals
        assert totals[protocol, "four_levels"] == totals[protocol, "four_levels, seed 0"]
        # two equal language models, equally read
        assert totals[protocol, "through: four_levels"] == totals[protocol, "four_levels"]
        assert totals[protocol, "through: static"] == 0
        assert totals[protocol, "through: rms"] == totals[protocol, "rms"]
        assert (protocol, "four_levels, without learned basis") in totals
    made = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))["rows"]
    assert {r["protocol"] for r in made} == set(PROTOCOLS)
    assert (home / "figures" / "figure2.png").exists()
    rules = {
        r["rule"] for r in read_evaluation(next((folder / "claim" / "seed_0").glob("on-long-*")))
    }
    assert rules == {"static", "four_levels"}
    trials = json.loads((folder / "claim" / "all" / "tuning.json").read_text(encoding="utf-8"))
    assert len(trials["rms/article"]["trials"]) == 2, "the rival's budget"
    own = {n: RunFolder(folder / "claim" / n).load_config().extensions for n in NAMES}
    coupled = {n: e.word_coupling.directions for n, e in own.items()}
    assert coupled == {"all": 0, "published": 0, "same": 2, "seed_0": 2, "principal": 2}
    assert {n for n, e in own.items() if e.learned_basis.enabled} == {"seed_0"}
    assert {n for n, e in own.items() if e.boundaries.on} == {"same", "seed_0", "principal"}
    assert {n for n, e in own.items() if e.ngram_read_out.enabled} == {"seed_0", "principal"}

    done = command("benchmarks.claim_speed", folder, "--tokens", 160, "--rounds", 1,
                   "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    times = json.loads((tmp_path / "out" / "speed.json").read_text(encoding="utf-8"))["rows"]
    assert {r["rule"] for r in times} >= {"RMS (same)", "4 levels", "RMS, the published loop"}
    assert all(r["words/s"] > 0 for r in times)

    assert command("benchmarks.parts", folder, "--out", tmp_path / "out").code == 0
    parts = json.loads((tmp_path / "out" / "parts.json").read_text(encoding="utf-8"))["rows"]
    assert [r.keys() - {"rule"} for r in parts if "boundary" in r["rule"]] == [{"stream"}]
    found = {r["rule"]: tuple(r.get(p) for p in PROTOCOLS) for r in parts}
    tensors, _ = load_tensors(RunFolder(folder / "claim" / "seed_0").checkpoint("four_levels"), "")
    kept = NGramReadOut().of(parted(tensors)[1]) is not None
    assert kept == ("4 levels, without n-gram read-out" in found)
    lower = "4 levels, float32 products" in found
    assert lower == multiplies_bfloat16()
    remembers = (folder / "claim" / "all_with_n-gram_memory").exists()
    assert remembers == ("RMS (all), with n-gram memory" in found)
    for rule, number in (("RMS (all)", remembers + lower), ("4 levels", 3 + kept + lower)):
        other = [f for r, f in found.items() if r.startswith(rule + ",") and "boundary" not in r]
        assert len(other) == number
        assert found[rule] not in other, "a part that changes nothing"

    def again(*_: object, **__: object) -> None:
        raise UserError("made again")

    monkeypatch.setattr(benchmarks.claim, "run_stages", again)
    monkeypatch.setattr(benchmarks.claim, "stage_evaluate", again)
    assert command("benchmarks.claim", *few).code == 0
    assert "made again" in command("benchmarks.claim", *few, "--steps", 2).error


def test_bad_names_are_refused(finished: Finished, command: Command, tmp_path: Path) -> None:
    done = command("benchmarks.claim", finished.folder, "--only", "nobody", "--out", tmp_path)
    assert "there are ordinary/lstm" in done.error
    assert "is no run folder" in command("benchmarks.claim", tmp_path / "none").error
