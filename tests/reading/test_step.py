"""Reading and the meta-gradient: causal, independent of lanes, equal to a hand-unrolled loop."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from worlds import EOS, articles, segments, tiny_base

from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles, score_protocol, score_stream, word_losses
from mlm.reading.step import begin, open_articles, read, score_segment
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS, SGD
from mlm.text.streams import LaneStream

LENGTHS = (11, 23, 3, 1, 17)
"""Articles that end inside a segment, one shorter than a segment, one of a single token."""
DYNAMIC = ("lstm.0.input", "lstm.1.recurrent", "softmax.bias", "embedding")
SETS = [("fisher", "loss", "age"), ("fisher", "loss", "age", "gradient", "distance")]


def _rule(base, features, flush: bool = True, free_copy: bool = False):
    rule = LinearGates(flush=flush, features=features, free_copy=free_copy)
    phi = rule.start_at_rms(base, 0.02, 0.05)
    g = torch.Generator().manual_seed(4)
    phi = {n: p + 0.1 * torch.randn(p.shape, generator=g).double() for n, p in phi.items()}
    return rule, phi


@pytest.mark.parametrize("features", SETS)
@pytest.mark.parametrize(("flush", "free_copy"), [(True, False), (False, False), (True, True)])
def test_meta_gradient_equals_hand_unrolled_autograd(features, flush, free_copy) -> None:
    """Eight updates of three lanes with article borders inside, every parameter's gradient."""
    base = tiny_base(DYNAMIC)
    pieces = segments(base, LENGTHS, 3, 8)
    assert any(bool(p.new.any()) for p in pieces[1:]), "the test must cross article borders"
    assert any(0 < int(m) < 5 for p in pieces for m in p.mask.sum(1)), "and have ragged ends"
    rule, phi = _rule(base, features, flush, free_copy)
    got = meta_gradient(base, rule.bind(phi, base), phi, begin(base, 3), pieces)
    leaves = {n: p.clone().requires_grad_() for n, p in phi.items()}
    loss, finals = reference.unroll(base, reference.gates(base, rule), leaves, pieces)
    want = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert got.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, g in zip(leaves, want, strict=True):
        assert g is not None
        assert float(g.abs().max()) > 1e-9, f"{name}: nothing to compare"
        torch.testing.assert_close(got.gradients[name], g, rtol=1e-9, atol=1e-13)
    for lane, theta in enumerate(finals):
        for name, w in theta.items():
            torch.testing.assert_close(
                got.reader.weights[name][lane], w.detach(), rtol=1e-11, atol=1e-13
            )


def test_two_unrolls_continue_each_other() -> None:
    """The reader carries weights, state and age: 4 + 4 updates end where 8 do."""
    base = tiny_base(DYNAMIC)
    pieces = segments(base, LENGTHS, 3, 8)
    rule, phi = _rule(base, SETS[0])
    bound = rule.bind(phi, base)
    whole = meta_gradient(base, bound, phi, begin(base, 3), pieces)
    half = meta_gradient(base, bound, phi, begin(base, 3), pieces[:4])
    rest = meta_gradient(base, bound, phi, half.reader, pieces[4:])
    for n in base.dynamic:
        assert torch.equal(whole.reader.weights[n], rest.reader.weights[n])
    assert torch.equal(whole.reader.age, rest.reader.age)


def _bound(base, kind: str):
    if kind == "gates":
        rule, phi = _rule(base, SETS[0])
        return rule.bind(phi, base)
    values = {
        "rate": torch.tensor(0.05, dtype=torch.float64),
        "decay": torch.tensor(0.1, dtype=torch.float64),
    }
    return (RMS() if kind == "rms" else SGD()).bind(values, base)


