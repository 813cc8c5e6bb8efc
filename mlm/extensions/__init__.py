"""Optional parts of the memory, each one file, plugged in by the one line below that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from mlm.extensions.boundaries import Boundaries
from mlm.extensions.intra_segment import IntraSegment
from mlm.extensions.learned_basis import LearnedBasis
from mlm.extensions.ngram_embeddings import NGramEmbeddings
from mlm.extensions.ngram_memory import NGramMemory
from mlm.extensions.ngram_read_out import NGramReadOut
from mlm.extensions.surprise_weighting import SurpriseWeighting
from mlm.extensions.word_coupling import WordCoupling
from mlm.models.extension import Extension
from mlm.models.language_model import Weights


@dataclass(frozen=True)
class Extensions:
    """The extensions with their settings, in the order in which they are made and asked."""

    word_coupling: WordCoupling = field(default_factory=WordCoupling)
    boundaries: Boundaries = field(default_factory=Boundaries)
    intra_segment: IntraSegment = field(default_factory=IntraSegment)
    learned_basis: LearnedBasis = field(default_factory=LearnedBasis)
    ngram_memory: NGramMemory = field(default_factory=NGramMemory)
    ngram_read_out: NGramReadOut = field(default_factory=NGramReadOut)
    ngram_embeddings: NGramEmbeddings = field(default_factory=NGramEmbeddings)
    surprise_weighting: SurpriseWeighting = field(default_factory=SurpriseWeighting)

    def __iter__(self) -> Iterator[Extension]:
        """All of them."""
        return iter(getattr(self, field.name) for field in dataclasses.fields(self))

    def enabled(self) -> tuple[Extension, ...]:
        """Those that the settings ask for."""
        return tuple(extension for extension in self if extension.enabled)

    def of_base(self) -> tuple[Extension, ...]:
        """Those that an adaptation base depends on: up to the last that changes it."""
        enabled = [extension for extension in self.enabled() if not extension.of_model]
        last = max((k for k, e in enumerate(enabled, 1) if e.makes_base), default=0)
        return tuple(enabled[:last])

    def active(self, weights: Weights) -> tuple[Extension, ...]:
        """Those that take part where these are the weights."""
        return tuple(extension for extension in self if extension.active(weights))


__all__ = [
    "Boundaries",
    "Extensions",
    "IntraSegment",
    "LearnedBasis",
    "NGramEmbeddings",
    "NGramMemory",
    "NGramReadOut",
    "SurpriseWeighting",
    "WordCoupling",
]
