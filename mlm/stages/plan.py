"""What is said of the stages: which come, what each takes, which are skipped or done before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlm.base.errors import UserError
from mlm.base.terminal import say
from mlm.runs.base import made_from
from mlm.runs.identity import identity
from mlm.runs.run import Run
from mlm.stages.fit import Takes, shown_bytes, shown_seconds
from mlm.store.tensors import load_about

TITLES = {
    "lm": "language model",
    "meta": "meta-learner",
    "evaluate": "evaluation",
    "draw": "pictures",
}
"""The stages in order, as a person knows them."""


class Done(NamedTuple):
    """How far a stage has come."""

    share: float = 0.0
    where: str = ""
    """It goes on."""


@dataclass(frozen=True)
class StagePlan:
    """The stages of a command, announced one after another."""

    stages: Sequence[str]
    """All that the command knows, those that are skipped included."""
    chosen: Collection[str]
    takes: Mapping[str, Takes]
    why_not: str = "not in --stages"
    """Why others than the chosen ones are skipped."""
    done: Mapping[str, Done] = field(default_factory=dict)
    """What an earlier process has done."""

    def left(self, stage: str) -> Takes | None:
        """What is left of a stage takes; None = nothing is left, or it is not known."""
        share, takes = self.done.get(stage, Done()).share, self.takes.get(stage)
        if stage not in self.chosen or takes is None or share >= 1:
            return None
        return takes._replace(seconds=(1 - share) * takes.seconds)

    def announce(self, folder: Path) -> None:
        """Say what all stages take together, if there are several."""
        parts = [part for part in map(self.left, self.stages) if part]
        if len(parts) > 1:
            whole = Takes(max(part.bytes for part in parts), sum(part.seconds for part in parts))
            say(f"{folder}: {len(parts)} stages, {shown_takes(whole)} of memory")

    def begin(self, stage: str) -> bool:
        """Announce a stage; whether it is a chosen one."""
        done, left = self.done.get(stage, Done()), self.left(stage)
        if stage not in self.chosen:
            told = f"skipped ({self.why_not})"
        elif done.share >= 1:
            told = "done before"
        else:
            told = "; ".join(filter(None, [left and shown_takes(left), done.where]))
        place = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {TITLES[stage]}"
        say(f"{place}: {told}" if told else place)
        return stage in self.chosen


def shown_takes(takes: Takes) -> str:
    """For a reader: time and memory."""
    memory = f", up to {shown_bytes(takes.bytes)}" if takes.bytes else ""
    return f"{shown_seconds(takes.seconds)}{memory}"


def done_before(run: Run) -> dict[str, Done]:
    """What an earlier process has done of training, where the run goes on."""
    if not run.config.resume:
        return {}
    found = {"lm": _model_done(run)} if "lm" in run.config.stages else {}
    rules = run.config.meta.rules
    if all(done.share >= 1 for done in found.values()) and rules:
        mark = identity(run)
        number = sum(made_from(run.folder.checkpoint(name), mark) for name in rules)
        found["meta"] = Done(number / len(rules))
    return found


def _model_done(run: Run) -> Done:
    """How far stage 1 has come; what is wrong with its checkpoint it says itself."""
    try:
        about = load_about(run.folder.checkpoint("lm_last"), "")
        step, steps = int(about["step"]), int(about["steps"])
    except (UserError, LookupError, TypeError, ValueError):
        return Done()
    return Done(step / max(1, steps), f"goes on at step {step} of {steps}")
