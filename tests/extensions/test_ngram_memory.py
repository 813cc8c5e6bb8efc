"""N-gram memory: a table of n-gram embeddings that learns by gradient descent beside weights."""

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
from worlds import EOS, TinyBase, bigram_base, segments, tiny_base, with_extensions

from mlm import kernels
from mlm.extensions import Boundaries, NGramMemory
from mlm.extensions.ngram_memory import ALIKE, LONGEST_CONTEXT, History
from mlm.models.base import AdaptationBase
from mlm.models.extension import Outcome, Told
from mlm.models.language_model import OutputTerms
from mlm.models.recurrent import RecurrentLM
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles, score_stream
from mlm.reading.second_order import second_order
from mlm.reading.step import Reader, begin, read, step
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.runs.identity import identity
from mlm.runs.run import open_run
from mlm.settings.config import Config
from mlm.store.run_folder import RunFolder
from mlm.text.streams import LaneStream, Segment

LENGTHS = (31, 53, 3, 1, 37)
ORDERS = range(1, LONGEST_CONTEXT + 1)
MEMORY = NGramMemory.name
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


def _world(tokens: int = 1000, **world: Any) -> TinyBase:
    return with_extensions(tiny_base(**world), NGramMemory(tokens=tokens))


def _history(reader: Reader) -> History:
    found = reader.extras[MEMORY]
    assert isinstance(found, History)
    return found


