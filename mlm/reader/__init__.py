"""Any text, read by a trained model that learns while it reads: the package's public face."""

from mlm.reader.model import TrainedModel, load
from mlm.reader.reader import DocumentReader

__all__ = ["DocumentReader", "TrainedModel", "load"]
