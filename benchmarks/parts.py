"""What each part of the claim's learned rule is worth, and n-gram memory to its rival.

    python -m benchmarks.parts runs/ordinary

Reads the tuning words of validation with the rule that `benchmarks.claim` left in RUN/claim/seed_0,
whole and without one part at a time (steps and weights as they were trained with it), and with RMS
on all weights, tuned, without and with n-gram memory, as the claim left it; rule and rival with
float32 products, too, where the claim's are bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.claim_tables import LEARNED_RULE
from benchmarks.output import HOME
from benchmarks.rows import language_model
from benchmarks.timing import record
from mlm.base.errors import UserError, run_cli
from mlm.base.names import PROTOCOLS
from mlm.extensions import (
    Boundaries,
    IntraSegment,
    NGramMemory,
    NGramReadOut,
    SurpriseWeighting,
)
from mlm.kernels.bfloat16 import bfloat16_products
from mlm.kernels.switches import use_threads
from mlm.models.base import AdaptationBase
from mlm.models.extension import Extension
from mlm.reading.scoring import score_protocol
from mlm.rules.protocol import Bound
from mlm.runs.rules import ready_rule
from mlm.runs.run import Run, in_bfloat16, open_run
from mlm.store.run_folder import RunFolder

REMEMBERING = "all_with_n-gram_memory"
"""Folder in RUN/claim of RMS on all weights that was tuned with n-gram memory."""
LEFT_OUT: dict[str, type[Extension]] = {
    "n-gram memory": NGramMemory,
    "intra-segment adaptation": IntraSegment,
    "surprise weighting": SurpriseWeighting,
    "boundary detection": Boundaries,
}
"""Part and extension; without n-gram memory there is nothing to read out, either."""


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


def _without(base: AdaptationBase, left_out: type[Extension]) -> AdaptationBase:
    return base.keeping(lambda extension: not isinstance(extension, left_out))


EXACT = ", float32 products"
"""Ending of the names of what is read so."""


def _variants(
    options: Options, protocol: str
) -> Iterator[tuple[str, Run, AdaptationBase, Bound | None]]:
    """What is read: name, run, long-term memory and rule."""
    run = _opened(options, "all")
    ready = ready_rule(run, "rms", protocol)
    yield "static", run, ready.base, None
    yield "RMS (all)", run, ready.base, ready.bound
    if in_bfloat16(run.config.adapt):
        yield f"RMS (all){EXACT}", run, ready.base, ready.bound
    learned = _opened(options, "seed_0")
    if (options.run / "claim" / REMEMBERING).exists():  # RMS on all weights is the rival
        run = _opened(options, REMEMBERING)
        ready = ready_rule(run, "rms", protocol)
        yield "RMS (all), with n-gram memory", run, ready.base, ready.bound
    ready = ready_rule(learned, LEARNED_RULE, protocol)
    yield "4 levels", learned, ready.base, ready.bound
    if in_bfloat16(learned.config.adapt):
        yield f"4 levels{EXACT}", learned, ready.base, ready.bound
    if NGramReadOut().of(ready.base.weights) is not None:
        base = _without(ready.base, NGramReadOut)
        yield "4 levels, without n-gram read-out", learned, base, ready.bound
    for part, extension in LEFT_OUT.items():
        if extension is Boundaries and protocol == "article":  # they are marked
            continue
        base = _without(ready.base, extension)
        yield f"4 levels, without {part}", learned, base, ready.bound


def main() -> None:
    """Print and write the table."""
    options = tyro.cli(Options, description=__doc__)
    language_model(options.run)
    rows: dict[str, dict[str, Any]] = {}
    for protocol in PROTOCOLS:
        static = 0.0
        for name, run, base, bound in _variants(options, protocol):
            use_threads(options.threads)
            text = run.tune_text
            words = run.validation_text(run.config.evaluation.tune_words).words
            lower = in_bfloat16(run.config.adapt) and not name.endswith(EXACT)
            with bfloat16_products(lower):
                total = score_protocol(
                    base, bound, text.articles, text.eos, protocol, text.lanes, name
                ).total
            static = total if bound is None else static
            if bound is not None:
                row = rows.setdefault(name, {"rule": name})
                row[protocol] = (static - total) / words
    record("parts", list(rows.values()), options)


if __name__ == "__main__":
    run_cli(main)
