"""How the ratio of gains moves with the language model: from made-up files of claims."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from benchmarks.claim_models import COLUMNS, points
from mlm.base.errors import UserError
from mlm.base.names import PROTOCOLS


def _claims(path: Path, ratios: dict[str, float], form: str = "all", corpus: str = "home") -> None:
    """A claims.json with these rows in both protocols."""
    rows = [
        {"corpus": text, "what": what, "protocol": protocol, "found": ratio,
         "found interval": [ratio - 0.1, ratio + 0.1]}
        for text in (corpus, "away") for what, ratio in ratios.items() for protocol in PROTOCOLS
    ]  # fmt: skip
    found = {"rows": rows, "rival": dict.fromkeys(PROTOCOLS, form)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")


def _evaluation(folder: Path, perplexity: float) -> None:
    """The static model's totals on a text."""
    rows = [
        {"kind": "total", "split": "test", "protocol": protocol, "rule": "static",
         "corpus": folder.name, "articles": 1, "words": 10, "nll": 1.0, "bytes": 50,
         "bits_per_byte": 1.0, "word_perplexity": perplexity + k, "words_per_second": None,
         "settings": {}, "nats_per_word_gained": 0.0, "interval": [0.0, 0.0]}
        for k, protocol in enumerate(PROTOCOLS)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(rows), encoding="utf-8")


def _list(path: Path, *models: tuple[Any, ...]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *models])
    return path


RATIOS = {
    "4 levels: times the gain of RMS (all)": 1.3,
    "4 levels: times the gain of RMS (lstm)": 1.7,
    "4 levels: times the gain of RMS (all) with n-gram memory": 1.2,
    "4 levels + cache: times the gain of RMS (all) with n-gram memory + cache": 1.1,
    "other, seed 0: times the gain of RMS (all) on that LM": 1.5,
    "other, seed 0: times the gain of RMS (all) on that LM, over its own static loss": 1.4,
}


def test_models_of_several_claims_side_by_side(tmp_path: Path, command: Command) -> None:
    """Over the rival of each; a model whose static loss is given counts on the first text alone."""
    _claims(tmp_path / "small" / "claims.json", RATIOS)
    _claims(
        tmp_path / "large" / "claims.json", {"4 levels: times the gain of RMS (same)": 1.25}, "same"
    )
    for where, text, perplexity in (
        ("small", "home", 300),
        ("large", "home", 150),
        ("large", "away", 900),
    ):
        _evaluation(tmp_path / where / text, perplexity)
    models = _list(
        tmp_path / "models.csv",
        ("now", "small", 1000, "small/claims.json", "4 levels", ""),
        ("now", "large", 9000, "large/claims.json", "4 levels", ""),
        ("before", "other", 1000, "small/claims.json", "other, seed 0", 200),
    )
    found = points(models)
    assert [(r["model"], r["text"], r["against"], r["static"], r["ratio"]) for r in found
            if r["protocol"] == "article"] == [
        ("small", "home", "RMS", 300, 1.3),
        ("small", "home", "RMS with n-gram memory", 300, 1.2),
        ("large", "home", "RMS", 150, 1.25),
        ("large", "away", "RMS", 900, 1.25),
        ("other", "home", "RMS", 200, 1.4),
    ]  # fmt: skip
    assert {r["static"] for r in found if r["model"] == "large"} == {150, 151, 900, 901}
    assert found[0]["ratio interval"] == pytest.approx([1.2, 1.4])
    done = command("benchmarks.claim_models", models, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    with (tmp_path / "out" / "claim_models.csv").open(encoding="utf-8") as file:
        drawn = list(csv.DictReader(file))
    assert {row["text"] for row in drawn} == {"home"}
    assert len(drawn) == 2 * 4
    assert (tmp_path / "out" / "claim_models.png").stat().st_size > 9000
    assert "there are home, away" in command(
        "benchmarks.claim_models", models, "--texts", "none", "--out", tmp_path / "out"
    ).error  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("now", "small", "many", "claims.json", "4 levels", 300), "weights of small is 'many'"),
        (("now", "small", 9, "claims.json", "4 levels", "x"), "static of small is 'x'"),
        (("now", "small", 9, "none.json", "4 levels", 300), "none.json holds no claims"),
        (("now", "small", 9, "claims.json", "5 levels", 300), "no ratio of '5 levels' to RMS"),
        (("now", "small", 9, "claims.json", "4 levels", ""), "or give static there"),
        (("now", "small"), "no weights, claims, claim, static"),
    ],
)
def test_what_is_wrong_with_a_list_is_told(
    model: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    _claims(tmp_path / "claims.json", RATIOS)
    with pytest.raises(UserError, match=message):
        points(_list(tmp_path / "models.csv", model))


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a CSV file of language models"):
        points(tmp_path / "models.csv")
