"""spaCy's tokens get what the model's words say of them, with spaCy itself."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from adapters.stand_in import Model
from conftest import Finished

from mlm.base.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
TEXT = 'The mill-wheel cost 1,200 dollars, "it" said.\n\nNobody paid: (nobody) asked.'
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def spacy() -> Any:
    """The library; most of these tests need it."""
    return pytest.importorskip("spacy", reason="spaCy is not installed (extra `spacy`)")


@pytest.fixture
def nlp(spacy: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An English tokeniser and two components, on a model that costs nothing."""
    pipe = importlib.import_module("mlm.adapters.spacy_pipe")
    monkeypatch.setattr(pipe, "load", lambda name: Model())
    nlp = spacy.blank("en")
    nlp.add_pipe("mlm_surprisal", config={"model": "any"})
    static = {"model": "any", "rule": "static", "attribute": "static_bits"}
    nlp.add_pipe("mlm_surprisal", name="static", config=static)
    return nlp


def by_word(rule: str) -> list[dict[str, Any]]:
    """The model's own rows."""
    return Model().score_many([TEXT], rule).to_pylist()


def test_tokens_of_a_word_add_up_to_it(nlp: Any) -> None:
    """spaCy makes several tokens of "dollars," and "(nobody)"; none is lost."""
    doc = nlp(TEXT)
    assert len(doc) > len(by_word("best"))
    for attribute, rule in (("surprisal", "best"), ("static_bits", "static")):
        for row in by_word(rule):
            start, end = row["char_start"], row["char_end"]
            own = [t for t in doc if start <= t.idx < end]
            bits = [getattr(token._, attribute) for token in own]
            assert sum(bits) == pytest.approx(row["surprisal"]), row["word"]
            if len(own) > 1:
                assert bits[0] != pytest.approx(row["surprisal"])
    assert any(token._.surprisal < token._.static_bits for token in doc), "something is learned"


def test_spans_are_sums(nlp: Any) -> None:
    doc = nlp(TEXT)
    rows = by_word("best")
    assert doc[:]._.surprisal == pytest.approx(sum(row["surprisal"] for row in rows))
    assert doc[0:1]._.surprisal == pytest.approx(rows[0]["surprisal"])
    assert doc[0:4]._.surprisal == pytest.approx(sum(t._.surprisal for t in doc[0:4]))


def test_what_the_model_does_not_tell_is_none(nlp: Any, spacy: Any) -> None:
    """A token that ends within a part of a word, and a document that was not read."""
    doc = nlp("Nobody cannot pay.")
    assert [token.text for token in doc] == ["Nobody", "can", "not", "pay", "."]
    assert [token._.surprisal is None for token in doc] == [False, True, True, False, False]
    assert doc[1:3]._.surprisal is not None
    assert spacy.blank("en")("Nobody")[0]._.surprisal is None
    assert len(nlp("")) == 0


def test_surprisal_is_kept_with_the_document(nlp: Any, spacy: Any) -> None:
    doc = nlp(TEXT)
    again = spacy.tokens.Doc(doc.vocab).from_bytes(doc.to_bytes())
    assert [t._.surprisal for t in again] == [t._.surprisal for t in doc]


def test_other_typography_and_marks_of_joints(spacy: Any) -> None:
    """Curly quotes, and the hyphen that the model spells as "@-@", have places in the text."""
    pipe = importlib.import_module("mlm.adapters.spacy_pipe")
    pieces = [' "', " mi", "ll", " @-@", " wheel"]
    row = {
        "word": "“mill-wheel",
        "char_start": 10,
        "char_end": 21,
        "surprisal": 5.5,
        "surprisal_plain": 5.0,
        "pieces": [{"piece": piece, "bits": 1.0, "rank": 1} for piece in pieces],
    }
    assert pipe.divide([row]) == [(10, 11, 1), (11, 15, 2), (15, 16, 1), (16, 21, 1.5)]
    other = row | {"word": "„Mühlenrad!"}
    assert pipe.divide([other]) == [(10, 21, 5.5)]


def test_the_page_of_adapters_runs(
    spacy: Any, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (PYPROJECT.parent / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page.partition("## spaCy")[2], re.M | re.S)
    importlib.import_module("mlm.adapters.spacy_pipe")
    names: dict[str, Any] = {}
    exec(code.replace("wikipedia-small", str(finished.folder)), names)
    assert all(token._.surprisal is not None for token in names["doc"])
    assert "('lamp', " in capsys.readouterr().out


def test_without_spacy_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy.language", None)
    monkeypatch.delitem(sys.modules, "mlm.adapters.spacy_pipe", raising=False)
    with pytest.raises(UserError, match="extra `spacy`"):
        importlib.import_module("mlm.adapters.spacy_pipe")


def test_spacy_finds_the_factory_by_itself(spacy: Any) -> None:
    """The entry point of the package names the component's function."""
    points = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]
    (name,) = points["spacy_factories"]
    module, _, function = points["spacy_factories"][name].partition(":")
    assert name == "mlm_surprisal"
    assert callable(getattr(importlib.import_module(module), function))
