"""The diagonal empirical Fisher of what adapts, from static reading of held-out text.

Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlm.base.errors import UserError, uninterrupted
from mlm.base.progress import NOTHING_KEPT, Progress
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.extension import Outcome
from mlm.reading.step import begin, carry_extras, open_articles, score_segment
from mlm.text.streams import LaneStream, Segment, Text


def smooth_fisher(fisher: Tensor, prior: float) -> Tensor:
    """The Fisher of a tensor, a share `prior` of every entry replaced by the tensor's mean.

    An estimate from few words is zero for words that are not among them.
    """
    return torch.lerp(fisher, fisher.mean().expand_as(fisher), prior) if prior else fisher


class _Estimate:
    """Sums over the segments read so far: `mlm.base.progress.Work`."""

    def __init__(self, base: AdaptationBase, stream: LaneStream) -> None:
        self.base, self.stream = base, stream
        self.reader = begin(base, stream.lanes)
        self.squares = {n: torch.zeros_like(w) for n, w in base.start().items()}
        self.segments, self.tokens, self.total = 0, 0, 0.0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        reader = {n: t for n, t in self.reader.tensors().items() if not _of_theta_0(n)}
        tensors = {f"reader/{n}": t for n, t in reader.items()}
        tensors |= {f"squares/{n}": s for n, s in self.squares.items()}
        numbers = {"segments": self.segments, "tokens": self.tokens, "total": self.total}
        return tensors, {**numbers, "cursor": self.stream.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        fresh = self.reader.tensors()
        self.reader = self.reader.of(
            {n: t if _of_theta_0(n) else tensors[f"reader/{n}"] for n, t in fresh.items()}
        )
        for name, squares in self.squares.items():
            squares.copy_(tensors[f"squares/{name}"])
        self.segments, self.tokens = about["segments"], about["tokens"]
        self.total = about["total"]
        self.stream.load_state_dict(about["cursor"])

    def read(self, piece: Segment) -> int:
        """Read a segment statically; returns its tokens."""
        base = self.base
        # theta_0 stays in all lanes: there are no weights to put back
        lanes = open_articles(base, {}, self.reader._replace(weights={}), piece.new)
        reader = lanes._replace(weights=self.reader.weights)
        scored = score_segment(base, reader, piece)
        outcome = Outcome(scored.by_added, piece.mask)
        extras = carry_extras(base, reader.extras, piece, scored.told, outcome)
        self.reader = reader._replace(state=scored.state, extras=extras)
        full = piece.mask.all(1)
        every = bool(full.all())
        for n, gradient in scored.gradients.items():
            squares = gradient.square_()
            self.squares[n] += (squares if every else squares[full]).sum(0)
        buffers.release(scored.gradients.values())
        self.segments += int(full.sum())
        count = int(piece.mask.sum())
        self.total += float(scored.nll.sum())
        self.tokens += count
        return count


def _of_theta_0(name: str) -> bool:
    """Whether a reader's tensor is that of theta_0, as all weights are in static reading."""
    return name.startswith("weights/")


@torch.no_grad()
def estimate_fisher(
    base: AdaptationBase,
    text: Text,
    words: int,
    lanes: int = 16,
    quiet: bool = True,
    prior: float = 0.0,
    progress: Progress = NOTHING_KEPT,
) -> AdaptationBase:
    """The base with the diagonal empirical Fisher of its dynamic weights, and the text's mean loss.

    The mean over segments of the squared per-segment gradient (Krause et al. 2018, eq. 5), read
    statically on the first `words` words of `text`, `smooth_fisher` by `prior`.

    Raises:
        UserError: no article is as long as a segment, or the Fisher is not finite.
    """
    stream = LaneStream(text.articles, min(lanes, len(text.articles)), base.segment, text.eos)
    found = _Estimate(base, stream)
    wanted = min(text.tokens, int(words * text.tokens_per_word))
    device = base.weights[base.dynamic[0]].device
    with (
        progress.of("fisher", found) as tick,
        tqdm(
            total=wanted,
            initial=found.tokens,
            desc="Fisher",
            unit="tok",
            unit_scale=True,
            disable=quiet,
        ) as bar,
    ):
        while found.tokens < wanted or not found.segments:
            with uninterrupted():
                piece = next(stream, None)
                if piece is None:
                    break
                bar.update(found.read(piece.to(device)))
            tick()
    if not found.segments:
        raise UserError(
            f"no held-out article is as long as one segment (--update-every {base.segment}); use a "
            "smaller M or more text"
        )
    squares = {n: smooth_fisher(s / found.segments, prior) for n, s in found.squares.items()}
    rms = {n: s.sqrt() for n, s in squares.items()}
    if not all(bool(r.isfinite().all()) for r in rms.values()):
        raise UserError(
            "the Fisher is not finite: the language model's loss is NaN; train it again"
        )
    return dataclasses.replace(base, rms=rms, loss=found.total / found.tokens)
