"""Stage 1 through the adaptation: weights trained to be rewritten.

Every lane reads under theta_0 + delta; an update rule moves delta after each segment, and theta_0
and all other weights follow the gradient of the loss under theta_0 + delta. That is the
first-order meta-gradient (see `mlm.reading.meta_gradient`) with one update of theta_0 per segment:
delta does not depend on theta_0 to first order. Compare MAML (Finn et al. 2017) and end-to-end
test-time training. The rule is Krause's, with a Fisher that is learned along the way, or the one
that another run's stage 2 has learned, in that run's bases; through the latter n-gram embeddings
can be learned, too. Letters: B lanes, T tokens per segment.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mlm.base.errors import UserError
from mlm.extensions.boundaries import Boundaries
from mlm.extensions.learned_basis import folded_matrices, follow_weights
from mlm.extensions.ngram_embeddings import NGramEmbeddings, NGramTrainer
from mlm.extensions.ngram_memory import NGramMemory, inverse_square_length
from mlm.extensions.surprise_weighting import SurpriseWeighting
from mlm.extensions.word_coupling import COUPLING, uncoupled
from mlm.kernels import buffers
from mlm.models.base import AdaptationBase, choose_dynamic
from mlm.models.language_model import Weights
from mlm.models.low_rank import BASIS, LOW, base_of
from mlm.models.recurrent import BaseModel
from mlm.reading.scoring import score_articles
from mlm.reading.step import Reader, Scored, Step, begin, prepared, step
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import Bound, LoadedRule, Static
from mlm.settings.config import Config
from mlm.store.run_folder import RunFolder
from mlm.text.streams import Segment, Text
from mlm.training.fisher import smooth_fisher
from mlm.training.language_model import LMTrainer

FISHER_SEGMENTS = 500
"""The running mean of squared gradients looks back so many segments of every lane."""


class ThroughTrainer(LMTrainer):
    """`LMTrainer` in which the lanes adapt while the weights are trained.

    The validation loss is that of adapted reading, too.
    """

    reader: Reader
    dynamic: tuple[str, ...]
    """What the lanes hold of their own."""

    def __init__(self, config: Config, shape: BaseModel, text: Text, device: torch.device) -> None:
        super().__init__(config, shape, text, device)
        self.precision = torch.float32

    def base(self) -> AdaptationBase:
        """theta_0 as it is now."""
        raise NotImplementedError

    def bound(self, base: AdaptationBase) -> Bound:
        """The rule at work."""
        raise NotImplementedError

    def follow(self) -> None:
        """The weights have moved."""

    def shared(self) -> tuple[str, ...]:
        """The weights that lanes share, by which the loss is differentiated."""
        return tuple(n for n in self.weights if n not in self.dynamic)

    def gradient(self, name: str, scored: Scored) -> Tensor:
        """By a weight, of the sum over lanes of what `Scored.gradients` are of."""
        return scored.of_all_lanes(name)

    def count(self, gradients: Weights, full_B: Tensor) -> None:
        """See gradients of lanes; those in `full_B` read a whole segment."""

    def hear(self, now: Step, segment: Segment) -> None:
        """See what was read, before the weights move."""

    def train_step(self) -> tuple[float, int]:
        """One segment read, delta and all weights moved; returns (nats per token, tokens).

        Raises:
            UserError: the loss is not finite; the weights are untouched by it.
        """
        segment = self.next_segment()
        base = self.base()
        out = {n: buffers.acquire(tuple(w.shape), w) for n, w in self.reader.weights.items()}
        now = step(base, self.bound(base), self.reader, segment, out, self.shared())
        count = int(segment.mask.sum())
        value = float(now.scored.nll.sum()) / count
        if not math.isfinite(value):
            other = " or --lm.through-rate" if self.settings.through == "rms" else ""
            raise UserError(
                f"stage 1, step {self.step}: the loss is {value}. The last checkpoint is kept; "
                f"lower --learning-rate (now {self.settings.learning_rate}){other}, "
                "then --resume"
            )
        scale = segment.inputs.shape[1] / count
        for name, weight in self.weights.items():
            weight.grad = self.gradient(name, now.scored).mul_(scale)
        self.count(now.scored.gradients, segment.mask.all(1))
        self.hear(now, segment)
        before = {n: base.weights[n].clone() for n in self.dynamic}
        self._descend()
        self.follow()  # the memory's weights are the trained ones, or follow them in place
        for n, old in before.items():  # delta is kept, theta_0 moves under it
            now.after.weights[n] += base.weights[n] - old
        now.release(self.reader)
        buffers.release(self.reader.weights.values())
        self.reader, self.step = now.after, self.step + 1
        return value, count

    def start_from(self, run: RunFolder, vocabulary_hash: str) -> None:
        """See `LMTrainer.start_from`."""
        super().start_from(run, vocabulary_hash)
        self.follow()

    def validation_loss(self, valid: Text) -> float:
        """Mean loss of adapted reading, each article from theta_0, nats per token."""
        base = self.base()
        lanes = min(self.settings.lanes, len(valid.articles))
        scores = score_articles(base, self.bound(base), valid.articles, valid.eos, lanes)
        return scores.total / valid.tokens

    def more_tensors(self) -> dict[str, Tensor]:
        """And the lanes' weights and state."""
        return super().more_tensors() | {f"reader/{n}": t for n, t in self.reader.tensors().items()}

    def load_more(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `more_tensors`."""
        super().load_more(tensors)
        prefix = "reader/"
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.reader = self.reader.of(found)
        self.follow()


class ThroughRMS(ThroughTrainer):
    """Through Krause's rule.

    The Fisher is a running mean over the lanes' own segment gradients, which reading gives for
    nothing.
    """

    def __init__(self, config: Config, shape: BaseModel, text: Text, device: torch.device) -> None:
        super().__init__(config, shape, text, device)
        s = config.lm
        self.dynamic = choose_dynamic(self.weights, config.adapt.dynamic)
        self.squares = {n: torch.zeros_like(self.weights[n]) for n in self.dynamic}
        """Running mean of squared gradients, biased towards zero until corrected."""
        self.prior, self.guard = config.adapt.fisher_prior, config.adapt.guard
        self.seen = torch.zeros((), dtype=torch.float64)
        """Sum of that mean's weights."""
        self.reader = begin(self.base(), self.stream.lanes)
        some = self.weights[self.dynamic[0]]
        self.rate, self.decay = (some.new_tensor(x) for x in (s.through_rate, s.through_decay))

    def base(self) -> AdaptationBase:
        """theta_0 as it is now, and the Fisher so far."""
        weights = {n: w.detach() for n, w in self.weights.items()}
        seen = max(float(self.seen), 1e-12)
        rms = {n: smooth_fisher(s / seen, self.prior).sqrt() for n, s in self.squares.items()}
        base = AdaptationBase(self.shape, weights, self.dynamic, rms, 0.0, self.settings.segment)
        return base.guarded(self.guard, self.shape.vocabulary)

    def bound(self, base: AdaptationBase) -> Bound:
        """The rule at work; it rests until there is a Fisher."""
        if not float(self.seen):
            return Static().bind({}, base)
        return RMS().bind({"rate": self.rate, "decay": self.decay}, base)

    def count(self, gradients: Weights, full_B: Tensor) -> None:
        """Move the running mean by the lanes that read a whole segment."""
        if not bool(full_B.any()):
            return
        share = 1 / FISHER_SEGMENTS
        self.seen += (1 - self.seen) * share
        for n, g in gradients.items():
            squares, lanes = self.squares[n].mul_(1 - share), full_B.nonzero().flatten().tolist()
            for lane in lanes:
                squares.addcmul_(g[lane], g[lane], value=share / len(lanes))

    def more_tensors(self) -> dict[str, Tensor]:
        """And the running Fisher."""
        squares = {f"squares/{n}": s for n, s in self.squares.items()}
        return super().more_tensors() | {"seen": self.seen} | squares

    def load_more(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `more_tensors`."""
        super().load_more(tensors)
        self.seen = tensors["seen"]
        self.squares = {n: tensors[f"squares/{n}"].to(self.device) for n in self.dynamic}


class ThroughLearned(ThroughTrainer):
    """Through a learned rule, with the bases, word coupling and Fisher of the run that has it.

    All of these stay as they are, and so does how words teach within a segment. A matrix that
    adapts in a basis of its own, output = T L (P x), is trained as W = T L P.
    Article boundaries are marked, and tokens teach by their loss itself, so that one gradient
    serves the lanes and theta_0 (surprise weighting counts again when the rule reads).
    """

    def __init__(
        self,
        config: Config,
        shape: BaseModel,
        text: Text,
        device: torch.device,
        learned: LoadedRule,
    ) -> None:
        super().__init__(config, shape, text, device)
        held = learned.base.keeping(lambda e: not isinstance(e, Boundaries | SurpriseWeighting))
        held = prepared(held, learned.bound()).guarded(config.adapt.guard, shape.vocabulary)
        own = {n: w.clone() for n, w in held.weights.items()}
        extensions = held.extensions
        if self.embeddings is not None:
            own |= self.embeddings.weights()
            extensions = (*extensions, self.embeddings.extension)
        self._base = dataclasses.replace(held, weights=own, extensions=extensions)
        """Its weights are this trainer's own, and written in place."""
        self._bound = learned.rule.bind(learned.parameters, self._base)
        self.dynamic = held.dynamic
        self._turned = {base_of(n): n for n in folded_matrices(held)}
        """Matrices W that adapt as L, and the names of their changes."""
        self._back = {n: torch.linalg.inv(own[n + BASIS]) for n in self._turned.values()}
        """P^-1."""
        self.follow()
        self.reader = begin(self._base, self.stream.lanes, self._bound)

    @property
    def embeddings(self) -> NGramTrainer | None:
        """N-gram embeddings that are learned, if any."""
        found = self.learned.get(NGramEmbeddings.name)
        return found if isinstance(found, NGramTrainer) else None

    def hear(self, now: Step, segment: Segment) -> None:
        """N-gram embeddings learn as n-gram memory does."""
        embeddings, gradient = self.embeddings, now.scored.by_added
        if embeddings is None or gradient is None:
            return
        rows = now.scored.told.notes[NGramEmbeddings.name]
        rows = rows.masked_fill(~now.taught.unsqueeze(-1), len(embeddings.ngrams.contexts))
        scale = self._base.weights.get(f"{NGramMemory.name}/scale")
        if scale is None:
            scale = inverse_square_length(self.weights["embedding"])
        embeddings.learn_rows(rows, gradient * segment.inputs.shape[1], scale)

    def _straight(self, name: str, x: Tensor) -> Tensor:
        """T^-1 x."""
        coupling = self._base.weights.get(COUPLING) if name == "softmax" else None
        return x if coupling is None else uncoupled(x, coupling)

    def base(self) -> AdaptationBase:
        """theta_0 as it is now."""
        return self._base

    def follow(self) -> None:
        """theta_0 follows: L_0 = T^-1 W P^-1; so does what extensions derive from it."""
        own = self._base.weights
        moved = follow_weights(self._base, self.weights).weights
        for n in own:
            if moved[n] is not own[n]:
                own[n].copy_(moved[n])
        for extension in self._base.extensions:
            for n, w in extension.derived(self._base).items():
                own[n].copy_(w)

    def bound(self, base: AdaptationBase) -> Bound:
        """The rule at work."""
        return self._bound

    def shared(self) -> tuple[str, ...]:
        """The input embedding, where the output layer adapts, and what does not adapt at all."""
        unread = self._turned.keys() - {"embedding"}
        return tuple(n for n in super().shared() if n not in unread)

    def gradient(self, name: str, scored: Scored) -> Tensor:
        """By W: T^-1 G P^-T, G by L; the embedding's rows are read as inputs, too."""
        turned = self._turned.get(name)
        if turned is None:
            return scored.of_all_lanes(name)
        by_low = scored.of_all_lanes(turned + LOW) @ self._back[turned].t()
        by_low = self._straight(turned, by_low)
        return by_low.add_(scored.shared[name]) if name in scored.shared else by_low
