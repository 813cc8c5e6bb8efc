"""N-gram embeddings: rows of the corpus beside those of an article, learned by stage 1."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from through_world import as_usual, flags_through, through
from tiny import as_flags
from worlds import EOS, check_resumed, tiny_base, with_extensions

from mlm.experimental.through import ThroughTrainer
from mlm.extensions import Boundaries, Extensions, NGramEmbeddings, NGramMemory
from mlm.extensions.boundaries import learn_boundaries
from mlm.extensions.ngram_embeddings import (
    AFTER,
    LENGTHS,
    MOST_OF_MEAN,
    POWER,
    STEP,
    NGrams,
    NGramTrainer,
    context_keys,
    most_frequent,
)
from mlm.models.language_model import own_weights
from mlm.reading.scoring import score_articles
from mlm.reading.static import static_loss
from mlm.reading.step import begin, step
from mlm.rules.hand_made import RMS
from mlm.runs.run import open_run
from mlm.store.models import load_base, load_lm
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors
from mlm.text.streams import LaneStream, Text
from mlm.training.fisher import estimate_fisher
from mlm.training.language_model import LMTrainer

Context = tuple[int, ...]
OWN = NGramEmbeddings(contexts=1)
SCALE = NGramMemory().key("scale")


def _prints(contexts: list[Context]) -> torch.Tensor:
    found = [context_keys([np.array([token]) for token in c])[0] for c in contexts]
    return torch.tensor(found, dtype=torch.int64)


def _ngrams(contexts: list[Context], width: int) -> tuple[NGrams, dict[Context, torch.Tensor]]:
    """Random rows for some contexts, and the same as a dictionary."""
    keys, order = _prints(contexts).sort()
    rows = torch.randn(len(keys) + 1, width, generator=torch.Generator().manual_seed(1)).double()
    rows[-1] = 0
    return NGrams(keys, rows), {contexts[i]: rows[at] for at, i in enumerate(order.tolist())}


def _articles(lengths: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    return [random.choice([1, 2, 3, 4], size=n, p=[0.5, 0.3, 0.1, 0.1]) for n in lengths]


def _contexts(article: np.ndarray, at: int) -> list[Context]:
    """Those of the token at `at`: what was read before it, `EOS` first."""
    line = [EOS, *map(int, article[:at])]
    return [tuple(line[-k:]) for k in LENGTHS if len(line) >= k]


def test_fingerprints_tell_contexts_apart() -> None:
    """By what their tokens are, in which order, and how many; arrays and tensors alike."""
    random = np.random.default_rng(0)
    seen = {tuple(map(int, random.integers(0, 300, random.integers(1, 5)))) for _ in range(20_000)}
    assert len(set(_prints(list(seen)).tolist())) == len(seen)
    for c in [(7,), (300, 2), (49_999, 0, 49_999), (1, 2, 3, 4)]:
        (mine,) = _prints([c])
        assert context_keys([torch.tensor([t]) for t in c]) == mine


@pytest.mark.parametrize("number", [7, 60, 10_000])
def test_the_contexts_are_those_that_come_most_often(number: int) -> None:
    articles = [*_articles((31, 2, 53, 1)), np.zeros(0, np.int64)]
    counts = collections.Counter(
        c for a in articles for t in range(len(a)) for c in _contexts(a, t)
    )
    found = most_frequent(articles, EOS, number)
    assert torch.equal(found, found.sort().values)
    assert len(found) == min(number, len(counts))
    times = dict(zip(_prints(list(counts)).tolist(), counts.values(), strict=True))
    mine = sorted((times[p] for p in found.tolist()), reverse=True)
    assert mine == [n for _, n in counts.most_common(number)]


def test_a_long_text_s_contexts_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    articles = [random.zipf(1.5, size=n) % 40 for n in (900, 1, 1300, 4)]
    wholes = [most_frequent(articles, EOS, number) for number in (5, 300, 10_000)]
    monkeypatch.setattr("mlm.kernels.buffers.NUMBERS", 200)
    for whole, number in zip(wholes, (5, 300, 10_000), strict=True):
        assert torch.equal(most_frequent(articles, EOS, number), whole)


@pytest.mark.parametrize(("tokens", "segment"), [(0, 5), (1, 5), (1000, 5), (0, 2)])
def test_every_token_is_predicted_with_the_rows_of_its_contexts(
    tokens: int, segment: int, engine: str
) -> None:
    """Over the borders of segments, never over those of articles; against a dictionary."""
    base = tiny_base(layers=1, segment=segment)
    articles = _articles((23, 3, 1, 37, 10, 11))
    some = [(0,), (1,), (0, 1), (1, 1), (2, 1), (1, 2, 1), (0, 1, 1), (1, 1, 1, 2), (2, 1, 1, 1)]
    some += [(0, 0), (1, 0), (0, 0, 1), (0, 0, 0)]  # over a border, behind padding or not
    ngrams, rows = _ngrams(some, base.model.embedding)
    memory = NGramMemory(tokens=tokens, steps=(0.0,) * 9)  # articles teach nothing
    still = RMS().bind({"rate": torch.tensor(0.0), "decay": torch.tensor(0.0)}, base)
    base = base.with_weights(OWN.weights(ngrams))
    base = with_extensions(base, *([memory] if tokens else []), OWN)
    scores = score_articles(base, still, articles, EOS, 2)
    static = score_articles(base, None, articles, EOS, 2)
    model = base.to("cpu", torch.float32).weights
    text = Text(articles, 85, EOS)
    loss = static_loss(model, base.model, text, 2, segment, extensions=(OWN,))
    assert loss == pytest.approx(static.total / 85, rel=1e-5)
    head, bias = base.weights["embedding"], base.weights["softmax.bias"]
    none = torch.zeros(ngrams.rows.shape[1]).double()
    shape, plain = tiny_base(layers=1).model, own_weights(base.weights)
    for article, found, alone in zip(articles, scores.nll, static.nll, strict=True):
        tokens_1T = torch.tensor([[EOS, *article[:-1]]])
        state = shape.initial_state(1, dtype=torch.float64)
        said = [
            sum((rows.get(c, none) for c in _contexts(article, t)), none)
            for t in range(len(article))
        ]
        output = shape.run(plain, tokens_1T, state).output[0] + torch.stack(said)
        log_p = (output @ head.t() + bias).log_softmax(-1)
        want = -log_p.gather(1, torch.from_numpy(article).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(found, want.numpy(), rtol=1e-10)
        np.testing.assert_allclose(alone, want.numpy(), rtol=1e-10)


def test_hand_made_rules_read_with_the_corpus_alone() -> None:
    """So is their Fisher made; what an article teaches behind a context is not for them."""
    base, text = tiny_base(layers=1), _articles((23, 30, 37))
    ngrams, _ = _ngrams([(1,), (0, 1), (1, 2, 1)], base.model.embedding)
    base = with_extensions(base.with_weights(OWN.weights(ngrams)), OWN)
    bare = dataclasses.replace(base, rms={}, loss=0.0)
    fisher = estimate_fisher(bare, Text(text, 90, EOS), 90, lanes=2)
    static = score_articles(fisher, None, text, EOS, 2)
    assert fisher.loss == pytest.approx(static.total / 90)
    base = with_extensions(base, NGramMemory(tokens=100), OWN)
    alone = base.for_rule(RMS())
    assert alone.extensions == (OWN,)
    rule = RMS().bind({"rate": torch.tensor(0.01), "decay": torch.tensor(0.01)}, base)
    found = [score_articles(m, rule, text, EOS, 2).total for m in (alone, base)]
    none = score_articles(with_extensions(base), rule, text, EOS, 2).total
    assert len({*found, none}) == 3


def test_rows_learn_by_steps_that_fall_with_the_visits() -> None:
    """Token by token, against the equation; a token that does not teach changes nothing."""
    base = tiny_base(layers=1, segment=5)
    width = base.model.embedding
    articles = _articles((40, 40))
    contexts = most_frequent(articles, EOS, 20)
    learning = NGramTrainer(OWN, contexts, torch.ones(width).double(), 2)
    base = with_extensions(base.with_weights(learning.weights()), NGramMemory(tokens=100), OWN)
    scale = base.weights[SCALE]
    rule = RMS().bind({"rate": torch.tensor(0.01), "decay": torch.tensor(0.01)}, base)
    reader = begin(base, 2, rule)
    visits = [0] * 21
    for segment, _ in zip(LaneStream(articles, 2, 5, EOS), range(6), strict=False):
        now = step(base, rule, reader, segment)
        assert now.scored.by_added is not None
        at = now.scored.told.notes[OWN.name].clone()
        at[1, 2] = 20  # as if it did not teach
        gradient = now.scored.by_added * 5
        want = learning.ngrams.rows.clone()
        for row in at.flatten().tolist():
            visits[row] += row < 20
        for b, t in np.ndindex(2, 5):
            for row in at[b, t].tolist():
                if row < 20:
                    again = sum(r == row for r in at.flatten().tolist())
                    eta = min(STEP / (AFTER + visits[row]) ** POWER, MOST_OF_MEAN / again)
                    want[row] -= eta * gradient[b, t] * scale
        learning.learn_rows(at, gradient, scale)
        torch.testing.assert_close(learning.ngrams.rows, want, rtol=1e-6, atol=1e-9)
        assert not bool(learning.ngrams.rows[20].any())
        np.testing.assert_allclose(learning.visits.tolist(), visits)
        reader = now.after
    assert bool(learning.ngrams.rows[:20].any(1).sum() > 5)


def test_without_adaptation_they_learn_from_the_model_and_themselves() -> None:
    """Against the gradients of a softmax layer that is written down here; over borders, too."""
    lines = [a - 1 for a in _articles((33, 2, 41, 17, 58, 26))]  # `EOS` ends lines and articles
    trainer = as_usual(Text(lines, 177, EOS), contexts=40, init=Path("some"))
    trainer.weights["embedding"].data *= 8
    learning = trainer.learned[OWN.name]
    assert isinstance(learning, NGramTrainer)
    ngrams = learning.ngrams
    visits, rows = collections.Counter(), torch.zeros_like(ngrams.rows)
    keys = {key: at for at, key in enumerate(ngrams.contexts.tolist())}
    stream = LaneStream(trainer.text.articles, 4, 10, EOS, trainer.stream.seed)
    before: list[list[int]] = [[], [], [], []]
    state = trainer.state
    for segment, _ in zip(stream, range(20), strict=False):
        state = state.keep(~segment.new)
        model = {n: w.detach().clone() for n, w in trainer.weights.items()}
        hidden = trainer.shape.run(model, segment.inputs, state)
        state, output = hidden.state, hidden.output.clone()
        read = []
        for b, t in np.ndindex(4, 10):
            line = before[b] = [] if segment.new[b] and not t else before[b]
            line.append(int(segment.inputs[b, t]))
            mine = [_prints([tuple(line[-k:])]).item() for k in LENGTHS if len(line) >= k]
            read.append([keys[key] for key in mine if key in keys] if segment.mask[b, t] else [])
            for at in read[-1]:
                output[b, t] += rows[at]
        output.requires_grad_()
        logits = output @ model["embedding"].t() + model["softmax.bias"]
        nll = -logits.log_softmax(-1).gather(2, segment.targets.unsqueeze(2)).squeeze(2)
        (gradient,) = torch.autograd.grad((nll * segment.mask).sum(), [output])
        now = collections.Counter(at for each in read for at in each)
        visits += now
        w = model["embedding"].square().sum(1).mean()
        for (b, t), each in zip(np.ndindex(4, 10), read, strict=True):
            for at in each:
                eta = min(STEP / (AFTER + visits[at]) ** POWER, MOST_OF_MEAN / now[at])
                rows[at] -= eta * gradient[b, t] / w
        trainer.train_step()
        torch.testing.assert_close(ngrams.rows, rows, rtol=1e-4, atol=1e-6)
    assert learning.visits.tolist() == [visits[at] for at in range(41)]
    assert bool(rows.any(1).sum() > 20)


def _with_ngrams(make: Callable[..., LMTrainer]) -> LMTrainer:
    """Embeddings as long as a trained model's are."""
    trainer = make(contexts=40, init=Path("some"))
    trainer.weights["embedding"].data *= 8
    if isinstance(trainer, ThroughTrainer):
        trainer.follow()
    return trainer


