"""The mechanism itself: a part defined here plugs in everywhere, and the core names none."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import (
    EOS,
    TinyBase,
    agree,
    articles,
    segments,
    tiny_base,
    with_extensions,
    written_out,
)

import mlm
from mlm.base.names import PROTOCOLS
from mlm.extensions import Extensions
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Outcome, Told
from mlm.models.language_model import Weights
from mlm.reading.meta_gradient import MetaGradient, meta_gradient
from mlm.reading.pes import Evolution
from mlm.reading.scoring import Wanted, score_articles, score_protocol, score_stream
from mlm.reading.second_order import second_order
from mlm.reading.step import begin, read, score_segment
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Bound, Parameters
from mlm.text.streams import LaneStream, Segment

ROOT = Path(mlm.__file__).parent
CORE = ("base", "kernels", "text", "models", "rules", "reading")
LENGTHS = (11, 23, 3, 1, 17)
"""Articles that end inside a segment, one shorter than a segment, one of a single token."""
SETTING = {"rate": torch.tensor(0.02).double(), "decay": torch.tensor(0.05).double()}


# ---------------------------------------------------------------- a part that nobody knows

STRENGTH = 8.0
"""Of what is added, at a share of one."""


class Sums(NamedTuple):
    """Hidden states of B lanes summed up (B, E), and how many (B,)."""

    total: Tensor
    tokens: Tensor

    def select(self, lanes: Tensor) -> Sums:
        return Sums(*(t[lanes] for t in self))

    def tensors(self) -> list[Tensor]:
        return list(self)

    def of(self, tensors: list[Tensor]) -> Sums:
        return Sums(*tensors)


@dataclass(frozen=True)
class RunningMean(Extension):
    """Adds to the hidden state the mean of those of the article's segments so far."""

    share: float = 0.0
    name: ClassVar[str] = "running_mean"
    of_model: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        return self.share > 0

    def begin(self, base: AdaptationBase, lanes: int) -> Sums:
        some = base.weights["embedding"]
        return Sums(some.new_zeros(lanes, some.shape[1]), some.new_zeros(lanes))

    def open(self, value: Sums, new_B: Tensor, reset_B: Tensor) -> Sums:
        return Sums(value.total * ~reset_B[:, None], value.tokens * ~reset_B)

    def before(
        self, weights: Weights, value: Sums, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        mean_B1E = (value.total / value.tokens.clamp(min=1)[:, None])[:, None]
        added = self.share * STRENGTH * mean_B1E.expand_as(hidden_BTE)
        return told.with_added(added).with_note(self.name, hidden_BTE)

    def after(
        self, weights: Weights, value: Sums, segment: Segment, note: Tensor, out: Outcome
    ) -> Sums:
        total_BE = (note * out.taught[..., None]).sum(1)
        return Sums(value.total + total_BE, value.tokens + out.taught.sum(1))


OWN = RunningMean(share=0.5)


def _base(dynamic: tuple[str, ...] | None = None) -> TinyBase:
    return with_extensions(tiny_base(dynamic, layers=1), OWN)


def _bound(base: AdaptationBase) -> Bound:
    return RMS().bind(SETTING, base)


def _rule(base: AdaptationBase) -> tuple[LinearGates, Parameters, list[Segment]]:
    rule = LinearGates("three_levels")
    return rule, start_at(rule, RMS(), SETTING, base), segments(base, LENGTHS, 3, 7)


def _sums(base: AdaptationBase, bound: Bound, pieces: Sequence[Segment]) -> Iterator[Sums]:
    """What lanes remember behind each of these segments."""
    reader = begin(base, len(pieces[0].new), bound)
    for piece in pieces:
        reader, _ = read(base, bound, reader, piece)
        found = reader.extras[OWN.name]
        assert isinstance(found, Sums)
        yield found


@pytest.mark.parametrize("kind", ["static", "rms"])
def test_what_was_expected_holds_the_extension(kind: str) -> None:
    base, (article,) = _base(), articles((23,))
    rule, at = None if kind == "static" else _bound(base), np.array([3, 7, 8, 19])
    (found,) = score_articles(base, rule, [article], EOS, 1, wanted=Wanted([at], 3)).details
    (want,) = written_out(base, rule, article, at)
    agree(found, want, article[at])
    (plain,) = written_out(with_extensions(base), rule, article, at)
    assert np.abs(plain - want).max() > 0.01


def test_static_reading_adds_what_it_says(engine: str) -> None:
    """Against the output layer written out, segment by segment."""
    base, (article,) = _base(), articles((23,))
    found = score_articles(base, None, [article], EOS, 1).nll[0]
    w = base.weights
    tokens = torch.tensor([[EOS, *article[:-1]]])
    state = base.model.initial_state(1, dtype=torch.float64)
    hidden = base.model.run(w, tokens, state).output[0]
    for lo in range(0, len(article), base.segment):
        mean = hidden[:lo].mean(0) if lo else torch.zeros_like(hidden[0])
        seen = hidden[lo : lo + base.segment] + OWN.share * STRENGTH * mean
        log_p = (seen @ w["embedding"].t() + w["softmax.bias"]).log_softmax(-1)
        targets = torch.from_numpy(article[lo : lo + base.segment])
        want = -log_p.gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(found[lo : lo + base.segment], want.numpy(), atol=1e-12)


@pytest.mark.parametrize("lengths", [LENGTHS, (3, 11, 23)])
@pytest.mark.parametrize("adapts", [True, False])
def test_lanes_at_once_read_as_articles_one_by_one(
    adapts: bool, lengths: tuple[int, ...], engine: str
) -> None:
    """Also where the first lanes end first, and the others go on without them."""
    base, texts = _base(), articles(lengths)
    bound = _bound(base) if adapts else None
    alone = [score_articles(base, bound, [text], EOS, 1).nll[0] for text in texts]
    for lanes in (1, 3):
        found = score_articles(base, bound, texts, EOS, lanes).nll
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    plain = score_articles(with_extensions(base), bound, texts, EOS, 3).nll
    assert all(
        np.abs(a[base.segment :] - b[base.segment :]).max() > 1e-3
        for a, b in zip(alone, plain, strict=True)
        if len(a) > base.segment
    )


def test_an_article_forgets_the_one_before_it_and_a_stream_does_not() -> None:
    base, texts = _base(), articles((11, 23, 17))
    bound = _bound(base)
    pieces = list(LaneStream(texts, 1, base.segment, EOS))
    own = 0
    for piece, sums in zip(pieces, _sums(base, bound, pieces), strict=True):
        own = int(piece.mask.sum()) + (0 if bool(piece.new) else own)
        assert int(sums.tokens) == own
    assert sum(int(piece.new) for piece in pieces) == 3
    line = list(LaneStream([np.concatenate(texts)], 1, base.segment, EOS))
    *_, last = _sums(base, bound, line)
    assert int(last.tokens) == 51
    article, stream = (
        score_protocol(base, bound, texts, EOS, protocol, 2).nll for protocol in PROTOCOLS
    )
    np.testing.assert_allclose(article[0], stream[0], atol=1e-12)
    assert np.abs(article[1] - stream[1]).max() > 1e-3
    assert score_stream(base, bound, texts, EOS).total == sum(map(np.sum, stream))


def test_predictions_sum_to_one(engine: str) -> None:
    """Over all words at every position, in a lane that has read: each lane is asked for one."""
    base = _base()
    bound = _bound(base)
    *before, last = segments(base, (40,), 1, 4)
    reader = begin(base, 1, bound)
    for piece in before:
        reader, _ = read(base, bound, reader, piece)
    same = np.zeros(12, np.int64)
    words = torch.arange(12)[:, None].expand(12, base.segment)
    piece = last.select(same)._replace(targets=words)
    nll = score_segment(base, reader.select(torch.from_numpy(same)), piece).nll
    total = (-nll).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def _gradient(base: AdaptationBase, mode: Any) -> MetaGradient:
    rule, phi, pieces = _rule(base)
    bound = rule.bind(phi, base)
    return meta_gradient(base, bound, phi, begin(base, 3, bound), pieces, mode)


@pytest.mark.parametrize("mode", ["checkpoint", "forward"])
def test_all_ways_to_the_meta_gradient_agree(mode: Any, engine: str) -> None:
    base = _base()
    want, found = _gradient(base, "reverse"), _gradient(base, mode)
    assert found.loss == pytest.approx(want.loss, rel=1e-12)
    for name, value in want.gradients.items():
        assert float(value.abs().max()) > 1e-9, name
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-8, atol=1e-10)
    assert abs(_gradient(with_extensions(base), "reverse").loss - want.loss) > 1e-3


