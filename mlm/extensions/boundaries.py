"""Where an article begins, as the hidden state tells it: FLUSH for texts without marked borders.

In protocol `stream` nobody says where an article ends. The language model knows: after the line
end of a heading its hidden state expects an article's first sentence. A logistic regression on what
the softmax of the static model, which reads along, sees there,

    p = sigmoid(w . h + b)        at every line end that is read,

is fitted to training articles read one after the other, and a lane in which p passes 3/4 drops its
medium-term memory for theta_0: FLUSH with z = 1 for all weights (eq. 6 of Wolf et al. 2018, with
gates that see the hidden state, as those of Behrouz et al. 2025 do). What follows the line end is
predicted with theta_0, and the update after the segment learns from the article's first line on
(`mlm.reading.step.Beginning`). Where articles begin with nothing to be known by, p stays small and
nothing happens. Articles read one by one have their borders marked: there nobody looks for them.

Letters: B lanes, M tokens per segment, E width of what the softmax sees, N line ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.models.language_model import LanguageModel, Weights
from mlm.text.streams import LaneStream, Text

SURE = math.log(3)
"""Log odds from which on a border is believed in: a false one costs an article all that it has
taught, more than a missed one does."""


class Borders(NamedTuple):
    """Tells whether a line that ends was an article's first (see `mlm.extensions.boundaries`)."""

    weights: Tensor
    """(E + 1,): w, then b."""
    eos: int
    """Token at the end of a line."""

    def opened(self, inputs_BM: Tensor, mask_BM: Tensor, output_BME: Tensor) -> Tensor:
        """(B, M) bool: where the end of an article's first line has been read."""
        logits_BM = output_BME @ self.weights[:-1] + self.weights[-1]
        return (logits_BM > SURE) & mask_BM & (inputs_BM == self.eos)


WORDS = 300_000
"""Training words that are read, at most."""


LANES = 16


PENALTY = 0.05
"""Times |w|^2: the fit's prior. Headings can be told from all other lines, so w would not end."""


def _joined(text: Text, lanes: int, words: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """About `words` words of articles as one text per lane, and the positions in it that follow
    the line end of an article's first line."""
    wanted, taken = words * text.tokens_per_word, 0
    articles: list[np.ndarray] = []
    for article in text.articles:
        if len(article) and taken < wanted:
            articles.append(np.asarray(article))
            taken += len(article)
    texts, positions = [], []
    for lane in range(min(lanes, len(articles))):
        own = articles[lane::lanes]
        starts = np.cumsum([0, *map(len, own)])
        ends = [np.flatnonzero(article == text.eos)[:1] for article in own]
        first = [s + e + 1 for s, e in zip(starts[:-1], ends, strict=True)]
        texts.append(np.concatenate(own))
        positions.append(np.concatenate(first))
    return texts, positions


@torch.no_grad()
def learn_borders(
    shape: LanguageModel, weights: Weights, text: Text, words: int = WORDS, segment: int = 64
) -> Borders:
    """Fit to the first `words` words of `text`, read statically; `segment` is speed only.

    Args:
        shape: the language model; weights: its theta_0.
    """
    texts, positions = _joined(text, LANES, words)
    like = next(iter(weights.values()))
    state = shape.initial_state(len(texts), like.device, like.dtype)
    seen: list[Tensor] = []
    opens: list[Tensor] = []
    for raw in LaneStream(texts, len(texts), segment, text.eos):
        piece = raw.to(like.device)
        now = shape.read(weights, piece.inputs, piece.targets, state)
        state = now.state
        is_first = np.zeros(raw.mask.shape, dtype=bool)
        for lane, (which, start) in enumerate(zip(raw.article, raw.start, strict=True)):
            if which >= 0:
                at = positions[which] - start
                is_first[lane, at[(at >= 0) & (at < segment)]] = True
        ends = piece.mask & (piece.inputs == text.eos)
        seen.append(now.output[ends].double())
        opens.append(torch.from_numpy(is_first).to(like.device)[ends].double())
    found = _fitted(torch.cat(seen), torch.cat(opens))
    return Borders(found.to(like.dtype), text.eos)


@torch.enable_grad()
def _fitted(x_NE: Tensor, y_N: Tensor) -> Tensor:
    """Weights (E + 1,) of the penalised logistic regression of y on x."""
    weights = x_NE.new_zeros(x_NE.shape[1] + 1).requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_N = x_NE @ weights[:-1] + weights[-1]
        error = F.binary_cross_entropy_with_logits(logits_N, y_N, reduction="sum")
        total = error + PENALTY * weights[:-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights.detach()
