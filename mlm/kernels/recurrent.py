"""Time loops of the LSTM and the QRNN, forward and backward, one lane at a time."""

from __future__ import annotations

import numpy as np

from mlm.kernels.compile import as_float, fast_exp, inlined, jit, narrowed, widened


@inlined
def _add_product(weights, x, out):
    """out += W x for W (G, H), in bfloat16 its bits: eight rows at a time share every load of x."""
    rows = weights.shape[0]
    for r in range(0, rows - 7, 8):
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = out.dtype.type(0)
        for k in range(x.shape[0]):
            v = x[k]
            s0 += as_float(weights[r, k]) * v
            s1 += as_float(weights[r + 1, k]) * v
            s2 += as_float(weights[r + 2, k]) * v
            s3 += as_float(weights[r + 3, k]) * v
            s4 += as_float(weights[r + 4, k]) * v
            s5 += as_float(weights[r + 5, k]) * v
            s6 += as_float(weights[r + 6, k]) * v
            s7 += as_float(weights[r + 7, k]) * v
        out[r] += s0
        out[r + 1] += s1
        out[r + 2] += s2
        out[r + 3] += s3
        out[r + 4] += s4
        out[r + 5] += s5
        out[r + 6] += s6
        out[r + 7] += s7
    for r in range(rows - rows % 8, rows):
        s0 = out.dtype.type(0)
        for k in range(x.shape[0]):
            s0 += as_float(weights[r, k]) * x[k]
        out[r] += s0


@inlined
def _add_transposed(weights, d, out):
    """out += W^T d for W (G, H), in bfloat16 its bits: eight rows share every load and store."""
    rows = weights.shape[0]
    for r in range(0, rows - 7, 8):
        d0, d1, d2, d3 = d[r], d[r + 1], d[r + 2], d[r + 3]
        d4, d5, d6, d7 = d[r + 4], d[r + 5], d[r + 6], d[r + 7]
        for k in range(out.shape[0]):
            out[k] += (
                d0 * as_float(weights[r, k])
                + d1 * as_float(weights[r + 1, k])
                + d2 * as_float(weights[r + 2, k])
                + d3 * as_float(weights[r + 3, k])
                + d4 * as_float(weights[r + 4, k])
                + d5 * as_float(weights[r + 5, k])
                + d6 * as_float(weights[r + 6, k])
                + d7 * as_float(weights[r + 7, k])
            )
    for r in range(rows - rows % 8, rows):
        for k in range(out.shape[0]):
            out[k] += d[r] * as_float(weights[r, k])


@jit
def matrix_vector(lo, hi, weights_BGH, x_BH, out_BG, times):
    """Lanes lo..hi: W x added `times` times, to measure how fast the time loop could be."""
    for lane in range(lo, hi):
        for _ in range(times):
            _add_product(weights_BGH[lane], x_BH[lane], out_BG[lane])


@inlined
def _quarters(a, hidden):
    return a[:hidden], a[hidden : 2 * hidden], a[2 * hidden : 3 * hidden], a[3 * hidden :]


@jit
def lstm_forward(lo, hi, recurrent, low, directions, gates_BTG, h_BTH, c_BTH, tanh_c_BTH):
    """Lanes lo..hi of the LSTM time loop, in place.

    `gates_BTG` holds the input projection and receives the activated gates; `recurrent` is
    (B, G, H), or (1, G, H) for all lanes, float or bfloat16; `low` (B, G, R) times `directions`
    (R, H), which may be empty, is added to it; `h_BTH` and `c_BTH` (B, T + 1, H) hold the state
    before the first step at index 0 and receive the others; `tanh_c_BTH` (B, T, H).
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
def half_lstm_forward(
    lo, hi, projected_BG, again_BG, bias, gates_BG, c_BH, new_BH, tanh_c_BH, h_BH
):
    """Lanes lo..hi of one step of an LSTM in bfloat16, which comes as its bits.

    The gates' sums are those of `projected_BG` (of the input), `again_BG` (of the last h) and
    `bias` (G) in float32; cells `c_BH` and `new_BH` are float32. `gates_BG` receives the
    activated gates, `tanh_c_BH` and `h_BH` what their names say.
    """
    hidden = c_BH.shape[1]
    one, two = np.float32(1), np.float32(2)
    bi, bf, bg, bo = _quarters(bias, hidden)
    for lane in range(lo, hi):
        xi, xf, xg, xo = _quarters(projected_BG[lane], hidden)
        ri, rf, rg, ro = _quarters(again_BG[lane], hidden)
        ai, af, ag, ao = _quarters(gates_BG[lane], hidden)
        c, new, t, h = c_BH[lane], new_BH[lane], tanh_c_BH[lane], h_BH[lane]
        for k in range(hidden):
            i = one / (one + fast_exp(-(widened(xi[k]) + widened(ri[k]) + bi[k])))
            f = one / (one + fast_exp(-(widened(xf[k]) + widened(rf[k]) + bf[k])))
            g = two / (one + fast_exp(-two * (widened(xg[k]) + widened(rg[k]) + bg[k]))) - one
            o = one / (one + fast_exp(-(widened(xo[k]) + widened(ro[k]) + bo[k])))
            n = f * c[k] + i * g
            s = two / (one + fast_exp(-two * n)) - one
            new[k] = n
            t[k] = narrowed(s)
            h[k] = narrowed(o * s)
            ai[k] = narrowed(i)
            af[k] = narrowed(f)
            ag[k] = narrowed(g)
            ao[k] = narrowed(o)


@jit
def half_lstm_backward(lo, hi, gates_BG, c_BH, tanh_c_BH, dy_BH, dh_BH, dc_BH, dgates_BG):
    """Lanes lo..hi of one step of back-propagation through `half_lstm_forward`.

    `c_BH` are the cells before the step; `dc_BH` (float32) holds the gradient of those after it
    and receives that of those before; `dgates_BG` receives the gradient of the gates' sums.
    """
    hidden = c_BH.shape[1]
    one = np.float32(1)
    for lane in range(lo, hi):
        ai, af, ag, ao = _quarters(gates_BG[lane], hidden)
        di, df, dg, do = _quarters(dgates_BG[lane], hidden)
        c, t, dy, dh, dc = c_BH[lane], tanh_c_BH[lane], dy_BH[lane], dh_BH[lane], dc_BH[lane]
        for k in range(hidden):
            i, f, g, o = widened(ai[k]), widened(af[k]), widened(ag[k]), widened(ao[k])
            tanh_c = widened(t[k])
            up = widened(dh[k]) + widened(dy[k])
            down = dc[k] + up * o * (one - tanh_c * tanh_c)
            di[k] = narrowed(down * g * i * (one - i))
            df[k] = narrowed(down * c[k] * f * (one - f))
            dg[k] = narrowed(down * i * (one - g * g))
            do[k] = narrowed(up * tanh_c * o * (one - o))
            dc[k] = down * f


@inlined
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