@pytest.mark.parametrize("make", [pytest.param(through, marks=pytest.mark.slow), as_usual])
def test_the_rows_are_part_of_the_model(make: Callable[..., LMTrainer]) -> None:
    """What training makes is a worse model without them."""
    trainer = _with_ngrams(make)
    while trainer.step < trainer.steps:
        trainer.train_step()
    ngrams = OWN.of(trainer.model())
    assert ngrams is not None
    assert bool(ngrams.rows.any())
    mine = trainer.validation_loss(trainer.text)
    ngrams.rows.zero_()
    assert mine < trainer.validation_loss(trainer.text) - 0.02


@pytest.mark.parametrize("make", [through, as_usual])
def test_training_resumes_bit_for_bit(make: Callable[..., LMTrainer], tmp_path: Path) -> None:
    check_resumed(lambda: _with_ngrams(make), tmp_path)
    names = {OWN.key(name) for name in (*NGrams._fields, "visits")}
    assert names <= {*_with_ngrams(make).more_tensors()}, "compared there"


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command(finished: Finished, tmp_path: Path, command: Command) -> None:
    """Trained, kept beside the language model, read with, by hidden states of which borders are
    known anew; and refused where they do not fit."""
    own = finished.copy(tmp_path / "own")
    rule = finished.config.meta.rules[0]
    flags = flags_through(finished, tmp_path / "new")
    at = flags.index("--lm.through-run") + 1
    steps = "--stages", "meta", "--meta-steps", 1, "--train-rules", rule
    adapt = "--ngram-memory.tokens", 300, "--boundaries.on"
    done = command("train", "--out", own, *steps, *adapt)
    assert done.code == 0, done.err
    flags[at] = str(own)
    done = command("train", *flags, "--ngram-embeddings.contexts", 50)
    assert done.code == 0, done.err
    new = RunFolder(tmp_path / "new")
    hash_ = load_tensors(new.checkpoint("lm"), "")[1]["vocabulary"]
    weights, shape, _ = load_lm(new.checkpoint("lm"), hash_)
    ngrams = OWN.of(weights)
    assert ngrams is not None
    assert ngrams.rows.shape == (51, shape.embedding)
    evaluate = "--rules", "static", rule, "--train-rules", rule
    words = "--out", new.path, "--stages", "meta", "evaluate", "--meta-steps", 0, *evaluate
    done = command("train", *words, *adapt)
    assert done.code == 0, done.err
    text = open_run(new.load_config()).training_text(1)
    regression = load_base(new.checkpoint("memory"), hash_).weights[Boundaries().key("regression")]
    torch.testing.assert_close(regression, learn_boundaries(shape, weights, text))
    kept = load_tensors(new.checkpoint("memory"), "")[0]
    for name, mine in OWN.weights(ngrams).items():
        assert torch.equal(kept[f"theta_0/{name}"], mine)
    flags[flags.index("--lm.init") + 1] = str(new.path)
    flags[flags.index("--out") + 1] = str(tmp_path / "third")
    done = command("train", *flags)
    assert done.code != 0
    assert "its model was trained with ngram_embeddings" in done.err


