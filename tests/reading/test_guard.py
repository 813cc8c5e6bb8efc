"""The guard: a lane that explodes reads on from theta_0, and no other lane notices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import EOS, articles, segments, tiny_base

from mlm import kernels
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.language_model import Weights
from mlm.models.recurrent import RecurrentLM, initial_weights
from mlm.reading import step as reading_step
from mlm.reading.meta_gradient import GradientMode, MetaGradient, meta_gradient
from mlm.reading.scoring import score_articles
from mlm.reading.static import StaticReader
from mlm.reading.step import Reader, Step, begin, read, score_segment, step
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS, SGD
from mlm.rules.protocol import Bound, Parameters, UpdateRule, per_lane
from mlm.settings.sections import AdaptConfig
from mlm.text.streams import Segment

pytestmark = pytest.mark.usefixtures("awake")

MODES: tuple[GradientMode, ...] = ("reverse", "checkpoint", "forward")
DYNAMIC = ("lstm.0.input", "lstm.1.input", "lstm.1.bias", "softmax.bias", "embedding")
LENGTHS = (200, 17, 200, 200)
"""Long articles, and in one lane a border."""
ALL = torch.ones(3, dtype=torch.bool)
BAD = 1
"""The lane that breaks."""
OTHERS = [0, 2]
PRECISION = 1e-12


@pytest.fixture(params=["compiled", pytest.param("eager", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to compute; lanes are kept apart above them, so one is enough every day."""
    with kernels.eager() if request.param == "eager" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are used again too: a number that broke must not come back with its memory."""
    monkeypatch.setattr(buffers, "MIN_BYTES", 0)
    yield
    buffers.clear()


@dataclasses.dataclass(frozen=True)
class Momentum(UpdateRule):
    """SGD with momentum: a rule that keeps a velocity beside every tensor."""

    name: str = "momentum"

    def state(self, base: AdaptationBase) -> Weights:
        """No velocity."""
        return {f"{n}/velocity": torch.zeros_like(w) for n, w in base.start().items()}

    def formula(self, parameters, base, weights, gradients, signal):
        """v <- keep v + gradient; theta <- theta - rate v."""
        new = {}
        for n, gradient in gradients.items():
            v = parameters["keep"] * weights[f"{n}/velocity"] + gradient
            new[n] = weights[n] - per_lane(parameters["rate"], v) * v
            new[f"{n}/velocity"] = v
        return {n: new[n] for n in weights}


KINDS = ("gates", "rms", "sgd", "momentum")


def _rule(kind: str, base: AdaptationBase) -> tuple[Bound, Parameters]:
    """A rule that reads well, and its parameters."""
    if kind == "gates":
        gates = LinearGates()
        phi = gates.start_at_rms(base, 0.02, 0.05)
        return gates.bind(phi, base), phi
    values, rule = {
        "rms": ({"rate": 0.02, "decay": 0.05}, RMS()),
        "sgd": ({"rate": 0.05}, SGD()),
        "momentum": ({"rate": 0.05, "keep": 0.8}, Momentum()),
    }[kind]
    phi = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    return rule.bind(phi, base), phi


def _world(kind: str) -> tuple[AdaptationBase, Bound, Parameters, Reader, list[Segment]]:
    """Three lanes in the middle of their articles, and what they read next."""
    base = tiny_base(DYNAMIC)
    bound, phi = _rule(kind, base)
    pieces = segments(base, LENGTHS, 3, 12)
    reader = begin(base, 3, bound)
    for piece in pieces[:3]:
        reader, _ = read(base, bound, reader, piece)
    assert any(bool(p.new[lane]) for p in pieces[3:] for lane in OTHERS), "a border elsewhere"
    assert not any(bool(p.new[BAD]) for p in pieces[1:])
    return base, bound, phi, reader, pieces[3:]


def _border(pieces: Sequence[Segment], *at: int) -> list[Segment]:
    """The same text with article borders in the bad lane."""
    flag = torch.zeros(3, dtype=torch.bool)
    flag[BAD] = True
    return [p._replace(new=p.new | flag) if t in at else p for t, p in enumerate(pieces)]


def _spoilt(reader: Reader, **values: float) -> Reader:
    """The reader with these values all over some of the bad lane's tensors (`__` is a dot)."""
    weights = {n: w.clone() for n, w in reader.weights.items()}
    for name, value in values.items():
        weights[name.replace("__", ".").replace("_velocity", "/velocity")][BAD] = value
    return reader._replace(weights=weights)


