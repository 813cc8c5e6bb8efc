"""Reading documents: chunks, copies, memories, what comes next."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlm.base.errors import UserError
from mlm.kernels import buffers, switches, use
from mlm.reader import TrainedModel
from mlm.reader import model as reader_model
from mlm.reader.reader import spell
from mlm.reader.tracks import Track
from mlm.reading.needs import reading_bytes
from mlm.reading.scoring import score_protocol
from mlm.runs.machine import SHARE
from mlm.runs.rules import ready_rule
from mlm.spelling import Word
from mlm.store.tensors import load_tensors, save_tensors
from mlm.text.vocabulary import WordVocabulary

TEXT = "Badofe, the feku lamo; don't ruti (sa vozu) at 3.5 gi.\n\nNe pi ru: bado feku lamo! " * 4
RULES = ("rms", "rms+cache")


def _surprisals(table: pa.Table) -> np.ndarray:
    """(columns, words)."""
    names = [name for name in table.column_names if name.startswith("surprisal")]
    return np.array([table[name].to_numpy() for name in names])


def test_words_are_the_users_own(model: TrainedModel) -> None:
    table = model.reader().score(TEXT)
    spans = zip(table["char_start"].to_pylist(), table["char_end"].to_pylist(), strict=True)
    assert table["word"].to_pylist() == [TEXT[a:b] for a, b in spans]
    words = [w for w in table["word"].to_pylist() if w.strip()]
    assert words == TEXT.split()
    assert table["word_id"].to_pylist() == list(range(table.num_rows))


@pytest.mark.parametrize("protocol", ["article", "stream"])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_chunks_change_no_bit(model: TrainedModel, protocol: str, size: int) -> None:
    reader = model.reader(also=RULES, protocol=protocol, stats=("entropy", "rank", "top_k"))  # type: ignore[arg-type]
    want = reader.copy().score(TEXT)
    parts = [reader.read(TEXT[k : k + size]) for k in range(0, len(TEXT), size)]
    got = pa.concat_tables([*parts, reader.finish()])
    assert got.equals(want)
    assert sum(part.num_rows for part in parts) > want.num_rows // 2


def test_a_rule_says_what_evaluation_says(model: TrainedModel) -> None:
    """The plain surprisals of WikiText's form are the word losses of `evaluate`."""
    text = " bado feku , <unk> lamo . \n ruti sa \n" * 6
    tokens = model.vocabulary.encode_article(text).astype(np.int64)
    base, bound, _, _ = ready_rule(model._run, "four_levels", "article")
    want = score_protocol(base, bound, [tokens], model.vocabulary.eos_id, "article", 1)
    table = model.reader(form="wikitext").score(text)
    total = table["surprisal_plain"].to_numpy().sum() * np.log(2)
    assert total == pytest.approx(want.total, rel=1e-6)


def test_a_stream_is_one_long_text(model: TrainedModel) -> None:
    lines = ["Badofe the feku.\n", "Lamo ruti sa vozu, gi ne!\n" * 5, "", "Pi ru\n" * 3]
    reader = model.reader(also=("rms",), protocol="stream", form="wikitext")
    got = pa.concat_tables(reader.score(line) for line in lines)
    want = model.reader(also=("rms",), protocol="stream", form="wikitext").score("".join(lines))
    plain = [name for name in want.column_names if name.endswith("_plain")]
    for name in plain:
        np.testing.assert_allclose(got[name].to_numpy(), want[name].to_numpy(), rtol=1e-5)


