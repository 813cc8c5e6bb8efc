"""Sources of text: article borders, word counts, every kind of corpus, every kind of bad input."""

from __future__ import annotations

import gzip
import itertools
import lzma
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from mlm.base.errors import UserError
from mlm.text import hub, pydocs
from mlm.text.corpora import (
    SPLITS,
    Article,
    Corpus,
    count_words,
    open_corpus,
    split_articles,
    title_of,
)


def article(title: str, *paragraphs: str) -> str:
    """An article in WikiText's form, its leading blank line included."""
    return f" \n = {title} = \n \n" + "".join(f" {p} \n" for p in paragraphs)


THREE = article("One", "a b .") + article("Two", "c d .") + article("Three", "e f .")


def corpus_directory(path: Path, text: Callable[[str], str] = lambda split: THREE) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (path / f"wiki.{split}.tokens").write_text(text(split), encoding="utf-8")
    return path


def titles(corpus: Corpus, split: str) -> list[str]:
    return [a.title for a in corpus.articles(split)]


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# ---------------------------------------------------------------- borders and words


def test_every_line_belongs_to_one_article() -> None:
    text = " \n" + THREE + " \n \n"
    articles = list(split_articles(text.splitlines(keepends=True)))
    assert [a.title for a in articles] == ["One", "Two", "Three"]
    assert "".join(a.text for a in articles) == text
    assert articles[1].text == " \n = Two = \n \n c d . \n"
    assert sum(count_words(a.text) for a in articles) == count_words(text)


@pytest.mark.parametrize(
    "body",
    [
        " x is \n = 5 = \n and more \n",  # a formula in running text
        " x \n = 5 = \n \n y \n",  # blank after it only
        " x \n \n = 5 = \n y \n",  # blank before it only
        " \n = = Part = = \n \n y \n",  # a section
        " \n = = = Part = = = \n \n y \n",
        " \n = Half open = = \n \n y \n",
        " \n = \n \n = = \n \n",  # signs alone
    ],
)
def test_lines_that_only_look_like_titles_begin_no_article(body: str) -> None:
    text = " = Only = \n \n" + body + article("Next", "z")
    articles = list(split_articles(text.splitlines(keepends=True)))
    assert [a.title for a in articles] == ["Only", "Next"]
    assert articles[0].text == " = Only = \n \n" + body


def test_titles_may_hold_signs_and_stand_at_either_end() -> None:
    assert title_of(" = E = mc2 = \n") == "E = mc2"
    assert title_of("= Bare =") == "Bare"
    assert [a.title for a in split_articles([" = First = ", "", "x", "", " = Last = "])] == [
        "First",
        "Last",
    ]


def test_empty_and_one_token_articles() -> None:
    lines = [" = A = ", " ", " = B = ", " ", " word ", " ", " = C = ", " "]
    assert list(split_articles(lines)) == [
        Article("A", " = A = \n"),
        Article("B", " \n = B = \n \n word \n"),
        Article("C", " \n = C = \n \n"),
    ]


def test_rows_of_a_data_set_equal_lines_of_a_file() -> None:
    rows = [line if line.strip() else "" for line in THREE.splitlines(keepends=True)]
    windows = [line.rstrip("\n") + "\r\n" for line in THREE.splitlines()]
    stripped = [line.rstrip("\n") for line in THREE.splitlines()]
    expected = [a.title for a in split_articles(THREE.splitlines(keepends=True))]
    for lines in (rows, windows, stripped):
        found = list(split_articles(lines))
        assert [a.title for a in found] == expected
        assert sum(count_words(a.text) for a in found) == count_words(THREE)
        assert not any("\r" in a.text for a in found)


def test_words_are_separated_by_space_and_every_line_ends_in_one() -> None:
    assert count_words(" a b \n\n \n c") == 3 + 4
    assert count_words("") == 0
    assert count_words("\n") == 1
    assert count_words("a\u00a0b\x0bc\u2028d\re\n") == 6  # one line: only \n ends lines