@pytest.mark.parametrize("flags", [[], ["--lm.init", "runs/some", "--lm.through", "rms"]])
def test_they_need_a_trained_model_and_no_hand_made_rule(
    flags: list[str], command: Command, tmp_path: Path
) -> None:
    done = command("train", "--out", tmp_path / "run", "--ngram-embeddings.contexts", 50, *flags)
    assert done.code != 0
    assert (
        "--ngram-embeddings.contexts is 50; they are learned by a language model that goes on"
        in done.err
    )


@pytest.mark.slow
def test_the_command_as_usual(finished: Finished, tmp_path: Path, command: Command) -> None:
    """Learned without adaptation; static, the model reads as its validation did."""
    lm = dataclasses.replace(finished.config.lm, init=finished.folder)
    own = Extensions(ngram_embeddings=NGramEmbeddings(contexts=50))
    config = dataclasses.replace(
        finished.config, out=tmp_path / "new", stages=("lm",), lm=lm, extensions=own
    )
    done = command("train", *as_flags(config))
    assert done.code == 0, done.err
    new = RunFolder(tmp_path / "new")
    tensors, _ = load_tensors(new.checkpoint("lm"), "")
    ngrams = OWN.of(tensors)
    assert ngrams is not None
    assert bool(ngrams.rows.any(1).sum() > 20)
