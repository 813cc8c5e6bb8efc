"""Stage 1's objective and schedule; the Fisher; lanes of stage 2; tuning spends what it may."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from worlds import EOS, articles, tiny_base

from mlm.base.errors import UserError
from mlm.base.schedule import cosine
from mlm.models.output_layer import token_nll
from mlm.models.recurrent import RecurrentLM, initial_state, run_lstm
from mlm.reading.scoring import score_protocol
from mlm.reading.static import StaticReader, static_loss
from mlm.rules.hand_made import RMS, SGD
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, ModelConfig
from mlm.text.streams import LaneStream, MixedLanes, Text
from mlm.training.fisher import estimate_fisher, smooth_fisher
from mlm.training.language_model import LMTrainer, shape_of, unigram_biases
from mlm.training.tuning import RATES, TuneText, losses_of, tune


def _text(lengths: tuple[int, ...]) -> Text:
    return Text(articles(lengths), sum(lengths), EOS)


def test_objective_adds_ar_and_tar_over_real_tokens_only() -> None:
    """Merity et al. 2018, section 4.3: 2 mean(h^2) + 1 mean((h_t+1 - h_t)^2), no padding."""
    lm = dataclasses.replace(
        LMTrainingConfig(), lanes=2, segment=6, ar=2.0, tar=1.0, precision="float32",
        dropout_input=0.0, dropout_hidden=0.0, dropout_output=0.0,
    )  # fmt: skip
    config = Config(model=ModelConfig(embedding=4, hidden=6, layers=2), lm=lm)
    trainer = LMTrainer(config, shape_of(config, 12), _text((6, 3)), torch.device("cpu"))
    segment = next(trainer.stream)
    objective, loss, _ = trainer.loss(segment, [], segment.mask)
    zero = trainer.shape.initial_state(2)
    hidden = trainer.shape.run(trainer.weights, segment.inputs, zero)
    nll = token_nll(trainer.weights, trainer.shape, hidden.output, segment.targets)
    rows = [(lane, t) for lane in range(2) for t in range(int(segment.mask[lane].sum()))]
    assert len(rows) == 9
    h = torch.stack([hidden.raw[r] for r in rows])
    steps = torch.stack([hidden.raw[b, t] - hidden.raw[b, t - 1] for b, t in rows if t])
    mean = torch.stack([nll[r] for r in rows]).mean()
    torch.testing.assert_close(loss, mean.detach())
    want = mean + 2 * h.square().mean() + steps.square().mean()
    torch.testing.assert_close(objective, want)


def test_byte_tokens_that_training_never_saw_cost_little_more_than_guessing_them() -> None:
    """All logits are pushed down for a token that never comes; noise keeps those of bytes."""
    noise, text = np.arange(12, 28), Text([np.tile(np.arange(1, 12), 60)] * 2, 1320, EOS)
    model = ModelConfig(embedding=16, hidden=16, adaptive_above=1000)
    cost = []
    for share in (0.0, 0.1):
        lm = dataclasses.replace(
            LMTrainingConfig(), lanes=2, segment=30, epochs=8.0, learning_rate=0.02,
            precision="float32", byte_noise=share,
        )  # fmt: skip
        config = Config(model=model, lm=lm)
        trainer = LMTrainer(
            config,
            shape_of(config, 28),
            dataclasses.replace(text, noise=noise),
            torch.device("cpu"),
        )
        while trainer.step < trainer.steps:
            trainer.train_step()
        strange = Text([np.random.default_rng(0).choice(noise, 200)], 1, EOS)
        cost.append(static_loss(trainer.model(), trainer.shape, strange, 1, 30) / math.log(2))
    assert cost[1] < 6 < 8 < cost[0], "bits; to guess one of 16 costs 4"


def test_the_start_gives_noise_its_share() -> None:
    text = dataclasses.replace(_text((130, 80)), noise=np.array([10, 11, 11]))
    shape = RecurrentLM(12, 8, 8, 1)
    plain, noisy = (unigram_biases(shape, text, s)["softmax.bias"].exp() for s in (0.0, 0.2))
    assert float(noisy[11] / noisy[9]) > float(plain[11] / plain[9])
    assert float(noisy[10:].sum() - plain[10:].sum()) == pytest.approx(0.2, abs=0.1)


def test_cosine_warms_up_and_ends_at_zero() -> None:
    factors = [cosine(k, 100, 0.1) for k in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[55] < factors[20]
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert cosine(0, 10) == 1.0


@pytest.mark.parametrize("cutoffs", [(), (5, 9)])
def test_training_starts_at_the_unigram_model(cutoffs: tuple[int, ...]) -> None:
    """Where the layers say nothing, a word has its share of the text (and one occurrence more)."""
    text, shape = _text((13, 8)), RecurrentLM(12, 8, 8, 1, cutoffs)
    weights = shape.initial_weights(torch.Generator().manual_seed(0)) | unigram_biases(shape, text)
    every = torch.arange(12)[None]
    nll = token_nll(weights, shape, torch.zeros(1, 12, 8), every)[0]
    counts = np.bincount(np.concatenate(list(text.articles)), minlength=12) + 1
    torch.testing.assert_close(
        nll.exp().reciprocal(), torch.tensor(counts / counts.sum()).float(), rtol=1e-5, atol=0
    )


def test_fisher_is_the_mean_square_of_segment_gradients() -> None:
    """One lane, written out: the gradient of every whole segment, ragged ends left out."""
    base = tiny_base(("softmax.bias", "lstm.1.recurrent"))
    text = _text((13,))  # two whole segments of 5 and an end of 3
    found = estimate_fisher(base, text, 13)
    state = initial_state(base.model, 1, dtype=torch.float64)
    leaves = {n: w.clone().requires_grad_() for n, w in base.start().items()}
    tokens = torch.tensor(text.articles[0])
    squares = {n: torch.zeros_like(w) for n, w in leaves.items()}
    before = torch.cat([torch.tensor([EOS]), tokens[:-1]])
    losses = []
    for at in (0, 5, 10):
        ids, targets = before[None, at : at + 5], tokens[None, at : at + 5]
        hidden = run_lstm({**base.weights, **leaves}, base.model, ids, state)
        nll = token_nll({**base.weights, **leaves}, base.model, hidden.output, targets)
        losses.append(nll.detach())
        state = hidden.state.detach()
        if at < 10:
            for n, g in zip(
                leaves, torch.autograd.grad(nll.mean(), list(leaves.values())), strict=True
            ):
                squares[n] += g.square()
    for n, total in squares.items():
        torch.testing.assert_close(found.rms[n], (total / 2).sqrt(), rtol=1e-10, atol=1e-14)
    assert found.loss == pytest.approx(float(torch.cat(losses, 1).mean()))


def test_a_prior_keeps_the_fisher_of_unseen_words_off_zero() -> None:
    """Every weight: (1 - prior) times its own mean square and prior times its tensor's."""
    base = tiny_base(("embedding", "softmax.bias"))
    text = _text((13,))
    plain, mixed = estimate_fisher(base, text, 13), estimate_fisher(base, text, 13, prior=0.25)
    for n, rms in plain.rms.items():
        want = 0.75 * rms.square() + 0.25 * rms.square().mean()
        torch.testing.assert_close(mixed.rms[n].square(), want, rtol=1e-10, atol=1e-16)
    assert smooth_fisher(torch.tensor([0.0, 4.0]), 0.5).tolist() == [1.0, 3.0]


