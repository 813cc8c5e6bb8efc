"""Any two settings either work together or are refused, in one message, before any training."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished
from settings.pairs import World, all_choices, all_pairs, base_config, covering

from mlm.base.errors import UserError
from mlm.extensions import Extensions
from mlm.kernels.switches import use
from mlm.models.base import choose_dynamic
from mlm.models.low_rank import folds
from mlm.models.recurrent import BaseModel
from mlm.settings.checks import extension_problems, plan_of, validate
from mlm.settings.config import Config
from mlm.settings.flags import flag, replaced
from mlm.settings.presets import RULE_SETTINGS, SIZES, settings
from mlm.stages.order import run_stages
from mlm.training.language_model import shape_of


@pytest.fixture(scope="module")
def world(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The base settings, a finished run of them, and a folder for others."""
    home = tmp_path_factory.mktemp("pairs")
    run = run_stages(base_config(finished.corpus, home / "there"), quiet=True)
    return World(
        replaced(run.config, {"out": home / "new"}), home / "there", {run.config.text: run.data}
    )


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What a run sets for its process is set back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    use(kernels=True, bfloat16=False)


def runs(world: World, chosen: dict[str, Any]) -> None:
    """All stages of these choices; nothing is refused once training has begun."""
    config = replaced(world.base, chosen)
    new = config.out
    assert new is not None
    shutil.rmtree(new, ignore_errors=True)
    if "lm" not in config.stages:
        shutil.copytree(world.other, new)
    if world.refusal(config) is None:
        run_stages(config, quiet=True)


def test_every_extension_is_switched_on_by_a_choice(world: World) -> None:
    """And off where it is not chosen: the pairs below hold every extension, on and off."""
    assert world.base.extensions.enabled() == ()
    switched = {
        extension.name
        for path, value in all_choices(world.base, world.other)
        for extension in replaced(world.base, {path: value}).extensions.enabled()
    }
    assert switched == {extension.name for extension in Extensions()}


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_any_two_choices_pass_or_are_refused_by_name(world: World, every: int) -> None:
    """All pairs, or a sample, through the checks alone."""
    choices = all_choices(world.base, world.other)
    alone = [world.refusal(replaced(world.base, dict([c])), texts=False) for c in choices]
    known = {error[:40] for error in alone if error is not None}
    pairs = all_pairs(choices)[::every]
    assert len(pairs) > 5000 / every
    refused = 0
    for pair in pairs:
        error = world.refusal(replaced(world.base, dict(pair)), texts=False)
        if error is None or error[:40] in known:  # what one of them cannot do alone
            continue
        refused += 1
        assert any(flag(path) in error for path, _ in pair), (pair, error)
    assert refused > 20 / every


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_choices_that_pass_the_checks_run(world: World) -> None:
    """A sample: many choices at once."""
    choices = all_choices(world.base, world.other)
    pairs = all_pairs(choices)[::997]
    passing = [p for p in pairs if world.refusal(replaced(world.base, dict(p))) is None]
    for chosen in itertools.islice(covering(world, choices, passing, seed=1), 2):
        runs(world, chosen)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_pairs_that_pass_the_checks_run(world: World) -> None:
    """Every pair is in one of about a hundred runs of many choices."""
    choices = all_choices(world.base, world.other)
    passing = [
        pair
        for pair in all_pairs(choices)
        if world.refusal(replaced(world.base, dict(pair)), texts=False) is None
    ]
    for chosen in covering(world, choices, passing, seed=0):
        try:
            runs(world, chosen)
        except Exception as error:
            raise AssertionError(f"after training began, with {chosen}") from error


def problems_of(config: Config, shape: BaseModel) -> list[str]:
    """What extensions miss in a model of this shape."""
    sizes = {name: size for name, (size, _) in shape.layout().items()}
    dynamic = choose_dynamic(sizes, config.adapt.dynamic)
    folded = folds(sizes, dynamic, config.adapt.rank)
    return extension_problems(plan_of(config, dynamic, folded))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULE_SETTINGS)
def test_any_size_goes_with_any_rule(size: str, rule: str) -> None:
    config = validate(settings(size, rule))
    assert (config.size, config.rule) == (size, rule)
    shape = shape_of(config, config.text.vocabulary_size or 30_000)
    assert problems_of(config, shape) == []


def test_best_is_refused_with_an_adaptive_softmax() -> None:
    config = settings("awd", "best")
    shape = shape_of(config, 200_000)
    assert any("no adaptive softmax" in problem for problem in problems_of(config, shape))


def test_what_stage_2_needs_is_asked_before_stage_1(world: World) -> None:
    """Settings that were once refused only after stage 1."""
    assert world.base.out is not None
    shutil.rmtree(world.base.out, ignore_errors=True)  # other tests run there
    plain = {"adapt.dynamic": "lstm"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**plain, "extensions.intra_segment.on": True}, "--intra-segment.on needs"),
        ({**plain, "extensions.word_coupling.directions": 4}, "--word-coupling.directions needs"),
        ({**plain, "extensions.learned_basis.words": 50}, "--learned-basis.words needs"),
        ({"meta.start": "lstm"}, "--meta.start lstm: this rule is not trained"),
        (
            {"meta.rules": ("unit_steps",), "meta.gradient": "forward"},
            "--meta.gradient forward: unit_steps has a parameter per row and column",
        ),
        ({"lm.init": Path("nowhere")}, "--lm.init nowhere: "),
    ]
    for chosen, words in cases:
        error = world.refusal(replaced(world.base, chosen))
        assert error is not None, chosen
        assert words in error
        with pytest.raises(UserError, match=re.escape(words)):
            run_stages(replaced(world.base, chosen), quiet=True)
        assert not world.base.out.exists()
