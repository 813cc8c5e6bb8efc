"""What the fuzzer draws: hostile texts, files and command lines (see `fuzz`)."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mlm.cli import audit, evaluate, export, score, show
from mlm.cli.flags import Setting, settings_of
from mlm.settings.checks import OPTIONS, range_of
from mlm.settings.config import Config
from mlm.settings.flags import flag

ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 5, 7, 300, 10**9, 2**63, 2**64, 10**400, 0.0, 0.5, -0.5),
    *(-1e9, 1e30, 1e-30, 1e308, float("nan"), float("inf"), -float("inf"), "", "x", "0", "nan"),
    *("rms", "static", "rms+cache", "three_levels", "a\0b", "\ud800", "\udce9", "größe", "../x"),
    *("/", ".", "~", "a" * 300, "a\nb", "\x1b[31m", "{x}", "%s", [], [1], ["static"], ["x", "x"]),
    *([[]], [None], {}, {"a": 1}, [1e308] * 9, ["fisher"], "lstm", "all", "lm", "best", "tiny"),
)
"""Values of JSON files."""

number = st.integers(0, 10**6)
odd = st.sampled_from(range(len(ODD))).map(lambda k: ODD[k])
changes = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "add", "rename"]), number, odd),
    min_size=1,
    max_size=3,
)
"""Of a JSON value: what is done at which of its places, and with what."""

byte_changes = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "insert", "overwrite", "empty"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=2,
)
"""Of a file's bytes: what is done where, and with what."""


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has others in it."""
    if not isinstance(value, dict | list):
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [p for k, v in inner for p in ((*at, k), *places(v, (*at, k)))]


def changed(value: Any, what: list[tuple[str, int, Any]]) -> Any:
    """A JSON value with changes."""
    value = copy.deepcopy(value)
    for how, where, new in what:
        new = copy.deepcopy(new)  # of its own: a list added to itself has no end
        found = places(value)
        if not found:
            return new
        *path, last = found[where % len(found)]
        inner = functools.reduce(lambda v, key: v[key], path, value)
        match how:
            case "set":
                inner[last] = new
            case "delete":
                del inner[last]
            case "add" if isinstance(inner, dict):
                inner[str(new)[:20]] = new
            case "add":
                inner.append(new)
            case "rename" if isinstance(inner, dict):
                inner[f"{last}x"] = inner.pop(last)
    return value


def damaged(body: bytes, what: list[tuple[str, float, bytes]]) -> bytes:
    """Bytes with changes."""
    for how, where, new in what:
        at = int(where * len(body))
        match how:
            case "cut":
                body = body[:at]
            case "flip" if body:
                body = body[:at] + bytes([body[at] ^ (1 << new[0] % 8)]) + body[at + 1 :]
            case "insert":
                body = body[:at] + new + body[at:]
            case "overwrite":
                body = body[:at] + new + body[at + len(new) :]
            case "empty":
                body = b""
    return body


PIECES = (
    *(
        "\n",
        " \n",
        " = A = \n",
        " = = B = = \n",
        " \n = Title = \n \n",
        "word ",
        "<unk> ",
        "<eos> ",
    ),
    *("one two three . \n", "\t", "\r\n", "\0", "\u2581", "é", "e\u0301", "\u3000", "\u2028", "ﬁ"),
    *(
        "\U0001f9ed",
        "水",
        "ა" * 30,
        "x" * 5000,
        "= ",
        "=",
        "# Head\n",
        "- item\n",
        "\ufeff",
        "@-@ ",
    ),
)
words = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=30).map("".join)
good = st.integers(1, 5).map(lambda n: " \n = Ti = \n \n one two three one <unk> . \n" * n)
texts = st.one_of(
    words.map(lambda t: t.encode("utf-8", "surrogatepass")),
    good.map(str.encode),
    st.tuples(good, words).map(lambda p: "".join(p).encode("utf-8", "replace")),
    st.binary(max_size=60),
)
"""Bytes of text files, some of them in WikiText's form."""
NAMES = ("train.txt", "valid.txt", "test.txt", "wiki.train.tokens", "a.txt", "b.md", "c.txt", "d.x")
packed = st.sampled_from(["", "", "", ".gz", ".xz", ".zst", ".parquet"])
files = st.lists(st.tuples(st.sampled_from(NAMES), packed, texts), min_size=1, max_size=5)
corpora = st.tuples(
    files, st.booleans(), st.booleans(), st.sampled_from(["word"] * 3 + ["bpe", "unigram"]),
    st.sampled_from([0, 0, 5, 290]), st.sampled_from([0, 0, 7]),
)  # fmt: skip