def _one_number(reader: Reader, name: str, value: float, at: int = 3) -> Reader:
    """The reader with this value in a single number of one of the bad lane's tensors."""
    weights = {n: w.clone() for n, w in reader.weights.items()}
    weights[name][BAD].view(-1)[at] = value
    return reader._replace(weights=weights)


def _overflow(reader: Reader) -> Reader:
    """Weights, all of them finite, whose loss is finite and whose gradient is not."""
    reader = _spoilt(reader, embedding=0.0)
    reader.weights["embedding"][BAD, -1] = 1e308
    reader.weights["lstm.1.input"][BAD] *= 100
    return reader


BROKEN = {
    "everything is NaN": lambda r: _spoilt(r, **dict.fromkeys(_names(r), math.nan)),
    "everything is infinite": lambda r: _spoilt(r, **dict.fromkeys(_names(r), math.inf)),
    "everything is huge": lambda r: _spoilt(r, **dict.fromkeys(_names(r), 1e308)),
    "one matrix is NaN": lambda r: _spoilt(r, lstm__1__input=math.nan),
    "one number is NaN": lambda r: _one_number(r, "softmax.bias", math.nan),
    "one number is infinite": lambda r: _one_number(r, "embedding", math.inf),
    "one gate is infinite": lambda r: _one_number(r, "lstm.0.input", -math.inf),
    "the loss overflows": lambda r: _one_number(r, "softmax.bias", 1e308),
    "the gradient overflows": _overflow,
}
"""What may happen to a lane's weights such that its next segment has no loss or no gradient."""


def _names(reader: Reader) -> list[str]:
    return [n for n in reader.weights if "/" not in n]


def _assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """Equal, NaN nowhere."""
    torch.testing.assert_close(
        got, want, rtol=PRECISION, atol=PRECISION, msg=lambda m: f"{what}: {m}"
    )
    assert bool(got.isfinite().all()), what


def _assert_same_reader(got: Reader, want: Reader, lanes: list[int] | None = None) -> None:
    lanes = lanes or [0, 1, 2]
    for n, w in want.weights.items():
        _assert_same(got.weights[n][lanes], w[lanes], n)
    for k, (a, b) in enumerate(zip(got.state.tensors(), want.state.tensors(), strict=True)):
        _assert_same(a[lanes], b[lanes], f"state {k}")
    assert torch.equal(got.age[lanes], want.age[lanes])
    assert torch.equal(got.rest[lanes], want.rest[lanes])


def _assert_same_meta(got: MetaGradient, want: MetaGradient, flushed: int) -> None:
    """The same in all that an unroll gives, but for what the guard did."""
    assert (got.flushed, want.flushed) == (flushed, 0)
    assert got.tokens == want.tokens
    assert got.loss == pytest.approx(want.loss, rel=PRECISION)
    for n, g in want.gradients.items():
        _assert_same(got.gradients[n], g, n)
    for n, g in want.weights.items():
        _assert_same(got.weights[n], g, n)
    _assert_same_reader(got.reader, want.reader)


def _meta(base, bound, phi, reader, pieces, mode: GradientMode = "reverse") -> MetaGradient:
    """With all that may be asked for: shared weights, and the EWC penalty."""
    learn = ("lstm.0.recurrent", "softmax.bias")
    return meta_gradient(base, bound, phi, reader, pieces, mode, learn, 0.1)


def _assert_meta(base, bound, phi, reader, pieces, want: MetaGradient, flushed: int) -> None:
    """In every mode what an unbroken reading of a text with borders gives."""
    for mode in MODES:
        _assert_same_meta(_meta(base, bound, phi, reader, pieces, mode), want, flushed)


# ---------------------------------------------------------------- no loss, or no gradient


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_lane_is_scored_under_theta_0(kind: str, broken, engine) -> None:
    """One segment, number by number: as at an article border, and reported."""
    base, bound, _, reader, pieces = _world(kind)
    bad = broken(reader)
    got = step(base, bound, bad, pieces[0])
    want = step(base, bound, reader, _border(pieces, 0)[0])
    assert got.flushed.tolist() == [False, True, False]
    assert not want.flushed.any()
    assert got.new.tolist() == want.new.tolist()
    assert got.before.age[BAD] == 0
    for n, w in bound.start().items():
        assert torch.equal(got.before.weights[n][BAD], w)
    _assert_same(got.scored.nll, want.scored.nll, "losses")
    _assert_same(got.scored.output, want.scored.output, "outputs")
    for n, g in want.scored.gradients.items():
        _assert_same(got.scored.gradients[n], g, n)
    _assert_same_reader(got.after, want.after)