def test_many_texts_at_once_are_read_as_one_by_one(model: TrainedModel) -> None:
    texts = [TEXT, "", "Badofe.", "Ne\n" * 25, TEXT[:77], " ", "gi ne " * 20]
    stats = ("entropy", "rank", "top_k")
    many = model.score_many(texts, also=RULES, lanes=3, stats=stats)
    reader = model.reader(also=RULES, stats=stats)
    one = pa.concat_tables(reader.score(text) for text in texts)
    assert many.select(["doc_id", "word_id", "word", "rank"]).equals(
        one.select(["doc_id", "word_id", "word", "rank"])
    )
    np.testing.assert_allclose(_surprisals(many), _surprisals(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("free", "lanes"), [(None, 5), (1e12, 5), ("three", 3), (0.0, 1)])
def test_memory_bounds_how_many_texts_are_read_at_once(
    model: TrainedModel, free: float | str | None, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, rules, noted, made = ["gi ne " * 20] * 5, ("best", "rms+cache"), [], []
    one = [model.ready(rule, "article") for rule in model.resolved(["static", *rules])]
    longest = len(model._encoded(texts[0], "plain").tokens)
    if free == "three":  # and a little
        of = (3, longest, True)
        free = 1.01 / SHARE * sum(reading_bytes(r.base, r.bound, r.cache, *of) for r in one)
    track = TrainedModel.track

    def told(self: TrainedModel, name: str, protocol: str, lanes: int) -> Track:
        made.append(lanes)
        return track(self, name, protocol, lanes)

    monkeypatch.setattr(TrainedModel, "track", told)
    monkeypatch.setattr(reader_model, "free_bytes", lambda device: free)
    monkeypatch.setattr(reader_model, "note", noted.append)
    found = model.score_many(texts, "best", also=rules[1:])
    assert made == [lanes] * 3
    assert bool(noted) == (lanes < 5)
    tokens = [np.arange(9)] * 5
    assert len(model.losses(tokens, "static").nll) == 5
    asked = model.score_many(texts, "best", also=rules[1:], lanes=5)
    assert made[3:] == [5] * 3, "a number that is given is taken as it is"
    np.testing.assert_allclose(_surprisals(found), _surprisals(asked), rtol=1e-5, atol=1e-5)
    for wrong in (lambda: model.score_many(texts, lanes=0), lambda: model.losses(tokens, lanes=0)):
        with pytest.raises(UserError, match="lanes 0: give at least 1"):
            wrong()


def test_what_lanes_needed_is_given_back(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "MIN_BYTES", 0)
    model.score_many(["gi ne " * 40] * 3)
    assert not buffers._pool.free


def test_few_rules_stay_in_memory(model: TrainedModel) -> None:
    """A rule is made once for what is read in turn; one that was asked for long ago is let go."""
    fresh = TrainedModel(model._run, model.name)
    ready = fresh.ready("rms+cache", "article")
    assert fresh.ready("rms+cache", "article") is ready
    assert fresh.ready("rms", "article").bound is ready.bound
    let_go = weakref.ref(ready.bound)
    del ready
    for name, protocol in (("rms", "stream"), ("four_levels", "article"), ("static", "article")):
        fresh.ready(name, protocol)
    assert let_go() is not None
    fresh.ready("four_levels", "stream")
    gc.collect()
    assert let_go() is None


def test_best_may_have_a_cache(model: TrainedModel) -> None:
    assert model.resolved(["best+cache", "static", "best"]) == [
        "four_levels+cache",
        "static",
        "four_levels",
    ]


def test_the_words_of_a_text_cost_its_pieces_and_the_last_boundary(model: TrainedModel) -> None:
    reader = model.reader()
    table = reader.score(TEXT)
    excess = table["surprisal"].to_numpy().sum() - table["surprisal_plain"].to_numpy().sum()
    assert 0 < excess < 2


def test_a_copy_is_independent(model: TrainedModel) -> None:
    reader = model.reader(also=RULES)
    reader.read(TEXT[:100])
    copy = reader.copy()
    want = pa.concat_tables([copy.read(TEXT[100:]), copy.finish()])
    other = reader.copy()
    other.read("gi " * 200)
    other.finish()
    assert pa.concat_tables([reader.read(TEXT[100:]), reader.finish()]).equals(want)


def test_two_readers_do_not_touch_each_other(model: TrainedModel) -> None:
    want = model.reader().score(TEXT)
    one, two = model.reader(), model.reader("rms+cache")
    parts = []
    for k in range(0, len(TEXT), 30):
        parts.append(one.read(TEXT[k : k + 30]))
        two.read("ne gi ru " * 5)
    assert pa.concat_tables([*parts, one.finish()]).equals(want)


def test_switches_of_the_process_change_no_reader(model: TrainedModel) -> None:
    want = model.reader().score(TEXT)
    before, threads = switches(), torch.get_num_threads()
    try:
        use(kernels=False, bfloat16=True)
        torch.set_num_threads(threads + 1)
        assert model.reader().score(TEXT).equals(want)
        assert torch.get_num_threads() == threads + 1
    finally:
        use(kernels=before.kernels, bfloat16=before.bfloat16)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("protocol", ["article", "stream"])
def test_a_saved_memory_goes_on(model: TrainedModel, protocol: str, tmp_path: Path) -> None:
    reader = model.reader(also=RULES, protocol=protocol)  # type: ignore[arg-type]
    reader.score(TEXT)
    path = tmp_path / "memory.safetensors"
    reader.save(path)
    again = model.reader(also=RULES, memory=path)
    got, fresh = again.score(TEXT), model.reader(also=RULES).score(TEXT)
    assert got["surprisal"].to_numpy().sum() < 0.9 * fresh["surprisal"].to_numpy().sum()
    assert got["surprisal_static"].equals(fresh["surprisal_static"])
    assert again.score(TEXT).drop_columns("doc_id").equals(got.drop_columns("doc_id"))


def test_a_memory_of_another_rule_is_refused(model: TrainedModel, tmp_path: Path) -> None:
    reader = model.reader("rms")
    reader.score(TEXT)
    path = tmp_path / "memory.safetensors"
    reader.save(path)
    with pytest.raises(UserError, match="rule rms"):
        model.reader(memory=path)
    with pytest.raises(UserError, match="missing"):
        model.reader(memory=tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no memory"):
        model.reader(memory=model._run.folder.checkpoint("memory"))


def test_a_memory_without_a_further_rule_is_refused(model: TrainedModel, tmp_path: Path) -> None:
    reader = model.reader()
    reader.score(TEXT)
    path = tmp_path / "memory.safetensors"
    reader.save(path)
    with pytest.raises(UserError, match="nothing that rule rms learned"):
        model.reader(also=RULES, memory=path)


def test_a_memory_with_a_tensor_missing_or_of_another_shape_is_refused(
    model: TrainedModel, tmp_path: Path
) -> None:
    reader = model.reader("rms")
    reader.score(TEXT)
    path = tmp_path / "memory.safetensors"
    reader.save(path)
    tensors, about = load_tensors(path, "")
    (name, *_) = sorted(n for n in tensors if "/weights/" in n)
    for change in ({}, {name: tensors[name].flatten()}):
        save_tensors(path, {n: t for n, t in tensors.items() if n != name} | change, about)
        with pytest.raises(UserError, match=r"does not fit this rule \("):
            model.reader("rms", memory=path)


def test_a_frozen_reader_learns_nothing_more(model: TrainedModel) -> None:
    reader = model.reader()
    reader.score(TEXT)
    assert reader.freeze() is reader
    first = reader.score(TEXT)
    reader.score("Gi ne ru pi sa. " * 30)
    assert reader.score(TEXT).drop_columns("doc_id").equals(first.drop_columns("doc_id"))
    static = first["surprisal_static"].to_numpy().sum()
    assert first["surprisal"].to_numpy().sum() < 0.9 * static
    once = model.reader().freeze().score(TEXT)
    static = once["surprisal_static_plain"].to_numpy()
    np.testing.assert_allclose(once["surprisal_plain"].to_numpy()[:3], static[:3], rtol=1e-3)


@pytest.mark.parametrize("rule", ["static", "rms+cache", "four_levels"])
def test_what_comes_next_sums_to_one_and_is_what_is_charged(model: TrainedModel, rule: str) -> None:
    reader = model.reader(rule)
    reader.read(TEXT[:170])
    log_p = reader.next_log_p()
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(reader.next_losses(range(0, 330, 11)), -log_p[::11], atol=1e-4)


def test_generating_is_repeatable_and_leaves_the_reader_alone(model: TrainedModel) -> None:
    reader = model.reader()
    want = reader.copy().score(TEXT)
    text = reader.generate("= Badofe =\n", words=30, seed=1)
    assert text == reader.generate("= Badofe =\n", words=30, seed=1)
    assert text != reader.generate("= Badofe =\n", words=30, seed=2)
    assert not {"<unk>", "<eos>"} & set(text.split())
    assert reader.score(TEXT).equals(want)
    with pytest.raises(UserError, match="temperature"):
        reader.generate(temperature=0)


def test_a_document_under_way_is_not_overwritten(model: TrainedModel, tmp_path: Path) -> None:
    reader = model.reader()
    reader.read("Bado")
    for act in (lambda: reader.score("x"), reader.freeze, lambda: reader.save(tmp_path / "m")):
        with pytest.raises(UserError, match="under way"):
            act()


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"rule": "rmss"}, "no rule 'rmss'; choose from best, .*four_levels"),
        ({"also": ("rms", "../rms")}, "no rule '../rms'; choose from best"),
        ({"protocol": "articles"}, "stream"),
        ({"form": "html"}, "markdown"),
        ({"stats": ("entropie",)}, "entropy"),
    ],
)
def test_what_a_reader_cannot_do_is_one_message(
    model: TrainedModel, asked: dict, names: str
) -> None:
    with pytest.raises(UserError, match=names):
        model.reader(**asked)


def test_an_empty_text_has_no_rows(model: TrainedModel) -> None:
    table = model.reader().score("")
    assert table.num_rows == 0
    assert table.schema.equals(model.reader().score("one").schema)


def test_an_unknown_word_pays_for_its_spelling() -> None:
    vocabulary = WordVocabulary(["<eos>", "<unk>", "bado"])

    def word(*forms: str) -> Word:
        return Word("x", 0, 1, forms, False, 0)

    assert spell(word("bado"), vocabulary, False) == ([2], [0.0])
    assert spell(word("né"), vocabulary, False) == ([1], [4 * math.log(257)])
    assert spell(word("<unk>"), vocabulary, True) == ([1], [0.0])
