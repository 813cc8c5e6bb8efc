"""What a run needs is known before it begins: chosen where it is left open, or refused."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Finished
from tiny import tiny_config, write_corpus

from mlm.models.extension import Extension, Extent
from mlm.rules.gates import LinearGates
from mlm.runs.machine import resident_bytes
from mlm.runs.run import open_run
from mlm.settings.flags import replaced
from mlm.settings.presets import settings
from mlm.stages import fit, needs
from mlm.stages.fit import Limit, choices, fitted, predicted, shown_seconds, with_recorded_choices
from mlm.stages.needs import (
    MODES,
    Lengths,
    RunSizes,
    meta_copies,
    meta_part,
    scoring,
    stage_1,
    stage_2,
)
from mlm.training.fisher import FISHER_LANES, estimate_fisher
from mlm.training.language_model import shape_of

WIKITEXT_103 = Lengths(103_000_000, 103_000_000, 28_000, 20_000)
VALID = Lengths(217_646, 217_646, 60, 15_000)
CPU = torch.device("cpu")


def _sizes(size: str = "awd", rule: str = "default", /, **changes: Any) -> RunSizes:
    config = settings(size, rule)
    config = replaced(config, {path.replace("__", "."): v for path, v in changes.items()})
    vocabulary = 267_735 if size == "awd" else 4000
    shape, text = shape_of(config, vocabulary), WIKITEXT_103
    held_out = Lengths(10_000_000, 10_000_000, 2800, 20_000)
    shares = (0.06, 0.06) if shape.cutoffs else ()
    more = (held_out, VALID, VALID, VALID, shares)
    return RunSizes(config, shape, True, True, text, *more)


def _chosen(sizes: RunSizes, gigabytes: float) -> dict[str, Any] | None:
    for values in choices(sizes):
        other = sizes.with_config(replaced(sizes.config, values))
        if all(stage.bytes <= gigabytes * 1e9 for stage in predicted(other, CPU, 4e8)):
            return values
    return None


def test_reverse_mode_of_the_largest_size_needs_a_hundred_gigabytes() -> None:
    """16 lanes x 20.2 M dynamic weights x 80 copies of 4 bytes are 103 GB."""
    sizes = _sizes()
    assert sizes.own == 20_220_802
    (rule, _) = sizes.learned
    assert 16 * 4 * meta_copies(sizes, rule, "reverse") == pytest.approx(103e9, rel=0.06)
    order = [meta_copies(sizes, rule, mode) for mode in MODES]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    ("gigabytes", "mode", "lanes"),
    [(200, "reverse", 16), (40, "checkpoint", 16), (20, "forward", 16), (10, "forward", 9)],
)
def test_mode_and_lanes_are_those_that_fit(gigabytes: int, mode: str, lanes: int) -> None:
    chosen = _chosen(_sizes(), gigabytes)
    assert chosen is not None
    assert (chosen["meta.gradient"], chosen["meta.lanes"]) == (mode, lanes)


def test_what_the_user_set_is_not_chosen() -> None:
    found = list(choices(_sizes(meta__gradient="checkpoint", meta__lanes=7)))
    assert {(v["meta.gradient"], v["meta.lanes"]) for v in found} == {("checkpoint", 7)}
    alone = list(choices(_sizes(evaluation__lanes=3, meta__gradient="reverse")))
    assert {v["evaluation.lanes"] for v in alone} == {3}
    assert {v["meta.lanes"] for v in alone} > {16, 1}


def test_a_rule_with_a_parameter_per_unit_is_never_trained_in_forward_mode() -> None:
    found = list(choices(_sizes("small", "best")))
    assert {v["meta.gradient"] for v in found} == {"reverse", "checkpoint"}


def test_an_extension_states_its_own_need() -> None:
    class Greedy(Extension):
        def lane_bytes(self, extent: Extent) -> float:
            return 1e9 * extent.lanes

    sizes = _sizes("small")
    (rule, _) = sizes.learned
    before = meta_part(sizes, rule).bytes, scoring(sizes)[0].bytes
    sizes.__dict__["extensions"] = (Greedy(),)
    object.__setattr__(sizes, "__class__", _WithOwn)
    assert meta_part(sizes, rule).bytes - before[0] == pytest.approx(16e9)
    assert scoring(sizes)[0].bytes - before[1] == pytest.approx(16e9)


class _WithOwn(RunSizes):
    @property
    def extensions(self) -> tuple[Extension, ...]:
        return vars(self)["extensions"]


def test_the_fisher_needs_its_own_lanes_whatever_the_settings() -> None:
    assert inspect.signature(estimate_fisher).parameters["lanes"].default == FISHER_LANES

    def needed(articles: int = 100, **changes: Any) -> float:
        sizes = _sizes("small", **changes)
        text = sizes.held_out._replace(articles=articles)
        (part,) = (
            p for p in stage_2(dataclasses.replace(sizes, held_out=text)) if "Fisher" in p.name
        )
        assert part.lanes is None
        return part.bytes

    usual = needed()
    assert needed(FISHER_LANES - 1) < needed(FISHER_LANES) == usual
    for name in ("lm__lanes", "meta__lanes", "evaluation__lanes"):
        assert needed(**{name: 1}) == usual


def test_recurrent_weights_that_leave_the_cache_are_read_for_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bfloat16 where products are made so; and once more where segments are scored twice."""
    assert _sizes("small").streamed == 0, "1 MB a lane"

    def large(**changes: Any) -> RunSizes:
        return _sizes("small", model__hidden=640, model__embedding=640, **changes)

    assert large().streamed == 2 * 4 * (4 * 640 * 640)
    assert large(adapt__dynamic="softmax.bias").streamed == 0
    monkeypatch.setattr(needs, "in_bfloat16", lambda adapt: adapt.precision == "bfloat16")
    assert large(adapt__precision="bfloat16").streamed == large().streamed / 2
    mode: dict[str, Any] = {"meta__gradient": "checkpoint"}
    once, twice = (
        meta_part(large(extensions__surprise_weighting__share=share, **mode), LinearGates()).work
        for share in (0.0, 0.25)
    )
    tokens = (twice.products - once.products) / (3 * large().products)
    assert twice.moved - once.moved == pytest.approx(tokens * large().streamed)
    assert tokens > 0


