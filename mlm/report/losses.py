"""The per-word losses of a run (`losses.parquet`): one row per word, one column per rule.

Letters: N words, A articles. A column `rms` holds the losses of rule `rms` in protocol `article`
(weights and state reset at every article), a column `rms_stream` those in protocol `stream`
(articles read one after the other, nothing reset).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlm.base.errors import UserError, command_of
from mlm.base.files import atomic_path
from mlm.base.names import CACHE, HAND_MADE, PROTOCOLS, STATIC, rule_order

_KEYS = {
    "split": pa.string(),
    "article": pa.int32(),
    "title": pa.string(),
    "position": pa.int32(),
    "word": pa.string(),
}


def column_name(rule: str, protocol: str) -> str:
    """Return the name of the loss column of `rule` in `protocol`."""
    return rule if protocol == PROTOCOLS[0] else f"{rule}_{protocol}"


def rule_and_protocol(column: str) -> tuple[str, str]:
    """Return the (rule, protocol) that the loss column `column` holds."""
    for protocol in PROTOCOLS[1:]:
        if column.endswith(f"_{protocol}"):
            return column.removesuffix(f"_{protocol}"), protocol
    return column, PROTOCOLS[0]


@dataclass(frozen=True)
class LossTable:
    """The word losses of one split, in nats, ordered by article, then position.

    `article_N` and `position_N` are integers (positions count words from 0 within an article),
    `word_N` strings (`<eos>` at a line end), `titles` maps an article's index to its title and
    `losses` a column name (see `column_name`) to N losses. Raises `UserError` if that is broken.
    """

    split: str
    article_N: np.ndarray
    position_N: np.ndarray
    word_N: np.ndarray
    titles: dict[int, str]
    losses: dict[str, np.ndarray]
    source: str = "the word losses"

    def __post_init__(self) -> None:
        words = len(self.article_N)
        if words == 0:
            raise UserError(f"{self.source}: split {self.split!r} has no words; evaluate it again")
        for name, column in (("position", self.position_N), ("word", self.word_N)):
            if len(column) != words:
                raise UserError(
                    f"{self.source}: {len(column):,} values of {name!r} for {words:,} words"
                )
        self._check_order()
        if not self.losses:
            raise UserError(
                f"{self.source}: split {self.split!r} has no loss column; run "
                f"`{command_of('evaluate')}` again"
            )
        for name, loss_N in self.losses.items():
            if len(loss_N) != words:
                raise UserError(
                    f"{self.source}: {len(loss_N):,} losses of {name!r}, {words:,} words"
                )
            bad = int(np.count_nonzero(~np.isfinite(loss_N)))
            if bad:
                raise UserError(
                    f"{self.source}: {bad:,} of {words:,} losses in column {name!r}, split "
                    f"{self.split!r}, are not finite numbers; evaluate that rule again with a "
                    "smaller step size"
                )

    def _check_order(self) -> None:
        """Articles in order, and the words of each numbered 0, 1, 2, ..."""
        step_N = np.diff(self.article_N.astype(np.int64))
        expected_N = np.arange(len(self.article_N)) - np.repeat(
            self.start_A, np.diff([*self.start_A, len(self.article_N)])
        )
        if (step_N < 0).any() or (expected_N != self.position_N).any():
            raise UserError(
                f"{self.source}: the words of split {self.split!r} are not in the order of article "
                f"and position; run `{command_of('evaluate')}` again"
            )

    @functools.cached_property
    def start_A(self) -> np.ndarray:
        """The row of each article's first word."""
        return np.flatnonzero(np.diff(self.article_N, prepend=self.article_N[0] - 1))

    @functools.cached_property
    def articles(self) -> list[int]:
        """The indices of the articles, in order."""
        return [int(index) for index in self.article_N[self.start_A]]

    @functools.cached_property
    def words_A(self) -> np.ndarray:
        """The number of words of each article."""
        return np.diff([*self.start_A, len(self.article_N)])

    @functools.cached_property
    def ordinal_N(self) -> np.ndarray:
        """For each word, its article's place among the articles present (0, 1, ... A - 1)."""
        return np.repeat(np.arange(len(self.start_A)), self.words_A)

    def title(self, article: int) -> str:
        """Return an article's title, or `article 7` with its number if it has none."""
        return self.titles.get(article) or f"article {self.number(article)}"

    def number(self, article: int) -> int:
        """Return the number that readers see of the article with index `article`: its place among
        the articles present, from 1. `KeyError` if there is none."""
        return self._place[article] + 1

    def numbered(self, number: int) -> int:
        """Return the index of the `number`-th article present, counted from 1.

        Raises:
            UserError: there is none.
        """
        if not 1 <= number <= len(self.articles):
            raise UserError(
                f"split {self.split!r} has no article {number}; its articles are numbered 1 to "
                f"{len(self.articles)}"
            )
        return self.articles[number - 1]

    @functools.cached_property
    def _place(self) -> dict[int, int]:
        """The place of every article among those present, by its index."""
        return {article: place for place, article in enumerate(self.articles)}

    def rows(self, article: int) -> slice:
        """Return the rows of the article with index `article`; `UserError` if there is none."""
        if article not in self._place:
            raise UserError(
                f"split {self.split!r} has no article with the index {article}; ask for one of "
                f"{self.articles[0]} to {self.articles[-1]}"
            )
        place = self._place[article]
        start = int(self.start_A[place])
        return slice(start, start + int(self.words_A[place]))

    def rules(self, protocol: str) -> list[str]:
        """Return the rules measured in `protocol`, known ones first."""
        pairs = [rule_and_protocol(name) for name in self.losses]
        return sorted((rule for rule, where in pairs if where == protocol), key=rule_order)

    def compared_protocols(self) -> list[str]:
        """Return the protocols with static losses and another rule's; `UserError` if none has."""
        found = [p for p in PROTOCOLS if STATIC in self.rules(p) and len(self.rules(p)) > 1]
        if not found:
            raise UserError(
                f"{self.source}: split {self.split!r} has the losses of "
                f"{', '.join(sorted(self.losses))}; pictures compare {STATIC!r} with another "
                "rule of the same protocol: evaluate both"
            )
        return found

    def loss(self, rule: str, protocol: str) -> np.ndarray:
        """Return the losses of `rule` in `protocol`, float64 (N,); `UserError` if not measured."""
        name = column_name(rule, protocol)
        if name not in self.losses:
            raise UserError(
                f"{self.source}: rule {rule!r} was not measured in protocol {protocol!r} on split "
                f"{self.split!r} (present: {', '.join(sorted(self.losses))}); evaluate it first"
            )
        return self.losses[name].astype(np.float64)

    def only(self, valid: Collection[tuple[str, str]] | None) -> LossTable | None:
        """The table with those of its columns that `valid` names, by split and name; None = all."""
        names = [n for n in self.losses if valid is None or (self.split, n) in valid]
        losses = {name: self.losses[name] for name in names}
        return dataclasses.replace(self, losses=losses) if losses else None

    @classmethod
    def load(cls, path: Path, split: str | None = None) -> LossTable:
        """Read one split of `losses.parquet` (the run's default one if `split` is None).

        Raises `UserError` if the file is missing, unreadable, lacks columns or lacks the split.
        """
        present = splits(path)
        chosen = default_split(present) if split is None else split
        if chosen not in present:
            raise UserError(
                f"{path} has no split {chosen!r}, only {', '.join(present)}; choose one of them or "
                f"run `{command_of('evaluate')}` with that split"
            )
        return cls._from_arrow(_read(path, split=chosen), chosen, str(path))

    @classmethod
    def _from_arrow(cls, table: pa.Table, split: str, source: str) -> LossTable:
        article_N = table["article"].to_numpy()
        word_N = np.array(table["word"].to_pylist(), dtype=object)
        first = np.flatnonzero(np.diff(article_N, prepend=article_N[0] - 1))
        titles = table["title"].take(pa.array(first)).to_pylist()
        losses = {}
        for name in table.column_names:
            column = table[name]
            if name not in _KEYS and column.null_count < len(column):
                losses[name] = column.to_numpy().astype(np.float32)
        return cls(
            split=split,
            article_N=article_N,
            position_N=table["position"].to_numpy(),
            word_N=word_N,
            titles={int(a): title or "" for a, title in zip(article_N[first], titles, strict=True)},
            losses=losses,
            source=source,
        )

    def to_arrow(self) -> pa.Table:
        """Return the table in the form of `losses.parquet`."""
        titles = [self.titles.get(article, "") for article in self.articles]
        columns: dict[str, pa.Array] = {
            "split": pa.repeat(pa.scalar(self.split), len(self.article_N)),
            "article": pa.array(self.article_N, pa.int32()),
            "title": pa.array(titles, pa.string()).take(pa.array(self.ordinal_N)),
            "position": pa.array(self.position_N, pa.int32()),
            "word": pa.array(self.word_N, pa.string()),
        }
        for name, loss_N in self.losses.items():
            columns[name] = pa.array(loss_N.astype(np.float32), pa.float32())
        return pa.table(columns)


