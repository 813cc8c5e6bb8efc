"""Does a model keep the promises on which its numbers rest? Checks on one's own model and text.

Each check states what it did and on how much text. One that cannot be done says so, and why.
Letters: W words, M tokens per segment, V vocabulary, G n-grams.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlm.base.names import STATIC, rule_label
from mlm.kernels.switches import computing
from mlm.reader.reader import spell
from mlm.spelling import Word, WordFeed
from mlm.text.articles import count_words
from mlm.text.streams import LaneStream

if TYPE_CHECKING:
    from mlm.reader.model import Form, Protocol, TrainedModel

AUDITED = 2000
"""So many words are read in the checks that read."""

PLACES = 5
"""Places at which the text is changed, for each rule."""

GRAM = 13
"""Words of an n-gram that two texts hardly share by chance (Brown et al. 2020, appendix C)."""

PIECES = 12
"""Pieces that are read at such a place, one instead of the other."""

SHARED = 0.5
"""A document stands in the training text if that share of its n-grams does."""

SUM, LOSS, TOTAL = 1e-5, 1e-4, 1e-5
"""Largest deviations that count as rounding: of a sum of probabilities from one, of a loss from
that of the distribution in nats, of a document's loss with other lanes, relative."""


class Check(NamedTuple):
    """One promise, and whether it was kept."""

    name: str
    passed: bool | None
    """None: could not be checked."""
    worst: str
    """The worst deviation."""
    about: str
    """What was done, on how much text."""


class Document(NamedTuple):
    """A text to audit with."""

    title: str
    text: str
    form: Form


Training = Callable[[], Iterable[str]]
"""Streams the training text, document by document, in WikiText's form."""


# -- causal ---------------------------------------------------------------------------------------


def check_causal(
    model: TrainedModel, rule: str, protocol: Protocol, document: Document, seed: int = 0
) -> Check:
    """Changing the text from word k on changes no loss before k, and not the prediction of k.

    The text behind k is shuffled. Losses of the words before, and the entropies of their
    predictions and of that of k itself, must be equal bit for bit. Where the spelling of the word
    before k depends on k (a period behind an abbreviation), that word counts as changed.
    """
    reader = model.reader(rule=rule, protocol=protocol, form=document.form, stats=("entropy",))
    words = spelled(document)
    usual = reader.copy().score(document.text)
    generator = np.random.default_rng(seed)
    places = generator.choice(np.arange(1, len(words)), min(PLACES, len(words) - 1), replace=False)
    worst, compared = 0.0, 0
    for k in sorted(places.tolist()):
        changed = document._replace(text=_changed(document.text, words, k, generator))
        other = reader.copy().score(changed.text)
        alike = _alike(words, spelled(changed))
        compared += alike
        for name in ("surprisal", "surprisal_plain", "surprisal_static"):
            worst = max(worst, _difference(usual[name][:alike], other[name][:alike]))
        entropy = (table["entropy"][: alike + 1] for table in (usual, other))
        worst = max(worst, _difference(*entropy))
    return Check(
        f"causal: {_named(rule, protocol)}",
        worst == 0.0,
        f"{worst:.1e} bits" if worst else "no difference",
        f"text shuffled from {len(places)} places on; {compared:,} losses before them and the "
        "predictions there compared bit for bit",
    )


def spelled(document: Document) -> list[Word]:
    """The document's words and line ends."""
    feed = WordFeed(document.form)
    return [*feed.read(document.text), *feed.finish()]


def _changed(text: str, words: Sequence[Word], k: int, generator: np.random.Generator) -> str:
    """The text with other words from word `k` on: the rest of its words, shuffled."""
    rest = [word.text for word in words[k:] if not word.line_end]
    rest = [rest[i] for i in generator.permutation(len(rest))]
    rest = ["changed", *rest] if not rest or rest[0] == words[k].text else rest
    return text[: words[k].start] + (" " if words[k].line_end else "") + " ".join(rest)


def _alike(words: Sequence[Word], others: Sequence[Word]) -> int:
    """How many words at the start are the same and spelled alike."""
    pairs = zip(words, others, strict=False)
    differing = (i for i, (a, b) in enumerate(pairs) if (a.text, a.forms) != (b.text, b.forms))
    return next(differing, min(len(words), len(others)))