def test_more_of_anything_needs_more() -> None:
    least = _sizes("small")
    for changes in (
        {"lm__lanes": 64},
        {"lm__segment": 128},
        {"model__hidden": 512, "model__embedding": 512},
        {"model__layers": 2},
    ):
        assert stage_1(_sizes("small", **changes))[0].bytes > stage_1(least)[0].bytes
    for changes in (
        {"evaluation__lanes": 32},
        {"adapt__dynamic": "all"},
        {"evaluation__rules": ("rms+cache",), "evaluation__cache_words": 10**7},
        {"evaluation__top_k": 5},
    ):
        assert scoring(_sizes("small", **changes))[0].bytes > scoring(least)[0].bytes


def test_a_cache_of_a_billion_words_needs_hundreds_of_gigabytes() -> None:
    sizes = _sizes("small", evaluation__rules=("static+cache",), evaluation__cache_words=10**8)
    assert scoring(sizes)[0].bytes > 1e12


# -- refusals -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, command: Command
) -> None:
    corpus, out = write_corpus(tmp_path / "toy"), tmp_path / "run"
    words = ("--corpus", corpus, "--out", out, "--vocabulary-size", 400)
    words = (*words, "--text.data-dir", tmp_path / "cache")
    done = command("train", *words, "--memory-gb", 0.1)
    assert done.code == 1
    assert "stage 1 needs about " in done.error
    assert "0.1 GB may be used (--memory-gb)" in done.error
    assert not (out / "config.json").exists()
    assert not (out / "checkpoints").exists()


def test_the_message_names_the_value_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _sizes(meta__gradient="reverse", meta__lanes=15)
    limit = Limit(30e9, "a test")

    def stages(values: dict[str, Any]) -> list[fit.Stage]:
        return predicted(sizes.with_config(replaced(sizes.config, values)), CPU, 4e8)

    said = str(fit._refusal(stages, next(iter(choices(sizes))), sizes, limit))
    assert "reverse, 15 lanes) needs about 102 GB, but 30.0 GB may be used (a test)" in said
    assert "Use --meta.gradient checkpoint or --meta.lanes 4; or, if" in said
    for way in ({"meta.gradient": "checkpoint"}, {"meta.lanes": 4}):
        assert all(s.bytes <= limit.bytes for s in stages(way))
    assert any(s.bytes > limit.bytes for s in stages({"meta.lanes": 5}))


def test_a_run_knows_what_it_takes_and_keeps_what_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(write_corpus(tmp_path / "toy"), tmp_path / "run")
    config = replaced(config, {"meta.gradient": "auto", "meta.unroll": 4000, "meta.lanes": 8})
    run = open_run(config, quiet=True)
    monkeypatch.setattr(fit, "memory_limit", lambda *_: Limit(math.inf, "a test"))
    free, takes = fitted(run)
    assert free.config.meta.gradient == "reverse"
    assert free.config.meta.lanes == config.meta.lanes
    assert [*takes] == ["lm", "meta", "evaluate", "draw"]
    assert all(part.seconds > 0 for part in takes.values())
    assert not capsys.readouterr().err
    most = max(stage.bytes for stage in predicted(fit.sizes_of(free), CPU, resident_bytes()))
    monkeypatch.setattr(fit, "memory_limit", lambda *_: Limit(0.9 * most, "a test"))
    less, _ = fitted(run)
    assert less.config.meta.gradient == "checkpoint"
    assert "note: --meta.gradient checkpoint instead of reverse" in capsys.readouterr().err
    assert less.data is run.data
    run.folder.path.mkdir(parents=True)
    run.folder.save_config(less.config)
    again = run.with_config(dataclasses.replace(config, resume=True))
    assert with_recorded_choices(again).config.meta.gradient == "checkpoint"


def test_scoring_is_refused_too(finished: Finished, command: Command) -> None:
    done = command("evaluate", finished.folder, "--memory-gb", 0.01, "--no-draw")
    assert done.code == 1
    assert "evaluation needs about" in done.error


def test_nothing_known_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "free_bytes", lambda device: None)
    assert fit.memory_limit(settings(), CPU).bytes == math.inf


@pytest.mark.parametrize(
    ("seconds", "want"),
    [
        (0.2, "a second"),
        (90, "about 90 s"),
        (200, "about 3 min"),
        (9e3, "about 2 h"),
        (8e6, "about 93 days"),
    ],
)
def test_times_are_told_roughly(seconds: float, want: str) -> None:
    assert shown_seconds(seconds) == want