def test_the_gradient_of_a_finite_loss_can_overflow() -> None:
    """What `_overflow` is for."""
    base, _, _, reader, pieces = _world("sgd")
    scored = score_segment(base, _overflow(reader), pieces[0])
    assert bool(scored.loss.isfinite().all())
    assert not bool(scored.gradients["lstm.0.input"][BAD].isfinite().all())


@pytest.mark.parametrize("kind", ["gates", "momentum"])
def test_a_broken_lane_leaves_the_meta_gradient_alone(kind, engine) -> None:
    """It is that of a text with an article border there."""
    base, bound, phi, reader, pieces = _world(kind)
    pieces = pieces[:6]
    want = _meta(base, bound, phi, reader, _border(pieces, 0))
    for broken in ("everything is NaN", "one gate is infinite", "the gradient overflows"):
        _assert_meta(base, bound, phi, BROKEN[broken](reader), pieces, want, 1)


class Spoiling:
    """A rule whose update writes a value all over the bad lane's weights at some age."""

    def __init__(self, bound: Bound, value: float, age: int) -> None:
        self.bound, self.value, self.age = bound, value, age
        self.start, self.pullback, self.tangent = bound.start, bound.pullback, bound.tangent
        self.advance, self.owed = bound.advance, bound.owed

    def update(self, weights, gradients, signal, out=None) -> Weights:
        """That of the rule, spoilt."""
        new = self.bound.update(weights, gradients, signal, out)
        if signal.age[BAD] == self.age:
            for w in new.values():
                w[BAD] = self.value
        return new


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_break_within_an_unroll_leave_no_trace(kind, value, engine) -> None:
    """They do so in the update before the third segment, and again five segments later."""
    base, bound, phi, reader, pieces = _world(kind)
    assert int(reader.age[BAD]) == 3
    spoiling = Spoiling(bound, value, 4)
    want = _meta(base, bound, phi, reader, _border(pieces[:8], 2, 7))
    _assert_meta(base, spoiling, phi, reader, pieces[:8], want, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [math.inf, 1e5])
@pytest.mark.parametrize("rule", [SGD(), RMS()], ids=lambda rule: rule.name)
def test_a_rate_that_explodes_touches_only_its_own_lane(rule, rate, mode, engine) -> None:
    """Settings read side by side: losses, weights and derivatives of the others, to the last bit.

    Whether the guard sees it (an infinite rate) or not (weights that are merely absurd).
    """
    base, _, _, _, pieces = _world("sgd")
    pieces = pieces[:5]

    def unroll(bad: float) -> tuple[list[Tensor], MetaGradient]:
        rates = torch.full((3,), 0.03, dtype=torch.float64)
        phi = {"rate": rates.clone(), "decay": rates * 2}
        phi = {n: phi[n] for n in ("rate", "decay")[: 1 + (rule.name == "rms")]}
        phi["rate"][BAD] = bad
        bound, reader, losses = rule.bind(phi, base), begin(base, 3), []
        found = meta_gradient(base, bound, phi, reader, pieces, mode)
        for piece in pieces:
            reader, nll = read(base, bound, reader, piece)
            losses.append(nll)
        return losses, found

    (got, wild), (want, tame) = unroll(rate), unroll(0.03)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[OTHERS], b[OTHERS])
        assert torch.equal(a[BAD], b[BAD]) == (a is got[0])
    _assert_same_reader(wild.reader, tame.reader, OTHERS)
    for n, g in tame.gradients.items():
        assert torch.equal(wild.gradients[n][OTHERS], g[OTHERS])
        assert float(g[OTHERS].abs().min()) > 1e-9
    assert wild.flushed == (len(pieces) - 1 if rate == math.inf else 0)


