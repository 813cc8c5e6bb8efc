"""Export: a released model reads as its run does, from less space, and is only read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, Finished
from safetensors.torch import load_file
from tiny import tiny_config, write_corpus

import mlm
from mlm.base.errors import UserError
from mlm.base.names import PROTOCOLS
from mlm.cli.flags import settings_of
from mlm.reader.export import export
from mlm.reading.scoring import score_protocol, word_losses
from mlm.runs.base import made_from
from mlm.runs.identity import base_identity, identity
from mlm.runs.rules import current_identity, ready_rule, ready_rules
from mlm.runs.run import Run, open_run
from mlm.settings.flags import replaced
from mlm.settings.presets import RULE_SETTINGS
from mlm.stages.order import run_stages
from mlm.store import released
from mlm.store.card import Card
from mlm.store.run_folder import RunFolder
from mlm.text.corpora import open_corpus

Contents = Callable[[Path], dict[str, bytes]]
RULES = ("static", "rms", "four_levels", "four_levels+cache")
SMALL: dict[str, Any] = {
    "stages": ("lm", "meta", "evaluate"),
    "lm.epochs": 2.0,
    "lm.validations": 1,
    "adapt.update_every": 20,
    "adapt.precision": "float32",
    "adapt.fisher_words": 300,
    "meta.lanes": 3,
    "meta.steps": 1,
    "meta.unroll": 4,
    "evaluation.rules": RULES,
    "evaluation.protocols": ("article",),
    "evaluation.budget": 1,
    "evaluation.tune_words": 100,
    "evaluation.max_articles": 2,
    "extensions.word_coupling.directions": 8,
    "extensions.learned_basis.words": 1000,
    "extensions.ngram_memory.tokens": 500,
    "extensions.ngram_read_out.words": 500,
}
CARD = Card("Toy: a model", "Invented words.", "cc-by-sa-4.0", "en")


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run with every extension of --rule best."""
    home = tmp_path_factory.mktemp("best")
    config = tiny_config(write_corpus(home / "toy"), home / "run")
    run_stages(replaced(config, {**RULE_SETTINGS["best"], **SMALL}), quiet=True)
    return home / "run"


@pytest.fixture(scope="module")
def model(best: Path) -> Path:
    """That run, exported."""
    return export(best, best.parent / "model", card=CARD)


def opened(folder: Path) -> Run:
    config = replaced(
        RunFolder(folder).load_config(),
        {"out": folder, "stages": ("evaluate",), "device": "cpu"},
    )
    return open_run(config, quiet=True)


def losses(folder: Path, rule: str) -> np.ndarray:
    """Of the words of two articles of the test split."""
    run = opened(folder)
    ready, words = ready_rule(run, rule, "article"), run.vocabulary
    toy = open_corpus(str(folder.parent / "toy"))
    texts = [words.encode_article(a.text).astype("int64") for a in toy.articles("test")][:2]
    scores = score_protocol(
        ready.base, ready.bound, texts, words.eos_id, "article", 2, cache=ready.cache
    )
    scores = scores.cached[0] if ready.cache else scores
    parts = [word_losses(n, t, words.starts_word) for n, t in zip(scores.nll, texts, strict=True)]
    return np.concatenate(parts)


@pytest.mark.parametrize("rule", RULES)
def test_a_released_model_reads_as_its_run(rule: str, best: Path, model: Path) -> None:
    """Within float16's rounding, and twice the same. Without the text it was trained on."""
    before, after = losses(best, rule), losses(model, rule)
    assert abs(before.mean() - after.mean()) < 2e-3
    np.testing.assert_allclose(after, before, atol=5e-2)
    assert np.array_equal(after, losses(model, rule))


def test_the_models_of_the_package_read_without_their_text() -> None:
    """Under every rule that they name, and so that their results have an identity."""
    for name in released.released_models():
        loaded = mlm.load(name)
        for protocol in PROTOCOLS:
            for rule in loaded.rules_in(protocol):
                assert loaded.ready(rule, protocol).base
        run = opened(loaded.folder)
        assert identity(run)
        assert current_identity(run, "rms", "article")


