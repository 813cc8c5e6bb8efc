"""Compiled loops, each beside its eager twin; threads, the buffer pool, bfloat16 products."""

from mlm.kernels.compile import as_array, eager, numba, share_out, usable
from mlm.kernels.ngram import recall_phrases
from mlm.kernels.recurrent import (
    half_lstm_backward,
    half_lstm_forward,
    lstm_backward,
    lstm_forward,
    matrix_vector,
    qrnn_backward,
    qrnn_forward,
)
from mlm.kernels.softmax import half_softmax_rows, softmax_rows, teach_rows
from mlm.kernels.switches import Switches, computing, switches, use, use_threads
from mlm.kernels.update import TILE, pull_back, push_forward, relax, relax_both, tiles

__all__ = [
    "TILE",
    "Switches",
    "as_array",
    "computing",
    "eager",
    "half_lstm_backward",
    "half_lstm_forward",
    "half_softmax_rows",
    "lstm_backward",
    "lstm_forward",
    "matrix_vector",
    "numba",
    "pull_back",
    "push_forward",
    "qrnn_backward",
    "qrnn_forward",
    "recall_phrases",
    "relax",
    "relax_both",
    "share_out",
    "softmax_rows",
    "switches",
    "teach_rows",
    "tiles",
    "usable",
    "use",
    "use_threads",
]
