"""Interpolated modified Kneser-Ney n-grams over a model's own pieces: what counting alone predicts.

    python -m benchmarks.kneser_ney wikipedia-small --corpus data/wikipedia --split test

Counts are of the articles that stage 1 trained on. An n-gram of the highest order counts how often
it came, a shorter one how many different tokens came before it; three discounts per order follow
from the counts of counts (Chen and Goodman 1999, section 3). Contexts reach back to the `<eos>`
before an article's first token, as the language model's do, and no further.

The table has the n-grams alone, each rule alone and each rule mixed with them, token by token:
(1 - w) p + w q. The one weight w of a mixture is tuned on the first articles of `valid`, those that
the model's own settings were tuned on; they are never among the articles scored. Losses go to
OUT/losses.parquet, one column a rule, for other tables (`benchmarks.names`).
Letters: N tokens, V vocabulary, n order; an n-gram is one number, its tokens' digits in base V + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from scipy.optimize import minimize_scalar

import mlm
from benchmarks.claim_tables import RIVAL, Gains
from benchmarks.output import HOME
from benchmarks.timing import record
from benchmarks.unread import tuned_articles
from mlm.base.errors import UserError, run_cli
from mlm.base.names import CACHE, LEARNED, PROTOCOLS, STATIC, rule_label
from mlm.base.terminal import say
from mlm.reader.model import Protocol, TrainedModel
from mlm.report.evaluation import RESAMPLES, perplexity
from mlm.report.losses import LossTable, column_name, write_losses
from mlm.runs.run import split_training
from mlm.runs.split_text import SplitText
from mlm.text.corpora import open_corpus
from mlm.text.tokens import TokenFile, encode_split

ORDER = 5
NAME = "kneser_ney"
"""The n-grams alone, as a rule."""
MIXED = "+" + NAME
"""Ending of a rule's name that stands for its mixture with the n-grams."""


@dataclass(frozen=True)
class Options:
    """Compare and mix a model's rules with Kneser-Ney n-grams over the same pieces."""

    model: Annotated[str, tyro.conf.Positional]
    """A released model's name or a run folder."""
    corpus: str
    """The text that it was trained with: a folder of train, valid and test in WikiText form."""
    split: Literal["valid", "test"] = "valid"
    """What is scored; of valid only what nothing was tuned on. `test` is for the end."""
    words: int = 0
    """Words of the training text to count, in whole articles; 0 = what the model read of it."""
    order: int = ORDER
    """Longest n-grams."""
    rules: tuple[str, ...] = ()
    """Rules to mix with; none = static, RMS and the best learned one, and each with a cache, as far
    as the model has their settings."""
    protocols: tuple[Protocol, ...] = PROTOCOLS
    articles: int = 0
    """Articles to score; 0 = all."""
    threads: int = 0
    """CPU threads; 0 = the model's choice."""
    resamples: int = RESAMPLES
    """Bootstrap resamples of the articles."""
    out: Path = HOME / "kneser_ney"
    """Where the table and the word losses go."""


@dataclass(frozen=True)
class _Order:
    """What training text says of one order n: sorted n-grams and sorted contexts."""

    grams: np.ndarray
    """(G,) int64, sorted."""
    kept: np.ndarray
    """(G,) float32: count less discount, as a share of the context's."""
    contexts: np.ndarray
    """(C,) int64, sorted: n-grams without their last token."""
    left: np.ndarray
    """(C,) float32: what the discounts leave for the order below."""


def _digits(tokens: np.ndarray, order: int, base: int) -> np.ndarray:
    """The n-grams that end at each token but the first `order - 1`: (N - order + 1,) int64."""
    number = len(tokens) - order + 1
    found = np.zeros(max(0, number), np.int64)
    for k in range(order if number > 0 else 0):
        found = found * base + tokens[k : k + number]
    return found