def default_split(present: list[str]) -> str:
    """Return the split that pictures show when none is asked for: `valid`, else the first."""
    return "valid" if "valid" in present else present[0]


def opening_pairs(table: LossTable, protocol: str) -> list[tuple[str, str]]:
    """Return the pairs (rule, against) that a reader should see first.

    The learned rule with the lowest loss against static, then against its best rival, a rule that
    nobody trained. Without a learned rule: the best of the others against static.
    """
    loss = {rule: float(table.loss(rule, protocol).sum()) for rule in table.rules(protocol)}
    adapted = sorted((rule for rule in loss if rule != STATIC), key=loss.__getitem__)
    rivals = [rule for rule in adapted if rule.removesuffix(CACHE) in (STATIC, *HAND_MADE)]
    learned = [rule for rule in adapted if rule not in rivals]
    if not learned:
        return [(adapted[0], STATIC)]
    return [(learned[0], STATIC), *((learned[0], rival) for rival in rivals[:1])]


def compared(
    table: LossTable, protocol: str, pair: tuple[str | None, str | None]
) -> tuple[str, str]:
    """The rule to show and the one it is compared with: those asked for, else the first of
    `opening_pairs`.

    Raises:
        UserError: one was not measured, or it is compared with itself.
    """
    known = table.rules(protocol)
    for flag, asked in zip(("--rule", "--against"), pair, strict=True):
        if asked is not None and asked not in known:
            raise UserError(
                f"{flag} {asked} was not measured in protocol {protocol}; choose from "
                f"{', '.join(known)}"
            )
    first, second = opening_pairs(table, protocol)[0]
    rule, against = pair[0] or first, pair[1] or second
    if rule == against:
        raise UserError(f"--rule {rule} is compared with itself; choose another --against")
    return rule, against


