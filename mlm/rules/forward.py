"""Forward mode: what a lane's weights owe to the rule's parameters, carried along while reading.

    S_t = d theta_t / d theta_{t-1} S_{t-1} + d theta_t / d phi        S = d theta / d phi
    d phi = sum over t of <S_t, gradient_{t+1}>

with gradients and signals as constants (first order). The memory needed does not depend on the
number of updates. Letters: K copies of the lanes' weights in a tangent, C lane inputs of a gate
(a constant, then the features that are one number per lane), B lanes, P numbers in the parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mlm.models.language_model import Weights

Tangent = dict[str, Tensor]
"""S: one contiguous (K, B, ...) per dynamic tensor; what the K copies are, the rule says."""


def zero_tangent(start: Weights, copies: int, lanes: int) -> Tangent:
    """The tangent of weights that owe nothing to the parameters: (K, B, ...) zeros."""
    return {n: w.new_zeros(copies, lanes, *w.shape) for n, w in start.items()}


def forget_lanes(tangent: Tangent, new_B: Tensor) -> None:
    """Zero the lanes that open an article, in place: theta_0 owes nothing to the parameters."""
    if bool(new_B.any()):
        for copies in tangent.values():
            copies[:, new_B] = 0


def blocks(tensor_B: Tensor) -> list[slice]:
    """Lanes to compute at once: one on a CPU, where it stays in the cache, and all on a GPU."""
    lanes = len(tensor_B)
    return [slice(k, k + 1) for k in range(lanes)] if tensor_B.is_cpu else [slice(0, lanes)]


def dots(tangent: Tensor, gradient: Tensor, gates: int, fishers: list[Tensor]) -> Tensor:
    """Inner products of one tensor's S_{t-1} with gradient_t, summed over lanes and weights.

    `fisher` never changes, so S by its number is `fisher` times S by the constant's.

    Args:
        tangent: (gates C, B, ...): the C copies of UPDATE, then those of FLUSH if there is one.
        gradient: (B, ...).
        fishers: feature `fisher` of each gate, the tensor's shape; empty = no such feature.

    Returns:
        (gates, C), with a last column <fisher S_constant, gradient> if there are `fishers`.
    """
    plain = (tangent.flatten(1) @ gradient.flatten()).view(gates, -1)
    if not fishers:
        return plain
    weighted = plain.new_zeros(gates, 1)
    constants = tangent.unflatten(0, plain.shape)[:, 0]
    for lanes in blocks(gradient):
        for k, fisher in enumerate(fishers):
            own = (gradient[lanes] * fisher).flatten()
            weighted[k] += constants[k, lanes].flatten() @ own
    return torch.cat([plain, weighted], 1)


def push_tensor(
    tangent: Tensor,
    theta: Tensor,
    gradient: Tensor,
    start: Tensor,
    step: Tensor,
    unit: Tensor | None,
    step_B: Tensor | None,
    unit_B: Tensor | None,
    scale: float,
    inputs_CB: Tensor,
) -> None:
    """Replace one tensor's S_{t-1} by S_t, in place.

        S[c]     <- (1 - z) S[c]     - x_c step_B step gradient              UPDATE, c < C
        S[C + c] <- (1 - z) S[C + c] + x_c unit_B unit (start - theta)       FLUSH

    z = clip(scale unit_B unit, 0, 1); outside [0, 1] FLUSH has no derivative. The copies of FLUSH
    are those of its *unit* move: they are the derivative by `scale` itself, and `scale` times
    them those by the gate's row, also where scale = 0.

    Args:
        tangent: (K, B, ...), K = C without FLUSH, else 2 C.
        theta, gradient: theta_{t-1} and the segment's gradient, (B, ...).
        start, step, unit: theta_0 and the gates' factors per weight, the tensor's shape; unit =
            None: no FLUSH.
        step_B, unit_B: the gates' factors per lane (B,), None = 1.
        inputs_CB: lane inputs x of the gates (C, B), the first row is one.
    """
    columns, view = len(inputs_CB), [-1, *[1] * (theta.dim() - 1)]
    for lanes in blocks(theta):
        copies, x = tangent[:, lanes], inputs_CB[:, lanes].unflatten(1, view)
        if unit is not None:
            own = unit if unit_B is None else unit * unit_B[lanes].view(view)
            z = own * scale
            copies.mul_(1 - z.clamp(0, 1))
            move = (start - theta[lanes]) * own
            move.masked_fill_((z < 0) | (z > 1), 0)
            copies[columns:].addcmul_(x, move.unsqueeze(0))
        move = gradient[lanes] * step
        x = x if step_B is None else x * step_B[lanes].view(view)
        copies[:columns].addcmul_(x, move.unsqueeze(0), value=-1)


def dots_of_all(tangent: Tangent, gradients: Weights) -> Tensor:
    """<S, gradient> of every copy, summed over tensors, lanes and weights: (K,)."""
    return torch.stack([tangent[n].flatten(1) @ g.flatten() for n, g in gradients.items()]).sum(0)


def push_formula(
    formula: Callable[[Weights, Weights], Weights],
    parameters: Weights,
    weights: Weights,
    tangent: Tangent,
) -> None:
    """Replace S_{t-1} by S_t in place: one Jacobian-vector product per number in the parameters.

    `formula(parameters, weights)` is theta_t; copy k of the tangent (P, B, ...) belongs to the
    k-th number of the parameters, tensors in their order, each flattened. J^T u is linear in u, so
    the derivative of <J^T u, v> by u is J v: the formula itself is evaluated only once.
    """
    with torch.enable_grad():
        phi = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        theta = {n: w.detach().requires_grad_() for n, w in weights.items()}
        new = formula(phi, theta)
        u = {n: torch.zeros_like(w).requires_grad_() for n, w in weights.items()}
        inputs = [*phi.values(), *theta.values()]
        outputs = [new[n] for n in u]
        back = torch.autograd.grad(
            outputs, inputs, list(u.values()), create_graph=True, allow_unused=True
        )
    depends = [(j, b) for j, b in enumerate(back) if b is not None and b.requires_grad]
    unit = [torch.zeros_like(p) for p in phi.values()]
    k = 0
    for one in unit:
        for at in range(one.numel()):
            one.view(-1)[at] = 1
            v = [*unit, *(tangent[n][k] for n in theta)]
            moved = torch.autograd.grad(
                [b for _, b in depends],
                list(u.values()),
                [v[j] for j, _ in depends],
                retain_graph=True,
                materialize_grads=True,
            )
            for n, value in zip(u, moved, strict=True):
                tangent[n][k] = value
            one.view(-1)[at] = 0
            k += 1
