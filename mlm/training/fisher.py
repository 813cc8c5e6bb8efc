"""The diagonal empirical Fisher of what adapts, from static reading of held-out text.

Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from tqdm import tqdm

from mlm.base.errors import UserError
from mlm.models.base import AdaptationBase
from mlm.models.extension import Outcome
from mlm.reading.step import begin, carry_extras, open_articles, score_segment
from mlm.text.streams import LaneStream, Text


def smooth_fisher(fisher: Tensor, prior: float) -> Tensor:
    """The Fisher of a tensor, a share `prior` of every entry replaced by the tensor's mean.

    An estimate from few words is zero for words that are not among them.
    """
    return torch.lerp(fisher, fisher.mean().expand_as(fisher), prior) if prior else fisher


@torch.no_grad()
def estimate_fisher(
    base: AdaptationBase,
    text: Text,
    words: int,
    lanes: int = 16,
    quiet: bool = True,
    prior: float = 0.0,
) -> AdaptationBase:
    """The base with the diagonal empirical Fisher of its dynamic weights, and the text's mean loss.

    The mean over segments of the squared per-segment gradient (Krause et al. 2018, eq. 5), read
    statically on the first `words` words of `text`, `smooth_fisher` by `prior`.

    Raises:
        UserError: no article is as long as a segment, or the Fisher is not finite.
    """
    stream = LaneStream(text.articles, min(lanes, len(text.articles)), base.segment, text.eos)
    reader = begin(base, stream.lanes)
    squares = {n: torch.zeros_like(w) for n, w in base.start().items()}
    segments, tokens, total = 0, 0, 0.0
    wanted = min(text.tokens, int(words * text.tokens_per_word))
    device = base.weights[base.dynamic[0]].device
    with tqdm(total=wanted, desc="Fisher", unit="tok", unit_scale=True, disable=quiet) as bar:
        for raw in stream:
            piece = raw.to(device)
            reader = open_articles(base, base.start(), reader, piece.new)
            scored = score_segment(base, reader, piece)
            outcome = Outcome(scored.by_added, piece.mask)
            extras = carry_extras(base, reader.extras, piece, scored.told, outcome)
            reader = reader._replace(state=scored.state, extras=extras)
            full = piece.mask.all(1)
            for n, gradient in scored.gradients.items():
                squares[n] += gradient[full].square().sum(0)
            segments += int(full.sum())
            count = int(piece.mask.sum())
            total += float(scored.nll.sum())
            tokens += count
            bar.update(count)
            if tokens >= wanted and segments:
                break
    if not segments:
        raise UserError(
            f"no held-out article is as long as one segment (--update-every {base.segment}); use a "
            "smaller M or more text"
        )
    rms = {n: smooth_fisher(s / segments, prior).sqrt() for n, s in squares.items()}
    if not all(bool(r.isfinite().all()) for r in rms.values()):
        raise UserError(
            "the Fisher is not finite: the language model's loss is NaN; train it again"
        )
    return dataclasses.replace(base, rms=rms, loss=total / tokens)