def _padded(articles: Sequence[np.ndarray], order: int, eos: int, pad: int) -> np.ndarray:
    """All articles behind each other, each behind `order - 2` times `pad` and an `<eos>`."""
    start = np.array([pad] * (order - 2) + [eos], np.int64)[-(order - 1) :]
    return np.concatenate([part for article in articles for part in (start, article)])


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D_0 = 0, D_1, D_2 and D_3+ from the counts of counts (Chen and Goodman 1999, eq. 17)."""
    seen = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if not seen.all():  # a small text: one discount for all (Ney et al. 1994), or none
        share = seen[0] / (seen[0] + 2 * seen[1]) if seen[0] else 0.0
        return np.array([0.0, share, share, share])
    y = seen[0] / (seen[0] + 2 * seen[1])
    return np.array([0.0, *(k - (k + 1) * y * seen[k] / seen[k - 1] for k in (1, 2, 3))])


def _order(grams: np.ndarray, counts: np.ndarray, base: int) -> _Order:
    discounts = _discounts(counts)
    less = discounts[np.minimum(counts, 3)]
    contexts, first = np.unique(grams // base, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    freed = np.add.reduceat(less, first)
    sizes = np.diff(np.append(first, len(grams)))
    kept = (counts - less) / np.repeat(totals, sizes)
    return _Order(grams, kept.astype(np.float32), contexts, (freed / totals).astype(np.float32))


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places, which of them hold what is wanted)."""
    at = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return at, sorted_values[at] == wanted


