"""Every setting with other values than its default, made from its type, and runs of them."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from tiny import tiny_config

from mlm.base.errors import UserError
from mlm.cli.flags import Setting, settings_of
from mlm.extensions.ngram_memory import LONGEST_CONTEXT
from mlm.runs.run import Run
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.sections import TextConfig
from mlm.stages.checks import check_folder, check_plan, check_text
from mlm.store.run_folder import RunFolder
from mlm.text.tokens import Prepared

Choice = tuple[str, Any]
"""Where a setting is, and its value."""

LEFT = ("corpus", "out", "size", "rule", "resume", "overwrite", "device", "text.data_dir")
"""Not what to compute, or tested elsewhere."""

NAMED: dict[str, tuple[Any, ...]] = {
    "adapt.dynamic": ("lstm,softmax.bias", "all", "low", "softmax.bias"),
    "meta.start": ("rms", "adam", "three_levels"),
    "evaluation.rules": (("static", "adam+cache"), ("momentum", "three_levels+cache")),
    "stages": (("lm", "meta"), ("meta", "evaluate")),
    "model.cutoffs": ((40, 100),),
    "model.adaptive_above": (100,),
    "adapt.rank": (4,),
    "meta.steps": (0, 2),
    "model.layers": (2,),
    "threads": (2,),
    "text.train_words": (1500,),
    "text.vocabulary_size": (300, 140),
    "extensions.ngram_memory.steps": ((1.0,) * LONGEST_CONTEXT,),
}
"""Values of settings whose type does not say which make sense. The rank is full by default."""


def base_config(corpus: Path, out: Path, **changes: Any) -> Config:
    """Settings from which each choice is one step away."""
    config = tiny_config(
        corpus, out, stages=("lm", "meta", "evaluate"), lm__epochs=0.1, lm__validations=1,
        lm__dropout_input=0.0, lm__dropout_hidden=0.0, lm__dropout_output=0.0, lm__segment=20,
        lm__validation_words=200, adapt__rank=64, adapt__fisher_words=300, meta__steps=1,
        meta__lanes=2, meta__unroll=4, meta__rules=("three_levels",), evaluation__budget=2,
        meta__start="sgd", adapt__dynamic="softmax.low,softmax.bias",
        evaluation__tune_words=60, evaluation__max_articles=1, evaluation__resamples=9,
        evaluation__rules=("static", "rms"),
    )  # fmt: skip
    return replaced(config, changes)


def alternatives(setting: Setting, other: Path) -> list[Any]:
    """One or two other values, or all others of a choice."""
    path, kind, value = setting.path, setting.kind, setting.value
    if path in NAMED:
        return [one for one in NAMED[path] if one != value]
    if isinstance(value, bool):
        return [not value]
    if get_origin(kind) is Literal:
        return [one for one in get_args(kind) if one != value]
    if get_origin(kind) is tuple:
        return [(one,) for one in setting.choices if (one,) != value]
    if isinstance(value, int):
        return [value // 2] if value > 1 else [50]
    if isinstance(value, float):
        return [value / 2 if value else 0.1]
    return [other]  # the folder of another run


def all_choices(config: Config, other: Path) -> list[Choice]:
    """Every setting with every value but its default."""
    return [
        (setting.path, value)
        for setting in settings_of(config)
        if setting.path not in LEFT
        for value in alternatives(setting, other)
    ]


def all_pairs(choices: list[Choice]) -> list[tuple[Choice, Choice]]:
    """Every two choices of different settings."""
    return [(a, b) for a, b in itertools.combinations(choices, 2) if a[0] != b[0]]


class World(NamedTuple):
    """What configurations are checked against."""

    base: Config
    other: Path
    """The folder of a finished run with these settings."""
    texts: dict[TextConfig, Prepared]
    """Text that was encoded before, by its settings."""

    def placed(self, config: Config) -> Config:
        """In the folder of the finished run, where its language model is asked for."""
        return config if "lm" in config.stages else replaced(config, {"out": self.other})

    def run(self, config: Config) -> Run:
        """A run of these settings; its text is not read again where it is the same."""
        assert config.out is not None
        run = Run(config, RunFolder(config.out), torch.device("cpu"), quiet=True)
        if config.text not in self.texts:
            self.texts[config.text] = run.data
        run.__dict__["data"] = self.texts[config.text]
        return run

    def refusal(self, config: Config, texts: bool = True) -> str | None:
        """What the checks before training say; None = nothing. `texts`: the text's, too."""
        try:
            validate(config)
            run = self.run(self.placed(config))
            check_folder(run)
            if texts:
                check_text(run)
            check_plan(run)
        except UserError as error:
            return str(error)
        return None


def covering(
    world: World, choices: list[Choice], pairs: list[tuple[Choice, Choice]], seed: int
) -> list[dict[str, Any]]:
    """Sets of choices that the checks let pass; every pair that they let pass is in one of them."""
    rng = random.Random(seed)
    left = {(a[0], repr(a[1]), b[0], repr(b[1])): (a, b) for a, b in pairs}
    found = []
    while left:
        chosen = dict(next(iter(left.values())))
        for path, value in rng.sample(choices, len(choices)):
            if path in chosen or rng.random() < 0.5:
                continue
            more = {**chosen, path: value}
            if world.refusal(replaced(world.base, more), texts=False) is None:
                chosen = more
        found.append(chosen)
        made = [c for c in choices if c[0] in chosen and repr(chosen[c[0]]) == repr(c[1])]
        for a, b in all_pairs(made):
            left.pop((a[0], repr(a[1]), b[0], repr(b[1])), None)
    return found
