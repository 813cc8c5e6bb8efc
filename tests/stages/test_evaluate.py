"""Scores of text that the vocabulary does not hold: every byte is paid for."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import Command, Finished
from tiny import tiny_config, write_corpus

from mlm.base.errors import UserError
from mlm.page.folder import draw_run
from mlm.page.top_k import TopK
from mlm.reader import model
from mlm.report.evaluation import read_evaluation
from mlm.report.losses import LossTable, write_losses
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


# -- what was expected before every word ----------------------------------------------------------

RULES = ("static", "rms", "rms+cache", "three_levels")
ASKED = ("--rules", *RULES, "--protocols", "article", "--no-draw")


def whose(folder: Path) -> set[tuple[str, str]]:
    """Rules and protocols of the rows of top_k.parquet."""
    rows = pq.read_table(folder / "top_k.parquet", columns=["rule", "protocol"]).to_pylist()
    return {(row["rule"], row["protocol"]) for row in rows}


@pytest.fixture(scope="module")
def expected(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose likeliest pieces are stored."""
    folder = finished.copy(tmp_path_factory.mktemp("expected") / "run")
    config = dataclasses.replace(
        finished.config,
        out=folder,
        stages=("evaluate",),
        evaluation=dataclasses.replace(finished.config.evaluation, rules=RULES, top_k=400),
    )
    stage_evaluate(open_run(config, quiet=True))
    return folder


@pytest.mark.parametrize("protocol", ["article", "stream"])
@pytest.mark.parametrize("rule", RULES[1:])
def test_the_probability_of_a_word_is_that_of_its_loss(
    expected: Path, rule: str, protocol: str
) -> None:
    """Of all words that are one piece; with K as large as the vocabulary every rank is there."""
    table = LossTable.load(expected / "losses.parquet")
    found = TopK.load(expected / "top_k.parquet", table.split, (rule, protocol))
    assert found is not None
    assert (found.rule, found.protocol) == (rule, protocol)
    rows = found.rows
    np.testing.assert_array_equal(rows["article"].to_numpy(), table.article_N)
    np.testing.assert_array_equal(rows["position"].to_numpy(), table.position_N)
    own = rows["pieces"].to_pylist()
    assert ["".join(pieces).strip() for pieces in own] == table.word_N.tolist()
    one_N = np.array([len(pieces) == 1 for pieces in own])
    assert one_N.sum() > 100
    first_N1 = np.array([[pieces[0]] for pieces in own])
    for time, name in (("before", "static"), ("after", rule)):
        chance_NV = np.array(rows[f"probabilities_{time}"].to_pylist())
        assert (np.diff(chance_NV) <= 0).all()
        np.testing.assert_allclose(chance_NV.sum(1), 1, atol=1e-4)
        at_N1 = rows[f"rank_{time}"].to_numpy()[:, None] - 1
        pieces_NV = np.array(rows[f"pieces_{time}"].to_pylist())
        np.testing.assert_array_equal(np.take_along_axis(pieces_NV, at_N1, 1), first_N1)
        chance_N = np.take_along_axis(chance_NV, at_N1, 1)[:, 0]
        entropy_N = -(chance_NV * np.log(chance_NV)).sum(1)
        np.testing.assert_allclose(rows[f"entropy_{time}"].to_numpy(), entropy_N, atol=1e-3)
        losses_N = table.loss(name, protocol)
        np.testing.assert_allclose(np.exp(-losses_N[one_N]), chance_N[one_N], rtol=1e-3)
        assert (np.exp(-losses_N) < chance_N * 1.001).all()


def test_likeliest_pieces_are_kept_or_go_with_their_rule(
    finished: Finished, expected: Path, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(expected, folder)
    every = {(rule, protocol) for rule in RULES[1:] for protocol in ("article", "stream")}
    assert whose(folder) == every
    before = pq.read_table(folder / "top_k.parquet")
    words = ("--rules", "rms", "--protocols", "stream", "--no-draw")
    assert command("evaluate", folder, *words).code == 0
    assert pq.read_table(folder / "top_k.parquet").equals(before), "nothing else is known now"
    assert command("evaluate", folder, *words, "--top-k", 2).code == 0
    assert whose(folder) == every
    found = TopK.load(folder / "top_k.parquet", "valid", ("rms", "stream"))
    assert found is not None
    assert {len(row) for row in found.rows["pieces_after"].to_pylist()} == {2}
    outcome = command("evaluate", folder, *words, "--max-articles", 1)
    assert "top_k.parquet: likeliest pieces stored with other settings" in outcome.err + outcome.out
    assert not (folder / "top_k.parquet").exists()


def test_more_pieces_than_the_range_allows_are_refused(
    finished: Finished, command: Command
) -> None:
    error = command("evaluate", finished.folder, "--top-k", 1001).error
    assert "--top-k is 1001; it must be at least 0 and at most 1,000" in error


@pytest.mark.slow
def test_an_interrupted_evaluation_keeps_the_likeliest_pieces(
    finished: Finished,
    expected: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, words = finished.copy(tmp_path / "run"), (*ASKED, "--top-k", 400)
    original, read = model.score_protocol, list[int]()

    def reading(*words: object, **named: object) -> object:
        if len(read) == 2:
            raise UserError("the machine stops")
        read.append(1)
        return original(*words, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(model, "score_protocol", reading)
        assert "the machine stops" in command("evaluate", folder, *words).error
    assert not (folder / "top_k.parquet").exists()
    read.clear()
    monkeypatch.setattr(
        model, "score_protocol", lambda *w, **n: read.append(1) or original(*w, **n)
    )
    assert command("evaluate", folder, *words).code == 0
    assert len(read) == 1, "three readings serve four rules, and two were kept"
    found, whole = (pq.read_table(f / "top_k.parquet") for f in (folder, expected))
    assert found.num_rows
    assert found.equals(whole.filter(pc.field("protocol") == "article"))


def test_the_page_shows_what_was_expected(expected: Path, tmp_path: Path) -> None:
    """The rows of the rule that it opens on, word by word."""
    table = LossTable.load(expected / "losses.parquet")
    losses = {n: loss_N for n, loss_N in table.losses.items() if "two_levels" not in n}
    write_losses(tmp_path / "losses.parquet", dataclasses.replace(table, losses=losses))
    shutil.copy(expected / "top_k.parquet", tmp_path)
    (page,) = draw_run(tmp_path, only=("page",))
    text = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert text
    data = json.loads(text[1])
    pair, shown = data["protocols"][0]["pairs"][0], data["top_k"]
    assert (shown["rule"], shown["protocol"]) == (pair[0], "article")
    assert pair == ["three_levels", "static"]
    found = TopK.load(expected / "top_k.parquet", "valid", ("three_levels", "article"))
    assert found is not None
    rank_N = np.frombuffer(base64.b64decode(shown["rank_after"]), "<u4")
    np.testing.assert_array_equal(rank_N, found.rows["rank_after"].to_numpy())
    best_N = np.frombuffer(base64.b64decode(shown["best_before"]["values"]), "<i4")
    best = [shown["pieces"][i] for i in best_N[:: shown["best_before"]["width"]]]
    assert best == [row[0] for row in found.rows["pieces_before"].to_pylist()]
