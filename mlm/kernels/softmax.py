"""Softmax rows: losses, gradients in place of the logits, and what a segment teaches itself."""

from __future__ import annotations

import math

import numpy as np

from mlm.kernels.compile import fast_exp, jit, narrowed, widened


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
def half_softmax_rows(lo, hi, logits, targets, weights, bias, nll, bias_gradient):
    """Groups lo..hi of `logits` (K, R, V) in bfloat16, which come as their bits.

    As `softmax_rows`, with the gradient always; sums are float32.
    """
    rows, size = logits.shape[1], logits.shape[2]
    row = np.empty(size, np.float32)
    for group in range(lo, hi):
        add = bias_gradient[group]
        for r in range(rows):
            bits = logits[group, r]
            high = np.float32(-np.inf)
            for v in range(size):
                x = widened(bits[v]) + bias[v]
                row[v] = x
                high = x if x > high else high
            target = targets[group, r]
            hit = row[target]
            total = np.float32(0)
            for v in range(size):
                e = fast_exp(row[v] - high)
                row[v] = e
                total += e
            nll[group, r] = high + math.log(total) - hit
            row[target] -= total
            factor = weights[group, r] / total
            for v in range(size):
                x = row[v] * factor
                add[v] += x
                bits[v] = narrowed(x)


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
