"""Compiled CPU kernels of the engine (numba): time loop, softmax, update, meta-gradient.

Every kernel has an eager twin beside its caller, which runs on other devices, without numba, or
inside `eager()`; the tests hold both against slow references in float64. Lanes (or weights) are
dealt to threads of our own that meet once per call, so no OpenMP barrier stands in a time loop.
Letters: B lanes, T time, H hidden, G = 4H gates (LSTM), V vocabulary, N weights of a tensor,
K columns.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from numba.extending import overload
except ImportError:  # the eager path remains
    numba: Any = None

TILE = 4096
"""Weights of a tensor worked on together, so that what the lanes share stays in the cache."""
_ALONE = 1 << 16
"""Elements below which a second thread costs more than it saves."""
_FLAGS = {"reassoc", "contract", "nsz"}
"""Sums may be reordered and products fused; NaN and infinity keep their meaning."""
_state = {"on": numba is not None}


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Work without the kernels, for tests and comparisons."""
    before, _state["on"] = _state["on"], False
    try:
        yield
    finally:
        _state["on"] = before


def use_kernels(on: bool) -> None:
    """Switch the kernels on (if numba is there) or off for the whole process."""
    _state["on"] = on and numba is not None


def usable(*tensors: Tensor) -> bool:
    """Whether these tensors can go through a kernel: on the CPU, float32 or float64."""
    return _state["on"] and all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) for t in tensors
    )


@functools.lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mlm")


def _array(tensor: Tensor) -> np.ndarray:
    if not tensor.is_contiguous():
        raise ValueError("a kernel was given a tensor that is not contiguous")
    return tensor.detach().numpy()


