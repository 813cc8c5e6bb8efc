"""The tree of all settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlm.extensions import Extensions
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

    size: Literal["tiny", "small", "awd"] = "tiny"
    """tiny: minutes; small: one or two hours on a CPU; awd: AWD-LSTM, for a GPU."""
    rule: Literal["default", "best"] = "default"
    """Settings of adaptation; best: the rule that gains most, slower."""
    corpus: str = "pydocs"
    """pydocs, wikitext-2[-raw], wikitext-103[-raw], or a folder or file: in WikiText form, or plain
    text, one article per file."""
    out: Path | None = None
    """The run folder; default runs/<corpus>."""
    stages: tuple[Literal["lm", "meta", "evaluate", "draw"], ...] = (
        "lm",
        "meta",
        "evaluate",
        "draw",
    )
    """What to run: language model, update rule, scores, pictures. Without lm, the model is that
    of the run folder."""
    resume: bool = False
    """Continue an interrupted run with its own settings."""
    overwrite: bool = False
    """Replace the run that the folder holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA if there is one."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice, after stage 1 one for models under 256 units."""
    memory_gb: float = 0.0
    """Gigabytes that a run may use, of the GPU if it computes there; what needs more is refused
    before it begins. 0 = three quarters of what is free."""
    seed: int = 0
    """Seed of initialisation, data order, dropout and bootstrap."""
    checkpoint_minutes: float = 5.0
    """Minutes between two saves of unfinished work in any stage; Ctrl-C and SIGTERM save, too."""
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lm: LMTrainingConfig = field(default_factory=LMTrainingConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    extensions: Extensions = field(default_factory=Extensions)
