"""The run folder and its files: settings, metrics, checkpoints with a checked identity."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.store.lock import check_writable, only_writer
    from mlm.store.models import load_base, load_lm, save_base, save_lm
    from mlm.store.released import find_model, released_models
    from mlm.store.run_folder import RunFolder, commit, machine
    from mlm.store.tensors import load_about, load_latest, load_tensors, save_tensors

__all__ = [
    "RunFolder",
    "check_writable",
    "commit",
    "find_model",
    "load_about",
    "load_base",
    "load_latest",
    "load_lm",
    "load_tensors",
    "machine",
    "only_writer",
    "released_models",
    "save_base",
    "save_lm",
    "save_tensors",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "lock": "check_writable only_writer",
        "models": "load_base load_lm save_base save_lm",
        "released": "find_model released_models",
        "run_folder": "RunFolder commit machine",
        "tensors": "load_about load_latest load_tensors save_tensors",
    },
)
