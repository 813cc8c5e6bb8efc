"""The family of update rules: what there is, and how one starts from any other's behaviour.

Hand-made rules have settings that are tuned; learned rules are `LinearGates` with one part or
another, whose parameters are trained. Every rule of the family can be written as gates, so that a
learned rule which contains another's parts can start exactly as that other one behaves:

    rule = learned_rule("lstm", features=..., ..., start=RMS())
    parameters = start_at(rule, RMS(), {"rate": ..., "decay": ...}, memory)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from mlm.base.errors import UserError
from mlm.base.kinds import as_kind, kinds, shown, type_problem
from mlm.base.names import LEARNED
from mlm.models.base import AdaptationBase
from mlm.rules.fast_gates import FLUSH_UNIT, SQUARE_UNIT
from mlm.rules.gates import Feature, LinearGates
from mlm.rules.hand_made import RMS, SGD, Adam, HandMade, Momentum
from mlm.rules.protocol import Parameters, UpdateRule, most_units
from mlm.rules.two_memories import SLOW, parts_of

HAND_MADE_RULES: dict[str, HandMade] = {
    rule.name: rule for rule in (SGD(), Momentum(), RMS(), Adam())
}
"""Rules with settings, by name; those with parameters to train are `mlm.base.names.LEARNED`."""


def learned_rule(
    name: str,
    *,
    features: tuple[Feature, ...],
    per_tensor: bool,
    free_copy: bool,
    hidden: int,
    start: UpdateRule,
    fixed: tuple[str, ...] = (),
) -> LinearGates:
    """The learned rule of this name, with the parts it needs to start as `start` behaves.

    What is only there for the start's sake stays as it is: it is `fixed`.

    Args:
        name: one of `LEARNED`.
        features, per_tensor, free_copy: of the gates; tensor_steps and weight_steps see no
            features and have gates for every tensor.
        hidden: units of mlp and lstm.
        start: a hand-made rule, or a learned one.
        fixed: what else is not trained (see `LinearGates.fixed`), where the rule has it.

    Raises:
        UserError: no learned rule has this name, or none can start as `start` does.
    """
    if name not in LEARNED:
        raise UserError(f"there is no learned rule {name!r}; choose from {', '.join(LEARNED)}")
    named = LinearGates(name, name != "two_levels", features, per_tensor, free_copy)
    if name in ("tensor_steps", "weight_steps"):
        named = LinearGates(name, features=(), per_weight=name == "weight_steps")
    elif name in ("surprise", "adaptive"):
        named = dataclasses.replace(named, momentum=True, square=name == "adaptive")
    elif name in ("unit_steps", "four_levels"):
        named = dataclasses.replace(named, per_unit=True, slow=name == "four_levels")
    elif name in ("mlp", "lstm"):
        units = {"mlp": 0, "lstm": 0, name: hidden}
        named = dataclasses.replace(named, mlp=units["mlp"], lstm=units["lstm"])
    rule = _with_parts_of(named, as_gates(start))
    more = tuple(what for what in fixed if what in rule.fixable and what not in rule.fixed)
    return dataclasses.replace(rule, fixed=(*rule.fixed, *more))


def _with_parts_of(rule: LinearGates, other: LinearGates) -> LinearGates:
    """`rule` with the other's parts, which are fixed where it has none of its own; no FLUSH."""
    added = tuple(feature for feature in other.features if feature not in rule.features)
    union = dataclasses.replace(
        rule,
        features=(*rule.features, *added),
        per_tensor=rule.per_tensor or other.per_tensor,
        free_copy=rule.free_copy or other.free_copy,
        eps=other.eps if other.features or other.square else rule.eps,
        momentum=rule.momentum or other.momentum,
        square=rule.square or other.square,
        per_weight=rule.per_weight or other.per_weight,
        per_unit=rule.per_unit or other.per_unit,
        gain=rule.gain or other.gain,
        slow=rule.slow or other.slow,
        mlp=max(rule.mlp, other.mlp),
        lstm=max(rule.lstm, other.lstm),
    )
    there = {*rule.kinds, *rule.parts}
    alien = (part for part in (*union.kinds, *union.parts) if part not in there)
    return dataclasses.replace(union, fixed=(*added, *alien))


def as_gates(rule: UpdateRule) -> LinearGates:
    """The gates that can do what `rule` does: itself, if it is one of them.

    Raises:
        UserError: the rule is none of the family.
    """
    shared = LinearGates(rule.name, features=(), per_tensor=False)
    match rule:
        case LinearGates():
            return rule
        case SGD():
            return dataclasses.replace(shared, flush=False)
        case Momentum():
            return dataclasses.replace(shared, momentum=True)
        case RMS():
            return dataclasses.replace(shared, features=("fisher",), eps=rule.eps)
        case Adam():
            krause = dataclasses.replace(shared, features=("fisher",), eps=rule.eps)
            return dataclasses.replace(krause, momentum=True, square=True)
    raise UserError(f"no learned rule can start as {rule.name!r} does")