def splits(path: Path) -> list[str]:
    """Return the splits in a `losses.parquet`, sorted; `UserError` if it cannot be read."""
    present = sorted(_read(path, columns=["split"])["split"].unique().to_pylist())
    if not present:
        raise UserError(
            f"{path} has no rows; run `{command_of('evaluate')}` on this run folder again"
        )
    return present


def write_losses(
    path: Path, table: LossTable, valid: Collection[tuple[str, str]] | None = None
) -> LossTable:
    """Write one split into `losses.parquet`, atomically; return the split as it now stands.

    `valid` names the columns there that may stay, by split and name; None = all.

    Other splits in the file stay. Rows of the same split are replaced; columns of rules that were
    not measured again stay too, provided that the text and the static losses are unchanged (the
    same model read it). A file that cannot be read is replaced.
    """
    kept: list[pa.Table] = []
    if path.exists():
        try:
            for split in splits(path):
                old = LossTable.load(path, split).only(valid)
                if split != table.split and old is not None:
                    kept.append(old.to_arrow())
                elif old is not None:
                    table = _with_old_columns(table, old)
        except UserError:
            kept = []
    kept.append(table.to_arrow())
    kept.sort(key=lambda part: part["split"][0].as_py())
    whole = pa.concat_tables(kept, promote_options="default")
    place = whole.column_names.index("title")  # titles repeat: a dictionary for readers too
    titles = whole["title"].combine_chunks().dictionary_encode()
    whole = whole.set_column(place, "title", titles)
    # Open files: Arrow takes no paths that are not UTF-8 in the locale at hand.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pq.write_table(whole, file, compression="zstd")
    return table


def _with_old_columns(new: LossTable, old: LossTable) -> LossTable:
    """Add to `new` the columns only `old` has, if the same model read the same text."""
    if len(new.word_N) != len(old.word_N) or (new.word_N != old.word_N).any():
        return new
    shared = [
        name for name in new.losses if rule_and_protocol(name)[0] == STATIC and name in old.losses
    ]
    # Static losses are the model's fingerprint; 1e-3 nats allows for another device or lane count.
    same_model = bool(shared) and all(
        np.abs(new.losses[name] - old.losses[name]).mean() < 1e-3 for name in shared
    )
    if not same_model:
        return new
    losses = {**{k: v for k, v in old.losses.items() if k not in new.losses}, **new.losses}
    return LossTable(
        new.split, new.article_N, new.position_N, new.word_N, new.titles, losses, new.source
    )


def _read(path: Path, *, split: str | None = None, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of a split (all if None), checking the columns; raise `UserError`s."""
    if not path.is_file():
        raise UserError(
            f"{path} not found; run `{command_of('evaluate')}` on this run folder first"
        )
    try:
        with open(path, "rb") as file:
            schema = pq.read_schema(file)
        missing = [name for name in _KEYS if name not in schema.names]
        if missing:
            raise UserError(
                f"{path} lacks the column(s) {', '.join(missing)}, so it is not a table of word "
                f"losses; run `{command_of('evaluate')}` on this run folder again"
            )
        filters = None if split is None else [("split", "=", split)]
        with open(path, "rb") as file:
            table = pq.read_table(file, columns=columns, filters=filters)
        for name in set(_KEYS) & set(table.column_names):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(_KEYS[name]))
        for name in set(table.column_names) - set(_KEYS):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(pa.float32()))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); it is damaged or not a "
            f"table of word losses: delete it and run `{command_of('evaluate')}` again"
        ) from error
    return table
