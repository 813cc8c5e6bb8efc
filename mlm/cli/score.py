"""Score any text: mlm score README.md [--rules best rms] [--out words.parquet] [--help]"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlm.base.errors import UserError
from mlm.base.names import check_rules
from mlm.cli.flags import options_of
from mlm.cli.inputs import Source, compiled, open_sources

if TYPE_CHECKING:
    import pyarrow as pa

    from mlm.reader import DocumentReader, TrainedModel
    from mlm.reader.outputs import Write
    from mlm.spelling import Word

HELP = """\
usage: {script} [FILE ...] [FLAGS]

Score every word of a text, as people write it, by a model that learns while it reads. A word is
scored before the model learns from it. Without FILE, or for -, standard input is read.

examples:
  {script} README.md
  {script} chapter1.txt chapter2.txt --protocol stream --out words.parquet
  {script} wiki.txt --split-on "^ = [^=]" --rules best rms --page words.html
  fortune | {script} --nc words.txt
"""

BATCH = 1 << 20
"""Characters of documents that lanes read side by side; a longer document is read alone."""


@dataclass(frozen=True)
class Options:
    """What `mlm score` asks for."""

    files: tuple[str, ...] = ()
    """Text files in UTF-8, plain or .xz .gz .zst."""
    model: str = "wikipedia-small"
    """A released model, a run folder, or a model on the hub, such as user/name."""
    rules: tuple[str, ...] = ("best",)
    """Rules that read; the first is the main one. Static is always there."""
    protocol: Literal["article", "stream"] = "article"
    """Whether every document starts anew, or goes on where the last one ended."""
    form: Literal["auto", "plain", "wrapped", "wikitext", "markdown"] = "auto"
    """How the text is written; auto finds out for each file."""
    split_on: str | None = None
    """A regular expression: a line in which it is found begins a document."""
    out: Path | None = None
    """All columns, one row per word: a .parquet or .tsv file."""
    nc: Path | None = None
    """The words as the program neural-complexity prints them."""
    page: Path | None = None
    """An .html page of the words in colours: what reading gained on each."""
    stats: tuple[Literal["entropy", "rank", "top_k"], ...] = ()
    """Further columns, of the prediction of each word's first piece."""
    units: Literal["bits", "nats"] = "bits"
    """Of losses."""
    memory: Path | None = None
    """Start from this memory, which --save-memory wrote."""
    save_memory: Path | None = None
    """Write what has been learned at the end of the text."""
    frozen: bool = False
    """Learn nothing any more; for --memory."""
    lanes: int | None = None
    """So many documents are read side by side; by default 16, or as many as memory holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int = 0
    """CPU threads; 0 = chosen by the model's size."""


def main() -> None:
    """Parse the command line, check all texts, read them, print the summary."""
    options = options_of(HELP, Options(), ("files",))
    if options is None:
        return
    _check(options)
    sources = open_sources(options.files, options.form, compiled(options.split_on))
    _check_texts(options, sources)
    score_texts(options, sources)


def _check(options: Options) -> None:
    """Refuse what does not fit together.

    Raises:
        UserError: a flag's value.
    """
    from mlm.reader.outputs import check_output

    for path, suffixes, flag in (
        (options.out, (".parquet", ".tsv"), "--out"),
        (options.page, (".html",), "--page"),
        (options.nc, (".txt", ".tsv"), "--nc"),
    ):
        if path is not None:
            check_output(path, suffixes, flag)
    outputs = [p.resolve() for p in (options.out, options.nc, options.page) if p is not None]
    outputs += [options.save_memory.resolve()] if options.save_memory else []
    inputs = [Path(name).resolve() for name in options.files if name != "-"]
    twice = [path for path, count in Counter(outputs).items() if count > 1 or path in inputs]
    if twice:
        raise UserError(f"{twice[0]} is written here and named twice; choose another name")
    if options.frozen and options.memory is None:
        raise UserError(
            "--frozen learns nothing, so it needs something learned before: add --memory FILE, "
            "or use --rules static"
        )
    if options.frozen and options.save_memory:
        raise UserError("--frozen learns nothing, so there is nothing for --save-memory to write")
    check_rules(options.rules, ". Files to read come before --rules")
    if options.page is not None and options.rules[0] == "static":
        raise UserError("--page compares the main rule with static; name another rule first")


