"""Learning at once: within a segment the output layer predicts with what its words have taught.

Weights change after every segment, so a word that comes again within it would be as unexpected as
before. With e_s the gradient of the segment's loss by the logits at its word s, and the keys
k_s = P h_s, an output layer T L (P h) + b (`mlm.extensions.related`; T = I without related words) predicts by

    logits_t - a . T^2 sum_{s<t} e_s (k_s . (c . k_t) + d),

never with words it has not read. Were a_v c_j the rule's step size at L's weight (v, j), and a the
same for related words (then T a T = a T^2, which costs less and gained as much), that is what its
step at every word would do, all gradients taken at the weights of the segment's start: the dual
form of mini-batch test-time training (Sun et al. 2024, section 2.5), a linear attention within the
segment (fast weights: Schmidhuber 1992; Ba et al. 2016). d stands for the bias. a, c and d are the
nearest to the rule's steps (`mlm.reading.step.learning_at_once`); fitted to held-out text they gained no
more. The loss of the segment, and its gradient by which all weights change after it,
are those of these predictions, what is subtracted being a constant: words that were learned
already teach less. Where surprise counts (`mlm.extensions.surprise`), it does so in e_s, too. Where phrases
are remembered (`mlm.extensions.phrases`), e_s is subtracted from what follows the same context in the segment
again, too. Lanes read so
where `AdaptationBase.weights` hold a (`softmax.once.rows`) and c, d (`softmax.once.columns`); the static
model never does.

As no e_s is looked at again after other words have taught, a word that comes ten times would be
learned ten times: logits of a character that training never saw moved by a thousand. Therefore a
logit rises by -log p_t at most, to where its word would be as likely as all others together, and
falls by `MOST` at most. Words that are known gain by it, too.

Letters: B lanes, T time, I keys, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlm.extensions.surprise import taught_by
from mlm.kernels.bfloat16 import done, lowered, product
from mlm.kernels.buffers import take

MOST = 10.0
"""Nats by which a logit falls at most."""


def spread(x_V: Tensor, related: Tensor | None) -> Tensor:
    """T x for rows x (..., V)."""
    return x_V if related is None else x_V + (x_V @ related) @ related.t()


def alike(keys_BTI: Tensor, columns: Tensor) -> Tensor:
    """k_s . (c . k_t) + d for words t (rows) and s < t (columns), else 0: (B, T, T)."""
    inner_BTT = (keys_BTI * columns[:-1]) @ keys_BTI.transpose(1, 2) + columns[-1]
    return inner_BTT.tril(-1)


def twice(related: Tensor) -> Tensor:
    """R (V, S) for which T^2 = I + R Q^T."""
    inner = related.t() @ related
    return related @ inner.add_(torch.eye(len(inner), dtype=inner.dtype, device=inner.device) * 2)


class Teaching(NamedTuple):
    """How words teach at once; all of it shared by the lanes."""

    rows: Tensor
    """(V): a."""
    columns: Tensor
    """(I + 1): c and d."""
    related: Tensor | None = None
    """(V, S): Q; None = words are not related."""
    twice: Tensor | None = None
    """(V, S): R."""
    again: Tensor | None = None
    """(B, T, T), of the lanes: how much word s < t teaches where the context of t was that of s,
    in units of its error e_s (`mlm.extensions.phrases`)."""
    slope: Tensor | None = None
    """(2): how a token's loss counts in e (`mlm.extensions.surprise`)."""

    def of(self, lanes: slice) -> Teaching:
        """For some of the lanes."""
        return self if self.again is None else self._replace(again=self.again[lanes])


def taught(error_BTV: Tensor, keys_BTI: Tensor, by: Teaching) -> Tensor:
    """What the logits lose before it is bounded, (B, T, V), of errors e; no gradient."""
    alike_BTT = alike(keys_BTI, by.columns)
    lower_BTV = lowered(error_BTV)
    lost_BTV = product(alike_BTT, lower_BTV, take(tuple(error_BTV.shape), error_BTV))
    if by.related is not None and by.twice is not None:
        along_NS = alike_BTT.new_empty(alike_BTT[..., 0].numel(), by.related.shape[1])
        product(lower_BTV.flatten(0, 1), by.related, along_NS)
        along_BTS = torch.bmm(alike_BTT, along_NS.view(*alike_BTT.shape[:2], -1))
        product(along_BTS.flatten(0, 1), by.twice.t(), lost_BTV.flatten(0, 1), add=True)
    lost_BTV.mul_(by.rows)
    if by.again is not None:  # e weighs 1/T
        product(by.again * by.again.shape[1], lower_BTV, lost_BTV, add=True)
    done(lower_BTV, error_BTV)
    return lost_BTV


def corrected(
    logits_BTV: Tensor,
    targets_BT: Tensor,
    keys_BTI: Tensor,
    by: Teaching,
    share_BT: Tensor,
) -> Tensor:
    """Logits (B, T, V) that have learned at once, of a segment of T tokens.

    Args:
        share_BT: what each token's loss weighs.
    """
    with torch.no_grad():
        log_p = logits_BTV.log_softmax(-1)
        one_hot = F.one_hot(targets_BT, logits_BTV.shape[-1])
        nll_BT = -log_p.gather(-1, targets_BT.unsqueeze(-1)).squeeze(-1)
        error_BTV = log_p.exp() - one_hot
        error_BTV *= taught_by(nll_BT, share_BT, by.slope).unsqueeze(-1)
        lost = taught(error_BTV, keys_BTI, by)
        lost = torch.maximum(lost.clamp(max=MOST), log_p)
    return logits_BTV - lost
