"""All stages, the reader and a resumed run on the fake CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import fake_cuda
from tiny import tiny_config, write_corpus

from mlm.kernels import eager
from mlm.reader import load
from mlm.settings.config import Config
from mlm.stages.order import run_stages

RICH: dict[str, Any] = {
    "adapt__dynamic": "softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
    "adapt__rank": 8,
    "meta__rules": ("four_levels",),
    "evaluation__rules": ("static", "rms+cache", "four_levels"),
    "extensions__word_coupling__directions": 4,
    "extensions__boundaries__on": True,
    "extensions__intra_segment__on": True,
    "extensions__learned_basis__words": 40,
    "extensions__ngram_memory__tokens": 32,
    "extensions__ngram_read_out__words": 40,
    "extensions__surprise_weighting__share": 0.25,
}
"""Everything that stage 2 can learn."""


def _config(home: Path, **changes: Any) -> Config:
    """The shortest run of all stages."""
    corpus = home / "toy"
    if not corpus.exists():
        write_corpus(corpus, 4, 1, 1)
    usual: dict[str, Any] = {
        "device": "cuda", "stages": ("lm", "meta", "evaluate"), "model__embedding": 8,
        "model__hidden": 8, "text__train_words": 700, "lm__epochs": 0.2, "lm__validations": 1,
        "lm__validation_words": 40, "lm__precision": "auto", "adapt__fisher_words": 60,
        "meta__steps": 1, "meta__unroll": 2, "meta__lanes": 2, "evaluation__budget": 2,
        "evaluation__tune_words": 30, "evaluation__max_articles": 1, "evaluation__lanes": 2,
        "evaluation__resamples": 9, "evaluation__protocols": ("article",),
    }  # fmt: skip
    return tiny_config(corpus, home / "run", **(usual | RICH | changes))


@pytest.mark.slow
def test_a_run_and_its_reader_work_on_cuda(tmp_path: Path) -> None:
    with fake_cuda():
        run_stages(_config(tmp_path), quiet=True)
        run_stages(_config(tmp_path, resume=True, lm__precision="auto"), quiet=True)
        there = load(tmp_path / "run", device="cuda")
        texts = ["ba do fe gi ku la mo ne pi ru sa ti vo zu ba do", "zu vo ti"]
        rules: dict[str, Any] = {"rule": "four_levels", "also": ("static", "rms+cache")}
        found = there.score_many(texts, lanes=2, stats=("entropy",), **rules)
        stream = there.score_many(texts, protocol="stream", **rules)
        reader = there.reader("four_levels")
        reader.score(texts[0])
        reader.save(tmp_path / "memory")
        more = there.reader("four_levels", memory=tmp_path / "memory").score(texts[1])
        assert there.weights["embedding"].is_cuda
    here = load(tmp_path / "run", device="cpu")
    with eager():
        want = here.score_many(texts, lanes=2, stats=("entropy",), **rules)
        wanted_stream = here.score_many(texts, protocol="stream", **rules)
    assert len(more) > 0
    for table, other in ((found, want), (stream, wanted_stream)):
        numbers = [n for n in other.column_names if n.startswith(("surprisal", "entropy"))]
        assert len(numbers) >= 3
        for name in numbers:
            a, b = table[name].to_numpy(), other[name].to_numpy()
            np.testing.assert_allclose(a, b, atol=1e-3, err_msg=name)
