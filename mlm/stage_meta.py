"""Stage 2: long-term memory, tuned and learned rules; made, kept in the run folder, loaded.

Letters: A articles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlm.borders import learn_borders
from mlm.cache import CacheSetting
from mlm.cache_tuning import tune_cache
from mlm.checkpoint import (
    RunFolder,
    load_about,
    load_lm,
    load_tensors,
    save_memory,
    save_tensors,
)
from mlm.config import CACHE, HAND_MADE, LEARNED, AdaptConfig, Config, MetaConfig, to_dict
from mlm.errors import UserError
from mlm.files import write_text
from mlm.gates import Feature, LinearGates
from mlm.learner import Bound, Parameters, UpdateRule, as_parameters
from mlm.lm import BaseModel, Weights
from mlm.lowrank import add_low_rank, plain, turned
from mlm.memory import LongTerm, choose_dynamic, has_low_rank
from mlm.meta import (
    READ_OUT_GAIN,
    MetaTrainer,
    estimate_fisher,
    static_of,
    train_meta,
    validation_gain,
)
from mlm.phrases import ReadOut
from mlm.read_out import as_tensors, learn_read_out, read_out_of, taken, with_read_out
from mlm.related import relate, related_words
from mlm.rules import (
    HAND_MADE_RULES,
    as_gates,
    describe,
    learned_rule,
    open_slow,
    rule_of,
    start_at,
)  # fmt: skip
from mlm.run import Run, say
from mlm.training import Text
from mlm.tuning import Trial, tune
from mlm.warp import followed, learn_bases

WEIGHTS = "weights/"
"""Beginning of the names of the language model's weights beside a rule's parameters."""
FIRST_ORDER = ("reverse", "checkpoint", "forward")

# -- long-term memory ---------------------------------------------------------------------------


def identity(run: Run, learned: bool = True) -> str:
    """Hash of what a stage-2 result depends on; a changed one is not reused.

    `learned`: what is learned matters; hand-made rules depend neither on it nor on the seed.
    """
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text", "adapt", "meta", "evaluation", "seed")}
    for name in ("rules", "protocols", "split", "lanes", "max_articles", "resamples"):
        keys["evaluation"].pop(name)
    for part, name in (("adapt", "threads"), ("adapt", "kernels")):
        keys[part].pop(name)  # how it is computed; results agree to rounding
    if not keys["meta"]["read_out_words"]:
        keys["meta"].pop("read_out_words")
    if keys["meta"]["gradient"] in FIRST_ORDER:
        keys["meta"].pop("gradient")
    if not learned:
        for name in ("meta", "seed"):
            keys.pop(name)
        _keep_memory(keys["adapt"])
    return _hash(run, keys)


def _keep_memory(adapt: dict[str, Any]) -> None:
    """Forget settings of adaptation that only learned rules depend on."""
    adapt["surprise"], adapt["phrases"] = 0.0, 0
    if not adapt["basis_words"]:  # else bases are learned so
        adapt["at_once"] = False


def memory_identity(run: Run) -> str:
    """Hash of what the long-term memory depends on."""
    config = to_dict(run.config)
    keys = {k: config[k] for k in ("corpus", "text")} | {"adapt": _memory_settings(run)}
    return _hash(run, keys)


def _memory_settings(run: Run) -> dict[str, Any]:
    """Settings of adaptation that the long-term memory depends on."""
    adapt = to_dict(run.config.adapt)
    for name in ("threads", "kernels", "guard"):
        adapt.pop(name)
    _keep_memory(adapt)
    return adapt


def _hash(run: Run, keys: dict[str, Any]) -> str:
    """Of settings, without those that are not in use, and the language model."""
    if not has_low_rank(run.config.adapt.dynamic):
        keys["adapt"].pop("rank")
    for name in ("related", "borders", "basis_words", "at_once", "surprise", "phrases"):
        if not keys["adapt"][name]:
            keys["adapt"].pop(name)
    if keys["adapt"]["precision"] == "float32":
        keys["adapt"].pop("precision")
    if run.config.lm.through == "learned" and run.config.lm.through_run is not None:
        other = RunFolder(run.config.lm.through_run).checkpoint("memory")
        keys["through"] = load_about(other, "make it first (`--stages meta`)").get("identity")
    path = run.folder.checkpoint("lm")
    weights = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
    return hashlib.sha256(json.dumps([keys, weights]).encode()).hexdigest()[:16]


def new_memory(
    weights: Weights,
    shape: BaseModel,
    adapt: AdaptConfig,
    text: Text,
    quiet: bool = True,
    corpus: Text | None = None,
) -> LongTerm:
    """theta_0 with the low-rank changes that are asked for, and its Fisher, from held-out text;
    words are related as in `corpus` (None: that text, too)."""
    dynamic = choose_dynamic(weights, adapt.dynamic)
    weights = add_low_rank(weights, shape, dynamic, adapt.rank, text, adapt.fisher_words)
    if adapt.related:
        found = related_words(corpus or text, shape.vocabulary, adapt.related)
        weights = relate(weights, dynamic, found)
    return estimate_fisher(
        weights,
        shape,
        dynamic,
        text,
        adapt.segment,
        adapt.fisher_words,
        quiet=quiet,
        prior=adapt.fisher_prior,
    )


def build_memory(run: Run) -> LongTerm:
    """theta_0 and its Fisher, estimated after stage 1 and kept in the run folder.

    What the folder holds is taken if it was made from the same.
    """
    path, mark = run.folder.checkpoint("memory"), memory_identity(run)
    if _made_from(path, mark):
        return run.memory
    weights, shape, _ = load_lm(run.folder.checkpoint("lm"), run.data.vocabulary.hash)
    weights = {n: w.to(run.device) for n, w in weights.items()}
    adapt, text = run.config.adapt, run.training_text(1)
    through = run.config.lm.through == "learned"
    if through:
        memory = followed(_memory_of_through_run(run), weights)
    else:
        corpus = run.training_text(0) if adapt.related else None
        memory = new_memory(weights, shape, adapt, text, run.quiet, corpus)
    if adapt.borders:  # by the hidden states of this very model
        memory = dataclasses.replace(memory, borders=learn_borders(shape, weights, text))
    if adapt.basis_words and not through:
        memory = dataclasses.replace(turned(memory), at_once=adapt.at_once)
        memory = learn_bases(memory, text, adapt.basis_words, run.quiet)
    save_memory(path, memory, run.data.vocabulary.hash, mark)
    return run.ready(memory)


def through_run(config: Config, vocabulary_hash: str, device: torch.device) -> Run:
    """The run whose rule stage 1 went through.

    Raises:
        UserError: none is named, it is not there, or it is for another vocabulary.
    """
    path = config.lm.through_run
    if path is None:
        raise UserError(
            "--lm.through learned: name a run folder whose stage 2 is done with --lm.through-run"
        )
    folder = RunFolder(path)
    run = Run(folder.load_config(), folder, device, quiet=True)
    if run.vocabulary.hash != vocabulary_hash:
        raise UserError(f"--lm.through-run {path} belongs to another vocabulary than this text")
    return run


def _memory_of_through_run(run: Run) -> LongTerm:
    """The long-term memory in whose bases the language model was trained.

    Raises:
        UserError: it was made for other settings of adaptation than the run's.
    """
    other = through_run(run.config, run.data.vocabulary.hash, run.device)
    mine, its = (_memory_settings(r) for r in (run, other))
    differ = sorted(f"--adapt.{n.replace('_', '-')}" for n in mine if mine[n] != its[n])
    if differ:
        raise UserError(
            f"the language model was trained through the rule of {other.folder.path}, whose "
            f"long-term memory it needs, but {', '.join(differ)} differ from the settings there; "
            "use the same ones"
        )
    return other.memory


def _made_from(path: Path, mark: str) -> bool:
    """Whether the long-term memory at `path` is whole and made from what `mark` names."""
    try:
        return load_about(path, "").get("identity") == mark
    except UserError:
        return False


def _tuned(run: Run, key: str, trials: Callable[[], list[Trial]]) -> dict[str, float]:
    """The best setting under this key of tuning.json, tried and remembered there if need be."""
    path = run.folder.path / "tuning.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not tuned yet, or damaged: tune again
        known = {}
    mark = identity(run, key.partition("/")[0].removesuffix(CACHE) in LEARNED)
    if known.get(key, {}).get("identity") == mark:
        return known[key]["setting"]
    say(f"tuning {key} on validation: {run.config.evaluation.budget} settings")
    found = trials()
    known[key] = {
        "identity": mark,
        "setting": found[0].setting,
        "trials": [{**t.setting, "nll": t.nll if math.isfinite(t.nll) else None} for t in found],
    }
    write_text(path, json.dumps(known, indent=1) + "\n")
    return found[0].setting


def tuned_rule(
    run: Run, memory: LongTerm, name: str, protocol: str
) -> tuple[UpdateRule, dict[str, float]]:
    """A hand-made rule and its best settings on validation."""
    rule, budget = HAND_MADE_RULES[name], run.config.evaluation.budget
    memory = seen_by(rule, memory)
    setting = _tuned(
        run, f"{name}/{protocol}", lambda: tune(memory, rule, run.tune_text, protocol, budget)
    )
    return rule, setting


def seen_by(rule: UpdateRule, memory: LongTerm) -> LongTerm:
    """The long-term memory as a rule reads with it: borders open FLUSH, where it is learned, and
    hand-made rules read as they were published."""
    learned = isinstance(rule, LinearGates)
    borders = memory.borders if learned and rule.flush else None
    return dataclasses.replace(
        memory,
        borders=borders,
        at_once=memory.at_once and learned,
        surprise=memory.surprise if learned else 0.0,
        phrases=memory.phrases if learned else memory.phrases and memory.phrases.of_corpus(),
    )


# -- learned rules ------------------------------------------------------------------------------


class Learned(NamedTuple):
    """A rule with its parameters, and the long-term memory it starts from."""

    rule: UpdateRule
    parameters: Parameters
    memory: LongTerm

    def bound(self) -> Bound:
        """Ready to read."""
        return self.rule.bind(self.parameters, self.memory)


def starting_point(run: Run, memory: LongTerm) -> Learned:
    """The rule that --meta.start names, tuned or trained before; of a language model that was
    trained through a learned rule, that rule.

    Raises:
        UserError: a learned rule that is not trained yet.
    """
    start = run.config.meta.start
    if run.config.lm.through == "learned":
        other = through_run(run.config, run.data.vocabulary.hash, run.device)
        return load_learned(other, other.config.meta.rules[0], memory)
    if start in HAND_MADE:
        rule, setting = tuned_rule(run, memory, start, "article")
        return Learned(rule, as_parameters(setting, memory), memory)
    return load_learned(run, start, memory)


def new_rule(meta: MetaConfig, name: str, start: Learned) -> tuple[LinearGates, Parameters]:
    """The learned rule of this name as these settings want it, and where its training starts.

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
        start=start.rule,
    )
    parameters = start_at(rule, start.rule, start.parameters, start.memory)
    if rule.slow and not as_gates(start.rule).slow:
        open_slow(parameters)
    if (rule.per_weight or rule.per_unit) and meta.gradient == "forward":
        own = "weight" if rule.per_weight else "row and column"
        raise UserError(
            f"--meta.gradient forward: {name} has a parameter per {own}, and forward mode holds a "
            "copy of the weights for each; use reverse or checkpoint"
        )
    if meta.fisher == "flush" and rule.flush and "fisher" in rule.columns:
        parameters["flush"][:, rule.columns["fisher"]] = 1.0
    return rule, parameters


