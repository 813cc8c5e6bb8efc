"""The audit passes what is sound, and catches what is made to break each promise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from tiny import corpus_text, invented_words
from torch import Tensor

import mlm
from mlm.cli.audit import format_check, format_verdict
from mlm.models.extension import Extension, Told
from mlm.models.language_model import Weights
from mlm.reader import TrainedModel
from mlm.reader import audit as module
from mlm.reader.audit import (
    GRAM,
    Check,
    Document,
    audit,
    check_blind,
    check_causal,
    check_chunks,
    check_counts,
    check_lanes,
    check_sums,
    check_training_text,
    cut,
    overlaps,
)
from mlm.reader.reader import DocumentReader
from mlm.reading.cache import Cache, CacheSetting
from mlm.reading.lanes import AdaptingLanes, Predicted
from mlm.runs.rules import Ready, ready_rule
from mlm.text.streams import Segment

RULE = "two_levels"
PLAIN = """The dofe of the gila is closed , says Mr. Ku of Ba no. 5 .

It is No. 3 etc. of the gila , and the dofe is no. longer open ; Dr. La knows 1,000 of them .
Fig. 2 shows the dofe , fig. Two does not .  The gila of Ku is well-known , and the dofe of Ku
is the dofe of the gila , as Mr. Ku says .
"""


@pytest.fixture
def model(finished: Any) -> TrainedModel:
    """The tiny run, opened anew: tests break it."""
    return mlm.load(finished.folder)


@pytest.fixture
def document(finished: Any) -> Document:
    """The first test article."""
    text = (finished.corpus / "test.txt").read_text(encoding="utf-8")
    return Document("test", text[:900], "wikitext")


Patched = Callable[[Callable[[Ready], Ready]], None]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Patched:
    """`patched(change)`: `change` is made to whatever rule a model is asked for."""

    def patch(change: Callable[[Ready], Ready]) -> None:
        monkeypatch.setattr(
            "mlm.reader.model.ready_rule", lambda *words: change(ready_rule(*words))
        )

    return patch


def verdicts(checks: Sequence[Check]) -> dict[str, bool | None]:
    """By the check's name."""
    return {check.name: check.passed for check in checks}


# ---------------------------------------------------------------- what is sound passes


def test_a_sound_model_passes_every_check(model: TrainedModel, document: Document) -> None:
    training = ["some other text of the gila " * 20]
    checks = list(audit(model, [document], [RULE], training=lambda: training, words=120))
    assert len(checks) == 1 + 2 + 2 * 4 + 1
    assert {check.passed for check in checks} == {True}, [format_check(c) for c in checks]
    assert format_verdict(checks) == f"{len(checks)} passed, 0 failed, 0 not checked"


@pytest.mark.parametrize("form", ["plain", "wrapped", "markdown"])
def test_text_as_people_write_it_passes(model: TrainedModel, form: Any) -> None:
    """Also where the spelling of a word depends on the next one: `no. 5`, `etc. of`."""
    document = Document("letter", PLAIN, form)
    assert check_counts(model, [document]).passed
    for seed in range(3):
        assert check_causal(model, "static", "article", document, seed).passed
    assert check_chunks(model, "static", "stream", document).passed


def test_a_cache_and_extensions_pass(
    model: TrainedModel, document: Document, patched: Patched
) -> None:
    patched(lambda r: r._replace(cache=(CacheSetting(0.3, 0.2, 40),)))
    assert all(check.passed for check in check_sums(model, RULE, "article", [document]))
    assert check_causal(model, RULE, "article", document).passed
    assert check_blind(model, RULE, document).passed


# ---------------------------------------------------------------- what leaks is caught


@dataclass(frozen=True)
class Peek(Extension):
    """Tells the output layer which token comes, or which comes after that."""

    ahead: int = 0
    name: ClassVar[str] = "peek"

    def before(
        self, weights: Weights, value: Any, segment: Segment, hidden_BTE: Tensor, told: Told
    ) -> Told:
        seen = segment.targets.roll(-self.ahead, dims=1)
        return told.with_added(0.2 * weights["embedding"][seen].reshape(hidden_BTE.shape))


def peeking(ahead: int) -> Callable[[Ready], Ready]:
    """Adds a `Peek`."""

    def change(ready: Ready) -> Ready:
        extensions = (*ready.base.extensions, Peek(ahead))
        return ready._replace(base=dataclasses.replace(ready.base, extensions=extensions))

    return change


def test_a_glance_at_the_next_word_is_caught(
    model: TrainedModel, document: Document, patched: Patched
) -> None:
    """No loss before the change moves; the prediction of the changed word itself does."""
    patched(peeking(0))
    assert check_causal(model, RULE, "article", document).passed is False
    assert check_blind(model, RULE, document).passed is False


def test_a_glance_at_the_word_after_is_caught(
    model: TrainedModel, document: Document, patched: Patched
) -> None:
    patched(peeking(1))
    found = check_causal(model, RULE, "article", document)
    assert found.passed is False
    assert "bits" in found.worst


