"""The update of a lane's weights, its transpose and its tangent, tile by tile."""

from __future__ import annotations

import numpy as np

from mlm.kernels.compile import inlined, jit

TILE = 4096
"""Weights of a tensor worked on together, so that what the lanes share stays in the cache."""


@inlined
def _step_tile(theta, gradient, step, a, out):
    for n in range(out.shape[0]):
        out[n] = theta[n] - a * step[n] * gradient[n]


@inlined
def _relax_tile(theta, gradient, start, step, z, a, b, out):
    zero, one = out.dtype.type(0), out.dtype.type(1)
    for n in range(out.shape[0]):
        flush = b * z[n]
        flush = zero if flush < zero else one if flush > one else flush
        out[n] = theta[n] - a * step[n] * gradient[n] + flush * (start[n] - theta[n])


@jit
def relax(lo, hi, theta_BN, gradient_BN, start, step, z, step_B, z_B, out_BN):
    """Tiles lo..hi of every lane: theta - (step_B step) gradient + clip(z_B z) (start - theta).

    `start`, `step`, `z` are (N,), z empty = no flush; clip is to [0, 1]. `out_BN` may be
    `theta_BN`.
    """
    for tile in range(lo, hi):
        own = slice(tile * TILE, min(tile * TILE + TILE, out_BN.shape[1]))
        for lane in range(theta_BN.shape[0]):
            theta, gradient, out = theta_BN[lane, own], gradient_BN[lane, own], out_BN[lane, own]
            if z.shape[0] == 0:
                _step_tile(theta, gradient, step[own], step_B[lane], out)
            else:
                a, b = step_B[lane], z_B[lane]
                _relax_tile(theta, gradient, start[own], step[own], z[own], a, b, out)


@inlined
def _minus_tile(x, y, out):
    for n in range(out.shape[0]):
        out[n] = x[n] - y[n]


@inlined
def _plus_tile(x, out):
    for n in range(out.shape[0]):
        out[n] += x[n]


@inlined
def _decay_tile(theta, gradient, step, z, a, b, out):
    """`_relax_tile` towards zero."""
    zero, one = out.dtype.type(0), out.dtype.type(1)
    for n in range(out.shape[0]):
        flush = b * z[n]
        flush = zero if flush < zero else one if flush > one else flush
        out[n] = theta[n] - a * step[n] * gradient[n] - flush * theta[n]


@jit
def relax_both(
    lo, hi, theta_BN, slow_BN, gradient_BN, start, gates_4N, factors_4B, out_BN, new_slow_BN
):
    """Tiles lo..hi of every lane: `relax` of theta - slow towards `start` and of slow towards 0.

    `gates_4N` holds step and z of the one and of the other, `factors_4B` what multiplies them in a
    lane; `out_BN` receives the sum of both. Loops over few arrays that do not overlap: else LLVM
    gives up vectorising.
    """
    room = np.empty(TILE, out_BN.dtype)
    for tile in range(lo, hi):
        own = slice(tile * TILE, min(tile * TILE + TILE, out_BN.shape[1]))
        near = room[: own.stop - own.start]
        step, z, slow_step, slow_z = (
            gates_4N[0, own],
            gates_4N[1, own],
            gates_4N[2, own],
            gates_4N[3, own],
        )
        for lane in range(theta_BN.shape[0]):
            a, b = factors_4B[0, lane], factors_4B[1, lane]
            slow_a, slow_b = factors_4B[2, lane], factors_4B[3, lane]
            slow, gradient = slow_BN[lane, own], gradient_BN[lane, own]
            out, new_slow = out_BN[lane, own], new_slow_BN[lane, own]
            _minus_tile(theta_BN[lane, own], slow, near)
            _relax_tile(near, gradient, start[own], step, z, a, b, out)
            _decay_tile(slow, gradient, slow_step, slow_z, slow_a, slow_b, new_slow)
            _plus_tile(new_slow, out)


@inlined
def _pull_step_tile(lam, gradient, step, step_x, own):
    s0 = s1 = lam.dtype.type(0)
    for n in range(lam.shape[0]):
        move = lam[n] * gradient[n]
        s0 += move * step[n]
        s1 += move * step_x[n]
        lam[n] += own * gradient[n]
    return s0, s1


@inlined
def _pull_flush_tile(lam, theta, start, unit, unit_x, b):
    zero, one = lam.dtype.type(0), lam.dtype.type(1)
    s0 = s1 = zero
    for n in range(lam.shape[0]):
        flush = b * unit[n]
        inside = zero if flush < zero else zero if flush > one else one
        flush = zero if flush < zero else one if flush > one else flush
        move = lam[n] * (start[n] - theta[n]) * inside
        s0 += move * unit[n]
        s1 += move * unit_x[n]
        lam[n] -= flush * lam[n]
    return s0, s1


