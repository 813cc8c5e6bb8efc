"""WikiText as the Hugging Face hub holds it: fetched, from its caches, or a local directory."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from mlm.base.errors import UserError
from mlm.text.articles import (
    SPLIT_WORDS,
    Article,
    check_split,
    file_hash,
    safe_name,
    split_articles,
)

HUB_REPOSITORY = "Salesforce/wikitext"


HUB_CONFIGS = {
    "wikitext-2": "wikitext-2-v1",
    "wikitext-103": "wikitext-103-v1",
    "wikitext-2-raw": "wikitext-2-raw-v1",
    "wikitext-103-raw": "wikitext-103-raw-v1",
}


_PROBE_SECONDS = 5.0


_ROWS = 1000  # rows held in memory at once


def parquet_directory(path: Path) -> Path | None:
    """Directory with `train-*.parquet` files: `path` or the one configuration inside it."""
    if any(path.glob("*-*.parquet")):
        return path
    found = sorted({table.parent for table in path.glob("*/*-*.parquet")})
    if len(found) > 1:
        raise UserError(
            f"directory {path} holds several configurations: "
            f"{', '.join(d.name for d in found)}. Name one, such as {found[0]}"
        )
    return found[0] if found else None


def _text_rows(dataset: Any, where: str) -> Iterator[str]:
    """Rows of the column `text`, a thousand at a time."""
    for batch in dataset.iter(batch_size=_ROWS):
        if "text" not in batch:
            raise UserError(f"{where}: no column 'text'; is it {HUB_REPOSITORY} or laid out as it?")
        yield from batch["text"]


class ParquetDirectory:
    """A local directory in the hub's layout: `train-*.parquet`, `validation-*`, `test-*`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = safe_name(directory.resolve().name).removesuffix("-v1")

    def _files(self, split: str) -> list[Path]:
        check_split(split)
        words = SPLIT_WORDS[split]
        files = sorted(p for word in words for p in self.directory.glob(f"{word}-*.parquet"))
        if not files:
            raise UserError(
                f"directory {self.directory} has no {split} split: looked for "
                f"{' or '.join(word + '-*.parquet' for word in words)}. Fetch the whole directory"
            )
        return files

    def articles(self, split: str) -> Iterator[Article]:
        files = self._files(split)
        return split_articles(self._rows(files), f"{self.directory} ({split})")

    def _rows(self, files: list[Path]) -> Iterator[str]:
        import pyarrow.parquet as parquet

        for path in files:
            try:
                # Opened here: Arrow encodes names as UTF-8, whatever the file system says.
                with open(path, "rb") as file, parquet.ParquetFile(file) as table:
                    if "text" not in table.schema_arrow.names:
                        raise ValueError(f"columns {table.schema_arrow.names}")
                    for batch in table.iter_batches(batch_size=_ROWS, columns=["text"]):
                        yield from batch.column(0).to_pylist()
            except (OSError, ValueError, IndexError) as error:
                raise UserError(
                    f"{path} is not a readable parquet file with a column 'text' ({error}). "
                    "Fetch it again"
                ) from None

    def fingerprint(self, split: str) -> str:
        return "-".join(file_hash(path) for path in self._files(split))


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look into its cache only.

    Without this, an unreachable hub costs six attempts and half a minute before the cache is tried.
    """
    from datasets import config
    from huggingface_hub import constants

    settings: list[Any] = [config, constants]
    previous = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, previous, strict=True):
            module.HF_HUB_OFFLINE = value


def _reason_unreachable() -> str:
    """Why the hub cannot be asked for WikiText now, "" if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(HUB_REPOSITORY, timeout=_PROBE_SECONDS)
    except Exception as error:  # the client's exceptions differ between its versions
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return ""


class HubCorpus:
    """WikiText from the hub through `datasets`.

    Fetched once into the library's cache, then memory-mapped, so that a split is never held in
    memory. Without the hub (`HF_HUB_OFFLINE`, no network), from that cache or from what
    `hf download Salesforce/wikitext --repo-type dataset` has left.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = HUB_CONFIGS[name]

    @cached_property
    def _source(self) -> Any:
        """`datasets.DatasetDict` or, for a downloaded repository, a `ParquetDirectory`."""
        import datasets
        import huggingface_hub

        problem = _reason_unreachable()
        try:
            with contextlib.nullcontext() if not problem else _offline():
                return datasets.load_dataset(HUB_REPOSITORY, self.config)
        except Exception as error:
            problem = problem or f"{type(error).__name__}: {str(error)[:120]}"
        with contextlib.suppress(OSError, ValueError):
            snapshot = huggingface_hub.snapshot_download(
                HUB_REPOSITORY, repo_type="dataset", local_files_only=True
            )
            directory = parquet_directory(Path(snapshot) / self.config)
            if directory is not None:
                return ParquetDirectory(directory)
        raise UserError(
            f"cannot get {self.name} ({HUB_REPOSITORY}, {self.config}): the hub did not give it "
            f"({problem}) and no copy is in the local cache. Instead of {self.name} give a local "
            f"directory in the hub's layout (DIR/{self.config}/train-*.parquet and so on), a local "
            "directory in WikiText form (train.txt, valid.txt, test.txt), or pydocs, which needs "
            "no download; or connect to the network, with HF_HUB_OFFLINE unset"
        )

    def articles(self, split: str) -> Iterator[Article]:
        check_split(split)
        if isinstance(self._source, ParquetDirectory):
            return self._source.articles(split)
        where = f"{HUB_REPOSITORY} ({self.config}, {split})"
        return split_articles(_text_rows(self._rows(split), where), where)

    def fingerprint(self, split: str) -> str:
        check_split(split)
        if isinstance(self._source, ParquetDirectory):
            return self._source.fingerprint(split)
        rows = self._rows(split)
        digest = hashlib.sha256()
        for start in range(0, len(rows), max(_ROWS, len(rows) // 20)):
            for text in rows[start : start + _ROWS]["text"]:
                digest.update(text.encode())
        return f"{self.config}-{len(rows)}-{digest.hexdigest()}"

    def _rows(self, split: str) -> Any:
        return self._source["validation" if split == "valid" else split]
