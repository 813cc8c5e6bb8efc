"""Bad input: one clear message, a non-zero exit, nothing lost and nothing half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from safetensors.torch import load_file
from tiny import article, as_flags, corpus_text, tiny_config, write_corpus

from mlm.base.errors import run_cli
from mlm.settings.checks import RANGES, Range
from mlm.settings.config import Config
from mlm.settings.flags import replaced as with_values
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors, save_tensors
from mlm.store.versions import FORMAT
from mlm.text.articles import split_articles

ROOT = Path(__file__).resolve().parents[2]
Contents = Callable[[Path], dict[str, bytes]]
ONE_STAGE: dict[str, Any] = {"stages": ("lm",), "lm__epochs": 0.2, "lm__validations": 1}
STATIC = ("--rules", "static", "--protocols", "article", "--no-draw")


def flags_for(corpus: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a tiny run."""
    return as_flags(tiny_config(corpus, out, **changes))


def patch(monkeypatch: pytest.MonkeyPatch, place: str, call: int, result: Any) -> None:
    """Let the `call`-th call (from 1) of function `place` return or raise `result`."""
    module, _, name = place.rpartition(".")
    owner = importlib.import_module(module)
    original, calls = getattr(owner, name), 0

    def replaced(*words: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return original(*words, **named)
        if isinstance(result, BaseException):
            raise result
        return result(original(*words, **named)) if callable(result) else result

    monkeypatch.setattr(owner, name, replaced)


# ---------------------------------------------------------------- text

BAD_TEXT: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no training file": ({"train.txt": None}, "has no train split"),
    "no validation file": ({"valid.txt": None}, "has no valid split"),
    "no file at all": ({"train.txt": None, "valid.txt": None, "test.txt": None}, "holds no text"),
    "empty training file": ({"train.txt": b""}, "train.txt is empty"),
    "blank validation file": ({"valid.txt": b" \n \n"}, "valid.txt is empty"),
    "no title line": ({"train.txt": b"some words\n" * 40}, "line 1: no title line"),
    "text before the title": ({"valid.txt": b"ba do\n \n = Ti = \n \n do\n"}, "line 1: no title"),
    "invalid UTF-8": ({"train.txt": b" \n = A = \n \n ba \xff do\n"}, "line 4: not valid UTF-8"),
    "a single article": ({"train.txt": corpus_text(1, 0).encode()}, "holds 1 article"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_is_refused_before_the_run(case: str, command: Command, tmp_path: Path) -> None:
    files, message = BAD_TEXT[case]
    corpus = write_corpus(tmp_path / "toy")
    for name, body in files.items():
        (corpus / name).unlink() if body is None else (corpus / name).write_bytes(body)
    error = command("train", *flags_for(corpus, tmp_path / "run")).error
    assert message in error
    assert str(corpus) in error or "at least 2 are needed" in error
    assert not (tmp_path / "run").exists(), "a run folder for a run that never began"


def test_corpus_that_does_not_exist(command: Command, tmp_path: Path) -> None:
    error = command("train", *flags_for(tmp_path / "nowhere", tmp_path / "run")).error
    assert "no corpus" in error
    assert "pydocs" in error
    assert not (tmp_path / "run").exists()


def test_text_that_stands_in_the_training_text_is_told(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    """A split that is the training split, and one that shares an article; otherwise nothing."""
    corpus = Path(shutil.copytree(finished.corpus, tmp_path / "toy"))
    train = (corpus / "train.txt").read_text(encoding="utf-8")
    first = next(split_articles(train.splitlines(keepends=True)))
    with open(corpus / "valid.txt", "a", encoding="utf-8") as file:
        file.write(first.text)
    (corpus / "test.txt").write_text(train, encoding="utf-8")
    words = flags_for(corpus, tmp_path / "run", evaluation__split="test", stages=("lm", "meta"))
    with pytest.MonkeyPatch.context() as now:
        now.setattr("mlm.stages.order.stage_lm", lambda run: None)
        now.setattr("mlm.stages.order.stage_meta", lambda run: None)
        now.setattr("mlm.stages.evaluate.stage_evaluate", lambda run, _: (run.folder.path, []))
        err = command("train", *words, "--stages", "lm", "meta", "evaluate").err
        assert "1 of the 5 articles of split valid stand in the training text, too, such as " in err
        assert repr(first.title) in err
        assert "12 of the 12 articles of split test stand in the training text" in err
        clean = flags_for(finished.corpus, tmp_path / "clean")
        assert "stand in the training" not in command("train", *clean, "--stages", "lm").err


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("bpe", 9000, "larger than the training text supports. The largest possible size is"),
        ("unigram", 9000, "larger than the training text supports. The largest possible size is"),
        ("bpe", 40, "The smallest possible size is"),
        ("word", 9000, "Give at most"),
    ],
)
def test_vocabulary_the_text_does_not_support(
    kind: str, size: int, message: str, finished: Finished, command: Command, tmp_path: Path
) -> None:
    flags = flags_for(
        finished.corpus, tmp_path / "run", text__vocabulary=kind, text__vocabulary_size=size
    )
    error = command("train", *flags).error
    assert f"--vocabulary-size {size}" in error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_empty_and_one_word_articles_are_read(command: Command, tmp_path: Path) -> None:
    """Title-only and one-word articles, shorter than a segment, in all splits, through all rules.

    In validation there is nothing else: M is larger than every article there.
    """
    corpus = write_corpus(tmp_path / "toy", train=6)
    short = " \n = Gi = \n \n \n = Ku = \n \n do \n \n = La = \n \n"
    with open(corpus / "train.txt", "a", encoding="utf-8") as file:
        file.write(short + article("Mo", ["mo"], 12, np.random.default_rng(0)) + short)
    (corpus / "valid.txt").write_text(short, encoding="utf-8")
    changes = {"adapt__update_every": 60, "meta__steps": 1, "lm__epochs": 1.0}
    stages = ("lm", "meta", "evaluate")
    outcome = command("train", *flags_for(corpus, tmp_path / "run", stages=stages, **changes))
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    words = {r["title"]: r["words"] for r in rows if r["kind"] == "article"}
    assert words == {"Gi": 6, "Ku": 8, "La": 6}
    for row in rows:
        # Nothing is learned from an article before it has been read: one segment, no gain.
        if row["kind"] == "total" and row["protocol"] == "article":
            assert row["nats_per_word_gained"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_one_article_to_score(finished: Finished, command: Command, tmp_path: Path) -> None:
    """No interval can be had from one article; everything else can, the pictures too."""
    folder = finished.copy(tmp_path / "run")
    outcome = command("evaluate", folder, "--max-articles", 1, "--rules", "rms")
    assert outcome.code == 0, outcome.err
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    total = next(r for r in rows if r["kind"] == "total" and r["rule"] == "rms")
    assert total["interval"] is None
    assert total["articles"] == 1


def test_m_larger_than_every_training_article(command: Command, tmp_path: Path) -> None:
    """Refused before stage 1, not after it."""
    corpus = tmp_path / "toy"
    write_corpus(corpus)
    rng = np.random.default_rng(0)
    texts = [article(f"A{k}", ["ba"], 2, rng) for k in range(12)]
    (corpus / "train.txt").write_text("".join(texts), encoding="utf-8")
    changes = {"adapt__update_every": 100, "text__vocabulary": "word", "text__vocabulary_size": 0}
    error = command("train", *flags_for(corpus, tmp_path / "run", **changes)).error
    assert "--update-every 100: no held-out article is as long" in error
    assert not (tmp_path / "run").exists()


def test_truncated_token_file_is_built_again(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    cache = finished.config.text.data_dir
    for file in cache.rglob("valid.tokens"):
        file.write_bytes(file.read_bytes()[:-50])
    outcome = command("evaluate", folder, *STATIC)
    assert outcome.code == 0, outcome.err
    assert "cut short or overwritten; building it again" in outcome.err
    columns = [_losses(f / "losses.parquet")["static"] for f in (folder, finished.folder)]
    assert (columns[0] == columns[1]).all()


def _losses(path: Path) -> dict[str, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


# ---------------------------------------------------------------- settings

BAD_FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "M below 5": (
        ("--update-every", "4"),
        "--update-every is 4; M must be at least 5",
    ),
    "M above 100": (("--update-every", "101"), "--update-every is 101; M must be at least 5"),
    "preset": (("--preset", "nonsense"), "--preset nonsense: unknown; choose from pydocs"),
    "rule": (("--rules", "static", "lamb"), "--rules is lamb; choose from"),
    "no rule trained": (("--train-rules", "two_levels"), "three_levels is not trained in this run"),
    "weights": (("--dynamic", "lstn"), "--dynamic: 'lstn' matches no weight"),
    "no weights": (("--dynamic", ","), "--dynamic is empty"),
    "seed": (("--seed", "-1"), "--seed is -1; it must be at least 0"),
    "rate": (("--learning-rate", "inf"), "--learning-rate is inf; it must be above 0"),
    "epochs": (("--epochs", "nan"), "--epochs is nan; it must be above 0"),
    "lanes": (("--lanes", "0"), "--lanes is 0; it must be at least 1"),
    "dropout": (("--lm.dropout-input", "1"), "--lm.dropout-input is 1.0; it must be in [0, 1)"),
    "prior": (("--adapt.fisher-prior", "2"), "--adapt.fisher-prior is 2.0; it must be in [0, 1]"),
    "held out": (("--text.held-out", "1"), "--text.held-out is 1.0; it must be in (0, 1)"),
    "cutoffs": (("--model.cutoffs", "9", "3"), "--model.cutoffs is [9, 3]; they must rise"),
    "start": (("--meta.features", "loss"), "--meta.start is rms, whose steps follow"),
    "unroll": (("--meta.unroll", "1"), "--meta.unroll is 1; it must be at least 2"),
    "no protocol": (("--protocols",), "--protocols is empty"),
    "extension": (
        ("--ngram-memory.tokens", "-1"),
        "--ngram-memory.tokens is -1; it must",
    ),
    "share": (("--surprise-weighting.share", "nan"), "--surprise-weighting.share is nan; it must"),
    "steps": (
        ("--ngram-memory.tokens", "9", "--ngram-memory.steps", "1", "2"),
        "--ngram-memory.steps names 2 steps; it must be 9",
    ),
    "needs": (("--ngram-read-out.words", "9"), "there is none: set --ngram-memory.tokens"),
    "nothing to resume": (("--resume",), "holds no run to continue"),
    "meta first": (("--stages", "meta"), "lm.safetensors is missing; run --stages lm first"),
    "evaluate first": (("--stages", "evaluate"), "memory.safetensors is missing; run --stages"),
    "draw first": (("--stages", "draw"), "losses.parquet is missing; run --stages evaluate"),
    "lm, then draw": (("--stages", "lm", "draw"), "losses.parquet is missing; run --stages"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_setting_is_refused_before_the_run(
    case: str, finished: Finished, command: Command, tmp_path: Path
) -> None:
    words, message = BAD_FLAGS[case]
    plain = flags_for(finished.corpus, tmp_path / "run")
    error = command("train", *plain, *words).error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_all_problems_are_named_at_once(command: Command) -> None:
    error = command("train", "--lanes", 0, "--update-every", 3, "--seed", -2).error
    assert all(flag in error for flag in ("--lanes", "--update-every", "--seed"))


@pytest.mark.parametrize("script", ["train", "evaluate", "visualize"])
def test_unknown_flag(script: str, command: Command, finished: Finished) -> None:
    words = [] if script == "train" else [finished.folder]
    outcome = command(script, *words, "--nonsense", 3)
    assert outcome.code == 2
    assert "--nonsense" in outcome.err
    assert "Traceback" not in outcome.err


def test_cuda_where_there_is_none(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = flags_for(finished.corpus, tmp_path / "run")
    error = command("train", *flags, "--device", "cuda").error
    assert "--device cuda: PyTorch sees no CUDA device. Use --device cpu" in error
    assert "--device cpu" in command("evaluate", finished.folder, "--device", "cuda").error
    assert not (tmp_path / "run").exists()


def test_run_folder_that_cannot_be(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        error = command("train", *flags_for(finished.corpus, out)).error
        assert f"{tmp_path / 'file'} is no folder" in error
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"

    def refuse(*args: Any, **more: Any) -> Any:  # the superuser may write anywhere
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("mlm.store.lock.tempfile.TemporaryFile", refuse)
    error = command("train", *flags_for(finished.corpus, tmp_path / "run")).error
    assert f"{tmp_path} cannot be written" in error


def test_evaluate_without_a_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs/pydocs is no run folder" in command("evaluate").error
    assert "is no run folder (it has no config.json)" in command("evaluate", tmp_path).error
    assert "not found" in command("visualize", tmp_path / "none").error
    assert "not found; run `python evaluate.py`" in command("visualize", tmp_path).error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rules", "krause"), "--rules is krause; choose from"),
        (("--corpus", "nowhere"), "no corpus 'nowhere'"),
        (("--budget", "0"), "it must be at least 1"),
        (("--lanes", "1"), "--lanes is called --evaluation.lanes"),
    ],
)
def test_a_bad_evaluation_leaves_the_folder_alone(
    words: tuple[str, ...],
    message: str,
    finished: Finished,
    command: Command,
    contents: Contents,
) -> None:
    before = contents(finished.folder)
    assert message in command("evaluate", finished.folder, *words).error
    assert contents(finished.folder) == before


def test_no_test_split(command: Command, finished: Finished, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(finished.corpus, tmp_path / "toy"))
    (corpus / "test.txt").unlink()
    error = command("evaluate", finished.folder, "--corpus", corpus, "--split", "test").error
    assert "has no test split" in error


# ---------------------------------------------------------------- damaged run folders


def damage_config(body: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(body, encoding="utf-8")


def settings_only(settings: str) -> Callable[[Path], object]:
    """A config.json of today's format that says nothing but these settings."""
    return damage_config(f'{{"format": {FORMAT}{settings}}}')


def cut(name: str, keep: float = 0.6) -> Callable[[Path], None]:
    """Keep the first part of a file."""

    def change(folder: Path) -> None:
        body = (folder / name).read_bytes()
        (folder / name).write_bytes(body[: int(keep * len(body))])

    return change


def junk(name: str, body: bytes) -> Callable[[Path], object]:
    """Other content in a file."""
    return lambda folder: (folder / name).write_bytes(body)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


EVALUATE, RESUME = ("evaluate",), ("train", "--resume", "--out")
META = ("train", "--stages", "meta", "--out")
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "config.json cut short": (cut("config.json"), EVALUATE, "config.json is damaged"),
    "config.json empty": (damage_config(""), EVALUATE, "config.json is damaged"),
    "config.json a list": (damage_config("[1]"), EVALUATE, "config.json is damaged"),
    "config.json without settings": (settings_only(""), EVALUATE, "config.json is damaged"),
    "config.json with a wrong section": (
        settings_only(', "config": {"lm": 5}'),
        RESUME,
        "config.json is damaged",
    ),
    "config.json with a wrong value": (
        settings_only(', "config": {"lm": {"lanes": "many"}}'),
        RESUME,
        "config.json is damaged",
    ),
    "config.json of the future": (
        settings_only(', "config": {"lm": {"wings": 2}}'),
        EVALUATE,
        "unknown setting lm.wings",
    ),
    "memory cut short": (cut("checkpoints/memory.safetensors"), EVALUATE, "is damaged"),
    "memory empty": (cut("checkpoints/memory.safetensors", 0), EVALUATE, "is damaged"),
    "memory missing": (remove("checkpoints/memory.safetensors"), EVALUATE, "is missing"),
    "gates cut short": (cut("checkpoints/two_levels.safetensors"), EVALUATE, "is damaged"),
    "gates missing": (remove("checkpoints/three_levels.safetensors"), EVALUATE, "is missing"),
    "training state cut short, and the one before": (
        lambda folder: [
            cut(f"checkpoints/lm_last{which}.safetensors")(folder) for which in ("", ".previous")
        ],
        RESUME,
        "is damaged",
    ),
    "evaluation not text": (junk("evaluation.json", b"\xff"), EVALUATE, "cannot be read"),
    "evaluation of other things": (junk("evaluation.json", b"[{}]"), EVALUATE, "is not a list of"),
    "evaluation all brackets": (junk("evaluation.json", b"[" * 200_000), EVALUATE, "too deeply"),
    "settings all brackets": (junk("config.json", b"[" * 200_000), EVALUATE, "too deeply"),
    "metrics not text": (junk("metrics.jsonl", b"\xff\n{}\n"), RESUME, "line 1, is damaged"),
    "metrics of other things": (junk("metrics.jsonl", b"[]\n{}\n"), RESUME, "no row of"),
    "metrics all brackets": (
        junk("metrics.jsonl", b"[" * 200_000 + b"\n{}\n"),
        RESUME,
        "nested too deeply",
    ),
    "model cut short": (cut("checkpoints/lm.safetensors"), META, "is damaged"),
    "model missing": (remove("checkpoints/lm.safetensors"), META, "is missing"),
    "vocabulary cut short": (cut("vocabulary/vocabulary.model"), EVALUATE, "is damaged"),
    "vocabulary missing": (remove("vocabulary/vocabulary.model"), EVALUATE, "no vocabulary"),
    "evaluation cut short": (cut("evaluation.json"), EVALUATE, "evaluation.json cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_run_folder(
    case: str, finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    change, (script, *words), message = DAMAGE[case]
    folder = finished.copy(tmp_path / "run")
    change(folder)
    before = contents(folder)
    error = command(script, *words, folder).error
    assert message in error
    assert str(folder) in error or "config.json" in error
    assert contents(folder) == before


AGAIN: dict[str, Callable[[Path], object]] = {
    "tuned settings cut short": cut("tuning.json"),
    "tuned settings not text": junk("tuning.json", b"\xff"),
    "tuned settings a list": junk("tuning.json", b"[]"),
    "tuned settings all brackets": junk("tuning.json", b"[" * 200_000),
    "tuned settings of other things": junk("tuning.json", b'{"sgd/article": 5}'),
    "word losses cut short": cut("losses.parquet"),
}
USUAL = {"tuned settings cut short", "word losses cut short"}
"""Cases of `AGAIN` in the default suite."""


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in USUAL else pytest.mark.slow) for c in AGAIN]
)
def test_what_can_be_made_again_is(
    case: str, finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    AGAIN[case](folder)
    outcome = command("evaluate", folder, "--rules", "sgd", "--protocols", "article", "--no-draw")
    assert outcome.code == 0, outcome.err
    assert ("tuning.json is damaged" in outcome.err) == case.startswith("tuned")
    sgd = [_losses(f / "losses.parquet")["sgd"] for f in (folder, finished.folder)]
    assert (sgd[0] == sgd[1]).all()


def test_torn_last_row_of_the_metrics(finished: Finished, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = {**ONE_STAGE, "lm__epochs": 1.0, "lm__validations": 4}
    assert command("train", *flags_for(finished.corpus, folder, **changes)).code == 0
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text(encoding="utf-8")
    metrics.write_text(whole + '{"stage": "lm", "st', encoding="utf-8")
    outcome = command("train", "--out", folder, "--resume")
    assert outcome.code == 0, outcome.err
    assert metrics.read_text(encoding="utf-8") == whole


def test_checkpoint_of_another_vocabulary(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    """Weights and text must belong together, wherever the other vocabulary came from."""
    other = tmp_path / "other"
    flags = flags_for(finished.corpus, other, text__vocabulary_size=320, **ONE_STAGE)
    assert command("train", *flags).code == 0
    folder = finished.copy(tmp_path / "run")
    shutil.copy(other / "vocabulary" / "vocabulary.model", folder / "vocabulary")
    assert "belongs to another vocabulary" in command("evaluate", folder, *STATIC).error
    assert "belongs to another vocabulary" in command(*META, folder).error
    folder = finished.copy(tmp_path / "again")
    shutil.copy(other / "checkpoints" / "lm.safetensors", folder / "checkpoints")
    assert "belongs to another vocabulary" in command(*META, folder).error
    before = contents(folder)
    resumed = command(*RESUME, folder, "--vocabulary-size", 320)
    assert "was made with --vocabulary-size 330" in resumed.error
    assert contents(folder) == before, "a refused --resume changed the run"


def test_meta_learner_of_other_weights(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    folder = finished.copy(tmp_path / "run")
    words = ("train", "--out", folder, "--stages", "evaluate")
    assert "was made for M = 20" in command(*words, "--update-every", 10).error
    assert "run `--stages meta` again" in command(*words, "--dynamic", "all").error
    assert contents(folder) == contents(finished.folder), "refused settings were recorded"


# ---------------------------------------------------------------- NaN


def nan_like(value: Any) -> Any:
    """The same result with its first number replaced."""
    return value * float("nan")


def test_nan_in_stage_1(
    finished: Finished,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stops before the step; the last checkpoint is whole and leads to the very same model."""
    changes = {"stages": ("lm",), "lm__epochs": 1.0, "lm__validations": 3}
    flags = flags_for(finished.corpus, tmp_path / "run", **changes)
    whole = flags_for(finished.corpus, tmp_path / "whole", **changes)
    assert command("train", *whole).code == 0
    with monkeypatch.context() as now:
        patch(now, "mlm.training.language_model.token_nll", 40, nan_like)
        error = command("train", *flags).error
    assert "stage 1, step 39: the loss is nan" in error
    assert "--resume" in error
    assert (tmp_path / "run" / "checkpoints" / "lm.safetensors").exists()
    assert command("train", *flags, "--resume").code == 0
    for name in ("lm", "lm_last"):
        a, b = (
            load_file(tmp_path / r / "checkpoints" / f"{name}.safetensors")
            for r in ("run", "whole")
        )
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def test_nan_from_a_real_cause(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that the table of ranges would refuse."""
    monkeypatch.setitem(RANGES, "lm.learning_rate", Range(0, 1e39))
    flags = flags_for(finished.corpus, tmp_path / "run", lm__learning_rate=1e38, stages=("lm",))
    error = command("train", *flags).error
    assert "lower --learning-rate (now 1e+38)" in error


def test_nan_on_validation(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"stages": ("lm",), "lm__epochs": 0.5, "lm__validations": 2}
    patch(
        monkeypatch, "mlm.training.language_model.static_loss", 3, nan_like
    )  # the first is a rehearsal
    error = command("train", *flags_for(finished.corpus, tmp_path / "run", **changes)).error
    assert "the validation loss is nan" in error
    _, about = load_tensors(tmp_path / "run" / "checkpoints" / "lm_last.safetensors", "")
    assert about["validated"] == about["step"] < about["steps"]


def test_nan_in_stage_2(
    finished: Finished,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Contents,
) -> None:
    folder = finished.copy(tmp_path / "run")
    patch(
        monkeypatch, "mlm.training.meta.meta_gradient", 3, lambda g: g._replace(loss=float("nan"))
    )
    error = command(*META, folder).error
    assert "stage 2, rule two_levels, step 2: loss nan" in error
    assert "lower --meta.learning-rate" in error
    before, after = contents(finished.folder), contents(folder)
    changed = {name for name in before if before[name] != after[name]}
    last = "checkpoints/two_levels_last.safetensors"
    earlier = last.replace("_last", "_last.previous")
    files = {"config.json", "metrics.jsonl", last, earlier}
    assert changed == files, "the trained rules must stay"
    tensors, about = load_tensors(folder / last, "")
    assert about["judged"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_gates_that_diverge_from_a_real_cause(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """An absurd step size ruins the gates; the start, which was judged first, is kept as best."""
    folder = finished.copy(tmp_path / "run")
    outcome = command(*META, folder, "--meta.learning-rate", 1e3)
    assert "Traceback" not in outcome.err
    if outcome.code:
        assert "lower --meta.learning-rate" in outcome.error
    for name in ("two_levels", "three_levels"):
        tensors, _ = load_tensors(folder / "checkpoints" / f"{name}.safetensors", "")
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_nan_when_the_start_is_judged(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.copy(tmp_path / "run")
    patch(monkeypatch, "mlm.stages.meta.validation_gain", 1, float("-inf"))
    error = command(*META, folder).error
    assert "stage 2, rule two_levels, step 0: the validation loss is not finite" in error


def test_every_setting_diverges(
    finished: Finished, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.copy(tmp_path / "run")
    (folder / "tuning.json").unlink()
    diverged = [float("inf")]
    monkeypatch.setattr(
        "mlm.training.tuning.losses_of", lambda m, r, tried, *_: diverged * len(tried)
    )
    error = command("evaluate", folder, "--rules", "sgd", "--no-draw").error
    assert "rule sgd, protocol article: every setting tried diverged" in error


def test_nan_in_evaluation(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    """Gates that would ruin the weights: the rule is named, and no table is touched."""
    folder = finished.copy(tmp_path / "run")
    path = folder / "checkpoints" / "two_levels.safetensors"
    tensors, about = load_tensors(path, "")
    save_tensors(path, {n: torch.full_like(t, float("nan")) for n, t in tensors.items()}, about)
    before = contents(folder)
    error = command("evaluate", folder, "--rules", "two_levels").error
    assert "two_levels.safetensors is damaged (update is not finite); delete it" in error
    assert contents(folder) == before


def test_gates_that_ruin_the_weights_are_reported(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """The guard resets lane after lane, says so and writes it into the table."""
    folder = finished.copy(tmp_path / "run")
    path = folder / "checkpoints" / "two_levels.safetensors"
    tensors, about = load_tensors(path, "")
    save_tensors(path, {n: torch.full_like(t, 30.0) for n, t in tensors.items()}, about)
    done = command("evaluate", folder, "--rules", "two_levels", "--no-draw")
    assert done.code == 0
    assert "2 levels, protocol article: the guard reset the weights" in done.err
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    total = next(r for r in rows if (r["kind"], r["rule"]) == ("total", "two_levels"))
    assert total["resets"] > 10
    table = (folder / "evaluation.md").read_text(encoding="utf-8")
    assert "| words/s | resets |" in table
    assert f"| {total['resets']:,} |" in table
    assert f"{total['resets']:>9,}\n" in done.out


def test_nan_in_the_language_model(finished: Finished, command: Command, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "run")
    path = folder / "checkpoints" / "lm.safetensors"
    tensors, about = load_tensors(path, "")
    save_tensors(path, {n: t * float("nan") for n, t in tensors.items()}, about)
    assert "lm.safetensors is damaged (embedding is not finite)" in command(*META, folder).error


# ---------------------------------------------------------------- a full disk


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let the system refuse to write any file past `size` bytes, as a full disk would."""
    resource = pytest.importorskip("resource", reason="needs a Unix system")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def assert_disk_full(error: str) -> None:
    assert "cannot write /" in error, "the file is not named"
    assert "Free some space" in error


def no_temporaries(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("size", [200, 5_000, 40_000])
def test_disk_too_small_for_stage_1(
    size: int, finished: Finished, command: Command, tmp_path: Path
) -> None:
    """The vocabulary, the token file or the checkpoint does not fit; with room, it goes on."""
    corpus = Path(shutil.copytree(finished.corpus, tmp_path / "toy"))
    flags = flags_for(corpus, tmp_path / "run", **ONE_STAGE)
    with no_file_beyond(size):
        assert_disk_full(command("train", *flags).error)
    no_temporaries(tmp_path)
    more = ["--resume"] if (tmp_path / "run" / "config.json").exists() else []
    outcome = command("train", *flags, *more)
    assert outcome.code == 0, outcome.err


def test_disk_too_small_for_the_results(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    """Arrow, PIL and plain files: whoever writes, the old results stay."""
    folder = finished.copy(tmp_path / "run")
    before = contents(folder)
    evaluate = ("evaluate", folder, "--rules", "rms", "--protocols", "article", "--no-draw")
    with no_file_beyond(4_000):
        assert_disk_full(command(*evaluate).error)
    with no_file_beyond(6_000):
        assert_disk_full(command("visualize", folder).error)
    assert contents(folder) == before


def test_row_of_metrics_torn_by_a_full_disk(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    changes = {"stages": ("lm",), "lm__epochs": 1.0, "lm__validations": 4}
    flags = flags_for(finished.corpus, tmp_path / "run", **changes)
    write, torn = RunFolder.log, []

    def log(self: RunFolder, **row: Any) -> None:
        if len(self.rows()) < 2:
            return write(self, **row)
        with no_file_beyond(self.metrics_file.stat().st_size + 30):
            torn.append(row)
            return write(self, **row)

    with pytest.MonkeyPatch.context() as now:
        now.setattr(RunFolder, "log", log)
        assert_disk_full(command("train", *flags).error)
    assert len(torn) == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    assert len(lines[-1]) == 30
    assert command("train", *flags, "--resume").code == 0
    rows = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == sorted(
        {json.loads(r)["step"] for r in rows}
    )
    assert len(rows) == 4


def disk_full_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """The `write`-th file of a command is found not to fit when it is brought to the disk."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    patch(monkeypatch, "os.fsync", write, full)


@pytest.mark.slow
def test_disk_full_at_every_write_of_stage_1(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """Whichever file the disk has no room for: one message, nothing half-written, and the same
    command (with --resume once there is something to resume) ends at the very same model."""
    corpus = Path(shutil.copytree(finished.corpus, tmp_path / "toy"))
    flags = flags_for(corpus, tmp_path / "run", **ONE_STAGE)
    expected: dict[str, torch.Tensor] = {}
    write = 0
    for write in range(1, 30):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with pytest.MonkeyPatch.context() as now:
            disk_full_at(now, write)
            outcome = command("train", *flags)
        if outcome.code == 0:
            break
        assert_disk_full(outcome.error)
        no_temporaries(tmp_path)
        if write % 3:  # every third is enough: each takes half a second
            continue
        again = ["--resume"] if (tmp_path / "run" / "config.json").exists() else []
        outcome = command("train", *flags, *again)
        assert outcome.code == 0, outcome.err
        model = load_file(tmp_path / "run" / "checkpoints" / "lm.safetensors")
        expected = expected or model
        assert all(torch.equal(tensor, model[name]) for name, tensor in expected.items())
    assert write > 8, "fewer writes than files"


def test_disk_full_at_every_write_of_the_evaluation(
    finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    """Every file is the old or the new one, whole."""
    folder = finished.copy(tmp_path / "run")
    write = 0
    for write in range(1, 9):
        with pytest.MonkeyPatch.context() as now:
            disk_full_at(now, write)
            outcome = command("evaluate", folder, *STATIC)
        if outcome.code == 0:
            break
        assert_disk_full(outcome.error)
        no_temporaries(folder)
        _losses(folder / "losses.parquet")
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        changed = contents(folder).items() - contents(finished.folder).items()
        kept = "unfinished_evaluation_scores.safetensors"
        assert {name for name, _ in changed} <= {"losses.parquet", "evaluation.json", kept}
    assert write >= 4, "losses, JSON and Markdown are three writes"


def test_disk_full_in_stage_2(finished: Finished, command: Command, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "run")
    with pytest.MonkeyPatch.context() as now:
        disk_full_at(now, 5)  # after config, memory, metrics and the first judgement
        assert_disk_full(command(*META, folder).error)
    no_temporaries(folder)
    outcome = command(*META, folder, "--resume")
    assert outcome.code == 0, outcome.err
    for name in ("two_levels", "three_levels"):
        file = f"checkpoints/{name}.safetensors"
        a, b = load_file(folder / file), load_file(finished.folder / file)
        assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


# ---------------------------------------------------------------- overwrite, Ctrl-C


@pytest.mark.parametrize("case", ["corpus", "one article", "segment", "stages"])
def test_refused_overwrite_keeps_the_old_run(
    case: str, finished: Finished, command: Command, tmp_path: Path, contents: Contents
) -> None:
    folder = finished.copy(tmp_path / "run")
    poor = write_corpus(tmp_path / "poor", train=1)
    corpus = {"corpus": tmp_path / "none", "one article": poor}.get(case, finished.corpus)
    more = {
        "segment": ["--update-every", "7", "--dynamic", "x"],
        "stages": ["--stages", "lm", "draw"],
    }
    words = [*flags_for(corpus, folder), "--overwrite", *more.get(case, [])]
    assert command("train", *words).error
    assert contents(folder) == contents(finished.folder)


def test_ctrl_c_while_scoring(
    finished: Finished,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Contents,
) -> None:
    folder = finished.copy(tmp_path / "run")
    patch(monkeypatch, "mlm.reader.model.score_protocol", 2, KeyboardInterrupt())
    outcome = command("evaluate", folder, "--rules", "rms")
    assert outcome.code == 130
    assert "interrupted; everything saved so far is kept" in outcome.err
    kept = "unfinished_evaluation_scores.safetensors"
    found = contents(folder)
    assert found.pop(kept)
    assert found == contents(finished.folder)


def test_ctrl_c_in_a_step_waits_for_its_end(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """A real signal in the middle of a step: the step is finished, then saved."""
    changes = {"stages": ("lm",), "lm__epochs": 1.0, "lm__validations": 2}
    flags = flags_for(finished.corpus, tmp_path / "run", **changes)

    def press(nll: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return nll

    with pytest.MonkeyPatch.context() as now:
        patch(now, "mlm.training.language_model.token_nll", 7, press)
        assert command("train", *flags).code == 130
    _, about = load_tensors(tmp_path / "run" / "checkpoints" / "lm_last.safetensors", "")
    assert about["step"] == 7
    words = ("--out", tmp_path / "run", "--resume", "--learning-rate", 0.005)
    assert command("train", *words).code == 0
    # What the messages advise, a lower rate, is recorded like any setting.
    assert RunFolder(tmp_path / "run").load_config().lm.learning_rate == 0.005


# ---------------------------------------------------------------- real processes


def start(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In a group of its own, so that a signal reaches it alone.
        start_new_session=True,
    )


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(finished: Finished, tmp_path: Path) -> None:
    """SIGINT in the middle of stage 1: exit code 130, a checkpoint, and --resume ends it."""
    out = tmp_path / "run"
    flags = flags_for(finished.corpus, out, stages=("lm",), lm__epochs=8.0, lm__validations=8)
    process = start("train.py", *flags)
    metrics = out / "metrics.jsonl"
    for _ in range(600):
        if process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 100):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted; everything saved so far is kept. To go on: " in err.splitlines()[-1]
    _, about = load_tensors(out / "checkpoints" / "lm_last.safetensors", "")
    assert 0 < about["step"] < about["steps"]
    process = start("train.py", "--out", out, "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    _, about = load_tensors(out / "checkpoints" / "lm_last.safetensors", "")
    assert about["step"] == about["steps"]
    steps = [json.loads(row)["step"] for row in metrics.read_text(encoding="utf-8").splitlines()]
    assert steps == sorted(set(steps))
    assert len(steps) == 8


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(  # tests/kernels/test_processor.py has another message of this script
            ("train.py", "--corpus", "/nowhere/at/all"),
            1,
            "error: no corpus",
            marks=pytest.mark.slow,
        ),
        (("evaluate.py", "/nowhere/at/all"), 1, "error: /nowhere/at/all is no run folder"),
    ],
)
def test_messages_of_real_processes(
    words: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "run") if words[0] == "train.py" else ()
    process = start(*words, *out)
    text, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert message in err
    assert "Traceback" not in err
    assert text == ""
    assert not (tmp_path / "run").exists()


def test_terminal_without_the_minus_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is written already must not end in a traceback for want of a character."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_cli(lambda: print("−0.5", flush=True))
    assert terminal.buffer.getvalue() == b"?0.5\n"  # type: ignore[attr-defined]


def test_config_survives_json(finished: Finished) -> None:
    """What is written is what is read: the base of every message about config.json above."""
    loaded: Config = RunFolder(finished.folder).load_config()
    chosen = with_values(finished.config, {"meta.gradient": loaded.meta.gradient})  # was auto
    assert dataclasses.asdict(loaded) == dataclasses.asdict(chosen)
