"""The numbers on the pages are those of the published run files."""

from __future__ import annotations

import json

import pytest

from benchmarks.readme import PAGES, ROOT, fill


@pytest.mark.parametrize("page", PAGES)
def test_tables_come_from_run_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- table:" in text
    assert fill(text) == text, f"{page} is stale: run `python -m benchmarks.readme`"


def test_published_runs_hold_no_text_and_no_weights() -> None:
    for run in sorted((ROOT / "results").glob("**/evaluation.json")):
        names = [p.name for p in run.parent.rglob("*") if p.is_file()]
        assert not [n for n in names if n.endswith((".safetensors", ".parquet", ".html"))]
        rows = json.loads(run.read_text(encoding="utf-8"))
        assert {row["kind"] for row in rows} >= {"total", "position", "article"}