def _check_texts(options: Options, sources: Sequence[Source]) -> None:
    """Refuse texts that cannot be read in this way.

    Raises:
        UserError: what must be read on is of two forms, or has two ends.
    """
    forms = sorted({source.form for source in sources})
    if options.protocol == "stream" and len(forms) > 1:
        raise UserError(
            f"--protocol stream reads all texts as one, but their forms are {', '.join(forms)}; "
            "name one with --form"
        )
    if (
        options.save_memory
        and options.protocol == "article"
        and sum(source.documents for source in sources) > 1
    ):
        raise UserError(
            "--save-memory: several documents, each of which is forgotten at its end; use "
            "--protocol stream to learn from all of them"
        )


def score_texts(options: Options, sources: Sequence[Source]) -> None:
    """Read the texts, write files as rows come, print the summary."""
    from mlm.reader import load
    from mlm.reader.summary import Summary

    model = load(options.model, device=options.device, threads=options.threads)
    rules = model.resolved(options.rules)
    summary, titles = Summary(rules[0], rules[1:]), dict[int, str]()
    with contextlib.ExitStack() as stack:
        writers = [summary.add, *_writers(options, rules[0], titles, stack)]
        reading = Reading(model, rules, options, writers, titles)
        reading.bar = stack.enter_context(_bar(sum(source.size for source in sources)))
        for source in sources:
            reading.read(source)
        reading.finish()
        reading.save()
    for line in _head(options, model, sources):
        print(line)
    for line in summary.lines(reading.size, options.units):
        print(line)
    if model.vocabulary.kind == "word":
        share = 100 * reading.unknown / max(1, summary.words)
        print(f"\nunknown words (outside the vocabulary): {reading.unknown:,}, {share:.2f} %")
        if reading.unknown:
            print("each costs its token and its spelling, log2 257 bits for every byte and one end")
    for path in (options.out, options.nc, options.page, options.save_memory):
        if path is not None:
            print(path)


def _head(options: Options, model: TrainedModel, sources: Sequence[Source]) -> list[str]:
    """What was read, and how."""
    forms: dict[str, list[str]] = {}
    for source in sources:
        forms.setdefault(source.form, []).append(source.name)
    how = "guessed; --form sets it" if options.form == "auto" else "as asked for"
    memory = f", memory {options.memory}" if options.memory else ""
    frozen = ", frozen" if options.frozen else ""
    lines = [f"model {model.name}, protocol {options.protocol}{memory}{frozen}"]
    for form, names in forms.items():
        shown = names[0] if len(names) == 1 else f"{len(names)} files"
        lines.append(f"{shown}: form {form} ({how})")
    return lines