class KneserNey:
    """An interpolated modified Kneser-Ney model of orders 1 to `order`."""

    def __init__(
        self, articles: Sequence[np.ndarray], vocabulary: int, eos: int, order: int = ORDER
    ) -> None:
        """Count `articles`, arrays of tokens below `vocabulary`.

        Raises:
            UserError: numbers of 63 bits cannot hold such n-grams.
        """
        self.order, self.vocabulary, self.eos = order, vocabulary, eos
        self.base = base = vocabulary + 1
        if base**order >= 1 << 63:
            longest = int(63 * math.log(2) / math.log(base))
            raise UserError(f"{vocabulary:,} tokens: use an order of {longest} at most")
        tokens = _padded(articles, max(2, order), eos, vocabulary)
        lengths = [len(article) for article in articles]
        counted = self._counted(lengths, max(2, order))
        self.orders: list[_Order] = []
        grams, counts = np.unique(
            _digits(tokens, order, base)[counted[order - 1 :]], return_counts=True
        )
        for n in range(order, 0, -1):
            self.orders.insert(0, _order(grams, counts, base))
            if n > 1:  # how many different tokens came before it
                grams, counts = np.unique(grams % base ** (n - 1), return_counts=True)

    @staticmethod
    def _counted(lengths: Sequence[int], order: int) -> np.ndarray:
        """Which of the padded tokens are the articles' own: (N,) bool."""
        parts = []
        for length in lengths:
            parts += [np.zeros(order - 1, bool), np.ones(length, bool)]
        return np.concatenate(parts)

    def probabilities(self, article: np.ndarray) -> np.ndarray:
        """(N,) float64: of every token of an article, given those before it."""
        width = max(2, self.order)
        tokens = _padded([np.asarray(article, np.int64)], width, self.eos, self.vocabulary)
        p = np.full(len(article), 1 / self.vocabulary)
        for n, of in enumerate(self.orders, start=1):
            grams = _digits(tokens[width - n :], n, self.base)
            context, known = _find(of.contexts, grams // self.base)
            at, seen = _find(of.grams, grams)
            kept = np.where(seen, of.kept[at], 0.0)
            p = np.where(known, kept + of.left[context] * p, p)
        return p

    def nll(self, article: np.ndarray) -> np.ndarray:
        """(N,) float64: losses in nats."""
        return -np.log(self.probabilities(article))


def mixed(nll: np.ndarray, other: np.ndarray, weight: float) -> np.ndarray:
    """Losses of `(1 - weight) p + weight q`, whose own losses are `nll` and `other`."""
    if not 0 < weight < 1:
        return other if weight else nll
    return -np.logaddexp(np.log1p(-weight) - nll, np.log(weight) - other)


def title(rule: str) -> str:
    """A rule's name for readers, the n-grams and mixtures with them included."""
    base = rule.removesuffix(MIXED)
    found = "Kneser-Ney n-grams" if base == NAME else rule_label(base)
    return found if base == rule else f"{found} + Kneser-Ney"


# -- texts --------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """What is counted, tuned on and scored, in the model's pieces."""

    counted: list[np.ndarray]
    words: int
    """Words of what is counted."""
    tuned: SplitText
    scored: SplitText


def open_texts(model: TrainedModel, options: Options) -> Texts:
    """The texts as tokens; the small ones first, so that what is amiss shows at once.

    Raises:
        UserError: no such text or split, or no article to score is left.
    """
    corpus, config = open_corpus(options.corpus), model.config
    for split in {"train", "valid", options.split}:
        corpus.fingerprint(split)

    def encoded(split: str, words: int = 0) -> TokenFile:
        return encode_split(corpus, split, model.vocabulary, config.text.data_dir, words)

    def part(split: str, file: TokenFile, chosen: Sequence[int]) -> SplitText:
        some = [a for a in chosen if file.words[a] > 0]
        if not some:
            raise UserError(
                f"{options.corpus}, split {split}: no article to score is left beside the "
                f"{config.evaluation.tune_words:,} words that are tuned on; give a longer text"
            )
        return SplitText(split, file, model.vocabulary, some, file.source_hash)

    valid, file = encoded("valid"), encoded(options.split)
    kept = tuned_articles(valid.words.tolist(), config.evaluation.tune_words)
    begin = kept if options.split == "valid" else 0
    end = min(len(file), begin + options.articles) if options.articles else len(file)
    tuned, scored = part("valid", valid, range(kept)), part(options.split, file, range(begin, end))
    train = encoded("train", options.words or config.text.train_words)
    chosen, _ = split_training(train, config.text.held_out)
    counted = [train.tokens[train.offsets[a] : train.offsets[a + 1]] for a in chosen]
    return Texts(counted, int(train.words[: len(chosen)].sum()), tuned, scored)


# -- losses -------------------------------------------------------------------------------------


def chosen_rules(model: TrainedModel, protocol: str, wanted: Sequence[str]) -> list[str]:
    """Static and the rules wanted, by default those whose settings the model has."""
    ready = model.rules_in(protocol)
    learned = [rule for rule in ready if rule in LEARNED]
    main = {STATIC, RIVAL, *([model.best] if learned else [])}
    default = [rule for rule in ready if rule.removesuffix(CACHE) in main]
    return list(dict.fromkeys([STATIC, *model.resolved(wanted or default)]))


def token_losses(
    model: TrainedModel, articles: Sequence[np.ndarray], protocol: Protocol, rules: Sequence[str]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Every rule with its losses by article, nats of every token; a rule with a cache and the one
    below it are read at once."""
    for plain in dict.fromkeys(rule.removesuffix(CACHE) for rule in rules):
        own = [rule for rule in (plain, plain + CACHE) if rule in rules]
        shown = f"{protocol}, {rule_label(own[-1])}"
        scores = model.losses(articles, own[-1], protocol, title=shown)
        for rule in own:
            yield rule, (scores.cached[0] if rule.endswith(CACHE) else scores).nll


def tuned_weight(nll: np.ndarray, other: np.ndarray) -> float:
    """The share of `other` that makes the mixture's loss least: it is convex in the share."""
    found = minimize_scalar(
        lambda weight: mixed(nll, other, weight).sum(), bounds=(0, 1), method="bounded"
    )
    return float(found.x)  # type: ignore[union-attr]


def all_losses(
    model: TrainedModel, grams: KneserNey, texts: Texts, options: Options
) -> tuple[LossTable, dict[tuple[str, str], float]]:
    """Word losses of the n-grams, the rules and their mixtures, and the weights of the mixtures."""
    tuned, scored = texts.tuned, texts.scored
    own = [grams.nll(article) for article in scored.articles]
    known = np.concatenate([grams.nll(article) for article in tuned.articles])
    losses, weights = {}, {}
    for protocol in options.protocols:
        rules = chosen_rules(model, protocol, options.rules)
        for rule, nll in token_losses(model, tuned.articles, protocol, rules):
            weights[rule + MIXED, protocol] = tuned_weight(np.concatenate(nll), known)
        for rule, nll in token_losses(model, scored.articles, protocol, rules):
            weight = weights[rule + MIXED, protocol]
            both = [mixed(*pair, weight) for pair in zip(nll, own, strict=True)]
            losses[column_name(rule, protocol)] = scored.word_losses(nll)
            losses[column_name(rule + MIXED, protocol)] = scored.word_losses(both)
        losses[column_name(NAME, protocol)] = scored.word_losses(own)
    return scored.table(losses), weights


# -- the table ----------------------------------------------------------------------------------


def _in_order(rules: Sequence[str]) -> list[str]:
    """Each rule before its mixture, the n-grams behind static."""
    plain = [rule for rule in rules if rule != NAME and not rule.endswith(MIXED)]
    pairs = [[rule, rule + MIXED] for rule in plain]
    return [pairs[0][0], NAME, *pairs[0][1:], *(rule for pair in pairs[1:] for rule in pair)]


def rows_of(
    table: LossTable,
    weights: dict[tuple[str, str], float],
    size: int,
    resamples: int = RESAMPLES,
) -> list[dict[str, Any]]:
    """The table: a mixture's gains are over static, and over static mixed in the same way.

    Args:
        size: bytes of the text.
    """
    rows = []
    for protocol in [p for p in PROTOCOLS if table.rules(p)]:
        rules = _in_order(table.rules(protocol))
        gains = {over: Gains(table, protocol, resamples, over) for over in (STATIC, STATIC + MIXED)}
        for rule in rules:
            loss = table.loss(rule, protocol)
            row: dict[str, Any] = {"protocol": protocol, "rule": title(rule)}
            row["weight"] = weights.get((rule, protocol))
            row["word perplexity"] = perplexity(float(loss.sum()), len(loss))
            row["bits per byte"] = float(loss.sum()) / math.log(2) / size
            ending = MIXED if rule.endswith(MIXED) else ""
            if rule != STATIC:
                row |= _as("gain", gains[STATIC].more(rule, None))
            if ending and rule != STATIC + MIXED:
                row |= _as("over the mixture", gains[STATIC + MIXED].more(rule, None))
            base, rival = rule.removesuffix(MIXED), RIVAL + ending
            if base.removesuffix(CACHE) in LEARNED and rival in rules:
                rival = RIVAL + CACHE * base.endswith(CACHE) + ending
                if rival in rules:
                    row |= _as("times RMS", gains[STATIC + ending].ratio(rule, rival))
            rows.append(row)
    return rows


def _as(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """A number and its interval under this name."""
    return {name: found["found"], f"{name} interval": found["found interval"]}


def main() -> None:
    """Count, tune, read, write."""
    options = tyro.cli(Options, description=__doc__)
    model = mlm.load(options.model, threads=options.threads)
    texts = open_texts(model, options)
    for protocol in options.protocols:  # one that has no settings is refused before the work
        for rule in chosen_rules(model, protocol, options.rules):
            model.ready(rule, protocol)
    say(f"counting n-grams of {texts.words:,} words")
    grams = KneserNey(texts.counted, model.vocabulary.size, model.vocabulary.eos_id, options.order)
    table, weights = all_losses(model, grams, texts, options)
    write_losses(options.out / "losses.parquet", table, valid=())
    scored = texts.scored
    about: dict[str, Any] = {
        "training words": texts.words,
        "tuning words": sum(texts.tuned.words_A),
        "articles": len(scored.chosen),
        "words": len(table.word_N),
    }
    rows = rows_of(table, weights, sum(scored.bytes_A), options.resamples)
    record("kneser_ney", rows, options, **about)


if __name__ == "__main__":
    run_cli(main)
