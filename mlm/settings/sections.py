"""The sections of the settings: text, model, both stages, adaptation, evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlm.base.names import PROTOCOLS, LearnedName


@dataclass(frozen=True)
class TextConfig:
    """Text and tokens."""

    vocabulary: Literal["bpe", "unigram", "word"] = "bpe"
    """SentencePiece BPE or unigram, or whole words."""
    vocabulary_size: int = 2000
    """Pieces; of whole words the most frequent so many, 0 = all."""
    train_words: int = 0
    """Use only so many words of the training split; 0 = all."""
    held_out: float = 0.1
    """Share of the training articles kept from stage 1 for stage 2."""
    data_dir: Path = Path("data/cache")
    """Where token files are cached."""


@dataclass(frozen=True)
class ModelConfig:
    """Short-term memory: the base model."""

    embedding: int = 128
    """Units of the tied embedding and of the last layer."""
    hidden: int = 128
    """Units of the other layers."""
    layers: int = 1
    """Number of layers (snail: of blocks)."""
    adaptive_above: int = 50_000
    """Vocabularies larger than this get an adaptive softmax."""
    cutoffs: tuple[int, ...] = (20_000, 60_000)
    """Ends of the adaptive softmax's head and tails (word ids); those beyond the size drop out."""
    cell: Literal["lstm", "qrnn", "snail"] = "lstm"
    """LSTM, QRNN, or snail: convolutions and attention over the last tokens, with as many
    weights as the LSTM."""
    context: int = 256
    """Tokens that snail sees before the present segment."""


@dataclass(frozen=True)
class LMTrainingConfig:
    """Stage 1: the language model."""

    epochs: float = 4.0
    """Passes of stage 1 over the training articles."""
    lanes: int = 32
    """Articles that stage 1 reads side by side."""
    segment: int = 64
    """Tokens per step of truncated back-propagation through time."""
    learning_rate: float = 4e-3
    """Peak rate of Adam in stage 1; short warm-up, cosine to zero."""
    weight_decay: float = 1.2e-6
    """Decoupled weight decay (AWD-LSTM's 1.2e-6 by default)."""
    clip: float = 1.0
    """Largest gradient norm."""
    dropout_embedding: float = 0.0
    """Whole words of the input embedding."""
    dropout_input: float = 0.1
    """Locked dropout on the input."""
    dropout_hidden: float = 0.1
    """Locked dropout between layers."""
    dropout_output: float = 0.1
    """Locked dropout before the softmax."""
    weight_drop: float = 0.0
    """DropConnect on the recurrent weights."""
    byte_noise: float = 0.01
    """Share of the training tokens that random bytes overwrite, so that characters which training
    never saw cost about 8 bits a byte; 0 = none. Whole words have no bytes."""
    ar: float = 0.0
    """Activation regularisation (AWD-LSTM: 2)."""
    tar: float = 0.0
    """Temporal activation regularisation (AWD-LSTM: 1)."""
    validations: int = 10
    """How often the validation loss is measured, the end included."""
    validation_words: int = 50_000
    """Words of the validation split read for it; 0 = all."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products. auto = bfloat16 where the processor multiplies it (AVX512-BF16, AMX);
    processors without AVX-512 cannot train in it."""
    init: Path | None = None
    """Run folder of a language model to go on from, with the same text and sizes."""
    through: Literal["none", "rms", "learned"] = "none"
    """Train the weights through the adaptation: every lane reads under weights of its own that a
    rule rewrites after each segment, and the loss of that reading is what is trained (float32, no
    dropout). rms = Krause's rule; learned = the one of --lm.through-run."""
    through_run: Path | None = None
    """Run folder whose stage 2 is done, of the same sizes and vocabulary: its first learned rule,
    its bases and its Fisher are read with."""
    through_rate: float = 3e-3
    """Step size of Krause's rule."""
    through_decay: float = 0.01
    """Decay of Krause's rule towards the trained weights."""


@dataclass(frozen=True)
class AdaptConfig:
    """Medium-term memory: what is rewritten, and how often."""

    dynamic: str = "lstm,softmax.bias"
    """Weights that adapt: all, lstm, output, bias, low (low-rank changes), or names such as
    softmax.low or lstm.*.recurrent, comma-separated."""
    rank: int = 32
    """Rank of low-rank changes; at most the matrix's inputs."""
    update_every: int = 20
    """M: tokens between two updates of the weights, 5 to 100."""
    fisher_words: int = 20_000
    """Training words the Fisher is estimated on."""
    fisher_prior: float = 0.04
    """Share of the Fisher, 0 to 1, that every weight takes from its tensor's mean. Rare words are
    hardly in a sample: without it RMS steps at their rows are 25 times the others'."""
    guard: float = 3.0
    """A lane that loses over a segment, per token, more than guessing would and so many nats more
    than theta_0 goes back to theta_0, and learns nothing for a while; 0 = never. Reported."""
    kernels: Literal["auto", "eager"] = "auto"
    """auto = compiled kernels (numba) on a CPU; eager = tensor operations only, same results."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the factors in the lanes' matrix products on a CPU. bfloat16 takes two thirds of the time
    where the processor multiplies it (AVX512-BF16, AMX) and moves losses by thousandths; on others
    float32 is used instead."""


