"""Texts in many scripts through a trained model, and the page about reading as it runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import mlm
from benchmarks.readme import ROOT
from mlm.reader import TrainedModel

TEXTS = {
    "Arabic": "قرأ الولد الكتاب، ثم نام.",
    "Armenian": "Տղան կարդում է գիրքը։",
    "Bengali": "ছেলেটি বই পড়ে।",
    "Chinese": "孩子看书。书很好！",
    "Czech": "Žluťoučký kůň pije vodu.",
    "Finnish": "Pöllö lentää yöllä metsään.",
    "French": "L'été, « dit-il », c'est déjà fini\u202f!",
    "Georgian": "ბიჭი კითხულობს წიგნს.",
    "German": "Die Straße heißt „Am Übergang“.",
    "Greek": "Το παιδί διαβάζει το βιβλίο.",
    "Hebrew": "הילד קורא ספר.",
    "Hindi": "लड़का किताब पढ़ता है।",
    "Japanese": "子供は本を読む。",
    "Korean": "아이가 책을 읽는다.",
    "Polish": "Źdźbło trawy rośnie.",
    "Russian": "Мальчик читает книгу — каждый день.",
    "Tamil": "பையன் புத்தகம் படிக்கிறான்.",
    "Thai": "เด็กอ่านหนังสือ",
    "Turkish": "Çocuk ığdır ağacını gördü.",
    "Vietnamese": "Đứa trẻ đọc sách.",
    "emoji": "She laughed 👩‍👩‍👧‍👦 and waved 👋🏽!",
    "combining marks": "e\u0301te\u0301 n\u0303andu\u0301",
    "controls": "a\x00b \u200bc\u2060 \ufffd \U0010ffff",
    "one word": "word",
    "one letter": "a",
    "white space only": " \n\t\n ",
    "nothing": "",
    "lines of all kinds": "\ufeffone\r\ntwo\rthree\u2028four\n\n\nfive",
    "special tokens": "<unk> <eos> <s> @-@ ▁word ▁",
}


@pytest.mark.parametrize("form", ["plain", "wrapped", "markdown", "wikitext"])
def test_any_text_has_words_with_finite_surprisal(model: TrainedModel, form: str) -> None:
    texts = list(TEXTS.values())
    table = model.score_many(texts, lanes=8, form=form)  # type: ignore[arg-type]
    for row in table.to_pylist():
        text = texts[row["doc_id"]]
        assert row["word"] == text[row["char_start"] : row["char_end"]]
        assert row["n_tokens"] > 0
        assert np.isfinite([row["surprisal"], row["surprisal_static"]]).all()
    for number, text in enumerate(texts):
        words = [row["word"] for row in table.to_pylist() if row["doc_id"] == number]
        together = "".join("".join(words).split())
        assert together == "".join(text.removeprefix("\ufeff").split())


def test_the_page_about_reading_runs(
    model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model in the place of the released one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlm, "load", lambda name: model)
    page = (ROOT / "docs" / "reader.md").read_text(encoding="utf-8")
    world: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) > 5
    for block in blocks:
        exec(block, world)
    assert (tmp_path / "models" / "mine" / "config.json").exists()
    assert world["rows"] == 5
