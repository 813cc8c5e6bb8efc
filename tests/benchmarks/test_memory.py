"""The benchmark of predicted memory, and the text that it reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.memory import CASES, WITHIN, _config, measure
from benchmarks.wikitext103_shape import ARTICLES, TYPES, WORDS, write
from mlm.base.errors import UserError
from mlm.settings.checks import validate
from mlm.text.corpora import count_words, open_corpus


def test_the_text_has_the_shape_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "shape", 0.001)
    corpus = open_corpus(str(tmp_path / "shape"))
    train = list(corpus.articles("train"))
    assert len(train) == round(0.001 * ARTICLES)
    assert sum(count_words(a.text) for a in train) == round(0.001 * WORDS)
    types = Counter(word for a in train for word in a.text.split())
    assert len(types) + 1 == round(TYPES * 0.001**0.5)  # and the line end
    assert types["<unk>"] > 0
    assert any("\n = = " in a.text for a in train)
    (most, many), *_ = types.most_common()
    assert most in {",", "."}
    assert many > 0.01 * types.total()
    new = {w for a in corpus.articles("valid") for w in a.text.split()} - types.keys()
    assert len(new) <= 0.01 * len(types), "hardly a word that training never saw"


def test_the_same_seed_gives_the_same_text(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, 0.0002, seed)
    texts = [(tmp_path / name / "wiki.train.tokens").read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(UserError, match="--fraction 2"):
        write(tmp_path / "d", 2.0)


@pytest.mark.parametrize("name", CASES)
def test_the_settings_of_every_case_go_together(name: str, tmp_path: Path) -> None:
    for stage in ("lm", "meta", "evaluate"):
        validate(_config(name, CASES[name], tmp_path, tmp_path / "out", stage))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_predictions_are_within_a_quarter_of_the_peaks(tmp_path: Path) -> None:
    rows = measure(["tiny", "reverse"], "cpu", tmp_path)
    assert len(rows) == 6
    for row in rows:
        assert abs(row["predicted / peak"] - 1) <= WITHIN, row
