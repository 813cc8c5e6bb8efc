"""Persistent evolution strategies: the gradient of the whole reading from short unrolls."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from worlds import segments, tiny_base

from mlm.base.errors import UserError
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.pes import Evolution
from mlm.reading.step import Reader, begin, read
from mlm.rules.gates import LinearGates
from mlm.rules.protocol import Bound, Parameters
from mlm.store.tensors import load_tensors, save_tensors
from mlm.text.streams import Segment

LANES = 2
LENGTHS = (31, 13, 40)
"""Articles longer than an unroll, and one that ends inside."""
RULE = LinearGates(features=("fisher",), per_tensor=False)
"""Five numbers: constant and `fisher` of UPDATE and FLUSH, and FLUSH's scale."""
ONE = LinearGates(flush=False, features=(), per_tensor=False)
"""A single number, the logarithm of the rate."""


@pytest.fixture(autouse=True)
def reuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are used again too: nobody may still need what is given away."""
    monkeypatch.setattr(buffers, "MIN_BYTES", 0)
    yield
    buffers.clear()


def _base() -> AdaptationBase:
    return tiny_base(("lstm.0.recurrent", "softmax.bias"), layers=1, segment=3)


def _unrolls(base: AdaptationBase, number: int, length: int) -> list[list[Segment]]:
    """Successive unrolls of one reading with an article border inside an unroll."""
    pieces = segments(base, LENGTHS, LANES, number * length)
    assert any(bool(p.new.any()) for t, p in enumerate(pieces) if t % length), "no border inside"
    return [pieces[k : k + length] for k in range(0, len(pieces), length)]


def _parameters(base: AdaptationBase, rule: LinearGates) -> Parameters:
    if rule.flush:
        return rule.start_at_rms(base, 0.05, 0.2)
    return rule.start_at_sgd(base, 0.5)


class Balanced(Evolution):
    """Signs instead of random numbers, balanced between all numbers of all unrolls.

    Their products average to exactly zero, as those of independent numbers do in expectation: what
    holds for the mean of infinitely many draws then holds, up to O(sigma^2), for one reading.
    """

    drawn = 0

    def _draw(self) -> Tensor:
        pairs, size = len(self.readers) // 2, len(self.sigma_P)
        signs = torch.ones(1, 1, dtype=torch.float64)
        while len(signs) < pairs:  # Sylvester's matrix: orthogonal columns
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        half = signs[:, self.drawn * size : (self.drawn + 1) * size]
        assert half.shape == (pairs, size)
        self.drawn += 1
        return torch.cat([half, -half])


def _objective(
    base: AdaptationBase, bound: Bound, unrolls: Sequence[Sequence[Segment]], ewc: float
) -> float:
    """Sum over unrolls of nats per token and EWC penalty, read from the start to the end."""
    reader, total = begin(base, LANES, bound), 0.0
    for unroll in unrolls:
        tokens = sum(int(p.mask.sum()) for p in unroll)
        for piece in unroll:
            for lane in range(LANES):
                for n in base.dynamic if not piece.new[lane] else ():
                    far = reader.weights[n][lane] - base.weights[n]
                    squares = float((base.rms[n] ** 2 * far**2).sum())
                    total += ewc / 2 * squares / (LANES * len(unroll))
            reader, nll = read(base, bound, reader, piece)
            total += float(nll.sum()) / tokens
    return total


def _finite_differences(base, rule, phi: Parameters, unrolls, ewc: float = 0.0) -> Parameters:
    """Central differences of `_objective` by every number."""
    found, h = {}, 1e-4
    for name, value in phi.items():
        found[name] = torch.zeros_like(value)
        for k in range(value.numel()):
            sides = []
            for move in (h, -h):
                moved = {n: p.clone() for n, p in phi.items()}
                moved[name].view(-1)[k] += move
                sides.append(_objective(base, rule.bind(moved, base), unrolls, ewc))
            found[name].view(-1)[k] = (sides[0] - sides[1]) / (2 * h)
    return found


def _truncated(base, rule, phi: Parameters, unrolls) -> Parameters:
    """Sum over unrolls of the meta-gradient, per token of the whole unroll as in `Estimate`."""
    bound, reader = rule.bind(phi, base), begin(base, LANES)
    total = {n: torch.zeros_like(p) for n, p in phi.items()}
    for unroll in unrolls:
        found = meta_gradient(base, bound, phi, reader, unroll)
        tokens = sum(int(p.mask.sum()) for p in unroll)
        for n, g in found.gradients.items():
            total[n] += g * found.tokens / tokens
        reader = found.reader
    return total


def _total(evolution: Evolution, phi: Parameters, unrolls) -> Parameters:
    """Sum of the estimates of successive unrolls."""
    found = [evolution.step(phi, unroll).gradients for unroll in unrolls]
    return {n: torch.stack([one[n] for one in found]).sum(0) for n in phi}


# ---------------------------------------------------------------- no bias


@pytest.mark.parametrize("ewc", [0.0, 3.0])
def test_balanced_perturbations_give_the_gradient_of_the_whole_reading(ewc: float) -> None:
    """Three unrolls of three updates; an estimate that forgets between them misses much of it."""
    base = _base()
    unrolls, phi = _unrolls(base, 3, 3), _parameters(base, RULE)
    settings: dict = {"pairs": 16, "sigma": 1e-4, "seed": 0, "scale": {"flush_scale": 10.0}}
    evolution, forgetful = (Balanced(base, RULE, phi, LANES, **settings, ewc=ewc) for _ in range(2))
    got = _total(evolution, phi, unrolls)
    want = _finite_differences(base, RULE, phi, unrolls, ewc)
    short = {n: torch.zeros_like(p) for n, p in phi.items()}
    for unroll in unrolls:
        forgetful.xi.zero_()
        for n, g in forgetful.step(phi, unroll).gradients.items():
            short[n] += g
    for n, g in want.items():
        size = float(g.norm())
        assert size > 1e-5, f"{n}: nothing to compare"
        assert float((got[n] - g).norm()) < 1e-5 * size, n
        assert float((short[n] - g).norm()) > 0.01 * size, n


@pytest.mark.slow
def test_random_perturbations_are_right_on_average() -> None:
    """z-test, 4 standard errors; sigma is so small that smoothing does not show."""
    base = _base()
    unrolls, phi = _unrolls(base, 4, 2), _parameters(base, ONE)
    sample = torch.stack(
        [
            _total(Evolution(base, ONE, phi, LANES, pairs=4, sigma=1e-3, seed=seed), phi, unrolls)[
                "update"
            ]
            for seed in range(24)
        ]
    )
    mean, error = float(sample.mean()), float(sample.std()) / len(sample) ** 0.5
    assert abs(mean - float(_finite_differences(base, ONE, phi, unrolls)["update"])) < 4 * error
    assert abs(mean - float(_truncated(base, ONE, phi, unrolls)["update"])) > 4 * error


def test_the_loss_is_that_of_all_tokens_of_all_particles() -> None:
    """With perturbations too small to see, that of reading with the parameters themselves."""
    base = _base()
    unrolls, phi = _unrolls(base, 3, 3), _parameters(base, RULE)
    evolution = Evolution(base, RULE, phi, LANES, pairs=2, sigma=1e-9, seed=0, ewc=5.0)
    bound, reader = RULE.bind(phi, base), begin(base, LANES)
    for unroll in unrolls:
        found, total = evolution.step(phi, unroll), 0.0
        for piece in unroll:
            reader, nll = read(base, bound, reader, piece)
            total += float(nll.sum())
        assert found.tokens == sum(int(p.mask.sum()) for p in unroll)
        assert found.loss == pytest.approx(total / found.tokens, rel=1e-7)
        assert found.flushed == 0


# ---------------------------------------------------------------- credit


@dataclasses.dataclass(frozen=True)
class Even(LinearGates):
    """Reads x and -x as the same rule: its loss has no odd part at zero."""

    def bind(self, parameters: Parameters, base: AdaptationBase) -> Bound:
        """The rate is exp(x^2 - 1)."""
        return super().bind({n: p**2 - 1 for n, p in parameters.items()}, base)


def test_what_is_even_cancels_within_a_pair() -> None:
    base = _base()
    rule = Even(flush=False, features=(), per_tensor=False)
    phi = {"update": torch.zeros(1, 1, dtype=torch.float64)}
    evolution = Evolution(base, rule, phi, LANES, pairs=1, sigma=0.5, seed=0)
    for unroll in _unrolls(base, 3, 3):
        found = evolution.step(phi, unroll)
        assert torch.equal(evolution.xi[0], -evolution.xi[1])
        assert float(evolution.xi[0].abs().min()) > 0
        assert abs(float(found.gradients["update"])) < 1e-12 * found.loss


def test_a_lane_remembers_the_perturbations_since_its_article_began() -> None:
    """xi of one particle in two lanes whose articles end at different times, by hand."""
    base = _base()
    unrolls, phi = _unrolls(base, 4, 3), _parameters(base, RULE)
    evolution = Evolution(base, RULE, phi, LANES, pairs=2, sigma=0.01, seed=5)
    generator = torch.Generator().manual_seed(5)
    felt: list[list[Tensor]] = [[] for _ in range(LANES)]
    for unroll in unrolls:
        noise_P = torch.randn(2, 5, generator=generator, dtype=torch.float64)[0]
        evolution.step(phi, unroll)
        for lane, past in enumerate(felt):
            if any(bool(piece.new[lane]) for piece in unroll):
                past.clear()
            past.append(noise_P)
            got, want = evolution.xi[0, lane], torch.stack(past).sum(0)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert [len(past) for past in felt] == [4, 3]


def test_what_is_read_under_theta_0_owes_nothing() -> None:
    """The opening segment of an article: no credit, whatever the lane felt before."""
    base = _base()
    piece = segments(base, LENGTHS, LANES, 1)[0]
    assert bool(piece.new.all())
    phi = _parameters(base, RULE)
    evolution = Evolution(base, RULE, phi, LANES, pairs=2, sigma=0.1, seed=0, ewc=1.0)
    for _ in range(2):
        found = evolution.step(phi, [piece])
        assert all(not g.any() for g in found.gradients.values())
        assert float(evolution.xi.abs().min()) > 0


@pytest.mark.usefixtures("awake")
def test_a_lane_that_the_guard_resets_forgets_what_it_felt() -> None:
    """A limit that every loss passes: weights are used for one segment, then reset."""
    base = dataclasses.replace(_base(), limit=-math.inf)
    unrolls = [segments(base, (400,) * LANES, LANES, 8)[k : k + 4] for k in (0, 4)]
    phi = _parameters(base, RULE)
    evolution = Balanced(base, RULE, phi, LANES, pairs=16, sigma=1e-4, seed=0)
    for unroll in unrolls:
        assert evolution.step(phi, unroll).flushed == 2 * LANES * 32
    assert torch.equal(evolution.xi.abs(), torch.ones_like(evolution.xi)), "the last noise alone"


@dataclasses.dataclass(frozen=True)
class Bounded(LinearGates):
    """A rate of at most exp(-1)."""

    def project(self, parameters: Parameters) -> None:
        """Back to the bound."""
        parameters["update"].clamp_(max=-1.0)


def test_parameters_beyond_a_bound_are_read_at_it_and_credited_in_full() -> None:
    """At the bound half of the perturbations do nothing: half of the derivative below it."""
    base = _base()
    piece = segments(base, LENGTHS, LANES, 4)
    rule, h = Bounded(flush=False, features=(), per_tensor=False), 1e-5
    phi = {"update": torch.full((1, 1), -1.0, dtype=torch.float64)}
    evolution = Balanced(base, rule, phi, LANES, pairs=1, sigma=h, seed=0)
    found = float(evolution.step(phi, [*piece]).gradients["update"])
    below = {"update": phi["update"] - h}
    sides = [_objective(base, rule.bind(p, base), [piece], 0.0) for p in (phi, below)]
    assert found == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-6)
    assert float(phi["update"]) == -1.0, "the caller's parameters are left alone"


# ---------------------------------------------------------------- particles


@pytest.mark.parametrize(("lanes", "fixed"), [(1, ()), (3, ()), (3, ("fisher",))])
def test_every_particle_reads_as_if_it_were_alone(lanes: int, fixed) -> None:
    """Parameters of its own, memory of its own; theta_0 is nobody's to write.

    What the rule does not train is not perturbed.
    """
    base = _base()
    pieces = segments(base, LENGTHS, lanes, 9)
    phi = _parameters(base, RULE)
    rule = dataclasses.replace(RULE, fixed=fixed)
    evolution = Evolution(base, rule, phi, lanes, pairs=2, sigma=0.3, seed=8)
    trained = torch.tensor([1.0, not fixed, 1.0, not fixed, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(8)
    start = {n: w.clone() for n, w in base.weights.items()}
    alone: list[Reader] = [begin(base, lanes) for _ in range(4)]
    for unroll in (pieces[:3], pieces[3:6], pieces[6:]):
        found = evolution.step(phi, unroll)
        assert all(bool(found.gradients[n][:, 1].any()) != bool(fixed) for n in ("update", "flush"))
        half = 0.3 * trained * torch.randn(2, 5, generator=generator, dtype=torch.float64)
        for k, eps in enumerate(torch.cat([half, -half])):
            moved = {
                "update": phi["update"] + eps[:2],
                "flush": phi["flush"] + eps[2:4],
                "flush_scale": (phi["flush_scale"] + eps[4:]).clamp(min=0),
            }
            bound = RULE.bind(moved, base)
            for piece in unroll:
                alone[k], _ = read(base, bound, alone[k], piece)
    for got, want in zip(evolution.readers, alone, strict=True):
        assert torch.equal(got.age, want.age)
        pairs = [(got.weights[n], w) for n, w in want.weights.items()]
        for a, b in [*pairs, *zip(got.state.tensors(), want.state.tensors(), strict=True)]:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in itertools.combinations(alone, 2):
        assert not torch.equal(a.weights["softmax.bias"], b.weights["softmax.bias"])
    assert all(torch.equal(base.weights[n], w) for n, w in start.items())


def test_resuming_gives_the_very_same_numbers(tmp_path) -> None:
    base = _base()
    unrolls, phi = _unrolls(base, 4, 3), _parameters(base, RULE)

    def fresh(seed: int) -> Evolution:
        return Evolution(base, RULE, phi, LANES, pairs=2, sigma=0.1, seed=seed, ewc=1.0)

    whole, rest = fresh(3), fresh(99)
    for unroll in unrolls[:2]:
        whole.step(phi, unroll)
    saved = whole.state_tensors()
    save_tensors(tmp_path / "state", saved, {})
    wanted = [whole.step(phi, unroll) for unroll in unrolls[2:]]
    for tensors in (saved, load_tensors(tmp_path / "state", "")[0], saved):
        rest.load_state_tensors(tensors)
        for unroll, want in zip(unrolls[2:], wanted, strict=True):
            got = rest.step(phi, unroll)
            assert (got.loss, got.tokens, got.flushed) == (want.loss, want.tokens, want.flushed)
            assert all(torch.equal(got.gradients[n], g) for n, g in want.gradients.items())
    for name, tensor in whole.state_tensors().items():
        assert torch.equal(tensor, rest.state_tensors()[name]), name


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pairs": 0}, "one pair"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"scale": {"flush_scale": -1.0}}, "flush_scale"),
        ({"scale": {"flash": 1.0}}, "'flash', but the parameters are update, flush, flush_scale"),
    ],
)
def test_settings_that_estimate_nothing_are_refused(settings, words: str) -> None:
    base = _base()
    settings = {"pairs": 1, "sigma": 0.1, "seed": 0, **settings}
    with pytest.raises(UserError, match=words):
        Evolution(base, RULE, _parameters(base, RULE), LANES, **settings)


def test_particles_of_other_settings_are_refused() -> None:
    base = _base()
    phi = _parameters(base, RULE)
    two, three = (
        Evolution(base, RULE, phi, LANES, pairs=pairs, sigma=0.1, seed=0) for pairs in (2, 3)
    )
    with pytest.raises(UserError, match=r"3 pairs of 2 lanes.*here there are 2 pairs"):
        two.load_state_tensors(three.state_tensors())
