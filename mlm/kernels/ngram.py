"""The lookup of the n-gram memory: what equal n-grams before a token have taught."""

from __future__ import annotations

import numpy as np

from mlm.kernels.compile import fast_exp, inlined, jit


@inlined
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
    """Lanes lo..hi of the look-up of n-gram memory.

    `rows_BTE` are added to, and hold 0, as `within_BTT` do. `apart` (1,): kappa is the exponential
    of so much times a squared distance.
    """
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
