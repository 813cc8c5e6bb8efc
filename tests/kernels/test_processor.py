"""bfloat16 where the processor can: refused, or float32 with a line that says so, elsewhere."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command
from tiny import as_flags, tiny_config, write_corpus

from mlm.base.errors import UserError
from mlm.kernels import bfloat16, processor, use
from mlm.runs.run import open_run
from mlm.training.language_model import resolve_precision

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
X86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="oneDNN is limited on x86-64 only"
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bfloat16."""
    monkeypatch.setattr("mlm.training.language_model.trains_bfloat16", lambda: False)
    monkeypatch.setattr("mlm.training.language_model.multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("mlm.runs.run.multiplies_bfloat16", lambda: False)


@pytest.mark.usefixtures("plain")
def test_training_in_bfloat16_is_refused_before_any_work(command: Command, tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path / "toy"), tmp_path / "run", lm__precision="bfloat16")
    error = command("train", *as_flags(config)).error
    assert error.startswith("error: --lm.precision bfloat16: this processor cannot")
    assert "--lm.precision auto" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("plain")
def test_what_was_trained_in_bfloat16_is_read_anywhere(tmp_path: Path) -> None:
    """Only stage 1 needs it."""
    config = tiny_config(
        tmp_path, tmp_path / "run", lm__precision="bfloat16", stages=("meta", "evaluate")
    )
    open_run(config)


@pytest.mark.usefixtures("plain")
def test_auto_picks_float32_on_a_plain_processor() -> None:
    assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("float32", CPU) == torch.float32
    with pytest.raises(UserError, match="bfloat16"):
        resolve_precision("bfloat16", CPU)


@pytest.mark.parametrize("native", [True, False])
def test_lanes_products_are_float32_with_one_line_unless_bfloat16_is_native(
    native: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlm.runs.run.multiplies_bfloat16", lambda: native)
    x = torch.ones(2, 2)
    try:
        open_run(tiny_config(tmp_path, tmp_path / "run", adapt__precision="bfloat16"))
        assert bfloat16.lowered(x).dtype == (torch.bfloat16 if native else torch.float32)
        line = "--adapt.precision bfloat16: this processor is faster in float32, which is used"
        assert capsys.readouterr().err == ("" if native else f"{line} instead\n")
        open_run(tiny_config(tmp_path, tmp_path / "run"))
        assert bfloat16.lowered(x) is x
    finally:
        use(bfloat16=False)  # as the process had it
    assert not capsys.readouterr().err


@pytest.mark.parametrize("able", ["avx512_bf16", "amx_bf16", "avx512_f"])
@pytest.mark.parametrize("limit", ["", "ALL", "AVX512_CORE_BF16", "AVX512_CORE", "avx2"])
def test_native_products_need_the_processor_and_onednn(
    able: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, able: True})
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    want = able != "avx512_f" and limit not in ("AVX512_CORE", "avx2")
    assert processor.multiplies_bfloat16() is want


def test_what_multiplies_bfloat16_also_trains_in_it() -> None:
    assert processor.trains_bfloat16() or not processor.multiplies_bfloat16()


@pytest.mark.slow
@X86
def test_no_traceback_where_onednn_has_no_bfloat16_layer(tmp_path: Path) -> None:
    """A real process, in which oneDNN takes the processor for one with AVX2 only."""
    config = tiny_config(write_corpus(tmp_path / "toy"), tmp_path / "run", lm__precision="bfloat16")
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(config)],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --lm.precision bfloat16: this processor cannot")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