@dataclass(frozen=True)
class MetaConfig:
    """Stage 2: the meta-learner."""

    rules: tuple[LearnedName, ...] = ("two_levels", "three_levels")
    """Rules that stage 2 trains: tensor_steps, weight_steps, two_levels, three_levels, unit_steps,
    four_levels, surprise, adaptive, mlp, lstm."""
    features: tuple[Literal["fisher", "loss", "age", "gradient", "distance"], ...] = (
        "fisher",
        "loss",
        "age",
    )
    """What the gates see besides a constant."""
    per_tensor: bool = True
    """Every tensor has its own gates; False = one set for all."""
    free_copy: bool = False
    """COPY learned apart; False = COPY is 1 - FLUSH."""
    fisher: Literal["feature", "flush", "off"] = "feature"
    """How the Fisher enters: as a feature of all gates, as the strength of FLUSH only (needs
    another --meta.start than rms or adam), or not at all."""
    hidden: int = 8
    """Hidden units of mlp and lstm."""
    start: str = "rms"
    """The rule whose behaviour training starts from, exactly: sgd, momentum, rms or adam (tuned on
    validation), or a learned rule that the run folder holds already."""
    learn: tuple[Literal["rule", "theta_0", "static"], ...] = ("rule",)
    """What is trained: the rule, the dynamic weights' initial values, the weights that never
    adapt; the last two end to end through the adaptation."""
    text: Literal["held_out", "training", "all"] = "held_out"
    """Which training articles: those held out from stage 1, those of stage 1, or both."""
    theta_0: Literal["gradient", "reptile"] = "gradient"
    """How initial values are learned: by the meta-gradient (MAML in effect), or by moving towards
    where reading led (Reptile)."""
    weight_rate: float = 1e-4
    """Peak rate of Adam on theta_0 and static weights."""
    ewc: float = 0.0
    """Strength of the penalty on leaving theta_0, weighted by the Fisher, in the meta-loss."""
    lanes: int = 8
    """Articles read side by side."""
    stream_share: float = 0.5
    """Share of the lanes that are never reset at article boundaries."""
    unroll: int = 40
    """Updates per meta-gradient."""
    gradient: Literal["auto", "reverse", "checkpoint", "forward", "second", "pes"] = "auto"
    """auto = the first of the next three that fits into memory, then fewer lanes. First order: the
    same meta-gradient from every update kept (reverse, fastest), from a snapshot now and then and
    the text between read twice (checkpoint), or along with the updates (forward: its memory does
    not grow with the unroll). second = exact, through the inner gradients too: slow. pes =
    persistent evolution strategies: no back-propagation, no bias by truncation, much noise; trains
    the rule only."""
    pes_pairs: int = 4
    """Antithetic pairs of perturbed rules that read side by side (pes)."""
    pes_sigma: float = 0.05
    """Standard deviation of a perturbation (pes)."""
    steps: int = 12
    """Meta-updates of stage 2, for every rule."""
    learning_rate: float = 0.1
    """Peak rate of Adam on the gates' parameters, which are logarithms; cosine to zero."""
    clip: float = 1.0
    """Largest meta-gradient norm."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Scoring and tuning."""

    rules: tuple[str, ...] = ("static", "sgd", "rms", "two_levels", "three_levels")
    """Rules to score: static, sgd, momentum, rms, adam, or trained ones; NAME+cache adds a neural
    cache."""
    cache_words: int = 2_000
    """Words that a neural cache remembers."""
    protocols: tuple[Literal["article", "stream"], ...] = PROTOCOLS
    """article: reset weights and state at each article's start; stream: reset nothing."""
    split: Literal["valid", "test"] = "valid"
    """The text to score; test is read only when asked for."""
    lanes: int = 16
    """Articles scored side by side; results do not depend on it."""
    max_articles: int = 0
    """Score only the first so many articles; 0 = all."""
    top_k: int = 0
    """Also store the so many likeliest pieces before each of the first 20,000 words; 0 = none."""
    budget: int = 8
    """Settings of a rule that are tried on validation, per protocol."""
    tune_words: int = 4_000
    """Validation words of one such evaluation."""
    resamples: int = 9999
    """Bootstrap resamples of the articles."""
