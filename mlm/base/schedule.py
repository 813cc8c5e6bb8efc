"""The shape of a learning rate over a training: warm-up, then a cosine."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, warm_up: float = 0.0) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine to zero."""
    rise = max(1, round(warm_up * steps))
    if warm_up and step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
