"""Rules of a run, ready to read: hand-made ones tuned, learned ones loaded from the run folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mlm.base.errors import UserError
from mlm.base.files import parse_json, write_text
from mlm.base.names import CACHE, HAND_MADE, LEARNED, PROTOCOLS, STATIC, rule_label, rule_order
from mlm.base.progress import Progress
from mlm.base.terminal import detail, note, progress_bar
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
from mlm.runs.identity import base_identity, checkpoint_mark, identity, row_identity
from mlm.runs.run import Run
from mlm.settings.sections import MetaConfig
from mlm.store.lock import only_writer
from mlm.store.tensors import (
    CHECKSUM,
    check_tensors,
    damaged,
    entry,
    load_about,
    load_tensors,
)
from mlm.training.cache_tuning import tune_cache
from mlm.training.tuning import Trial, tune

BESIDE = "weights/"
"""Beginning of the names of weights beside a rule's parameters."""


TUNING = "tuning.json"
"""Where settings of hand-made rules and of caches are kept."""


def _known(run: Run) -> dict[str, Any]:
    """The entries of tuning.json, by rule and protocol; those in the folder of results, if that is
    another, go before the run's."""
    found: dict[str, Any] = {}
    for folder in (run.folder.path, run.results or run.folder.path):
        path = folder / TUNING
        try:
            entries = parse_json(path.read_bytes())
            if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
                raise ValueError("it holds other things than tuned settings")
            found |= entries
        except FileNotFoundError:  # not tuned yet
            continue
        except ValueError as error:
            note(f"{path} is damaged ({error}); what it held is tuned again")
    return found


def _is_entry(entry: Any) -> bool:
    """Whether this is what tuning.json has of a rule."""
    setting = entry.get("setting") if isinstance(entry, dict) else None
    return isinstance(setting, dict) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in setting.values()
    )


def of_learned(key: str) -> bool:
    """Whether a key of tuning.json is of a learned rule, with a cache on top."""
    return key.partition("/")[0].removesuffix(CACHE) in LEARNED


def tuned_settings(run: Run) -> dict[str, dict[str, float]]:
    """The settings in tuning.json that are the run's, by `<rule>/<protocol>`."""
    if run.folder.released:  # its checksums say that its files belong together
        its, mine = run.folder.load_record()["config"]["evaluation"], run.config.evaluation
        if any(
            its[name] != getattr(mine, name) for name in ("budget", "tune_words", "cache_words")
        ):
            return {}
        return {key: entry["setting"] for key, entry in _known(run).items()}
    marks = {learned: identity(run, learned) for learned in (False, True)}
    return {
        key: entry["setting"]
        for key, entry in _known(run).items()
        if entry.get("identity") == marks[of_learned(key)]
    }


def ready_rules(run: Run, protocol: str) -> list[str]:
    """Rules of a run folder that can read without being tuned or trained first, in order."""
    there = [name for name in LEARNED if run.folder.checkpoint(name).exists()]
    learned = {name for name in there if not _of_another_base(run, _about(run, name))}
    tuned = {key.partition("/")[0] for key in tuned_settings(run) if key.endswith("/" + protocol)}
    able = {STATIC, *learned, *(tuned & set(HAND_MADE))}
    return sorted(able | {r for r in tuned if r.removesuffix(CACHE) in able}, key=rule_order)


def _ready_ones(run: Run, protocol: str) -> str:
    return f"Rules that are ready: {', '.join(ready_rules(run, protocol))}"


Trials = Callable[[Progress, Callable[[Trial], None]], list[Trial]]
"""A search that goes on from what is kept, and says of every trial when it is done."""


def _tuned(run: Run, key: str, trials: Trials) -> dict[str, float]:
    """The best setting under this key of tuning.json, tried and remembered there if need be.

    An interrupted search goes on.

    Raises:
        UserError: it is not there, and the folder is a released model's.
    """
    folder, mark = run.results or run.folder.path, identity(run, of_learned(key))
    progress = progress_of(run, key.replace("/", "_"), mark, folder)
    found = tuned_settings(run).get(key)
    if found is not None:
        progress.forget()
        return found
    rule, _, protocol = key.partition("/")
    if run.folder.released:
        raise UserError(
            f"{rule} in protocol {protocol} has no settings in {run.folder.path}, and tuning needs "
            f"the text that the model was trained with. {_ready_ones(run, protocol)}"
        )
    with only_writer(folder):
        tried = _watched(run, f"{rule_label(rule)}, {protocol}", progress, trials)
        entry = {
            "identity": mark,
            "setting": tried[0].setting,
            "trials": [
                {**t.setting, "nll": t.nll if math.isfinite(t.nll) else None} for t in tried
            ],
        }
        write_text(folder / TUNING, json.dumps({**_known(run), key: entry}, indent=1) + "\n")
        progress.forget()
    return tried[0].setting