def test_every_part_of_best_is_in_the_model(best: Path, model: Path) -> None:
    """As the run has it: all extensions, their weights, and what follows from them."""
    mine, its = opened(best), opened(model)
    names = [extension.name for extension in mine.base.extensions]
    assert {"word_coupling", "boundaries", "intra_segment", "ngram_memory"} <= set(names)
    assert [extension.name for extension in its.base.extensions] == names
    for rule in ("static", "four_levels"):
        before, after = (ready_rule(run, rule, "article").base.weights for run in (mine, its))
        assert set(before) == set(after)
        assert rule == "static" or any(name.startswith("ngram_read_out/") for name in after)
        for name, weight in before.items():
            assert after[name].dtype == weight.dtype
            error = (after[name] - weight).double().norm() / weight.double().norm().clamp(min=1e-9)
            assert float(error) < 5e-3, name
    assert made_from(RunFolder(model).checkpoint("memory"), base_identity(mine))
    assert ready_rules(its, "article") == ready_rules(mine, "article") == list(RULES)


def test_a_released_model_holds_no_more_than_reading_needs(best: Path, model: Path) -> None:
    files = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()}
    kept = {"config.json", "README.md", "tuning.json", "vocabulary/vocabulary.json"}
    assert files == kept | {f"checkpoints/{n}.safetensors" for n in ("memory", "four_levels")}
    tensors = load_file(model / "checkpoints" / "memory.safetensors")
    assert not [name for name in tensors if name.endswith("softmax.low") and "theta_0" in name]
    size = (model / "checkpoints" / "memory.safetensors").stat().st_size
    assert size < 0.5 * (best / "checkpoints" / "memory.safetensors").stat().st_size


def test_no_path_of_this_machine_is_told(best: Path, model: Path) -> None:
    for file in model.rglob("*"):
        if file.is_file():
            assert str(best.parent).encode() not in file.read_bytes(), file
    config = RunFolder(model).load_config()
    assert config.corpus == "toy"
    assert config.out == model
    usual = {s.path: s.value for s in settings_of(type(config)())}
    for path in ("text.data_dir", "lm.init", "lm.through_run", "threads", "device"):
        assert {s.path: s.value for s in settings_of(config)}[path] == usual[path]


def test_the_command_is_told_without_paths(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path / "run")
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    record["command"] = "train.py --corpus=/home/me/texts/wiki --out ../runs/a --seed 3"
    record["history"] = [{"command": "train.py --out /home/me/runs/a --resume", "dirty": False}]
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    made = export(folder, tmp_path / "model", ["static"])
    again = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert again["command"] == "train.py --corpus=wiki --out a --seed 3"
    assert again["history"] == [{"command": "train.py --out a --resume", "dirty": False}]
    assert again["commit"] == record["commit"]
    assert again["versions"] == record["versions"]


def test_the_card_says_what_was_measured(best: Path, model: Path, finished: Finished) -> None:
    text = (model / "README.md").read_text(encoding="utf-8")
    head = text.split("---\n")[1]
    assert 'license: "cc-by-sa-4.0"\nlanguage: "en"\n' in head
    assert "# Toy: a model\n" in text
    assert "Invented words." in text
    rows = json.loads((best / "evaluation.json").read_text(encoding="utf-8"))
    totals = [row for row in rows if row["kind"] == "total"]
    assert len(totals) == len(RULES)
    for row in totals:
        assert f"| {row['word_perplexity']:.2f} |" in text


