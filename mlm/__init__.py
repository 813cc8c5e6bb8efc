"""mlm: a language model whose weights are a memory, rewritten while it reads.

What a user of the package needs is importable from here; it is loaded when it is first asked for,
so that `import mlm` costs nothing.
"""

import os
from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.base.errors import UserError
    from mlm.models.module import ModuleModel
    from mlm.reader.model import TrainedModel, load
    from mlm.reading.scoring import score_articles
    from mlm.settings.config import Config
    from mlm.stages.order import run_stages
    from mlm.store.run_folder import RunFolder

# Before torch is imported: OpenMP threads that spin at barriers make small operations up to 80x
# slower when another process takes a core; waiting passively costs next to nothing when idle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ModuleModel",
    "RunFolder",
    "TrainedModel",
    "UserError",
    "load",
    "run_stages",
    "score_articles",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "base.errors": "UserError",
        "models.module": "ModuleModel",
        "reader.model": "TrainedModel load",
        "reading.scoring": "score_articles",
        "stages.order": "run_stages",
        "settings.config": "Config",
        "store.run_folder": "RunFolder",
    },
)
