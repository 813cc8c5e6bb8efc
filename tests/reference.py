"""The slow reference: everything written from its formula, one lane and one time step at a time.

Nothing here shares code with the package but plain containers; float64 throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.recurrent import RecurrentLM
from mlm.text.streams import Segment

Weights = dict[str, Tensor]


def changed(w: Weights, name: str, matrix: Tensor) -> Tensor:
    """W + D P where the matrix has a low-rank change, which may hold all of it."""
    if f"{name}.low" not in w:
        return matrix
    if f"{name}.basis" in w:
        return w[f"{name}.low"] @ w[f"{name}.basis"]
    return matrix + w[f"{name}.low"] @ w[f"{name}.directions"]


def lstm_step(w: Weights, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of one LSTM layer (Hochreiter & Schmidhuber 1997), vectors."""
    names = f"lstm.{layer}.input", f"lstm.{layer}.recurrent"
    w_input, w_recurrent = (changed(w, name, w[name]) for name in names)
    a = w_input @ x + w_recurrent @ h + w[f"lstm.{layer}.bias"]
    i, f, g, o = a.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def log_probability(w: Weights, shape: RecurrentLM, y: Tensor) -> Tensor:
    """log p of every word (V,), full or adaptive softmax."""
    first = shape.clusters()[0][1]
    head = w["embedding"]
    if shape.cutoffs:
        head = torch.cat([head, w["softmax.cluster"]])
    log_head = torch.log_softmax(changed(w, "softmax", head) @ y + w["softmax.bias"], 0)
    parts = [log_head[:first]]
    for k in range(1, len(shape.clusters())):
        tail = w[f"embedding.tail{k}"] @ (w[f"projection.tail{k}"].t() @ y)
        tail = torch.log_softmax(tail + w[f"softmax.tail{k}.bias"], 0)
        parts.append(log_head[first + k - 1] + tail)
    return torch.cat(parts)


def embedding(w: Weights, shape: RecurrentLM, token: int) -> Tensor:
    """Input vector of one token."""
    for k, (lo, hi, _) in enumerate(shape.clusters()):
        if lo <= token < hi:
            if k == 0:
                return w["embedding"][token]
            return w[f"projection.tail{k}"] @ w[f"embedding.tail{k}"][token - lo]
    raise AssertionError


