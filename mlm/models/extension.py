"""The one mechanism by which optional parts of the memory plug in: `Extension`.

An extension is a frozen dataclass of settings whose methods are called while lanes read; it
overrides those that it needs. Its tensors are weights named `<name>/<what>`, so that checkpoints,
devices and gradients treat them as they treat all weights. What a lane remembers for it is a value
in `Reader.extras[name]`. The core calls the methods below and knows no extension by name.

Letters: B lanes, T tokens of a segment, E width of what the softmax sees.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor

from mlm.base.progress import NOTHING_KEPT, Progress
from mlm.models.language_model import OutputTerms, Weights
from mlm.models.output_layer import LOGITS
from mlm.text.streams import Segment, Text

Base = Any
"""An `mlm.models.base.AdaptationBase`, which holds extensions: its module imports this one."""


def numbers_of(module: ModuleType) -> dict[str, Any]:
    """The numbers, tuples and tables of numbers that a module names in capital letters."""

    def is_number(value: Any) -> bool:
        if isinstance(value, tuple | dict):
            values = value.values() if isinstance(value, dict) else value
            return bool(value) and all(map(is_number, values))
        return isinstance(value, int | float)

    return {n: v for n, v in vars(module).items() if n.isupper() and is_number(v)}


class LaneValue(Protocol):
    """What an extension remembers of B lanes: a value, never written in place."""

    def select(self, lanes: Tensor) -> Self:
        """That of some lanes (their indices)."""
        ...

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, for files."""
        ...

    def of(self, tensors: list[Tensor]) -> Self:
        """The value made of such `tensors`."""
        ...


@runtime_checkable
class GrowingValue(LaneValue, Protocol):
    """A `LaneValue` that grows with the text, by as many columns for each lane."""

    @property
    def size(self) -> int:
        """Columns."""
        ...

    def columns(self, size: int) -> list[Tensor]:
        """All of it in `size` columns, lanes first, empty ones before; `of` takes them, too."""
        ...


class Told(NamedTuple):
    """What the output layer is told of a segment, put together by one extension after another."""

    terms: OutputTerms
    notes: Mapping[str, Any]
    """By extension: what it wants to know of the segment again in `Extension.after`."""

    def with_added(self, added_BTE: Tensor) -> Told:
        """And this, added to the hidden states."""
        before = self.terms.added
        added_BTE = added_BTE if before is None else before + added_BTE
        return self._replace(terms=self.terms._replace(added=added_BTE))

    def with_note(self, name: str, note: Any) -> Told:
        """And an extension's note."""
        return self._replace(notes={**self.notes, name: note})


class Outcome(NamedTuple):
    """What came of a segment, for `Extension.after`."""

    gradient: Tensor | None
    """(B, T, E): of sum(nll) / T by what the softmax saw; None where nobody learns."""
    taught: Tensor
    """(B, T): tokens that teach."""


class Restart(NamedTuple):
    """Lanes that began another article within a segment, unmarked."""

    lanes: Tensor
    """(B,) those lanes: they read the segment again, from theta_0."""
    taught: Tensor
    """(B, T): tokens that teach; of these lanes those of the new article."""
    follows: Tensor
    """(B, T): of these lanes, tokens whose loss counts as it is read again."""


class Making(NamedTuple):
    """From what an adaptation base is made."""

    text: Text
    """Held-out training articles."""
    corpus: Text
    """The training articles of stage 1."""
    quiet: bool = True
    progress: Progress = NOTHING_KEPT
    """For what takes long: `Progress.of(<the extension's name>, work)`."""


