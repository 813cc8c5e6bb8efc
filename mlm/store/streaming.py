"""A safetensors file, written tensor by tensor: nothing is copied but one tensor at a time.

The format is that of https://github.com/huggingface/safetensors: the header's length in 8 bytes,
the header in JSON, the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm.store.released import BLANK

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of types in the format."""


def write_signed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and what `about` says; in place of its `BLANK` the SHA-256 of all bytes.

    Raises:
        KeyError: a type that the format, or this program, does not keep.
    """
    # Wide types first, as the library writes them: every tensor then is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    head = _header({name: tensors[name] for name in names}, about)
    digest = hashlib.sha256(head)
    with open(path, "wb") as file:
        file.write(head)
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(head.replace(BLANK.encode(), digest.hexdigest().encode(), 1))


def _header(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """The header's length and the header, for tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"mlm": json.dumps(about)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        kind, size = TYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
