"""The diagonal empirical Fisher of what adapts, from static reading of held-out text.

Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError, uninterrupted
from mlm.base.processes import ranks
from mlm.base.progress import NOTHING_KEPT, Progress
from mlm.base.terminal import progress_bar
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.extension import Outcome
from mlm.models.language_model import Weights
from mlm.reading.step import begin, carry_extras, open_articles, score_segment
from mlm.store.tensors import fitting
from mlm.text.streams import LaneStream, Segment, Text

FISHER_LANES = 16
"""Lanes of an estimate. No setting: the first words of text are those of so many articles, so the
number of lanes decides what is read."""


def smooth_fisher(fisher: Tensor, prior: float) -> Tensor:
    """The Fisher of a tensor, a share `prior` of every entry replaced by the tensor's mean.

    An estimate from few words is zero for words that are not among them.
    """
    return torch.lerp(fisher, fisher.mean().expand_as(fisher), prior) if prior else fisher


class _Estimate:
    """Sums over the segments read so far: `mlm.base.progress.Work`.

    Each of several processes (`mlm.base.processes`) reads its share of the lanes, and has its share
    of the sums over them.
    """

    def __init__(self, base: AdaptationBase, stream: LaneStream) -> None:
        self.base, self.stream = base, stream
        share = ranks().share(stream.lanes)
        self.mine = np.arange(share.start, share.stop)
        self.reader = begin(base, len(self.mine))
        self.squares = {n: torch.zeros_like(w) for n, w in base.start().items()}
        self.segments, self.tokens, self.total = 0, 0, 0.0

    def sums(self) -> tuple[Weights, float]:
        """Squares and nats of all processes."""
        squares, total = self.squares, torch.tensor(self.total, dtype=torch.float64)
        if ranks().world > 1:
            squares = {n: s.clone() for n, s in squares.items()}
            ranks().sum_([*squares.values()])
            ranks().sum_([total])
        return squares, float(total)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        squares, total = self.sums()
        reader = self.reader._replace(weights={}).tensors_of_all(self.stream.lanes)
        tensors = {f"reader/{n}": t for n, t in reader.items()}
        tensors |= {f"squares/{n}": s for n, s in squares.items()}
        numbers = {"segments": self.segments, "tokens": self.tokens, "total": total}
        return tensors, {**numbers, "cursor": self.stream.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        plain, first = self.reader._replace(weights={}), ranks().first
        kept = {n: tensors[f"reader/{n}"] for n in plain.tensors()}
        found = plain.of_share(kept, self.stream.lanes)
        self.reader = found._replace(weights=self.reader.weights)
        for name, squares in fitting(tensors, self.squares, "squares/").items():
            self.squares[name].copy_(squares * first)
        self.segments, self.tokens = about["segments"], about["tokens"]
        self.total = about["total"] * first
        self.stream.load_state_dict(about["cursor"])

    def read(self, everything: Segment) -> int:
        """Read a segment of all lanes statically; returns its tokens."""
        count = int(everything.mask.sum())
        self.segments += int(everything.mask.all(1).sum())
        self.tokens += count
        if len(self.mine):
            self._read(everything.select(self.mine))
        return count

    def _read(self, piece: Segment) -> None:
        """Read the lanes of this process."""
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
        self.total += float(scored.nll.sum())


@torch.no_grad()
def estimate_fisher(
    base: AdaptationBase,
    text: Text,
    words: int,
    lanes: int = FISHER_LANES,
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
        progress_bar("Fisher information", wanted, initial=found.tokens, quiet=quiet) as bar,
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
    summed, total = found.sums()
    squares = {n: smooth_fisher(s / found.segments, prior) for n, s in summed.items()}
    rms = {n: s.sqrt() for n, s in squares.items()}
    if not all(bool(r.isfinite().all()) for r in rms.values()):
        raise UserError(
            "the Fisher is not finite: the language model's loss is NaN; train it again"
        )
    return dataclasses.replace(base, rms=rms, loss=total / found.tokens)