def test_a_loss_that_knows_how_the_text_goes_on_is_caught(
    model: TrainedModel, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predictions stay as they were."""
    original = DocumentReader.score

    def leaky(self: DocumentReader, text: str) -> Any:
        table = original(self, text)
        place = table.schema.get_field_index("surprisal")
        moved = table["surprisal"].to_numpy() + 1e-12 * (sum(map(ord, text[-9:])) + len(text))
        return table.set_column(place, "surprisal", pa.array(moved))

    monkeypatch.setattr(DocumentReader, "score", leaky)
    assert check_causal(model, RULE, "article", document).passed is False


def test_learning_before_scoring_is_caught(
    model: TrainedModel, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AdaptingLanes.read

    def leaky(self: AdaptingLanes, segment: Segment, full: bool = False) -> Predicted:
        before = self.copy()
        original(self, segment, full)
        state = before.reader.state
        self.begin(self.reader._replace(state=state))
        return original(self, segment._replace(new=segment.new & False), full)

    monkeypatch.setattr(AdaptingLanes, "read", leaky)
    assert check_causal(model, RULE, "article", document).passed is False


def test_a_cache_that_does_not_sum_to_one_is_caught(
    model: TrainedModel, document: Document, patched: Patched, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(lambda r: r._replace(cache=(CacheSetting(0.3, 0.2, 40),)))
    original = Cache.spread
    monkeypatch.setattr(
        Cache, "spread", lambda self, *words: [p + 1e-3 for p in original(self, *words)]
    )
    sums, losses = check_sums(model, RULE, "article", [document])
    assert sums.passed is False
    assert losses.passed is False


def test_a_cache_that_flatters_the_loss_is_caught(
    model: TrainedModel, document: Document, patched: Patched, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(lambda r: r._replace(cache=(CacheSetting(0.3, 0.2, 40),)))
    original = Cache.mix
    monkeypatch.setattr(
        Cache, "mix", lambda self, *words: [nll * 0.999 for nll in original(self, *words)]
    )
    sums, losses = check_sums(model, RULE, "article", [document])
    assert sums.passed
    assert losses.passed is False


def test_lanes_that_know_each_other_are_caught(
    model: TrainedModel, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainedModel.score_many

    def shared(self: TrainedModel, texts: Sequence[str], **named: Any) -> Any:
        table = original(self, texts, **named)
        place = table.schema.get_field_index("surprisal_plain")
        moved = table["surprisal_plain"].to_numpy() * (1 + 1e-4 * (named["lanes"] != 1))
        return table.set_column(place, "surprisal_plain", pa.array(moved))

    assert check_lanes(model, RULE, [document]).passed
    monkeypatch.setattr(TrainedModel, "score_many", shared)
    assert check_lanes(model, RULE, [document]).passed is False


def test_chunks_that_matter_are_caught(
    model: TrainedModel, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DocumentReader.read
    monkeypatch.setattr(DocumentReader, "read", lambda self, c: original(self, c.lstrip(" ")))
    assert check_chunks(model, RULE, "article", document).passed is False


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("what", "break_it"),
    [
        ("is no row", lambda t: pa.concat_tables([t.slice(0, 3), t.slice(4)])),
        ("does not stand", lambda t: pa.concat_tables([t.slice(0, 3), t.slice(2)])),
        (
            "line ends, but",
            lambda t: t.filter(pa.array([bool(w.strip()) for w in t["word"].to_pylist()])),
        ),
    ],
)
def test_words_that_are_not_counted_are_found(
    what: str, break_it: Callable[[Any], Any], model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DocumentReader.score
    monkeypatch.setattr(DocumentReader, "score", lambda self, text: break_it(original(self, text)))
    found = check_counts(model, [Document("letter", PLAIN, "plain")])
    assert found.passed is False
    assert what in found.worst


def test_words_are_those_that_white_space_separates(model: TrainedModel) -> None:
    odd = "\n\n a\u00a0b\u2003c\r\n\r\nd\te \u2028f\x0cg"
    for form in ("plain", "wikitext"):
        assert check_counts(model, [Document("odd", odd, form)]).passed, form


# ---------------------------------------------------------------- the training text


def test_overlap_is_that_of_sets_of_tuples() -> None:
    rng = np.random.default_rng(0)
    types = invented_words(30, rng)
    documents = [[str(rng.choice(types)) for _ in range(n)] for n in (200, 80, GRAM, 5, 0)]
    new = [f"new{k}" for k in range(40)]
    training = [documents[0][20:90] + new, new + documents[1], documents[2][1:], [*new, *types]]
    grams = {tuple(t[k : k + GRAM]) for t in training for k in range(len(t) - GRAM + 1)}
    expected = []
    for words in documents:
        own = [tuple(words[k : k + GRAM]) for k in range(len(words) - GRAM + 1)]
        expected.append(float(np.mean([gram in grams for gram in own])) if own else 0.0)
    assert overlaps(documents, training) == pytest.approx(expected)
    assert expected[1] == 1.0
    assert 0 < expected[0] < 1


def test_a_copy_in_the_training_text_is_found(document: Document) -> None:
    other = Document("other", corpus_text(1, 77), "wikitext")
    clean = corpus_text(3, 78)
    assert check_training_text([other, document], lambda: [clean]).passed
    found = check_training_text([other, document], lambda: [clean, clean + document.text.upper()])
    assert found.passed is False
    assert found.worst == "100.0 % of test"


def test_a_training_text_that_is_not_here_is_no_pass(document: Document) -> None:
    found = check_training_text([document], None)
    assert found.passed is None
    assert format_check(found).startswith("not checked")
    assert "not available" in format_check(found)


def test_cutting_keeps_whole_words(document: Document) -> None:
    documents = [document, document, document]
    words = len(document.text.split())
    found = cut(documents, words + 7)
    assert [len(d.text.split()) for d in found] == [words, 7]
    assert document.text.startswith(found[1].text)


# ---------------------------------------------------------------- the commands


def test_the_command_prints_every_check(command: Any, finished: Any) -> None:
    flags = ("--rules", "static", "--protocols", "article", "--audit-words", "150")
    outcome = command("mlm.cli.audit", finished.folder, *flags)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "0 failed, 0 not checked" in outcome.out
    assert "pass         causal: static, article; worst: no difference" in outcome.out


def test_an_unknown_rule_is_refused_before_the_model_is_loaded(command: Any) -> None:
    error = command("mlm.cli.audit", "no/such/model", "--rules", "static", "../rms").error
    assert "no rule '../rms'; choose from best, static, " in error


def test_evaluate_audits_with_its_rules_and_split(
    command: Any, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("mlm.cli.audit.audit_model", asked.append)
    words = ("--split", "test", "--rules", "rms", "--protocols", "stream", "--audit")
    assert command("evaluate", finished.folder, *words).code == 0
    (options,) = asked
    assert options.split == "test"
    assert options.rules == ("static", "rms")
    assert options.protocols == ("stream",)
    assert options.model == str(finished.folder)


def test_a_broken_promise_has_exit_code_1(
    command: Any, finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of one's own that holds a training article."""
    text = (finished.corpus / "train.txt").read_text(encoding="utf-8")
    copied = tmp_path / "mine.txt"
    copied.write_text(text[: text.index("\n = ", 100) + 1], encoding="utf-8")
    flags = ("--rules", "static", "--protocols", "article", "--audit-words", "100")
    outcome = command("mlm.cli.audit", finished.folder, "--corpus", copied, *flags)
    assert outcome.code == 1
    assert "FAIL         not in the training text; worst: 100.0 %" in outcome.out
    assert "1 failed" in outcome.out


def test_a_model_without_its_text_is_audited_with_another(
    command: Any, finished: Any, tmp_path: Path
) -> None:
    folder = finished.copy(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config).replace(str(finished.corpus), str(tmp_path / "gone"))
    (folder / "config.json").write_text(text, encoding="utf-8")
    flags = ("--rules", "static", "--protocols", "article", "--audit-words", "100")
    error = command("mlm.cli.audit", folder, *flags).error
    assert "no corpus" in error
    assert "--corpus" in error
    (tmp_path / "letter.txt").write_text(PLAIN, encoding="utf-8")
    outcome = command("mlm.cli.audit", folder, "--corpus", tmp_path / "letter.txt", *flags)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "1 not checked" in outcome.out


def test_the_share_that_fails_is_stated(document: Document) -> None:
    found = check_training_text([document], lambda: ["nothing"])
    assert f"{100 * module.SHARED:.0f} %" in found.about


def test_a_single_file_is_audited_by_its_split(
    command: Any, finished: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not with its training articles, which the model has seen."""
    folder = finished.copy(tmp_path / "run")
    whole = tmp_path / "whole.txt"
    whole.write_text(corpus_text(12, 5), encoding="utf-8")
    text = (folder / "config.json").read_text(encoding="utf-8")
    text = text.replace(json.dumps(str(finished.corpus)), json.dumps(str(whole)))
    (folder / "config.json").write_text(text, encoding="utf-8")
    flags = ("--rules", "static", "--protocols", "article", "--audit-words", "60")
    outcome = command("mlm.cli.audit", folder, "--split", "test", *flags)
    assert outcome.code == 0, outcome.out + outcome.err
    assert f"1 document(s) of {whole}" in outcome.out


def test_a_released_model_has_no_training_text(command: Any, finished: Any, tmp_path: Path) -> None:
    """Whatever lies here under the name of its corpus."""
    assert command("mlm.cli.export", finished.folder, tmp_path / "model").code == 0
    (tmp_path / "letter.txt").write_text(PLAIN, encoding="utf-8")
    flags = ("--rules", "static", "--protocols", "article", "--audit-words", "60")
    assert "name one with --corpus" in command("mlm.cli.audit", tmp_path / "model", *flags).error
    text = ("--corpus", tmp_path / "letter.txt")
    outcome = command("mlm.cli.audit", tmp_path / "model", *text, *flags)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "training text: not available" in outcome.out
    assert "1 not checked" in outcome.out
