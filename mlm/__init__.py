"""mlm: a language model whose weights are a memory, rewritten while it reads."""

import os

# Before torch is imported: OpenMP threads that spin at barriers make small operations up to 80x
# slower when another process takes a core; waiting passively costs next to nothing when idle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.1.0"
