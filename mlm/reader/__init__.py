"""Any text, read by a trained model that learns while it reads: the package's public face."""

from typing import TYPE_CHECKING

from mlm.base.lazy import lazily

if TYPE_CHECKING:
    from mlm.reader.model import TrainedModel, load
    from mlm.reader.reader import DocumentReader

__all__ = ["DocumentReader", "TrainedModel", "load"]

__getattr__, __dir__ = lazily(__name__, {"model": "TrainedModel load", "reader": "DocumentReader"})
