"""Learning by reading on: the loop of extensions that learn shared weights from text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mlm.base.errors import UserError, uninterrupted
from mlm.base.progress import Progress
from mlm.base.schedule import cosine
from mlm.base.terminal import progress_bar
from mlm.kernels import buffers
from mlm.text.streams import LaneStream, MixedLanes, Segment


class Learner(Protocol):
    """What learns, and the lanes that it reads with.

    Each of several processes (`mlm.base.processes`) has its share of the lanes.
    """

    def learn(self, segments: Sequence[Segment], rate: float) -> float:
        """Read on, then one step of Adam along the sum of all processes; returns the nats of all.

        The segments are those of all lanes.
        """
        ...

    def learned(self) -> Sequence[Tensor]:
        """What it learns."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the place in the text."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`; at least one step was taken."""
        ...


@dataclass(frozen=True)
class Course:
    """How much is read, and how fast is learned."""

    name: str
    """The extension's."""
    title: str
    """Of the progress bar."""
    tokens: int
    """To read, in all."""
    segments: int
    """Between two steps."""
    peak: float
    """Of Adam's rate; cosine to zero."""
    diverged: Callable[[int, float], UserError]
    """What to say where, after so many tokens, the nats of a step are not finite."""


class _Lesson:
    """A learner and its place in the text: `mlm.base.progress.Work`."""

    def __init__(self, learner: Learner, lanes: LaneStream | MixedLanes) -> None:
        self.learner, self.lanes, self.tokens = learner, lanes, 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = self.learner.tensors() if self.tokens else {}
        return tensors, {"tokens": self.tokens, "cursor": self.lanes.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.tokens = about["tokens"]
        self.lanes.load_state_dict(about["cursor"])
        if self.tokens:
            self.learner.load(tensors)

    def step(self, course: Course) -> tuple[float, int]:
        """Nats and tokens of one step.

        Raises:
            UserError: the loss, or what is learned, is not finite.
        """
        learned = self.learner.learned()
        text = iter(self.lanes)
        pieces = [next(text).to(learned[0].device) for _ in range(course.segments)]
        rate = course.peak * cosine(self.tokens, course.tokens)
        nats = self.learner.learn(pieces, rate)
        finite = all(bool(tensor.isfinite().all()) for tensor in self.learner.learned())
        if not (math.isfinite(nats) and finite):
            raise course.diverged(self.tokens, nats)
        read = sum(int(piece.mask.sum()) for piece in pieces)
        self.tokens += read
        return nats, read


@torch.no_grad()
def learn_by_reading(
    learner: Learner, lanes: LaneStream | MixedLanes, course: Course, quiet: bool, keep: Progress
) -> None:
    """Let `learner` read what `lanes` hold; an interruption is gone on from.

    Raises:
        UserError: the loss is not finite.
    """
    lesson = _Lesson(learner, lanes)
    with (
        keep.of(course.name, lesson) as tick,
        progress_bar(course.title, course.tokens, initial=lesson.tokens, quiet=quiet) as bar,
    ):
        while lesson.tokens < course.tokens:
            with uninterrupted():
                nats, read = lesson.step(course)
            bar.set_postfix_str(f"loss {nats / read:.3f} nats per token", refresh=False)
            bar.update(read)
            tick()
    buffers.clear()
