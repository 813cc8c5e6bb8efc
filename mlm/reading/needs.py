"""Peak memory of lanes that read, in bytes, from the sizes of a model and a rule alone.

The coefficients are those of the operations as they are written. Letters: B lanes, M tokens per
segment, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mlm import kernels
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension, Extent
from mlm.models.recurrent import BaseModel, RecurrentLM
from mlm.models.snail import SnailShape
from mlm.reading.cache import CacheSetting
from mlm.rules.protocol import Bound

FLOAT = 4


def fused(device: torch.device) -> bool:
    """Whether the compiled kernels serve there."""
    return device.type == "cpu" and kernels.usable(torch.zeros(1))


def hidden_bytes(model: BaseModel, lanes: int, steps: int) -> float:
    """Hidden states of a segment with what their gradient needs."""
    if isinstance(model, SnailShape):
        positions = lanes * (model.context + steps)
        layout = model.layer_layout().values()
        widths = sum(size[1] + 4 * size[0] for size, _ in layout if len(size) == 2)
        attention = 4 * lanes * steps * (model.context + steps) * model.layers
        return FLOAT * (positions * widths + attention)
    assert isinstance(model, RecurrentLM)
    widths = sum(20 * hidden + 2 * inputs for inputs, hidden in model.layer_sizes())
    return FLOAT * lanes * steps * widths


def output_bytes(
    model: BaseModel, lanes: int, steps: int, each: float, tail_shares: Sequence[float] = ()
) -> float:
    """Logits of a segment, `each` copies of 4 bytes, where the fused softmax does not serve.

    `tail_shares`: of an adaptive softmax, which share of the tokens each tail has; () = all.
    """
    head, *tails = model.clusters()
    shares = tail_shares or (1.0,) * len(tails)
    rows = head[1] + len(tails)
    rows += sum(share * (hi - lo) for share, (lo, hi, _) in zip(shares, tails, strict=True))
    return FLOAT * each * lanes * steps * rows


def segment_bytes(
    model: BaseModel, extent: Extent, by_kernels: bool, tail_shares: Sequence[float] = ()
) -> float:
    """A segment read under weights of the lanes' own, beside these and their gradients.

    `by_kernels`: whether the compiled kernels serve (`fused`).
    """
    lanes, steps = extent.lanes, extent.segment
    total = hidden_bytes(model, lanes, steps)
    if by_kernels and not model.cutoffs:
        return total + extent.logits
    return total + output_bytes(model, lanes, steps, 5.0, tail_shares)


def weights_bytes(lanes: int, kept: int, own: int) -> float:
    """Weights of lanes that a rule writes: before, after and spare, a reset copy, the gradient.

    Args:
        kept: numbers that a lane holds, weights and what the rule keeps beside them.
        own: numbers of the weights alone.
    """
    return FLOAT * lanes * (4.0 * kept + own)


def cache_bytes(extent: Extent, window: float) -> float:
    """The rings of all lanes, a copy, and the products with what they hold."""
    slots = window + extent.segment
    ring = 2 * (FLOAT * extent.width + 8) + extent.segment * 5 * FLOAT
    return extent.lanes * slots * ring


def distribution_bytes(extent: Extent, cached: bool) -> float:
    """Log-probabilities (B, M, V) of a segment with what they come from."""
    return FLOAT * (7.0 if cached else 3.0) * extent.lanes * extent.segment * extent.vocabulary


def extension_bytes(extensions: Iterable[Extension], extent: Extent) -> float:
    """What extensions hold of the lanes."""
    return sum(extension.lane_bytes(extent) for extension in extensions)


def reading_bytes(
    base: AdaptationBase,
    rule: Bound | None,
    cache: Sequence[CacheSetting],
    lanes: int,
    longest: int,
    full: bool,
) -> float:
    """Lanes that read under a rule, beside what all of them share.

    Args:
        rule: None = static.
        longest: tokens that a lane reads at most before it begins anew.
        full: whether the log-probabilities of all tokens are wanted.
    """
    model, device = base.model, base.weights[base.dynamic[0]].device
    assert isinstance(model, BaseModel)
    base = base if rule else base.of_model()
    own = sum(w.numel() for w in base.start().values()) if rule else 0
    kept = sum(w.numel() for w in rule.start().values()) if rule else 0
    sizes = (model.vocabulary, model.embedding, kept, 1.0)
    extent = Extent(lanes, base.segment, lanes * longest, longest, lanes, *sizes)
    total = weights_bytes(lanes, kept, own) + segment_bytes(model, extent, fused(device))
    total += extension_bytes(base.extensions, extent)
    if full:
        total += distribution_bytes(extent, bool(cache))
    return total + sum(cache_bytes(extent, setting.window) for setting in cache)