def test_splitting_streams() -> None:
    def endless():
        while True:
            yield from THREE.splitlines()

    articles = split_articles(endless())
    assert [next(articles).title for _ in range(4)] == ["One", "Two", "Three", "One"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (" \n no title \n", "line 2: no title line"),
        (" = Stuck = \n text \n", "line 1: no title line"),
    ],
)
def test_text_that_does_not_open_with_a_title(text: str, words: str) -> None:
    message = error_of(lambda: list(split_articles(text.splitlines(), "FILE")))
    assert "FILE" in message
    assert words in message
    assert "' = Title = '" in message


# ---------------------------------------------------------------- local text files


def pack_xz(data: bytes) -> bytes:
    return lzma.compress(data)


def pack_zst(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor()
    half = len(data) // 2
    return compressor.compress(data[:half]) + compressor.compress(data[half:])  # two frames


PACKINGS = {"": bytes, ".xz": pack_xz, ".gz": gzip.compress, ".zst": pack_zst}
LONG = article("Long", *(f"é line of text number {i} with enough to pack" for i in range(3000)))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["wiki.{}.tokens", "{}.txt", "my-{}.raw"])
def test_files_of_every_kind(tmp_path: Path, name: str, packing: str) -> None:
    for split in ("train", "valid", "test"):
        data = PACKINGS[packing]((article(split) + LONG).encode())
        (tmp_path / (name.format(split) + packing)).write_bytes(data)
    corpus = open_corpus(str(tmp_path))
    for split in SPLITS:
        first, second = corpus.articles(split)
        assert first.title == split
        assert second == Article("Long", LONG)


