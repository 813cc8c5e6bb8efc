"""Rules of a run, ready to read: hand-made ones tuned, learned ones loaded from the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.files import write_text
from mlm.base.names import CACHE, HAND_MADE, LEARNED, PROTOCOLS, STATIC, rule_label, rule_order
from mlm.base.progress import Progress
from mlm.models.base import AdaptationBase, unfold_low_rank
from mlm.models.language_model import own_weights
from mlm.reading.cache import CacheSetting
from mlm.rules.family import (
    HAND_MADE_RULES,
    as_gates,
    learned_rule,
    open_slow,
    rule_from_description,
    start_at,
)
from mlm.rules.gates import Feature, LinearGates
from mlm.rules.protocol import Bound, LoadedRule, Parameters, UpdateRule, as_parameters
from mlm.runs.base import made_from, progress_of, through_run
from mlm.runs.identity import base_identity, identity
from mlm.runs.run import Run, say
from mlm.settings.sections import MetaConfig
from mlm.store.tensors import load_tensors
from mlm.training.cache_tuning import tune_cache
from mlm.training.tuning import Trial, tune

BESIDE = "weights/"
"""Beginning of the names of weights beside a rule's parameters."""


TUNING = "tuning.json"
"""Where settings of hand-made rules and of caches are kept."""


