"""Words that an article uses together: what is learned at one moves the others, too.

    logits = T L (P h) + b        T = I + Q Q^T

L (V, E) is the output layer's own matrix of a lane in the basis P (`mlm.models.base.turned`), rewritten
while reading; Q (V, S) is shared and fixed. A gradient step on L moves the logits along
T (T g), so that words which share a direction of Q move together. Q comes from the training
articles: with n_av the occurrences of word v in article a of N_a words and q_v its share in all,

    x_av = sign(r) log(1 + |r|),  r = (n_av - N_a q_v) / sqrt(N_a q_v)

and the columns of Q are the S leading right singular vectors of x: a latent semantic analysis
(Deerwester et al. 1990) of Pearson residuals. theta_0 is the same model with and without T.

Letters: A articles, V vocabulary, E embedding, S directions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.models.base import RELATED
from mlm.models.language_model import Weights
from mlm.models.low_rank import BASIS, LOW, whole
from mlm.text.streams import Text

ARTICLES = 4_000
"""Articles that are looked at, at most."""


SHORTEST = 200
"""Tokens an article must have to count, unless none has."""


def related_words(text: Text, vocabulary: int, directions: int) -> Tensor:
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


def untangled(x_V: Tensor, related: Tensor) -> Tensor:
    """T^-1 x = x - Q (I + Q^T Q)^-1 Q^T x, for columns x (V, ...) and any Q."""
    inner_SS = torch.eye(related.shape[1], dtype=related.dtype, device=related.device)
    inner_SS = inner_SS + related.t() @ related
    return x_V - related @ torch.linalg.solve(inner_SS, related.t() @ x_V)


def no_basis(flag: str) -> UserError:
    """What to say where an option needs an output layer in a basis of its own."""
    return UserError(
        f"{flag} needs --dynamic softmax.low with a --rank of at least "
        "the LSTM's outputs, no adaptive softmax, and no embedding that adapts"
    )


def relate(weights: Weights, dynamic: tuple[str, ...], related: Tensor) -> Weights:
    """Weights whose output layer moves related words together; the model is the same.

    Raises:
        UserError: the output layer does not adapt in a basis of its own.
    """
    weights = whole(weights, dynamic)
    name = "softmax"
    if name + BASIS not in weights:
        raise no_basis("--adapt.related")
    low, q_VS = weights[name + LOW], related.to(weights[name + LOW].dtype)
    weights[name + LOW] = untangled(low, q_VS)
    weights[RELATED] = q_VS
    return weights