def _difference(one: Any, other: Any) -> float:
    """The largest difference of rows that both have; infinite where one is not a number."""
    size = min(len(one), len(other))
    a, b = one.to_numpy()[:size], other.to_numpy()[:size]
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    largest = float(np.abs(a - b).max())
    return largest if math.isfinite(largest) else math.inf


# -- probabilities --------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """M tokens as they were predicted."""

    targets: np.ndarray
    """(M,) the tokens that came."""
    nll: np.ndarray
    """(M,) what they cost, nats."""
    log_p: np.ndarray
    """(M, V) of every token, before it was read."""


def predictions(
    model: TrainedModel, rule: str, protocol: Protocol, documents: Sequence[Document]
) -> Iterator[Prediction]:
    """What is predicted while the documents are read, with the extensions and cache of the rule."""
    vocabulary, own = model.vocabulary, model.track(rule, protocol, 1)
    texts = []
    for document in documents:
        wikitext = document.form == "wikitext"
        tokens = [t for word in spelled(document) for t in spell(word, vocabulary, wikitext)[0]]
        texts.append(np.array(tokens, dtype=np.int64))
    if protocol == "stream":
        texts = [np.concatenate(texts)]
    for tokens in texts:
        track = own.copy()
        for segment in LaneStream([tokens], 1, model.segment, vocabulary.eos_id):
            with computing(model.switches):
                nll, log_p = track.learn(segment)
            count = int(segment.mask.sum())
            parts = (segment.targets, nll, log_p)
            yield Prediction(*(part[0, :count].double().cpu().numpy() for part in parts))


def check_sums(
    model: TrainedModel, rule: str, protocol: Protocol, documents: Sequence[Document]
) -> list[Check]:
    """Every prediction sums to one over the vocabulary, and a loss is what was predicted."""
    sums = losses = 0.0
    tokens = size = 0
    for targets, nll, log_p in predictions(model, rule, protocol, documents):
        sums = max(sums, _worst(np.exp(log_p).sum(1) - 1.0))
        mine = log_p[np.arange(len(targets)), targets.astype(np.int64)]
        losses = max(losses, _worst(nll + mine))
        tokens, size = tokens + len(targets), log_p.shape[1]
    name = _named(rule, protocol)
    return [
        Check(
            f"sums to one: {name}",
            sums <= SUM,
            f"{sums:.1e}",
            f"{tokens:,} predictions summed over {size:,} pieces; within {SUM:.0e}",
        ),
        Check(
            f"loss as predicted: {name}",
            losses <= LOSS,
            f"{losses:.1e} nats",
            f"{tokens:,} losses compared with those predictions; within {LOSS:.0e}",
        ),
    ]


def _worst(values: np.ndarray) -> float:
    """The largest magnitude; infinite where one is not a number."""
    return float(np.abs(values).max(initial=0.0)) if np.isfinite(values).all() else math.inf


def check_blind(model: TrainedModel, rule: str, document: Document, seed: int = 0) -> Check:
    """What is predicted does not depend on what comes: any piece that is read costs what was
    predicted before."""
    words, generator = spelled(document), np.random.default_rng(seed)
    places = generator.choice(len(words), min(PLACES, len(words)), replace=False)
    reader = model.reader(rule=rule, form=document.form)
    worst, at = 0.0, 0
    for k in sorted(places.tolist()):
        reader.read(document.text[at : words[k].start])
        at = max(at, words[k].start)
        log_p = reader.next_log_p()
        some = [int(log_p.argmax()), *generator.integers(len(log_p), size=PIECES - 1).tolist()]
        worst = max(worst, _worst(reader.next_losses(some) + log_p[some]))
    return Check(
        f"blind to what comes: {rule_label(rule)}",
        worst <= LOSS,
        f"{worst:.1e} nats",
        f"at {len(places)} places each of {PIECES} pieces read next, and its loss compared with "
        f"the prediction of before; within {LOSS:.0e}",
    )


# -- lanes, chunks, order -------------------------------------------------------------------------


def check_chunks(
    model: TrainedModel, rule: str, protocol: Protocol, document: Document, seed: int = 0
) -> Check:
    """A text read in pieces of any length has the losses of the text read at once, bit for bit."""
    reader = model.reader(rule=rule, protocol=protocol, form=document.form)
    usual = reader.copy().score(document.text)
    generator, at, parts = np.random.default_rng(seed), 0, []
    while at < len(document.text):
        size = int(generator.integers(1, 400))
        parts.append(reader.read(document.text[at : at + size]))
        at += size
    pieces = len(parts)
    other = pa.concat_tables([*parts, reader.finish()])
    if len(other) != len(usual):
        worst = math.inf
    else:
        names = [n for n in usual.column_names if n.startswith("surprisal")]
        worst = max(_difference(usual[name], other[name]) for name in names)
    return Check(
        f"chunks: {_named(rule, protocol)}",
        worst == 0.0,
        f"{worst:.1e} bits" if worst else "no difference",
        f"{len(usual):,} words read in {pieces} pieces and at once, compared bit for bit",
    )


