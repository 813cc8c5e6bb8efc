"""A run folder from a released model: the same weights and rules, and nothing is trained again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from tiny import write_corpus

import benchmarks.claim
import mlm
from benchmarks.unpack import Options, unpack
from mlm.base.errors import UserError
from mlm.base.names import PROTOCOLS
from mlm.reader import TrainedModel
from mlm.reader.export import export
from mlm.settings.config import Config
from mlm.stages.order import run_stages
from mlm.store.run_folder import RunFolder

TEXT = "\n = Toy = \n\n baba do fe gi ku . baba la mo ne pi . baba do fe ru sa . \n" * 4


def options(model: TrainedModel, home: Path) -> Options:
    """What it takes to unpack the tiny model, exported."""
    config = RunFolder(model.folder).load_config()
    packed = export(model.folder, home / "packed")
    return Options(str(packed), home / "run", corpus=config.corpus, data_dir=config.text.data_dir)


def test_it_reads_as_the_released_model(model: TrainedModel, tmp_path: Path) -> None:
    own = options(model, tmp_path)
    folder = unpack(own)
    assert folder.text == RunFolder(model.folder).text, "hashes of what it was trained with"
    for protocol in PROTOCOLS:
        for rule in ("static", "four_levels"):
            found = [
                mlm.load(path).reader(rule=rule, protocol=protocol).score(TEXT)
                for path in (own.model, folder.path)
            ]
            first, again = (np.array(table["surprisal"]) for table in found)
            np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-5)
    assert not (folder.path / "tuning.json").exists(), "others may be tuned with another budget"


def test_bad_input(model: TrainedModel, tmp_path: Path, command: Command) -> None:
    own = options(model, tmp_path)
    words = ("benchmarks.unpack", own.model, own.folder, "--data-dir", own.data_dir)
    other = write_corpus(tmp_path / "other", seed=7)
    done = command(*words, "--corpus", other)
    assert "makes another vocabulary than" in done.error
    assert not own.folder.exists()
    with pytest.raises(UserError, match="is a run folder already"):
        unpack(Options(str(model.folder), tmp_path / "a", own.corpus))
    own.folder.mkdir()
    (own.folder / "a.txt").touch()
    assert "not empty" in command(*words, "--corpus", own.corpus).error


@pytest.mark.slow
def test_the_claim_reads_with_it(
    model: TrainedModel, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rival is tuned; the learned rule is the released one."""
    folder, trained = unpack(options(model, tmp_path)), list[str]()

    def counted(config: Config, quiet: bool) -> object:
        trained.append(str(config.out and config.out.name))
        return run_stages(config, quiet)

    monkeypatch.setattr(benchmarks.claim, "run_stages", counted)
    few = ("--seeds", 1, "--resamples", 9, "--rival-budget", 2, "--forms", "all", "--no-fewer",
           "--no-ablate", "--articles", 1, "--split", "test",
           "--out", tmp_path / "out")  # fmt: skip
    done = command("benchmarks.claim", folder.path, *few)
    assert done.code == 0, done.err
    assert trained == ["all", "all_with_n-gram_memory"]
    rows = json.loads((tmp_path / "out" / "claims.json").read_text(encoding="utf-8"))["rows"]
    assert any("with n-gram memory" in row["what"] for row in rows)
    shutil.rmtree(tmp_path / "packed")  # the run folder stands alone
    assert command("benchmarks.claim", folder.path, *few).code == 0