def test_the_second_order_reads_alike() -> None:
    base = _base(("softmax.bias", "lstm.0.recurrent"))
    rule, phi, pieces = _rule(base)
    first = _gradient(base, "reverse")
    found = second_order(base, rule, phi, begin(base, 3, rule.bind(phi, base)), pieces)
    assert found.loss == pytest.approx(first.loss, rel=1e-12)
    for mine, its in zip(
        found.reader.extras[OWN.name].tensors(),
        first.reader.extras[OWN.name].tensors(),
        strict=True,
    ):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def test_a_reader_in_a_file_reads_on() -> None:
    base = _base()
    bound = _bound(base)
    *before, last = segments(base, LENGTHS, 3, 5)
    reader = begin(base, 3, bound)
    for piece in before:
        reader, _ = read(base, bound, reader, piece)
    kept = {n: t.clone() for n, t in reader.tensors().items()}
    assert {f"extras/{OWN.name}/0", f"extras/{OWN.name}/1"} <= kept.keys()
    again = begin(base, 3, bound).of(kept)
    assert torch.equal(read(base, bound, again, last)[1], read(base, bound, reader, last)[1])
    forgot = reader._replace(extras=begin(base, 3, bound).extras)
    assert not torch.equal(read(base, bound, forgot, last)[1], read(base, bound, reader, last)[1])


