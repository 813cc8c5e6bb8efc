"""A vocabulary as a file of released models: JSON, the same vocabulary, damage noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import corpus_text

from mlm.base.errors import UserError
from mlm.text.articles import Article
from mlm.text.vocabulary import Vocabulary, fit_vocabulary, load_vocabulary

TEXT = corpus_text(3, seed=5)


def fitted(kind: str) -> Vocabulary:
    return fit_vocabulary([Article("a", TEXT)], kind, 0 if kind == "word" else 300)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_json_holds_the_same_vocabulary(kind: str, tmp_path: Path) -> None:
    vocabulary = fitted(kind)
    vocabulary.save(tmp_path, as_json=True)
    assert [file.name for file in tmp_path.iterdir()] == ["vocabulary.json"]
    assert set(json.loads((tmp_path / "vocabulary.json").read_bytes())) == {
        "kind",
        "hash",
        "format",
        "model",
    }
    again = load_vocabulary(tmp_path)
    assert (again.kind, again.size, again.hash) == (kind, vocabulary.size, vocabulary.hash)
    text = TEXT + "Größe <unk> \u2581 x\n"
    assert np.array_equal(again.encode_article(text), vocabulary.encode_article(text))
    assert np.array_equal(again.starts_word, vocabulary.starts_word)


@pytest.mark.parametrize(
    "change", [{"model": "AAAA"}, {"model": "?"}, {"model": 3}, {"kind": "bpe2"}, {"hash": ""}]
)
def test_damaged_json_gives_one_message(change: dict[str, object], tmp_path: Path) -> None:
    fitted("bpe").save(tmp_path, as_json=True)
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change), encoding="utf-8")
    with pytest.raises(UserError, match=r"vocabulary\.json is damaged"):
        load_vocabulary(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"vocabulary\.json is damaged"):
        load_vocabulary(tmp_path)
