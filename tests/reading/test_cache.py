"""The neural cache: equal to sums written out token by token, causal, the same for any lanes."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import EOS, articles, tiny_base

from mlm.base.errors import UserError
from mlm.models.base import AdaptationBase
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.scoring import score_articles, score_protocol
from mlm.reading.step import begin, step
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Bound
from mlm.text.streams import LaneStream
from mlm.training import cache_tuning
from mlm.training.cache_tuning import PUBLISHED, THETAS, tune_cache
from mlm.training.tuning import TuneText

LENGTHS = (11, 23, 3, 1, 17, 8)
"""Articles that end inside a segment of 5, one shorter than it, one of a single token."""
SETTINGS = [
    CacheSetting(theta, weight, window)
    for theta, weight, window in ((0.3, 0.1, 7), (2.0, 0.4, 3), (0.0, 0.9, 50), (0.3, 0.6, 1))
]
"""Windows shorter than a segment, longer, and longer than any article."""
DYNAMIC = ("lstm.0.input", "lstm.1.recurrent", "softmax.bias", "embedding")


def _slow(nll: np.ndarray, h_TE: np.ndarray, words, setting: CacheSetting) -> list[float]:
    """Losses of one article: eqs. 3 and 4 of Grave et al., a dictionary of sums at every token."""
    mixed = []
    for t, word in enumerate(words):
        past = range(max(0, t - setting.window), t)
        if not past:
            mixed.append(nll[t])
            continue
        scores = {i: setting.theta * float(np.dot(h_TE[t], h_TE[i])) for i in past}
        top = max(scores.values())
        sums: dict[int, float] = defaultdict(float)
        for i in past:
            sums[int(words[i])] += math.exp(scores[i] - top)
        share = sums[int(word)] / sum(sums.values())
        model = math.exp(-nll[t])
        mixed.append(-math.log((1 - setting.weight) * model + setting.weight * share))
    return mixed


def _fast(texts, nll, h, lanes: int, segment: int, dtype=torch.float64) -> list[list[np.ndarray]]:
    """Losses of every setting and article by `Cache`, all lanes kept to the end."""
    found = [[np.zeros(len(text)) for text in texts] for _ in SETTINGS]
    cache = Cache(SETTINGS, torch.zeros(lanes, segment, h[0].shape[1], dtype=dtype))
    for piece in LaneStream(texts, lanes, segment, EOS):
        nll_BM = torch.zeros(lanes, segment, dtype=dtype)
        # What lies beyond an article's end must not matter.
        output_BME = torch.full((lanes, segment, h[0].shape[1]), 9.0, dtype=dtype)
        spans = []
        for lane in range(lanes):
            count = int(piece.mask[lane].sum())
            article, at = int(piece.article[lane]), int(piece.start[lane])
            spans.append((article, slice(at, at + count), count))
            if count:
                nll_BM[lane, :count] = torch.from_numpy(nll[article][at : at + count])
                output_BME[lane, :count] = torch.from_numpy(h[article][at : at + count])
        for column, loss_BM in zip(found, cache.mix(nll_BM, output_BME, piece), strict=True):
            assert bool((loss_BM[~piece.mask] == 0).all())
            for lane, (article, span, count) in enumerate(spans):
                if count:
                    column[article][span] = loss_BM[lane, :count].double().numpy()
    return found


def _made_up(scale: float = 1.0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(articles, losses, outputs) of no model at all."""
    random = np.random.default_rng(1)
    texts = articles(LENGTHS)
    nll = [random.uniform(0.1, 6, len(text)) for text in texts]
    return texts, nll, [scale * random.integers(-4, 5, (len(text), 3)) / 4 for text in texts]


@pytest.mark.parametrize("lanes", [1, 3, 6])
@pytest.mark.parametrize("segment", [1, 5, 64])
def test_cache_equals_sums_written_out(lanes: int, segment: int) -> None:
    texts, nll, h = _made_up()
    found = _fast(texts, nll, h, lanes, segment)
    for setting, column in zip(SETTINGS, found, strict=True):
        for article, text in enumerate(texts):
            want = _slow(nll[article], h[article], text, setting)
            np.testing.assert_allclose(column[article], want, rtol=0, atol=1e-12)
            assert column[article][0] == nll[article][0], "nothing is remembered yet"