def share_out(kernel: Callable[..., None], number: int, work: int, *arguments: Any) -> None:
    """kernel(lo, hi, *arguments) over 0..number in as many parts as PyTorch has threads.

    Tensors among the arguments must be contiguous: kernels write into them. `work` is the number
    of multiply-adds behind the call: small calls stay in this thread.
    """
    arguments = tuple(_array(a) if isinstance(a, Tensor) else a for a in arguments)
    threads = min(torch.get_num_threads(), number)
    if threads <= 1 or work < _ALONE:
        kernel(0, number, *arguments)
        return
    edges = [number * k // threads for k in range(threads + 1)]
    pool = _pool(torch.get_num_threads())
    others = [pool.submit(kernel, edges[k], edges[k + 1], *arguments) for k in range(1, threads)]
    kernel(edges[0], edges[1], *arguments)
    for other in others:
        other.result()


def jit(function: Any) -> Any:
    if numba is None:
        return function
    settings = {"nogil": True, "fastmath": _FLAGS, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **settings)(function)
    except RuntimeError:  # no folder to keep the compiled code in: compile in every process
        return numba.njit(**settings)(function)


def fast_exp(x: float) -> float:
    """exp(x): in float32 a polynomial the compiler vectorises (2e-7 relative), else `math.exp`."""
    return math.exp(x)


def _exp32(x):
    # exp x = 2^n exp r, |r| <= ln 2 / 2; NaN fails both comparisons and stays NaN.
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


if numba is not None:

    @overload(fast_exp, jit_options={"fastmath": _FLAGS})  # type: ignore[call-arg]
    def _fast_exp(x):
        return _exp32 if x == numba.types.float32 else lambda x: math.exp(x)


@jit
def _add_product(weights, x, out):
    """out += W x for W (G, H), G a multiple of 4: eight rows at a time share every load of x."""
    rows = weights.shape[0]
    for r in range(0, rows - 7, 8):
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = weights.dtype.type(0)
        for k in range(x.shape[0]):
            v = x[k]
            s0 += weights[r, k] * v
            s1 += weights[r + 1, k] * v
            s2 += weights[r + 2, k] * v
            s3 += weights[r + 3, k] * v
            s4 += weights[r + 4, k] * v
            s5 += weights[r + 5, k] * v
            s6 += weights[r + 6, k] * v
            s7 += weights[r + 7, k] * v
        out[r] += s0
        out[r + 1] += s1
        out[r + 2] += s2
        out[r + 3] += s3
        out[r + 4] += s4
        out[r + 5] += s5
        out[r + 6] += s6
        out[r + 7] += s7
    for r in range(rows - rows % 8, rows):
        s0 = weights.dtype.type(0)
        for k in range(x.shape[0]):
            s0 += weights[r, k] * x[k]
        out[r] += s0


@jit
def _add_transposed(weights, d, out):
    """out += W^T d for W (G, H): eight rows at a time share every load and store of out."""
    rows = weights.shape[0]
    for r in range(0, rows - 7, 8):
        d0, d1, d2, d3 = d[r], d[r + 1], d[r + 2], d[r + 3]
        d4, d5, d6, d7 = d[r + 4], d[r + 5], d[r + 6], d[r + 7]
        for k in range(out.shape[0]):
            out[k] += (
                d0 * weights[r, k]
                + d1 * weights[r + 1, k]
                + d2 * weights[r + 2, k]
                + d3 * weights[r + 3, k]
                + d4 * weights[r + 4, k]
                + d5 * weights[r + 5, k]
                + d6 * weights[r + 6, k]
                + d7 * weights[r + 7, k]
            )
    for r in range(rows - rows % 8, rows):
        for k in range(out.shape[0]):
            out[k] += d[r] * weights[r, k]


@jit
def matrix_vector(lo, hi, weights_BGH, x_BH, out_BG, times):
    """Lanes lo..hi: W x added `times` times, to measure how fast the time loop could be."""
    for lane in range(lo, hi):
        for _ in range(times):
            _add_product(weights_BGH[lane], x_BH[lane], out_BG[lane])


@jit
def _quarters(a, hidden):
    return a[:hidden], a[hidden : 2 * hidden], a[2 * hidden : 3 * hidden], a[3 * hidden :]


@jit
def lstm_forward(lo, hi, recurrent, low, directions, gates_BTG, h_BTH, c_BTH, tanh_c_BTH):
    """Lanes lo..hi of the LSTM time loop, in place.

    `gates_BTG` holds the input projection and receives the activated gates; `recurrent` is
    (B, G, H), or (1, G, H) for all lanes; `low` (B, G, R) times `directions` (R, H), which may be
    empty, is added to it; `h_BTH` and `c_BTH` (B, T + 1, H) hold the state before
    the first step at index 0 and receive the others; `tanh_c_BTH` (B, T, H).
    """
    steps, hidden = tanh_c_BTH.shape[1], tanh_c_BTH.shape[2]
    one, two = gates_BTG.dtype.type(1), gates_BTG.dtype.type(2)
    along = np.zeros(directions.shape[0], gates_BTG.dtype)
    for lane in range(lo, hi):
        weights = recurrent[lane if recurrent.shape[0] > 1 else 0]
        for t in range(steps):
            a, after = gates_BTG[lane, t], h_BTH[lane, t + 1]
            _add_product(weights, h_BTH[lane, t], a)
            if along.shape[0] > 0:
                along[:] = 0
                _add_product(directions, h_BTH[lane, t], along)
                _add_product(low[lane], along, a)
            old, new, squashed = c_BTH[lane, t], c_BTH[lane, t + 1], tanh_c_BTH[lane, t]
            for k in range(2 * hidden):
                a[k] = one / (one + fast_exp(-a[k]))
            i, f, g, o = _quarters(a, hidden)
            for k in range(hidden):
                g[k] = two / (one + fast_exp(-two * g[k])) - one
                o[k] = one / (one + fast_exp(-o[k]))
                new[k] = f[k] * old[k] + i[k] * g[k]
                squashed[k] = two / (one + fast_exp(-two * new[k])) - one
                after[k] = o[k] * squashed[k]


@jit
def lstm_backward(
    lo, hi, recurrent, low, directions, gates_BTG, c_BTH, tanh_c_BTH, dy_BTH, dh_BH, dc_BH, dgates
):
    """Lanes lo..hi of back-propagation through the time loop.

    `dh_BH` and `dc_BH` hold the gradients of the last state and receive those of the first;
    `dgates` (B, T, G) receives the gradient before the gates' activations.
    """
    steps, hidden = tanh_c_BTH.shape[1], tanh_c_BTH.shape[2]
    one = gates_BTG.dtype.type(1)
    along = np.zeros(directions.shape[0], gates_BTG.dtype)
    for lane in range(lo, hi):
        weights = recurrent[lane if recurrent.shape[0] > 1 else 0]
        dh, dc = dh_BH[lane], dc_BH[lane]
        for t in range(steps - 1, -1, -1):
            a, d, dy = gates_BTG[lane, t], dgates[lane, t], dy_BTH[lane, t]
            old, squashed = c_BTH[lane, t], tanh_c_BTH[lane, t]
            i, f, g, o = _quarters(a, hidden)
            di, df, dg, do = _quarters(d, hidden)
            for k in range(hidden):
                tanh_c, up = squashed[k], dh[k] + dy[k]
                down = dc[k] + up * o[k] * (one - tanh_c * tanh_c)
                di[k] = down * g[k] * i[k] * (one - i[k])
                df[k] = down * old[k] * f[k] * (one - f[k])
                dg[k] = down * i[k] * (one - g[k] * g[k])
                do[k] = up * tanh_c * o[k] * (one - o[k])
                dc[k] = down * f[k]
                dh[k] = 0
            _add_transposed(weights, d, dh)
            if along.shape[0] > 0:
                along[:] = 0
                _add_transposed(low[lane], d, along)
                _add_transposed(directions, along, dh)


@jit
def _thirds(a, hidden):
    return a[:hidden], a[hidden : 2 * hidden], a[2 * hidden :]


@jit
def qrnn_forward(lo, hi, gates_BTG, c_BTH, y_BTH):
    """Lanes lo..hi of the QRNN time loop, in place.

    `gates_BTG` (G = 3H) holds the convolution's output and receives the activated gates z, f, o;
    `c_BTH` (B, T + 1, H) holds the cells before the first step at index 0 and receives the others;
    `y_BTH` (B, T, H) receives the outputs.
    """
    steps, hidden = y_BTH.shape[1], y_BTH.shape[2]
    one, two = gates_BTG.dtype.type(1), gates_BTG.dtype.type(2)
    for lane in range(lo, hi):
        for t in range(steps):
            z, f, o = _thirds(gates_BTG[lane, t], hidden)
            old, new, y = c_BTH[lane, t], c_BTH[lane, t + 1], y_BTH[lane, t]
            for k in range(hidden):
                z[k] = two / (one + fast_exp(-two * z[k])) - one
                f[k] = one / (one + fast_exp(-f[k]))
                o[k] = one / (one + fast_exp(-o[k]))
                new[k] = f[k] * old[k] + (one - f[k]) * z[k]
                y[k] = o[k] * new[k]


@jit
def qrnn_backward(lo, hi, gates_BTG, c_BTH, dy_BTH, dc_BH, dgates_BTG):
    """Lanes lo..hi of back-propagation through the QRNN time loop.

    `dc_BH` holds the gradient of the last cells and receives that of the first; `dgates_BTG`
    receives the gradient before the gates' activations.
    """
    steps, hidden = dy_BTH.shape[1], dy_BTH.shape[2]
    one = gates_BTG.dtype.type(1)
    for lane in range(lo, hi):
        dc = dc_BH[lane]
        for t in range(steps - 1, -1, -1):
            z, f, o = _thirds(gates_BTG[lane, t], hidden)
            dz, df, do = _thirds(dgates_BTG[lane, t], hidden)
            old, new, dy = c_BTH[lane, t], c_BTH[lane, t + 1], dy_BTH[lane, t]
            for k in range(hidden):
                down = dc[k] + dy[k] * o[k]
                do[k] = dy[k] * new[k] * o[k] * (one - o[k])
                dz[k] = down * (one - f[k]) * (one - z[k] * z[k])
                df[k] = down * (old[k] - z[k]) * f[k] * (one - f[k])
                dc[k] = down * f[k]


@jit
def softmax_rows(lo, hi, logits, targets, weights, bias, nll, bias_gradient, slope, want_gradient):
    """Groups lo..hi of `logits` (K, R, V): losses, and the gradient in place of the logits.

    nll = logsumexp(row + bias) - (row + bias)[target]; then row = weight (softmax - one-hot), with
    weight times slope[0] + slope[1] nll unless `slope` is empty.
    `targets`, `weights`, `nll` are (K, R); `bias` (1 or K, V); `bias_gradient` (K, V) receives
    the sum of a group's rows unless it is empty.
    """
    rows, size = logits.shape[1], logits.shape[2]
    for group in range(lo, hi):
        offset = bias[group if bias.shape[0] > 1 else 0]
        for r in range(rows):
            row = logits[group, r]
            row[0] += offset[0]
            high = row[0]
            for v in range(1, size):
                x = row[v] + offset[v]
                row[v] = x
                high = x if x > high else high
            target = targets[group, r]
            hit = row[target]
            total = logits.dtype.type(0)
            for v in range(size):
                e = fast_exp(row[v] - high)
                row[v] = e
                total += e
            nll[group, r] = high + math.log(total) - hit
            if want_gradient:
                weight = weights[group, r]
                if slope.shape[0] > 0:
                    weight *= slope[0] + slope[1] * nll[group, r]
                factor = weight / total
                for v in range(size):
                    row[v] *= factor
                row[target] -= weight
                if bias_gradient.shape[0] > 0:
                    add = bias_gradient[group]
                    for v in range(size):
                        add[v] += row[v]


@jit
def teach_rows(lo, hi, logits, lost, targets, bias, nll, most):
    """Groups lo..hi of `logits` (K, R, V) lose `lost`, within [log p, most].

    p = softmax(row + bias), of which `nll` (K, R) are the losses; `bias` is (1 or K, V).
    """
    rows, size = logits.shape[1], logits.shape[2]
    limit = logits.dtype.type(most)
    for group in range(lo, hi):
        offset = bias[group if bias.shape[0] > 1 else 0]
        for r in range(rows):
            row, less = logits[group, r], lost[group, r]
            target = targets[group, r]
            level = nll[group, r] + row[target] + offset[target]
            for v in range(size):
                x = less[v] if less[v] < limit else limit
                low, top = row[v] - x, level - offset[v]
                row[v] = low if low < top else top


# Loops run from 0 over slices: numba then knows that no index is negative and vectorises them.


@jit
def _step_tile(theta, gradient, step, a, out):
    for n in range(out.shape[0]):
        out[n] = theta[n] - a * step[n] * gradient[n]


@jit
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


@jit
def _minus_tile(x, y, out):
    for n in range(out.shape[0]):
        out[n] = x[n] - y[n]


@jit
def _plus_tile(x, out):
    for n in range(out.shape[0]):
        out[n] += x[n]


@jit
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


@jit
def _pull_step_tile(lam, gradient, step, step_x, own):
    s0 = s1 = lam.dtype.type(0)
    for n in range(lam.shape[0]):
        move = lam[n] * gradient[n]
        s0 += move * step[n]
        s1 += move * step_x[n]
        lam[n] += own * gradient[n]
    return s0, s1


@jit
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


@jit
def _carry_tile(copy, gradient, fisher, keep, move, x):
    """copy <- keep copy + x move; returns <copy, gradient> before, plain and times `fisher`."""
    plain = weighted = copy.dtype.type(0)
    for n in range(copy.shape[0]):
        product = copy[n] * gradient[n]
        plain += product
        weighted += product * fisher[n]
        copy[n] = keep[n] * copy[n] + x * move[n]
    return plain, weighted


@jit
def _move_tile(gradient, step, a, move):
    for n in range(move.shape[0]):
        move[n] = a * step[n] * gradient[n]


@jit
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


@jit
def _squared_distance(x, y):
    total = x.dtype.type(0)
    for k in range(x.shape[0]):
        d = x[k] - y[k]
        total += d * d
    return total


@jit
def recall_phrases(
    lo, hi, inputs, keys, values, rates, size, first, since, new_BT, new_keys_BTE, steps, apart,
    rows_BTE, new_rates_BTK, within_BTT,
):  # fmt: skip
    """Lanes lo..hi of `mlm.phrases.Phrases.recall`; `rows_BTE` are added to, and hold 0, as
    `within_BTT` do. `apart` (1,): kappa is the exponential of so much times a squared distance."""
    length, orders = new_BT.shape[1], steps.shape[0]
    one = steps.dtype.type(1)
    for lane in range(lo, hi):
        begin = max(first, since[lane])
        old = size - begin
        line = np.empty(old + length, np.int64)
        line[:old] = inputs[lane, begin:size]
        line[old:] = new_BT[lane]
        for t in range(length):
            here = old + t
            visits = np.zeros(orders, np.int64)
            row = rows_BTE[lane, t]
            for s in range(here):
                if line[s] != line[here]:
                    continue
                if s < old:
                    key, rate = keys[lane, begin + s], rates[lane, begin + s]
                else:
                    key, rate = new_keys_BTE[lane, s - old], new_rates_BTK[lane, s - old]
                alike = fast_exp(apart[0] * _squared_distance(key, new_keys_BTE[lane, t]))
                scale = steps[0] * rate[0] * alike
                visits[0] += 1
                k = 1
                while k < orders and s >= k and line[s - k] == line[here - k]:
                    visits[k] += 1
                    scale += steps[k] * rate[k]
                    k += 1
                if s < old:
                    value = values[lane, begin + s]
                    for e in range(row.shape[0]):
                        row[e] += scale * value[e]
                else:
                    within_BTT[lane, t, s - old] = scale
            for k in range(orders):
                new_rates_BTK[lane, t, k] = one / (one + visits[k])
