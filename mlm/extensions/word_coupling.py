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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mlm.kernels import buffers
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Extent, Making, Need, Plan, Told
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

    def making(self, text: Extent, corpus: Extent) -> Need:
        """x x^T with its eigenvectors, blocks of x, the text's counts, and Q."""
        articles, vocabulary = min(ARTICLES, corpus.articles), corpus.vocabulary
        block = min(buffers.NUMBERS, articles * vocabulary)
        counted = corpus.text * min(1.0, articles / max(1, corpus.articles))
        directions = vocabulary * min(self.directions, articles)
        return Need(8 * (4 * articles**2 + 3 * block + 3 * counted + 2 * directions))

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
    """Q (V, S), orthonormal columns; S is at most the number of articles.

    x is made a block of the vocabulary at a time: no array is larger than `buffers.NUMBERS`, or
    A x A.
    """
    long = [a for a in text.articles if len(a) >= SHORTEST] or list(text.articles)
    counts = _Counts(long[:ARTICLES], vocabulary)
    inner_AA = np.zeros((counts.articles, counts.articles))
    for x_AV, _ in counts.residuals():
        inner_AA += x_AV @ x_AV.T
    values_A, vectors_AA = np.linalg.eigh(inner_AA)
    kept = values_A > 1e-9 * values_A[-1]
    sizes, sides = np.sqrt(values_A[kept][::-1]), vectors_AA[:, kept][:, ::-1]
    sizes, sides = sizes[:directions], sides[:, :directions]
    found_VS = np.empty((vocabulary, len(sizes)))
    for x_AV, words in counts.residuals():
        found_VS[words] = x_AV.T @ sides / sizes
    return torch.from_numpy(found_VS)


class _Counts:
    """How often every word comes in every article: only what is not zero."""

    def __init__(self, articles: Sequence[np.ndarray], vocabulary: int) -> None:
        self.articles, self.vocabulary = len(articles), vocabulary
        found = [np.unique(np.asarray(a), return_counts=True) for a in articles]
        article_N = np.repeat(np.arange(len(found)), [len(words) for words, _ in found])
        word_N = np.concatenate([words for words, _ in found]).astype(np.int64)
        count_N = np.concatenate([counts for _, counts in found])
        order = np.argsort(word_N, kind="stable")
        self.article_N, self.word_N, self.count_N = (x[order] for x in (article_N, word_N, count_N))

    def residuals(self) -> Iterator[tuple[np.ndarray, slice]]:
        """x (A, words of a block) in float64, and which words they are."""
        words_A = np.bincount(self.article_N, self.count_N, self.articles)
        share_V = np.bincount(self.word_N, self.count_N, self.vocabulary) + 1
        share_V /= self.count_N.sum() + self.vocabulary
        block = max(1, buffers.NUMBERS // self.articles)
        for first in range(0, self.vocabulary, block):
            words = slice(first, min(first + block, self.vocabulary))
            lo, hi = np.searchsorted(self.word_N, [words.start, words.stop])
            x_AV = np.zeros((self.articles, words.stop - words.start))
            x_AV[self.article_N[lo:hi], self.word_N[lo:hi] - first] = self.count_N[lo:hi]
            expected_AV = words_A[:, None] * share_V[words]
            x_AV -= expected_AV
            x_AV /= np.sqrt(expected_AV, out=expected_AV)
            np.log1p(np.abs(x_AV, out=expected_AV), out=expected_AV)
            yield np.copysign(expected_AV, x_AV, out=x_AV), words


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
