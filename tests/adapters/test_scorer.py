"""minicons' names: shapes, units, and the correction for word boundaries; minicons' own numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from adapters.stand_in import Model, pieces_of
from conftest import Finished

import mlm
from mlm.adapters import IncrementalLMScorer

TEXT = "The old mill, by the old river.\nThe old mill slept."


@pytest.fixture
def scorer() -> IncrementalLMScorer:
    """Of a model that costs nothing."""
    return IncrementalLMScorer(Model())  # pyright: ignore[reportArgumentType]


def test_a_list_for_every_text(scorer: IncrementalLMScorer) -> None:
    """One text or many: always a list of lists of (token, score)."""
    one = scorer.token_score("The mill.")
    assert one == scorer.token_score(["The mill."])
    assert [token for token, _ in one[0]] == [" The", " mil", "l", " ."]
    both = scorer.token_score(["The mill.", "", TEXT])
    assert both[0] == one[0]
    assert both[1] == []
    assert len(both[2]) == sum(len(pieces_of(word)) for word in TEXT.split()) + 1


@pytest.mark.parametrize("correction", [False, True])
def test_words_are_the_sums_of_their_tokens(scorer: IncrementalLMScorer, correction: bool) -> None:
    flags = {"surprisal": True, "base_two": True, "bow_correction": correction}
    (tokens,), (words,) = scorer.token_score(TEXT, **flags), scorer.word_score(TEXT, **flags)
    assert [word for word, _ in words][5:8] == ["old", "river.", "\n"]
    at = 0
    for word, score in words:
        own = tokens[at : at + len(pieces_of(word))]
        assert score == pytest.approx(sum(bits for _, bits in own))
        at += len(own)
    assert at == len(tokens)


def test_the_correction_is_in_the_first_and_the_last_token(scorer: IncrementalLMScorer) -> None:
    """It moves the price of a boundary from the token behind it to the one before it."""
    (plain,) = scorer.token_score("mills by mills", surprisal=True, base_two=True)
    (better,) = scorer.token_score(
        "mills by mills", surprisal=True, base_two=True, bow_correction=True
    )
    change = np.array([b - a for (_, a), (_, b) in zip(plain, better, strict=True)])
    of, reader = ["mil", "ls", "by", "mil", "ls"], Model().reader()
    by, mills, end = (reader.boundary(word) for word in ("by", "mills", ""))
    assert [token.strip() for token, _ in plain] == of
    assert change == pytest.approx([0, by, mills - by, -mills, end])


def test_units(scorer: IncrementalLMScorer) -> None:
    """Natural logarithms, bits, surprisals, probabilities: one number."""
    ((_, nats), *_), *_ = scorer.word_score("mill")
    ((_, bits), *_), *_ = scorer.word_score("mill", surprisal=True, base_two=True)
    ((_, p), *_), *_ = scorer.word_score("mill", prob=True)
    assert nats < 0
    assert bits == pytest.approx(-nats / math.log(2))
    assert p == pytest.approx(math.exp(nats))
    for flags in ({"surprisal": True}, {"base_two": True}):
        with pytest.raises(ValueError, match="alone"):
            scorer.token_score("mill", prob=True, **flags)


def test_ranks(scorer: IncrementalLMScorer) -> None:
    (tokens,) = scorer.token_score("mill mill mill mill", rank=True, surprisal=True)
    assert all(len(token) == 3 for token in tokens)
    assert {rank for *_, rank in tokens} == {1, 2}


def test_scores_of_a_trained_model(finished: Finished) -> None:
    """Its own table says the same, whose pieces are those of the words."""
    model = mlm.load(finished.folder)
    text = "\n".join(["Badoku fegi, lamone piru (badoku)."] * 6)
    flags = {"surprisal": True, "base_two": True}
    table = model.reader("two_levels", stats=("rank", "pieces")).score(text)
    (tokens,) = IncrementalLMScorer(model, "two_levels").token_score(text, rank=True, **flags)
    rows, at = table.to_pylist(), 0
    for row in rows:
        own = tokens[at : at + row["n_tokens"]]
        assert sum(bits for _, bits, _ in own) == pytest.approx(row["surprisal_plain"], abs=1e-3)
        assert own[0][2] == row["rank"]
        assert own[0][0].startswith(" ")
        spelled = "".join(token for token, *_ in own).replace(" ", "")
        assert spelled == ("<eos>" if row["word"].isspace() else row["word"])
        at += row["n_tokens"]
    assert at == len(tokens)
    for column, correction in (("surprisal_plain", False), ("surprisal", True)):
        (words,) = IncrementalLMScorer(model, "two_levels").word_score(
            text, bow_correction=correction, **flags
        )
        assert [bits for _, bits in words] == pytest.approx(table[column].to_pylist(), abs=1e-3)


@pytest.mark.parametrize("section", ["pandas", "The names of minicons"])
def test_the_page_of_adapters_runs(
    section: str, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    part = page.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    for code in re.findall(r"^```python\n(.*?)^```", part, re.M | re.S):
        exec(code.replace("wikipedia-small", str(finished.folder)), {})
    shown = capsys.readouterr().out
    assert "river" in shown or "keeper" in shown
