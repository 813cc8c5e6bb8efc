"""The same functions on a CUDA device: equal to the CPU in float64, and stage 1 in bfloat16."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from worlds import EOS, articles, segments, tiny_base

from mlm.reading.meta_gradient import meta_gradient
from mlm.reading.scoring import score_articles
from mlm.reading.step import begin
from mlm.rules.gates import LinearGates
from mlm.settings.config import Config
from mlm.settings.sections import LMTrainingConfig, ModelConfig
from mlm.store.run_folder import RunFolder
from mlm.text.streams import Text
from mlm.training.language_model import LMTrainer, shape_of, train_lm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("features", [("fisher", "loss", "age"), ("fisher", "gradient")])
def test_scores_and_meta_gradient_equal_the_cpu(features) -> None:
    here = tiny_base()
    there = here.to("cuda")
    rule = LinearGates(features=features)
    phi = rule.start_at_rms(here, 0.02, 0.05)
    phi_there = {n: p.cuda() for n, p in phi.items()}
    bound, bound_there = rule.bind(phi, here), rule.bind(phi_there, there)
    texts = articles((23, 11, 1, 17))
    a = score_articles(here, bound, texts, EOS, 3).nll
    b = score_articles(there, bound_there, texts, EOS, 3).nll
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)
    pieces = segments(here, (23, 11, 17), 2, 6)
    want = meta_gradient(here, bound, phi, begin(here, 2), pieces)
    moved = [p.to(torch.device("cuda")) for p in pieces]
    for mode in ("reverse", "checkpoint", "forward"):
        got = meta_gradient(there, bound_there, phi_there, begin(there, 2), moved, mode)
        for name, gradient in want.gradients.items():
            torch.testing.assert_close(got.gradients[name].cpu(), gradient, rtol=1e-8, atol=1e-12)


def test_stage_1_learns_on_the_gpu(tmp_path) -> None:
    lm = dataclasses.replace(LMTrainingConfig(), epochs=30, lanes=4, segment=16, validations=2)
    config = Config(model=ModelConfig(embedding=16, hidden=16), lm=lm)
    text = Text([np.tile(np.arange(8), 40)] * 8, 8 * 320, EOS)
    device = torch.device("cuda")
    trainer = LMTrainer(config, shape_of(config, 8), text, device)
    train_lm(trainer, config, text, RunFolder(tmp_path), "v", quiet=True)
    losses = [row["valid_loss"] for row in RunFolder(tmp_path).rows()]
    assert losses[-1] < 0.7 * losses[0]