def test_fisher_needs_one_whole_segment() -> None:
    base = tiny_base(("softmax.bias",))
    with pytest.raises(UserError, match="as long as one segment"):
        estimate_fisher(base, _text((4, 3)), 7)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mixed_lanes_reset_only_the_article_lanes(share: float) -> None:
    lanes = MixedLanes(_text((11, 7, 9, 12)), 4, share, 5, seed=0)
    pieces = [lanes.next() for _ in range(5)]
    later = torch.stack([p.new for p in pieces[1:]]).any(0).tolist()
    long = round(4 * share)
    assert all(later[: 4 - long])  # each has met another border after its first article
    again = MixedLanes(_text((11, 7, 9, 12)), 4, share, 5, seed=0)
    for _ in range(2):
        again.next()
    other = MixedLanes(_text((11, 7, 9, 12)), 4, share, 5, seed=0)
    other.load_state_dict(again.state_dict())
    assert torch.equal(other.next().targets, pieces[2].targets)


def test_a_long_lane_joins_articles_without_a_border() -> None:
    lanes = MixedLanes(_text((11, 7, 9, 12)), 1, 1.0, 5, seed=0)
    pieces = [lanes.next() for _ in range(8)]  # 39 tokens: 8 segments of one text
    assert [bool(p.new[0]) for p in pieces] == [True] + [False] * 7
    assert sum(int(p.mask.sum()) for p in pieces) == 39


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("rule", [SGD(), RMS()])
@pytest.mark.parametrize("protocol", ["article", "stream"])
def test_tuning_spends_its_budget_and_finds_the_best(rule, budget: int, protocol: str) -> None:
    base = tiny_base(("softmax.bias",))
    text = TuneText([np.tile(np.array([3, 7, 7, 1]), 25), np.tile(np.array([2, 9]), 20)], EOS, 2)
    noted = []
    trials = tune(base, rule, text, protocol, budget, noted.append)
    assert len(trials) == len(noted) == budget
    assert len({tuple(t.setting.items()) for t in trials}) == budget
    assert trials[0].nll == min(t.nll for t in trials)
    like = next(iter(base.rms.values()))
    phi = {k: like.new_tensor(v) for k, v in trials[0].setting.items()}
    alone = score_protocol(base, rule.bind(phi, base), text.articles, EOS, protocol, 2).total
    assert alone == pytest.approx(trials[0].nll, rel=1e-9)


