"""The harness's perplexity beside ours: against `mlm evaluate`, and against the harness itself."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Finished

import mlm
from benchmarks.harness import Read, ours, row, without_unknown
from benchmarks.readme import engine
from mlm.report.evaluation import read_evaluation
from mlm.text.corpora import open_corpus

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries


def articles(finished: Finished) -> list[str]:
    """The validation split."""
    return [article.text for article in open_corpus(str(finished.corpus)).articles("valid")]


@pytest.mark.parametrize("rule", ["static", "two_levels"])
def test_our_reading_is_that_of_an_evaluation(finished: Finished, rule: str) -> None:
    (want,) = (
        found
        for found in read_evaluation(finished.folder)
        if (found["kind"], found["rule"], found["protocol"]) == ("total", rule, "article")
        and found["split"] == "valid"
    )
    own = ours(mlm.load(finished.folder), articles(finished), rule)
    found = row(own, own)
    assert (found["counting"], found["spelling"]) == (0, 0)
    assert found["perplexity"] == pytest.approx(want["word_perplexity"], rel=1e-5)
    assert found["bits per byte"] == pytest.approx(want["bits_per_byte"], rel=1e-5)


def test_counting_and_spelling_make_up_the_difference() -> None:
    """600 nats of 120 words and line ends, 100 strings: e^5 by our count, e^6 by the harness's."""
    found = row(Read(600.0, 120, 500), Read(650.0, 100, 520))
    assert found["perplexity"] == pytest.approx(math.exp(5))
    assert found["converted"] == pytest.approx(math.exp(6))
    assert found["counting"] == pytest.approx(1)
    assert found["spelling"] == pytest.approx(0.5)
    assert found["bits per byte"] == pytest.approx(1.2 / math.log(2))


def test_lines_with_unknown_words_are_left_out() -> None:
    text = " \n = Mill = \n \n The <unk> mill . \n The mill <unk>ed . \n"
    assert without_unknown([text, " <unk> \n"]) == [" \n = Mill = \n \n The mill <unk>ed . \n"]


def test_what_is_amiss_is_said_before_the_work(
    finished: Finished, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--corpus", finished.corpus, "--out", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "mlm.adapters.harness", sys)  # as if it were installed
    done = command("benchmarks.harness", finished.folder, *flags, "--articles", -1)
    assert "--articles -1: give 0 for all" in done.error
    done = command("benchmarks.harness", finished.folder, *flags, "--rules", "stattic")
    assert "stattic" in done.error
    monkeypatch.delitem(sys.modules, "mlm.adapters.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    done = command("benchmarks.harness", finished.folder, *flags)
    assert "extra `harness`" in done.error
    assert not (tmp_path / "out").exists()


TASK = """
include: {home}/wikitext.yaml
task: local
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
training_split: null
validation_split: null
"""


def test_the_metrics_are_those_of_the_harness_itself(
    finished: Finished, tmp_path: Path, command: Command
) -> None:
    """Its task `wikitext`, with our articles in the place of its data set."""
    lm_eval: Any = pytest.importorskip(
        "lm_eval.tasks", reason="lm_eval is not installed (extra `harness`)"
    )
    out = tmp_path / "out"
    flags = ("--corpus", finished.corpus, "--out", out, "--articles", 2, "--rules", "static")
    done = command("benchmarks.harness", finished.folder, *flags)
    assert done.code == 0, done.err
    found = json.loads((out / "harness.json").read_text(encoding="utf-8"))
    assert found["versions"]["lm_eval"]
    first, second = found["rows"]
    assert second["text"] == "lines without unknown words"
    words = [len(text.split()) for text in articles(finished)[:2]]
    assert first["harness"]["words"] == sum(words) + 2 * len(words), "as docs/adapters.md says"
    assert second["ours"]["words"] < first["ours"]["words"]
    assert "| all lines | static |" in "\n".join(engine(str(out / "harness.json")))

    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    home = Path(lm_eval.__file__).parent / "wikitext"
    pages = [json.dumps({"page": text}) + "\n" for text in articles(finished)[:2]]
    (tmp_path / "data.jsonl").write_text("".join(pages), encoding="utf-8")
    (tmp_path / "local.yaml").write_text(TASK.format(home=home, folder=tmp_path), encoding="utf-8")
    manager = lm_eval.TaskManager(include_path=tmp_path, include_defaults=False)
    model = f"pretrained={finished.folder},rule=static"
    theirs = simple_evaluate("mlm", model, ["local"], task_manager=manager, bootstrap_iters=0)
    assert theirs is not None
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert first[name] == pytest.approx(theirs["results"]["local"][f"{name},none"])
