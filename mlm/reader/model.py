"""A trained model, ready to read any text: `load`, `TrainedModel`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch

from mlm.base.errors import UserError
from mlm.base.names import BEST, CACHE, LEARNED, PROTOCOLS, STATIC, check_rules, rule_order
from mlm.base.terminal import note
from mlm.kernels import buffers
from mlm.kernels.switches import Switches, computing
from mlm.reader.hub import HubModel
from mlm.reader.reader import DocumentReader, spell
from mlm.reader.tracks import Track
from mlm.reader.words import MAIN, STATS, Batch, Prices, column, rows, schema
from mlm.reading.lanes import Details, lanes_under
from mlm.reading.needs import reading_bytes
from mlm.reading.scoring import Scores, Wanted, busy_segments, score_protocol
from mlm.runs.machine import SHARE, free_bytes
from mlm.runs.rules import Ready, ready_rule, ready_rules
from mlm.runs.run import Run, choose_device, threads_of
from mlm.settings.config import Config
from mlm.spelling import FORMS, Word, WordFeed
from mlm.store.released import find_model
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_about, load_tensors
from mlm.text.streams import LaneStream, Segment
from mlm.text.vocabulary import Vocabulary

KEPT = 4
"""Rules that stay ready, those asked for last: one may take as much memory as some lanes."""
MOST_LANES = 16
"""Documents that are read side by side unless more are asked for."""
Form = Literal["plain", "wrapped", "wikitext", "markdown"]
Protocol = Literal["article", "stream"]


class _Text(NamedTuple):
    """A document as words and tokens."""

    words: list[Word]
    first: np.ndarray
    tokens: np.ndarray
    costs: np.ndarray


class TrainedModel(HubModel):
    """A language model and the rules that rewrite its weights while it reads.

    Products are float32 and kernels compiled, whatever the process has set, so that the same text
    gets the same numbers.
    """

    def __init__(self, run: Run, name: str, how: Switches | None = None) -> None:
        """Called by `load`; `how` to compute, where it is not to be as said above."""
        self.name, self._run, self.folder = name, run, run.folder.path
        self.switches = how or Switches(threads=threads_of(run.config, first=False))
        self._ready = lru_cache(KEPT)(self._make_ready)

    @classmethod
    def load_folder(
        cls,
        folder: Path,
        name: str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int = 0,
        **how: Any,
    ) -> Self:
        """The model of a run folder or a released model; see `load`.

        Raises:
            UserError: `how` holds anything.
        """
        if how:
            raise UserError(f"no such setting of a model to load: {', '.join(how)}")
        config = RunFolder(folder).load_config()
        threads = threads or config.threads
        config = dataclasses.replace(
            config, out=folder, stages=("evaluate",), device=device, threads=threads
        )
        run = Run(config, RunFolder(folder), choose_device(device), quiet=True)
        return cls(run, name or folder.name)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        """The settings that it was trained with."""
        return self._run.config

    @property
    def vocabulary(self) -> Vocabulary:
        """Words <-> tokens."""
        return self._run.vocabulary

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """theta_0, the trained weights by name."""
        return self._run.base.weights

    @property
    def segment(self) -> int:
        """M: tokens between two updates."""
        return self._run.base.segment

    @cached_property
    def rules(self) -> tuple[str, ...]:
        """The rules that it can read with at once, in any protocol: static, tuned and trained."""
        ready = {rule for protocol in PROTOCOLS for rule in self.rules_in(protocol)}
        return tuple(sorted(ready, key=rule_order))

    def rules_in(self, protocol: str) -> tuple[str, ...]:
        """Those of `rules` that can read in this protocol."""
        return tuple(ready_rules(self._run, protocol))

    @cached_property
    def best(self) -> str:
        """The learned rule that gained most on validation.

        Raises:
            UserError: none was trained.
        """
        gains = {}
        for name in self.rules:
            if name in LEARNED:
                about = load_about(self._run.folder.checkpoint(name), "train it first")
                gains[name] = float(about.get("gain", 0.0))
        if not gains:
            raise UserError(
                f"{self.name} holds no learned rule; train one (`--stages meta`), or name another "
                f"of {', '.join(self.rules)}"
            )
        return max(gains, key=lambda name: gains[name])

    def resolved(self, rules: Sequence[str]) -> list[str]:
        """The rules of these names, each once; `best` is the best learned one.

        Raises:
            UserError: no such rule.
        """
        check_rules(rules)
        found = (
            self.best + rule.removeprefix(BEST) if rule.removesuffix(CACHE) == BEST else rule
            for rule in rules
        )
        return list(dict.fromkeys(found))

    # -- reading ------------------------------------------------------------------------------

    def reader(
        self,
        rule: str = BEST,
        also: Sequence[str] = (),
        protocol: Protocol = "article",
        form: Form = "plain",
        memory: str | Path | None = None,
        stats: Sequence[str] = (),
    ) -> DocumentReader:
        """A reader that has read nothing.

        Args:
            rule: of the column `surprisal`: `static`, `rms`, ..., a learned rule, or `best`; each
                also with `+cache`.
            also: further rules, each with a column of its own.
            protocol: article = every document begins with the trained weights, or with `memory`;
                stream = with what the last one left.
            form: how the text is written (`mlm.spelling.FORMS`).
            memory: a file that `DocumentReader.save` wrote.
            stats: of entropy, rank and top_k, columns besides.

        Raises:
            UserError: no such rule, protocol, form or column; a memory of another model or rule.
        """
        names, about = self._asked(rule, also, protocol, form, stats)
        tracks = {c: self.track(name, protocol, 1) for c, name in names.items()}
        if memory is not None:
            self._remember(Path(memory), tracks, names, about)
        of = schema(list(names.values()), stats, about)
        return DocumentReader(
            tracks,
            self.vocabulary,
            of,
            about,
            self.segment,
            self.switches,
            protocol == "stream",
            self.vocabulary.pieces,
        )

    def score_many(
        self,
        texts: Sequence[str],
        rule: str = BEST,
        also: Sequence[str] = (),
        lanes: int | None = None,
        protocol: Protocol = "article",
        form: Form = "plain",
        stats: Sequence[str] = (),
    ) -> Any:
        """An Arrow table of all words of these texts, one document each.

        The same as reading them one by one, to rounding, but faster: in protocol `article`
        documents are read side by side.

        Args:
            texts: the documents.
            rule, also, protocol, form, stats: as in `reader`.
            lanes: so many documents side by side, whatever memory they need; None = 16, or as
                many as fit three quarters of the memory that is free, which a note then says.

        Raises:
            UserError: as in `reader`; fewer lanes than one.
        """
        _check_lanes(lanes)
        if protocol == "stream":
            reader = self.reader(rule, also, protocol, form, stats=stats)
            return pa.concat_tables(reader.score(text) for text in texts)
        names, about = self._asked(rule, also, protocol, form, stats)
        of = schema(list(names.values()), stats, about)
        documents = [self._encoded(text, form) for text in texts]
        lanes = lanes or self._lanes_that_fit(
            [*names.values()], [document.tokens for document in documents], full=True
        )
        with computing(self.switches):
            found = list(self._read_many(documents, names, lanes, bool(stats)))
        buffers.clear()
        tables = []
        for number, (text, prices, after, details) in enumerate(found):
            if not text.words:
                continue
            batch = Batch(number, 0, text.words, text.first, len(text.tokens))
            tables.append(rows(of, batch, prices, after, details, self.vocabulary.pieces))
        return pa.concat_tables([of.empty_table(), *tables])

    def _asked(
        self, rule: str, also: Sequence[str], protocol: str, form: str, stats: Sequence[str]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Rules by column, and what the tables say of themselves."""
        choices = (
            ("protocol", [protocol], PROTOCOLS),
            ("form", [form], FORMS),
            ("stats", stats, STATS),
        )
        for what, given, known in choices:
            odd = [word for word in given if word not in known]
            if odd:
                raise UserError(f"{what} {odd[0]!r}: choose from {', '.join(known)}")
        main, *more = self.resolved([rule, *also])
        others = [STATIC, *more] if main != STATIC else more
        names = {MAIN: main, **{column(name): name for name in others if name != main}}
        about = {
            "model": self.name,
            "vocabulary": self.vocabulary.hash,
            "rule": main,
            "protocol": protocol,
            "form": form,
            "first word": "predicted from a line end",
        }
        return names, about

    def ready(self, name: str, protocol: str) -> Ready:
        """The rule of this name, tuned or loaded, with its neural cache.

        Raises:
            UserError: it is neither, or its file is damaged.
        """
        with computing(self.switches):
            return self._ready(name, protocol)

    def _make_ready(self, name: str, protocol: str) -> Ready:
        plain = name.removesuffix(CACHE)
        known = self._ready(plain, protocol) if plain != name else None
        return ready_rule(self._run, name, protocol, known)

    def _lanes_that_fit(
        self, rules: Sequence[str], articles: Sequence[np.ndarray], full: bool
    ) -> int:
        """How many articles these rules read side by side; `full`: with all log-probabilities.

        `MOST_LANES`, or as many as three quarters of the free memory hold, with a note.
        """
        ready = [self.ready(rule, "article") for rule in rules]
        free, lengths = free_bytes(self._run.device), [len(a) for a in articles if len(a)]
        most = fit = min(MOST_LANES, max(1, len(lengths)))
        longest = max(lengths, default=0)

        def needed(lanes: int) -> float:
            return sum(
                reading_bytes(one.base, one.bound, one.cache, lanes, longest, full) for one in ready
            )

        with computing(self.switches):
            while free is not None and fit > 1 and needed(fit) > SHARE * free:
                fit -= 1
        if fit < most:
            note(
                f"{fit} documents side by side instead of {most}, which need more than three "
                "quarters of the free memory; results are the same"
            )
        return fit

    def losses(
        self,
        articles: Sequence[np.ndarray],
        rule: str = BEST,
        protocol: Protocol = "article",
        lanes: int | None = None,
        title: str | None = None,
        wanted: Wanted | None = None,
    ) -> Scores:
        """Losses of all tokens of these articles: what `evaluate.py` makes its tables of.

        Args:
            articles: tokens of each (`vocabulary.encode_article`).
            rule, protocol: as in `reader`. A rule with a cache has its losses in `cached[0]`, and
                beside them those without.
            lanes: articles read side by side, as in `score_many`; results do not depend on it.
            title: of a progress bar, if there is to be one.
            wanted: tokens of which more than the loss is wanted.
        """
        _check_lanes(lanes)
        (rule,) = self.resolved([rule])
        base, bound, cache, _ = self.ready(rule, protocol)
        if protocol == "stream":
            lanes = 1
        lanes = lanes or self._lanes_that_fit([rule], articles, full=wanted is not None)
        more = (articles, self.vocabulary.eos_id, protocol, lanes, title, cache, wanted)
        with computing(self.switches):
            return score_protocol(base, bound, *more)

    def track(self, name: str, protocol: str, lanes: int) -> Track:
        """Lanes that read under a rule, from where documents begin."""
        base, bound, cache, _ = self.ready(name, protocol)
        with computing(self.switches):
            own = lanes_under(base.for_protocol(protocol), bound, lanes)
            starts = torch.from_numpy(self.vocabulary.starts_word).to(self._run.device)
            return Track(own, cache, starts)

    def _remember(
        self,
        path: Path,
        tracks: Mapping[str, Track],
        names: Mapping[str, str],
        about: dict[str, Any],
    ) -> None:
        """Let the rules of these `names` begin with what a file holds of their columns."""
        tensors, found = load_tensors(path, "give a file that a reader has saved")
        of = found.get("memory")
        if not isinstance(of, dict):
            raise UserError(f"{path} is no memory; give a file that a reader has saved")
        if of.get("vocabulary") != about["vocabulary"]:
            raise UserError(f"{path} was saved with another model ({of.get('model')})")
        for name, track in tracks.items():
            rule = of.get("rule") if name == MAIN else None
            if rule is not None and rule != about["rule"]:
                raise UserError(
                    f"{path} holds what rule {rule} learned, but the rule asked for is "
                    f"{about['rule']}; ask for {rule}"
                )
            start = f"{name}/"
            own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            if not own and names[name].removesuffix(CACHE) != STATIC:
                raise UserError(
                    f"{path} holds nothing that rule {names[name]} learned; leave it out, or "
                    "save a memory with it"
                )
            track.remember(own)

    # -- many at a time -----------------------------------------------------------------------

    def _encoded(self, text: str, form: str) -> _Text:
        feed = WordFeed(form)
        words = [*feed.read(text), *feed.finish()]
        first: list[int] = []
        tokens: list[int] = []
        costs: list[float] = []
        for word in words:
            first.append(len(tokens))
            own, more = spell(word, self.vocabulary, form == "wikitext")
            tokens += own
            costs += more
        return _Text(words, np.array(first, np.int64), np.array(tokens, np.int64), np.array(costs))

    def _read_many(
        self, documents: Sequence[_Text], names: Mapping[str, str], lanes: int, wanted: bool
    ) -> Iterator[tuple[_Text, dict[str, Prices], dict[str, float], Details | None]]:
        """Every document with what the rules say of its pieces, and behind them."""
        articles = [text.tokens for text in documents]
        number = min(lanes, sum(len(a) > 0 for a in articles))
        eos = self.vocabulary.eos_id
        prices = [
            {c: Prices(text.costs.copy(), np.zeros(len(text.tokens))) for c in names}
            for text in documents
        ]
        after = [dict.fromkeys(names, 0.0) for _ in documents]
        details: list[list[Details]] = [[] for _ in documents]
        tracks = {c: self.track(n, "article", number) for c, n in names.items()} if number else {}
        device = self._run.device
        stream = LaneStream(articles, number, self.segment, eos) if number else None
        for raw, keep in busy_segments(stream) if stream else ():
            if keep is not None:
                for track in tracks.values():
                    track.select(keep.to(device))
            counts = raw.mask.sum(1).tolist()
            ended = raw.start + counts == [len(articles[a]) for a in raw.article]
            inner = [lane for lane in np.flatnonzero(ended) if counts[lane] < self.segment]
            for lane in inner:  # what follows the last piece is predicted in its segment
                raw.inputs[lane, counts[lane]] = raw.targets[lane, counts[lane] - 1]
            outer = [lane for lane in np.flatnonzero(ended) if counts[lane] == self.segment]
            segment = raw.to(device)
            for k, (name, track) in enumerate(tracks.items()):
                said = track.read(segment, details=wanted and k == 0)
                for lane, count in enumerate(counts):
                    a, at = raw.article[lane], raw.start[lane]
                    prices[a][name].nll[at : at + count] += said.nll[lane, :count]
                    prices[a][name].boundary[at : at + count] = said.boundary[lane, :count]
                    if said.details is not None:
                        details[a].append(Details(*(p[:count] for p in said.details[lane])))
                for lane in inner:
                    after[raw.article[lane]][name] = said.boundary[lane, counts[lane]]
                if outer:
                    log_p = track.ahead(_behind(segment))[:, 0, track.starts_word]
                    behind = -log_p.double().logsumexp(1)
                    for lane in outer:
                        after[raw.article[lane]][name] = float(behind[lane])
        for text, price, end, parts in zip(documents, prices, after, details, strict=True):
            joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
            yield text, price, end, Details(*joined) if joined else None


def _check_lanes(lanes: int | None) -> None:
    if lanes is not None and lanes < 1:
        raise UserError(f"lanes {lanes}: give at least 1")


def _behind(segment: Segment) -> Segment:
    """One token more than a full segment, which does not count."""
    last = segment.targets[:, -1:]
    none, new = torch.zeros_like(last, dtype=torch.bool), torch.zeros_like(segment.new)
    return segment._replace(inputs=last, targets=last, mask=none, new=new)


def load(
    name: str | Path,
    revision: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
) -> TrainedModel:
    """A trained model.

    Args:
        name: a released model such as `wikipedia-small`, the folder of a finished run such as
            `runs/pydocs`, or a hub id such as `user/name`.
        revision: of a hub id: a branch, a tag or a commit.
        device: where to compute.
        threads: CPU threads of reading; 0 = as the model's settings say, else PyTorch's choice.

    Raises:
        UserError: no such model, or its files are damaged.
    """
    folder = find_model(name, revision)
    return TrainedModel.load_folder(folder, name=str(name), device=device, threads=threads)
