"""Hostile inputs made at random, and what must hold for each: one message or the right result.

A case is a value that hypothesis draws; `Fuzz.<kind>(case)` asserts what must hold of it. Nothing
here starts a process, and each case has a time limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import lzma
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import Finished
from fuzz_cases import USUAL, changed, damaged
from matplotlib.figure import Figure
from safetensors.torch import save

from mlm.base import terminal
from mlm.base.errors import UserError, run_cli
from mlm.kernels.switches import use
from mlm.reader import audit
from mlm.report.evaluation import evaluation_markdown, merge_evaluation, read_evaluation
from mlm.report.losses import LossTable
from mlm.report.tables import format_totals
from mlm.runs.identity import identity
from mlm.runs.rules import check_learned, load_learned, tuned_settings
from mlm.runs.run import Run, open_run
from mlm.settings.flags import replaced
from mlm.stages import evaluate, order
from mlm.stages.meta import MetaTrainer
from mlm.store.models import load_lm
from mlm.store.released import BLANK
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import CHECKSUM, load_tensors
from mlm.text.corpora import open_corpus
from mlm.text.tokens import DamagedFile, TokenFile, encode_split, prepare
from mlm.text.vocabulary import load_vocabulary
from mlm.training.language_model import LMTrainer, shape_of

SECONDS = 20
"""Longest that a case may compute; nearly all of them take a fraction of a second."""
WAITING = 300
"""Longest that a case may take in all: a machine with other work on it is no hang."""


class TookTooLong(BaseException):
    """A case that hangs."""


@contextlib.contextmanager
def time_limit(computing: float, waiting: float) -> Iterator[None]:
    """End a block that hangs, as long as it runs Python now and then.

    Args:
        computing: seconds of the processor.
        waiting: seconds of the clock.
    """

    def stop(*_: object) -> None:
        raise TookTooLong(f"more than {computing} s of computing, or {waiting} s in all")

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, computing),
        signal.SIGALRM: (signal.ITIMER_REAL, waiting),
    }
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def check_message(text: str) -> None:
    """One line that says something."""
    assert text.strip(), "an empty message"
    assert "\n" not in text, text
    assert len(text) < 3000, text


def refusal(call: Callable[[], object]) -> str | None:
    """The message that a call is refused with; None = it went through. Nothing else may happen."""
    with time_limit(SECONDS, WAITING), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            call()
        except UserError as error:
            check_message(str(error))
            return str(error)
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# -- what must hold -------------------------------------------------------------------------------


class Fuzz:
    """A finished run to damage, a place to write, and one method per kind of case."""

    def __init__(self, finished: Finished, home: Path) -> None:
        self.finished, self.home = finished, home
        self.whole = contents(finished.folder)
        self.folder = finished.copy(home / "run")
        config = RunFolder(finished.folder).load_config()
        rules = ("static", "rms", "two_levels", "three_levels")
        self.config = replaced(
            config, {"out": self.folder, "stages": ("evaluate",), "evaluation.rules": rules}
        )
        run = open_run(self.config, quiet=True)
        self.data = run.data
        text = Run(finished.config, RunFolder(finished.folder), torch.device("cpu"), quiet=True)
        text.__dict__["data"] = self.data
        self.text = text.training_text(0), text.training_text(1)
        self.used = 0
        self.text_file = home / "text.txt"
        self.text_file.write_text("One keeper naps. Two do not.\n" * 3, encoding="utf-8")

    def run(self) -> Run:
        """The run as it is now; its text is not read again."""
        run = Run(self.config, RunFolder(self.folder), torch.device("cpu"), quiet=True)
        run.__dict__["data"] = self.data
        return run

    def restored(self) -> None:
        """Make the damaged run folder whole."""
        now = contents(self.folder)
        for name, body in self.whole.items():
            if now.pop(name, None) != body:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(body)
        for name in now:
            (self.folder / name).unlink()

    def place(self) -> Path:
        """A folder that is new."""
        self.used += 1
        return self.home / f"case{self.used}"

    # -- texts --------------------------------------------------------------------------------

    def corpus(self, case: Any) -> None:
        """Any files: an open corpus gives tokens that spell it, or one message and no file."""
        parts, alone, whole, kind, size, words = case
        place = self.place()
        place.mkdir()
        path = place
        for name, packing, body in parts:
            pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(packing, bytes)
            path = place / f"{name}{packing}"
            path.write_bytes(pack(body) if len(body) % 3 else body)
        try:
            self._corpus(path if alone else place, place / "cache", whole, kind, size, words)
        finally:
            shutil.rmtree(place)

    def _corpus(
        self, path: Path, cache: Path, whole: bool, kind: str, size: int, words: int
    ) -> None:
        if whole:  # to score, with a vocabulary that is there
            vocabulary = self.data.vocabulary
            said = refusal(
                lambda: encode_split(
                    open_corpus(str(path), True), "test", vocabulary, cache, words, progress=False
                )
            )
        else:
            said = refusal(
                lambda: prepare(
                    open_corpus(str(path)), kind, size, cache, ("train", "valid"), words, False
                )
            )
        left = [file for file in cache.rglob("*") if file.is_file()]
        assert not [file for file in left if file.name.startswith(".")], left
        for file in left:
            if file.suffix == ".tokens":
                TokenFile(file)
            else:
                load_vocabulary(file.parent)
        assert said is not None or left

    def tokens(self, case: list[tuple[str, float, bytes]]) -> None:
        """Bytes of a token file: damage is found, and the file is made again."""
        source = self.data.splits["valid"]
        body = source.path.read_bytes()
        place = self.place() / "valid.tokens"
        place.parent.mkdir()
        place.write_bytes(damaged(body, case))
        try:
            same = place.read_bytes() == body
            try:
                found = TokenFile(place)
                assert same, "damage went unnoticed"
                assert (np.asarray(found.tokens) == np.asarray(source.tokens)).all()
            except DamagedFile as error:
                assert not same
                check_message(str(error))
        finally:
            shutil.rmtree(place.parent)

    # -- run folders --------------------------------------------------------------------------

    def checkpoint(self, case: Any) -> None:
        """Any content of a checkpoint is refused or can be read, trained and gone on with."""
        name, what, tensors = case
        path = RunFolder(self.folder).checkpoint(name)
        body = path.read_bytes()
        if tensors is None:
            path.write_bytes(damaged(body, what))
        else:
            path.write_bytes(self._signed(path, what, tensors))
        RunFolder(self.folder).checkpoint(f"{name}.previous").unlink(missing_ok=True)
        before = contents(self.folder)
        try:
            read = getattr(self, f"_read_{name}", self._read)
            said = refusal(functools.partial(read, name))
            assert said is None or contents(self.folder) == before
            assert said is not None or tensors is not None or path.read_bytes() == body
        finally:
            self.restored()

    def _signed(self, path: Path, what: Any, change: list[tuple[str, int]]) -> bytes:
        """The file with another description and other tensors, under a checksum that holds."""
        tensors, about = load_tensors(path, "")
        about = changed(about, what)
        for how, where in change:
            if not tensors:
                break
            name = sorted(tensors)[where % len(tensors)]
            tensor = tensors.pop(name).contiguous()
            match how:
                case "nan" if tensor.is_floating_point():
                    tensors[name] = torch.full_like(tensor, float("nan"))
                case "huge":
                    tensors[name] = torch.full_like(tensor, 100)
                case "shape":
                    tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
                case "flat":
                    tensors[name] = tensor.flatten().clone()
                case "dtype":
                    tensors[name] = tensor.to(torch.int32)
        if isinstance(about, dict):
            about[CHECKSUM] = BLANK
        text = json.dumps(about)
        body = save(tensors, metadata={"mlm": text})
        return body.replace(BLANK.encode(), hashlib.sha256(body).hexdigest().encode(), 1)

    def _read_lm(self, name: str) -> None:
        load_lm(RunFolder(self.folder).checkpoint(name), self.data.vocabulary.hash)

    def _read(self, name: str) -> None:
        run = self.run()
        check_learned(run)
        tuned_settings(run)
        identity(run, learned=True)

    def _read_lm_last(self, name: str) -> None:
        """Gone on from for a step."""
        config = replaced(self.finished.config, {"out": self.folder})
        shape = shape_of(config, self.data.vocabulary.size)
        trainer = LMTrainer(config, shape, self.text[0], torch.device("cpu"))
        trainer.load(RunFolder(self.folder), self.data.vocabulary.hash)
        trainer.train_step()

    def _read_three_levels_last(self, name: str) -> None:
        """Gone on from for a step."""
        run = self.run()
        learned = load_learned(run, "three_levels", run.base)
        base = dataclasses.replace(learned.base, extensions=())
        rule, meta = learned.rule, replaced(self.config.meta, {"unroll": 2})
        trainer = MetaTrainer(base, rule, learned.parameters, self.text[1], meta, 0)  # type: ignore[arg-type]
        path = RunFolder(self.folder).checkpoint(name)
        found = load_tensors(path, "")[1]
        trainer.load(RunFolder(self.folder), found.get("identity", ""))
        trainer.train_step()

    def record(self, case: Any) -> None:
        """Any content of the other files of a run folder, read by what reads it."""
        name, what = case
        path = self.folder / name
        body = path.read_bytes()
        if isinstance(what[0][1], float):
            path.write_bytes(damaged(body, what))
        else:
            path.write_bytes(self._changed(name, body, what))
        before = contents(self.folder)
        try:
            for read in (self._evaluated, self._shown):
                said = refusal(read)
                assert said is None or contents(self.folder) == before
        finally:
            self.restored()

    def _changed(self, name: str, body: bytes, what: Any) -> bytes:
        """A JSON file with other values."""
        if name.endswith("jsonl"):
            rows = [json.loads(line) for line in body.splitlines()]
            return "\n".join(json.dumps(row) for row in (changed(rows, what) or [])).encode()
        return json.dumps(changed(json.loads(body), what)).encode()

    def _evaluated(self) -> None:
        """What an evaluation reads, and what training that goes on reads."""
        folder = RunFolder(self.folder)
        config = folder.load_config()
        assert replaced(config, {}) == config
        folder.rows()
        folder.seed_of("lm")
        folder.text  # noqa: B018
        run = self.run()
        tuned_settings(run)
        load_vocabulary(folder.vocabulary)

    def _shown(self) -> None:
        """What tables and pictures are made of."""
        rows = read_evaluation(self.folder)
        merge_evaluation(rows, rows)
        evaluation_markdown(rows)
        format_totals(rows)
        LossTable.load(self.folder / "losses.parquet")

    # -- command lines ------------------------------------------------------------------------

    def command(self, case: tuple[str, list[str], list[str]]) -> None:
        """Any words: exit code and one message, before anything is written; or it would begin."""
        script, first, more = case
        new = self.place()
        names = {"CORPUS": self.finished.corpus, "RUN": self.folder, "NEW": new}
        names |= {"TEXT": self.text_file, "BINARY": self.folder / "losses.parquet"}
        if script == "train":  # a new run, or the one that is there
            first = [*USUAL, "--out", *(first[:1] or ["NEW"])]
        elif script.endswith(("score", "audit")):
            first = ["TEXT", "--model", *(first[:1] or ["RUN"])][script.endswith("audit") * 2 :]
        words = [str(names.get(word, word)) for word in (*first, *more)]
        before = contents(self.folder)
        try:
            code, out, err = self._call(script, words)
            assert "Traceback" not in err, err
            if code == 0:
                return
            assert code in (1, 2), (code, err)
            if code == 1:
                lines = [line for line in err.splitlines() if line.startswith("error: ")]
                assert len(lines) == 1, err
                check_message(lines[0])
            assert out.strip() or err.strip()
            assert contents(self.folder) == before
            assert not new.exists() or not any(new.iterdir()), "partial output"
        finally:
            self.restored()
            shutil.rmtree(new, ignore_errors=True)

    def _call(self, script: str, words: list[str]) -> tuple[int, str, str]:
        """A script's `main` up to where its work begins."""
        out, err, argv, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
        stops = dict.fromkeys(("stage_lm", "stage_meta"))
        old = {name: getattr(order, name) for name in stops}
        run = evaluate.stage_evaluate, evaluate.draw, audit.audit, Figure.savefig
        sys.argv = [f"{script.split('.')[-1]}.py", *words]
        terminal._NOTED.clear()
        code = 0
        try:
            order.stage_lm = order.stage_meta = _nothing
            evaluate.stage_evaluate = _no_rows
            evaluate.draw = _no_paths
            Figure.savefig = _nothing
            audit.audit = _no_checks
            with (
                time_limit(SECONDS, WAITING),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                run_cli(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        finally:
            for name, value in old.items():
                setattr(order, name, value)
            evaluate.stage_evaluate, evaluate.draw, audit.audit, Figure.savefig = run
            sys.argv = argv
            torch.set_num_threads(threads)
            use(kernels=True, bfloat16=False)
        return code, out.getvalue(), err.getvalue()


def _nothing(*_: object, **__: object) -> None:
    """Instead of a stage."""


def _no_checks(*_: object) -> Iterator[Any]:
    """Instead of an audit."""
    return iter(())


def _no_paths(*_: object) -> list[Path]:
    """Instead of pictures."""
    return []


def _no_rows(run: Run, *_: object) -> tuple[Path, list[Any]]:
    """Instead of an evaluation."""
    return run.folder.path, []
