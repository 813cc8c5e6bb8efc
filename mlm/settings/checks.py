"""What settings alone decide: values that make no sense, and those that do not go together."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlm.base.errors import UserError
from mlm.base.kinds import kinds, shown, type_problem
from mlm.base.names import CACHE, HAND_MADE, LEARNED, RULES
from mlm.models.extension import Plan
from mlm.rules.protocol import most_units
from mlm.settings.config import Config
from mlm.settings.flags import UNGROUPED, flag, leaves


class Range(NamedTuple):
    """The numbers from `low` to `high`, without an end that is left out."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is one of them; NaN is none."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high <= 1:
            left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
            return f"in {left}{self.low:g}, {self.high:g}{right}"
        if self.open_low:
            return f"above {self.low:g} and at most {self.high:,.15g}"
        return f"at least {self.low:g} and at most {self.high:,.15g}"


_MANY_WORDS = Range(0, 10**11)
_SOME_WORDS = Range(1, 10**11)
_UNITS = Range(1, 1 << 16)
_LANES = Range(1, 1 << 16)
_RATE = Range(0, 1000, open_low=True)
_STRENGTH = Range(0, 10**9)
_NORM = Range(0, 10**9, open_low=True)
_SHARE = Range(0, 1)
_DROPPED = Range(0, 1, open_high=True)

RANGES = {
    "threads": Range(0, 1024),
    "seed": Range(0, (1 << 32) - 1),
    "checkpoint_minutes": Range(0, 10**6, open_low=True),
    "memory_gb": Range(0, 10**6),
    "text.vocabulary_size": Range(0, 10**7),
    "text.train_words": _MANY_WORDS,
    "text.held_out": Range(0, 1, open_low=True, open_high=True),
    "model.embedding": _UNITS,
    "model.hidden": _UNITS,
    "model.layers": Range(1, 256),
    "model.adaptive_above": Range(0, 10**9),
    "model.cutoffs": Range(1, 10**9),
    "model.context": Range(1, 1 << 20),
    "lm.epochs": Range(0, 10**6, open_low=True),
    "lm.lanes": _LANES,
    "lm.segment": Range(1, 1 << 16),
    "lm.learning_rate": _RATE,
    "lm.weight_decay": _RATE._replace(open_low=False),
    "lm.clip": _NORM,
    "lm.dropout_embedding": _DROPPED,
    "lm.dropout_input": _DROPPED,
    "lm.dropout_hidden": _DROPPED,
    "lm.dropout_output": _DROPPED,
    "lm.weight_drop": _DROPPED,
    "lm.byte_noise": _DROPPED._replace(),  # no dropout
    "lm.ar": _STRENGTH,
    "lm.tar": _STRENGTH,
    "lm.validations": Range(1, 10**6),
    "lm.validation_words": _MANY_WORDS,
    "lm.through_rate": _RATE,
    "lm.through_decay": _RATE._replace(open_low=False),
    "adapt.rank": _UNITS,
    "adapt.update_every": Range(5, 100),
    "adapt.fisher_words": _SOME_WORDS,
    "adapt.fisher_prior": _SHARE,
    "adapt.guard": _STRENGTH,
    "meta.hidden": Range(1, most_units),
    "meta.weight_rate": _RATE,
    "meta.ewc": _STRENGTH,
    "meta.lanes": _LANES,
    "meta.stream_share": _SHARE,
    "meta.unroll": Range(2, 10**6),
    "meta.pes_pairs": Range(1, 10**4),
    "meta.pes_sigma": _RATE,
    "meta.steps": Range(0, 10**7),
    "meta.learning_rate": _RATE,
    "meta.clip": _NORM,
    "evaluation.cache_words": Range(1, 10**7),
    "evaluation.lanes": _LANES,
    "evaluation.max_articles": Range(0, 10**9),
    "evaluation.top_k": Range(0, 1000),
    "evaluation.budget": Range(1, 10**4),
    "evaluation.tune_words": _SOME_WORDS,
    "evaluation.resamples": Range(1, 10**6),
    UNGROUPED: Range(0, 10**9),
}
"""What the numbers of every setting may be; the last, of those of all extensions, each of which may
ask for more in its `problems`."""

