"""Phrases: a table of n-gram embeddings that learns by gradient descent beside the weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from tiny import perplexities
from worlds import EOS, TinyBase, bigram_base, segments, tiny_base

from mlm import kernels
from mlm.extensions.boundaries import Borders
from mlm.extensions.ngram_memory import ALIKE, ORDERS, Phrases, phrases
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles, score_stream
from mlm.reading.second_order import second_order
from mlm.reading.step import begin, read, step
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.runs.rules import seen_by
from mlm.text.streams import LaneStream

LENGTHS = (31, 53, 3, 1, 37)
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


def _world(tokens: int = 1000, **world: Any) -> TinyBase:
    base = tiny_base(**world)
    return dataclasses.replace(base, phrases=phrases(base.weights["embedding"], tokens))


def _repetitive(lengths: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Articles over so few words that contexts come again."""
    random = np.random.default_rng(seed)
    return [random.choice([1, 2, 3, 4], size=n, p=[0.5, 0.3, 0.1, 0.1]) for n in lengths]


def _one_by_one(base: TinyBase, article: np.ndarray) -> list[float]:
    """Losses of an article, its table written row by row as the module's docstring says."""
    assert base.phrases is not None
    bound = RMS().bind(SETTING, base)
    theta = {n: w.clone().unsqueeze(0) for n, w in base.start().items()}
    state = base.model.initial_state(1, dtype=torch.float64)
    tokens = [EOS, *map(int, article)]
    w = float(base.weights["embedding"].square().sum(1).mean())
    visits: list[tuple[int, ...]] = []
    table: dict[tuple[int, ...], torch.Tensor] = {}
    alone: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # of k = 1: token, h, what it taught
    losses: list[float] = []
    for lo in range(0, len(article), base.segment):
        end = min(lo + base.segment, len(article))
        keys = [
            [tuple(tokens[t + 1 - k : t + 1]) if t + 1 >= k else None for k in ORDERS]
            for t in range(lo, end)
        ]
        none = torch.zeros(base.model.embedding).double()
        leaves = {n: x.clone().requires_grad_() for n, x in theta.items()}
        inputs, targets = (torch.tensor([tokens[lo + d : end + d]]) for d in (0, 1))
        full = {**base.weights, **leaves}
        now = base.model.run(full, inputs, state)
        states = now.output[0].detach()
        said = [sum((table.get(k, none) for k in own[1:] if k), none) for own in keys]
        for t, h in enumerate(states):
            for token, other, value in alone:
                if token == int(inputs[0, t]):
                    apart = float((h - other).square().sum())
                    said[t] = said[t] + value * math.exp(-ALIKE / 2 * apart)
        rows = torch.stack(said).unsqueeze(0).requires_grad_()
        head, bias = full["embedding"], full["softmax.bias"]
        logits = (now.output + rows) @ head.transpose(-1, -2) + bias.unsqueeze(-2)
        nll = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")
        found = torch.autograd.grad(nll.sum(), [*leaves.values(), rows])
        losses += nll.tolist()
        for t, own in enumerate(keys):
            for order, key in enumerate(own):
                if key:
                    eta = float(base.phrases.steps[order]) / (1 + visits.count(key))
                    value = -eta / w * found[-1][0, t]
                    if order:
                        table[key] = table.get(key, none) + value
                    else:
                        alone.append((key[0], states[t], value))
                    visits.append(key)
        gradients = {n: g / base.segment for n, g in zip(leaves, found, strict=False)}
        signal: Any = type("Signal", (), {"loss": nll.detach().mean()[None], "age": None})
        theta = bound.update(theta, gradients, signal)
        state = now.state.detach()
    return losses


