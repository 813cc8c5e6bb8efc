"""Progress kept in the run folder: a file for each part of a stage, gone when the stage is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlm.base.errors import UserError, uninterrupted
from mlm.base.processes import ranks
from mlm.base.progress import Progress, Tick, Work, saved_by_the_clock
from mlm.base.terminal import note
from mlm.store.tensors import going_on_from, load_tensors, save_tensors


@dataclass(frozen=True)
class KeptProgress(Progress):
    """Progress in files `unfinished_<stage>_<part>.safetensors`."""

    folder: Path
    stage: str
    """What is being made, such as the file's name that it will have."""
    identity: str
    """Hash of what it is made from: progress made from anything else is not gone on from."""
    minutes: float
    """Between two saves."""

    def _path(self, name: str) -> Path:
        return self.folder / f"unfinished_{self.stage}_{name}.safetensors"

    @contextlib.contextmanager
    def of(self, name: str, work: Work) -> Iterator[Tick]:
        """See `Progress.of`."""
        self._go_on(name, work)
        with saved_by_the_clock(lambda: self.save(name, work), self.minutes) as tick:
            yield tick
        with uninterrupted():
            self.save(name, work)

    def _go_on(self, name: str, work: Work) -> None:
        """Load what was kept, if it was made from the same; damaged or foreign, it is made anew."""
        path = self._path(name)
        if not path.exists():
            return
        try:
            tensors, about = load_tensors(path, "")
        except UserError as error:
            note(f"{error}; this part begins again")
            return
        if about.get("identity") == self.identity:
            with going_on_from(path):
                work.load(tensors, about["work"])

    def save(self, name: str, work: Work) -> None:
        """Keep how far `work` has come."""
        tensors, about = work.state()
        save_tensors(self._path(name), tensors, {"identity": self.identity, "work": about})

    def forget(self) -> None:
        """The stage is done: remove what was kept of its parts."""

        def remove() -> None:
            for path in self.folder.glob(f"unfinished_{self.stage}_*.safetensors"):
                path.unlink()

        ranks().on_first(remove)
