"""Products in half precision: nearly those of float32, and only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from worlds import EOS, articles

from mlm.extensions import Extensions, IntraSegment, NGramMemory, SurpriseWeighting, WordCoupling
from mlm.extensions.ngram_memory import STEPS
from mlm.extensions.word_coupling import couple
from mlm.kernels import bfloat16
from mlm.kernels.bfloat16 import lowered, product
from mlm.models.base import AdaptationBase, fold_low_rank
from mlm.models.recurrent import RecurrentLM, initial_weights
from mlm.reading.scoring import score_articles
from mlm.reading.step import prepared
from mlm.rules.hand_made import RMS
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank

DYNAMIC = ("softmax.low", "softmax.bias", "lstm.0.input.low", "lstm.0.recurrent", "lstm.0.bias")
ROUNDING = 2.0**-8
"""Of a bfloat16 number, relative."""


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def on() -> Iterator[None]:
    with bfloat16.bfloat16_products():
        yield


def _shapes(of: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs to multiply: plain, a transposed factor, lanes."""
    return [
        (of(_random(5, 7)), of(_random(7, 3, seed=1))),
        (of(_random(7, 5)).mT, of(_random(3, 7, seed=1)).mT),
        (of(_random(2, 5, 7)), of(_random(2, 3, 7, seed=1)).mT),
    ]


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize("add", [False, True])
def test_product_rounds_its_factors_and_nothing_else(add: bool) -> None:
    for x, y in _shapes(lambda t: t.bfloat16().float()):  # nothing is left to round in these
        exact = x @ y
        out = torch.ones_like(exact)
        found = product(x, y, out, add)
        assert found is out
        # the product itself is rounded once, then added to what was there in float32
        torch.testing.assert_close(found - float(add), exact, rtol=ROUNDING, atol=ROUNDING)
    x, y = _shapes(lambda t: t)[0]
    assert not torch.equal(product(x, y, torch.empty(5, 3)), x @ y)


def test_product_is_exact_unless_asked() -> None:
    for x, y in _shapes(lambda t: t):
        assert torch.equal(product(x, y, torch.empty_like(x @ y)), x @ y)
    with bfloat16.bfloat16_products():  # float64 stays what it is
        for x, y in _shapes(lambda t: t.double()):
            assert torch.equal(product(x, y, torch.empty_like(x @ y)), x @ y)
            assert lowered(x) is x


@pytest.mark.usefixtures("on")
def test_lowered_again_and_again() -> None:
    """What `done` gives back is not what somebody still reads."""
    x, y = _random(600, 900), _random(600, 900, seed=1)
    first = lowered(x)
    second = lowered(y)
    assert torch.equal(first, x.bfloat16())
    bfloat16.release_lowered(first, x)
    third = lowered(y)
    assert torch.equal(second, y.bfloat16())
    assert torch.equal(third, second)


def _world() -> tuple[AdaptationBase, list[np.ndarray]]:
    """Everything the output layer can do at once, in float32."""
    shape = RecurrentLM(50, 16, 16, 1)
    weights = initial_weights(shape, torch.Generator().manual_seed(0))
    random = np.random.default_rng(3)
    texts = [np.tile(random.integers(1, 50, size=20), n) for n in (9, 4, 6)]
    text = Text(articles((30, 40)), 70, EOS)
    own = add_low_rank(weights, shape, DYNAMIC, 99, text, 1000)
    bare = AdaptationBase(shape, own, DYNAMIC, {}, 3.9, 10)
    own = couple(bare, torch.linalg.qr(_random(50, 4))[0]).weights
    rms = {n: _random(*own[n].shape, seed=k).abs() * 0.1 + 0.05 for k, n in enumerate(DYNAMIC)}
    wanted = Extensions(
        word_coupling=WordCoupling(directions=4),
        intra_segment=IntraSegment(on=True),
        # words are hardly told apart here
        ngram_memory=NGramMemory(tokens=100, steps=tuple(step / 10 for step in STEPS)),
        surprise_weighting=SurpriseWeighting(share=0.25),
    )
    base = AdaptationBase(shape, own, DYNAMIC, rms, 3.9, 10, extensions=wanted.enabled())
    return fold_low_rank(base).derived(), texts


def test_reading_in_half_precision_is_nearly_reading() -> None:
    base, texts = _world()
    setting = {n: torch.tensor(x) for n, x in {"rate": 2e-3, "decay": 0.01}.items()}
    rule = RMS().bind(setting, base)
    ready = prepared(base, rule)
    static = score_articles(base, None, texts, EOS, 3).total
    found: dict[bool, Any] = {}
    for on in (False, True):
        with bfloat16.bfloat16_products(on):
            found[on] = score_articles(ready, rule, texts, EOS, 3)
    exact, near = (np.concatenate(found[on].nll) for on in (False, True))
    assert abs(exact.sum() - static) > 1  # reading does something
    assert not np.array_equal(exact, near)
    np.testing.assert_allclose(near, exact, atol=0.1)
    assert abs(near.mean() - exact.mean()) < 2e-3
