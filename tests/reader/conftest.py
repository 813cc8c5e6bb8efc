"""A tiny trained model with every extension that learned rules read with."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import tiny_config, write_corpus

from mlm.reader import TrainedModel, load
from mlm.runs.stages import run_stages


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Two stages with the parts of `--rule best`, in seconds."""
    home = tmp_path_factory.mktemp("reader")
    config = tiny_config(
        write_corpus(home / "toy"),
        home / "run",
        lm__epochs=2.0,
        adapt__dynamic="softmax.low,lstm.*.input.low,lstm.*.recurrent,bias",
        adapt__rank=16,
        meta__rules=("four_levels",),
        meta__steps=1,
        evaluation__rules=("static", "rms", "rms+cache", "four_levels"),
        extensions__word_coupling__directions=4,
        extensions__boundaries__on=True,
        extensions__intra_segment__on=True,
        extensions__learned_basis__words=200,
        extensions__ngram_memory__tokens=256,
        extensions__ngram_read_out__words=200,
        extensions__surprise_weighting__share=0.25,
    )
    run_stages(dataclasses.replace(config, stages=("lm", "meta", "evaluate")), quiet=True)
    return load(home / "run")
