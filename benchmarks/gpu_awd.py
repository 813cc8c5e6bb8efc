"""`--size awd` on text of the form of WikiText-103, for as long as the time allows.

The text is random: 267,735 types in the shares of Zipf's law, articles of some 3,600 tokens with
line ends. What is measured is speed and memory; a loss falls only towards the text's entropy.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_speed import peak, reset_peak
from benchmarks.timing import clock
from mlm.models.base import AdaptationBase, choose_dynamic
from mlm.reading.scoring import score_articles
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import as_parameters
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.presets import settings
from mlm.store.run_folder import RunFolder
from mlm.text.streams import Text
from mlm.training.fisher import estimate_fisher
from mlm.training.language_model import LMTrainer, shape_of
from mlm.training.meta import MetaTrainer

EOS = 0
TYPES = 267_735
WORDS = 103_227_021
"""Of the training text of WikiText-103, for which the days are predicted."""
VOCABULARY = "synthetic"
MODES = ("reverse", "checkpoint", "forward")
SMALL: dict[str, Any] = {
    "model.embedding": 8, "model.hidden": 8, "model.layers": 1, "model.adaptive_above": 50,
    "model.cutoffs": (20, 60), "lm.lanes": 4, "lm.segment": 10, "meta.lanes": 2,
    "meta.unroll": 3,
}  # fmt: skip
"""For tests."""


def text(types: int, articles: int, length: int, seed: int = 0) -> Text:
    """Articles of about `length` tokens; word k has a share of 1/k."""
    random = np.random.default_rng(seed)
    shares = 1 / np.arange(1, types)
    below = np.cumsum(shares / shares.sum())
    found = []
    for size in random.integers(length // 2, 3 * length // 2, size=articles):
        words = 1 + np.searchsorted(below, random.random(size)).clip(max=types - 2)
        words[29::30] = EOS
        found.append(words.astype(np.int64))
    return Text(found, sum(map(len, found)), EOS)


def _config(small: bool) -> Config:
    return replaced(settings("awd"), SMALL if small else {})


def _text(small: bool) -> tuple[int, Text]:
    """(types, text)."""
    types = 100 if small else TYPES
    return types, text(types, *((8, 60) if small else (200, 3600)))


def _trainer(device: torch.device, small: bool) -> LMTrainer:
    types, own = _text(small)
    config = _config(small)
    return LMTrainer(config, shape_of(config, types), own, device)


def stage_1(
    device: torch.device, small: bool, out: Path, left: Callable[[], float]
) -> dict[str, Any]:
    """Steps of stage 1 until a tenth of the time is left, a checkpoint, and one step from it."""
    whole = left()
    reset_peak(device)
    trainer = _trainer(device, small)
    losses, tokens, begin = [trainer.train_step()[0]], 0, clock()
    most = 5 if small else math.inf
    while left() > 0.2 * whole and len(losses) < most:
        loss, count = trainer.train_step()
        losses.append(loss)
        tokens += count
    rate = tokens / (clock() - begin) if tokens else None
    found: dict[str, Any] = {
        "steps": len(losses),
        "first loss": losses[0],
        "last loss": losses[-1],
        "precision": str(trainer.precision),
        "tokens/s": rate,
        "peak bytes": peak(device),
    }
    if rate and not small:
        found["days of 40 epochs of WikiText-103"] = 40 * WORDS / rate / 86_400
    run, start = RunFolder(out / "awd"), time.perf_counter()
    trainer.save(run, VOCABULARY)
    found["checkpoint bytes"] = run.checkpoint("lm_last").stat().st_size
    found["checkpoint seconds"] = time.perf_counter() - start
    if left() > 0.05 * whole:
        again = _trainer(device, small)
        again.load(run, VOCABULARY)
        found["loss of a step after --resume"] = again.train_step()[0]
        found["loss of the same step"] = trainer.train_step()[0]
    return found


def stage_2(
    device: torch.device, small: bool, out: Path, left: Callable[[], float]
) -> dict[str, Any]:
    """Fisher, reading under RMS, and steps of stage 2 in every mode that fits."""
    config, (types, own) = _config(small), _text(small)
    trainer = _trainer(device, small)
    run = RunFolder(out / "awd")
    if run.checkpoint("lm_last").exists():
        trainer.load(run, VOCABULARY)
    adapt = config.adapt
    weights = trainer.model()
    dynamic = choose_dynamic(weights, adapt.dynamic)
    bare = AdaptationBase(trainer.shape, weights, dynamic, {}, math.log(types), adapt.update_every)
    del trainer
    found: dict[str, Any] = {"dynamic weights": sum(weights[n].numel() for n in dynamic)}
    reset_peak(device)
    begin = clock()
    words = 200 if small else 20_000
    base = estimate_fisher(bare, own, words, prior=adapt.fisher_prior)
    found["fisher"] = {"tokens/s": words / (clock() - begin), "peak bytes": peak(device)}
    found["rms"] = _reading(base, own, config, device)
    found["meta"] = {}
    for mode in MODES:
        if left() < 0:
            found["meta"][mode] = {"skipped": "time is out"}
            continue
        try:
            found["meta"][mode] = _meta(base, own, config, mode, device)
        except RuntimeError as error:  # out of memory is one
            found["meta"][mode] = {"error": str(error)[:500]}
    return found


def _reading(
    base: AdaptationBase, own: Text, config: Config, device: torch.device
) -> dict[str, Any]:
    """Some articles read once."""
    lanes = config.evaluation.lanes
    articles = [article[:600] for article in own.articles[:lanes]]
    bound = RMS().bind(as_parameters({"rate": 3e-3, "decay": 8e-3}, base), base)
    reset_peak(device)
    scores = score_articles(base, bound, articles, EOS, lanes)
    tokens = sum(map(len, articles))
    return {
        "tokens/s": tokens / scores.seconds,
        "loss": scores.total / tokens,
        "peak bytes": peak(device),
    }


def _meta(
    base: AdaptationBase, own: Text, config: Config, mode: str, device: torch.device
) -> dict[str, Any]:
    """Two steps of stage 2, the second timed."""
    meta = dataclasses.replace(config.meta, gradient=mode)  # type: ignore[arg-type]
    rule = LinearGates()
    reset_peak(device)
    trainer = MetaTrainer(base, rule, rule.start_at_rms(base, 3e-3, 8e-3), own, meta, 0)
    trainer.train_step()
    begin = clock()
    loss, tokens = trainer.train_step()
    seconds = clock() - begin
    return {"tokens/s": tokens / seconds, "loss": loss, "peak bytes": peak(device)}
