"""Word coupling: words that articles use together move together in the output layer.

    logits = T L (P h) + b        T = I + Q Q^T

L (V, E) is the output layer's own matrix of a lane in the basis P (`mlm.models.low_rank`),
rewritten while reading; Q (V, S) is shared and fixed. A gradient step on L moves the logits along
T (T g), so that words which share a direction of Q move together. Q comes from the training
articles: with n_av the occurrences of word v in article a of N_a words and q_v its share in all,

    x_av = sign(r) log(1 + |r|),  r = (n_av - N_a q_v) / sqrt(N_a q_v)

and the columns of Q are the S leading right singular vectors of x: a latent semantic analysis
(Deerwester et al. 1990) of Pearson residuals. theta_0 is the same model with and without T.

Letters: A articles, V vocabulary, E embedding, S directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Making, Plan, Told
from mlm.models.language_model import Weights
from mlm.models.low_rank import BASIS, LOW, fold_weights
from mlm.text.streams import Segment, Text

ARTICLES = 4_000
"""Articles that are looked at, at most."""
SHORTEST = 200
"""Tokens an article must have to count, unless none has."""
COUPLING = "word_coupling/directions"
"""Q among the weights."""


def output_layer_problem(flag: str, plan: Plan) -> list[str]:
    """Why what needs an output layer in a basis of its own cannot work in such a run."""
    found = []
    if plan.folded is not None and "softmax" not in plan.folded:
        found.append(
            f"{flag} needs --dynamic softmax.low with a --rank of at least the LSTM's "
            "outputs, no adaptive softmax, and no embedding that adapts"
        )
    if plan.learn != ("rule",):
        found.append(f"{flag} goes with --meta.learn rule only")
    return found


@dataclass(frozen=True)
class WordCoupling(Extension):
    """Words that articles use together move together."""

    directions: int = 0
    """Directions in which words that articles use together move together in the output layer;
    0 = none. They need `softmax.low` at full rank."""
    name: ClassVar[str] = "word_coupling"
    makes_base: ClassVar[bool] = True

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return self.directions > 0

    def problems(self, plan: Plan) -> Sequence[str]:
        """It needs an output layer in a basis of its own."""
        return output_layer_problem("--word-coupling.directions", plan)

    def fold(self, base: AdaptationBase, making: Making) -> AdaptationBase:
        """With Q of the training articles; the static model is the same."""
        vocabulary = len(base.weights["softmax.bias"])
        found = coupling_of(making.corpus, vocabulary, self.directions)
        return couple(base, found)

    def before(
        self, weights: Weights, value: Any, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """The coupling."""
        return told._replace(terms=told.terms._replace(coupling=weights[COUPLING]))


def coupling_of(text: Text, vocabulary: int, directions: int) -> Tensor:
    """Q (V, S), orthonormal columns; S is at most the number of articles."""
    long = [a for a in text.articles if len(a) >= SHORTEST] or list(text.articles)
    counts_AV = np.array([np.bincount(a, minlength=vocabulary) for a in long[:ARTICLES]], float)
    words_A1 = counts_AV.sum(1, keepdims=True)
    share_V = (counts_AV.sum(0) + 1) / (counts_AV.sum() + vocabulary)
    residual_AV = (counts_AV - words_A1 * share_V) / np.sqrt(words_A1 * share_V)
    x_AV = np.sign(residual_AV) * np.log1p(np.abs(residual_AV))
    values_A, vectors_AA = np.linalg.eigh(x_AV @ x_AV.T)
    kept = values_A > 1e-9 * values_A[-1]
    sizes, sides = np.sqrt(values_A[kept][::-1]), vectors_AA[:, kept][:, ::-1]
    found_VS = x_AV.T @ sides[:, :directions] / sizes[:directions]
    return torch.from_numpy(np.ascontiguousarray(found_VS))


def uncoupled(x_V: Tensor, coupling: Tensor) -> Tensor:
    """T^-1 x = x - Q (I + Q^T Q)^-1 Q^T x, for columns x (V, ...) and any Q."""
    inner_SS = torch.eye(coupling.shape[1], dtype=coupling.dtype, device=coupling.device)
    inner_SS = inner_SS + coupling.t() @ coupling
    return x_V - coupling @ torch.linalg.solve(inner_SS, coupling.t() @ x_V)


def couple(base: AdaptationBase, coupling: Tensor) -> AdaptationBase:
    """The base whose output layer moves coupled words together; the model is the same.

    Raises:
        ValueError: the output layer does not adapt in a basis of its own.
    """
    weights = fold_weights(base.weights, base.dynamic)
    if "softmax" + BASIS not in weights:
        raise ValueError("the output layer does not adapt in a basis of its own")
    low = "softmax" + LOW
    coupling = coupling.to(weights[low])
    weights |= {low: uncoupled(weights[low], coupling), COUPLING: coupling}
    return dataclasses.replace(base, weights=weights)