@pytest.mark.parametrize("broken", ["h", "c"])
def test_a_broken_hidden_state_is_reset_with_its_lane(broken: str, engine) -> None:
    base, bound, _, reader, pieces = _world("gates")
    tensors = [t.clone() for t in reader.state.tensors()]
    tensors[0 if broken == "h" else 2][BAD] = math.nan
    bad = reader._replace(state=reader.state.of(tensors))
    got = step(base, bound, bad, pieces[0])
    want = step(base, bound, reader, _border(pieces, 0)[0])
    assert got.flushed.tolist() == [False, True, False]
    _assert_same(got.scored.nll, want.scored.nll, "losses")
    _assert_same_reader(got.after, want.after)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_state_of_the_rule_leaves_no_trace(value: float) -> None:
    """It shows in the losses one segment late: an article border there reads the same."""
    base, bound, phi, reader, pieces = _world("momentum")
    bad = _spoilt(reader, lstm__1__bias_velocity=value)
    late = int(not step(base, bound, bad, pieces[0]).flushed[BAD])
    want = _meta(base, bound, phi, reader, _border(pieces, late))
    _assert_meta(base, bound, phi, bad, pieces, want, 1)


@pytest.mark.parametrize("name", ["lstm.1.bias", "softmax.bias"])
@pytest.mark.parametrize("kind", ["gates", "sgd"])
def test_an_infinite_bias_that_the_loss_hides_is_found(kind: str, name: str) -> None:
    """A gate that is shut for good, a word that cannot come: loss and gradient are finite."""
    base, bound, phi, reader, pieces = _world(kind)
    absent = min(set(range(12)) - set(pieces[0].targets[BAD].tolist()))
    bad = _one_number(reader, name, -math.inf, absent)
    scored = score_segment(base, bad, pieces[0])
    assert all(bool(x.isfinite().all()) for x in (scored.loss, *scored.gradients.values()))
    for mode in MODES:
        got = _meta(base, bound, phi, bad, pieces, mode)
        assert math.isfinite(got.loss)
        for n, x in [*got.gradients.items(), *got.reader.weights.items()]:
            assert bool(x.isfinite().all()), f"{mode}, {n}"
        assert got.flushed == 1


# ---------------------------------------------------------------- a loss above the limit


