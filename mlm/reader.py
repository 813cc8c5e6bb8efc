"""The shortest way to use a trained model: load a run folder, score text with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mlm.base.errors import UserError
from mlm.base.names import CACHE, RULES
from mlm.reading.scoring import check_finite, score_protocol, word_losses
from mlm.runs.rules import Ready, ready_rule
from mlm.runs.run import open_run
from mlm.store.run_folder import RunFolder
from mlm.text.vocabulary import Vocabulary


class WordLoss(NamedTuple):
    """A word of a text and what it cost."""

    word: str
    nats: float


@dataclass(frozen=True)
class TrainedModel:
    """A language model and the rule that rewrites its weights while it reads."""

    rule: str
    ready: Ready
    vocabulary: Vocabulary

    def score(self, text: str) -> list[WordLoss]:
        """Read a text as one article, from the static weights on; the loss of every word.

        Words are what spaces separate, and the end of every line is the word `<eos>`. A segment is
        scored before the model learns from it.

        Raises:
            UserError: a loss is not finite.
        """
        tokens = self.vocabulary.encode_article(text).astype("int64")
        if not len(tokens):
            return []
        base, bound, cache, _ = self.ready
        eos = self.vocabulary.eos_id
        scores = score_protocol(base, bound, [tokens], eos, "article", 1, cache=cache)
        scores = scores.cached[0] if cache else scores
        check_finite(scores, self.rule, "article", ["the text"])
        losses = word_losses(scores.nll[0], tokens, self.vocabulary.starts_word)
        words = self.vocabulary.words(tokens)
        return [WordLoss(word, float(nats)) for word, nats in zip(words, losses, strict=True)]


def load(
    run: str | Path, rule: str = "three_levels", device: Literal["auto", "cpu", "cuda"] = "auto"
) -> TrainedModel:
    """The model of a finished run folder, read with one of its rules.

    Args:
        run: the folder, such as `runs/pydocs`.
        rule: `static`, a hand-made or a learned rule, each also with `+cache`.
        device: where to compute.

    Raises:
        UserError: no such folder or rule, or the rule was not trained there.
    """
    if rule.removesuffix(CACHE) not in RULES:
        raise UserError(f"no rule {rule!r}; choose from {', '.join(RULES)}, each also with {CACHE}")
    path = Path(run)
    config = dataclasses.replace(
        RunFolder(path).load_config(), out=path, stages=("evaluate",), device=device
    )
    opened = open_run(config, quiet=True)
    return TrainedModel(rule, ready_rule(opened, rule, "article"), opened.vocabulary)
