"""Any two settings either work together or are refused, in one message, before any training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Finished
from settings.pairs import World, all_choices, all_pairs, base_config

from mlm import kernels
from mlm.extensions import Extensions
from mlm.kernels.bfloat16 import use_bfloat16
from mlm.kernels.compile import use_kernels
from mlm.runs.stages import run_stages
from mlm.settings.flags import flag, replaced


@pytest.fixture(scope="module")
def there(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of the base settings, at whose folder others can go on."""
    home = tmp_path_factory.mktemp("pairs")
    base = base_config(finished.corpus, home / "run")
    run = run_stages(base, quiet=True)
    return World(replaced(base, {"out": home / "new"}), run.data)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What a run sets for its process is set back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    use_kernels(kernels.numba is not None)
    use_bfloat16(False)


def other_run(world: World) -> Path:
    """The finished run's folder."""
    assert world.base.out is not None
    return world.base.out.parent / "run"


def test_every_extension_is_switched_on_by_a_choice(there: World) -> None:
    """And off where it is not chosen: the pairs below hold every extension, on and off."""
    assert there.base.extensions.enabled() == ()
    switched = {
        extension.name
        for path, value in all_choices(there.base, other_run(there))
        for extension in replaced(there.base, {path: value}).extensions.enabled()
    }
    assert switched == {extension.name for extension in Extensions()}


def test_any_two_choices_are_refused_by_name_or_pass(there: World) -> None:
    """All pairs, through the checks only: one message, which names one of the two."""
    choices = all_choices(there.base, other_run(there))
    pairs = all_pairs(choices)
    assert len(pairs) > 5000
    refused = 0
    for pair in pairs:
        error = there.refusal(replaced(there.base, dict(pair)), texts=False)
        refused += error is not None
        if error is not None:
            named = [flag(path) for path, _ in pair] + ["recurrent weights"]
            assert any(name in error for name in named), (pair, error)
    assert 0 < refused < len(pairs) / 4
