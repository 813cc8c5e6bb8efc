"""The directions of low-rank changes (`mlm.models.low_rank`): principal directions of inputs.

Letters: B lanes, T time, I inputs, O outputs, r rank, N vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError, uninterrupted
from mlm.base.processes import ranks
from mlm.base.progress import NOTHING_KEPT, Progress
from mlm.models.language_model import LanguageModel, Weights
from mlm.models.low_rank import DIRECTIONS, LOW
from mlm.models.recurrent import RecurrentLM, RecurrentState, embed
from mlm.store.tensors import fitting
from mlm.text.streams import LaneStream, Segment, Text

SMALLEST = 1e-6
"""Share of the largest eigenvalue that smaller ones are raised to: the text hardly shows them."""


def _multiplied(
    weights: Weights, shape: RecurrentLM, piece: Segment, state: RecurrentState
) -> tuple[Weights, RecurrentState]:
    """The vectors (B, T, I) that each matrix multiplies in a segment, and the state after it."""
    hidden = shape.run(weights, piece.inputs, state)
    found = {"softmax": hidden.output}
    x = embed(weights, shape, piece.inputs)
    for layer, (h_BH, output) in enumerate(zip(state.h, hidden.layers, strict=False)):  # no QRNN's
        found[f"lstm.{layer}.input"] = x
        found[f"lstm.{layer}.recurrent"] = torch.cat([h_BH.unsqueeze(1), output[:, :-1]], 1)
        x = output
    return found, hidden.state


class _Moments:
    """Sums of x x^T over the tokens read so far: `mlm.base.progress.Work`.

    Each of several processes (`mlm.base.processes`) reads its share of the lanes, and has its share
    of the sums over them.
    """

    def __init__(
        self, weights: Weights, shape: RecurrentLM, names: list[str], stream: LaneStream
    ) -> None:
        self.weights, self.shape, self.names, self.stream = weights, shape, names, stream
        like = weights["softmax.bias"]
        self.device = like.device
        share = ranks().share(stream.lanes)
        self.mine = np.arange(share.start, share.stop)
        self.carried = shape.initial_state(len(self.mine), like.device, like.dtype)
        self.sums: Weights = {}
        for name in names:
            width = shape.embedding if name == "softmax" else weights[name].shape[1]
            self.sums[name] = torch.zeros(width, width, dtype=torch.float64, device=like.device)
        self.tokens = 0

    def summed(self) -> Weights:
        """The sums of all processes."""
        if ranks().world == 1:
            return self.sums
        found = {n: total.clone() for n, total in self.sums.items()}
        ranks().sum_([*found.values()])
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"sums/{n}": total for n, total in self.summed().items()}
        own = {f"state/{k}": t for k, t in enumerate(self.carried.tensors())}
        tensors |= ranks().of_all_lanes(own, self.stream.lanes)
        return tensors, {"tokens": self.tokens, "cursor": self.stream.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        sums = fitting(tensors, self.sums, "sums/")
        self.sums = {n: total.to(self.device) * ranks().first for n, total in sums.items()}
        lanes, like = self.stream.lanes, {str(k): t for k, t in enumerate(self.carried.tensors())}
        own = ranks().share(lanes)
        state = fitting(tensors, like, "state/", lanes).values()
        self.carried = self.carried.of([t[own.start : own.stop].to(self.device) for t in state])
        self.tokens = about["tokens"]
        self.stream.load_state_dict(about["cursor"])

    def read(self, everything: Segment) -> None:
        """Read a segment of all lanes statically."""
        self.tokens += int(everything.mask.sum())
        if len(self.mine):
            self._read(everything.select(self.mine))

    def _read(self, piece: Segment) -> None:
        """Read the lanes of this process."""
        state = self.carried.keep(~piece.new)
        vectors, self.carried = _multiplied(self.weights, self.shape, piece, state)
        for name in self.names:
            x_NI = vectors[name][piece.mask].double()
            self.sums[name] += x_NI.t() @ x_NI


def second_moments(
    weights: Weights,
    shape: RecurrentLM,
    names: list[str],
    text: Text,
    words: int,
    lanes: int = 16,
    segment: int = 64,
    progress: Progress = NOTHING_KEPT,
) -> Weights:
    """Mean of x x^T, (I, I) in float64, over the vectors x that each matrix in `names` multiplies.

    Read statically on the first `words` words of `text`, as the Fisher is; `segment` is speed only.
    """
    stream = LaneStream(text.articles, min(lanes, len(text.articles)), segment, text.eos)
    found = _Moments(weights, shape, names, stream)
    wanted = min(text.tokens, int(words * text.tokens_per_word))
    with progress.of("directions", found) as tick:
        while found.tokens < wanted:
            with uninterrupted():
                found.read(next(stream).to(found.device))
            tick()
    return {name: total / found.tokens for name, total in found.summed().items()}


def principal_directions(moment_II: Tensor, rank: int) -> Tensor:
    """The `rank` (at most I) principal directions of vectors, (r, I), largest first.

    `moment_II` is the vectors' mean of x x^T, uncentred: their mean counts as a direction. The rows
    are orthogonal, that of eigenvalue e as long as e^(-1/4), so that a vector's share in it has the
    root mean square e^(1/4). Rules scale D's gradient by its RMS, which knows nothing of P: the
    length of a row says how much an update of D moves W along it. Halfway between equal rows (as
    in W's own update) and equal shares (e^(-1/2)) was best or next to it where measured: nats per
    word gained with `softmax.low,softmax.bias` at rank 32, 0.66 on pydocs (equal rows 0.57, equal
    shares 0.67) and 0.34 on Wikipedia (0.33, 0.30).

    Raises:
        UserError: the moments are not finite.
    """
    if not bool(moment_II.isfinite().all()):
        raise UserError(
            "the language model's outputs are not finite: its loss is NaN; train it again"
        )
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    floor = max(SMALLEST * float(values_I[-1]), SMALLEST**2)
    scaled_II = vectors_II * values_I.clamp(min=floor) ** -0.25
    return scaled_II.flip(1)[:, :rank].t().contiguous()


@torch.no_grad()
def add_low_rank(
    weights: Weights,
    shape: LanguageModel,
    dynamic: tuple[str, ...],
    rank: int,
    text: Text,
    words: int,
    progress: Progress = NOTHING_KEPT,
) -> Weights:
    """`weights` and, for every name in `dynamic` that ends in `.low`, its D = 0 and its P.

    P are the principal directions of the vectors that the matrix multiplies in the first `words`
    words of `text`.

    Raises:
        UserError: the model has no recurrent layers.
    """
    names = [name.removesuffix(LOW) for name in dynamic if name.endswith(LOW)]
    if not names:
        return weights
    if not isinstance(shape, RecurrentLM):
        raise UserError(
            f"--dynamic: low-rank changes ({', '.join(n + LOW for n in names)}) need an LSTM "
            "or QRNN; name full weights, for example softmax.bias"
        )
    moments = second_moments(weights, shape, names, text, words, progress=progress)
    added: Weights = {}
    for name in names:
        outputs = len(weights["softmax.bias" if name == "softmax" else name])
        like = weights["softmax.bias"]
        directions = principal_directions(moments[name], rank).to(like.dtype)
        added[name + LOW] = like.new_zeros(outputs, len(directions))
        added[name + DIRECTIONS] = directions
    return {**weights, **added}