def _watched(run: Run, title: str, progress: Progress, trials: Trials) -> list[Trial]:
    """The trials of a search, which the person at the terminal watches."""
    text, best = run.judged_text, math.inf

    def reached() -> str:
        return f"perplexity {text.word_perplexity(best / text.tokens):.1f} per word"

    with progress_bar(f"tuning {title}", run.config.evaluation.budget, quiet=run.quiet) as bar:

        def on_trial(trial: Trial) -> None:
            nonlocal best
            best = min(best, trial.nll)
            bar.set_postfix_str(f"{reached()} at best", refresh=False)
            bar.update()

        tried = trials(progress, on_trial)
    detail(f"{title}: tuned on {text.words:,} words, {reached()} (best of {len(tried)})")
    return tried


def tuned_rule(
    run: Run, base: AdaptationBase, name: str, protocol: str
) -> tuple[UpdateRule, dict[str, float]]:
    """A hand-made rule and its best settings on validation."""
    rule, budget = HAND_MADE_RULES[name], run.config.evaluation.budget
    base = base.for_rule(rule)

    def trials(progress: Progress, on_trial: Callable[[Trial], None]) -> list[Trial]:
        return tune(base, rule, run.tune_text, protocol, budget, on_trial, progress)

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
    tensors, about = load_tensors(path, NOT_TRAINED)
    dynamic = entry(path, about, "dynamic", tuple[str, ...])
    if dynamic != base.dynamic:
        raise UserError(
            f"{path} was trained for the weights {', '.join(dynamic)}, but those that "
            f"adapt now are {', '.join(base.dynamic)}; run `--stages meta` again"
        )
    if _of_another_base(run, about):
        raise UserError(
            f"{path} was trained with another memory.safetensors than the run has now (such as one "
            f"of another M); train it again (--stages meta --train-rules {name}), or leave it out"
        )
    rule = rule_from_description(name, entry(path, about, "rule", dict))
    parameters, own = parted({n: t.to(run.device) for n, t in tensors.items()})
    if own_weights(own):
        base = unfold_low_rank(base)
    base = base.with_weights(own)
    base = dataclasses.replace(base, extensions=run.config.extensions.active(base.weights))
    sizes = {n: tuple(p.shape) for n, p in rule.initial(base).items()}
    alien = [n for n in tensors if not n.startswith(BESIDE) and n not in sizes]
    if alien:
        raise damaged(path, f"{alien[0]} is no parameter of its rule")
    sizes |= {BESIDE + n: tuple(base.weights[n].shape) for n in own}
    check_tensors(path, tensors, sizes)
    return LoadedRule(rule, parameters, base.derived().for_rule(rule))


NOT_TRAINED = "train the meta-learner first (`--stages meta`)"


def _about(run: Run, name: str) -> dict[str, Any]:
    """What the file of a learned rule says of itself."""
    return load_about(run.folder.checkpoint(name), NOT_TRAINED)


def _of_another_base(run: Run, about: Mapping[str, Any]) -> bool:
    """Whether a rule was trained with another base than its run has now.

    A released model's checksums say that its files belong together.
    """
    if run.folder.released and "base" not in about:
        return False
    return about.get("base") != checkpoint_mark(run.folder, "memory")


def current_identity(run: Run, rule: str, protocol: str) -> str | None:
    """What rows of a rule in a protocol are marked with now; None = it cannot read as it is.

    Rows that are marked otherwise were made with other settings, or another model or rule.
    """
    tuned = tuned_settings(run)
    setting: list[Any] = []
    plain = rule.removesuffix(CACHE)
    if plain in HAND_MADE:
        setting.append(tuned.get(f"{plain}/{protocol}"))
    elif plain in LEARNED:
        there = run.folder.checkpoint(plain).exists()
        about = _about(run, plain) if there else {}
        known = there and not _of_another_base(run, about)
        setting.append(about[CHECKSUM] if known else None)
    if plain != rule:
        setting.append(tuned.get(f"{rule}/{protocol}"))
    return None if None in setting else row_identity(run, rule, setting)


def check_learned(run: Run) -> None:
    """Load the memory and every meta-learner to score: what is amiss shows now, not hours later.

    Raises:
        UserError: the memory was made with other settings, or see `Run.memory` and `load_learned`.
    """
    base, path = run.base, run.folder.checkpoint("memory")
    if not run.folder.released and not made_from(path, base_identity(run)):
        raise UserError(
            f"{path} was made with other settings of --adapt, --text or an extension than these, "
            "from another language model, or by an earlier version of mlm; run `--stages meta` "
            "again"
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


def ready_rule(run: Run, name: str, protocol: str, plain: Ready | None = None) -> Ready:
    """The rule of this name, tuned or loaded, with a tuned cache on top if its name ends so.

    Args:
        plain: the rule without a cache, if that is ready.
    """
    ready = plain or _ready(run, name.removesuffix(CACHE), protocol)
    if not name.endswith(CACHE):
        return ready

    def trials(progress: Progress, on_trial: Callable[[Trial], None]) -> list[Trial]:
        budget, window = run.config.evaluation.budget, cache_window(run)
        how = (run.tune_text, protocol, budget, window, progress, on_trial)
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
