"""The slow reference: everything written from its formula, one lane and one time step at a time.

Nothing here shares code with the package but plain containers; float64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlm.lm import LMShape
from mlm.memory import LongTerm
from mlm.streams import Segment

Weights = dict[str, Tensor]


def lstm_step(w: Weights, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of one LSTM layer (Hochreiter & Schmidhuber 1997), vectors."""
    a = w[f"lstm.{layer}.input"] @ x + w[f"lstm.{layer}.recurrent"] @ h + w[f"lstm.{layer}.bias"]
    i, f, g, o = a.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def log_probability(w: Weights, shape: LMShape, y: Tensor) -> Tensor:
    """log p of every word (V,), full or adaptive softmax."""
    first = shape.clusters()[0][1]
    head = w["embedding"] @ y
    if shape.cutoffs:
        head = torch.cat([head, w["softmax.cluster"] @ y])
    log_head = torch.log_softmax(head + w["softmax.bias"], 0)
    parts = [log_head[:first]]
    for k in range(1, len(shape.clusters())):
        tail = w[f"embedding.tail{k}"] @ (w[f"projection.tail{k}"].t() @ y)
        tail = torch.log_softmax(tail + w[f"softmax.tail{k}.bias"], 0)
        parts.append(log_head[first + k - 1] + tail)
    return torch.cat(parts)


def embedding(w: Weights, shape: LMShape, token: int) -> Tensor:
    """Input vector of one token."""
    for k, (lo, hi, _) in enumerate(shape.clusters()):
        if lo <= token < hi:
            if k == 0:
                return w["embedding"][token]
            return w[f"projection.tail{k}"] @ w[f"embedding.tail{k}"][token - lo]
    raise AssertionError


def read_lane(
    w: Weights,
    shape: LMShape,
    inputs: list[int],
    targets: list[int],
    h: list[Tensor],
    c: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Losses (M,) of one lane and its state afterwards."""
    h, c, losses = list(h), list(c), []
    for token, target in zip(inputs, targets, strict=True):
        x = embedding(w, shape, token)
        for layer in range(shape.layers):
            h[layer], c[layer] = lstm_step(w, layer, x, h[layer], c[layer])
            x = h[layer]
        losses.append(-log_probability(w, shape, x)[target])
    return torch.stack(losses), h, c


def unroll(
    memory: LongTerm, update, parameters: Weights, segments: list[Segment]
) -> tuple[Tensor, list[Weights]]:
    """Meta-loss of a hand-unrolled loop in which autograd sees every update of the weights.

    `update(parameters, name, theta, gradient, theta_0, loss, age)` is one tensor of one lane.
    Gradients and hidden states are constants between segments (first order). Returns the mean loss
    over all tokens but the first segment's, and every lane's final weights.
    """
    shape = memory.shape
    lanes = segments[0].inputs.shape[0]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    finals = []
    for lane in range(lanes):
        sizes = [size for _, size in shape.layer_sizes()]
        theta: Weights = {}
        h: list[Tensor] = []
        c: list[Tensor] = []
        age = 0
        for t, segment in enumerate(segments):
            if t == 0 or bool(segment.new[lane]):
                theta = {n: memory.weights[n] for n in memory.dynamic}
                h = [torch.zeros(s, dtype=torch.float64) for s in sizes]
                c, age = [torch.zeros_like(x) for x in h], 0
            count = int(segment.mask[lane].sum())
            ids = segment.inputs[lane].tolist(), segment.targets[lane].tolist()
            losses, h_new, c_new = read_lane({**memory.weights, **theta}, shape, *ids, h, c)
            losses = losses[:count]
            if t:
                total, tokens = total + losses.sum(), tokens + count
            leaves = {n: w.detach().requires_grad_() for n, w in theta.items()}
            again, *_ = read_lane({**memory.weights, **leaves}, shape, *ids, h, c)
            objective = again[:count].sum() / segment.inputs.shape[1]
            gradients = torch.autograd.grad(objective, list(leaves.values()))
            loss = float(losses.detach().mean())
            theta = {
                n: update(parameters, n, theta[n], g, memory.weights[n], loss, age)
                for n, g in zip(leaves, gradients, strict=True)
            }
            h, c = [x.detach() for x in h_new], [x.detach() for x in c_new]
            age += 1
        finals.append(theta)
    return total / tokens, finals
