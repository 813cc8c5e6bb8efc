"""What settings alone decide: values that make no sense, and those that do not go together."""

from __future__ import annotations

import math
from typing import Any

from mlm.base.errors import UserError
from mlm.base.names import CACHE, HAND_MADE, LEARNED, RULES
from mlm.models.extension import Plan
from mlm.settings.config import Config
from mlm.settings.flags import UNGROUPED, flag, leaves

AT_LEAST_ONE = (
    "model.embedding",
    "model.hidden",
    "model.layers",
    "model.context",
    "lm.lanes",
    "lm.segment",
    "lm.validations",
    "adapt.fisher_words",
    "adapt.rank",
    "meta.lanes",
    "meta.hidden",
    "meta.pes_pairs",
    "evaluation.lanes",
    "evaluation.budget",
    "evaluation.tune_words",
    "evaluation.resamples",
    "evaluation.cache_words",
)
NOT_NEGATIVE = (
    "threads",
    "seed",
    "text.train_words",
    "text.vocabulary_size",
    "lm.validation_words",
    "meta.steps",
    "evaluation.max_articles",
)
POSITIVE = (
    "checkpoint_minutes",
    "lm.epochs",
    "lm.learning_rate",
    "lm.clip",
    "lm.through_rate",
    "meta.learning_rate",
    "meta.weight_rate",
    "meta.pes_sigma",
    "meta.clip",
)
FINITE = (
    "memory_gb",
    "lm.weight_decay",
    "lm.ar",
    "lm.tar",
    "lm.through_decay",
    "adapt.guard",
    "meta.ewc",
)
SHARES = ("adapt.fisher_prior", "meta.stream_share")
DROPOUT = (
    "lm.dropout_embedding",
    "lm.dropout_input",
    "lm.dropout_hidden",
    "lm.dropout_output",
    "lm.weight_drop",
    "lm.byte_noise",
)
NOT_EMPTY = ("stages", "meta.learn", "evaluation.protocols")


def _values(values: dict[str, Any]) -> list[str]:
    """What is wrong with single values, one line each."""
    found = []

    def need(ok: bool, path: str, rule: str) -> None:
        if not ok:
            found.append(f"{flag(path)} is {values[path]}; {rule}")

    for path in AT_LEAST_ONE:
        need(values[path] >= 1, path, "it must be at least 1")
    for path in NOT_NEGATIVE:
        need(values[path] >= 0, path, "it must not be negative")
    for path in POSITIVE:
        need(0 < values[path] < math.inf, path, "it must be above 0 and finite")
    for path in FINITE:
        need(0 <= values[path] < math.inf, path, "it must be 0 or more and finite")
    for path in SHARES:
        need(0 <= values[path] <= 1, path, "it must be in [0, 1]")
    for path, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if path.startswith(UNGROUPED) and all(isinstance(n, int | float) for n in numbers):
            fine = all(0 <= number < math.inf for number in numbers)
            need(fine, path, "it must be 0 or more and finite")
    for path in DROPOUT:
        need(0 <= values[path] < 1, path, "it must be in [0, 1)")
    for path in NOT_EMPTY:
        if not values[path]:
            found.append(f"{flag(path)} is empty; name at least one")
    for path, value in values.items():
        if isinstance(value, tuple) and path != "model.cutoffs" and not path.startswith(UNGROUPED):
            twice = sorted({str(one) for one in value if value.count(one) > 1})
            if twice:
                found.append(f"{flag(path)} names {', '.join(twice)} twice; name each once")
    need(0 < values["text.held_out"] < 1, "text.held_out", "it must be in (0, 1)")
    need(5 <= values["adapt.update_every"] <= 100, "adapt.update_every", "M must be 5 to 100")
    need(values["meta.unroll"] >= 2, "meta.unroll", "it must be at least 2; use 40 or more")
    starts = (*HAND_MADE, *LEARNED)
    need(values["meta.start"] in starts, "meta.start", f"choose from {', '.join(starts)}")
    unknown = [r for r in values["evaluation.rules"] if r.removesuffix(CACHE) not in RULES]
    if unknown:
        found.append(
            f"{flag('evaluation.rules')} is {' '.join(unknown)}; choose from {', '.join(RULES)}, "
            f"each also with {CACHE}"
        )
    cutoffs = list(values["model.cutoffs"])
    if cutoffs != sorted(set(cutoffs)) or any(k <= 0 for k in cutoffs):
        found.append(f"{flag('model.cutoffs')} is {cutoffs}; they must rise and be above 0")
    return found


def _stage_1(c: Config) -> list[str]:
    """What does not go together in stage 1, one line each."""
    found, lm = [], c.lm
    if c.model.cell != "lstm" and lm.weight_drop:
        found.append(
            f"--lm.weight-drop is {lm.weight_drop}; a {c.model.cell} has no recurrent weights to "
            "drop: use 0"
        )
    if lm.through != "none":
        if any((*(getattr(lm, path.removeprefix("lm.")) for path in DROPOUT), lm.ar, lm.tar)):
            found.append(
                f"--lm.through {lm.through} trains without dropout, AR and TAR; set "
                "--lm.dropout-*, --lm.weight-drop, --lm.ar and --lm.tar to 0"
            )
        if lm.precision == "bfloat16":
            found.append(
                f"--lm.through {lm.through} trains in float32; leave --lm.precision bfloat16 out"
            )
    if lm.through == "learned" and lm.through_run is None:
        found.append(
            "--lm.through learned: name a run folder whose stage 2 is done with --lm.through-run"
        )
    if lm.through != "learned" and lm.through_run is not None:
        found.append(
            f"--lm.through-run {lm.through_run} is read with --lm.through learned only; add that, "
            "or leave it out"
        )
    return found


def _stage_2(c: Config) -> list[str]:
    """What does not go together in stage 2, one line each."""
    found, m = [], c.meta
    alone = m.learn == ("rule",)
    seen = m.fisher == "feature" and "fisher" in m.features
    if m.start in ("rms", "adam") and not seen:
        found.append(
            f"--meta.start is {m.start}, whose steps follow the Fisher; it needs --meta.fisher "
            "feature and fisher among --meta.features, or use --meta.start sgd"
        )
    if m.free_copy and not alone:
        found.append(
            "--meta.free-copy keeps COPY apart from FLUSH, and theta_0 then has no first-order "
            "gradient here; use --meta.learn rule"
        )
    if m.gradient == "pes" and not alone:
        found.append("--meta.gradient pes trains the rule only; use --meta.learn rule")
    return found


def validate(config: Config) -> Config:
    """The config itself if its values make sense, one by one and together.

    Raises:
        UserError: all problems at once, each with the flag and what it must be.
    """
    problems = _values(leaves(config)) or [
        *_stage_1(config),
        *_stage_2(config),
        *extension_problems(plan_of(config)),
    ]
    if problems:
        raise UserError("; ".join(problems))
    return config


def plan_of(
    c: Config, dynamic: tuple[str, ...] = (), folded: tuple[str, ...] | None = None
) -> Plan:
    """What extensions are asked about: the settings, and what the model says, if it is known."""
    goes_on, enabled = c.lm.init is not None, c.extensions.enabled()
    return Plan(dynamic, folded, c.meta.learn, c.meta.gradient, c.lm.through, goes_on, enabled)


def extension_problems(plan: Plan) -> list[str]:
    """Why extensions cannot work in such a run, one line each."""
    return [problem for extension in plan.extensions for problem in extension.problems(plan)]
