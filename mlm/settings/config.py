"""settings.config"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlm.settings.sections import (
    AdaptConfig,
    EvaluationConfig,
    LMTrainingConfig,
    MetaConfig,
    ModelConfig,
    TextConfig,
)


@dataclass(frozen=True)
class Config:
    """Train a language model that learns while it reads, evaluate it, draw it."""

    preset: str = "pydocs"
    """Sizes: pydocs (minutes), small (one CPU hour or two), awd (AWD-LSTM, a GPU); best: small
    with the rule that gains most."""
    corpus: str = "pydocs"
    """pydocs, wikitext-2[-raw], wikitext-103[-raw], or a directory or file in WikiText form."""
    out: Path | None = None
    """The run folder; default runs/<corpus>."""
    stages: tuple[Literal["lm", "meta", "evaluate", "draw"], ...] = (
        "lm",
        "meta",
        "evaluate",
        "draw",
    )
    """What to run, in this order; later stages take the earlier ones from the run folder."""
    resume: bool = False
    """Continue an interrupted run of the same settings."""
    overwrite: bool = False
    """Replace the run that the folder holds already."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA if there is one."""
    threads: int = 0
    """CPU threads of stage 1; 0 = PyTorch's choice."""
    seed: int = 0
    """Seeds initialisation, data order, dropout and bootstrap."""
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lm: LMTrainingConfig = field(default_factory=LMTrainingConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