@pytest.mark.parametrize("world", [{}, {"layers": 1}, {"cell": "qrnn"}], ids=["two", "one", "qrnn"])
def test_words_are_predicted_with_the_rows_of_their_contexts(
    world: dict[str, Any], engine: str
) -> None:
    """Against a table written by hand, whatever other lanes read."""
    base = _world(**world)
    bound = RMS().bind(SETTING, base)
    texts = _repetitive(LENGTHS)
    scores = score_articles(base, bound, texts, EOS, 2)
    for found, article in zip(scores.nll, texts, strict=True):
        np.testing.assert_allclose(found, _one_by_one(base, article), rtol=1e-9, atol=1e-11)
    plain = dataclasses.replace(base, phrases=None)
    without = score_articles(plain, bound, texts, EOS, 2)
    assert all(
        abs(a - b).max() > 1e-3 for a, b in zip(scores.nll, without.nll, strict=True) if len(a) > 30
    )


def test_what_is_long_ago_is_forgotten(engine: str) -> None:
    """The window counts tokens before the segment, however large the book is."""
    article = _repetitive((400,))[0]
    bound = RMS().bind(SETTING, tiny_base())
    base = _world(tokens=30)
    found = score_articles(base, bound, [article], EOS, 1).nll[0]
    history, want = base.phrases and base.phrases.begin(1), []
    reader = begin(base, 1, bound)
    for piece in LaneStream([article], 1, base.segment, EOS):
        assert history is not None
        assert base.phrases is not None
        assert reader.history is not None
        lo = max(0, reader.history.size - 30)
        tensors = reader.history.tensors()
        short = [(tensors[0] - lo).clamp(min=0), *(t[:, lo:] for t in tensors[1:])]
        reader, nll = read(base, bound, reader._replace(history=history.of(short)), piece)
        want += nll[piece.mask].tolist()
    np.testing.assert_allclose(found, want[: len(found)], rtol=1e-12, atol=1e-13)
    longer = score_articles(_world(tokens=31), bound, [article], EOS, 1).nll[0]
    assert abs(found - longer).max() > 1e-6


def test_the_kernel_recalls_what_plain_operations_do() -> None:
    """In float32, with lanes that began their article at different places."""
    generator = torch.Generator().manual_seed(1)
    own = phrases(torch.randn(9, 16, generator=generator), 60)
    history = own.begin(3)
    for k in range(20):
        inputs = torch.randint(0, 3, (3, 7), generator=generator)
        keys = torch.randn(3, 7, 16, generator=generator) / 4
        recalled = own.recall(history, inputs, keys)
        with kernels.eager():
            plain = own.recall(history, inputs, keys)
        torch.testing.assert_close(recalled.rows, plain.rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recalled.rates, plain.rates)
        torch.testing.assert_close(recalled.within, plain.within)
        assert bool(recalled.within.tril(-1).any())
        assert not bool(recalled.within.triu().any())
        assert k < 3 or float(recalled.rows.abs().sum()) > 0
        heard = recalled.heard(torch.randn(3, 7, 16, generator=generator))
        taught = torch.ones(3, 7, dtype=torch.bool)
        if k == 8:
            taught[1, :4] = False
        history = own.learned(history, inputs, heard, taught)
        if k == 5:
            history = history.opened(torch.tensor([True, False, False]))
        assert history.size - history.since.min() >= min(7 * (k + 1), 60)
    assert len(set(history.since.tolist())) > 1


def test_two_futures_of_one_reader_do_not_meet() -> None:
    base = _world()
    bound = RMS().bind(SETTING, base)
    texts = _repetitive((40, 40, 40))
    pieces = [list(LaneStream([text], 1, base.segment, EOS)) for text in texts]
    reader = begin(base, 1, bound)
    for piece in pieces[0][:5]:
        reader, _ = read(base, bound, reader, piece)
    ways, want, last = [], [], pieces[0][7]
    for other in (1, 2):
        now = reader
        for piece in pieces[other][5:7]:
            now, _ = read(base, bound, now, piece)
        ways.append(now)
        want.append(read(base, bound, now, last)[1])
    for now, before in zip(ways, want, strict=True):
        assert torch.equal(read(base, bound, now, last)[1], before)
    assert not torch.equal(*want)


