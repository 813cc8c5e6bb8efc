"""Detects article boundaries in protocol `stream`, where nobody marks them.

The language model knows where an article begins: after the line end of a heading its hidden state
expects an article's first sentence. A logistic regression on the hidden state of the static model,
which reads along,

    p = sigmoid(w . h + b)        at every line end that is read,

is fitted to training articles read one after the other. A lane in which p passes 3/4 is reset to
theta_0: FLUSH with z = 1 for all weights (eq. 6 of Wolf et al. 2018, with gates that see the hidden
state, as those of Behrouz et al. 2025 do). What follows the line end is predicted with theta_0, and
the update after the segment learns from the article's first line on (`Restart`). Where articles
begin with nothing to be known by, p stays small and nothing happens. In protocol `article` the
boundaries are marked, and nobody looks for them.

Letters: B lanes, M tokens per segment, E width of what the softmax sees, N line ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Making, Restart
from mlm.models.language_model import LanguageModel, State, Weights, own_weights
from mlm.rules.gates import LinearGates
from mlm.text.streams import LaneStream, Segment, Text

SURE = math.log(3)
"""Decision threshold in log-odds: a false boundary costs an article all that it has taught, more
than a missed one does."""
WORDS = 300_000
"""Training words that are read, at most."""
LANES = 16
PENALTY = 0.05
"""Times |w|^2: the fit's prior. Headings can be told from all other lines, so w would not end."""


@dataclass(frozen=True)
class Boundaries(Extension):
    """Boundary detection: FLUSH where a learned rule has begun to read another article."""

    on: bool = False
    """Detect article boundaries in protocol `stream`: a learned rule with FLUSH then drops what it
    learned from the article before."""
    name: ClassVar[str] = "boundaries"
    makes_base: ClassVar[bool] = True
    of_hidden_states: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.on

    def applies_to(self, rule: Any) -> bool:
        """Learned rules that can flush."""
        return isinstance(rule, LinearGates) and rule.flush

    def applies_in(self, protocol: str) -> bool:
        """Only where boundaries are not marked."""
        return protocol == "stream"

    def make(self, base: AdaptationBase, making: Making) -> AdaptationBase:
        """With the regression, fitted to the held-out articles."""
        found = learn_boundaries(base.model, base.static, making.text)
        return base.with_weights(self.weights(found, making.text.eos))

    def weights(self, regression: Tensor, line_end: int) -> Weights:
        """The regression (E + 1,), w then b, and the token at the end of a line, by their names."""
        end = torch.tensor(line_end, device=regression.device)
        return {self.key("regression"): regression, self.key("line_end"): end}

    def begin(self, base: AdaptationBase, lanes: int) -> State:
        """The static model's hidden state."""
        some = base.weights[base.dynamic[0]]
        return base.model.initial_state(lanes, some.device, some.dtype)

    def open(self, value: State, new_B: Tensor, reset_B: Tensor) -> State:
        """Marked articles begin with a zero state."""
        return value.keep(~new_B)

    def restart(
        self, base: AdaptationBase, value: State, segment: Segment, age_B: Tensor
    ) -> tuple[Restart | None, State]:
        """The last article that begins in each lane.

        The static model tells: what a lane has learned moves its hidden state, and one boundary
        missed would hide those behind it.
        """
        run = getattr(base.model, "run", None)
        weights = own_weights(base.static)
        if run is None:
            now = base.model.read(weights, segment.inputs, segment.targets, value)
        else:  # no softmax
            now = run(weights, segment.inputs, value)
        line_end = base.weights[self.key("line_end")]
        regression = base.weights[self.key("regression")]
        logits_BM = now.output @ regression[:-1] + regression[-1]
        found_BM = (logits_BM > SURE) & segment.mask & (segment.inputs == line_end)
        lanes = found_BM.any(1) & (age_B > 0)
        if not bool(lanes.any()):
            return None, now.state
        at_M = torch.arange(found_BM.shape[1], device=found_BM.device)
        end_B1 = (found_BM * at_M).amax(1, keepdim=True)
        ends_BM = (segment.inputs == line_end) & (at_M < end_B1)
        first_B1 = (ends_BM * at_M).amax(1, keepdim=True)
        follows, taught = at_M >= end_B1, at_M >= first_B1
        return Restart(lanes, taught | ~lanes[:, None], follows & lanes[:, None]), now.state


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
def learn_boundaries(
    model: LanguageModel, weights: Weights, text: Text, words: int = WORDS, segment: int = 64
) -> Tensor:
    """The regression (E + 1,), w then b, fitted to the first `words` words of `text`, read
    statically; `segment` is speed only."""
    texts, positions = _joined(text, LANES, words)
    weights = own_weights(weights)
    like = next(iter(weights.values()))
    state = model.initial_state(len(texts), like.device, like.dtype)
    seen: list[Tensor] = []
    opens: list[Tensor] = []
    for raw in LaneStream(texts, len(texts), segment, text.eos):
        piece = raw.to(like.device)
        now = model.read(weights, piece.inputs, piece.targets, state)
        state = now.state
        is_first = np.zeros(raw.mask.shape, dtype=bool)
        for lane, (which, start) in enumerate(zip(raw.article, raw.start, strict=True)):
            if which >= 0:
                at = positions[which] - start
                is_first[lane, at[(at >= 0) & (at < segment)]] = True
        ends = piece.mask & (piece.inputs == text.eos)
        seen.append(now.output[ends].double())
        opens.append(torch.from_numpy(is_first).to(like.device)[ends].double())
    return _fitted(torch.cat(seen), torch.cat(opens)).to(like.dtype)


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
