"""Reading under theta_0: no lane has weights of its own, no rule writes any.

Letters: B lanes, M tokens per segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlm.base.processes import ranks
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Outcome
from mlm.models.language_model import LanguageModel, Read, Weights
from mlm.reading.step import begin_extras, carry_extras, open_extras, read_theta_0
from mlm.text.streams import LaneStream, Segment, Text


class StaticReader:
    """Lanes that read under theta_0, with the extensions that belong to the language model."""

    def __init__(self, base: AdaptationBase, lanes: int) -> None:
        self.base = base.of_model()
        some = next(iter(self.base.static.values()))
        self.state = base.model.initial_state(lanes, some.device, some.dtype)
        self.extras = begin_extras(self.base, lanes)

    def select(self, lanes: Tensor) -> None:
        """Go on with some of the lanes (their indices)."""
        self.state = self.state.select(lanes)
        self.extras = {n: value.select(lanes) for n, value in self.extras.items()}

    @torch.no_grad()
    def read(self, segment: Segment, full: bool = False) -> Read:
        """Predict a segment, without a gradient; losses of padding count, too.

        `full`: whether the log-probabilities of all tokens are wanted (`Read.log_p`).
        """
        state = self.state.keep(~segment.new)
        extras = open_extras(self.base, self.extras, segment.new, segment.new)
        now, telling = read_theta_0(self.base, state, extras, segment, full)
        self.state = now.state
        outcome = Outcome(None, segment.mask)
        self.extras = carry_extras(self.base, extras, segment, telling.told, outcome)
        return now


@torch.no_grad()
def static_loss(
    weights: Weights,
    model: LanguageModel,
    text: Text,
    lanes: int,
    segment: int,
    precision: torch.dtype = torch.float32,
    extensions: tuple[Extension, ...] = (),
) -> float:
    """Mean loss in nats per token of `text` under fixed weights, state reset at borders.

    Articles are dealt to processes as in `mlm.reading.scoring.score_articles`.
    """
    here, base = (
        ranks(),
        AdaptationBase(model, weights, (), {}, 0.0, segment, extensions=extensions),
    )
    own = [text.articles[a] for a in here.mine([len(a) for a in text.articles])]
    found = here.parts(lambda: _static_loss(base, own, text.eos, lanes, precision))
    return sum(total for total, _ in found) / sum(tokens for _, tokens in found)


def _static_loss(
    base: AdaptationBase,
    articles: Sequence[np.ndarray],
    eos: int,
    lanes: int,
    precision: torch.dtype,
) -> tuple[float, int]:
    """Nats and tokens of some articles."""
    total, tokens = 0.0, 0
    if not any(map(len, articles)):
        return total, tokens
    device = next(iter(base.static.values())).device
    stream = LaneStream(articles, min(lanes, len(articles)), base.segment, eos)
    reader = StaticReader(base, stream.lanes)
    for raw in stream:
        piece = raw.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            now = reader.read(piece)
        total += float((now.nll * piece.mask).sum())
        tokens += int(piece.mask.sum())
    return total, tokens
