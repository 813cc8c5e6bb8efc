"""What each part of the claim's learned rule is worth, and phrases to its rival.

    python -m benchmarks.parts runs/ordinary

Reads the tuning words of validation with the rule that `benchmarks.claim` left in RUN/claim/seed_0,
whole and without one part at a time (steps and weights as they were trained with it), and with RMS
on all weights, tuned, as published and with phrases; both with float32 products, too, where the
claim's are bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.claim_tables import LEARNED_RULE
from benchmarks.output import HOME
from benchmarks.rows import language_model
from benchmarks.timing import record
from mlm.checkpoint import RunFolder
from mlm.config import PROTOCOLS
from mlm.errors import UserError, run_cli
from mlm.half import half
from mlm.learner import Bound
from mlm.memory import LongTerm
from mlm.phrases import phrases
from mlm.read_out import read_out_of, with_read_out
from mlm.run import Run, in_half, open_run, use_threads
from mlm.scoring import score_protocol
from mlm.stage_meta import ready_rule

LEFT_OUT: dict[str, dict[str, Any]] = {
    "phrases": {"phrases": None},
    "learning at once": {"at_once": False},
    "surprise": {"surprise": 0.0},
    "borders": {"borders": None},
}


@dataclass(frozen=True)
class Options:
    """Parts of the learned rule, on the tuning words."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of the ordinary language model."""
    threads: int = 0
    """CPU threads; 0 = PyTorch's choice."""
    out: Path = HOME / "parts"
    """Where parts.json goes."""


def _opened(options: Options, name: str) -> Run:
    """A run of the claim.

    Raises:
        UserError: it was not made.
    """
    path = options.run / "claim" / name
    if not RunFolder(path).config_file.exists():
        raise UserError(f"{path} is not there; run python -m benchmarks.claim {options.run} first")
    return open_run(RunFolder(path).load_config(), quiet=True)


EXACT = ", float32 products"
"""Ending of the names of what is read so."""


def _variants(options: Options, protocol: str) -> Iterator[tuple[str, Run, LongTerm, Bound | None]]:
    """What is read: name, run, long-term memory and rule."""
    run = _opened(options, "all")
    ready = ready_rule(run, "rms", protocol)
    yield "static", run, ready.memory, None
    yield "RMS (all)", run, ready.memory, ready.bound
    if in_half(run.config.adapt):
        yield f"RMS (all){EXACT}", run, ready.memory, ready.bound
    learned = _opened(options, "seed_0")
    tokens = learned.config.adapt.phrases
    own = phrases(ready.memory.weights["embedding"], tokens) if tokens else None
    memory = dataclasses.replace(ready.memory, phrases=own)
    yield "RMS (all), with phrases", run, memory, ready.bound
    ready = ready_rule(learned, LEARNED_RULE, protocol)
    yield "4 levels", learned, ready.memory, ready.bound
    if in_half(learned.config.adapt):
        yield f"4 levels{EXACT}", learned, ready.memory, ready.bound
    if read_out_of(ready.memory) is not None:
        yield "4 levels, without read-out", learned, with_read_out(ready.memory, None), ready.bound
    for part, without in LEFT_OUT.items():
        if part == "borders" and protocol == "article":  # they are marked
            continue
        memory = dataclasses.replace(ready.memory, **without)
        yield f"4 levels, without {part}", learned, memory, ready.bound


def main() -> None:
    """Print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    language_model(options.run)
    rows: dict[str, dict[str, Any]] = {}
    for protocol in PROTOCOLS:
        static = 0.0
        for name, run, memory, bound in _variants(options, protocol):
            use_threads(options.threads)
            text = run.tune_text
            words = run.validation_text(run.config.evaluation.tune_words).words
            lower = in_half(run.config.adapt) and not name.endswith(EXACT)
            with half(lower):
                total = score_protocol(
                    memory, bound, text.articles, text.eos, protocol, text.lanes, name
                ).total
            static = total if bound is None else static
            if bound is not None:
                row = rows.setdefault(name, {"rule": name})
                row[protocol] = (static - total) / words
    record("parts", list(rows.values()), options)


if __name__ == "__main__":
    run_cli(main)
