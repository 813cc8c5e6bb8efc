"""The whole path on a tiny invented corpus: what a run leaves, and that it can be interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, Finished
from safetensors.torch import load_file
from tiny import as_flags, tiny_config, write_corpus

from mlm.base.names import PROTOCOLS
from mlm.extensions.ngram_memory import LONGEST_CONTEXT, NGramMemory
from mlm.kernels.processor import trains_bfloat16
from mlm.runs.base import base_of_through_run
from mlm.runs.run import Run
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.presets import settings
from mlm.settings.sections import EvaluationConfig
from mlm.spelling import canonical_text
from mlm.stages.order import run_stages
from mlm.store.run_folder import ENTRIES, RunFolder
from mlm.store.versions import FORMAT
from mlm.text.corpora import count_words, open_corpus
from mlm.training.language_model import LMTrainer
from mlm.training.meta import MetaTrainer

RULES = EvaluationConfig().rules
PICTURES = (
    "figure2",
    "gain_by_occurrence",
    "gain_by_position",
    "words_start",
    "words_middle",
    "training",
)
TOTAL_KEYS = {
    "rule",
    "protocol",
    "split",
    "words",
    "nll",
    "word_perplexity",
    "nats_per_word_gained",
    "interval",
    "words_per_second",
}
Contents = Callable[[Path], dict[str, bytes]]


def rows_of(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of evaluation.json, without the speeds, which no two runs share."""
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return [
        {key: value for key, value in row.items() if key != "words_per_second"}
        for row in rows
        if kind in (None, row["kind"])
    ]


def losses_of(folder: Path) -> dict[str, np.ndarray]:
    """Columns of losses.parquet."""
    table = pq.read_table(folder / "losses.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without the speeds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "words_per_second"} for row in rows]


def spoken(corpus: Path, split: str) -> str:
    """The words of a split as losses.parquet has them, taken straight from the text."""
    text = "".join(article.text for article in open_corpus(str(corpus)).articles(split))
    return " ".join(text.replace("\n", " <eos> ").split())


# ---------------------------------------------------------------- the run folder


def test_run_folder_holds_what_scripts_outside_read(finished: Finished) -> None:
    folder = finished.folder
    expected = ["config.json", "metrics.jsonl", "evaluation.json", "evaluation.md", "words.html"]
    expected += ["losses.parquet", "vocabulary/vocabulary.model"]
    for name in ("lm", "lm_last", "memory", "two_levels", "three_levels"):
        expected.append(f"checkpoints/{name}.safetensors")
    expected += [f"figures/{name}.{end}" for name in PICTURES for end in ("png", "svg", "csv")]
    missing = [name for name in expected if not (folder / name).is_file()]
    assert not missing
    left = [p.name for p in folder.rglob("*") if p.name.startswith(".")]
    assert not left, "temporary files left behind"


def test_config_explains_the_run(finished: Finished) -> None:
    record = json.loads((finished.folder / "config.json").read_text(encoding="utf-8"))
    assert set(record) == set(ENTRIES)
    assert record["format"] == FORMAT
    assert record["versions"]["torch"] == torch.__version__
    loaded = RunFolder(finished.folder).load_config()
    assert loaded == replaced(finished.config, {"meta.gradient": "reverse"})  # was auto


def test_flags_mean_the_settings(finished: Finished, command: Command, tmp_path: Path) -> None:
    """`as_flags`, used by other tests, says the same as the settings themselves."""
    config = dataclasses.replace(finished.config, out=tmp_path / "run", stages=("lm",))
    config = dataclasses.replace(config, lm=dataclasses.replace(config.lm, epochs=0.1))
    assert command("train", *as_flags(config)).code == 0
    assert RunFolder(tmp_path / "run").load_config() == config


def test_rows_of_the_evaluation(finished: Finished) -> None:
    rows = json.loads((finished.folder / "evaluation.json").read_text(encoding="utf-8"))
    totals = [row for row in rows if row["kind"] == "total"]
    assert {(row["rule"], row["protocol"]) for row in totals} == {
        (rule, protocol) for rule in RULES for protocol in PROTOCOLS
    }
    text = "".join(article.text for article in open_corpus(str(finished.corpus)).articles("valid"))
    for row in totals:
        assert set(row) >= TOTAL_KEYS
        assert row["split"] == "valid"
        assert row["words"] == count_words(text)
        assert row["bytes"] == len(canonical_text(text).encode())
        assert row["word_perplexity"] == pytest.approx(math.exp(row["nll"] / row["words"]))
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2) / row["bytes"])
        assert row["words_per_second"] > 0
    for kind, key in (("position", "from"), ("article", "title")):
        parts = [row for row in rows if row["kind"] == kind]
        assert all(key in row for row in parts)
        for total in totals:
            same = [
                p for p in parts if (p["rule"], p["protocol"]) == (total["rule"], total["protocol"])
            ]
            assert sum(p["words"] for p in same) == total["words"]
            assert sum(p["nll"] for p in same) == pytest.approx(total["nll"])


