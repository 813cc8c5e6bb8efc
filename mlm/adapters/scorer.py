"""Token and word scores under the names and in the shapes of minicons' `IncrementalLMScorer`.

Scripts that were written for minicons (Misra 2022) run with this class in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlm.reader import TrainedModel


class IncrementalLMScorer:
    """Scores of a model that learns while it reads.

    Three things differ from minicons. Words are what white space separates, and a line end. Every
    text begins after the end of a line, which stands for minicons' `bos_token`: the first token
    has a score, too. And what a text teaches changes the scores of the rest of this text.

    Args:
        model: a loaded model, `mlm.load(...)`.
        rule: how its weights are rewritten; `static` for not at all.
        form: how the texts are written.
    """

    def __init__(self, model: TrainedModel, rule: str = "best", form: Any = "plain") -> None:
        self.model, self.rule, self.form = model, rule, form

    def token_score(
        self,
        batch: str | Sequence[str],
        surprisal: bool = False,
        prob: bool = False,
        base_two: bool = False,
        rank: bool = False,
        bow_correction: bool = False,
    ) -> list[list[tuple[Any, ...]]]:
        """`(token, score)` of every token of every text.

        Args:
            batch: a text or some texts, each a document of its own.
            surprisal: minus log-probabilities instead of log-probabilities.
            prob: probabilities instead of log-probabilities.
            base_two: bits instead of nats.
            rank: `(token, score, rank)`; 1 = the most likely token.
            bow_correction: correct for word boundaries, in the first and the last token of a word.

        Raises:
            ValueError: `prob` with `surprisal` or with `base_two`.
        """
        found: list[list[tuple[Any, ...]]] = []
        for rows in self._read(batch, surprisal, prob, base_two):
            scores: list[tuple[Any, ...]] = []
            before = 0.0  # -log P(what follows begins a word) at the word's start, bits
            for row in rows:
                pieces = row["pieces"]
                bits = [piece["bits"] for piece in pieces]
                after = before + row["surprisal"] - row["surprisal_plain"]
                if bow_correction:
                    bits[0] -= before
                    bits[-1] += after
                before = after
                for piece, cost in zip(pieces, bits, strict=True):
                    score = _score(cost, surprisal, prob, base_two)
                    scores.append((piece["piece"], score, *([piece["rank"]] if rank else [])))
            found.append(scores)
        return found

    def word_score(
        self,
        batch: str | Sequence[str],
        surprisal: bool = False,
        prob: bool = False,
        base_two: bool = False,
        bow_correction: bool = False,
    ) -> list[list[tuple[str, float]]]:
        """`(word, score)` of every word of every text: of a word's tokens, the joint score.

        It is what minicons' `word_score_tokenized` says of `str.split` with `bos_token=True`. The
        arguments are those of `token_score`.

        Raises:
            ValueError: `prob` with `surprisal` or with `base_two`.
        """
        column = "surprisal" if bow_correction else "surprisal_plain"
        return [
            [(row["word"], _score(row[column], surprisal, prob, base_two)) for row in rows]
            for rows in self._read(batch, surprisal, prob, base_two)
        ]

    def _read(
        self, batch: str | Sequence[str], surprisal: bool, prob: bool, base_two: bool
    ) -> list[list[dict[str, Any]]]:
        """The rows of the model's table, text by text."""
        if prob and (surprisal or base_two):
            raise ValueError("prob is neither a surprisal nor a logarithm: give it alone")
        texts = [batch] if isinstance(batch, str) else list(batch)
        table = self.model.score_many(texts, rule=self.rule, form=self.form, stats=("pieces",))
        found: list[list[dict[str, Any]]] = [[] for _ in texts]
        for row in table.to_pylist():
            found[row["doc_id"]].append(row)
        return found


def _score(bits: float, surprisal: bool, prob: bool, base_two: bool) -> float:
    if prob:
        return float(np.exp2(-bits))
    return (bits if surprisal else -bits) * (1.0 if base_two else math.log(2))
