"""What a rule may do to a gradient before its gates see it: momentum, and a second moment.

    S_t = mu S_{t-1} + gain gradient_t              momentum (Polyak 1964; Titans' surprise)
    v_t = (1 - a) v_{t-1} + a gradient_t^2          second moment (Kingma & Ba 2015)
    g~  = S_t (RMS + eps) / (sqrt(v_t) + eps)

S starts at 0 and v at RMS^2, what training knows: mu = 0, gain = 1, a = 0 leave the gradient as it
is. S and v are the rule's state `<tensor>/momentum` and `<tensor>/square`.
Letters: B lanes, N weights of a tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mlm import kernels
from mlm.kernels import buffers
from mlm.kernels.compile import inlined, jit
from mlm.kernels.update import TILE
from mlm.models.language_model import Weights
from mlm.rules.forward import blocks


def root(x: Tensor) -> Tensor:
    """sqrt(x), with derivative 0 at 0."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def with_moments(
    name: str,
    weights: Weights,
    gradient: Tensor,
    momentum: Tensor | None,
    square: Tensor | None,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Weights]:
    """(g~, the state after it) of one tensor as written above; differentiable.

    Args:
        weights: hold the state, (B, ...); gradient: (B, ...).
        momentum, square: mu and a, one number each; None = without.
        scale: RMS + eps, the tensor's shape.
    """
    state: Weights = {}
    moved = gradient
    if momentum is not None:
        moved = state[f"{name}/momentum"] = momentum * weights[f"{name}/momentum"] + gradient
    if square is not None:
        v = (1 - square) * weights[f"{name}/square"] + square * gradient.square()
        state[f"{name}/square"] = v
        moved = moved * scale / (root(v) + eps)
    return moved, state


