"""Where benchmarks write: a folder of the user's, never `results/` unasked.

The default of every `--out` is HOME / NAME. `python -m benchmarks.publish` copies from there what
belongs into `results/`.
"""

from __future__ import annotations

from pathlib import Path

HOME = Path("runs/benchmarks")

MADE = "made.json"
"""In a folder of results: what they were made with, of use to who makes them again only."""