def test_what_the_mask_hides_is_not_remembered() -> None:
    """A lane that goes on after a short segment: the losses are those of its real tokens alone."""
    random = np.random.default_rng(2)
    words, nll, h = (
        random.integers(0, 4, 14),
        random.uniform(0.1, 6, 14),
        random.normal(size=(14, 3)),
    )
    setting = CacheSetting(0.8, 0.3, 50)
    cache = Cache([setting], torch.zeros(1, 7, 3, dtype=torch.float64))
    found, real = [], np.ones(14, dtype=bool)
    real[3:7] = False
    for start in (0, 7):
        span, mask = slice(start, start + 7), torch.from_numpy(real[start : start + 7]).unsqueeze(0)
        piece = next(LaneStream([words[span]], 1, 7, EOS))
        piece = piece._replace(mask=mask, new=torch.tensor([start == 0]))
        losses = cache.mix(
            torch.from_numpy(nll[span]).unsqueeze(0), torch.from_numpy(h[span]).unsqueeze(0), piece
        )
        found.append(losses[0][mask].numpy())
    want = _slow(nll[real], h[real], words[real], setting)
    np.testing.assert_allclose(np.concatenate(found), want, rtol=0, atol=1e-12)


def test_large_products_do_not_overflow() -> None:
    """theta h.h in the thousands, in float32; the inputs are exact there."""
    texts, nll, h = _made_up(scale=64.0)
    nll = [np.round(a * 8) / 8 for a in nll]
    found = _fast(texts, nll, h, 3, 5, torch.float32)
    for setting, column in zip(SETTINGS, found, strict=True):
        for article, text in enumerate(texts):
            want = _slow(nll[article], h[article], text, setting)
            np.testing.assert_allclose(column[article], want, rtol=1e-3, atol=1e-3)


def test_mixture_is_a_distribution() -> None:
    """Over all words that might come next, the mixture's probabilities add up to one."""
    texts, _, h = _made_up()
    text, outputs = texts[1][:20], torch.from_numpy(h[1][:20]).unsqueeze(0)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = -logits.log_softmax(0)
    total = np.zeros(len(SETTINGS))
    for word in range(12):
        ends = np.append(text[:19], word)
        nll = model[torch.from_numpy(ends)].unsqueeze(0)
        piece = next(LaneStream([ends], 1, 20, EOS))
        losses = Cache(SETTINGS, outputs).mix(nll, outputs, piece)
        total += np.array([math.exp(-float(loss[0, -1])) for loss in losses])
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("theta", "weight", "window"),
    [
        (-0.1, 0.1, 9),
        (math.inf, 0.1, 9),
        (math.nan, 0.1, 9),
        (0.3, 0, 9),
        (0.3, 1, 9),
        (0.3, 0.1, 0),
    ],
)
def test_settings_that_make_no_mixture_are_refused(theta, weight, window) -> None:
    with pytest.raises(UserError, match="the weight in"):
        CacheSetting(theta, weight, window)


# ---------------------------------------------------------------- on top of a model


def _rule(base: AdaptationBase, kind: str) -> Bound | None:
    if kind == "static":
        return None
    values = {"rate": 0.05, "decay": 0.1}
    return RMS().bind({k: torch.tensor(v).double() for k, v in values.items()}, base)


def _outputs(base: AdaptationBase, rule: Bound | None, text: np.ndarray) -> tuple[Tensor, Tensor]:
    """(losses (T,), outputs (T, E)) of one article: static in one go, adapting step by step."""
    if rule is None:
        piece = next(LaneStream([text], 1, len(text), EOS))
        state = base.model.initial_state(1, dtype=torch.float64)
        with torch.no_grad():
            now = base.model.read(base.weights, piece.inputs, piece.targets, state)
        return now.nll[0], now.output[0]
    reader, losses, outputs = begin(base, 1, rule), [], []
    for piece in LaneStream([text], 1, base.segment, EOS):
        now = step(base, rule, reader, piece)
        reader, mask = now.after, piece.mask[0]
        losses.append(now.scored.nll[0][mask])
        outputs.append(now.scored.output[0][mask])
    return torch.cat(losses), torch.cat(outputs)


@pytest.mark.parametrize("kind", ["static", "rms"])
@pytest.mark.parametrize(("protocol", "lanes"), [("article", 1), ("article", 4), ("stream", 1)])
def test_scores_with_a_cache_equal_the_sums(protocol: str, lanes: int, kind: str) -> None:
    """Article: the cache forgets at borders; stream: it never does. Lanes that end drop out."""
    base = tiny_base(DYNAMIC)
    texts, rule = articles((11, 23, 0, 3, 1, 17)), _rule(base, kind)
    scores = score_protocol(base, rule, texts, EOS, protocol, lanes, cache=SETTINGS)
    plain = score_protocol(base, rule, texts, EOS, protocol, lanes)
    assert plain.cached == []
    np.testing.assert_array_equal(np.concatenate(scores.nll), np.concatenate(plain.nll))
    whole = [np.concatenate(texts)] if protocol == "stream" else [t for t in texts if len(t)]
    for setting, cached in zip(SETTINGS, scores.cached, strict=True):
        assert [len(a) for a in cached.nll] == [len(t) for t in texts]
        want = []
        for text in whole:
            nll, h = _outputs(base, rule, text)
            want += _slow(nll.numpy(), h.numpy(), text, setting)
        np.testing.assert_allclose(np.concatenate(cached.nll), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["static", "rms"])
