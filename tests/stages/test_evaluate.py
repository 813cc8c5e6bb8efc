"""Scores of text that the vocabulary does not hold: every byte is paid for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, write_corpus

from mlm.report.evaluation import read_evaluation
from mlm.runs.run import open_run
from mlm.settings.config import Config
from mlm.spelling import spelling_nats
from mlm.stages.evaluate import stage_evaluate
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder

NEW = (
    "quill",
    "yarrow",
    "zephyr",
    "wicker",
    "hazel",
    "juniper",
    "xylem",
    "cobweb",
    "vellum",
    "ash",
)
"""Words of no syllable that the tiny corpus has."""


@pytest.fixture(scope="module")
def whole_words(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny run of whole words."""
    home = tmp_path_factory.mktemp("words")
    config = tiny_config(
        write_corpus(home / "toy"),
        home / "run",
        stages=("lm", "meta", "evaluate"),
        text__vocabulary="word",
        text__vocabulary_size=0,
        lm__epochs=2.0,
        meta__rules=("three_levels",),
        meta__steps=1,
        evaluation__rules=("rms", "three_levels"),
        evaluation__protocols=("article",),
    )
    run_stages(config, quiet=True)
    return dataclasses.replace(config, stages=("evaluate",))


def drawn(space: str) -> str:
    """720 words drawn evenly from 10, and a title."""
    words = np.random.default_rng(0).choice(NEW, 720)
    lines = "".join(f" {space.join(line)} \n" for line in words.reshape(36, 20))
    return f" = {NEW[0]} = \n \n{lines}"


def test_unknown_words_pay_for_their_spelling_and_white_space_does_not(
    whole_words: Config, tmp_path: Path
) -> None:
    found = []
    for space in (" ", "    "):
        story = tmp_path / f"{len(space)}.tokens"
        story.write_text(drawn(space), encoding="utf-8")
        folder, rows = stage_evaluate(open_run(whole_words, quiet=True), str(story))
        totals = {row["rule"]: row for row in rows if row["kind"] == "total"}
        assert "% unknown" in (folder / "evaluation.md").read_text(encoding="utf-8")
        for row in totals.values():
            assert (row["words"], row["unknown_words"]) == (720 + 36 + 2 + 2 + 1, 721)
            assert row["nll"] > sum(map(spelling_nats, map(len, drawn(" ").split()[3:])))
            assert row["nll"] / math.log(2) > 720 * math.log2(10), "less than its entropy"
        found.append({rule: (row["bits_per_byte"], row["bytes"]) for rule, row in totals.items()})
    assert found[0] == found[1]
    assert {size for _, size in found[0].values()} == {
        len("\n".join(" ".join(line.split()) for line in drawn(" ").split("\n")).encode())
    }


def test_wikitexts_own_unk_is_a_word_like_others(whole_words: Config) -> None:
    assert whole_words.out is not None
    rows = read_evaluation(whole_words.out)
    assert {row["unknown_words"] for row in rows if row["kind"] == "total"} != {None}
    run = open_run(whole_words, quiet=True)
    file = run.data.splits["valid"]
    unk = int((file.tokens == run.vocabulary.unk_id).sum())
    assert unk > len(file.unknown.at), "<unk> in the text is not unknown"


def test_the_perplexity_of_validation_holds_the_spelling(whole_words: Config) -> None:
    run = open_run(whole_words, quiet=True)
    text = run.validation_text(0)
    assert text.spelling == pytest.approx(run.data.splits["valid"].unknown.nats().sum())
    assert whole_words.out is not None
    last = [row for row in RunFolder(whole_words.out).rows() if row["stage"] == "lm"][-1]
    whole = (last["valid_loss"] * text.tokens + text.spelling) / text.words
    assert last["valid_word_perplexity"] == pytest.approx(math.exp(min(50, whole)))