def test_a_card_reads_as_the_hub_reads_it(model: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard.load(model / "README.md").data.to_dict()
    assert (data["license"], data["language"], data["library_name"]) == (
        "cc-by-sa-4.0",
        "en",
        "mlm",
    )
    assert "lstm" in data["tags"]


def test_only_the_rules_that_are_named(best: Path, tmp_path: Path) -> None:
    made = export(best, tmp_path / "model", ["four_levels"])
    assert ready_rules(opened(made), "article") == ["static", "four_levels"]
    assert RunFolder(made).load_config().evaluation.rules == ("static", "four_levels")
    assert json.loads((made / "tuning.json").read_text(encoding="utf-8")) == {}


# ---------------------------------------------------------------- refusals


def test_export_refuses_a_folder_that_is_not_empty(
    best: Path, command: Command, tmp_path: Path, contents: Contents
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    for target in ("there", "there/mine.txt"):
        error = command("mlm.cli.export", best, tmp_path / target).error
        assert "is there already and not empty; choose another folder" in error
    assert contents(tmp_path) == before


def test_export_refuses_a_run_without_stage_2(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    (folder / "checkpoints" / "memory.safetensors").unlink()
    error = command("mlm.cli.export", folder, tmp_path / "model").error
    assert "stage 2 is not done; run `--stages meta` first" in error
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_export_refuses_a_rule_that_is_not_ready(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    words = ("--rules", "static", "adam", "four_levels")
    error = command("mlm.cli.export", finished.folder, tmp_path / "model", *words).error
    assert "--rules: adam, four_levels is neither trained nor tuned" in error
    assert "choose from static, sgd, rms, two_levels, three_levels" in error
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_base_of_other_settings(finished: Finished, tmp_path: Path) -> None:
    folder = RunFolder(finished.copy(tmp_path / "run"))
    folder.save_config(replaced(finished.config, {"adapt.fisher_words": 77}))
    with pytest.raises(UserError, match="made with other settings"):
        export(folder.path, tmp_path / "model")


def test_what_is_interrupted_leaves_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlm.reader.export.sign_files", stop)
    with pytest.raises(KeyboardInterrupt):
        export(finished.folder, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damage


def test_a_damaged_byte_in_any_file_gives_one_message(model: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file())
    rng = np.random.default_rng(0)
    for name in names:
        size = (model / name).stat().st_size
        for place in (0, size - 1, *rng.integers(0, size, size=60 if "config" in name else 2)):
            copy = tmp_path / "model"
            shutil.copytree(model, copy)
            body = bytearray((copy / name).read_bytes())
            body[place] ^= 1
            (copy / name).write_bytes(bytes(body))
            with pytest.raises(UserError) as refused:
                RunFolder(copy).load_config()
            error = str(refused.value)
            assert str(copy / name) in error or name == "config.json", (place, error)
            assert re.search("is not as it was released|is damaged|another version", error), error
            shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["README.md", "tuning.json", "checkpoints/memory.safetensors"])
def test_a_missing_file_gives_one_message(name: str, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is not as it was released: damaged, missing"):
        RunFolder(copy).load_config()


@pytest.mark.parametrize(
    "name", ["checkpoints/adaptive.safetensors", "vocabulary/vocabulary.model"]
)
def test_a_file_that_was_not_released_is_not_read(name: str, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=f"{name} is not as it was released"):
        RunFolder(copy).load_config()


def signed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let a released model say something else, with the right checksum, as an attacker would."""
    path = folder / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    own, record[released.RELEASE]["checksum"] = "", released.BLANK
    text = json.dumps(record, indent=1) + "\n"
    own = released._digest(text.encode())
    path.write_text(text.replace(released.BLANK, own, 1), encoding="utf-8")


def test_what_an_untrusted_folder_says_of_paths_is_ignored(
    model: Path, tmp_path: Path, command: Command, contents: Contents, monkeypatch: Any
) -> None:
    """Nothing is read from there, and nothing written: neither there nor into the folder."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(model, tmp_path / "model")
    away = tmp_path / "away"

    def change(record: dict[str, Any]) -> None:
        record["config"] |= {"corpus": str(away / "toy"), "out": str(away)}
        record["config"]["text"]["data_dir"] = str(away)
        record["config"]["lm"]["init"] = str(away)

    signed(copy, change)
    before = contents(copy)
    toy = write_corpus(tmp_path / "else", train=1, valid=1, test=1)
    words = ("--corpus", toy, "--rules", "static", "--protocols", "article", "--no-draw")
    outcome = command("evaluate", "model", *words)
    assert outcome.code == 0, outcome.err
    assert not away.exists()
    assert contents(copy) == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "else", "runs", "data"}


@pytest.mark.parametrize("name", ["../secret.txt", "checkpoints/../../secret.txt", "/etc/passwd"])
def test_no_file_outside_the_folder_is_read(name: str, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    digest = released._digest(b"secret")
    signed(copy, lambda record: record[released.RELEASE]["files"].update({name: digest}))
    with pytest.raises(UserError, match="is not as it was released"):
        RunFolder(copy).load_config()


# ---------------------------------------------------------------- commands


@pytest.mark.slow
def test_evaluate_and_show_leave_a_released_model_as_it_is(
    model: Path, tmp_path: Path, command: Command, contents: Contents, monkeypatch: Any
) -> None:
    """Results go to runs/NAME, with the rules and protocols that are ready, and can be drawn."""
    monkeypatch.chdir(tmp_path)
    before = contents(model)
    toy = write_corpus(tmp_path / "else", train=1, valid=2, test=1)
    outcome = command("evaluate", model, "--corpus", toy, "--no-draw")
    assert outcome.code == 0, outcome.err
    (results,) = Path("runs/model").glob("on-else-*")
    rows = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))
    found = {(r["rule"], r["protocol"]) for r in rows if r["kind"] == "total"}
    assert found == {(rule, "article") for rule in RULES}
    assert command("visualize", results).code == 0
    assert (results / "words.html").exists()
    assert "losses.parquet not found" in command("visualize", model).error
    assert contents(model) == before


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no text": ((), "the text toy that it was trained with is not a part of it; name a text"),
    "not tuned": (
        ("--corpus", "else", "--rules", "adam"),
        "adam in protocol article has no settings in",
    ),
    "not tuned in a protocol": (
        ("--corpus", "else", "--rules", "rms", "--protocols", "stream"),
        "rms in protocol stream has no settings in",
    ),
    "other settings of tuning": (
        ("--corpus", "else", "--rules", "rms", "--budget", "7"),
        "the text that the model was trained with. Rules that are ready: static, four_levels",
    ),
    "not trained": (
        ("--corpus", "else", "--rules", "lstm"),
        "Rules that are ready: static, rms, four_levels, four_levels+cache",
    ),
    "into the model": (("--corpus", "else", "--out", "model/here"), "within that model"),
    "into a run": (("--corpus", "else", "--out", "run"), "a run folder of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_released_model_cannot_do_is_said(
    case: str, best: Path, model: Path, tmp_path: Path, command: Command, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    (tmp_path / "run").mkdir()
    shutil.copy(best / "config.json", "run")
    write_corpus(tmp_path / "else", train=1, valid=1, test=1)
    words, message = REFUSED[case]
    fast = ("--protocols", "article") if "--protocols" not in words else ()
    error = command("evaluate", "model", *words, *fast, "--no-draw").error
    assert message in error
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.*"))


@pytest.mark.parametrize("more", [("--stages", "meta"), ("--overwrite",), ("--resume",)])
def test_train_leaves_a_released_model_as_it_is(
    more: tuple[str, ...], model: Path, command: Command, contents: Contents
) -> None:
    before = contents(model)
    error = command("train", "--out", model, *more).error
    assert "holds a released model, which is only read" in error
    assert contents(model) == before


def test_a_released_model_of_another_version_is_refused(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    signed(copy, lambda record: record.update(format=1))
    with pytest.raises(UserError, match="install that version"):
        RunFolder(copy).load_config()


def test_a_released_model_is_exported_as_it_is(
    model: Path, tmp_path: Path, contents: Contents
) -> None:
    (tmp_path / "again").mkdir()
    assert contents(export(model, tmp_path / "again")) == contents(model)
    with pytest.raises(UserError, match="is a released model; export the run"):
        export(model, tmp_path / "less", ["static"])
