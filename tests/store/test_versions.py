"""Files of another version: refused in one message that says what differs and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Finished

from mlm.base.errors import UserError
from mlm.extensions import Extensions, NGramEmbeddings, ngram_embeddings, ngram_memory
from mlm.models import output_layer, recurrent
from mlm.models.extension import numbers_of
from mlm.rules import gates
from mlm.store.released import BLANK
from mlm.store.streaming import write_signed
from mlm.store.tensors import CHECKSUM, load_about, load_tensors, save_tensors
from mlm.store.versions import FORMAT, OF_MODELS, OF_RULES, SPEED, constants

SOME = {"embedding": torch.zeros(2)}
Contents = Callable[[Path], dict[str, bytes]]


def with_other_about(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let a file of tensors say something else about itself, with a checksum that holds."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mlm"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(about)
    about[CHECKSUM] = BLANK
    write_signed(path, tensors, about)


OTHER: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a later format": (
        lambda about: about.update(format=FORMAT + 1),
        f"format {FORMAT + 1}, now {FORMAT}",
    ),
    "no format": (
        lambda about: about.pop("format"),
        f"format of an earlier version, now {FORMAT}",
    ),
    "another constant": (
        lambda about: about["constants"].update({"ngram_memory.ALIKE": 0.5}),
        f"ngram_memory.ALIKE was 0.5, now {ngram_memory.ALIKE}",
    ),
    "a constant that is gone": (
        lambda about: about["constants"].update({"rules.gates.OLD": 3}),
        "rules.gates.OLD was 3, now None",
    ),
    "a constant that is new": (
        lambda about: about["constants"].pop("rules.gates.P_LOG"),
        f"rules.gates.P_LOG was None, now {gates.P_LOG}",
    ),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.parametrize("load", [load_about, load_tensors])
def test_a_file_of_another_version_is_refused(
    case: str, load: Callable[[Path, str], object], tmp_path: Path
) -> None:
    change, said = OTHER[case]
    path = tmp_path / "rule.safetensors"
    save_tensors(path, SOME, {"identity": "mine"})
    load(path, "")
    with_other_about(path, change)
    with pytest.raises(UserError) as refused:
        load(path, "")
    assert str(refused.value) == (
        f"{path} was written by another version of mlm ({said}); run its stage again"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("memory", ("evaluate",)),
        ("three_levels", ("evaluate",)),
        ("lm", ("train", "--stages", "meta", "--out")),
        ("lm_last", ("train", "--resume", "--out")),
    ],
)
def test_every_checkpoint_of_a_run_is_checked(
    name: str,
    words: tuple[str, ...],
    finished: Finished,
    command: Command,
    tmp_path: Path,
    contents: Contents,
) -> None:
    """By the commands that go on from it, which change nothing."""
    folder = finished.copy(tmp_path / "run")
    path = folder / "checkpoints" / f"{name}.safetensors"
    with_other_about(path, lambda about: about["constants"].update({"models.recurrent.A": 1}))
    before = contents(folder)
    error = command(*words, folder).error
    assert str(path) in error
    assert "(models.recurrent.A was 1, now None); run its stage again" in error
    assert contents(folder) == before


def test_the_base_of_another_version_is_made_again(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """As the message says: the stage that makes it does not go on from the old one."""
    folder = finished.copy(tmp_path / "run")
    path = folder / "checkpoints" / "memory.safetensors"
    with_other_about(path, lambda about: about.update(format=FORMAT - 1))
    words = ("--out", folder, "--stages", "meta", "--meta-steps", 0)
    assert command("train", *words, "--train-rules", "two_levels").code == 0
    again, _ = load_tensors(path, "")
    for tensor, old in zip(
        again.values(),
        load_tensors(finished.folder / "checkpoints" / path.name, "")[0].values(),
        strict=True,
    ):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize("format_", [None, FORMAT - 1, FORMAT + 1, "new"])
@pytest.mark.parametrize("words", [("evaluate",), ("train", "--resume", "--out")])
def test_a_run_folder_of_another_version_is_refused(
    format_: object,
    words: tuple[str, ...],
    finished: Finished,
    command: Command,
    tmp_path: Path,
    contents: Contents,
) -> None:
    folder = finished.copy(tmp_path / "run")
    file = folder / "config.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    del record["format"]
    record |= {} if format_ is None else {"format": format_}
    file.write_text(json.dumps(record), encoding="utf-8")
    before = contents(folder)
    written = "of an earlier version" if format_ is None else format_
    assert command(*words, folder).error == (
        f"error: {folder} was made by another version of mlm (format {written}, now {FORMAT}); "
        "train again with another --out"
    )
    assert contents(folder) == before


def _prefixes(found: Mapping[str, Any]) -> set[str]:
    return {name.rpartition(".")[0] for name in found}


def test_a_language_model_depends_on_its_own_constants_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not on those of rules and extensions, unless it has an extension's weights."""
    assert _prefixes(constants(True, SOME)) == {"models.recurrent"}
    more = SOME | {NGramEmbeddings().key("rows"): torch.zeros(2)}
    assert _prefixes(constants(True, more)) == {"models.recurrent", NGramEmbeddings.name}
    files = tmp_path / "plain", tmp_path / "ngrams", tmp_path / "rule"
    save_tensors(files[0], SOME, {}, of_model=True)
    save_tensors(files[1], more, {}, of_model=True)
    save_tensors(files[2], SOME, {})
    for module, name, refused in (
        (gates, "P_LOG", files[2:]),
        (ngram_memory, "ALIKE", files[2:]),
        (output_layer, "MOST_TAUGHT", files[2:]),
        (ngram_embeddings, "STEP", files[1:]),
        (recurrent, "EMBEDDING_BOUND", files),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 77.0)
            for file in files:
                if file not in refused:
                    load_tensors(file, "")
                    continue
                with pytest.raises(UserError, match=rf"\.?{name} was .*, now 77.0"):
                    load_tensors(file, "")


def test_every_number_of_extensions_and_rules_is_written() -> None:
    assert numbers_of(ngram_memory)["STEPS"] == ngram_memory.STEPS
    everything = constants(False, ())
    own = {e.name: e.constants() for e in Extensions()}
    own |= {m.__name__.removeprefix("mlm."): numbers_of(m) for m in (*OF_MODELS, *OF_RULES)}
    expected = {f"{part}.{name}" for part, values in own.items() for name in values}
    assert {name for name in expected if name.rpartition(".")[2] not in SPEED} == set(everything)
    assert "ngram_memory.STEPS" in everything
    assert not any(name.endswith("FORMAT") for name in everything)