def test_a_cache_is_causal(kind: str) -> None:
    """A changed token changes no loss before its own."""
    base = tiny_base(DYNAMIC)
    text = articles((31,))[0]
    other = text.copy()
    other[17] = (other[17] + 5) % 12
    a, b = (
        score_articles(base, _rule(base, kind), [t], EOS, 1, cache=SETTINGS).cached
        for t in (text, other)
    )
    for first, second in zip(a, b, strict=True):
        np.testing.assert_array_equal(first.nll[0][:17], second.nll[0][:17])
        assert not np.allclose(first.nll[0][18:], second.nll[0][18:], atol=1e-9)


# ---------------------------------------------------------------- tuning


@pytest.mark.parametrize("budget", [1, 2, 5, 8, 12, 20])
def test_tuning_spends_its_budget_in_three_passes(budget: int, monkeypatch) -> None:
    """Different settings, as many as allowed; the published one is among them; best first."""
    passes = []

    def spy(*words, **more):
        passes.append(len(more["cache"]))
        return score_protocol(*words, **more)

    monkeypatch.setattr(cache_tuning, "score_protocol", spy)
    base, text = tiny_base(DYNAMIC), TuneText(articles((9, 14)), EOS, 2)
    trials = tune_cache(base, None, text, "article", budget, 6)
    tried = [(t.setting["theta"], t.setting["weight"]) for t in trials]
    assert len(set(tried)) == len(tried) == sum(passes) == budget
    assert len(passes) <= 3
    assert PUBLISHED in tried
    assert [t.nll for t in trials] == sorted(t.nll for t in trials)
    if budget >= 5:
        thetas = [theta for theta, _ in tried]
        assert min(thetas) <= THETAS[0] * 1.001
        assert max(thetas) >= THETAS[1] * 0.999


@pytest.mark.parametrize("protocol", ["article", "stream"])
@pytest.mark.parametrize("kind", ["static", "rms"])
def test_a_trials_loss_is_that_of_its_setting(protocol: str, kind: str) -> None:
    base, text = tiny_base(DYNAMIC), TuneText(articles((9, 14)), EOS, 2)
    rule = _rule(base, kind)
    for trial in tune_cache(base, rule, text, protocol, 4, 6):
        setting = CacheSetting(window=6, **trial.setting)
        alone = score_protocol(base, rule, text.articles, EOS, protocol, 2, cache=[setting])
        assert trial.nll == pytest.approx(alone.cached[0].total, rel=1e-13)


@pytest.mark.parametrize("noise", [0.0, 0.8])
def test_tuning_comes_close_to_the_best_setting(noise: float) -> None:
    """A text that repeats itself wants a large theta, one that hardly does a small one.

    Twenty evaluations gain nine tenths of what a dense grid gains over the published setting.
    (Less where lambda should be far above the 0.55 that they can reach.)
    """
    base = tiny_base(DYNAMIC)
    base = dataclasses.replace(base, weights={n: 3 * w for n, w in base.weights.items()})
    random = np.random.default_rng(0)
    tokens = np.tile(articles((23,))[0], 8)
    other = random.random(len(tokens)) < noise
    text = TuneText([np.where(other, random.integers(0, 12, len(tokens)), tokens)], EOS, 1)
    trials = tune_cache(base, None, text, "article", 20, 60)
    published = next(t.nll for t in trials if tuple(t.setting.values()) == PUBLISHED)
    grid = [
        CacheSetting(theta, weight, 60)
        for theta in np.geomspace(0.01, 100, 15)
        for weight in np.linspace(0.02, 0.98, 25)
    ]
    scores = score_articles(base, None, text.articles, EOS, 1, cache=grid)
    losses = [cached.total for cached in scores.cached]
    best = grid[int(np.argmin(losses))]
    assert best.theta < 0.1 if noise else best.theta > 1
    assert published - min(losses) > 5
    assert published - trials[0].nll > 0.9 * (published - min(losses))


def test_losses_that_are_no_numbers_are_not_tuned_on() -> None:
    base = tiny_base(DYNAMIC)
    base.weights["softmax.bias"][3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        tune_cache(base, None, TuneText(articles((9,)), EOS, 1), "article", 3, 6)


def test_a_model_without_an_output_is_refused() -> None:
    with pytest.raises(UserError, match="its forward return"):
        Cache([CacheSetting(1.0, 0.1, 5)], torch.zeros(2, 3, 0))