OPTIONS = {
    "threads": RANGES["threads"],
    "seed": RANGES["seed"],
    "lanes": _LANES,
    "audit_words": _SOME_WORDS,
    "articles": Range(1, 10**6),
    "first": Range(1, 10**9),
    "passage": Range(1, 10**9),
    "page_words": Range(1, 10**9),
}
"""What the numbers may be that are options of a command, and no settings."""

NOT_EMPTY = ("stages", "meta.learn", "evaluation.protocols")


def range_of(path: str) -> Range | None:
    """What numbers the setting at `path` may hold; None = none are known."""
    return RANGES.get(UNGROUPED if path.startswith(UNGROUPED) else path)


def _numbers(values: dict[str, Any]) -> list[str]:
    """Which settings hold numbers out of their ranges, one line each."""
    found = []
    for path, value in values.items():
        allowed, several = range_of(path), isinstance(value, tuple)
        numbers = value if several else (value,)
        if allowed is None or isinstance(value, bool):
            continue
        if not all(map(allowed.holds, numbers)):
            said = " ".join(map(shown, numbers))
            what = "M" if path == "adapt.update_every" else "every number" if several else "it"
            found.append(f"{flag(path)} is {said}; {what} must be {allowed}")
    return found


def _values(values: dict[str, Any]) -> list[str]:
    """What is wrong with single values, one line each."""
    found = _numbers(values)
    for path in NOT_EMPTY:
        if not values[path]:
            found.append(f"{flag(path)} is empty; name at least one")
    for path, value in values.items():
        if isinstance(value, tuple) and range_of(path) is None:
            twice = sorted({str(one) for one in value if value.count(one) > 1})
            if twice:
                found.append(f"{flag(path)} names {', '.join(twice)} twice; name each once")
    starts = (*HAND_MADE, *LEARNED)
    start = values["meta.start"]
    if start not in starts:
        found.append(f"{flag('meta.start')} is {start}; choose from {', '.join(starts)}")
    unknown = [r for r in values["evaluation.rules"] if r.removesuffix(CACHE) not in RULES]
    if unknown:
        found.append(
            f"{flag('evaluation.rules')} is {' '.join(unknown)}; choose from {', '.join(RULES)}, "
            f"each also with {CACHE}"
        )
    cutoffs = list(values["model.cutoffs"])
    if cutoffs != sorted(set(cutoffs)):
        found.append(f"{flag('model.cutoffs')} is {cutoffs}; they must rise")
    return found


def _types(config: Config) -> list[str]:
    """Which settings are of another kind than theirs, one line each."""
    values, found = leaves(config), []
    for path, kind in kinds(config).items():
        problem = type_problem(kind, values[path])
        if problem:
            found.append(f"{flag(path)} is {shown(values[path])}; {problem}")
    return found


def check_options(options: Any) -> None:
    """Refuse options of a command, a dataclass, whose values make no sense.

    Raises:
        UserError: all problems at once, each with the flag and what it must be.
    """
    found = []
    for path, value in leaves(options).items():
        allowed, numbers = OPTIONS.get(path), value if isinstance(value, tuple) else (value,)
        if allowed and value is not None and not all(map(allowed.holds, numbers)):
            found.append(f"{flag(path)} is {' '.join(map(shown, numbers))}; it must be {allowed}")
        if value == () and path in ("rules", "protocols"):
            found.append(f"{flag(path)} is empty; name at least one")
    if found:
        raise UserError("; ".join(found))


def _stage_1(c: Config) -> list[str]:
    """What does not go together in stage 1, one line each."""
    found, lm = [], c.lm
    if c.model.cell != "lstm" and lm.weight_drop:
        found.append(
            f"--lm.weight-drop is {lm.weight_drop}; a {c.model.cell} has no recurrent weights to "
            "drop: use 0"
        )
    if lm.through != "none":
        dropped = [path for path, allowed in RANGES.items() if allowed is _DROPPED]
        if any(leaves(c)[path] for path in (*dropped, "lm.ar", "lm.tar")):
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
    problems = (
        _types(config)
        or _values(leaves(config))
        or [
            *_stage_1(config),
            *_stage_2(config),
            *extension_problems(plan_of(config)),
        ]
    )
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
