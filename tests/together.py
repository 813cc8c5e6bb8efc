"""Several processes on this machine, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in said.items()}


def _process(
    rank: int, world: int, port: int, out: Path, work: Callable[..., Any], words: tuple[Any, ...]
) -> None:
    import torch

    from mlm.base.ranks import joined

    torch.set_num_threads(1)
    os.environ |= environment(rank, world, port)
    try:
        with joined("cpu"):
            found = ("value", work(*words))
    except BaseException:
        found = ("error", traceback.format_exc())
    (out / f"{rank}.pickle").write_bytes(pickle.dumps(found))


def together(world: int, out: Path, work: Callable[..., Any], *words: Any) -> list[Any]:
    """What `work(*words)` gives in each of `world` processes; `out` is a folder for it.

    Asserts that none of them fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [
        context.Process(target=_process, args=(rank, world, port, out, work, words))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        if process.is_alive():
            process.kill()
    found = [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(world)]
    errors = [value for kind, value in found if kind == "error"]
    assert not errors, errors[0]
    return [value for _, value in found]