def _known(run: Run) -> dict[str, Any]:
    """What tuning.json holds, by rule and protocol."""
    try:
        return json.loads((run.folder.path / TUNING).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not tuned yet, or damaged: tune again
        return {}


def of_learned(key: str) -> bool:
    """Whether a key of tuning.json is of a learned rule, with a cache on top."""
    return key.partition("/")[0].removesuffix(CACHE) in LEARNED


def tuned_settings(run: Run) -> dict[str, dict[str, float]]:
    """The settings in tuning.json that are the run's, by `<rule>/<protocol>`."""
    marks = {learned: identity(run, learned) for learned in (False, True)}
    return {
        key: entry["setting"]
        for key, entry in _known(run).items()
        if entry.get("identity") == marks[of_learned(key)]
    }


def ready_rules(run: Run, protocol: str) -> list[str]:
    """Rules of a run folder that can read without being tuned or trained first, in order."""
    learned = {name for name in LEARNED if run.folder.checkpoint(name).exists()}
    tuned = {key.partition("/")[0] for key in tuned_settings(run) if key.endswith("/" + protocol)}
    able = {STATIC, *learned, *(tuned & set(HAND_MADE))}
    return sorted(able | {r for r in tuned if r.removesuffix(CACHE) in able}, key=rule_order)


def _ready_ones(run: Run, protocol: str) -> str:
    return f"Rules that are ready: {', '.join(ready_rules(run, protocol))}"


def _tuned(run: Run, key: str, trials: Callable[[Progress], list[Trial]]) -> dict[str, float]:
    """The best setting under this key of tuning.json, tried and remembered there if need be.

    An interrupted search goes on.

    Raises:
        UserError: it is not there, and the folder is a released model's.
    """
    path, known, mark = run.folder.path / TUNING, _known(run), identity(run, of_learned(key))
    rule, _, protocol = key.partition("/")
    progress = progress_of(run, f"{rule}_{protocol}", mark)
    if known.get(key, {}).get("identity") == mark:
        progress.forget()
        return known[key]["setting"]
    if run.folder.released:
        raise UserError(
            f"{rule} in protocol {protocol} has no settings in {run.folder.path}, and tuning needs "
            f"the text that the model was trained with. {_ready_ones(run, protocol)}"
        )
    budget = run.config.evaluation.budget
    say(f"tuning {rule_label(rule)} on validation, protocol {protocol}: {budget} settings")
    found = trials(progress)
    known[key] = {
        "identity": mark,
        "setting": found[0].setting,
        "trials": [{**t.setting, "nll": t.nll if math.isfinite(t.nll) else None} for t in found],
    }
    write_text(path, json.dumps(known, indent=1) + "\n")
    progress.forget()
    return found[0].setting


def tuned_rule(
    run: Run, base: AdaptationBase, name: str, protocol: str
) -> tuple[UpdateRule, dict[str, float]]:
    """A hand-made rule and its best settings on validation."""
    rule, budget = HAND_MADE_RULES[name], run.config.evaluation.budget
    base = base.for_rule(rule)

    def trials(progress: Progress) -> list[Trial]:
        return tune(base, rule, run.tune_text, protocol, budget, progress=progress)

    return rule, _tuned(run, f"{name}/{protocol}", trials)


def starting_point(run: Run, base: AdaptationBase) -> LoadedRule:
    """The rule that --meta.start names, tuned or trained before; of a language model that was
    trained through a learned rule, that rule.

    Raises:
        UserError: a learned rule that is not trained yet.
    """
    start = run.config.meta.start
    if run.config.lm.through == "learned":
        other = through_run(run.config, run.data.vocabulary.hash, run.device)
        return load_learned(other, other.config.meta.rules[0], base)
    if start in HAND_MADE:
        rule, setting = tuned_rule(run, base, start, "article")
        return LoadedRule(rule, as_parameters(setting, base), base)
    return load_learned(run, start, base)


def new_rule(meta: MetaConfig, name: str, start: LoadedRule) -> tuple[LinearGates, Parameters]:
    """The learned rule of this name as these settings want it, and where its training starts."""
    rule = rule_to_train(meta, name, start.rule)
    parameters = start_at(rule, start.rule, start.parameters, start.base)
    if rule.slow and not as_gates(start.rule).slow:
        open_slow(parameters)
    if meta.fisher == "flush" and rule.flush and "fisher" in rule.columns:
        parameters["flush"][:, rule.columns["fisher"]] = 1.0
    return rule, parameters


def rule_to_train(meta: MetaConfig, name: str, start: UpdateRule) -> LinearGates:
    """The learned rule of this name as these settings want it, able to start as `start` does.

    Raises:
        UserError: it cannot be trained in this way.
    """
    fixed: tuple[str, ...] = ()
    features: tuple[Feature, ...] = meta.features
    if meta.fisher == "off":
        features = tuple(f for f in features if f != "fisher")
    elif meta.fisher == "flush":
        fixed = ("update.fisher", "flush.fisher")
    rule = learned_rule(
        name,
        features=features,
        per_tensor=meta.per_tensor,
        free_copy=meta.free_copy,
        hidden=meta.hidden,
        fixed=fixed,
        start=start,
    )
    if (rule.per_weight or rule.per_unit) and meta.gradient == "forward":
        own = "weight" if rule.per_weight else "row and column"
        raise UserError(
            f"--meta.gradient forward: {name} has a parameter per {own}, and forward mode holds a "
            "copy of the weights for each; use reverse or checkpoint"
        )
    return rule


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A rule's parameters, and the weights of model and extensions beside them."""
    own = {n.removeprefix(BESIDE): t for n, t in tensors.items() if n.startswith(BESIDE)}
    return {n: t for n, t in tensors.items() if not n.startswith(BESIDE)}, own


def load_learned(run: Run, name: str, base: AdaptationBase) -> LoadedRule:
    """A trained meta-learner from the run folder, with the weights it was trained to start from.

    Raises:
        UserError: missing, not finite, or trained for other dynamic weights.
    """
    path = run.folder.checkpoint(name)
    if run.folder.released and not path.exists():
        ready = _ready_ones(run, PROTOCOLS[0])
        raise UserError(f"{name} is not in {run.folder.path}, a released model. {ready}")
    tensors, about = load_tensors(path, "train the meta-learner first (`--stages meta`)")
    if tuple(about["dynamic"]) != base.dynamic:
        raise UserError(
            f"{path} was trained for the weights {', '.join(about['dynamic'])}, but those that "
            f"adapt now are {', '.join(base.dynamic)}; run `--stages meta` again"
        )
    broken = [n for n, t in tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise UserError(
            f"{path}: {', '.join(broken)} of rule {name} are not finite; run `--stages meta` again"
        )
    tensors = {n: t.to(run.device) for n, t in tensors.items()}
    parameters, own = parted(tensors)
    if own_weights(own):
        base = unfold_low_rank(base)
    base = base.with_weights(own)
    base = dataclasses.replace(base, extensions=run.config.extensions.active(base.weights))
    rule = rule_from_description(name, about["rule"])
    return LoadedRule(rule, parameters, base.derived().for_rule(rule))


def check_learned(run: Run) -> None:
    """Load the memory and every meta-learner to score: what is amiss shows now, not hours later.

    Raises:
        UserError: the memory was made with other settings, or see `Run.memory` and `load_learned`.
    """
    base, path = run.base, run.folder.checkpoint("memory")
    if not made_from(path, base_identity(run)):
        raise UserError(
            f"{path} was made with other settings of --adapt, --text or an extension than these, "
            "or from another language model; run `--stages meta` again"
        )
    for name in {rule.removesuffix(CACHE) for rule in run.config.evaluation.rules} & set(LEARNED):
        load_learned(run, name, base)


class Ready(NamedTuple):
    """What scoring needs of a rule."""

    base: AdaptationBase
    bound: Bound | None
    """None = static."""
    cache: tuple[CacheSetting, ...]
    """The neural cache on top, if any."""
    setting: dict[str, Any]
    """For the table."""


def cache_window(run: Run) -> int:
    """Tokens that a neural cache remembers: as many words as the settings say, on validation."""
    text = run.validation_text(run.config.evaluation.tune_words)
    return round(run.config.evaluation.cache_words * text.tokens_per_word)


def ready_rule(run: Run, name: str, protocol: str) -> Ready:
    """The rule of this name, tuned or loaded, with a tuned cache on top if its name ends so."""
    base = name.removesuffix(CACHE)
    ready = _ready(run, base, protocol)
    if base == name:
        return ready

    def trials(progress: Progress) -> list[Trial]:
        budget, window = run.config.evaluation.budget, cache_window(run)
        how = (run.tune_text, protocol, budget, window, progress)
        return tune_cache(ready.base, ready.bound, *how)

    found = dict(_tuned(run, f"{name}/{protocol}", trials))
    window = int(found.pop("window", 0)) or cache_window(run)
    cache = (CacheSetting(found["theta"], found["weight"], window),)
    more = {f"cache {key}": value for key, value in found.items()}
    return ready._replace(cache=cache, setting={**ready.setting, **more})


def _ready(run: Run, name: str, protocol: str) -> Ready:
    base = run.base
    if name == "static":
        return Ready(base, None, (), {})
    if name in HAND_MADE:
        rule, setting = tuned_rule(run, base, name, protocol)
        base = base.for_rule(rule)
        return Ready(base, rule.bind(as_parameters(setting, base), base), (), dict(setting))
    learned = load_learned(run, name, base)
    rule = learned.rule
    setting = {
        "parameters": sum(p.numel() for p in learned.parameters.values()),
        "features": ", ".join(rule.features) if isinstance(rule, LinearGates) else "",
    }
    return Ready(learned.base, learned.bound(), (), setting)