def meta_text(run: Run) -> Text:
    """The training articles that --meta.text names."""
    wanted = run.config.meta.text
    if wanted != "all":
        return run.training_text(1 if wanted == "held_out" else 0)
    parts = [run.training_text(part) for part in (0, 1)]
    articles = [article for part in parts for article in part.articles]
    return Text(articles, sum(part.words for part in parts), parts[0].eos)


def stage_meta(run: Run) -> None:
    """Stage 2: Fisher, a tuned starting point, then the meta-learner."""
    memory, meta = build_memory(run), run.config.meta
    text, tune_text = meta_text(run), run.tune_text
    static = static_of(memory, tune_text, run.config.evaluation.protocols)
    mark = identity(run)
    for name in meta.rules:
        start = starting_point(run, memory)
        rule, first = new_rule(meta, name, start)
        own = dataclasses.replace(
            start.memory,
            borders=memory.borders,  # what a hand-made start does not see
            at_once=memory.at_once,
            surprise=memory.surprise,
            phrases=memory.phrases,
        )
        own = with_read_out(seen_by(rule, own), read_out_of(start.memory))
        trainer = MetaTrainer(own, rule, first, text, meta, run.config.seed)
        best, gain = train_meta(
            trainer,
            lambda t: validation_gain(t.memory, t.rule, t.parameters, tune_text, static),
            run.folder,
            run.config.evaluation.budget,
            text.tokens_per_word,
            mark,
            run.config.resume,
            run.quiet,
        )
        about = {
            "rule": describe(rule),
            "dynamic": list(memory.dynamic),
            "columns": list(rule.columns),
            "gain": gain,
            "identity": mark,
        }
        read_out = read_out_of(own)
        if meta.read_out_words:
            found, gained = _read_out(run, trainer, best, text, static)
            if gained > gain:
                read_out, gain = found, gained
                about["gain"] = gain
        save_tensors(run.folder.checkpoint(name), {**best, **as_tensors(read_out)}, about)
        say(f"{name}: {gain * text.tokens_per_word:.3f} nats per word gained on validation")
        if trainer.flushed:
            say(f"{name}: the guard reset a lane {trainer.flushed} times during training")


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A rule's parameters, and the language model's weights beside them, by their own names."""
    own = {n.removeprefix(WEIGHTS): t for n, t in tensors.items() if n.startswith(WEIGHTS)}
    return {n: t for n, t in tensors.items() if not n.startswith(WEIGHTS)}, own


def _read_out(
    run: Run, trainer: MetaTrainer, best: Parameters, text: Text, static: dict[str, float]
) -> tuple[ReadOut, float]:
    """What the best rule learns of how to read phrases out, and its gain on validation with it."""
    parameters, own = _parted(best)
    memory = dataclasses.replace(trainer.memory, weights={**trainer.memory.weights, **own})
    rule, meta = trainer.rule, run.config.meta
    bound = rule.bind(parameters, memory)
    seed = run.config.seed + 4
    found = learn_read_out(memory, bound, text, meta.read_out_words, seed, run.quiet)
    able = with_read_out(memory, found)
    gained = validation_gain(able, rule, parameters, run.tune_text, static)
    row = {READ_OUT_GAIN: gained * text.tokens_per_word}
    run.folder.log(stage="meta", rule=rule.name, step=trainer.step, **row)
    return found, gained


def load_learned(run: Run, name: str, memory: LongTerm) -> Learned:
    """A trained meta-learner from the run folder, with the weights it was trained to start from.

    Raises:
        UserError: missing, not finite, or trained for other dynamic weights.
    """
    path = run.folder.checkpoint(name)
    tensors, about = load_tensors(path, "train the meta-learner first (`--stages meta`)")
    if tuple(about["dynamic"]) != memory.dynamic:
        raise UserError(
            f"{path} was trained for the weights {', '.join(about['dynamic'])}, but those that "
            f"adapt now are {', '.join(memory.dynamic)}; run `--stages meta` again"
        )
    broken = [n for n, t in tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise UserError(
            f"{path}: {', '.join(broken)} of rule {name} are not finite; run `--stages meta` again"
        )
    tensors = {n: t.to(run.device) for n, t in tensors.items()}
    read_out, tensors = taken(tensors)
    parameters, own = _parted(tensors)
    if own:
        memory = plain(memory)
        memory = dataclasses.replace(memory, weights={**memory.weights, **own})
    rule = rule_of(name, about["rule"])
    return Learned(rule, parameters, with_read_out(seen_by(rule, memory), read_out))


def check_learned(run: Run) -> None:
    """Load the memory and every meta-learner to score: what is amiss shows now, not hours later.

    Raises:
        UserError: the memory was made with other settings, or see `Run.memory` and `load_learned`.
    """
    memory, path = run.memory, run.folder.checkpoint("memory")
    if not _made_from(path, memory_identity(run)):
        raise UserError(
            f"{path} was made with other settings of --adapt or --text than these, or from another "
            "language model; run `--stages meta` again"
        )
    for name in {rule.removesuffix(CACHE) for rule in run.config.evaluation.rules} & set(LEARNED):
        load_learned(run, name, memory)


# -- ready to score -----------------------------------------------------------------------------


class Ready(NamedTuple):
    """What scoring needs of a rule."""

    memory: LongTerm
    bound: Bound | None
    """None = static."""
    cache: tuple[CacheSetting, ...]
    """The neural cache on top, if any."""
    setting: dict[str, Any]
    """For the table."""


def ready_rule(run: Run, name: str, protocol: str) -> Ready:
    """The rule of this name, tuned or loaded, with a tuned cache on top if its name ends so."""
    base = name.removesuffix(CACHE)
    ready = _ready(run, base, protocol)
    if base == name:
        return ready
    text = run.validation_text(run.config.evaluation.tune_words)
    window = round(run.config.evaluation.cache_words * text.tokens_per_word)
    budget = run.config.evaluation.budget

    def trials() -> list[Trial]:
        return tune_cache(ready.memory, ready.bound, run.tune_text, protocol, budget, window)

    found = _tuned(run, f"{name}/{protocol}", trials)
    cache = (CacheSetting(found["theta"], found["weight"], window),)
    more = {f"cache {key}": value for key, value in found.items()}
    return ready._replace(cache=cache, setting={**ready.setting, **more})


def _ready(run: Run, name: str, protocol: str) -> Ready:
    memory = run.memory
    if name == "static":
        return Ready(memory, None, (), {})
    if name in HAND_MADE:
        rule, setting = tuned_rule(run, memory, name, protocol)
        memory = seen_by(rule, memory)
        return Ready(memory, rule.bind(as_parameters(setting, memory), memory), (), dict(setting))
    learned = load_learned(run, name, memory)
    rule = learned.rule
    setting = {
        "parameters": sum(p.numel() for p in learned.parameters.values()),
        "features": ", ".join(rule.features) if isinstance(rule, LinearGates) else "",
    }
    return Ready(learned.memory, learned.bound(), (), setting)
