"""Intra-segment adaptation: a segment's words teach before its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from tiny import perplexities
from worlds import EOS, TinyBase, articles, segments, tiny_base, with_extensions

from mlm import kernels
from mlm.extensions import Extensions, IntraSegment, NGramMemory, SurpriseWeighting, WordCoupling
from mlm.extensions.ngram_memory import ALIKE, LONGEST_CONTEXT
from mlm.extensions.word_coupling import COUPLING, couple
from mlm.models.base import AdaptationBase, fold_low_rank
from mlm.models.low_rank import coupled
from mlm.models.output_layer import MOST_TAUGHT, similarity
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles
from mlm.reading.step import Step, begin, prepared, step
from mlm.rules.family import open_slow, start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS, SGD
from mlm.rules.protocol import Bound, UpdateRule
from mlm.settings.sections import MetaConfig
from mlm.text.streams import Text
from mlm.training.directions import add_low_rank
from mlm.training.meta import MetaTrainer

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-11}
DYNAMIC = ("softmax.low", "softmax.bias", "lstm.0.input.low", "lstm.0.recurrent")
OUTPUT = ("softmax.low", "softmax.bias")
ROWS, COLUMNS = IntraSegment().key("rows"), IntraSegment().key("columns")


def _random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _base(dynamic: tuple[str, ...] = DYNAMIC, together: bool = True, flat: bool = False) -> Any:
    plain = tiny_base((), segment=7)
    text = Text(articles((11, 23, 9)), 43, EOS)
    weights = add_low_rank(plain.weights, plain.model, dynamic, 99, text, 1000)
    if together:
        bare = dataclasses.replace(plain, weights=weights, dynamic=dynamic)
        weights = couple(bare, torch.linalg.qr(_random(12, 3))[0]).weights
    rms = {n: _random(*weights[n].shape, seed=50 + k).abs() for k, n in enumerate(dynamic)}
    if flat:
        rms = {n: torch.full_like(r, 0.5) for n, r in rms.items()}
    found = fold_low_rank(TinyBase(plain.model, weights, dynamic, rms, 2.3, plain.segment))
    directions = WordCoupling(directions=3 if together else 0)
    wanted = Extensions(word_coupling=directions, intra_segment=IntraSegment(on=True))
    return with_extensions(found, *wanted.enabled())


def _without(base: AdaptationBase) -> AdaptationBase:
    return base.keeping(lambda extension: not isinstance(extension, IntraSegment))


def _rms(base: AdaptationBase, rate: float = 0.05, decay: float = 0.0) -> Bound:
    setting = {"rate": rate, "decay": decay}
    return RMS().bind({n: torch.tensor(x).double() for n, x in setting.items()}, base)


def _one_step(base: AdaptationBase, rule: Bound, tokens: np.ndarray) -> Step:
    """The lanes read the segment after one that they have learned from."""
    first, second = (torch.from_numpy(tokens[:, k : k + 8]) for k in (0, 7))

    def piece(ids: torch.Tensor, new: bool) -> Any:
        like = segments(base, (40, 40, 40), 3, 1)[0]
        own = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "new": torch.full((3,), new)}
        return like._replace(mask=torch.ones(3, 7, dtype=torch.bool), **own)

    reader = step(base, rule, begin(base, 3, rule), piece(first, True)).after
    return step(base, rule, reader, piece(second, False))


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(1, 12, (3, 15))


PATHS = pytest.mark.parametrize("path", ["compiled", "eager"])


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def choose(path: str) -> None:
        if path == "eager":
            monkeypatch.setattr(kernels, "usable", lambda *tensors: False)

    return choose


@PATHS
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("surprise", [0.0, 0.3])
def test_every_word_predicts_as_after_a_step_on_the_words_before_it(
    path: str, together: bool, surprise: float, tokens: np.ndarray, on: Callable[[str], None]
) -> None:
    """Against updating the output layer word by word with the gradients of the start's weights.

    A Fisher that is the same everywhere makes the nearest a, c and d exact.
    """
    on(path)
    base = _base(OUTPUT, together, flat=True)
    if surprise:
        base = with_extensions(base, *base.extensions, SurpriseWeighting(share=surprise))
    rule = _rms(base)
    now = _one_step(prepared(base, rule), rule, tokens)
    q = base.weights.get(COUPLING, torch.zeros(12, 0, dtype=torch.float64))
    t_VV = torch.eye(12, dtype=torch.float64) + q @ q.t()
    targets = torch.from_numpy(tokens[:, 8:15])
    rate = 0.05 / (0.5 + 2e-5)
    near: dict[str, Any] = {"rtol": 0.0, "atol": 1e-9}  # steps are read off a difference
    for lane in range(3):
        low, bias = (now.before.weights[n][lane] for n in OUTPUT)
        keys = now.scored.output[lane] @ base.weights["softmax.basis"].t()
        low_now, bias_now = low.clone(), bias.clone()
        of_low, of_bias = torch.zeros_like(low), torch.zeros_like(bias)
        for t in range(7):
            # d moves coupled words, too: the bias as a column of the matrix
            logits = t_VV @ (low_now @ keys[t]) + t_VV @ (bias_now - bias) + bias
            want = -logits.log_softmax(0)[targets[lane, t]]
            torch.testing.assert_close(now.scored.nll[lane, t], want, **near)
            seen, error = logits.softmax(0), (t_VV @ (low @ keys[t]) + bias).softmax(0)
            for p in (seen, error):
                loss = -float(p[targets[lane, t]].log())
                p[targets[lane, t]] -= 1
                p *= 1 - surprise + surprise * loss / base.loss
            of_low += torch.outer(t_VV @ seen / 7, keys[t])
            of_bias += seen / 7
            gradient = t_VV @ error / 7
            low_now = low_now - rate * torch.outer(gradient, keys[t])
            bias_now = bias_now - rate * gradient
        torch.testing.assert_close(now.scored.gradients[OUTPUT[0]][lane], of_low, **near)
        torch.testing.assert_close(now.scored.gradients[OUTPUT[1]][lane], of_bias, **near)


@pytest.mark.parametrize("mode", ["reverse", "checkpoint", "forward"])
def test_the_meta_gradient_is_that_of_the_eager_twin(mode: Any, on: Callable[[str], None]) -> None:
    base = _base()
    rule = LinearGates("three")
    setting = {n: torch.tensor(x).double() for n, x in {"rate": 0.02, "decay": 0.05}.items()}
    phi = start_at(rule, RMS(), setting, base)
    pieces = segments(base, (11, 23, 3, 1, 17), 3, 5)

    def found(base: AdaptationBase) -> Any:
        bound = rule.bind(phi, base)
        able = prepared(base, bound)
        return meta_gradient(able, bound, phi, begin(able, 3, bound), pieces, mode)

    fast, without = found(base), found(_without(base))
    on("eager")
    slow = found(base)
    assert fast.loss == pytest.approx(slow.loss, abs=1e-11)
    assert fast.loss != pytest.approx(without.loss, abs=1e-4)
    for name, value in slow.gradients.items():
        torch.testing.assert_close(fast.gradients[name], value, rtol=1e-8, atol=1e-10)


def test_training_sees_what_scores_will_be() -> None:
    """The meta-loss of an unroll is the loss that scoring the same text finds."""
    base = _base()
    rule = LinearGates("three")
    setting = {n: torch.tensor(x).double() for n, x in {"rate": 0.02, "decay": 0.05}.items()}
    phi = start_at(rule, RMS(), setting, base)
    settings = MetaConfig(lanes=1, unroll=4, stream_share=0.0)
    text = Text(articles((28,)), 28, EOS)
    trainer = MetaTrainer(base, rule, phi, text, settings, 0)
    loss, _ = trainer.train_step()
    scored = score_articles(base, rule.bind(phi, base), text.articles, EOS, 1).nll[0]
    assert loss == pytest.approx(float(scored[7:].mean()), rel=1e-10)


def test_a_word_knows_nothing_of_those_behind_it(tokens: np.ndarray) -> None:
    base = _base()
    rule = _rms(base)
    able = prepared(base, rule)
    other = tokens.copy()
    other[:, 12] = (other[:, 12] + 1) % 12
    one, two = (_one_step(able, rule, ids).scored.nll for ids in (tokens, other))
    torch.testing.assert_close(one[:, :4], two[:, :4], **EXACT)  # the fifth target is another
    assert bool((one[:, 4:] != two[:, 4:]).all())


def test_the_kernels_agree_with_their_eager_twin_on_ragged_text(on: Callable[[str], None]) -> None:
    base, texts = _base(), articles((11, 23, 3, 1, 17))
    fast = score_articles(base, _rms(base), texts, EOS, 3)
    on("eager")
    slow = score_articles(base, _rms(base), texts, EOS, 3)
    one_by_one = score_articles(base, _rms(base), texts, EOS, 1)
    for a, b, c in zip(fast.nll, slow.nll, one_by_one.nll, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)
        np.testing.assert_allclose(b, c, atol=1e-11)


def test_a_learned_rule_teaches_with_its_own_steps() -> None:
    """At RMS's own start with four levels: RMS's steps; a gate twice as open: twice those."""
    base = _base()
    setting = {n: torch.tensor(x).double() for n, x in {"rate": 0.02, "decay": 0.05}.items()}
    rule = LinearGates("four", per_unit=True, slow=True)
    phi = start_at(rule, RMS(), setting, base)
    open_slow(phi)
    want = prepared(base, RMS().bind(setting, base)).weights
    found = prepared(base, rule.bind(phi, base)).weights
    for name in (ROWS, COLUMNS):
        torch.testing.assert_close(found[name], want[name], rtol=1e-9, atol=0.0)
    rate = {**setting, "rate": 2 * setting["rate"]}
    twice = prepared(base, RMS().bind(rate, base)).weights
    torch.testing.assert_close(twice[ROWS], 2 * want[ROWS], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(twice[COLUMNS], want[COLUMNS], rtol=1e-9, atol=0.0)


def test_a_segment_that_repeats_itself_is_predicted_better() -> None:
    """Of the first segment, 1 2 3 1 2 3 1: what comes again, before any update."""
    base, text = _base(OUTPUT), [np.tile([1, 2, 3], 3)]
    rule = _rms(base, rate=0.1)
    plain = _without(base)
    able, unable = (score_articles(m, rule, text, EOS, 1).nll[0][3:7] for m in (base, plain))
    assert float(able.sum()) < float(unable.sum()) - 0.03


@PATHS
@pytest.mark.parametrize("rate", [0.05, 50.0])
def test_n_grams_teach_within_the_segment_too(
    path: str, rate: float, on: Callable[[str], None]
) -> None:
    """In an article's first segment, where no row has been written: a context that comes again
    moves the logits by the errors behind it. At too high a rate the change is bounded."""
    on(path)
    plain = _base(OUTPUT)
    base = with_extensions(plain, *plain.extensions, NGramMemory(tokens=100))
    steps = base.weights["ngram_memory/steps"].tolist()
    rule = _rms(base, rate)
    able = prepared(base, rule)
    tokens = [EOS, 1, 2, 3, 1, 2, 3, 1, 2]
    piece = segments(base, (40,), 1, 1)[0]
    inputs, targets = torch.tensor([tokens[:7]]), torch.tensor([tokens[1:8]])
    now = step(able, rule, begin(able, 1, rule), piece._replace(inputs=inputs, targets=targets))
    again = torch.zeros(7, 7, dtype=torch.float64)
    for order, eta in zip(range(1, LONGEST_CONTEXT + 1), steps, strict=True):
        contexts = [tuple(tokens[t + 1 - order : t + 1]) if t + 1 >= order else t for t in range(7)]
        for t in range(7):
            for s in range(t):
                if contexts[s] == contexts[t]:
                    apart = (now.scored.output[0, s] - now.scored.output[0, t]).square().sum()
                    alike_st = float((-ALIKE / 2 * apart).exp()) if order == 1 else 1.0
                    again[t, s] += alike_st * eta / (1 + contexts[:s].count(contexts[s]))
    assert int(again.count_nonzero()) == 3  # 1, 1 2, 1 2 3 and what they end with come again
    keys = now.scored.output[0] @ able.weights["softmax.basis"].t()
    q_VS = able.weights[COUPLING]
    logits = coupled(keys @ able.weights["softmax.low"].t(), q_VS)
    logits = logits + able.weights["softmax.bias"]
    error = logits.softmax(-1)
    error[range(7), targets[0]] -= 1
    own = similarity(keys[None], able.weights[COLUMNS])[0] @ error / 7
    lost = able.weights[ROWS] * coupled(coupled(own, q_VS), q_VS) + again @ error
    bounded = torch.maximum(lost.clamp(max=MOST_TAUGHT), logits.log_softmax(-1))
    assert bool((bounded > lost).any() and (bounded < lost).any()) == (rate > 1)
    logits = logits - bounded
    want = -logits.log_softmax(-1)[range(7), targets[0]]
    torch.testing.assert_close(now.scored.nll[0], want, **EXACT)


def test_hand_made_rules_read_as_published() -> None:
    base = _base()

    def on(rule: UpdateRule) -> bool:
        return any(isinstance(e, IntraSegment) for e in base.for_rule(rule).extensions)

    assert not on(RMS())
    assert not on(SGD())
    assert on(LinearGates("three"))


@pytest.mark.slow
def test_a_run_that_adapts_within_segments(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """A rule scored with and without; hand-made rules stay as they are."""
    folder = finished.copy(tmp_path / "run")
    low = "--dynamic", "softmax.low,softmax.bias", "--rank", 99
    rules = "--train-rules", "three_levels", "--rules", "static", "rms", "three_levels"
    words = ("--out", folder, *low, *rules)
    done = command("train", *words, "--intra-segment.on", "--stages", "meta", "evaluate")
    assert done.code == 0, done.err
    within = perplexities(folder)
    assert command("evaluate", folder, "--no-draw").code == 0
    assert perplexities(folder) == within
    done = command("train", *words, "--intra-segment.no-on", "--stages", "evaluate")
    assert done.code == 0, done.err
    plain = perplexities(folder)
    for protocol in ("article", "stream"):
        for rule in ("static", "rms"):
            assert within[protocol, rule] == plain[protocol, rule]
        assert within[protocol, "three_levels"] != plain[protocol, "three_levels"]
    lstm = "--out", folder, "--dynamic", "lstm", "--intra-segment.on", "--stages", "meta"
    assert "--intra-segment.on needs --dynamic softmax.low" in command("train", *lstm).error
    learn = "--stages", "meta", "--meta.learn", "rule", "theta_0"
    error = command("train", *words, "--intra-segment.on", *learn).error
    assert "--intra-segment.on goes with --meta.learn rule only" in error
    error = command("train", *words, "--intra-segment.on", "--meta.gradient", "second").error
    assert "--intra-segment.on goes with reverse, checkpoint or forward" in error
