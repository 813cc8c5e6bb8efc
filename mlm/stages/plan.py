"""What is said of the stages: which come, what each takes, which are skipped or done before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class StagePlan:
    """The stages of a command, announced one after another."""

    stages: Sequence[str]
    """All that the command knows, those that are skipped included."""
    chosen: Collection[str]
    takes: Mapping[str, Takes]
    why_not: str = "not in --stages"
    """Why others than the chosen ones are skipped."""

    def announce(self, folder: Path, resume: bool = False) -> None:
        """Say what all chosen stages take together, if there are several."""
        parts = [self.takes[s] for s in self.stages if s in self.chosen and s in self.takes]
        if len(parts) > 1:
            whole = Takes(max(part.bytes for part in parts), sum(part.seconds for part in parts))
            kept = "; what is done is kept" if resume else ""
            say(f"{folder}: {len(self.chosen)} stages, {shown_takes(whole)} of memory{kept}")

    def begin(self, stage: str, done: float = 0.0, where: str = "") -> bool:
        """Announce a stage; whether it is a chosen one.

        Args:
            done: the share of it that an earlier process has done.
            where: it goes on.
        """
        if stage not in self.chosen:
            told = f"skipped ({self.why_not})"
        elif done >= 1:
            told = "done before"
        else:
            takes = self.takes.get(stage)
            left = shown_takes(takes._replace(seconds=(1 - done) * takes.seconds)) if takes else ""
            told = "; ".join(filter(None, [left, where]))
        place = f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {TITLES[stage]}"
        say(f"{place}: {told}" if told else place)
        return stage in self.chosen


def shown_takes(takes: Takes) -> str:
    """For a reader: time and memory."""
    memory = f", up to {shown_bytes(takes.bytes)}" if takes.bytes else ""
    return f"{shown_seconds(takes.seconds)}{memory}"


def model_done(run: Run) -> tuple[float, str]:
    """Which share of stage 1 is done, and where it goes on."""
    path = run.folder.checkpoint("lm_last")
    if not (run.config.resume and path.exists()):
        return 0.0, ""
    try:
        about = load_about(path, "")
        step, steps = int(about["step"]), int(about["steps"])
    except (UserError, LookupError, TypeError, ValueError):  # stage 1 says what is wrong
        return 0.0, ""
    return step / max(1, steps), f"goes on at step {step} of {steps}"


def rules_done(run: Run) -> tuple[float, str]:
    """Which share of the rules of stage 2 is trained."""
    rules = run.config.meta.rules
    if not (run.config.resume and rules):
        return 0.0, ""
    mark = identity(run)
    number = sum(made_from(run.folder.checkpoint(name), mark) for name in rules)
    return number / len(rules), f"{number} of {len(rules)} rules are trained" if number else ""
