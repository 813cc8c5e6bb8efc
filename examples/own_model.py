"""A language model of your own that learns while it reads: `python -m examples.own_model`.

A small GRU on invented texts, each of which uses five words of its own again and again. What it
has read of a text, its weights remember: the rest of the text surprises it less.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm.models.base import AdaptationBase, choose_dynamic
from mlm.models.module import ModuleModel
from mlm.reading.scoring import score_articles
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.settings.sections import MetaConfig
from mlm.text.streams import Text
from mlm.training.fisher import estimate_fisher
from mlm.training.meta import MetaTrainer

WORDS, WIDTH, LENGTH, EOS = 60, 16, 240, 0
RATE, DECAY = 0.01, 0.01


class GRU(nn.Module):
    """Any module with these two methods will do; this one ties its softmax to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.softmax = nn.Linear(WIDTH, WORDS)
        self.softmax.weight = self.embedding.weight

    def initial_state(self, lanes: int) -> tuple[Tensor]:
        """Lanes come first; nn.GRU has its layers there."""
        return (torch.zeros(lanes, 1, WIDTH),)

    def forward(self, tokens: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """Logits and the state after the tokens."""
        output, h = self.gru(self.embedding(tokens), state[0].transpose(0, 1).contiguous())
        return self.softmax(output), (h.transpose(0, 1),)


def invent(number: int, seed: int) -> Text:
    """Texts in which half of the words are from five of the text's own."""
    random = np.random.default_rng(seed)
    own = random.integers(1, WORDS, size=(number, 5))
    words = np.take_along_axis(own, random.integers(5, size=(number, LENGTH)), 1)
    common = random.integers(1, WORDS, size=words.shape)
    return Text(list(np.where(random.random(words.shape) < 0.5, words, common)), words.size, EOS)


def train(module: GRU, text: Text, steps: int) -> None:
    """Ordinary training of the static model."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    batch = torch.tensor(np.stack(text.articles))
    for _ in range(steps):
        logits, _ = module(batch[:, :-1], module.initial_state(len(batch)))
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> dict[str, float]:
    """Train the model, then rules that rewrite its weights; returns their gains, nats per word."""
    torch.manual_seed(0)
    text, held_out, new = (invent(number, seed) for seed, number in enumerate((30, 10, 6)))
    module = GRU()
    train(module, text, steps=20)
    model = ModuleModel(module)
    dynamic = choose_dynamic(model.weights(), "gru.*,softmax.bias")
    base = AdaptationBase(model, model.weights(), dynamic, rms={}, loss=0.0, segment=20)
    base = estimate_fisher(base, held_out, words=2000)
    gates = LinearGates()
    start = gates.start_at_rms(base, RATE, DECAY)
    trainer = MetaTrainer(
        base, gates, start, held_out, MetaConfig(lanes=4, unroll=10, steps=8), seed=0
    )
    for _ in range(trainer.settings.steps):
        trainer.train_step()
    rules = {
        "static": None,
        "RMS": RMS().bind({"rate": torch.tensor(RATE), "decay": torch.tensor(DECAY)}, base),
        "learned gates": gates.bind(trainer.parameters, base),
    }
    losses = {
        name: score_articles(base, rule, new.articles, EOS, lanes=6).total / new.words
        for name, rule in rules.items()
    }
    for name, loss in losses.items():
        print(f"{name:14} {loss:.3f} nats per word, gain {losses['static'] - loss:.3f}")
    return {name: losses["static"] - loss for name, loss in losses.items()}


if __name__ == "__main__":
    main()
