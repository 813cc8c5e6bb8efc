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

    from mlm.base.processes import several_processes

    torch.set_num_threads(1)
    os.environ |= environment(rank, world, port)
    try:
        with several_processes("cpu"):
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
        process.join(600)
        if process.is_alive():
            process.kill()
    found = [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in range(world)]
    errors = [value for kind, value in found if kind == "error"]
    assert not errors, errors[0]
    return [value for _, value in found]


def trainers_in_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Every trainer of the golden run after some steps, saved on the way in `folder` and gone on
    with from there: losses and all that was trained, in float64."""
    import torch
    from golden.world import HALF, LANGUAGE, META, STEPS

    from mlm.store.run_folder import RunFolder

    found: dict[str, dict[str, Any]] = {}
    made = {n: make for n, make in {**LANGUAGE, **META}.items() if not n.startswith("through")}
    for name, make in made.items():
        run, trainer = RunFolder(folder / name.replace(" ", "_")), make()
        losses = [trainer.train_step()[0] for _ in range(HALF)]
        trainer.save(run, "")
        trainer = make()
        trainer.load(run, "")
        losses += [trainer.train_step()[0] for _ in range(STEPS - HALF)]
        trained = trainer.model() if hasattr(trainer, "model") else trainer.trained
        found[name] = {n: t.detach().clone() for n, t in trained.items()}
        found[name]["losses"] = torch.tensor(losses, dtype=torch.float64)
    return found


def stages_in_double(config: Any, stop_at: int = 0, signals: tuple[int, ...] = ()) -> int:
    """Run the stages with a language model in float64; the exit status.

    Args:
        stop_at: the step of stage 1, counted on, in which processes get a signal; 0 = none.
        signals: the ranks that get it.
    """
    import signal

    from golden.world import in_double

    import mlm.stages.language_model as stage
    from mlm.base.errors import run_cli
    from mlm.base.processes import ranks
    from mlm.stages.order import run_stages
    from mlm.training.language_model import LMTrainer

    class InDouble(LMTrainer):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            in_double(self)

        def train_step(self) -> tuple[float, int]:
            if self.step + 1 == stop_at and ranks().rank in signals:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step()

    before, stage.LMTrainer = stage.LMTrainer, InDouble
    try:
        run_cli(lambda: run_stages(config, quiet=True) and None)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        stage.LMTrainer = before
    return 0