@pytest.mark.parametrize("kind", ["static", "sgd", "rms", "gates"])
def test_results_do_not_depend_on_lanes(kind: str) -> None:
    """N lanes at once equal N articles one by one, and their order does not matter."""
    base = tiny_base(DYNAMIC)
    texts = articles((11, 23, 3, 1, 17, 0, 8))
    rule = None if kind == "static" else _bound(base, kind)
    one = score_articles(base, rule, texts, EOS, 1)
    for lanes in (2, 5, 64):
        many = score_articles(base, rule, texts, EOS, lanes)
        for a, b in zip(one.nll, many.nll, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
    back = score_articles(base, rule, texts[::-1], EOS, 3)
    for a, b in zip(one.nll, back.nll[::-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)
    assert [len(a) for a in one.nll] == [len(t) for t in texts]


@pytest.mark.parametrize("kind", ["static", "sgd", "rms", "gates"])
@pytest.mark.parametrize("protocol", ["article", "stream"])
def test_scoring_is_causal(protocol: str, kind: str) -> None:
    """A changed token changes no loss before its own, though the weights learn from it after."""
    base = tiny_base(DYNAMIC)
    texts = articles((31,))
    rule = None if kind == "static" else _bound(base, kind)
    changed = [texts[0].copy()]
    changed[0][17] = (changed[0][17] + 5) % 12
    a, b = (score_protocol(base, rule, t, EOS, protocol, 1).nll[0] for t in (texts, changed))
    np.testing.assert_array_equal(a[:17], b[:17])
    assert a[17] != b[17]
    assert not np.allclose(a[25:], b[25:], atol=1e-9)


def test_segment_length_is_only_a_schedule_for_static() -> None:
    texts = articles((31, 12))
    results = [
        score_articles(tiny_base(DYNAMIC, segment=m), None, texts, EOS, 2).nll for m in (1, 5, 64)
    ]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_stream_resets_nothing_and_article_resets_all() -> None:
    base = tiny_base(DYNAMIC)
    texts = articles((25, 25), seed=1)
    rule = _bound(base, "rms")
    stream, article = (
        score_stream(base, rule, texts, EOS),
        score_articles(base, rule, texts, EOS, 2),
    )
    alone = score_articles(base, rule, texts[1:], EOS, 1)
    np.testing.assert_allclose(article.nll[1], alone.nll[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(stream.nll[0], article.nll[0], rtol=0, atol=1e-12)
    assert not np.allclose(stream.nll[1], article.nll[1], atol=1e-6)
    joined = score_articles(base, rule, [np.concatenate(texts)], EOS, 1)
    np.testing.assert_array_equal(np.concatenate(stream.nll), joined.nll[0])


def test_adapting_to_repetition_pays() -> None:
    """A text that repeats itself is predicted better by every adapting rule than by static."""
    base = tiny_base(("softmax.bias", "lstm.1.recurrent"))
    text = [np.tile(np.array([3, 7, 7, 1]), 60)]
    static = score_articles(base, None, text, EOS, 1).total
    for kind in ("sgd", "rms", "gates"):
        assert score_articles(base, _bound(base, kind), text, EOS, 1).total < static - 1


def test_read_leaves_its_reader_untouched() -> None:
    base = tiny_base(DYNAMIC)
    piece = segments(base, LENGTHS, 3, 1)[0]
    reader = begin(base, 3)
    before = {n: w.clone() for n, w in reader.weights.items()}
    after, _ = read(base, _bound(base, "gates"), reader, piece)
    assert all(torch.equal(reader.weights[n], before[n]) for n in before)
    assert all(not torch.equal(after.weights[n], before[n]) for n in before)
    assert reader.age.tolist() == [0, 0, 0]
    assert after.age.tolist() == [1, 1, 1]


def test_gradient_of_a_short_end_weighs_its_tokens() -> None:
    """The inner gradient is that of sum(nll) / M, whatever the number of tokens left."""
    base = tiny_base(("softmax.bias",))
    text = articles((3,))
    piece = next(LaneStream(text, 1, base.segment, EOS))
    scored = score_segment(
        base, open_articles(base, base.start(), begin(base, 1), piece.new), piece
    )
    # d sum(nll) / d bias = sum over tokens of (softmax - one-hot): its entries sum to zero, and
    # the hit entries are at most count / M below zero.
    g = scored.gradients["softmax.bias"][0]
    assert float(g.sum()) == pytest.approx(0, abs=1e-12)
    assert -3 / 5 - 1e-9 < float(g.min()) < 0
    assert float(scored.loss[0]) == pytest.approx(float(scored.nll.sum()) / 3)


def test_word_losses_sum_pieces() -> None:
    starts = np.array([True, False, True])
    tokens = np.array([0, 1, 1, 2, 0, 1])
    got = word_losses(np.arange(1.0, 7.0), tokens, starts)
    np.testing.assert_array_equal(got, [6.0, 4.0, 11.0])
    assert len(word_losses(np.zeros(0), np.zeros(0, dtype=int), starts)) == 0
