"""A split of a text as a run reads it: tokens, words, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlm.page.top_k import TOP_K_WORDS, Placed
from mlm.reading.scoring import Wanted, first_tokens, word_losses
from mlm.report.losses import LossTable
from mlm.text.tokens import TokenFile
from mlm.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class SplitText:
    """The articles of a split that have words, as tokens of the run's own vocabulary."""

    split: str
    file: TokenFile
    vocabulary: Vocabulary
    chosen: list[int]
    """Places of the articles in the split."""
    mark: str
    """Hash of their content: rows of other text are others."""

    @property
    def articles(self) -> list[np.ndarray]:
        """Tokens of every article."""
        return [np.asarray(self.file.article(a), dtype=np.int64) for a in self.chosen]

    @property
    def titles(self) -> list[str]:
        """Title of every article."""
        return [self.file.titles[a] for a in self.chosen]

    @property
    def words_A(self) -> list[int]:
        """Words of every article."""
        return [int(self.file.words[a]) for a in self.chosen]

    @property
    def bytes_A(self) -> list[int]:
        """Bytes of every article."""
        return [int(self.file.bytes[a]) for a in self.chosen]

    @property
    def unknown_A(self) -> list[int]:
        """Unknown words of every article."""
        return [len(self.file.unknown_in(a).at) for a in self.chosen]

    def word_losses(self, nll: Sequence[np.ndarray]) -> np.ndarray:
        """(N,) nats of all words, from those of every article's tokens.

        An unknown word costs its token and its spelling (`mlm.spelling.spelling_nats`).
        """
        parts = []
        for a, tokens, nll_T in zip(self.chosen, self.articles, nll, strict=True):
            unknown = self.file.unknown_in(a)
            paid_T = nll_T.copy()
            paid_T[unknown.at] += unknown.nats()
            parts.append(word_losses(paid_T, tokens, self.vocabulary.starts_word))
        return np.concatenate(parts)

    def wanted(self, best: int) -> Wanted | None:
        """The first pieces of the first `TOP_K_WORDS` words; None if nothing of them is asked."""
        at, left = [], TOP_K_WORDS
        for tokens in self.articles if best else ():
            at.append(first_tokens(tokens, self.vocabulary.starts_word)[:left])
            left -= len(at[-1])
        return Wanted(at, min(best, self.vocabulary.size)) if best else None

    def placed(self, wanted: Wanted) -> Placed:
        """Where the words that these tokens begin stand, and their pieces."""
        sizes = [len(at) for at in wanted.at]
        pieces: list[list[int]] = []
        for tokens, at in zip(self.articles, wanted.at, strict=True):
            ends = [*first_tokens(tokens, self.vocabulary.starts_word), len(tokens)][1:]
            pieces += [tokens[i:j].tolist() for i, j in zip(at, ends, strict=False)]
        positions = np.concatenate([np.arange(size) for size in sizes])
        return Placed(np.repeat(self.chosen, sizes), positions, pieces)

    def table(self, losses: dict[str, np.ndarray]) -> LossTable:
        """The losses of all words, by column, beside the words."""
        words = [word for tokens in self.articles for word in self.vocabulary.words(tokens)]
        return LossTable(
            split=self.split,
            article_N=np.repeat(self.chosen, self.words_A).astype(np.int32),
            position_N=np.concatenate([np.arange(n) for n in self.words_A]).astype(np.int32),
            word_N=np.array(words, dtype=object),
            titles=dict(zip(self.chosen, self.titles, strict=True)),
            losses=losses,
        )
