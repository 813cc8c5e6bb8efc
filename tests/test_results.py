"""The numbers on the pages are those of the published run files."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.readme import BLOCK, ROOT, fill, pages


@pytest.mark.parametrize("page", pages())
def test_tables_come_from_run_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text) == text, f"{page} is stale: run `python -m benchmarks.readme`"
    left = re.findall(r"<!-- (?:end|(?!script)\w+:).*", BLOCK.sub("", text))
    assert not left, f"{page}: a marker that fills nothing"


@pytest.mark.parametrize(
    "folder",
    ["claim", "claim/wikipedia", "claim_256_units", "claim_256_units/wikipedia", "engine", "rules"],
)
def test_every_published_table_is_on_a_page(folder: str) -> None:
    every = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages())
    files = set((ROOT / "results" / folder).glob("*.json"))
    for file in files - {ROOT / "results" / folder / "evaluation.json"}:
        assert f"<!-- engine: {file.relative_to(ROOT).as_posix()} -->" in every


def test_published_runs_hold_no_text_and_no_weights() -> None:
    for run in sorted((ROOT / "results").glob("**/evaluation.json")):
        names = [p.name for p in run.parent.rglob("*") if p.is_file()]
        assert not [n for n in names if n.endswith((".safetensors", ".parquet", ".html"))]
        rows = json.loads(run.read_text(encoding="utf-8"))
        assert {row["kind"] for row in rows} >= {"total", "position", "article"}