CHECKPOINTS = ("lm", "memory", "two_levels", "three_levels", "lm_last", "three_levels_last")
tensor_changes = st.lists(
    st.tuples(st.sampled_from(["drop", "nan", "shape", "dtype", "flat", "huge"]), number),
    max_size=2,
)
checkpoints = st.one_of(
    st.tuples(st.sampled_from(CHECKPOINTS), byte_changes, st.none()),
    st.tuples(st.sampled_from(CHECKPOINTS), changes, tensor_changes),
)
"""Bytes changed, or the description and the tensors under a checksum that holds."""

RECORDS = ("config.json", "tuning.json", "evaluation.json", "metrics.jsonl")
OTHERS = ("losses.parquet", "vocabulary/vocabulary.model")
configs = st.one_of(
    st.tuples(st.sampled_from(RECORDS), changes),
    st.tuples(st.just("config.json"), changes),
    st.tuples(st.sampled_from((*RECORDS, *OTHERS)), byte_changes),
)

SETTINGS = {flag(s.path): s for s in settings_of(Config())}
USUAL = ["--corpus", "CORPUS", "--vocabulary-size", "330"]
VALUES = (
    *("0", "1", "-1", "2", "5", "nan", "inf", "1e30", "1e400", "0.5", "x", "", "true", "False"),
    *("9" * 400, "rms", "static", "best", "three_levels", "rms+cache", "all", "bias", "lstm", ","),
    *("tiny", "small", "cpu", "cuda", "lm", "meta", "evaluate", "draw", "none", "pes", "snail"),
    *(
        "CORPUS",
        "RUN",
        "NEW",
        "nowhere",
        "TEXT",
        "BINARY",
        "/",
        "/dev/null",
        "--",
        "-h",
        "größe",
        "a\nb",
        "user/no/x",
    ),
    *("wikitext", "1 2", "word", "bpe", "article", "stream", "test", "forward", "second", "qrnn"),
)
MORE = (
    *("--nonsense", "--help", "--help-all", "--preset", "--adapt.threads", "--no-draw", "--audit"),
    *("--corpus", "--articles", "--first", "--passage", "--split", "--protocol", "--rules", "-"),
    *("--lm.lanes=3", "--seed=x", "--no-meta.per-tensor", "--meta.no-per-tensor", "--title"),
    *("--form", "--frozen", "--stats", "--nc", "--memory", "--audit-words", "--split-on", "--out"),
    *("--page", "--save-memory", "--units", "--model", "--lanes", "--threads", "--seed"),
)
OWN: dict[str, list[Setting]] = {
    "train": settings_of(Config()),
    "evaluate": evaluate._settings(Config())[1:],
    "visualize": settings_of(show.Options(Path()))[1:],
    "mlm.cli.score": settings_of(score.Options())[1:],
    "mlm.cli.audit": settings_of(audit.Options())[1:],
    "mlm.cli.export": settings_of(export.Options(Path(), Path()))[2:],
}
"""The scripts and their flags."""
SCRIPTS = [*OWN, *["train"] * 4, *["evaluate"] * 3, "mlm.cli.score"]


def values_of(setting: Setting) -> st.SearchStrategy[list[str]]:
    """A flag with values of its kind, the ends of its range among them."""
    name = flag(setting.path)
    allowed = range_of(setting.path) or OPTIONS.get(setting.path)
    if isinstance(setting.value, bool):
        return st.sampled_from([[name], [f"--no-{name[2:]}"]])
    if allowed is not None:
        ends = [allowed.low, allowed.high, 1, 2, 7, 0.3, allowed.low - 1]
        texts = [str(int(end) if end == int(end) else end) for end in ends]
        several = 2 if setting.path == "passage" else 1
        chosen = st.lists(st.sampled_from(texts), min_size=several, max_size=several)
        return chosen.map(lambda words: [name, *words])
    some = setting.choices or VALUES
    number = 3 if isinstance(setting.value, tuple) else 1
    chosen = st.lists(st.sampled_from(some), min_size=1, max_size=number, unique=True)
    return chosen.map(lambda words: [name, *words])


def words_of(script: str) -> st.SearchStrategy[tuple[str, list[str], list[str]]]:
    """Command lines of a script: mostly of its own flags with values of their kinds."""
    own = st.sampled_from(OWN[script]).flatmap(values_of)
    strange = st.tuples(st.sampled_from((*SETTINGS, *MORE)), st.sampled_from(VALUES)).map(list)
    other = strange | st.sampled_from((*VALUES, *MORE, *SETTINGS)).map(lambda word: [word])
    part = st.integers(0, 9).flatmap(lambda k: other if k == 0 else own)
    parts = st.lists(part, max_size=5).map(lambda parts: [word for part in parts for word in part])
    places = st.sampled_from([*[["RUN"]] * 4, ["RUN", "NEW"], ["NEW"], []])
    return st.tuples(st.just(script), places, parts)


commands = st.sampled_from(SCRIPTS).flatmap(words_of)
