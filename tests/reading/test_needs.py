"""Memory of lanes that read, predicted from sizes, against what a process takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from worlds import tiny_base

from mlm.reading.cache import CacheSetting
from mlm.reading.needs import reading_bytes
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import as_parameters
from mlm.runs.machine import resident_bytes

MEASURE = """
import sys
import mlm
from mlm.reading.needs import reading_bytes
from mlm.runs.machine import resident_bytes

lanes = int(sys.argv[1])
line = "The gribble is a small crustacean, and gribbles eat wood. "
texts = [f"{number}. {line * (15 + 2 * (number % 5))}" for number in range(lanes)]
model = mlm.load("wikipedia-small", device="cpu", threads=1)
ready = [model.ready(rule, "article") for rule in ("static", model.best)]
length = max(len(model.vocabulary.encode_article(text)) for text in texts)
model.score_many(texts, lanes=lanes)
print(resident_bytes("VmHWM"))
print(sum(reading_bytes(r.base, r.bound, r.cache, lanes, length, True) for r in ready))
"""


@pytest.mark.slow
@pytest.mark.skipif(not resident_bytes("VmHWM"), reason="the system does not tell")
def test_a_lane_of_the_released_model_takes_what_is_predicted() -> None:
    """Within a quarter, as `python -m benchmarks.memory` asks of stages; texts of several lengths:
    some lanes end before others."""
    found = []
    for lanes in (5, 10):  # fewer would hide behind what loading took
        words = [sys.executable, "-c", MEASURE, str(lanes)]
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        )
        found.append([float(line) for line in done.stdout.split()])
    (peak_5, said_5), (peak_10, said_10) = found
    assert said_10 - said_5 == pytest.approx(peak_10 - peak_5, rel=0.25)


def test_more_of_anything_takes_more() -> None:
    base = tiny_base()
    rule = RMS().bind(as_parameters({"rate": 1e-3, "decay": 1e-3}, base), base)
    cache = [CacheSetting(1.0, 0.1, 100)]
    usual = reading_bytes(base, rule, (), 2, 50, full=False)
    assert reading_bytes(base, rule, (), 4, 50, full=False) == 2 * usual
    more = (
        reading_bytes(base, rule, cache, 2, 50, full=False),
        reading_bytes(base, rule, (), 2, 50, full=True),
    )
    assert min(more) > usual
    assert max(more) < reading_bytes(base, rule, cache, 2, 50, full=True)
    static = reading_bytes(base, None, (), 2, 50, full=False)
    own = 4 * sum(w.numel() for w in base.start().values())
    assert usual - static == 2 * 5 * own, "two lanes: before, after, spare, reset, gradient"