def check_lanes(model: TrainedModel, rule: str, documents: Sequence[Document]) -> Check:
    """Documents cost the same alone, side by side, and in another order; protocol article."""
    form = documents[0].form
    texts = [d.text for d in documents if d.form == form]
    if len(texts) < 2:  # two halves read side by side are as good
        middle = texts[0].find("\n", len(texts[0]) // 2) + 1 or len(texts[0]) // 2
        texts = [texts[0][:middle], texts[0][middle:]]

    def read(chosen: Sequence[str], lanes: int | None) -> list[np.ndarray]:
        table = model.score_many(chosen, rule=rule, lanes=lanes, form=form)
        ids, bits = table["doc_id"].to_numpy(), table["surprisal_plain"].to_numpy()
        return [bits[ids == k] for k in range(len(chosen))]

    usual = read(texts, 1)
    together, turned = read(texts, None), read(texts[::-1], 2)[::-1]
    worst, word = 0.0, 0.0
    for other in (together, turned):
        for a, b in zip(usual, other, strict=True):
            if len(a) != len(b):
                worst = math.inf
            elif len(a):
                worst = max(worst, abs(float(a.sum() - b.sum())) / max(1.0, float(a.sum())))
                word = max(word, float(np.abs(a - b).max()))
    return Check(
        f"lanes and order: {rule_label(rule)}",
        worst <= TOTAL,
        f"{worst:.1e} relative",
        f"{len(texts)} documents read alone, side by side, and two by two in reverse order: each "
        f"document's loss within {TOTAL:.0e} (worst word: {word:.1e} bits)",
    )


# -- counts ---------------------------------------------------------------------------------------


def check_counts(model: TrainedModel, documents: Sequence[Document]) -> Check:
    """Every word and byte of the text is counted, once: recounted from the text itself.

    Rows in order with the white space between them are the text; there are as many words as
    `str.split` finds, and as many line ends as newlines stand behind words.
    """
    wrong: list[str] = []
    words = size = 0
    for document in documents:
        table = model.reader(rule=STATIC, form=document.form).score(document.text)
        found = _miscounted(document, table)
        wrong += [f"{document.title}: {found}"] if found else []
        words += len(table)
        size += len(document.text.encode())
    return Check(
        "counts",
        not wrong,
        wrong[0] if wrong else "none",
        f"{words:,} words and line ends, {size:,} bytes recounted from the text of "
        f"{len(documents)} document(s)",
    )


def _miscounted(document: Document, table: pa.Table) -> str:
    """What is wrong with the words of a table; "" = nothing."""
    text, at, plain, ends = document.text, 0, 0, 0
    columns = (table[name].to_pylist() for name in ("word", "char_start", "char_end"))
    for word, start, end in zip(*columns, strict=True):
        if text[start:end] != word or start < at:
            return f"{word!r} does not stand at characters {start} to {end}"
        if text[at:start].strip():
            return f"{text[at:start].strip()!r} is no row"
        ends += not word.strip()
        plain += bool(word.strip())
        at = end
    if text[at:].strip():
        return f"{text[at:].strip()[:40]!r} is no row"
    if plain != len(text.split()):
        return f"{plain} words, but white space separates {len(text.split())}"
    expected = line_ends(document)
    if expected is not None and ends != expected:
        return f"{ends} line ends, but {expected} in the text"
    return ""


def line_ends(document: Document) -> int | None:
    """Line ends, counted from the text alone; None for forms in which they follow the layout."""
    if document.form == "wikitext":
        return count_words(document.text) - len(document.text.split())
    if document.form == "plain":
        return len(re.findall(r"\S\s*?[\r\n]", document.text))
    return None


# -- the training text ----------------------------------------------------------------------------


class _Grams:
    """n-grams of words as 64-bit numbers; words that no scored document has are never in one."""

    def __init__(self, documents: Sequence[Sequence[str]], seed: int = 0) -> None:
        types = sorted({word for words in documents for word in words})
        self.number = {word: k for k, word in enumerate(types, 1)}
        generator = np.random.default_rng(seed)
        high = np.iinfo(np.uint64).max
        self.code = generator.integers(1, high, size=len(types) + 1, dtype=np.uint64)
        self.factor = generator.integers(1, high, size=GRAM, dtype=np.uint64) | np.uint64(1)

    def of(self, words: Sequence[str]) -> np.ndarray:
        """(G,) the n-grams of a text all of whose words are known."""
        place_W = np.fromiter((self.number.get(w, 0) for w in words), np.int64, len(words))
        number = len(words) - GRAM + 1
        if number <= 0:
            return np.zeros(0, dtype=np.uint64)
        unknown = np.concatenate([[0], np.cumsum(place_W == 0)])
        whole_G = unknown[GRAM:] == unknown[:-GRAM]
        if not whole_G.any():
            return np.zeros(0, dtype=np.uint64)
        code_W, found_G = self.code[place_W], np.zeros(number, dtype=np.uint64)
        for k in range(GRAM):
            found_G += code_W[k : k + number] * self.factor[k]
        return found_G[whole_G]


def overlaps(documents: Sequence[Sequence[str]], training: Iterable[Sequence[str]]) -> list[float]:
    """The share of each document's 13-grams of words that the training text has, too.

    Only the documents' n-grams are held, as 64-bit numbers; the training text streams by.
    """
    grams = _Grams(documents)
    mine = [grams.of(words) for words in documents]
    known = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *mine]))
    seen = np.zeros(len(known), dtype=bool)
    if len(known):
        for words in training:
            theirs = grams.of(words)
            at = np.searchsorted(known, theirs).clip(max=len(known) - 1)
            seen[at[known[at] == theirs]] = True
    shares = []
    for own in mine:
        hits = seen[np.searchsorted(known, own)]
        shares.append(float(hits.mean()) if len(own) else 0.0)
    return shares