def test_a_reader_is_kept_in_files_and_lanes_can_be_chosen() -> None:
    base = _world()
    bound = RMS().bind(SETTING, base)
    reader = begin(base, 3, bound)
    pieces = list(LaneStream(_repetitive((40, 40, 40)), 3, base.segment, EOS))
    for piece in pieces[:4]:
        reader, _ = read(base, bound, reader, piece)
    kept = begin(base, 3, bound).of({n: t.clone() for n, t in reader.tensors().items()})
    some = reader.select(torch.tensor([2]))
    alone = pieces[4].select(np.array([2]))
    want, found, one = (
        read(base, bound, r, p)[1]
        for r, p in ((reader, pieces[4]), (kept, pieces[4]), (some, alone))
    )
    assert torch.equal(want, found)
    torch.testing.assert_close(one, want[2:], rtol=1e-12, atol=1e-13)


def test_borders_open_another_table() -> None:
    """What is read from an article's first line on is all that is recalled."""
    weights = torch.zeros(5).double()
    weights[-1] = 9.0  # every line end is believed to be a border
    base = dataclasses.replace(_world(), borders=Borders(weights, 4))
    bound = RMS().bind(SETTING, base)
    text = _repetitive((60,))[0]
    reader = begin(base, 1, bound)
    for piece in LaneStream([text], 1, base.segment, EOS):
        before = reader
        now = step(base, bound, reader, piece)
        reader = now.after
        assert reader.history is not None
        assert before.history is not None
        own = int(reader.history.size - reader.history.since)
        if bool(now.new):
            assert own == int(now.taught.sum())
        else:
            assert own == int(before.history.size - before.history.since) + piece.inputs.shape[1]
    kept, dropped = (
        score_stream(m, bound, [text], EOS).total
        for m in (dataclasses.replace(base, borders=None), base)
    )
    assert kept != dropped


@pytest.mark.parametrize("mode", ["checkpoint", "forward"])
def test_all_ways_to_the_meta_gradient_agree(mode: Any, engine: str) -> None:
    base = _world(layers=1)
    rule = LinearGates("three_levels")
    phi = start_at(rule, RMS(), SETTING, base)
    bound, pieces = rule.bind(phi, base), segments(base, LENGTHS, 3, 9)
    want = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces)
    found = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces, mode)
    assert found.loss == pytest.approx(want.loss, rel=1e-12)
    for name, value in want.gradients.items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-8, atol=1e-10)
    plain = dataclasses.replace(base, phrases=None)
    without = meta_gradient(plain, bound, phi, begin(plain, 3, bound), pieces)
    assert abs(without.loss - want.loss) > 1e-6


def test_the_second_order_reads_alike() -> None:
    base = _world(dynamic=("softmax.bias", "lstm.0.recurrent"), layers=1)
    rule = LinearGates("three_levels")
    phi = start_at(rule, RMS(), SETTING, base)
    bound, pieces = rule.bind(phi, base), segments(base, LENGTHS, 3, 9)
    first = meta_gradient(base, bound, phi, begin(base, 3, bound), pieces)
    found = second_order(base, rule, phi, begin(base, 3, bound), pieces)
    assert found.loss == pytest.approx(first.loss, rel=1e-12)


def test_only_learned_rules_remember_phrases() -> None:
    base = _world()
    assert seen_by(RMS(), base).phrases is None
    assert isinstance(seen_by(LinearGates("three"), base).phrases, Phrases)


def test_other_models_remember_none() -> None:
    base = dataclasses.replace(bigram_base(), phrases=phrases(torch.ones(3, 2), 10))
    with pytest.raises(ValueError, match="language models that stage 1 trains"):
        begin(base, 2)


def test_a_run_with_phrases(finished: Finished, command: Command, tmp_path: Path) -> None:
    """A rule scored with and without; hand-made rules stay as they are."""
    folder = finished.copy(tmp_path / "run")
    rules = "--train-rules", "three_levels", "--rules", "static", "rms", "three_levels"
    words = ("--out", folder, *rules, "--adapt.phrases")
    found = {}
    for tokens in ("500", "0"):
        done = command("train", *words, tokens, "--stages", "meta", "evaluate")
        assert done.code == 0, done.err
        found[tokens] = perplexities(folder)
    for key, value in found["0"].items():
        assert (found["500"][key] == value) == (key[1] != "three_levels")
    assert "--adapt.phrases is -1; it must not be negative" in command("train", *words, "-1").error
