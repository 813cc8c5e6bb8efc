"""The continuous neural cache (Grave, Joulin & Usunier 2017, arXiv 1612.04426): a rival that
remembers words beside the model instead of in its weights, alone or on top of any update rule.

    p(w) = (1 - lambda) p_model(w) + lambda p_cache(w)
    p_cache(w) ~ sum over the last W tokens i of exp(theta h_t . h_i) [the token after i is w]

h is what the softmax sees. Letters: B lanes, M tokens per segment, E width of h, W window, S slots.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.text.streams import Segment

EMPTY = -1
"""The word of a slot that holds nothing."""


@dataclass(frozen=True)
class CacheSetting:
    """The three numbers of a cache.

    Raises:
        UserError: a value that makes no mixture.
    """

    theta: float
    """Flatness: 0 counts words, large values trust the most similar past alone."""
    weight: float
    """lambda: share of the cache in the mixture."""
    window: int
    """W: so many tokens of the past are remembered."""

    def __post_init__(self) -> None:
        if not (0 <= self.theta < math.inf and 0 < self.weight < 1 and self.window >= 1):
            raise UserError(
                f"cache with theta {self.theta}, weight {self.weight}, window {self.window}: theta "
                "must be finite and at least 0, the weight in (0, 1), the window at least 1"
            )


class Cache:
    """What each of B lanes remembers: pairs (h_i, token after i), in a ring written in place.

    Strictly causal: token t sees the W pairs before its own, those of its own segment included.
    Any number of settings share the ring and its products with h.
    """

    def __init__(self, settings: Sequence[CacheSetting], like_BME: Tensor) -> None:
        """An empty cache; `like_BME` has the shape, type and device of the outputs to come.

        Raises:
            UserError: the model offers no output.
        """
        lanes, segment, width = like_BME.shape
        if not width:
            raise UserError(
                "a neural cache compares what the softmax sees, and this model does not offer it; "
                "let its forward return (logits, state, output)"
            )
        slots = max(s.window for s in settings) + segment
        self.settings = tuple(settings)
        self.keys_BSE = like_BME.new_zeros(lanes, slots, width)
        self.words_BS = torch.full((lanes, slots), EMPTY, device=like_BME.device)
        self.at = 0
        """Slot of the next token, the same in every lane."""

    def select(self, lanes: Tensor) -> Cache:
        """The cache of some lanes (their indices)."""
        some = copy.copy(self)
        some.keys_BSE, some.words_BS = self.keys_BSE[lanes], self.words_BS[lanes]
        return some

    def copy(self) -> Cache:
        """The same cache; what either remembers, the other does not notice."""
        return self.select(torch.arange(len(self.words_BS), device=self.words_BS.device))

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, for files."""
        return {"keys": self.keys_BSE, "words": self.words_BS, "at": torch.tensor(self.at)}

    @staticmethod
    def of(settings: Sequence[CacheSetting], tensors: Mapping[str, Tensor]) -> Cache:
        """The cache that remembers these `tensors`."""
        found = Cache(settings, tensors["keys"][:, :1])
        found.keys_BSE, found.words_BS = tensors["keys"], tensors["words"]
        found.at = int(tensors["at"])
        return found

    @torch.no_grad()
    def spread(self, log_p_BMV: Tensor, output_BME: Tensor, segment: Segment) -> list[Tensor]:
        """Log-probabilities (B, M, V) of each setting's mixture; nothing is remembered.

        Args:
            log_p_BMV: the model's own.
            output_BME, segment: as in `mix`.
        """
        ahead = self.copy()
        age_MS = ahead._write(output_BME, segment)
        scores_BMS = output_BME @ ahead.keys_BSE.transpose(1, 2)
        words_BMS = ahead.words_BS.clamp(min=0).unsqueeze(1).expand_as(scores_BMS)
        found = []
        for setting in self.settings:
            seen_BMS = (age_MS <= setting.window) & (ahead.words_BS != EMPTY).unsqueeze(1)
            logits_BMS = (setting.theta * scores_BMS).masked_fill(~seen_BMS, -math.inf)
            p_BMS = logits_BMS.softmax(2).nan_to_num(0)
            cache_BMV = torch.zeros_like(log_p_BMV).scatter_add_(2, words_BMS, p_BMS)
            mixed_BMV = (1 - setting.weight) * log_p_BMV.exp() + setting.weight * cache_BMV
            found.append(mixed_BMV.log().where(seen_BMS.any(2, keepdim=True), log_p_BMV))
        return found

    @torch.no_grad()
    def mix(self, nll_BM: Tensor, output_BME: Tensor, segment: Segment) -> list[Tensor]:
        """Losses (B, M) in nats of each setting's mixture; the segment is remembered.

        Args:
            nll_BM: the model's own losses, which stay where nothing is remembered yet and where
                the mask is False.
            output_BME: h. Lanes flagged `segment.new` forget everything first.
        """
        age_MS = self._write(output_BME, segment)
        scores_BMS = output_BME @ self.keys_BSE.transpose(1, 2)
        hit_BMS = segment.targets.unsqueeze(2) == self.words_BS.unsqueeze(1)
        found: dict[tuple[float, int], Tensor] = {}
        mixed = []
        for setting in self.settings:
            key = setting.theta, setting.window
            if key not in found:
                seen_BMS = (age_MS <= setting.window) & (self.words_BS != EMPTY).unsqueeze(1)
                found[key] = _log_probability(setting.theta * scores_BMS, seen_BMS, hit_BMS)
            loss_BM = _mixture(nll_BM, found[key], setting.weight)
            mixed.append(torch.where(segment.mask, loss_BM, nll_BM))
        return mixed

    def _write(self, output_BME: Tensor, segment: Segment) -> Tensor:
        """Remember a segment over the oldest slots.

        Returns:
            (M, S) how many tokens before each token of the segment a slot was written; its own
            and those of tokens to come are older than any window.
        """
        slots, tokens = self.words_BS.shape[1], torch.arange(output_BME.shape[1])
        now_M = ((tokens + self.at) % slots).to(output_BME.device)
        self.words_BS[segment.new] = EMPTY
        self.keys_BSE[:, now_M] = output_BME
        self.words_BS[:, now_M] = segment.targets.where(segment.mask, EMPTY)
        self.at = (self.at + len(tokens)) % slots
        age_MS = (now_M.unsqueeze(1) - torch.arange(slots, device=now_M.device)) % slots
        return age_MS.where(age_MS > 0, slots)


def _log_probability(logits_BMS: Tensor, seen_BMS: Tensor, hit_BMS: Tensor) -> Tensor:
    """log p_cache(target), (B, M); NaN where nothing is seen. `logits_BMS` is overwritten."""
    total_BM = logits_BMS.masked_fill_(~seen_BMS, -math.inf).logsumexp(2)
    return logits_BMS.masked_fill_(~hit_BMS, -math.inf).logsumexp(2) - total_BM


def _mixture(nll_BM: Tensor, log_cache_BM: Tensor, weight: float) -> Tensor:
    """-log((1 - weight) p_model + weight p_cache); p_model alone where p_cache is NaN."""
    mixed = torch.logaddexp(math.log1p(-weight) - nll_BM, math.log(weight) + log_cache_BM)
    return torch.where(log_cache_BM.isnan(), nll_BM, -mixed)