@pytest.mark.parametrize("packing", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten", "not packed"])
def test_damaged_packed_files(tmp_path: Path, packing: str, damage: str) -> None:
    data = bytearray(PACKINGS[packing](LONG.encode()))
    if damage == "cut":
        del data[-len(data) // 3 :]
    elif damage == "overwritten":
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    else:
        data = bytearray(LONG.encode())
    path = tmp_path / f"train.txt{packing}"
    path.write_bytes(data)
    message = error_of(lambda: list(open_corpus(str(tmp_path)).articles("train")))
    assert str(path) in message
    assert "again" in message or "not valid UTF-8" in message  # gzip checks only at its end


def test_abandoned_files_are_closed(tmp_path: Path) -> None:
    for packing, pack in PACKINGS.items():
        path = tmp_path / f"train.txt{packing}"
        path.write_bytes(pack((THREE + LONG).encode()))
        articles = open_corpus(str(path)).articles("train")
        assert next(articles).title == "One"
        del articles  # an unclosed file would be a ResourceWarning, hence an error


def test_invalid_utf8_names_file_and_line(tmp_path: Path) -> None:
    directory = corpus_directory(tmp_path / "c")
    path = directory / "wiki.valid.tokens"
    path.write_bytes(path.read_bytes() + b" caf\xe9 \n")
    lines = THREE.count("\n") + 1
    message = error_of(lambda: list(open_corpus(str(directory)).articles("valid")))
    assert f"{path}, line {lines}: not valid UTF-8" in message


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf = One = \n \n x \n")
    assert titles(open_corpus(str(path)), "train") == ["One"]


def test_missing_path_names_the_alternatives(tmp_path: Path) -> None:
    message = error_of(lambda: open_corpus(str(tmp_path / "nowhere")))
    assert "nowhere" in message
    for name in ("pydocs", "wikitext-2", "wikitext-103-raw"):
        assert name in message


def test_missing_split_names_directory_and_file(tmp_path: Path) -> None:
    directory = corpus_directory(tmp_path / "c")
    (directory / "wiki.valid.tokens").unlink()
    corpus = open_corpus(str(directory))
    message = error_of(lambda: corpus.articles("valid"))
    assert str(directory) in message
    assert "valid.txt" in message
    assert "no split 'dev'" in error_of(lambda: corpus.articles("dev"))


def test_two_files_for_one_split(tmp_path: Path) -> None:
    directory = corpus_directory(tmp_path / "c")
    (directory / "train.raw").write_text(THREE)
    message = error_of(lambda: open_corpus(str(directory)).articles("train"))
    assert "train.raw" in message
    assert "wiki.train.tokens" in message


def test_names_hold_splits_as_words(tmp_path: Path) -> None:
    directory = corpus_directory(tmp_path / "c")
    for name in ("constrained.txt", "train.md", "train-test.txt", "latest.txt"):
        (directory / name).write_text("no text in WikiText form")
    assert titles(open_corpus(str(directory)), "train") == ["One", "Two", "Three"]


def test_directory_without_text(tmp_path: Path) -> None:
    (tmp_path / "readme.rst").write_text("x")
    message = error_of(lambda: open_corpus(str(tmp_path)))
    assert str(tmp_path) in message
    assert "train, valid or test" in message


def test_directory_of_directories(tmp_path: Path) -> None:
    corpus_directory(tmp_path / "text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.txt").write_text(THREE)
    assert open_corpus(str(tmp_path)).name == "text"
    corpus_directory(tmp_path / "second")
    message = error_of(lambda: open_corpus(str(tmp_path)))
    assert "second, text" in message


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.touch()
    message = error_of(lambda: list(open_corpus(str(path)).articles("test")))
    assert f"{path} is empty" in message


def test_single_file_is_divided_in_order(tmp_path: Path) -> None:
    path = tmp_path / "My text (2).txt"
    path.write_text("".join(article(str(i), "x") for i in range(25)))
    corpus = open_corpus(str(path))
    assert corpus.name == "My-text-2"
    parts = [titles(corpus, split) for split in SPLITS]
    assert [len(part) for part in parts] == [21, 2, 2]
    assert list(itertools.chain(*parts)) == [str(i) for i in range(25)]
    assert len({corpus.fingerprint(split) for split in SPLITS}) == 3


def test_single_file_with_too_few_articles(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(THREE)
    assert [titles(open_corpus(str(path)), s) for s in SPLITS] == [["One"], ["Two"], ["Three"]]
    path.write_text(article("One", "x") + article("Two", "y"))
    message = error_of(lambda: list(open_corpus(str(path)).articles("train")))
    assert f"{path} holds 2 article(s)" in message


def test_single_file_named_as_a_split_is_that_split(tmp_path: Path) -> None:
    path = tmp_path / "wiki.valid.tokens"
    path.write_text(THREE)
    corpus = open_corpus(str(path))
    assert titles(corpus, "valid") == ["One", "Two", "Three"]
    message = error_of(lambda: corpus.articles("train"))
    assert str(tmp_path) in message
    assert "no train split" in message


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    directory = corpus_directory(tmp_path / "c", lambda split: article(split, "x"))
    corpus = open_corpus(str(directory))
    before = {split: corpus.fingerprint(split) for split in SPLITS}
    assert len(set(before.values())) == 3
    path = directory / "wiki.train.tokens"
    path.write_text(path.read_text().replace("x", "y"))  # same size
    assert corpus.fingerprint("train") != before["train"]
    assert corpus.fingerprint("valid") == before["valid"]


# ---------------------------------------------------------------- the hub


def hub_layout(root: Path, config: str = "wikitext-2-v1") -> Path:
    """A directory as the hub holds it: rows are lines, blank ones empty."""
    (root / config).mkdir(parents=True)
    for split in ("train", "validation", "test"):
        text = article(split, "x") + THREE
        rows = ["" if line == " \n" else line for line in text.splitlines(keepends=True)]
        half = len(rows) // 2
        shards = [rows[:half], rows[half:]] if split == "train" else [rows]
        for index, shard in enumerate(shards):
            path = root / config / f"{split}-{index:05}-of-{len(shards):05}.parquet"
            parquet.write_table(pa.table({"text": shard}), path)
    return root


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network: whatever reaches for it fails at once."""
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub").constants
    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return home


@pytest.mark.parametrize("inner", ["", "wikitext-2-v1"])
def test_local_directory_in_the_hubs_layout(tmp_path: Path, inner: str) -> None:
    corpus = open_corpus(str(hub_layout(tmp_path / "hub") / inner))
    assert corpus.name == "wikitext-2"
    assert titles(corpus, "train") == ["train", "One", "Two", "Three"]
    assert titles(corpus, "valid")[0] == "validation"
    assert len({corpus.fingerprint(split) for split in SPLITS}) == 3


def test_hubs_layout_with_several_configurations(tmp_path: Path) -> None:
    root = hub_layout(hub_layout(tmp_path / "hub"), "wikitext-103-v1")
    message = error_of(lambda: open_corpus(str(root)))
    assert "wikitext-103-v1, wikitext-2-v1" in message


def test_hubs_layout_incomplete_or_damaged(tmp_path: Path) -> None:
    root = hub_layout(tmp_path / "hub") / "wikitext-2-v1"
    (path,) = root.glob("test-*")
    path.write_bytes(path.read_bytes()[:-20])
    corpus = open_corpus(str(root))
    assert str(path) in error_of(lambda: list(corpus.articles("test")))
    parquet.write_table(pa.table({"words": ["x"]}), path)
    assert "columns ['words']" in error_of(lambda: list(corpus.articles("test")))
    path.unlink()
    message = error_of(lambda: corpus.articles("test"))
    assert str(root) in message
    assert "test-*.parquet" in message


def test_hub_out_of_reach_is_one_message(hub_home: Path) -> None:
    message = error_of(lambda: open_corpus("wikitext-2").articles("valid"))
    for words in ("wikitext-2-v1/train-*.parquet", "WikiText form", "pydocs", "HF_HUB_OFFLINE"):
        assert words in message


def test_hub_probe_fails_fast(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network but not told so: one attempt, then the cache."""
    import datasets
    import huggingface_hub
    from datasets import config

    calls, offline = [], []

    def refuse(self: object, repo: str, timeout: float) -> None:
        calls.append((repo, timeout))
        raise OSError("no route to host")

    def load(*_: object) -> None:
        offline.append((config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    message = error_of(lambda: open_corpus("wikitext-103-raw").fingerprint("train"))
    assert "no route to host" in message
    assert calls == [("Salesforce/wikitext", 5.0)]
    assert offline == [(True, True)]  # else: six attempts, half a minute
    assert not config.HF_HUB_OFFLINE  # put back


def test_hub_through_datasets(
    tmp_path: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loading code itself, with a local copy in the place of the hub's repository."""
    root = hub_layout(tmp_path / "wikitext")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: wikitext-2-v1/{split}-*\n"
            for split in ("train", "validation", "test")
        )
        + "---\n"
    )
    monkeypatch.setattr(hub, "HUB_REPOSITORY", str(root))
    corpus = open_corpus("wikitext-2")
    local = open_corpus(str(root))
    for split in SPLITS:
        assert list(corpus.articles(split)) == list(local.articles(split))
    assert len({corpus.fingerprint(split) for split in SPLITS}) == 3
    assert corpus.fingerprint("train") == open_corpus("wikitext-2").fingerprint("train")


def test_hub_from_a_downloaded_repository(tmp_path: Path, hub_home: Path) -> None:
    """What `hf download` leaves in the cache is used when the hub is out of reach."""
    repository = hub_home / "hub" / "datasets--Salesforce--wikitext"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    shutil.move(hub_layout(tmp_path / "hub"), repository / "snapshots" / "abc123")
    corpus = open_corpus("wikitext-2")
    assert titles(corpus, "test") == ["test", "One", "Two", "Three"]
    assert corpus.name == "wikitext-2"
    assert "wikitext-103" in error_of(lambda: open_corpus("wikitext-103").articles("test"))


# ---------------------------------------------------------------- the built-in text


@pytest.fixture
def small_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A make-believe standard library of thirty modules, without topics."""
    library = tmp_path / "python"
    (library / "test").mkdir(parents=True)
    for i in range(30):
        words = " ".join(f"w{i}x{j}" for j in range(200))
        source = f'"""Module number {i}: {words}"""\n\ndef f(a, b=1):\n    """Do {i}-fold."""\n'
        (library / f"mod{i}.py").write_text(source)
    (library / "test" / "mod.py").write_text(f'"""{"never " * 300}"""')
    (library / "twin.py").write_text((library / "mod3.py").read_text())
    (library / "tiny.py").write_text('"""Little."""')
    (library / "broken.py").write_text("def (")
    monkeypatch.setattr(pydocs, "_library", lambda: library)
    pydocs._articles.cache_clear()
    yield library
    pydocs._articles.cache_clear()


def test_pydocs_without_topics(small_python: Path) -> None:
    corpus = open_corpus("pydocs")
    parts = {split: titles(corpus, split) for split in SPLITS}
    assert [len(parts[split]) for split in SPLITS] == [24, 3, 3]
    every = list(itertools.chain(*parts.values()))
    assert len({name.replace("twin", "mod3") for name in every}) == 30  # no twins, tiny, test, ...
    first = next(corpus.articles("valid"))
    number = first.title.removeprefix("mod")
    assert re.match(rf" \n = mod{number} = \n \n Module number {number} : w{number}x0 ", first.text)
    assert first.text.endswith(f" \n = = f = = \n \n f ( a , b = 1 ) \n Do {number} @-@ fold . \n")


def test_pydocs_fingerprint_follows_the_library(small_python: Path) -> None:
    before = open_corpus("pydocs").fingerprint("train")
    (small_python / "mod1.py").write_text("x = 1")
    assert open_corpus("pydocs").fingerprint("train") != before


def test_pydocs_of_a_python_without_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pydocs, "_library", lambda: tmp_path)
    pydocs._articles.cache_clear()
    assert str(tmp_path) in error_of(lambda: list(open_corpus("pydocs").articles("train")))


def test_pydocs_of_this_python() -> None:
    corpus = open_corpus("pydocs")
    parts = {split: list(corpus.articles(split)) for split in SPLITS}
    words = {split: sum(count_words(a.text) for a in parts[split]) for split in SPLITS}
    assert words["train"] > 200_000
    assert min(words["valid"], words["test"]) > 20_000
    assert 20 <= len(parts["valid"]) == len(parts["test"]) <= 50
    every = [a.title for split in SPLITS for a in parts[split]]
    assert len(set(every)) == len(every)
    paragraphs = {
        split: {p for a in parts[split] for p in a.text.split("\n") if len(p.split()) > 30}
        for split in SPLITS
    }
    for split in ("valid", "test"):
        shared = len(paragraphs[split] & paragraphs["train"])
        assert shared <= 0.03 * len(paragraphs[split])


def test_pydocs_tokens_and_paragraphs() -> None:
    assert pydocs._tokens("the built-in 1.5 or 1,000, isn't it -1?") == (
        "the built @-@ in 1 @.@ 5 or 1 @,@ 000 , isn 't it - 1 ?"
    )
    text = "Title\n=====\n\nOne\ntwo.\n\n>>> f(1)\n2\n>>> g\n\n= x = \n\n----\n"
    assert pydocs._paragraphs(text) == [
        "= = Title = =",
        "One two .",
        ">>> f ( 1 ) 2",
        ">>> g",
        "x =",
    ]