def test_word_losses_add_up_to_the_totals(finished: Finished) -> None:
    columns = losses_of(finished.folder)
    names = {
        (rule, p): rule if p == "article" else f"{rule}_stream" for rule in RULES for p in PROTOCOLS
    }
    assert set(columns) == {"split", "article", "title", "position", "word", *names.values()}
    assert " ".join(columns["word"]) == spoken(finished.corpus, "valid")
    static = columns["static"].astype(np.float64)
    for row in rows_of(finished.folder, "total"):
        losses = columns[names[row["rule"], row["protocol"]]].astype(np.float64)
        assert losses.sum() == pytest.approx(row["nll"], rel=1e-6)  # float32 in the file
        if row["protocol"] == "article":
            gain = (static - losses).sum() / row["words"]
            assert gain == pytest.approx(row["nats_per_word_gained"], abs=1e-6)


def test_reading_helps_on_a_repetitive_text(finished: Finished) -> None:
    """Half of an article's words are its own: a rule that learned nothing is broken."""
    for row in rows_of(finished.folder, "total"):
        if row["rule"] != "static":
            assert row["interval"][0] > 0, row
    static = next(r for r in rows_of(finished.folder, "total") if r["rule"] == "static")
    assert 3 < static["word_perplexity"] < 3000


def test_training_is_logged(finished: Finished) -> None:
    rows = metrics_of(finished.folder)
    steps = [row["step"] for row in rows if row["stage"] == "lm"]
    assert len(steps) == finished.config.lm.validations
    assert steps == sorted(set(steps))
    for rule in finished.config.meta.rules:
        part = [row for row in rows if row["stage"] == "meta" and row["rule"] == rule]
        gains = [row["step"] for row in part if "gain" in row]
        assert gains == [0, 2, 3]  # as many as hand-made rules may try: the budget, 3
        assert [r["step"] for r in part if "train_loss" in r] == [1, 2, 3]


def test_only_training_and_validation_text_is_read(finished: Finished) -> None:
    assert finished.cached == ["train.tokens", "valid.tokens", "valid.tokens"]


# ---------------------------------------------------------------- stages, seeds, lanes