def check_training_text(documents: Sequence[Document], training: Training | None) -> Check:
    """No scored document stands in the training text."""
    name = "not in the training text"
    if training is None:
        return Check(name, None, "not available", "the training text of this model is not here")
    scored = [_forms(spelled(document)) for document in documents]
    streamed = 0

    def stream() -> Iterable[list[str]]:
        nonlocal streamed
        for text in training():
            words = text.lower().split()
            streamed += len(words)
            yield words

    shares = overlaps(scored, stream())
    worst = int(np.argmax(shares))
    number = sum(map(len, scored))
    return Check(
        name,
        shares[worst] < SHARED,
        f"{100 * shares[worst]:.1f} % of {documents[worst].title}",
        f"{GRAM}-grams of {len(documents)} documents ({number:,} words) looked up in {streamed:,} "
        f"words of training text; a share of {100 * SHARED:.0f} % fails",
    )


def _forms(words: Sequence[Word]) -> list[str]:
    return [form.lower() for word in words for form in word.forms]


# -- all together ---------------------------------------------------------------------------------


def audit(
    model: TrainedModel,
    documents: Sequence[Document],
    rules: Sequence[str],
    protocols: Sequence[Protocol] = ("article", "stream"),
    training: Training | None = None,
    words: int = AUDITED,
    seed: int = 0,
) -> Iterator[Check]:
    """All checks, one after the other.

    Args:
        documents: what is scored; the checks that read take its first `words` words, those of
            counts and of the training text all of it.
        training: the model's training text; None = not available.
    """
    some = cut(documents, words)
    yield check_counts(model, some)
    for rule in rules:
        yield check_blind(model, rule, some[0], seed)
        yield check_lanes(model, rule, some)
        for protocol in protocols:
            yield check_causal(model, rule, protocol, some[0], seed)
            yield from check_sums(model, rule, protocol, some)
            yield check_chunks(model, rule, protocol, some[0], seed)
    yield check_training_text(documents, training)


def cut(documents: Sequence[Document], words: int) -> list[Document]:
    """The first documents, of so many words together; the last is cut behind a word."""
    found, left = [], words
    for document in documents:
        if left <= 0:
            break
        ends = [match.end() for match in re.finditer(r"\S+\s*", document.text)]
        if len(ends) > left:
            document = document._replace(text=document.text[: ends[left - 1]])
        left -= len(ends)
        found.append(document)
    return found


def _named(rule: str, protocol: str) -> str:
    return f"{rule_label(rule)}, {protocol}"