def _gates_parameters(rule: UpdateRule, settings: Parameters, base: AdaptationBase) -> Parameters:
    """The parameters of `as_gates(rule)` with which it does what `rule` does."""
    gates, value = as_gates(rule), {n: float(p) for n, p in settings.items()}
    rate, decay = value["rate"], value.get("decay", 0.0)
    if isinstance(rule, Adam):  # its m is (1 - momentum) S
        rate *= 1 - value["momentum"]
    if "fisher" in gates.features:
        phi = gates.start_at_rms(base, rate, decay)
    else:
        phi = gates.start_at_sgd(base, rate)
        if gates.flush:
            phi["flush_scale"].fill_(decay / FLUSH_UNIT)
    for part, unit in {"momentum": 1.0, "square": SQUARE_UNIT}.items():
        if part in phi:
            phi[part].fill_(value[part] / unit)
    return phi


@torch.no_grad()
def start_at(
    rule: LinearGates, start: UpdateRule, parameters: Parameters, base: AdaptationBase
) -> Parameters:
    """Parameters with which `rule` does exactly what `start` does with `parameters`.

    `rule` must contain the parts of `start`, as one made by `learned_rule` for it does. A rule
    without FLUSH does what `start` would do without its FLUSH.

    Args:
        parameters: those of `start`; of a hand-made rule one number each.

    Raises:
        ValueError: `rule` lacks a part of `start`.
    """
    if not isinstance(start, LinearGates):
        parameters = _gates_parameters(start, parameters, base)
    other = as_gates(start)
    _check_contains(rule, other)
    if rule.slow:
        return _start_of_two(rule, other, parameters, base)
    phi = rule.initial(base)
    columns = [rule.columns[name] for name in other.columns]
    for kind in other.kinds:
        if kind in phi:
            phi[kind][:, columns] = parameters[kind]
    for name in phi.keys() & parameters.keys():
        if name.partition("/")[0] in SINGLE:
            phi[name].copy_(parameters[name].expand_as(phi[name]))
    smaller = {network.kind: network for network in other.networks}
    for network in rule.networks:
        if network.kind in smaller:
            network.take_over(phi, parameters, columns)
    return phi


SLOW_SHARE = 0.5
"""Of every step, where a slow memory's training starts."""


SLOW_FORGETS = 1 / 32
"""What it forgets there, in terms of what the fast one does."""


SINGLE = ("flush_scale", "momentum", "square", "gain", "step", "row", "column")
"""Parameters of parts that mean the same in every rule."""


def _start_of_two(
    rule: LinearGates, other: LinearGates, parameters: Parameters, base: AdaptationBase
) -> Parameters:
    """`start_at` for a rule with a slow memory: as the other's, or kept empty by its gain."""
    own, others = parts_of(parameters)
    fast = start_at(rule.fast, other.fast, own, base)
    if other.slow:
        slow = start_at(rule.slowly, other.slowly, others, base)
    else:
        slow = {**rule.slowly.initial(base), **{n: p.clone() for n, p in fast.items()}}
        for name in ("flush_scale", "gain"):
            if name in slow:
                slow[name].zero_()
    return fast | {SLOW + n: p for n, p in slow.items()}


@torch.no_grad()
def open_slow(parameters: Parameters) -> None:
    """Let a slow memory that is still empty take part, in place: half of every step, kept long.

    Meta-training sees what to forget within an unroll and hardly further; it does not find a memory
    that pays after a thousand updates from one that is shut, but it improves one that is open. RMS
    dynamic evaluation that forgets too fast gains a tenth more when it is split in this way; one
    whose decay is tuned well gains nothing by it alone (results of `claim`).
    """
    slow = {n.removeprefix(SLOW): p for n, p in parameters.items() if n.startswith(SLOW)}
    for rows, share in ((parameters["update"], 1 - SLOW_SHARE), (slow["update"], SLOW_SHARE)):
        rows[:, 0] += math.log(share)
    slow["gain"].fill_(1.0)
    if "flush_scale" in slow:
        slow["flush_scale"].copy_(parameters["flush_scale"] * SLOW_FORGETS)


def _check_contains(rule: LinearGates, other: LinearGates) -> None:
    """Raise ValueError if `other` can do what `rule` cannot, FLUSH apart."""
    union = _with_parts_of(rule, other)
    if dataclasses.replace(union, fixed=rule.fixed) != rule:
        raise ValueError(f"{rule} lacks a part of {other}")


def describe(rule: LinearGates) -> dict[str, Any]:
    """What makes the rule, as values for a JSON file; `rule_from_description` reads them."""
    values = dataclasses.asdict(rule)
    values.pop("name")
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def rule_from_description(name: str, about: Mapping[str, Any]) -> LinearGates:
    """The rule that `describe` wrote; parts that `about` does not mention are absent.

    Raises:
        UserError: `about` mentions what this version does not know, or values that a part of a rule
            cannot have.
    """
    known = {field.name for field in dataclasses.fields(LinearGates)} - {"name"}
    unknown = sorted(set(about) - known)
    if unknown:
        raise UserError(
            f"rule {name}: this version does not know {', '.join(unknown)}; train it again"
        )
    hints = kinds(LinearGates(name))
    values = {part: as_kind(hints[part], value) for part, value in about.items()}
    for part, value in values.items():
        problem = type_problem(hints[part], value)
        if part in ("mlp", "lstm") and problem is None and not 0 <= value <= most_units:
            problem = f"it must be 0 to {most_units}"
        if part == "eps" and problem is None and not 0 < value < 1:
            problem = "it must be in (0, 1)"
        if problem:
            raise UserError(f"rule {name}: {part} is {shown(value)}; {problem}; train it again")
    return LinearGates(name, **values)