@jit
def pull_back(
    lo, hi, theta_BN, gradient_BN, lam_BN, start, step_2N, unit_2N, unit_B, scale_own, sums
):
    """Tiles lo..hi of the transpose of `relax` (z = scale unit), in place of `lam_BN`.

        lam <- lam (1 - clip(scale unit_B unit)) + own gradient

    `step_2N` and `unit_2N` hold the gates' factors per weight and the same times `fisher`
    (`unit_2N` (2, 0) = no FLUSH). `sums` (tiles, B, 4) receives, of each tile, the sums of
    lam gradient step and lam (start - theta) unit, plain and times `fisher`; FLUSH's only where
    it is not clipped. `scale_own` holds scale and own.
    """
    scale, own = scale_own
    size, flushes = lam_BN.shape[1], unit_2N.shape[1] > 0
    later = lam_BN.dtype.type(0) if flushes else own
    for tile in range(lo, hi):
        part = slice(tile * TILE, min(tile * TILE + TILE, size))
        for lane in range(lam_BN.shape[0]):
            gradient, lam = gradient_BN[lane, part], lam_BN[lane, part]
            plain, weighted = _pull_step_tile(
                lam, gradient, step_2N[0, part], step_2N[1, part], later
            )
            sums[tile, lane, 0], sums[tile, lane, 1] = plain, weighted
            if flushes:
                plain, weighted = _pull_flush_tile(
                    lam,
                    theta_BN[lane, part],
                    start[part],
                    unit_2N[0, part],
                    unit_2N[1, part],
                    scale * unit_B[lane],
                )
                sums[tile, lane, 2], sums[tile, lane, 3] = plain, weighted
                for n in range(lam.shape[0]):
                    lam[n] += own * gradient[n]


@inlined
def _carry_tile(copy, gradient, fisher, keep, move, x):
    """copy <- keep copy + x move; returns <copy, gradient> before, plain and times `fisher`."""
    plain = weighted = copy.dtype.type(0)
    for n in range(copy.shape[0]):
        product = copy[n] * gradient[n]
        plain += product
        weighted += product * fisher[n]
        copy[n] = keep[n] * copy[n] + x * move[n]
    return plain, weighted


@inlined
def _move_tile(gradient, step, a, move):
    for n in range(move.shape[0]):
        move[n] = a * step[n] * gradient[n]


@inlined
def _flush_tile(theta, start, unit, b, scale, keep, flush):
    zero, one = keep.dtype.type(0), keep.dtype.type(1)
    for n in range(keep.shape[0]):
        own = b * unit[n]
        z = scale * own
        inside = zero if z < zero else zero if z > one else one
        z = zero if z < zero else one if z > one else z
        keep[n] = one - z
        flush[n] = (start[n] - theta[n]) * own * inside


@jit
def push_forward(
    lo, hi, tangent_KBN, theta_BN, gradient_BN, start, step, unit, fishers, step_B, unit_B, scale,
    inputs_CB, sums,
):  # fmt: skip
    """Tiles lo..hi of `forward.dots` and `forward.push_tensor` in one pass; arguments as there.

    `unit` (0,) = no FLUSH; `fishers` (gates, N); `scale` (1,). `sums` (tiles, B, gates, C + 1)
    receives each tile's inner products, the one weighted by `fisher` last.
    """
    size, columns = theta_BN.shape[1], inputs_CB.shape[0]
    scratch = np.ones((3, TILE), theta_BN.dtype)
    for tile in range(lo, hi):
        part = slice(tile * TILE, min(tile * TILE + TILE, size))
        keep = scratch[0, : part.stop - part.start]
        move, flush = scratch[1, : len(keep)], scratch[2, : len(keep)]
        for lane in range(theta_BN.shape[0]):
            theta, gradient = theta_BN[lane, part], gradient_BN[lane, part]
            _move_tile(gradient, step[part], -step_B[lane], move)
            if unit.shape[0] > 0:
                _flush_tile(theta, start[part], unit[part], unit_B[lane], scale[0], keep, flush)
            for k in range(tangent_KBN.shape[0]):
                gate, c = k // columns, k % columns
                plain, weighted = _carry_tile(
                    tangent_KBN[k, lane, part],
                    gradient,
                    fishers[gate, part],
                    keep,
                    flush if gate else move,
                    inputs_CB[c, lane],
                )
                sums[tile, lane, gate, c] = plain
                if c == 0:
                    sums[tile, lane, gate, columns] = weighted


def tiles(size: int) -> int:
    """Number of tiles of a tensor."""
    return -(-size // TILE)