def _bar(size: int) -> Any:
    """A progress bar over so many bytes, on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=size,
        desc="reading",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )


def _writers(
    options: Options, rule: str, titles: dict[int, str], stack: contextlib.ExitStack
) -> list[Write]:
    """What writes the files asked for."""
    from mlm.reader.outputs import neural_complexity_file, page_file, table_file

    found = []
    if options.out is not None:
        found.append(stack.enter_context(table_file(options.out, options.units)))
    if options.nc is not None:
        found.append(stack.enter_context(neural_complexity_file(options.nc)))
    if options.page is not None:
        page = page_file(options.page, rule, options.protocol, titles)
        found.append(stack.enter_context(page))
    return found


class Reading:
    """Documents on their way through a model: one after the other, or side by side.

    Rows go to every writer in the order of the texts; documents are numbered through all of them.
    """

    def __init__(
        self,
        model: TrainedModel,
        rules: Sequence[str],
        options: Options,
        writers: Sequence[Write],
        titles: dict[int, str],
    ) -> None:
        """`titles` is filled with the documents' names."""
        stats = tuple(dict.fromkeys([*options.stats, *(["entropy"] if options.nc else [])]))
        self.model, self.options, self.writers, self.titles = model, options, writers, titles
        self.how: dict[str, Any] = {
            "rule": rules[0],
            "also": tuple(rules[1:]),
            "protocol": options.protocol,
            "stats": stats,
        }
        self.bar: Any = None
        self.size = 0
        """UTF-8 bytes of what was read, in canonical spelling."""
        self.unknown = 0
        """Words outside the vocabulary."""
        self._documents = 0  # whose rows have been written
        self._held: list[str] = []
        self._form: Any = None
        self._readers: dict[str, DocumentReader] = {}
        alone = options.protocol == "stream" or options.memory or options.save_memory
        self._side_by_side = not alone and options.lanes != 1

    def read(self, source: Source) -> None:
        """Read a text; short documents may be held back until there are enough of them."""
        if source.form != self._form:
            self.finish()
        self._form = source.form
        several = source.documents > 1
        for number, chunks in enumerate(source.read(), 1):
            title = f"{source.name}, {number}" if several else source.name
            self.titles[self._documents + len(self._held)] = title
            self._document(self._counted(chunks))

    def _document(self, chunks: Iterator[str]) -> None:
        """Hold a short document back, read a long one."""
        start, length = list[str](), 0
        if self._side_by_side:
            for chunk in chunks:
                start.append(chunk)
                length += len(chunk)
                if length >= BATCH:
                    break
            else:
                self._held.append("".join(start))
                if sum(map(len, self._held)) >= BATCH:
                    self.finish()
                return
            self.finish()
        reader = self._reader()
        for chunk in itertools.chain(start, chunks):
            self._write(reader.read(chunk), alone=True)
            self.bar.update(len(chunk.encode()))
        self._write(reader.finish(), alone=True)
        self._documents += 1

    def finish(self) -> None:
        """Read the documents that are held back, side by side."""
        if not self._held:
            return
        texts, self._held = self._held, []
        lanes = self.options.lanes
        self._write(self.model.score_many(texts, lanes=lanes, form=self._form, **self.how))
        self._documents += len(texts)
        self.bar.update(sum(len(text.encode()) for text in texts))

    def save(self) -> None:
        """Write what has been learned, if that was asked for."""
        if self.options.save_memory:
            self._reader().save(self.options.save_memory)

    def _reader(self) -> DocumentReader:
        """The reader of texts of the present form."""
        if self._form not in self._readers:
            memory = self.options.memory
            reader = self.model.reader(form=self._form, memory=memory, **self.how)
            self._readers[self._form] = reader.freeze() if self.options.frozen else reader
        return self._readers[self._form]

    def _counted(self, chunks: Iterator[str]) -> Iterator[str]:
        """A document's chunks; their words and bytes are counted as they pass."""
        from mlm.spelling import WordFeed

        feed = WordFeed(self._form)
        for chunk in chunks:
            self._count(feed.read(chunk))
            yield chunk
        self._count(feed.finish())
        self.size += feed.canonical_bytes

    def _count(self, words: Sequence[Word]) -> None:
        from mlm.reader.reader import spell

        vocabulary = self.model.vocabulary
        if vocabulary.kind == "word":
            costs = (spell(word, vocabulary, self._form == "wikitext")[1] for word in words)
            self.unknown += sum(any(cost) for cost in costs)

    def _write(self, table: pa.Table, alone: bool = False) -> None:
        """Hand on rows: of one document read `alone`, or of documents numbered from 0."""
        import pyarrow as pa

        if not table.num_rows:
            return
        place = table.schema.get_field_index("doc_id")
        field = table.schema.field(place)
        numbers = table["doc_id"].to_numpy() * (not alone) + self._documents
        table = table.set_column(place, field, pa.array(numbers, field.type))
        for write in self.writers:
            write(table)