def _repetitive(lengths: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    """Articles over so few words that contexts come again."""
    random = np.random.default_rng(seed)
    return [random.choice([1, 2, 3, 4], size=n, p=[0.5, 0.3, 0.1, 0.1]) for n in lengths]


def _one_by_one(base: TinyBase, article: np.ndarray) -> list[float]:
    """Losses of an article, its table written row by row as the module's docstring says."""
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
                    eta = float(base.weights[f"{MEMORY}/steps"][order]) / (1 + visits.count(key))
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
    plain = with_extensions(base)
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
    history, want = begin(base, 1).extras[MEMORY], []
    reader = begin(base, 1, bound)
    for piece in LaneStream([article], 1, base.segment, EOS):
        now = _history(reader)
        lo = max(0, now.size - 30)
        columns = [t[:, lo : now.size] for t in now.book.tensors()]
        short = [(now.since - lo).clamp(min=0), *columns]
        window = reader._replace(extras={MEMORY: history.of(short)})
        reader, nll = read(base, bound, window, piece)
        want += nll[piece.mask].tolist()
    np.testing.assert_allclose(found, want[: len(found)], rtol=1e-12, atol=1e-13)
    longer = score_articles(_world(tokens=31), bound, [article], EOS, 1).nll[0]
    assert abs(found - longer).max() > 1e-6


def _piece(inputs: torch.Tensor) -> Segment:
    lanes, length = inputs.shape
    all_taught, none = torch.ones(lanes, length, dtype=torch.bool), np.zeros(lanes, np.int64)
    new = torch.zeros(lanes, dtype=torch.bool)
    return Segment(inputs, inputs, all_taught, new, none, none)


def test_the_kernel_recalls_what_plain_operations_do() -> None:
    """In float32, with lanes that began their article at different places."""
    generator = torch.Generator().manual_seed(1)
    own = NGramMemory(tokens=60)
    head = torch.randn(9, 16, generator=generator)
    weights = {"embedding": head}
    bare = AdaptationBase(RecurrentLM(9, 16, 16, 1), weights, tuple(weights), {}, 0.0, 7)
    base = with_extensions(bare, own)
    history = own.begin(base, 3)
    nothing = Told(OutputTerms(), {})
    for k in range(20):
        piece = _piece(torch.randint(0, 3, (3, 7), generator=generator))
        keys = torch.randn(3, 7, 16, generator=generator) / 4
        recalled = own.before(base.weights, history, piece, keys, nothing).notes[MEMORY]
        with kernels.eager():
            plain = own.before(base.weights, history, piece, keys, nothing).notes[MEMORY]
        torch.testing.assert_close(recalled.rows, plain.rows, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recalled.rates, plain.rates)
        torch.testing.assert_close(recalled.within, plain.within)
        assert bool(recalled.within.tril(-1).any())
        assert not bool(recalled.within.triu().any())
        assert k < 3 or float(recalled.rows.abs().sum()) > 0
        gradient = torch.randn(3, 7, 16, generator=generator)
        taught = torch.ones(3, 7, dtype=torch.bool)
        if k == 8:
            taught[1, :4] = False
        history = own.after(base.weights, history, piece, recalled, Outcome(gradient, taught))
        if k == 5:
            new = torch.tensor([True, False, False])
            history = own.open(history, new, new)
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


def test_files_hold_what_lanes_can_recall_and_no_more() -> None:
    base = _world()
    bound = RMS().bind(SETTING, base)
    reader = begin(base, 3, bound)
    pieces = list(LaneStream(_repetitive((60, 60, 60)), 3, base.segment, EOS))
    for piece in pieces[:5]:
        reader, _ = read(base, bound, reader, piece)
    new = torch.tensor([False, True, False])
    reader = reader._replace(extras={MEMORY: _history(reader).opened(new)})
    for piece in pieces[5:7]:
        reader, _ = read(base, bound, reader, piece)
    history, each = _history(reader), base.segment
    marks, inputs, *others = history.tensors()
    assert marks.tolist() == [7 * each, 0, 5 * each, 0]
    assert [len(t) for t in (inputs, *others)] == [(7 + 2 + 7) * each] * 4
    again = history.of(history.tensors())
    seen = torch.arange(history.size) >= history.since.unsqueeze(1)
    for mine, kept in zip(history.book.tensors(), again.book.tensors(), strict=True):
        assert torch.equal(mine[:, : history.size][seen], kept[seen])
        assert not bool(kept[~seen].any())


def test_boundaries_open_another_table() -> None:
    """What is read from an article's first line on is all that is recalled."""
    regression = torch.zeros(5).double()
    regression[-1] = 9.0  # every line end is believed to be a boundary
    told, memory = Boundaries(on=True), NGramMemory(tokens=1000)
    plain = tiny_base().with_weights(told.weights(regression, 4))
    base = with_extensions(plain, told, memory)
    bound = RMS().bind(SETTING, base)
    text = _repetitive((60,))[0]
    reader = begin(base, 1, bound)
    for piece in LaneStream([text], 1, base.segment, EOS):
        before = _history(reader)
        now = step(base, bound, reader, piece)
        reader = now.after
        own = int(_history(reader).size - _history(reader).since)
        if bool(now.new):
            assert own == int(now.taught.sum())
        else:
            assert own == int(before.size - before.since) + piece.inputs.shape[1]
    kept, dropped = (
        score_stream(m, bound, [text], EOS).total for m in (with_extensions(base, memory), base)
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
    plain = with_extensions(base)
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


def test_only_learned_rules_remember_n_grams() -> None:
    base = _world()
    assert base.for_rule(RMS()).extensions == ()
    assert base.for_rule(LinearGates("three")).extensions == (NGramMemory(tokens=1000),)


def test_hand_made_rules_remember_n_grams_where_asked(finished: Finished) -> None:
    """Settings that were tuned without it are not taken for those with it."""
    own = NGramMemory(tokens=1000, hand_made=True)
    base = dataclasses.replace(_world(), extensions=(own,)).derived()
    assert base.for_rule(RMS()).extensions == (own,)
    assert base.for_rule(LinearGates("three")).extensions == (own,)

    run = open_run(RunFolder(finished.folder).load_config(), quiet=True)
    marks = [
        [
            identity(run.with_config(_remembering(run.config, memory)), learned)
            for learned in (False, True)
        ]
        for memory in (NGramMemory(), NGramMemory(tokens=1000), own)
    ]
    hand_made, learned = zip(*marks, strict=True)
    assert hand_made[0] == hand_made[1] != hand_made[2]
    assert len(set(learned)) == 3


def _remembering(config: Config, memory: NGramMemory) -> Config:
    extensions = dataclasses.replace(config.extensions, ngram_memory=memory)
    return dataclasses.replace(config, extensions=extensions)


def test_other_models_remember_none() -> None:
    base = dataclasses.replace(bigram_base(), extensions=(NGramMemory(tokens=10),))
    with pytest.raises(ValueError, match="language model that stage 1 trains"):
        base.derived()


@pytest.mark.slow
def test_a_run_with_n_gram_memory(finished: Finished, command: Command, tmp_path: Path) -> None:
    """A rule scored with and without; hand-made rules stay as they are."""
    folder = finished.copy(tmp_path / "run")
    rules = "--train-rules", "three_levels", "--rules", "static", "rms", "three_levels"
    words = ("--out", folder, *rules, "--ngram-memory.tokens")
    found = {}
    for tokens in ("500", "0"):
        done = command("train", *words, tokens, "--stages", "meta", "evaluate")
        assert done.code == 0, done.err
        found[tokens] = perplexities(folder)
    for key, value in found["0"].items():
        assert (found["500"][key] == value) == (key[1] != "three_levels")
    error = command("train", *words, "-1").error
    assert "--ngram-memory.tokens is -1; it must be at least 0" in error
