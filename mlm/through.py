"""Stage 1 through the adaptation: weights trained to be rewritten.

Every lane reads under theta_0 + delta; Krause's rule moves delta after each segment, and theta_0
and all other weights follow the gradient of the loss under theta_0 + delta. That is the
first-order meta-gradient (see `rollout.meta_gradient`) with one update of theta_0 per segment:
delta does not depend on theta_0 to first order. Compare MAML (Finn et al. 2017) and end-to-end
test-time training. Letters: B lanes, T tokens per segment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlm import buffers
from mlm.config import Config
from mlm.errors import UserError
from mlm.learner import RMS, Bound, Static
from mlm.lm import BaseModel, Weights
from mlm.memory import LongTerm, choose_dynamic, has_low_rank
from mlm.meta import shrunk
from mlm.rollout import begin, step
from mlm.scoring import score_articles
from mlm.training import LMTrainer, Text

FISHER_SEGMENTS = 500
"""The running mean of squared gradients looks back so many segments of every lane."""


class ThroughTrainer(LMTrainer):
    """`LMTrainer` in which the lanes adapt while the weights are trained.

    The Fisher is a running mean over the lanes' own segment gradients, which reading gives for
    nothing. The validation loss is that of adapted reading, too.
    """

    def __init__(self, config: Config, shape: BaseModel, text: Text, device: torch.device) -> None:
        super().__init__(config, shape, text, device)
        s = config.lm
        if any((*vars(self.dropout).values(), s.ar, s.tar)) or has_low_rank(config.adapt.dynamic):
            raise UserError(
                "--lm.through rms trains without dropout, AR and TAR, and full matrices only; set "
                "--lm.dropout-*, --lm.weight-drop, --lm.ar and --lm.tar to 0 and leave .low out of "
                "--adapt.dynamic"
            )
        self.precision = torch.float32
        self.dynamic = choose_dynamic(self.weights, config.adapt.dynamic)
        self.squares = {n: torch.zeros_like(self.weights[n]) for n in self.dynamic}
        """Running mean of squared gradients, biased towards zero until corrected."""
        self.prior = config.adapt.fisher_prior
        self.seen = torch.zeros((), dtype=torch.float64)
        """Sum of that mean's weights."""
        self.reader = begin(self._memory(), self.stream.lanes)
        some = self.weights[self.dynamic[0]]
        self.rate, self.decay = (some.new_tensor(x) for x in (s.through_rate, s.through_decay))

    def _memory(self) -> LongTerm:
        """theta_0 as it is now, and the Fisher so far."""
        weights = {n: w.detach() for n, w in self.weights.items()}
        seen = max(float(self.seen), 1e-12)
        rms = {n: shrunk(s / seen, self.prior).sqrt() for n, s in self.squares.items()}
        limit = 2 * math.log(self.shape.vocabulary)
        return LongTerm(self.shape, weights, self.dynamic, rms, 0.0, self.settings.segment, limit)

    def _bound(self, memory: LongTerm) -> Bound:
        """The rule at work; it rests until there is a Fisher."""
        if not float(self.seen):
            return Static().bind({}, memory)
        return RMS().bind({"rate": self.rate, "decay": self.decay}, memory)

    def train_step(self) -> tuple[float, int]:
        """One segment read, delta and all weights moved; returns (nats per token, tokens).

        Raises:
            UserError: the loss is not finite; the weights are untouched by it.
        """
        segment = next(self.stream).to(self.device)
        memory = self._memory()
        learn = tuple(n for n in self.weights if n not in self.dynamic)
        out = {n: buffers.take(tuple(w.shape), w) for n, w in self.reader.weights.items()}
        now = step(memory, self._bound(memory), self.reader, segment, out, learn)
        count = int(segment.mask.sum())
        value = float(now.scored.nll.sum()) / count
        if not math.isfinite(value):
            raise UserError(
                f"stage 1, step {self.step}: the loss is {value}. The last checkpoint is kept; "
                f"lower --lm.learning-rate (now {self.settings.learning_rate}) or "
                "--lm.through-rate, then --resume"
            )
        scale = segment.inputs.shape[1] / count
        for name, weight in self.weights.items():
            shared = now.scored.shared.get(name)
            total = now.scored.gradients[name].sum(0) if shared is None else shared
            weight.grad = total.mul_(scale)
        self._count_squares(now.scored.gradients, segment.mask.all(1))
        before = {n: self.weights[n].detach().clone() for n in self.dynamic}
        self._descend()
        for n, w in now.after.weights.items():  # delta is kept, theta_0 moves under it
            w += self.weights[n].detach() - before[n]
        buffers.give(now.scored.gradients.values())
        buffers.give(self.reader.weights.values())
        self.reader, self.step = now.after, self.step + 1
        return value, count

    def _count_squares(self, gradients: Weights, full_B: Tensor) -> None:
        """Move the running mean by the lanes that read a whole segment."""
        if not bool(full_B.any()):
            return
        share = 1 / FISHER_SEGMENTS
        self.seen += (1 - self.seen) * share
        for n, g in gradients.items():
            squares, lanes = self.squares[n].mul_(1 - share), full_B.nonzero().flatten().tolist()
            for lane in lanes:
                squares.addcmul_(g[lane], g[lane], value=share / len(lanes))

    def validation_loss(self, valid: Text) -> float:
        """Mean loss of adapted reading, each article from theta_0, nats per token."""
        memory = self._memory()
        lanes = min(self.settings.lanes, len(valid.articles))
        scores = score_articles(memory, self._bound(memory), valid.articles, valid.eos, lanes)
        return scores.total / valid.tokens

    def more_tensors(self) -> dict[str, Tensor]:
        """The lanes' weights and state, and the running Fisher."""
        return {
            "seen": self.seen,
            **{f"squares/{n}": s for n, s in self.squares.items()},
            **{f"reader/{n}": t for n, t in self.reader.tensors().items()},
        }

    def load_more(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `more_tensors`."""
        self.seen = tensors["seen"]
        self.squares = {n: tensors[f"squares/{n}"].to(self.device) for n in self.dynamic}
        self.reader = self.reader.of({n: tensors[f"reader/{n}"] for n in self.reader.tensors()})