def test_the_search_leaves_its_grid_when_the_best_lies_at_the_edge() -> None:
    base = tiny_base(("softmax.bias",))
    text = TuneText([np.tile(np.array([3, 7, 7, 1]), 50)], EOS, 1)
    trials = tune(base, RMS(), text, "article", 12)
    assert trials[0].setting["rate"] > RATES[1]
    static = score_protocol(base, None, text.articles, EOS, "article", 1).total
    at_edge = min(t.nll for t in trials if t.setting["rate"] <= RATES[1] * 1.001)
    assert trials[0].nll < at_edge < static


def test_exploding_settings_count_what_they_cost() -> None:
    """Reading resets such a lane before every segment: it knows nothing but theta_0."""
    base = tiny_base()
    text = TuneText(articles((60,)), EOS, 1)
    pieces = LaneStream(text.articles, 1, base.segment, EOS)
    want = sum(float((StaticReader(base, 1).read(p).nll * p.mask).sum()) for p in pieces)
    for protocol in ("article", "stream"):
        settings = [{"rate": math.inf}, {"rate": 1e-3}]
        exploding, small = losses_of(base, SGD(), settings, text, protocol)
        assert exploding == pytest.approx(want, rel=1e-12)
        assert small != pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("protocol", ["article", "stream"])
def test_a_model_that_is_broken_before_it_adapts_cannot_be_tuned(protocol: str) -> None:
    base = tiny_base(("softmax.bias",))
    base.weights["embedding"][3] = np.nan
    text = TuneText(articles((60,)), EOS, 1)
    assert losses_of(base, SGD(), [{"rate": 1e-3}], text, protocol) == [np.inf]
    with pytest.raises(UserError, match="every setting tried diverged"):
        tune(base, SGD(), text, protocol, 2)