@dataclass(frozen=True)
class Moments:
    """Fast form of `with_moments` for one tensor, and its transpose; without parts it does nothing.

    One pass in a compiled kernel; without it tensor operations, on a CPU one lane at a time.
    """

    name: str
    momentum: Tensor | None = None
    """mu, one number or (B,); None = without."""
    gain: Tensor | None = None
    """What the gradient counts in S, one number or (B,); None = 1, as without momentum."""
    square: Tensor | None = None
    """a, one number or (B,); None = without."""
    rms: Tensor | None = None
    """The tensor's shape; needed by `square`."""
    eps: float = 0.0

    @cached_property
    def _scale(self) -> Tensor | None:
        return None if self.square is None or self.rms is None else self.rms + self.eps

    def _numbers(self, gradient: Tensor) -> Tensor:
        """mu, gain, a, eps of every lane: (4, B)."""
        wanted = (self.momentum, 0.0), (self.gain, 1.0), (self.square, 0.0), (None, self.eps)
        rows = [gradient.new_tensor(other) if x is None else x for x, other in wanted]
        return torch.stack([row.to(gradient.dtype).expand(len(gradient)) for row in rows])

    def _state(self, weights: Weights, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(S, v), each (B, ...), or (B, 0) where there is none."""
        none = gradient.new_empty(len(gradient), 0)
        first = none if self.momentum is None else weights[f"{self.name}/momentum"]
        return first, none if self.square is None else weights[f"{self.name}/square"]

    @contextlib.contextmanager
    def pushed(self, weights: Weights, gradient: Tensor, out: Weights) -> Iterator[Tensor]:
        """g~ (B, ...), for as long as the block lasts; `out` receives the state after it.

        `weights` and `gradient` are not written, nor may g~ be.
        """
        if self.momentum is None and self.square is None:
            yield gradient
            return
        before, after = self._state(weights, gradient), self._state(out, gradient)
        move = after[0] if self.square is None else buffers.acquire(tuple(gradient.shape), gradient)
        push = _push_compiled if kernels.usable(gradient, *after) else _push_eager
        push(gradient, *before, self._scale, self._numbers(gradient), *after, move)
        yield move
        if self.square is not None:
            buffers.release([move])

    def pull(
        self,
        weights: Weights,
        gradient: Tensor,
        lam: Tensor,
        step: Tensor,
        step_B: Tensor | None,
        cotangent: Weights,
    ) -> tuple[Tensor, Weights, Tensor]:
        """The transpose of theta_t = ... - (step_B step) g~, gradients as constants.

        Args:
            lam: cotangent of theta_t, (B, ...); not written.
            step: factor per weight, the tensor's shape; step_B: per lane (B,), None = 1.
            cotangent: holds those of S_t and v_t, which may be overwritten.

        Returns:
            g~ (B, ...), which belongs to the caller; the cotangents of S_{t-1} and v_{t-1}; the
            derivatives by mu and a, summed over lanes, (2,).
        """
        up_s, up_v = (t.contiguous() for t in self._state(cotangent, gradient))
        move = buffers.acquire(tuple(gradient.shape), gradient)
        a_B = gradient.new_ones(len(gradient)) if step_B is None else step_B.contiguous()
        pull = _pull_compiled if kernels.usable(gradient, lam) else _pull_eager
        s, v = self._state(weights, gradient)
        numbers_4B = self._numbers(gradient)
        sums = pull(gradient, s, v, lam, step, a_B, self._scale, numbers_4B, up_s, up_v, move)
        back = {f"{self.name}/momentum": up_s, f"{self.name}/square": up_v}
        return move, {n: up for n, up in back.items() if n in weights}, sums


def _push_eager(
    gradient: Tensor,
    s: Tensor,
    v: Tensor,
    scale: Tensor | None,
    numbers_4B: Tensor,
    new_s: Tensor,
    new_v: Tensor,
    out: Tensor,
) -> None:
    """Fill `new_s` and `new_v`, each empty if there is none, and with the latter `out`, g~.

    All are (B, ...), `scale` (None without second moment) has the tensor's own shape.
    """
    view = (4, -1, *[1] * (gradient.dim() - 1))
    for lanes in blocks(gradient):
        g = surprise = gradient[lanes]
        mu, gain, a, eps = numbers_4B[:, lanes].view(view)
        if s.numel():
            surprise = torch.mul(s[lanes], mu, out=new_s[lanes]).addcmul_(g, gain)
        if scale is not None:
            v_t = torch.mul(v[lanes], 1 - a, out=new_v[lanes]).addcmul_(g * a, g)
            torch.mul(surprise, scale, out=out[lanes]).div_(v_t.sqrt().add_(eps))


def _pull_eager(
    gradient: Tensor,
    s: Tensor,
    v: Tensor,
    lam: Tensor,
    step: Tensor,
    step_B: Tensor,
    scale: Tensor | None,
    numbers_4B: Tensor,
    up_s: Tensor,
    up_v: Tensor,
    out: Tensor,
) -> Tensor:
    """Fill `out` with g~ and take `up_s`, `up_v` back in place; returns sums by mu and a, (2,)."""
    view = (4, -1, *[1] * (gradient.dim() - 1))
    sums = gradient.new_zeros(2)
    for lanes in blocks(gradient):
        g, move = gradient[lanes], out[lanes].copy_(gradient[lanes])
        mu, gain, a, eps = numbers_4B[:, lanes].view(view)
        if s.numel():
            move.mul_(gain).addcmul_(s[lanes], mu)
        down = lam[lanes] * step * -step_B[lanes].view(view[1:])
        if scale is not None:
            square = g.square()
            v_t = torch.lerp(v[lanes], square, a)
            deviation = v_t.sqrt()
            over = deviation + eps
            move.mul_(scale).div_(over)
            slope = (0.5 / deviation).masked_fill_(deviation == 0, 0)
            up = up_v[lanes].sub_(down * move / over * slope)
            sums[1] += (up * (square - v[lanes])).sum()
            up.mul_(1 - a)
            down.mul_(scale).div_(over)
        if s.numel():
            up = up_s[lanes].add_(down)
            sums[0] += (up * s[lanes]).sum()
            up.mul_(mu)
    return sums


def _rows(lanes: int, *tensors: Tensor) -> list[Tensor]:
    """(B, N) each; (B, 0) of what is empty."""
    return [t.contiguous().view(lanes, -1) if t.numel() else t for t in tensors]


def _push_compiled(
    gradient: Tensor,
    s: Tensor,
    v: Tensor,
    scale: Tensor | None,
    numbers_4B: Tensor,
    new_s: Tensor,
    new_v: Tensor,
    out: Tensor,
) -> None:
    """One pass of `push_moments`; arguments of `_push_eager`."""
    kernels.share_out(
        push_moments,
        kernels.tiles(gradient[0].numel()),
        gradient.numel(),
        *_rows(len(gradient), gradient, s, v),
        gradient.new_empty(0) if scale is None else scale.contiguous().view(-1),
        numbers_4B,
        *(t.view(len(gradient), -1) if t.numel() else t for t in (new_s, new_v, out)),
    )


def _pull_compiled(
    gradient: Tensor,
    s: Tensor,
    v: Tensor,
    lam: Tensor,
    step: Tensor,
    step_B: Tensor,
    scale: Tensor | None,
    numbers_4B: Tensor,
    up_s: Tensor,
    up_v: Tensor,
    out: Tensor,
) -> Tensor:
    """One pass of `pull_moments`; arguments and result of `_pull_eager`."""
    number = kernels.tiles(gradient[0].numel())
    sums = gradient.new_zeros(number, len(gradient), 2)
    kernels.share_out(
        pull_moments,
        number,
        gradient.numel(),
        *_rows(len(gradient), gradient, s, v, lam),
        step.contiguous().view(-1),
        step_B,
        gradient.new_empty(0) if scale is None else scale.contiguous().view(-1),
        numbers_4B,
        *_rows(len(gradient), up_s, up_v, out),
        sums,
    )
    return sums.sum((0, 1))


@inlined
def _surprise_tile(s, gradient, mu, gain, new):
    for n in range(new.shape[0]):
        new[n] = mu * s[n] + gain * gradient[n]


@inlined
def _square_tile(v, gradient, a, new):
    one = new.dtype.type(1)
    for n in range(new.shape[0]):
        new[n] = (one - a) * v[n] + a * gradient[n] * gradient[n]


@inlined
def _divide_tile(surprise, v, scale, eps, out):
    for n in range(out.shape[0]):
        out[n] = surprise[n] * scale[n] / (math.sqrt(v[n]) + eps)


@jit
def push_moments(lo, hi, gradient_BN, s_BN, v_BN, scale, numbers_4B, new_s_BN, new_v_BN, out_BN):
    """Tiles lo..hi of every lane: S_t, v_t and, if there is v, g~ of `with_moments`, in `out_BN`.

    `s_BN` and `v_BN` (B, 0) = without; `scale` (N,); `numbers_4B` holds mu, gain, a and eps.
    """
    size = gradient_BN.shape[1]
    for tile in range(lo, hi):
        part = slice(tile * TILE, min(tile * TILE + TILE, size))
        for lane in range(gradient_BN.shape[0]):
            mu, gain, a, eps = numbers_4B[:, lane]
            gradient = surprise = gradient_BN[lane, part]
            if s_BN.shape[1] > 0:
                surprise = new_s_BN[lane, part]
                _surprise_tile(s_BN[lane, part], gradient, mu, gain, surprise)
            if v_BN.shape[1] > 0:
                v = new_v_BN[lane, part]
                _square_tile(v_BN[lane, part], gradient, a, v)
                _divide_tile(surprise, v, scale[part], eps, out_BN[lane, part])


@inlined
def _pull_square_tile(gradient, v, scale, a, eps, move, down, up):
    """Takes `up` back; `move` S -> g~; `down` d g~ -> d S; returns the derivative by a."""
    zero, half, one = up.dtype.type(0), up.dtype.type(0.5), up.dtype.type(1)
    total = zero
    for n in range(up.shape[0]):
        square = gradient[n] * gradient[n]
        deviation = math.sqrt((one - a) * v[n] + a * square)
        ratio = scale[n] / (deviation + eps)
        slope = zero if deviation == zero else half / deviation
        move[n] *= ratio
        own = up[n] - down[n] * move[n] / (deviation + eps) * slope
        total += own * (square - v[n])
        up[n] = (one - a) * own
        down[n] *= ratio
    return total


@inlined
def _pull_surprise_tile(s, mu, down, up):
    """Takes `up` back from d S; returns the derivative by mu."""
    total = up.dtype.type(0)
    for n in range(up.shape[0]):
        own = up[n] + down[n]
        total += own * s[n]
        up[n] = mu * own
    return total


@inlined
def _down_tile(lam, step, b, down):
    for n in range(down.shape[0]):
        down[n] = -b * step[n] * lam[n]


@jit
def pull_moments(
    lo, hi, gradient_BN, s_BN, v_BN, lam_BN, step, step_B, scale, numbers_4B, up_s_BN, up_v_BN,
    out_BN, sums,
):  # fmt: skip
    """Tiles lo..hi of the transpose of `with_moments`, in place of `up_s_BN` and `up_v_BN`.

    The cotangent of g~ is -(step_B step) lam. `out_BN` receives g~, `sums` (tiles, B, 2) the
    derivatives by mu and a of each tile; the other arguments are those of `push_moments`.
    """
    size = out_BN.shape[1]
    scratch = np.empty(TILE, out_BN.dtype)
    for tile in range(lo, hi):
        part = slice(tile * TILE, min(tile * TILE + TILE, size))
        down = scratch[: part.stop - part.start]
        for lane in range(out_BN.shape[0]):
            mu, gain, a, eps = numbers_4B[:, lane]
            gradient, move = gradient_BN[lane, part], out_BN[lane, part]
            if s_BN.shape[1] > 0:
                _surprise_tile(s_BN[lane, part], gradient, mu, gain, move)
            else:
                move[:] = gradient
            _down_tile(lam_BN[lane, part], step[part], step_B[lane], down)
            if v_BN.shape[1] > 0:
                up = up_v_BN[lane, part]
                v = v_BN[lane, part]
                total = _pull_square_tile(gradient, v, scale[part], a, eps, move, down, up)
                sums[tile, lane, 1] = total
            if s_BN.shape[1] > 0:
                up = up_s_BN[lane, part]
                sums[tile, lane, 0] = _pull_surprise_tile(s_BN[lane, part], mu, down, up)