def read_lane(
    w: Weights,
    shape: RecurrentLM,
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


def pair(x: Tensor) -> list[Tensor]:
    """Andrychowicz et al. 2016, appendix A, p = 10."""
    tiny = math.exp(-10.0)
    big = x.abs() > tiny
    log = torch.where(big, torch.where(big, x, torch.ones_like(x)).abs().log() / 10, -1.0)
    return [log, torch.where(big, x.sign(), x / tiny)]


def gates(base: AdaptationBase, rule):
    """Eq. 6 for one tensor of one lane, written out from the definition of `LinearGates`."""
    mean = float(torch.cat([r.flatten() for r in base.rms.values()]).mean())

    def update(phi, name, theta, gradient, theta_0, loss, age) -> Tensor:
        k = base.dynamic.index(name) if rule.per_tensor else 0
        rms = base.rms[name]

        def dot(row, fisher):
            x = [torch.ones_like(theta)]
            for feature in rule.features:
                x += {
                    "fisher": lambda: [fisher],
                    "loss": lambda: [torch.full_like(theta, math.tanh(loss - base.loss))],
                    "age": lambda: [torch.full_like(theta, 1 / math.sqrt(1 + age))],
                    "gradient": lambda: pair(gradient / (rms + 2e-5)),
                    "distance": lambda: pair(theta - theta_0),
                }[feature]()
            return torch.stack([w * v for w, v in zip(row, x, strict=True)]).sum(0)

        with_eps = ((rms + 2e-5) / mean).log()
        i = -torch.exp(dot(phi["update"][k], with_eps))
        z = torch.zeros_like(theta)
        if rule.flush:
            gate = torch.exp(dot(phi["flush"][k], (rms / mean).log()))
            z = (phi["flush_scale"][k] * 1e-3 * gate).clamp(0, 1)
        f = 1 - z
        if rule.free_copy:
            f = f + 1e-3 * dot(phi["copy"][k], with_eps)
        return f * theta + i * gradient + z * theta_0

    return update


def hand_made(base: AdaptationBase, name: str):
    """SGD, or Krause et al. 2018, eqs. 5 to 8, for one tensor of one lane."""
    mean = float(torch.cat([r.flatten() for r in base.rms.values()]).mean())

    def update(phi, tensor, theta, gradient, theta_0, loss, age) -> Tensor:
        if name == "sgd":
            return theta - phi["rate"] * gradient
        rms = base.rms[tensor]
        pull = (phi["decay"] * rms / mean).clamp(max=1)
        return theta - phi["rate"] * gradient / (rms + 2e-5) + pull * (theta_0 - theta)

    return update


def moments(base: AdaptationBase, name: str):
    """Titans' rule with constant gates, or Adam from training's moments, for a tensor of a lane."""
    mean = float(torch.cat([r.flatten() for r in base.rms.values()]).mean())

    def titans(phi, tensor, theta, gradient, theta_0, loss, age, own):
        s = phi["momentum"] * own["momentum"] - phi["rate"] * gradient
        alpha = phi["decay"].clamp(max=1)
        return (1 - alpha) * theta + alpha * theta_0 + s, {"momentum": s}

    def adam(phi, tensor, theta, gradient, theta_0, loss, age, own):
        b1, b2 = phi["momentum"], 1 - phi["square"]
        m = b1 * own["momentum"] + (1 - b1) * gradient
        v = b2 * own["square"] + (1 - b2) * gradient**2
        z = (phi["decay"] * base.rms[tensor] / mean).clamp(max=1)
        step = phi["rate"] * m / (v**0.5 + 2e-5)
        return theta - step - z * (theta - theta_0), {"momentum": m, "square": v}

    return titans if name == "momentum" else adam


def moments_state(base: AdaptationBase):
    """What `moments` and `family` remember of a tensor at the start of an article."""

    def state(name: str) -> Weights:
        rms = base.rms[name]
        return {"momentum": torch.zeros_like(rms), "square": rms**2}

    return state


def dot(row: Tensor, values: list[Tensor]) -> Tensor:
    """A row of numbers times as many features or units of every weight."""
    return torch.stack([w * v for w, v in zip(row, values, strict=True)]).sum(0)


def family(base: AdaptationBase, rule):
    """Eq. 6 with all parts of `LinearGates`, one tensor of one lane, hidden units one by one.

    `own` is what the rule remembers of the tensor: `momentum`, `square`, and lists `h` and `c`; of
    a rule with two memories, `slow` (then without the others).
    """
    mean = float(torch.cat([r.flatten() for r in base.rms.values()]).mean())

    def network(phi, kind, x, own):
        rows, size = phi[f"{kind}.input"], getattr(rule, kind)
        if kind == "mlp":
            hidden = [torch.tanh(dot(row, x)) for row in rows]
        else:
            back = phi["lstm.recurrent"]
            a = [dot(rows[u], x) + dot(back[u], own["h"]) for u in range(4 * size)]
            own["c"] = [
                torch.sigmoid(a[size + u]) * own["c"][u]
                + torch.sigmoid(a[u]) * torch.tanh(a[2 * size + u])
                for u in range(size)
            ]
            hidden = own["h"] = [
                torch.sigmoid(a[3 * size + u]) * torch.tanh(own["c"][u]) for u in range(size)
            ]
        return [dot(row, hidden) for row in phi[f"{kind}.output"]]

    def update(phi, name, theta, gradient, theta_0, loss, age, own):
        own = dict(own)
        k = base.dynamic.index(name) if rule.per_tensor else 0
        rms, one = base.rms[name], torch.ones_like(theta)
        values = {
            "loss": [one * math.tanh(loss - base.loss)],
            "age": [one / math.sqrt(1 + age)],
            "gradient": pair(gradient / (rms + 2e-5)),
            "distance": pair(theta - theta_0),
        }

        def inputs(fisher):
            known = {**values, "fisher": [fisher]}
            return [one, *(v for feature in rule.features for v in known[feature])]

        with_eps, plain = ((rms + 2e-5) / mean).log(), (rms / mean).log()
        w, v = dot(phi["update"][k], inputs(with_eps)), dot(phi["flush"][k], inputs(plain))
        if rule.per_weight:
            w = w + phi[f"step/{name}"]
        if rule.per_unit:
            row = phi[f"row/{name}"]
            w = w + row.view(-1, *[1] * (theta.dim() - 1)) / 2
            w = w + phi[f"column/{name}"] / 2 if theta.dim() > 1 else w
        for kind in ("mlp", "lstm"):
            if getattr(rule, kind):
                said = network(phi, kind, inputs(with_eps), own)
                w, v = w + said[0], v + said[1]
        move = gradient
        if rule.momentum:
            move = own["momentum"] = phi["momentum"][k] * own["momentum"] + gradient
        if rule.square:
            a = phi["square"][k] * 1e-2
            own["square"] = own["square"] + a * (gradient**2 - own["square"])
            move = move * (rms + 2e-5) / (own["square"] ** 0.5 + 2e-5)
        z = (phi["flush_scale"][k] * 1e-3 * v.exp()).clamp(0, 1)
        gain = phi["gain"][k] if "gain" in phi else 1
        return theta - gain * w.exp() * move + z * (theta_0 - theta), own

    def both(phi, name, theta, gradient, theta_0, loss, age, own):
        """theta = (theta_0 + F) + S, each with gates of its own."""
        mine = {n: p for n, p in phi.items() if not n.startswith("slow/")}
        other = {n.removeprefix("slow/"): p for n, p in phi.items() if n.startswith("slow/")}
        slow, zero = own["slow"], torch.zeros_like(theta_0)
        near, _ = update(mine, name, theta - slow, gradient, theta_0, loss, age, {})
        slow, _ = update(other, name, slow, gradient, zero, loss, age, {})
        return near + slow, {"slow": slow}

    return both if rule.slow else update


def family_state(base: AdaptationBase, rule):
    """What `family` remembers of a tensor at the start of an article."""

    def state(name: str):
        zero = torch.zeros_like(base.rms[name])
        if rule.slow:
            return {"slow": zero}
        return moments_state(base)(name) | {n: [zero] * rule.lstm for n in ("h", "c")}

    return state


def unroll(
    base: AdaptationBase,
    update,
    parameters: Weights,
    segments: list[Segment],
    reader=None,
    state=None,
) -> tuple[Tensor, list[Weights]]:
    """Meta-loss of a hand-unrolled loop in which autograd sees every update of the weights.

    `update(parameters, name, theta, gradient, theta_0, loss, age)` is one tensor of one lane.
    Gradients and hidden states are constants between segments (first order). Returns the mean loss
    over all tokens but the first segment's, and every lane's final weights. Lanes start at
    theta_0, or where `reader` (weights, state, age) stands.

    A rule that remembers something of a tensor starts an article with `state(name)`; its `update`
    takes it last and returns (theta, what it remembers).
    """
    shape = base.model
    assert isinstance(shape, RecurrentLM)
    lanes = segments[0].inputs.shape[0]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    finals = []
    for lane in range(lanes):
        sizes = [size for _, size in shape.layer_sizes()]
        theta: Weights = {}
        h: list[Tensor] = []
        c: list[Tensor] = []
        age, own = 0, {}
        if reader is not None:
            theta = {n: w[lane] for n, w in reader.weights.items()}
            h, c = ([x[lane] for x in some] for some in (reader.state.h, reader.state.c))
            age = int(reader.age[lane])
        for t, segment in enumerate(segments):
            if (t == 0 and reader is None) or bool(segment.new[lane]):
                theta = {n: base.weights[n] for n in base.dynamic}
                own = {n: state(n) for n in theta} if state else {}
                h = [torch.zeros(s, dtype=torch.float64) for s in sizes]
                c, age = [torch.zeros_like(x) for x in h], 0
            count = int(segment.mask[lane].sum())
            ids = segment.inputs[lane].tolist(), segment.targets[lane].tolist()
            losses, h_new, c_new = read_lane({**base.weights, **theta}, shape, *ids, h, c)
            losses = losses[:count]
            if t:
                total, tokens = total + losses.sum(), tokens + count
            leaves = {n: w.detach().requires_grad_() for n, w in theta.items()}
            again, *_ = read_lane({**base.weights, **leaves}, shape, *ids, h, c)
            objective = again[:count].sum() / segment.inputs.shape[1]
            gradients = torch.autograd.grad(objective, list(leaves.values()))
            loss = float(losses.detach().mean())
            for n, g in zip(leaves, gradients, strict=True):
                given = parameters, n, theta[n], g, base.weights[n], loss, age
                if state:
                    theta[n], own[n] = update(*given, own[n])
                else:
                    theta[n] = update(*given)
            h, c = [x.detach() for x in h_new], [x.detach() for x in c_new]
            age += 1
        finals.append(theta)
    return total / tokens, finals
