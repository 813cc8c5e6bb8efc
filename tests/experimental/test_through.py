"""Stage 1 through a learned rule: the language model is trained for what another run learned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Command, Finished
from through_world import DYNAMIC, SHAPE, flags_through, text_of_articles, through, through_config
from worlds import check_resumed, gradients_of_a_step

from mlm.extensions import NGramMemory
from mlm.extensions.ngram_memory import History
from mlm.extensions.word_coupling import COUPLING
from mlm.models.extension import Told
from mlm.models.language_model import OutputTerms, WithinSegment, own_weights
from mlm.models.output_layer import token_nll
from mlm.reading.static import static_loss
from mlm.settings.sections import AdaptConfig
from mlm.store.models import load_base, load_lm
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors
from mlm.training.language_model import LMTrainer


def test_theta_0_is_the_model_that_is_trained() -> None:
    trainer = through()
    for _ in range(12):
        trainer.train_step()
    base = trainer.base()
    weights = {n: w.detach() for n, w in trainer.weights.items()}
    assert any(
        bool((w != base.weights["softmax.low"]).any())
        for w in trainer.reader.weights["softmax.low"]
    )
    tokens = torch.from_numpy(text_of_articles(3).articles[0][:21]).unsqueeze(0)
    state = SHAPE.initial_state(1)
    losses = []
    with torch.no_grad():
        for own in (weights, base.weights):
            output = SHAPE.run(own, tokens[:, :-1], state).output
            terms = OutputTerms(coupling=own.get(COUPLING))
            losses.append(token_nll(own, SHAPE, output, tokens[:, 1:], terms=terms))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("intra_segment", [True, False])
def test_the_gradient_is_that_of_the_loss_by_the_plain_weights(intra_segment, monkeypatch) -> None:
    """Autograd through L_0 = T^-1 W P^-1, what the lanes have learned and recall held constant.

    Without the guard: gates that were made up move lanes too far, and it would reset them.
    """
    monkeypatch.setattr("mlm.models.base.AdaptationBase.guarded", lambda base, *_: base)
    trainer = through(intra_segment)
    for _ in range(5):
        trainer.train_step()
    base, reader = trainer.base(), trainer.reader
    cursor = trainer.stream.state_dict()
    segment = next(trainer.stream)
    trainer.stream.load_state_dict(cursor)
    assert not bool(segment.new.any())
    leaves = {n: w.detach().clone().requires_grad_() for n, w in trainer.weights.items()}
    start = {n: leaves[n] for n in DYNAMIC if n in leaves}
    for matrix, name in (("embedding", "softmax"), ("lstm.0.input", "lstm.0.input")):
        low = leaves[matrix] @ torch.linalg.inv(base.weights[f"{name}.basis"])
        if name == "softmax":
            q = base.weights[COUPLING]
            low = torch.linalg.solve(torch.eye(24) + q @ q.t(), low)
        start[f"{name}.low"] = low
    own = {n: s + (reader.weights[n] - base.weights[n]) for n, s in start.items()}
    (memory,) = (e for e in base.extensions if isinstance(e, NGramMemory))
    history = reader.extras[memory.name]
    assert isinstance(history, History)
    model = own_weights({**base.weights, **reader.weights})
    hidden = trainer.shape.run(model, segment.inputs, reader.state)
    keys = hidden.output.detach()
    nothing = Told(OutputTerms(), {})
    recalled = memory.before(base.weights, history, segment, keys, nothing).terms
    assert recalled.added is not None
    assert bool(recalled.added.any())
    within = None
    if intra_segment:
        names = ("rows", "columns", "square")
        within = WithinSegment(*(base.weights[f"intra_segment/{name}"] for name in names))
    terms = recalled._replace(coupling=base.weights[COUPLING], within=within)
    every = own_weights({**base.weights, **leaves, **own})
    share = segment.mask / segment.mask.sum()  # every lane reads a whole segment
    count = segment.inputs.shape[1]
    now = trainer.shape.read(
        every,
        segment.inputs,
        segment.targets,
        reader.state,
        segment.mask / count,
        lambda _: terms,
    )
    assert bool(segment.mask.all())
    want = torch.autograd.grad(now.total * count * share[0, 0], list(leaves.values()))
    seen = gradients_of_a_step(trainer, monkeypatch)
    for name, g in zip(leaves, want, strict=True):
        assert bool(g.any()), name
        torch.testing.assert_close(seen[name], g, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_a_model_trained_for_the_rule_reads_better_with_it() -> None:
    trainer = through()
    plain = LMTrainer(through_config(), SHAPE, trainer.text, torch.device("cpu"))
    while trainer.step < trainer.steps:
        trainer.train_step()
        plain.train_step()
    new = text_of_articles(seed=5)
    mine = trainer.validation_loss(new)
    weights = {n: w.detach() for n, w in trainer.weights.items()}
    assert mine < static_loss(weights, SHAPE, new, 4, 10) - 0.1
    for n, w in trainer.weights.items():
        w.data.copy_(plain.weights[n].data)
    trainer.follow()
    assert mine < trainer.validation_loss(new) - 0.05


def test_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resumed(through, tmp_path)


# ---------------------------------------------------------------- the command


def test_the_command(finished: Finished, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "through"
    done = command("train", *flags_through(finished, out))
    assert done.code == 0, done.err
    old, new = (RunFolder(path).checkpoint("lm") for path in (finished.folder, out))
    before, _ = load_tensors(old, "")
    hash_ = load_tensors(new, "")[1]["vocabulary"]
    after, shape, _ = load_lm(new, hash_)
    assert shape.vocabulary == before["embedding"].shape[0]
    assert any(not torch.equal(after[n], w) for n, w in before.items())
    done = command("train", "--out", out, "--stages", "meta", "--meta-steps", 0)
    assert done.code == 0, done.err
    rule = finished.config.meta.rules[0]
    own, its_own = (
        load_tensors(RunFolder(path).checkpoint(rule), "")[0] for path in (out, finished.folder)
    )
    for n, value in its_own.items():
        torch.testing.assert_close(own[n], value, msg=f"{n}: training starts at that rule")
    mine, its = (
        load_base(RunFolder(p).checkpoint("memory"), hash_) for p in (out, finished.folder)
    )
    for n, r in its.rms.items():
        assert torch.equal(mine.rms[n], r), n
    for n, w in after.items():
        assert torch.equal(mine.weights[n], w), n
    done = command("train", "--out", out, "--stages", "meta", "--adapt.fisher-words", "100")
    assert done.code != 0
    assert "--adapt.fisher-words differ from the settings there" in done.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--lm.segment", "16"], "use --lm.segment 20"),
        (["--lm.dropout-input", "0.1"], "without dropout"),
        (["--hidden", "8"], "same --model"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: list[str], words: str, finished: Finished, tmp_path: Path, command: Command
) -> None:
    flags = [*flags_through(finished, tmp_path / "out"), *change]
    if "--hidden" in change:
        flags = [*flags, "--layers", "2"]
    done = command("train", *flags)
    assert done.code != 0
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_run_must_be_named(finished: Finished, tmp_path: Path, command: Command) -> None:
    flags = flags_through(finished, tmp_path / "out")
    at = flags.index("--lm.through-run")
    done = command("train", *flags[:at], *flags[at + 2 :])
    assert done.code != 0
    assert "--lm.through-run" in done.err
    flags[at + 1] = str(tmp_path / "nowhere")
    done = command("train", *flags)
    assert done.code != 0
    assert "Traceback" not in done.err


def test_the_guard_is_this_runs_own() -> None:
    base = through().base()
    assert (base.limit, base.guess) == (AdaptConfig().guard, pytest.approx(math.log(24)))
