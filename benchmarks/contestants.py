"""The same model, rule and text, read with other libraries: the contestants of `peers`.

Each is written as the library's documentation shows it and shares no code with the package but
containers. A contestant is a function of (memory, setting, lanes) that returns a `Step`; the
libraries are imported only when it is made. Letters: B lanes, M tokens per segment, H hidden.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from benchmarks.timing import Step, reading
from mlm.models.base import AdaptationBase
from mlm.models.recurrent import RecurrentLM
from mlm.rules.hand_made import RMS
from mlm.text.streams import Segment

State = list[tuple[Tensor, Tensor]]
"""(h, c) of every layer, (1, H) each, with a leading B under `vmap`."""
EPS = 2e-5


class Setting(NamedTuple):
    """Krause's two numbers."""

    rate: float
    decay: float


# -- the model ------------------------------------------------------------------------------


class CellLayer(nn.Module):
    """An LSTM layer of plain operations, for `vmap`, which does not take `nn.LSTM`.

    Same parameters and calls as `nn.LSTM` on one text without a batch.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * hidden, size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * hidden))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """Outputs (M, H) and the state after them; inputs (M, I) are projected all at once."""
        h, c = state
        recurrent = self.weight_hh_l0.t()
        outputs = []
        for gates in F.linear(x, self.weight_ih_l0, self.bias_ih_l0).split(1):
            i, f, g, o = (gates + h @ recurrent).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.cat(outputs), (h, c)


OUTER = {"table": "embedding", "bias": "softmax.bias"}
"""Our names of a module's parameters outside its layers."""


