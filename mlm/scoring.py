"""Score articles under an update rule, in protocol `article` or `stream`; words from tokens.

Letters: B lanes, A articles, S settings of a rule tried side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mlm import buffers
from mlm.errors import UserError
from mlm.learner import Bound
from mlm.memory import LongTerm
from mlm.rollout import begin, read, score_static
from mlm.streams import LaneStream


class Scores(NamedTuple):
    """Losses of one rule."""

    nll: list[np.ndarray]
    """Per article: nats of every token, float64."""
    seconds: float

    @property
    def total(self) -> float:
        """Nats of all tokens; infinite if any is not a number."""
        total = float(sum(a.sum() for a in self.nll))
        return total if np.isfinite(total) else float("inf")


def score_articles(
    memory: LongTerm,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    lanes: int,
    title: str | None = None,
) -> Scores:
    """Read every article once, predict -> score -> update; `rule` None = static.

    Each article starts from theta_0 and a zero state, so the result does not depend on the number
    of lanes. `title` shows a progress bar.
    """
    device = memory.weights[memory.dynamic[0]].device
    filled = sum(len(a) > 0 for a in articles)
    out = [np.zeros(len(a)) for a in articles]
    if not filled:
        return Scores(out, 0.0)
    stream = LaneStream(articles, min(lanes, filled), memory.segment, eos)
    reader = begin(memory, stream.lanes if rule else 1, rule)
    spare = [{n: torch.empty_like(w) for n, w in reader.weights.items()} for _ in range(2)]
    state = memory.shape.initial_state(stream.lanes, device, reader.age.dtype)
    clock = time.perf_counter()
    tokens = sum(len(a) for a in articles)
    with tqdm(total=tokens, desc=title, unit="tok", unit_scale=True, disable=title is None) as bar:
        lanes_left = np.arange(stream.lanes)
        for step, full in enumerate(stream):
            busy = full.article[lanes_left] >= 0
            if not busy.all():  # lanes without a next article: nothing to compute there any more
                keep = torch.from_numpy(np.flatnonzero(busy)).to(device)
                lanes_left = lanes_left[busy]
                state = state.select(keep)
                reader = reader.select(keep) if rule else reader
                spare = [{n: w[: len(keep)] for n, w in some.items()} for some in spare]
            raw = full.select(lanes_left)
            segment = raw.to(device)
            if rule is None:
                nll, state = score_static(memory, state.keep(~segment.new), segment)
            else:
                reader, nll = read(memory, rule, reader, segment, spare[step % 2])
            counts = raw.mask.sum(1).tolist()
            rows = nll.double().cpu().numpy()
            for lane, count in enumerate(counts):
                if count:
                    at = segment.start[lane]
                    out[segment.article[lane]][at : at + count] = rows[lane, :count]
            bar.update(sum(counts))
    buffers.clear()
    return Scores(out, time.perf_counter() - clock)


def score_stream(
    memory: LongTerm,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    title: str | None = None,
) -> Scores:
    """Read the articles as one long text in which neither weights nor state are reset."""
    whole = score_articles(memory, rule, [np.concatenate(list(articles))], eos, 1, title)
    ends = np.cumsum([len(a) for a in articles])[:-1]
    return Scores(np.split(whole.nll[0], ends), whole.seconds)


def score_protocol(
    memory: LongTerm,
    rule: Bound | None,
    articles: Sequence[np.ndarray],
    eos: int,
    protocol: str,
    lanes: int,
    title: str | None = None,
) -> Scores:
    """`score_articles` or `score_stream` by the protocol's name."""
    if protocol == "stream":
        return score_stream(memory, rule, articles, eos, title)
    return score_articles(memory, rule, articles, eos, lanes, title)


def word_losses(nll: np.ndarray, tokens: np.ndarray, starts_word: np.ndarray) -> np.ndarray:
    """Sum the losses of the tokens of every word: float64 (words,)."""
    if not len(tokens):
        return np.zeros(0)
    first = starts_word[tokens].copy()
    first[0] = True
    return np.add.reduceat(nll, np.flatnonzero(first))


def check_finite(scores: Scores, rule: str, protocol: str, titles: Sequence[str]) -> None:
    """Refuse losses that are not numbers.

    Raises:
        UserError: names rule, protocol, article, token and the way out.
    """
    for title, nll in zip(titles, scores.nll, strict=True):
        bad = np.flatnonzero(~np.isfinite(nll))
        if len(bad):
            raise UserError(
                f"rule {rule}, protocol {protocol}: the loss is {nll[bad[0]]} at token {bad[0]} of "
                f"article {title!r}; its weights diverged. Use a smaller step size "
                "(--meta.learning-rate, or tune again with a larger --evaluation.budget)"
            )
