"""What other libraries of the field need to use a model, one optional module per library.

`mlm.adapters.harness` is a model of EleutherAI's evaluation harness, `mlm.adapters.spacy_pipe` a
component of a spaCy pipeline. Each needs its library and is imported by its own name.
`IncrementalLMScorer` has the names of minicons and needs no other library.
"""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.adapters.scorer import IncrementalLMScorer

__all__ = ["IncrementalLMScorer"]

__getattr__, __dir__ = lazily(__name__, {"scorer": "IncrementalLMScorer"})
