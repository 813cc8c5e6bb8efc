"""settings.checks"""

from __future__ import annotations

import math

from mlm.base.errors import UserError
from mlm.base.names import CACHE, HAND_MADE, LEARNED, RULES
from mlm.settings.config import Config
from mlm.settings.sections import MetaConfig


def _meta_problems(m: MetaConfig) -> list[str]:
    """What is wrong with stage 2's settings, one line each."""
    found = []
    starts = [*HAND_MADE, *LEARNED]
    if m.start not in starts:
        found.append(f"--meta.start is {m.start}; choose from {', '.join(starts)}")
    seen = m.fisher == "feature" and "fisher" in m.features
    if m.start in ("rms", "adam") and not seen:
        found.append(
            f"--meta.start is {m.start}, whose steps follow the Fisher; it needs --meta.fisher "
            "feature and fisher among --meta.features, or use --meta.start sgd"
        )
    if not m.learn:
        found.append("--meta.learn is empty; name at least one of rule, theta_0, static")
    if m.free_copy and set(m.learn) - {"rule"}:
        found.append(
            "--meta.free-copy keeps COPY apart from FLUSH, and theta_0 then has no first-order "
            "gradient here; use --meta.learn rule"
        )
    if m.gradient == "pes" and m.learn != ("rule",):
        found.append("--meta.gradient pes trains the rule only; use --meta.learn rule")
    if not 0 <= m.ewc < math.inf:
        found.append(f"--meta.ewc is {m.ewc}; it must be 0 or more and finite")
    return found


def _problems(c: Config) -> list[str]:
    """Everything wrong with the values, one line each."""
    found = []

    def need(ok: bool, flag: str, value: object, rule: str) -> None:
        if not ok:
            found.append(f"{flag} is {value}; {rule}")

    alone = c.meta.learn == ("rule",)
    need(
        not c.lm.ngrams or (c.lm.through != "rms" and c.lm.init is not None),
        "--lm.ngrams",
        c.lm.ngrams,
        "they are learned by a language model that goes on from another one (--lm.init), as usual "
        "or with --lm.through learned",
    )
    for flag, value in {
        "--adapt.related": c.adapt.related,
        "--adapt.basis-words": c.adapt.basis_words,
        "--adapt.at-once": c.adapt.at_once,
    }.items():
        need(not value or alone, flag, value, "it goes with --meta.learn rule only")
    need(
        not c.adapt.at_once or c.meta.gradient not in ("second", "pes"),
        "--meta.gradient",
        c.meta.gradient,
        "--adapt.at-once goes with reverse, checkpoint or forward",
    )
    at_least_one = {
        "--model.embedding": c.model.embedding,
        "--model.hidden": c.model.hidden,
        "--model.layers": c.model.layers,
        "--model.context": c.model.context,
        "--lm.lanes": c.lm.lanes,
        "--lm.segment": c.lm.segment,
        "--lm.validations": c.lm.validations,
        "--adapt.fisher-words": c.adapt.fisher_words,
        "--adapt.rank": c.adapt.rank,
        "--meta.lanes": c.meta.lanes,
        "--evaluation.lanes": c.evaluation.lanes,
        "--evaluation.budget": c.evaluation.budget,
        "--evaluation.tune-words": c.evaluation.tune_words,
        "--evaluation.resamples": c.evaluation.resamples,
        "--evaluation.cache-words": c.evaluation.cache_words,
        "--meta.hidden": c.meta.hidden,
        "--meta.pes-pairs": c.meta.pes_pairs,
    }
    for flag, value in at_least_one.items():
        need(value >= 1, flag, value, "it must be at least 1")
    for flag, value in {
        "--threads": c.threads,
        "--adapt.threads": c.adapt.threads,
        "--adapt.related": c.adapt.related,
        "--adapt.basis-words": c.adapt.basis_words,
        "--adapt.phrases": c.adapt.phrases,
        "--seed": c.seed,
        "--text.train-words": c.text.train_words,
        "--text.vocabulary-size": c.text.vocabulary_size,
        "--lm.validation-words": c.lm.validation_words,
        "--lm.ngrams": c.lm.ngrams,
        "--meta.steps": c.meta.steps,
        "--meta.read-out-words": c.meta.read_out_words,
        "--evaluation.max-articles": c.evaluation.max_articles,
    }.items():
        need(value >= 0, flag, value, "it must not be negative")
    for flag, value in {
        "--lm.epochs": c.lm.epochs,
        "--lm.learning-rate": c.lm.learning_rate,
        "--lm.clip": c.lm.clip,
        "--meta.learning-rate": c.meta.learning_rate,
        "--meta.weight-rate": c.meta.weight_rate,
        "--meta.pes-sigma": c.meta.pes_sigma,
        "--meta.clip": c.meta.clip,
    }.items():
        need(0 < value < math.inf, flag, value, "it must be above 0 and finite")
    for name in ("embedding", "input", "hidden", "output"):
        rate = getattr(c.lm, f"dropout_{name}")
        need(0 <= rate < 1, f"--lm.dropout-{name}", rate, "it must be in [0, 1)")
    need(0 <= c.lm.weight_drop < 1, "--lm.weight-drop", c.lm.weight_drop, "it must be in [0, 1)")
    need(
        c.model.cell == "lstm" or c.lm.weight_drop == 0,
        "--lm.weight-drop",
        c.lm.weight_drop,
        f"a {c.model.cell} has no recurrent weights to drop: use 0",
    )
    need(0 < c.text.held_out < 1, "--text.held-out", c.text.held_out, "it must be in (0, 1)")
    need(
        0 <= c.adapt.fisher_prior <= 1,
        "--adapt.fisher-prior",
        c.adapt.fisher_prior,
        "it must be in [0, 1]",
    )
    need(0 <= c.adapt.surprise <= 1, "--adapt.surprise", c.adapt.surprise, "it must be in [0, 1]")
    need(5 <= c.adapt.segment <= 100, "--adapt.segment", c.adapt.segment, "M must be 5 to 100")
    need(
        c.meta.unroll >= 2, "--meta.unroll", c.meta.unroll, "it must be at least 2; use 40 or more"
    )
    need(
        0 <= c.meta.stream_share <= 1,
        "--meta.stream-share",
        c.meta.stream_share,
        "it must be in [0, 1]",
    )
    found += _meta_problems(c.meta)
    need(
        c.adapt.phrases > 0 or not c.meta.read_out_words,
        "--meta.read-out-words",
        c.meta.read_out_words,
        "it reads phrases out, and none are remembered: set --adapt.phrases, or use 0",
    )
    need(0 <= c.adapt.guard < math.inf, "--adapt.guard", c.adapt.guard, "it must be 0 or more")
    unknown = [r for r in c.evaluation.rules if r.removesuffix(CACHE) not in RULES]
    need(
        not unknown,
        "--evaluation.rules",
        " ".join(unknown),
        f"choose from {', '.join(RULES)}, each also with {CACHE}",
    )
    need(bool(c.stages), "--stages", "empty", "name at least one")
    need(bool(c.evaluation.protocols), "--evaluation.protocols", "empty", "name at least one")
    cutoffs = list(c.model.cutoffs)
    rising = cutoffs == sorted(set(cutoffs)) and all(k > 0 for k in cutoffs)
    need(rising, "--model.cutoffs", cutoffs, "they must rise and be above 0")
    return found


def validate(config: Config) -> Config:
    """The config itself if its values make sense.

    Raises:
        UserError: all problems at once, each with the flag and what it must be.
    """
    problems = _problems(config)
    if problems:
        raise UserError("; ".join(problems))
    return config
