"""The correction for word boundaries is that of minicons, on a GPT-2 with random weights."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mlm.reader.words import corrected

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
SENTENCES = ("the old river ran past the mill", "the miller slept", "rivers run by old mills")
TEXTS = ("The millers ran past rivers", "mill", "the old mill slept by the old river")
END = "<|endoftext|>"


class Peer:
    """A tiny GPT-2, its BPE tokenizer with leading spaces, and minicons around both."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            why = "minicons is not installed (extra `test-adapters`)"
            scorer = pytest.importorskip("minicons.scorer", reason=why)
            from tokenizers import (  # pyright: ignore[reportMissingImports]
                Tokenizer,
                models,
                pre_tokenizers,
                trainers,
            )
            from transformers import (  # pyright: ignore[reportMissingImports]
                GPT2Config,
                GPT2LMHeadModel,
                PreTrainedTokenizerFast,
            )
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(SENTENCES * 9, trainer)
        self.tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
        )
        shape = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(self.tokenizer), **shape, **ends)
        self.model = GPT2LMHeadModel(config).eval()
        self.scorer = scorer.IncrementalLMScorer(self.model, "cpu", tokenizer=self.tokenizer)

    def words(self, text: str, **flags: Any) -> list[tuple[str, float]]:
        """minicons' words and their surprisals, in nats."""
        flags = {"surprisal": True, "bos_token": True, "bow_correction": True} | flags
        (found,) = self.scorer.word_score_tokenized(text, str.split, **flags)
        return found

    @torch.no_grad()
    def prices(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(nll (T,), boundary (T + 1,), first (W,)) from the model's logits, in nats."""
        ids = [self.tokenizer.bos_token_id, *self.tokenizer(text)["input_ids"]]
        log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1).double()
        begins = [token.startswith("Ġ") for token in self.tokenizer.convert_ids_to_tokens(ids[1:])]
        spaced = [i for token, i in self.tokenizer.get_vocab().items() if token.startswith("Ġ")]
        boundary = -log_p[:, spaced].logsumexp(-1).numpy()
        nll = -log_p[range(len(ids) - 1), ids[1:]].numpy()
        return nll, boundary, np.flatnonzero([True, *begins[1:]])


@pytest.fixture(scope="module")
def peer() -> Peer:
    """Made once."""
    return Peer()


@pytest.mark.parametrize("text", TEXTS)
def test_the_corrected_surprisal_is_that_of_minicons(peer: Peer, text: str) -> None:
    """Of all words, the first (no boundary before it) and the last (one behind it) included."""
    nll, boundary, first = peer.prices(text)
    words = peer.words(text)
    assert [word for word, _ in words] == text.split()
    ours = corrected(nll, boundary, first)
    assert ours == pytest.approx([nats for _, nats in words], abs=1e-4)
    plain = [nats for _, nats in peer.words(text, bow_correction=False)]
    assert np.add.reduceat(nll, first) == pytest.approx(plain, abs=1e-4)
    assert np.abs(ours - plain).max() > 0.1, "the correction says something"
    assert ours.sum() == pytest.approx(nll.sum() + boundary[-1])


def test_without_a_beginning_minicons_moves_the_words(peer: Peer) -> None:
    """Without `bos_token` the first token has no score, and minicons' words begin a token late:
    its first word lacks its own first token and has the next word's."""
    *_, first = peer.prices(TEXTS[0])
    assert first[1] == 2, "the first word has two tokens"
    (tokens,) = peer.scorer.token_score(TEXTS[0], surprisal=True)
    assert tokens[0][1] == 0.0
    moved = peer.words(TEXTS[0], bos_token=False, bow_correction=False)[0][1]
    assert moved == pytest.approx(tokens[1][1] + tokens[2][1], abs=1e-4)


def test_our_names_take_the_arguments_of_minicons(peer: Peer) -> None:
    """`token_score` and `word_score` have no argument that minicons' have not."""
    import inspect

    from mlm.adapters import IncrementalLMScorer

    for name in ("token_score", "word_score"):
        theirs = inspect.signature(getattr(peer.scorer, name)).parameters
        ours = inspect.signature(getattr(IncrementalLMScorer, name)).parameters
        assert set(ours) - {"self"} <= set(theirs)
        assert all(ours[key].default == theirs[key].default for key in ours if key != "self")
    assert math.isfinite(peer.words(TEXTS[1])[0][1])