def _worse(reader: Reader) -> Reader:
    """The bad lane under weights that expect other words: a finite loss, far above the others'."""
    weights = {n: w.clone() for n, w in reader.weights.items()}
    weights["softmax.bias"][BAD] = torch.linspace(40, 0, 12)
    return reader._replace(weights=weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_above_the_limit_is_scored_as_it_is_and_reset_after(kind: str, engine) -> None:
    base, bound, _, reader, pieces = _world(kind)
    guarded = dataclasses.replace(base, limit=6.0)
    bad = _worse(reader)
    free, first = (step(m, bound, bad, pieces[0]) for m in (base, guarded))
    assert float(free.scored.loss[BAD]) > 6.0 > float(free.scored.loss[OTHERS].max())
    assert torch.equal(first.scored.nll, free.scored.nll)
    assert first.flushed.tolist() == [False, True, False]
    assert first.after.rest.tolist() == first.after.bursts.tolist() == [0, 1, 0]
    assert not free.flushed.any()
    second = step(guarded, bound, first.after, pieces[1])
    want = step(base, bound, free.after, _border(pieces, 1)[1])
    assert second.new.tolist() == want.new.tolist()
    assert not second.flushed.any()
    _assert_same(second.scored.nll, want.scored.nll, "losses")
    _assert_same_reader(second.after, want.after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lane_above_the_limit_ends_its_part_of_the_meta_gradient(kind, engine) -> None:
    """An article border after the segment reads the same; so does one that is there already."""
    base, bound, phi, reader, pieces = _world(kind)
    guarded = dataclasses.replace(base, limit=6.0)
    want = _meta(base, bound, phi, _worse(reader), _border(pieces, 1))
    for text in (pieces, _border(pieces, 1)):
        _assert_meta(guarded, bound, phi, _worse(reader), text, want, 1)


def test_a_lane_that_explodes_last_is_reset_in_the_next_unroll() -> None:
    base, bound, phi, reader, pieces = _world("gates")
    guarded = dataclasses.replace(base, limit=6.0)
    first = _meta(guarded, bound, phi, _worse(reader), pieces[:1])
    assert first.flushed == 1
    alone = first.reader._replace(rest=torch.zeros(3, dtype=torch.int64))
    want = _meta(base, bound, phi, alone, _border(pieces[1:], 0))
    _assert_meta(guarded, bound, phi, first.reader, pieces[1:], want, 0)


def test_a_lane_is_above_the_limit_by_the_mean_of_its_own_tokens() -> None:
    """Nats per token more than theta_0, also where an article's last segment holds a single one."""
    base = tiny_base(DYNAMIC)
    bound, _ = _rule("sgd", base)
    pieces = segments(base, (6, 6, 6), 3, 2)
    assert pieces[1].mask.sum(1).tolist() == [1, 1, 1]
    first = step(base, bound, begin(base, 3), pieces[0]).after
    losses = step(base, bound, first, pieces[1]).scored.nll.sum(1)
    fresh = StaticReader(base, 3).read(pieces[1]).nll * pieces[1].mask
    low, middle, high = (losses - fresh.sum(1)).sort().values.tolist()
    for limit, number in ((low - 1e-9, 3), (middle - 1e-9, 2), (high - 1e-9, 1), (high, 0)):
        guarded = dataclasses.replace(base, limit=limit)
        assert int(step(guarded, bound, first, pieces[1]).flushed.sum()) == number


def _flushed(base: AdaptationBase, bound: Bound, reader: Reader, pieces) -> list[list[bool]]:
    found = []
    for piece in pieces:
        now: Step = step(base, bound, reader, piece)
        found.append(now.flushed.tolist())
        reader = now.after
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_limit_no_finite_loss_resets_a_lane(kind: str, engine) -> None:
    """Neither an ordinary one nor one of 1e200 nats."""
    base, bound, phi, reader, pieces = _world(kind)
    assert base.limit == math.inf
    assert not np.any(_flushed(base, bound, reader, pieces))
    assert _meta(base, bound, phi, reader, pieces).flushed == 0
    bad = _one_number(reader, "softmax.bias", 1e200)
    now = step(base, bound, bad, pieces[0])
    assert 1e190 < float(now.scored.loss[BAD]) < math.inf
    assert not now.flushed.any()


@pytest.mark.parametrize("kind", KINDS)
def test_theta_0_itself_is_never_above_the_limit(kind: str) -> None:
    """With a limit that every loss passes, a lane is reset after every second segment."""
    base = dataclasses.replace(tiny_base(DYNAMIC), limit=-math.inf)
    bound, _ = _rule(kind, base)
    pieces = segments(base, (200, 200, 200), 3, 6)
    found = _flushed(base, bound, begin(base, 3, bound), pieces)
    assert found == [[False] * 3, [True] * 3] * 3


@pytest.mark.parametrize("limit", [math.inf, 3.2])
def test_which_lanes_explode_does_not_depend_on_their_company(limit: float, engine) -> None:
    """Articles read side by side under a rule that explodes time and again, and one by one."""
    base = dataclasses.replace(tiny_base(DYNAMIC), limit=limit)
    phi = {"rate": torch.tensor(40.0).double(), "decay": torch.tensor(0.1).double()}
    bound, texts = RMS().bind(phi, base), articles((61, 33, 48, 5, 70))
    one = score_articles(base, bound, texts, EOS, 1)
    many = score_articles(base, bound, texts, EOS, 3)
    for a, b in zip(one.nll, many.nll, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
        assert np.isfinite(a).all()
    free = dataclasses.replace(base, limit=math.inf)
    unguarded = score_articles(free, bound, texts, EOS, 1)
    assert (one.total == unguarded.total) == (limit == math.inf)


# ---------------------------------------------------------------- text that is hard for theta_0

GREEK = ["η", "θάλασσα", "και", "το", "μικρό", "καράβι", "του", "ψαρά", "που", "γύρισε", "φως"]
GEORGIAN = ["ზღვა", "და", "პატარა", "ნავი", "მეთევზის", "რომელიც", "დაბრუნდა", "ნავსადგურში"]
CHINESE = list("海上的小船和漁夫帶著燈光回到港口")
SEEN = 128
"""Bytes that training text held; it was English."""


def _english_base() -> AdaptationBase:
    """A model of bytes that never saw most of them, guarded as runs are."""
    random = torch.Generator().manual_seed(0)
    shape = RecurrentLM(257, 8, 8, 1)
    weights = {n: w.double() for n, w in initial_weights(shape, random).items()}
    weights["softmax.bias"][SEEN:256] -= 9.0
    dynamic = ("softmax.bias", "lstm.0.recurrent")
    rms = {n: torch.full_like(weights[n], 0.02) for n in dynamic}
    rms["softmax.bias"][SEEN:256] = 0.004
    base = AdaptationBase(shape, weights, dynamic, rms, 3.0, 20)
    return base.guarded(AdaptConfig().guard, 257)


def _unseen(words: list[str], number: int = 200) -> np.ndarray:
    """A text of these words as bytes."""
    drawn = np.random.default_rng(0).choice(words, number)
    return np.frombuffer(" ".join(drawn).encode(), np.uint8).astype(np.int64)


@pytest.mark.parametrize("words", [GREEK, GEORGIAN, CHINESE], ids=["Greek", "Georgian", "Chinese"])
@pytest.mark.parametrize("kind", ["rms", "sgd", "gates"])
def test_unseen_scripts_reset_nobody(kind: str, words: list[str]) -> None:
    """theta_0 loses more than guessing does: a rule may too, and learns from it."""
    base, text = _english_base(), _unseen(words)
    bound = {
        "rms": lambda: RMS().bind({"rate": _number(0.05), "decay": _number(0.002)}, base),
        "sgd": lambda: SGD().bind({"rate": _number(20.0)}, base),
        "gates": lambda: LinearGates().bind(LinearGates().start_at_rms(base, 0.05, 0.002), base),
    }[kind]()
    static = score_articles(base, None, [text], 256, 1)
    found = score_articles(base, bound, [text], 256, 1)
    assert static.nll[0][:20].mean() > 1.5 * math.log(257)
    assert not found.flushes
    assert found.total < 0.8 * static.total


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_a_rule_that_diverges_on_an_unseen_script_is_reset() -> None:
    """What it loses stays in proportion to what theta_0 does."""
    base, text = _english_base(), _unseen(GREEK)
    bound = RMS().bind({"rate": _number(50.0), "decay": _number(0.0)}, base)
    wild = score_articles(dataclasses.replace(base, limit=math.inf), bound, [text], 256, 1)
    found = score_articles(base, bound, [text], 256, 1)
    assert len(found.flushes) > 10
    assert found.total < wild.total


# ---------------------------------------------------------------- rest


def _explosions(base: AdaptationBase, bound: Bound, pieces: Sequence[Segment]) -> list[int]:
    """The segments behind which the bad lane exploded, and those that theta_0 read."""
    reader, found = begin(base, 3, bound), []
    for at, piece in enumerate(pieces):
        now = step(base, bound, reader, piece)
        if now.flushed[BAD]:
            found.append(at)
        reader = now.after
    return found


def test_a_lane_that_explodes_again_rests_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that diverges on a text costs a few segments of it, however long it is."""
    monkeypatch.setattr(reading_step, "REST", 2)
    monkeypatch.setattr(reading_step, "LONGER", 3)
    base = tiny_base(DYNAMIC)
    bound = SGD().bind({"rate": torch.tensor(60.0, dtype=torch.float64)}, base)
    pieces = segments(base, (200, 400, 200), 3, 40)
    assert not any(bool(p.new[BAD]) for p in pieces[1:])
    guarded = dataclasses.replace(base, limit=3.0)
    # Read under theta_0, exploded; rests 2 and explodes behind the next, rests 6, 18.
    assert _explosions(guarded, bound, pieces) == [1, 4, 11, 30]
    reader = begin(guarded, 3, bound)
    losses = []
    for piece in pieces[:11]:
        now = step(guarded, bound, reader, piece)
        losses.append(float(now.scored.loss[BAD]))
        reader = now.after
    static = StaticReader(base, 3)
    for at in range(5, 11):
        now = static.read(pieces[at]._replace(new=ALL) if at == 5 else pieces[at])
        want = float((now.nll * pieces[at].mask)[BAD].sum() / pieces[at].mask[BAD].sum())
        assert losses[at] == pytest.approx(want, rel=PRECISION)


def test_an_article_that_begins_ends_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_step, "REST", 50)
    base = tiny_base(DYNAMIC)
    bound = SGD().bind({"rate": torch.tensor(60.0, dtype=torch.float64)}, base)
    pieces = _border(segments(base, (200, 400, 200), 3, 20), 10)
    guarded = dataclasses.replace(base, limit=3.0)
    assert _explosions(guarded, bound, pieces) == [1, 11]


def test_lanes_better_than_guessing_are_not_looked_at() -> None:
    """Whatever theta_0 loses there: it is not asked, so ordinary text costs no second pass."""
    base, bound, _, reader, pieces = _world("gates")
    guarded = dataclasses.replace(base, limit=6.0, guess=1e4)
    assert not step(guarded, bound, _worse(reader), pieces[0]).flushed.any()
    seen = base.guarded(3.0, 12)
    assert (seen.limit, seen.guess) == (3.0, math.log(12))
    assert base.guarded(0.0, 12).limit == math.inf