@pytest.mark.slow
def test_stages_one_by_one_give_the_same_run(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """Each stage alone, from the run folder: the very weights and losses of the run in one go."""
    config = dataclasses.replace(finished.config, out=tmp_path / "run", stages=("lm",))
    assert command("train", *as_flags(config)).code == 0
    for stage in ("meta", "evaluate"):
        outcome = command("train", "--out", tmp_path / "run", "--stages", stage)
        assert outcome.code == 0, outcome.err
    for file in sorted((finished.folder / "checkpoints").iterdir()):
        again = load_file(tmp_path / "run" / "checkpoints" / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, again[name]), (file.name, name)
    assert metrics_of(tmp_path / "run") == metrics_of(finished.folder)
    first, second = losses_of(finished.folder), losses_of(tmp_path / "run")
    for name, column in first.items():
        assert (column == second[name]).all(), name
    assert rows_of(tmp_path / "run") == rows_of(finished.folder)


def test_a_rule_named_is_given_to_the_language_model_that_is_there(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of stage 1 are the run's own, those of later stages the rule's, unless given."""
    folder = finished.copy(tmp_path / "run")
    seen: list[Config] = []
    monkeypatch.setattr("mlm.stages.order.run_stages", seen.append)
    words = ("--out", folder, "--stages", "meta", "evaluate", "--meta-steps", 3)
    assert command("train", *words, "--rule", "best").code == 0
    best, own = settings("tiny", "best"), RunFolder(folder).load_config()
    assert (seen[0].size, seen[0].rule) == ("tiny", "best")
    assert seen[0].adapt == best.adapt
    assert seen[0].extensions == best.extensions != own.extensions
    assert seen[0].meta == dataclasses.replace(best.meta, steps=3)
    assert seen[0].evaluation == best.evaluation
    assert (seen[0].text, seen[0].model, seen[0].lm) == (own.text, own.model, own.lm)
    assert seen[0].corpus == own.corpus
    assert command("train", *words).code == 0
    assert (seen[1].rule, seen[1].adapt) == (own.rule, own.adapt)


def test_a_base_taken_from_another_run_holds_nothing_that_follows_from_its_settings(
    finished: Finished, tmp_path: Path
) -> None:
    """Such as the steps of n-gram memory: those of the run that takes it count."""
    there = RunFolder(finished.copy(tmp_path / "there"))
    config = replaced(finished.config, {"extensions.ngram_memory.tokens": 50})
    there.save_config(config)
    steps = tuple(k / 10 for k in range(LONGEST_CONTEXT))
    own = {
        "lm.through": "learned",
        "lm.through_run": there.path,
        "extensions.ngram_memory.steps": steps,
    }
    run = Run(replaced(config, own), RunFolder(tmp_path / "here"), torch.device("cpu"), quiet=True)
    base = run.ready(base_of_through_run(run))
    found = base.weights[NGramMemory().key("steps")]
    assert found.tolist() == pytest.approx(steps)


def test_another_seed_gives_another_model(finished: Finished, tmp_path: Path) -> None:
    short = {"lm__epochs": 0.2, "stages": ("lm",)}
    weights = []
    for seed in (0, 0, 1):
        out = tmp_path / f"run{len(weights)}"
        run_stages(tiny_config(finished.corpus, out, seed=seed, **short), quiet=True)
        weights.append(load_file(out / "checkpoints" / "lm.safetensors")["embedding"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_draw_alone(finished: Finished, command: Command, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "run")
    for name in ("words.html", "figures/figure2.png"):
        (folder / name).unlink()
    outcome = command("train", "--out", folder, "--stages", "draw")
    assert outcome.code == 0, outcome.err
    for line in outcome.out.splitlines()[1:]:
        assert Path(line.strip()).is_file()
    assert (folder / "words.html").read_bytes() == (finished.folder / "words.html").read_bytes()


@pytest.mark.slow
def test_scores_do_not_depend_on_lanes(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """Three articles at once or one: a batch is only speed.

    Losses differ by float32 rounding alone: sums of a matrix product run in another order for
    another batch, about 1e-6 relative, and the updates of an article carry that along.
    """
    folder = finished.copy(tmp_path / "run")
    words = ("--protocols", "article", "--no-draw")
    assert command("evaluate", folder, "--evaluation.lanes", 1, *words).code == 0
    one, three = losses_of(folder), losses_of(finished.folder)
    for rule in RULES:
        np.testing.assert_allclose(one[rule], three[rule], rtol=0, atol=2e-4, err_msg=rule)
    for a, b in zip(rows_of(folder, "total"), rows_of(finished.folder, "total"), strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)


def test_words_and_adaptive_softmax(finished: Finished, command: Command, tmp_path: Path) -> None:
    """Word level with a split softmax, all weights dynamic but the tails, from text to table."""
    config = tiny_config(
        finished.corpus,
        tmp_path / "run",
        text__vocabulary="word",
        text__vocabulary_size=0,
        model__adaptive_above=20,
        model__cutoffs=(12, 40, 9000),
        lm__epochs=2.0,
        meta__steps=2,
        meta__rules=("three_levels",),
        evaluation__rules=("static", "rms", "three_levels"),
        evaluation__budget=2,
        stages=("lm", "meta", "evaluate"),
    )
    outcome = command("train", *as_flags(config))
    assert outcome.code == 0, outcome.err
    weights = load_file(tmp_path / "run" / "checkpoints" / "lm.safetensors")
    assert {"embedding.tail1", "embedding.tail2", "softmax.cluster"} <= set(weights)
    assert "embedding.tail3" not in weights  # the cutoff beyond the vocabulary drops out
    totals = rows_of(tmp_path / "run", "total")
    assert len(totals) == 6
    words = {row["words"] for row in rows_of(finished.folder, "total")}
    assert {row["words"] for row in totals} == words  # words are words, whatever the tokens
    columns = losses_of(tmp_path / "run")
    for row in totals:
        name = row["rule"] if row["protocol"] == "article" else f"{row['rule']}_stream"
        assert columns[name].astype(np.float64).sum() == pytest.approx(row["nll"], rel=1e-6)
        assert row["rule"] == "static" or row["interval"][0] > 0


@pytest.mark.skipif(not trains_bfloat16(), reason="oneDNN trains in bfloat16 from AVX-512 on")
@pytest.mark.slow
def test_bfloat16_trains_as_well(finished: Finished, tmp_path: Path) -> None:
    """Half precision in the matrix products only: the loss follows float32's."""
    config = tiny_config(
        finished.corpus, tmp_path / "run", lm__precision="bfloat16", stages=("lm",)
    )
    run_stages(config, quiet=True)
    half, full = metrics_of(tmp_path / "run")[-1], metrics_of(finished.folder)
    last = [row for row in full if row["stage"] == "lm"][-1]
    assert half["precision"] == "bfloat16"
    assert half["valid_loss"] == pytest.approx(last["valid_loss"], abs=0.05)
    weights = load_file(tmp_path / "run" / "checkpoints" / "lm.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


# ---------------------------------------------------------------- evaluate.py


@pytest.mark.slow
def test_another_corpus_gets_a_folder_of_its_own(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    folder = finished.copy(tmp_path / "run")
    other = write_corpus(tmp_path / "other", seed=5)
    outcome = command("evaluate", folder, "--corpus", other, "--rules", "rms", "--budget", 3)
    assert outcome.code == 0, outcome.err
    (results,) = folder.glob("on-*")
    assert re.fullmatch("on-other-[0-9a-f]{8}", results.name)
    rows = rows_of(results, "total")
    assert [(row["rule"], row["protocol"]) for row in rows] == [
        (rule, protocol) for protocol in PROTOCOLS for rule in ("static", "rms")
    ]
    assert {row["corpus"] for row in rows} == {"other"}
    for name in ("words.html", "evaluation.md", "losses.parquet", "figures/figure2.png"):
        assert (results / name).is_file()
    before, after = contents(finished.folder), contents(folder)
    assert {name: after[name] for name in before} == before, "the run's own results changed"


@pytest.mark.slow
def test_a_story_is_scored_whole_and_two_of_one_name_have_a_folder_each(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    flags = ("--rules", "rms", "--protocols", "article", "--budget", 3)
    for text in ("Ba do, gi; “ku” do.\nGi ba!", "Do gi ba? Ku."):
        story = tmp_path / text[:2] / "story.txt"
        story.parent.mkdir()
        story.write_text(text, encoding="utf-8")
        outcome = command("evaluate", folder, "--corpus", story, *flags)
        assert outcome.code == 0, outcome.err
    found = list(folder.glob("on-story-*"))
    for path in found:
        kinds = {(row["split"], row["corpus"]) for row in rows_of(path, "total")}
        assert kinds == {("whole", "story.txt")}
    words = {" ".join(losses_of(path)["word"]) for path in found}
    assert words == {'Ba do , gi ; " ku " do . <eos> Gi ba ! <eos>', "Do gi ba ? Ku . <eos>"}


def test_test_split_is_read_when_asked_for(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    words = ("--rules", "static", "rms", "--protocols", "article")
    outcome = command("evaluate", folder, "--split", "test", "--no-draw", *words)
    assert outcome.code == 0, outcome.err
    splits = {row["split"] for row in rows_of(folder, "total")}
    assert splits == {"valid", "test"}
    columns = losses_of(folder)
    assert set(columns["split"]) == {"valid", "test"}
    read = columns["word"][columns["split"] == "test"]
    assert " ".join(read) == spoken(finished.corpus, "test")
    valid = [row for row in rows_of(folder) if row["split"] == "valid"]
    assert valid == rows_of(finished.folder), "scores on validation changed"


def test_a_later_command_does_not_inherit_the_test_split(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.copy(tmp_path / "run")
    words = ("--rules", "static", "--protocols", "article")
    stages = ("--out", folder, "--stages", "evaluate")
    assert command("train", *stages, "--split", "test", *words).code == 0
    read = []
    original = type(open_corpus(str(finished.corpus))).fingerprint
    monkeypatch.setattr(
        "mlm.text.corpora.TextDirectory.fingerprint",
        lambda self, split: read.append(split) or original(self, split),
    )
    assert command("evaluate", folder, "--no-draw").code == 0
    assert command("train", *stages).code == 0
    assert "valid" in read
    assert "test" not in read


# ---------------------------------------------------------------- resume


class Interruptions:
    """Ctrl-C at chosen calls of a method: before the n-th call of it, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def before(self, owner: Any, name: str, call: int) -> None:
        original, calls = getattr(owner, name), 0

        def step(*words: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                self.monkeypatch.setattr(owner, name, original)
                raise KeyboardInterrupt
            return original(*words, **named)

        self.monkeypatch.setattr(owner, name, step)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interruptions:
    return Interruptions(monkeypatch)


def same_tensors(one: Path, two: Path) -> None:
    """Bit-equal files of tensors."""
    a, b = load_file(one), load_file(two)
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), (one.name, name)


def awd_like(finished: Finished, out: Path) -> Config:
    """Stage 1 with all that has a state: two layers, every dropout, AR and TAR."""
    rates = {f"lm__dropout_{name}": 0.1 for name in ("embedding", "input", "hidden", "output")}
    more = {"lm__weight_drop": 0.2, "lm__ar": 2.0, "lm__tar": 1.0, "lm__epochs": 3.0}
    return tiny_config(
        finished.corpus, out, model__layers=2, stages=("lm",), seed=3, **rates, **more
    )


def test_stage_1_resumes_bit_for_bit(
    finished: Finished, command: Command, tmp_path: Path, interrupt: Interruptions
) -> None:
    """Interrupted before the first step, between validations and in one, then resumed."""
    whole, parts = awd_like(finished, tmp_path / "whole"), awd_like(finished, tmp_path / "parts")
    run_stages(whole, quiet=True)
    flags = as_flags(parts)
    interrupt.before(LMTrainer, "train_step", 1)
    assert command("train", *flags).code == 130
    for name, call in (("train_step", 13), ("train_step", 100)):
        interrupt.before(LMTrainer, name, call)
        assert command("train", *flags, "--resume").code == 130
    interrupt.before(importable("mlm.training.language_model"), "static_loss", 1)
    outcome = command("train", "--out", tmp_path / "parts", "--resume")
    assert outcome.code == 130
    assert outcome.err.strip().splitlines()[-1].startswith("interrupted;")
    outcome = command("train", "--out", tmp_path / "parts", "--resume")
    assert outcome.code == 0, outcome.err
    for name in ("lm", "lm_last"):
        same_tensors(
            *(tmp_path / run / "checkpoints" / f"{name}.safetensors" for run in ("whole", "parts"))
        )
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def importable(name: str) -> Any:
    """A module as an object whose functions can be replaced."""
    import importlib

    return importlib.import_module(name)


def test_stage_2_resumes_bit_for_bit(
    finished: Finished, command: Command, tmp_path: Path, interrupt: Interruptions
) -> None:
    """Interrupted before the first judgement, between two and in one, in either rule."""
    folder = finished.copy(tmp_path / "run")
    for file in (folder / "checkpoints").glob("*levels*"):
        file.unlink()
    words = ("--out", folder, "--stages", "meta")
    module = importable("mlm.stages.meta")
    interrupt.before(module, "validation_gain", 1)
    assert command("train", *words).code == 130
    interrupt.before(MetaTrainer, "train_step", 2)
    assert command("train", *words, "--resume").code == 130
    interrupt.before(module, "validation_gain", 1)
    assert command("train", *words, "--resume").code == 130
    interrupt.before(MetaTrainer, "train_step", 3)
    assert command("train", *words, "--resume").code == 130
    outcome = command("train", *words, "--resume")
    assert outcome.code == 0, outcome.err
    for name in ("two_levels", "two_levels_last", "three_levels", "three_levels_last"):
        file = f"checkpoints/{name}.safetensors"
        same_tensors(finished.folder / file, folder / file)

    def key(row: dict[str, Any]) -> str:
        return json.dumps(row, sort_keys=True)

    rows, expected = metrics_of(folder), metrics_of(finished.folder)
    assert sorted(rows, key=key) == sorted(expected, key=key)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    folder = finished.copy(tmp_path / "run")
    outcome = command("train", "--out", folder, "--resume", "--stages", "lm", "meta", "evaluate")
    assert outcome.code == 0, outcome.err
    before, after = contents(finished.folder), contents(folder)
    assert set(after) == set(before)
    changed = {name for name in before if before[name] != after[name]}
    # The command is another, and so are the measured speeds; nothing else.
    assert changed <= {"config.json", "evaluation.json", "evaluation.md"}
    assert rows_of(folder) == rows_of(finished.folder)


def test_a_second_run_never_replaces_the_first_unasked(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    folder = finished.copy(tmp_path / "run")
    flags = as_flags(dataclasses.replace(finished.config, out=folder))
    error = command("train", *flags).error
    assert "--resume" in error
    assert "--overwrite" in error
    assert contents(folder) == contents(finished.folder)


def test_overwrite_leaves_nothing_of_the_old_run(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    config = tiny_config(finished.corpus, folder, stages=("lm",), lm__epochs=0.2, overwrite=True)
    assert command("train", *as_flags(config)).code == 0
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "metrics.jsonl",
        "vocabulary/vocabulary.model",
        "checkpoints/lm.safetensors",
        "checkpoints/lm.previous.safetensors",
        "checkpoints/lm_last.safetensors",
        "checkpoints/lm_last.previous.safetensors",
    }
