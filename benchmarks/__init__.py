"""Measurements that anyone can run; `mlm` before torch: it tells OpenMP not to spin."""

import mlm  # noqa: F401