class PeerLM(nn.Module):
    """The language model for one text: tied embedding, LSTM layers, softmax.

    Only the memory's dynamic weights require a gradient. `nn.LSTM` has a second bias; it stays
    zero.
    """

    def __init__(self, base: AdaptationBase, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.table = nn.Parameter(base.weights["embedding"].clone())
        self.bias = nn.Parameter(base.weights["softmax.bias"].clone())
        assert isinstance(base.model, RecurrentLM)
        self.layers = nn.ModuleList(layer(*sizes) for sizes in base.model.layer_sizes())
        self.sizes = [hidden for _, hidden in base.model.layer_sizes()]
        self.to(self.table.device)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name.endswith("bias_hh_l0"):
                    value.zero_().requires_grad_(False)
                else:
                    value.copy_(base.weights[_ours(name)])
                    value.requires_grad_(_ours(name) in base.dynamic)

    def start(self, *lanes: int) -> State:
        """A zero state."""
        zeros = [torch.zeros(*lanes, 1, size, device=self.table.device) for size in self.sizes]
        return [(zero, zero) for zero in zeros]

    def dynamic(self) -> dict[str, Tensor]:
        """The weights that adapt."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def frozen(self) -> dict[str, Tensor]:
        """The others."""
        return {n: p for n, p in self.named_parameters() if not p.requires_grad}

    def forward(self, tokens: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """Losses (M,) in nats and the state after the segment."""
        x, after = F.embedding(tokens, self.table), []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer(x, before)
            after.append(last)
        logits = F.linear(x, self.table, self.bias)
        return F.cross_entropy(logits, targets, reduction="none"), after


def fused(base: AdaptationBase) -> PeerLM:
    """The model on `nn.LSTM`."""
    return PeerLM(base, nn.LSTM)


def _ours(name: str) -> str:
    """Our name of a module's parameter: layers.0.weight_hh_l0 -> lstm.0.recurrent."""
    if name in OUTER:
        return OUTER[name]
    _, layer, own = name.split(".")
    kinds = {"weight_ih_l0": "input", "weight_hh_l0": "recurrent", "bias_ih_l0": "bias"}
    return f"lstm.{layer}.{kinds[own]}"


class Factors(NamedTuple):
    """What Krause's rule knows of one tensor."""

    start: Tensor
    scale: Tensor
    """1 / (RMS + eps)."""
    relative: Tensor
    """RMS / mean RMS, clipped so that the decay never passes theta_0."""


def factors(base: AdaptationBase, model: PeerLM, setting: Setting) -> dict[str, Factors]:
    """The constants of the rule, made once."""
    found = {}
    for name in model.dynamic():
        rms = base.rms[_ours(name)]
        relative = (rms / base.mean_rms).clamp(max=1 / max(setting.decay, 1e-30))
        found[name] = Factors(base.weights[_ours(name)], 1 / (rms + EPS), relative)
    return found


def _detached(state: State) -> State:
    return [(h.detach(), c.detach()) for h, c in state]


# -- contestants ----------------------------------------------------------------------------


def ours(base: AdaptationBase, setting: Setting, lanes: int) -> Step:
    """`mlm.reading.step.read`."""
    like = next(iter(base.rms.values()))
    parameters = {"rate": like.new_tensor(setting.rate), "decay": like.new_tensor(setting.decay)}
    return reading(base, RMS().bind(parameters, base), lanes)


def vmapped(base: AdaptationBase, setting: Setting, lanes: int, compiled: bool = False) -> Step:
    """`torch.func`: per-lane gradients by vmap(grad_and_value(functional_call)), batched update."""
    model, gradient = _lane_gradients(base)
    gradient = torch.compile(gradient) if compiled else gradient
    rule, frozen = factors(base, model, setting), model.frozen()
    theta: dict[str, Tensor] = {}
    state: State = []

    @torch.no_grad()
    def step(segment: Segment) -> Tensor:
        nonlocal theta, state
        if bool(segment.new.all()):
            theta, state = _copies(model, lanes), model.start(lanes)
        found, (_, (nll, state)) = gradient(theta, frozen, segment.inputs, segment.targets, state)
        theta = {n: _moved(w, found[n], rule[n], setting) for n, w in theta.items()}
        return nll

    return step


def _lane_gradients(base: AdaptationBase) -> tuple[PeerLM, Callable[..., Any]]:
    """The model of plain cells, and its gradient for every lane's own weights."""
    model = PeerLM(base, CellLayer)

    def loss(theta, frozen, tokens, targets, state):
        nll, state = functional_call(model, (theta, frozen), (tokens, targets, state))
        return nll.mean(), (nll, state)

    lanes_of_each = (0, None, 0, 0, 0)
    return model, vmap(grad_and_value(loss, has_aux=True), in_dims=lanes_of_each)


def _copies(model: PeerLM, lanes: int) -> dict[str, Tensor]:
    return {n: w.detach().expand(lanes, *w.shape).contiguous() for n, w in model.dynamic().items()}


def _moved(w: Tensor, gradient: Tensor, own: Factors, setting: Setting) -> Tensor:
    """Krause's rule on new memory, for one lane or several."""
    back = (own.start - w) * own.relative * setting.decay
    return w + back - setting.rate * own.scale * gradient


def krause(base: AdaptationBase, setting: Setting, lanes: int) -> Step:
    """The published loop (dynamiceval.py): batch 1, loss.backward(), update parameter by parameter.

    Our choice beside his script: losses are kept token by token. The memory's dynamic weights move.
    """
    model = fused(base)
    rule = factors(base, model, setting)
    parameters = model.dynamic()
    state: State = []

    def step(segment: Segment) -> Tensor:
        nonlocal state
        if bool(segment.new[0]):
            state = model.start()
            for name, p in parameters.items():
                p.data.copy_(rule[name].start)
        model.zero_grad()
        nll, state = model(segment.inputs[0], segment.targets[0], _detached(state))
        nll.mean().backward()
        for name, p in parameters.items():
            assert p.grad is not None
            start, scale, relative = rule[name]
            p.data += setting.decay * relative * (start - p.data) - setting.rate * p.grad * scale
        return nll.detach().unsqueeze(0)

    return step


@cache
def higher_rule() -> type[torch.optim.Optimizer]:
    """The rule as an optimiser that `higher` knows how to differentiate."""
    higher = importlib.import_module("higher")

    class Dynamic(torch.optim.Optimizer):
        """One group per tensor with its `Factors`; only the differentiable twin ever steps."""

        def __init__(self, groups: list[dict[str, Any]], rate: float, decay: float) -> None:
            super().__init__(groups, {"rate": rate, "decay": decay})

    class DifferentiableDynamic(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: list[list[Tensor]], **kwargs: Any) -> None:
            for group, (gradient,) in zip(self.param_groups, grouped_grads, strict=True):
                setting = Setting(group["rate"], group["decay"])
                (w,) = group["params"]
                group["params"][0] = _moved(w, gradient, group["factors"], setting)

    higher.register_optim(Dynamic, DifferentiableDynamic)
    return Dynamic


def higher_optimizer(
    base: AdaptationBase, model: PeerLM, setting: Setting
) -> torch.optim.Optimizer:
    """The rule over the model's dynamic weights."""
    rule = factors(base, model, setting)
    groups = [{"params": [p], "factors": rule[n]} for n, p in model.dynamic().items()]
    return higher_rule()(groups, rate=setting.rate, decay=setting.decay)  # type: ignore[call-arg]


def by_higher(base: AdaptationBase, setting: Setting, lanes: int) -> Step:
    """`higher`: a patched model and a differentiable optimiser, one article at a time."""
    higher = importlib.import_module("higher")
    model = fused(base)
    optimizer = higher_optimizer(base, model, setting)
    article = contextlib.ExitStack()
    state: State = []
    reader: Any = None
    inner: Any = None

    def step(segment: Segment) -> Tensor:
        nonlocal state, reader, inner
        if bool(segment.new[0]):
            article.close()
            reader, inner = article.enter_context(
                higher.innerloop_ctx(model, optimizer, track_higher_grads=False)
            )
            state = model.start()
        nll, state = reader(segment.inputs[0], segment.targets[0], _detached(state))
        inner.step(nll.mean())
        return nll.detach().unsqueeze(0)

    return step


def torchopt_rule(rule: dict[str, Factors], setting: Setting) -> Any:
    """The rule as a gradient transformation; its state is theta_0."""
    torchopt = importlib.import_module("torchopt")

    def start(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: rule[n].start for n in theta}

    def update(gradients, state, *, params, inplace=True):
        moves = {}
        for n, w in params.items():
            back = (state[n] - w) * rule[n].relative * setting.decay
            moves[n] = back - setting.rate * rule[n].scale * gradients[n]
        return moves, state

    return torchopt.base.GradientTransformation(start, update)


def torchopt_lanes(base: AdaptationBase, setting: Setting, lanes: int) -> Step:
    """`torchopt`'s functional interface on the gradients of `torch.func`, all lanes at once."""
    torchopt = importlib.import_module("torchopt")
    model, gradient = _lane_gradients(base)
    optimizer = torchopt_rule(factors(base, model, setting), setting)
    frozen = model.frozen()
    theta: dict[str, Tensor] = {}
    state: State = []
    inner: Any = None

    @torch.no_grad()
    def step(segment: Segment) -> Tensor:
        nonlocal theta, state, inner
        if bool(segment.new.all()):
            theta, state = _copies(model, lanes), model.start(lanes)
            inner = optimizer.init(theta)
        found, (_, (nll, state)) = gradient(theta, frozen, segment.inputs, segment.targets, state)
        moves, inner = optimizer.update(found, inner, params=theta)
        theta = torchopt.apply_updates(theta, moves)
        return nll

    return step


def torchopt_article(base: AdaptationBase, setting: Setting, lanes: int) -> Step:
    """`torchopt`'s functional interface on `nn.LSTM`, one article at a time."""
    torchopt = importlib.import_module("torchopt")
    model = fused(base)
    optimizer = torchopt_rule(factors(base, model, setting), setting)
    frozen = model.frozen()
    theta: dict[str, Tensor] = {}
    state: State = []
    inner: Any = None

    def step(segment: Segment) -> Tensor:
        nonlocal theta, state, inner
        if bool(segment.new[0]):
            theta = {n: w.detach().clone().requires_grad_() for n, w in model.dynamic().items()}
            state, inner = model.start(), optimizer.init(theta)
        arguments = (segment.inputs[0], segment.targets[0], _detached(state))
        nll, state = functional_call(model, (theta, frozen), arguments)
        found = dict(zip(theta, torch.autograd.grad(nll.mean(), list(theta.values())), strict=True))
        with torch.no_grad():
            moves, inner = optimizer.update(found, inner, params=theta)
            theta = torchopt.apply_updates(theta, moves)
        return nll.detach().unsqueeze(0)

    return step


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    make: Callable[[AdaptationBase, Setting, int], Step]
    library: str | None = None
    """Package it needs beside PyTorch."""
    alone: bool = False
    """Reads one article at a time."""
    segment: int = 0
    """M, where it is not the option's."""
    note: str = ""

    def side_by_side(self, base: AdaptationBase, setting: Setting, lanes: int) -> Step:
        """A step for all lanes, also where the contestant reads one article at a time."""
        if not self.alone:
            return self.make(base, setting, lanes)
        steps = [self.make(base, setting, 1) for _ in range(lanes)]

        def step(segment: Segment) -> Tensor:
            parts = [one(segment.select(np.array([lane]))) for lane, one in enumerate(steps)]
            return torch.cat(parts)

        return step


OURS = "ours"
CONTESTANTS = {
    OURS: Contestant(ours, note="mlm.reading.step.read"),
    "torch.func": Contestant(vmapped, note="vmap(grad) over a cell of plain operations"),
    "higher": Contestant(by_higher, "higher", True, note="nn.LSTM, one article at a time"),
    "torchopt, lanes": Contestant(torchopt_lanes, "torchopt", note="on torch.func's gradients"),
    "torchopt, article": Contestant(
        torchopt_article, "torchopt", True, note="nn.LSTM, one article at a time"
    ),
    "Krause's loop": Contestant(krause, alone=True, note="nn.LSTM, one article at a time, ours' M"),
    "Krause as published": Contestant(krause, alone=True, segment=5, note="nn.LSTM, batch 1, M=5"),
}
COMPILED = {
    "torch.func, compiled": Contestant(
        partial(vmapped, compiled=True), note="the same under torch.compile"
    )
}
