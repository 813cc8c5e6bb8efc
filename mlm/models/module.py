"""Any torch.nn.Module as a language model whose weights are a memory: the slow path.

Letters: B lanes, T time, V vocabulary, E width of what the softmax sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mlm.base.errors import UserError
from mlm.models.language_model import OutputTerms, Read, Tell, Weights, weighted_total
from mlm.models.low_rank import BASIS, DIRECTIONS, LOW

CONTRACT = (
    "a language model of your own needs initial_state(lanes) -> tuple of tensors, lanes first, and "
    "forward(tokens (B, T), state) -> (logits (B, T, V), state) or (logits, state, output (B, T, "
    "E)), the state like the one it was given"
)


@dataclass(frozen=True)
class ModuleState:
    """Short-term memory of a module: tensors of its own making, lanes first."""

    parts: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    """The state of one lane about to begin an article, (1, ...)."""

    def keep(self, keep_B: Tensor) -> ModuleState:
        """The initial state in the lanes where `keep_B` (B,) is False."""
        return self.of(
            [
                torch.where(keep_B.view(-1, *[1] * (t.dim() - 1)), t, s)
                for t, s in zip(self.parts, self.start, strict=True)
            ]
        )

    def select(self, lanes: Tensor) -> ModuleState:
        """The state of some lanes (their indices)."""
        return self.of([t[lanes] for t in self.parts])

    def detach(self) -> ModuleState:
        """The same state without its autograd history."""
        return self.of([t.detach() for t in self.parts])

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, for files."""
        return list(self.parts)

    def of(self, tensors: Sequence[Tensor]) -> ModuleState:
        """The state made of such `tensors`."""
        return ModuleState(tuple(tensors), self.start)


class ModuleModel:
    """A `LanguageModel` made of a module that offers

        initial_state(lanes) -> tuple of tensors, each with lanes first
        forward(tokens_BT, state) -> (logits_BTV, state) or (logits_BTV, state, output_BTE)

    The state goes in and comes out alike; `output`, what the softmax sees, is for a neural cache.
    Weights are the module's parameters by name, tied ones under their first name only. Lanes that
    share all weights are read at once, others one after another, each under its own (so `nn.LSTM`
    and the like serve too). Plain PyTorch throughout: losses can be differentiated as often as the
    module can. The module is put in evaluation mode; its buffers stay where they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        self._dims = {name: p.dim() for name, p in module.named_parameters()}
        if not callable(getattr(module, "initial_state", None)):
            raise UserError(f"{self._name}.initial_state is missing: {CONTRACT}")
        bad = [n for n in self._dims if "/" in n or n.endswith((LOW, DIRECTIONS, BASIS))]
        if bad:
            raise UserError(
                f"{self._name}: the names {', '.join(bad)} are taken here; rename the parameters "
                f"so that they hold no / and do not end in {LOW}, {DIRECTIONS} or {BASIS}"
            )

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def weights(self) -> Weights:
        """A copy of the module's parameters as they are now (theta_0)."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def initial_state(
        self, lanes: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ModuleState:
        """The module's initial state, a constant; its floating-point tensors in `dtype`."""

        def of_lanes(number: int) -> tuple[Tensor, ...]:
            made: Any = self.module.initial_state(number)  # type: ignore[operator]
            self._check(isinstance(made, tuple), "initial_state gives no tuple")
            for t in made:
                self._check(len(t) == number, "initial_state gives tensors without lanes first")
            return tuple(
                t.detach().to(device, dtype if t.is_floating_point() else t.dtype) for t in made
            )

        return ModuleState(of_lanes(lanes), of_lanes(1))

    def read(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        state: ModuleState,
        share_BT: Tensor | None = None,
        tell: Tell | None = None,
        full: bool = False,
    ) -> Read:
        """See `LanguageModel.read`; `Read.output` is (B, T, 0) where the module gives none.

        Raises:
            ValueError: the output layer is told more than how tokens weigh: it is the module's own.
        """
        wrong = weights.keys() ^ self._dims.keys()
        if wrong:
            raise UserError(
                f"{self._name}: {', '.join(sorted(wrong))} missing from the weights or unknown to "
                "the module; give it weights made by `ModuleModel.weights`"
            )
        own = {n: w.unbind() for n, w in weights.items() if w.dim() > self._dims[n]}
        if own:
            lanes = range(len(tokens_BT))
            pieces = [
                self._forward(
                    {**weights, **{n: each[b] for n, each in own.items()}},
                    tokens_BT[b : b + 1],
                    tuple(t[b : b + 1] for t in state.parts),
                )
                for b in lanes
            ]
            logits_BTV, output_BTE, *parts = (torch.cat(p) for p in zip(*pieces, strict=True))
        else:
            logits_BTV, output_BTE, *parts = self._forward(weights, tokens_BT, state.parts)
        terms = OutputTerms() if tell is None else tell(output_BTE.detach())
        if any(term is not None for term in terms._replace(slope=None)):
            raise ValueError("extensions of the output layer need a model that stage 1 trains")
        nll = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        nll = nll.view_as(targets_BT)
        total = nll.new_zeros(())
        if share_BT is not None:
            total = weighted_total(nll, share_BT, terms.slope)
        log_p = logits_BTV.detach().log_softmax(-1) if full else None
        return Read(nll, total, output_BTE, state.of(parts), log_p)

    def _forward(
        self, weights: Weights, tokens_BT: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """(logits, output, *state) of lanes under the same weights."""
        found = functional_call(self.module, weights, (tokens_BT, state))
        tuples = isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[1], tuple)
        self._check(tuples, "forward gives something else")
        logits_BTV, after, *more = found
        self._check(logits_BTV.shape[:-1] == tokens_BT.shape, "the logits have another size")
        alike = [t.shape for t in after] == [t.shape for t in state]
        self._check(alike, "forward changes the sizes of the state")
        output_BTE = more[0] if more else logits_BTV[..., :0]
        return logits_BTV, output_BTE, *after

    def _check(self, fine: bool, problem: str) -> None:
        if not fine:
            raise UserError(f"{self._name}: {problem}; {CONTRACT}")