class Extent(NamedTuple):
    """How much is read at once, for what an extension says of its memory and time."""

    lanes: int
    segment: int
    """Tokens between two updates."""
    text: int
    """Tokens of the text."""
    longest: int
    """Tokens that a lane reads at most before it begins anew."""
    articles: int
    vocabulary: int
    width: int
    """E."""
    weights: int
    """Numbers that a lane has of its own: weights, and what the rule keeps beside them."""
    tokens_per_word: float

    @property
    def logits(self) -> float:
        """Bytes of the logits that the fused softmax works on together."""
        each = self.segment * self.vocabulary
        return 4.0 * each * max(1, min(self.lanes, LOGITS // each))


class Need(NamedTuple):
    """What some work takes."""

    bytes: float = 0.0
    """At its peak, beside the weights that all lanes share."""
    tokens: float = 0.0
    """That lanes with weights of their own read."""


class Plan(NamedTuple):
    """What is known of a run before anything is trained, for `Extension.problems`."""

    dynamic: tuple[str, ...]
    """The weights that adapt."""
    folded: tuple[str, ...] | None
    """Matrices that adapt in a basis of their own (`mlm.models.low_rank.folds`); None = the model's
    sizes are not known yet."""
    learn: tuple[str, ...]
    """--meta.learn."""
    gradient: str
    """--meta.gradient."""
    through: str
    """--lm.through."""
    goes_on: bool
    """Whether stage 1 goes on from another language model (--lm.init)."""
    extensions: tuple[Extension, ...]
    """All that are enabled."""


class LearnedWithModel(Protocol):
    """What an extension learns in stage 1 beside the language model's weights."""

    def added(self, segment: Segment) -> Tensor:
        """(B, T, E), a leaf: what is added to the hidden states of the next segment."""
        ...

    def learn(self, gradient_BTE: Tensor, embedding_VE: Tensor) -> None:
        """Learn from the gradient of the segment's summed nll by what was added."""
        ...

    def weights(self) -> Weights:
        """What belongs to the language model, by the extension's names."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, for files."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`."""
        ...


@dataclass(frozen=True)
class Extension:
    """An optional part of the memory; every method here does nothing."""

    name: ClassVar[str]
    """Of its weights, its values and its record in files."""
    of_model: ClassVar[bool] = False
    """Whether it belongs to the language model: static reading uses it, too."""
    makes_base: ClassVar[bool] = False
    """Whether `fold` or `make` changes the adaptation base, which then depends on this extension
    and on those before it."""
    of_hidden_states: ClassVar[bool] = False
    """Whether `make` fits the language model, and is called anew for another one in its base."""
    reweights: ClassVar[bool] = False
    """Whether rules follow another gradient than that of the loss: meta-training then asks for
    both."""

    # -- settings and files -----------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the settings ask for it."""
        return False

    def active(self, weights: Weights) -> bool:
        """Whether it takes part where these are the weights."""
        return self.enabled

    def problems(self, plan: Plan) -> Sequence[str]:
        """Why it cannot work in such a run, one message each, before anything is trained."""
        return ()

    @classmethod
    def constants(cls) -> dict[str, Any]:
        """The numbers in capital letters of its module: all that moves a loss besides settings."""
        return numbers_of(sys.modules[cls.__module__])

    def fingerprint(self) -> dict[str, Any]:
        """Settings and constants, for files."""
        return {**dataclasses.asdict(self), **self.constants()}

    def key(self, what: str) -> str:
        """The name of one of its weights."""
        return f"{self.name}/{what}"

    def lane_bytes(self, extent: Extent) -> float:
        """What its values, and reading with it, take at their peak."""
        return 0.0

    def making(self, text: Extent, corpus: Extent) -> Need:
        """What `fold`, `make` or `with_model` take; the texts are those of `Making`."""
        return Need()

    def after_rule_need(self, extent: Extent) -> Need:
        """What `after_rule` takes; `extent` is of the text it reads."""
        return Need()

    # -- where it applies -------------------------------------------------------------------

    def applies_to(self, rule: Any) -> bool:
        """Whether lanes that this update rule writes read with it."""
        return True

    def applies_in(self, protocol: str) -> bool:
        """Whether it takes part in a protocol, `article` or `stream`."""
        return True

    # -- made once --------------------------------------------------------------------------

    def fold(self, base: Base, making: Making) -> Base:
        """The base with its weights, before the Fisher is estimated."""
        return base

    def make(self, base: Base, making: Making) -> Base:
        """The base with its weights, after the Fisher."""
        return base

    def derived(self, base: Base) -> Weights:
        """Weights that follow from others, made anew wherever those change."""
        return {}

    def prepare(self, base: Base, bound: Any) -> Weights:
        """Weights that follow from the rule with its parameters (`mlm.rules.protocol.Bound`)."""
        return {}

    def with_model(self, text: Text, embedding_VE: Tensor, lanes: int) -> LearnedWithModel | None:
        """What it learns in stage 1 on this text, beside this embedding; None = nothing."""
        return None

    def after_rule(
        self, base: Base, bound: Any, text: Text, seed: int, quiet: bool, progress: Progress
    ) -> Weights:
        """Weights that it learns with a trained rule (`mlm.rules.protocol.Bound`), kept where they
        gain on validation; empty = none. `progress` is as in `Making`."""
        return {}

    # -- reading ----------------------------------------------------------------------------

    def begin(self, base: Base, lanes: int) -> LaneValue | None:
        """What it remembers of lanes that have read nothing; None = nothing ever."""
        return None

    def open(self, value: Any, new_B: Tensor, reset_B: Tensor) -> Any:
        """The value where lanes in `new_B` open an article, and those in `reset_B`, all of these
        among them, begin again at theta_0."""
        return value

    def before(
        self, weights: Weights, value: Any, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        """What the output layer is told of a segment besides what other extensions `told`.

        Args:
            weights: all of the base's, lanes' own in place of theta_0.
            hidden_BTE: the segment's hidden states, without gradient.
        """
        return told

    def after(self, weights: Weights, value: Any, segment: Segment, note: Any, out: Outcome) -> Any:
        """The value behind a segment; `note` is what `before` noted, None = nothing."""
        return value

    def restart(
        self, base: Base, value: Any, segment: Segment, age_B: Tensor
    ) -> tuple[Restart | None, Any]:
        """Which lanes began another article in the segment (None = none did), and the value behind
        it. `age_B` counts the updates since a lane was last at theta_0."""
        return None, value