def test_particles_read_with_it_and_resume() -> None:
    """Every particle as its own reader would; what it remembers is part of what is saved."""
    base = _base()
    rule, phi, pieces = _rule(base)

    def particles(base: AdaptationBase) -> Evolution:
        return Evolution(base, rule, phi, 3, pairs=1, sigma=1e-9, seed=1)

    whole, rest = particles(base), particles(base)
    bound = rule.bind(phi, base)
    reader, nats = begin(base, 3, bound), 0.0
    for piece in pieces[:4]:
        reader, nll = read(base, bound, reader, piece)
        nats += float(nll.sum())
    first = whole.step(phi, pieces[:4])
    assert first.loss == pytest.approx(nats / first.tokens, rel=1e-7)
    assert abs(particles(with_extensions(base)).step(phi, pieces[:4]).loss - first.loss) > 1e-3
    rest.load_state_tensors({n: t.clone() for n, t in whole.state_tensors().items()})
    one, other = whole.step(phi, pieces[4:]), rest.step(phi, pieces[4:])
    assert one.loss == other.loss
    for name, value in one.gradients.items():
        assert torch.equal(other.gradients[name], value)


def test_the_fingerprint_knows_settings_and_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = OWN.fingerprint()
    assert RunningMean(share=0.5).fingerprint() == mine
    assert RunningMean(share=0.25).fingerprint() != mine
    monkeypatch.setattr(sys.modules[__name__], "STRENGTH", 3.0)
    assert OWN.fingerprint() != mine


# ---------------------------------------------------------------- the core knows no extension


def _words_of_code(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, word): identifiers, names of modules, and words of strings but docstrings."""
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield from ((getattr(node, "lineno", 0), word) for word in text.split("."))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield from ((node.lineno, word) for word in re.findall(r"\w+", node.value))


def _file(kind: type) -> Path:
    return Path(sys.modules[kind.__module__].__file__ or "")


def _names_of_extensions() -> set[str]:
    """Of the extensions, their fields, classes and files."""
    kinds = [type(extension) for extension in Extensions()]
    fields = [field.name for field in dataclasses.fields(Extensions)]
    found = {*fields, *(e.name for e in Extensions())}
    return found | {_file(kind).stem for kind in kinds} | {kind.__name__ for kind in kinds}


@pytest.mark.parametrize("room", CORE)
def test_the_core_names_no_extension(room: str) -> None:
    """Neither imports one nor has its name in code; docstrings may refer to it."""
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    named, imported = [], []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for line, word in _words_of_code(tree):
            if word in _names_of_extensions():
                named.append(f"{room}/{file.name}:{line} {word}")
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            imported += [f"{file.name}: {m}" for m in modules if m.startswith("mlm.extensions")]
    assert not named
    assert not imported


def test_an_extension_can_be_short() -> None:
    sizes = {
        type(e).__name__: len(_file(type(e)).read_text(encoding="utf-8").splitlines())
        for e in Extensions()
    }
    assert min(sizes.values()) < 150, sizes
