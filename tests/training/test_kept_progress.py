"""Searches and sums that are stopped after every step give what they give in one go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import EOS, articles, tiny_base

from mlm.base.progress import NOTHING_KEPT, Progress, Tick, Work
from mlm.rules.hand_made import RMS
from mlm.text.streams import Text
from mlm.training.cache_tuning import tune_cache
from mlm.training.directions import second_moments
from mlm.training.fisher import estimate_fisher
from mlm.training.kept_progress import KeptProgress
from mlm.training.tuning import TuneText, tune

BASE = tiny_base(("softmax.bias", "lstm.1.recurrent"))
TEXT = Text(articles((33, 12, 21, 8)), 74, EOS)
TUNED = TuneText([np.tile(np.array([3, 7, 7, 1]), 9), np.tile(np.array([2, 9]), 8)], EOS, 2)


class Stopping(KeptProgress):
    """Ctrl-C after every step that does something."""

    def of(self, name: str, work: Work) -> Any:
        kept = super().of(name, work)

        class Stopped:
            def __enter__(self) -> Tick:
                kept.__enter__()
                before = work.state()[1]

                def stop() -> None:
                    if work.state()[1] != before:
                        raise KeyboardInterrupt

                return stop

            def __exit__(self, *error: Any) -> bool | None:
                return kept.__exit__(*error)

        return Stopped()


def _fisher(keep: Progress) -> list[torch.Tensor]:
    found = estimate_fisher(BASE, TEXT, 70, lanes=2, progress=keep)
    return [*found.rms.values(), torch.tensor(found.loss)]


def _moments(keep: Progress) -> list[torch.Tensor]:
    model: Any = BASE.model
    names = ["softmax", "lstm.0.input"]
    return list(second_moments(BASE.weights, model, names, TEXT, 70, 2, 5, keep).values())


def _trials(found: Any) -> list[torch.Tensor]:
    return [torch.tensor([*t.setting.values(), t.nll], dtype=torch.float64) for t in found]


def _search(protocol: str) -> Callable[[Progress], list[torch.Tensor]]:
    return lambda keep: _trials(tune(BASE, RMS(), TUNED, protocol, 8, progress=keep))


def _cache(keep: Progress) -> list[torch.Tensor]:
    return _trials(tune_cache(BASE, None, TUNED, "article", 9, 20, keep))


@pytest.mark.parametrize(
    ("work", "stops"),
    [(_fisher, 8), (_moments, 6), (_search("article"), 8), (_search("stream"), 4), (_cache, 2)],
    ids=["fisher", "moments", "article", "stream", "cache"],
)
def test_work_stopped_after_every_step_is_the_work_of_one_go(
    work: Callable[[Progress], list[torch.Tensor]], stops: int, tmp_path: Path
) -> None:
    keep, seen = Stopping(tmp_path, "stage", "mark", 1e9), 0
    while True:
        try:
            found = work(keep)
            break
        except KeyboardInterrupt:
            seen += 1
            assert seen < 30
    assert seen >= stops
    want = work(NOTHING_KEPT)
    assert len(found) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert list(tmp_path.glob("unfinished_stage_*"))
    keep.forget()
    assert not list(tmp_path.iterdir())


def test_what_was_made_from_something_else_or_is_damaged_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = KeptProgress(tmp_path, "stage", "mark", 1e9)
    want = _fisher(keep)
    other = KeptProgress(tmp_path, "stage", "another", 1e9)
    file = next(tmp_path.iterdir())
    before = file.read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(_fisher(other), want, strict=True))
    assert file.read_bytes() != before  # it is the other's now
    file.write_bytes(before[:100])
    assert all(torch.equal(a, b) for a, b in zip(_fisher(keep), want, strict=True))
    assert "this part begins again" in capsys.readouterr().err
