"""What meta-training may move: the rule, theta_0, the weights that never adapt; and how."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, Finished
from tiny import as_flags
from worlds import EOS, check_resumed, gradients_of_a_step, tiny_base

from mlm.base.errors import UserError
from mlm.base.names import LEARNED, RULES
from mlm.experimental.through import ThroughRMS
from mlm.models.base import AdaptationBase
from mlm.models.recurrent import RecurrentLM
from mlm.reading.step import begin, step
from mlm.rules.family import start_at
from mlm.rules.gates import LinearGates
from mlm.rules.hand_made import RMS
from mlm.rules.protocol import as_parameters
from mlm.settings.checks import validate
from mlm.settings.config import Config
from mlm.settings.flags import replaced
from mlm.settings.sections import AdaptConfig, LMTrainingConfig, MetaConfig, ModelConfig
from mlm.store.run_folder import RunFolder
from mlm.store.tensors import load_tensors
from mlm.text.streams import Text
from mlm.training.language_model import LMTrainer
from mlm.training.meta import MetaTrainer, reptile, weights_to_learn

DYNAMIC = ("lstm.0.recurrent", "softmax.bias")


def _text(vocabulary: int = 12, seed: int = 0) -> Text:
    """Articles in which every word is likely to come again: each uses three words of its own."""
    rng = np.random.default_rng(seed)
    articles = [rng.choice(rng.integers(1, vocabulary, 3), size=200) for _ in range(8)]
    return Text(articles, 1600, EOS)


def _trainer(base: AdaptationBase, **changes) -> MetaTrainer:
    settings = MetaConfig(lanes=3, unroll=4, steps=6, learning_rate=0.05, **changes)
    rule = LinearGates()
    return MetaTrainer(base, rule, rule.start_at_rms(base, 0.02, 0.05), _text(), settings, 0)


def test_names_of_what_is_learned() -> None:
    base = tiny_base(DYNAMIC, layers=1)
    assert weights_to_learn(base, ("rule",)) == ()
    assert set(weights_to_learn(base, ("rule", "theta_0"))) == set(DYNAMIC)
    rest = set(base.weights) - set(DYNAMIC)
    assert set(weights_to_learn(base, ("static",))) == rest
    assert set(weights_to_learn(base, ("theta_0", "static"))) == set(base.weights)


@pytest.mark.parametrize(
    ("learn", "rule_moves", "theta_0_moves", "static_moves"),
    [
        (("rule",), True, False, False),
        (("theta_0",), False, True, False),
        (("static",), False, False, True),
        (("rule", "theta_0", "static"), True, True, True),
    ],
)
def test_only_what_is_learned_moves(learn, rule_moves, theta_0_moves, static_moves) -> None:
    """The caller's memory is never written."""
    base = tiny_base(DYNAMIC, layers=1)
    before = {n: w.clone() for n, w in base.weights.items()}
    trainer = _trainer(base, learn=learn, weight_rate=1e-3)
    start = {n: p.clone() for n, p in trainer.parameters.items()}
    for _ in range(2):
        trainer.train_step()
    assert any(not torch.equal(p, start[n]) for n, p in trainer.parameters.items()) == rule_moves
    for name, w in trainer.base.weights.items():
        moves = theta_0_moves if name in DYNAMIC else static_moves
        assert torch.equal(w, before[name]) != moves, name
        assert torch.equal(base.weights[name], before[name])


@pytest.mark.parametrize("gradient", ["reverse", "checkpoint", "forward", "second"])
@pytest.mark.parametrize("theta_0", ["gradient", "reptile"])
def test_theta_0_trained_through_the_adaptation_reads_better(gradient, theta_0) -> None:
    """The same text again, from theta_0 and with the rule as it was: a lower meta-loss."""
    base = tiny_base(DYNAMIC, layers=1)
    trainer = _trainer(
        base, learn=("theta_0",), gradient=gradient, theta_0=theta_0, weight_rate=0.02
    )
    pieces = [trainer.lanes.next() for _ in range(8)]

    def loss(home: AdaptationBase) -> float:
        bound = trainer.rule.bind(trainer.parameters, home)
        reader, total = begin(home, 3, bound), 0.0
        for piece in pieces:
            now = step(home, bound, reader, piece)
            reader, total = now.after, total + float(now.scored.nll.sum())
        return total

    first = loss(trainer.base)
    for _ in range(6):
        trainer.train_step()
    assert loss(trainer.base) < 0.98 * first


def test_lanes_keep_their_distance_while_theta_0_moves() -> None:
    """What a lane has learned is its distance from theta_0; Reptile leaves the lanes alone."""
    base = tiny_base(DYNAMIC, layers=1)
    for theta_0 in ("gradient", "reptile"):
        trainer = _trainer(base, learn=("theta_0",), theta_0=theta_0, weight_rate=0.01)
        seen: dict[str, torch.Tensor] = {}
        plain = trainer.gradient

        def noted(unroll, plain=plain, seen=seen, trainer=trainer):
            found = plain(unroll)
            seen.update({n: w.clone() for n, w in found.reader.weights.items()})
            seen["theta_0"] = trainer.base.weights[DYNAMIC[0]].clone()
            return found

        trainer.gradient = noted
        trainer.train_step()
        moved = trainer.base.weights[DYNAMIC[0]] - seen["theta_0"]
        assert float(moved.abs().max()) > 1e-4
        shift = trainer.reader.weights[DYNAMIC[0]] - seen[DYNAMIC[0]]
        want = moved if theta_0 == "gradient" else torch.zeros_like(moved)
        torch.testing.assert_close(shift, want.expand_as(shift), rtol=0, atol=1e-14)


def test_reptile_points_from_the_lanes_to_theta_0() -> None:
    base = tiny_base(DYNAMIC, layers=1)
    reader = begin(base, 2)
    weights = {n: w + torch.tensor([1.0, 3.0]).view(-1, *[1] * (w.dim() - 1)).double()
               for n, w in reader.weights.items()}  # fmt: skip
    found = reptile(base, reader._replace(weights=weights), ("softmax.bias", "embedding"))
    assert list(found) == ["softmax.bias"]
    torch.testing.assert_close(found["softmax.bias"], torch.full((12,), -2.0).double())


@pytest.mark.parametrize(
    "changes",
    [
        {"learn": ("rule", "theta_0", "static")},
        {"gradient": "pes", "pes_pairs": 2},
        {"gradient": "second", "learn": ("theta_0",)},
        {"ewc": 3.0, "gradient": "forward"},
    ],
)
def test_training_resumes_bit_for_bit(changes, tmp_path: Path) -> None:
    base = tiny_base(DYNAMIC, layers=1)
    whole = _trainer(base, **changes)
    for _ in range(4):
        whole.train_step()
    half = _trainer(base, **changes)
    for _ in range(2):
        half.train_step()
    half.save(RunFolder(tmp_path), "mark")
    rest = _trainer(base, **changes)
    rest.load(RunFolder(tmp_path), "mark")
    for _ in range(2):
        rest.train_step()
    for name, value in whole.trained.items():
        assert torch.equal(rest.trained[name], value), name
    for name, value in whole.reader.weights.items():
        assert torch.equal(rest.reader.weights[name], value), name


def test_the_penalty_holds_the_lanes_back() -> None:
    """A strong penalty teaches the rule to stay near theta_0."""
    base = tiny_base(DYNAMIC, layers=1)
    rates = []
    for ewc in (0.0, 1e4):
        trainer = _trainer(base, ewc=ewc)
        for _ in range(4):
            trainer.train_step()
        rates.append(float(trainer.parameters["update"][:, 0].mean()))
    assert rates[1] < rates[0] - 0.05


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learn": ()}, "--meta.learn is empty"),
        ({"gradient": "pes", "learn": ("rule", "theta_0")}, "pes trains the rule only"),
        ({"free_copy": True, "learn": ("theta_0",)}, "--meta.free-copy"),
        ({"start": "nothing"}, "--meta.start is nothing; choose from"),
        ({"fisher": "off"}, "--meta.start is rms, whose steps follow the Fisher"),
        ({"ewc": math.inf}, "--meta.ewc"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        validate(Config(meta=dataclasses.replace(MetaConfig(), **changes)))


# ---------------------------------------------------------------- stage 1 through the adaptation


def _through(**changes) -> ThroughRMS:
    lm = {"through": "rms", "lanes": 4, "segment": 10, "epochs": 9.0, "precision": "float32"}
    lm |= {"dropout_input": 0.0, "dropout_hidden": 0.0, "dropout_output": 0.0}
    config = Config(lm=LMTrainingConfig(**{**lm, **changes}), model=ModelConfig(8, 8))
    return ThroughRMS(config, RecurrentLM(12, 8, 8, 1), _text(), torch.device("cpu"))


@pytest.mark.slow
def test_weights_trained_to_be_rewritten_gain_more_from_it() -> None:
    """Every article has words of its own: the ordinary model averages over them."""
    trainer = _through()
    config = Config(
        lm=dataclasses.replace(trainer.settings, through="none"), model=ModelConfig(8, 8)
    )
    plain = LMTrainer(config, trainer.shape, trainer.text, torch.device("cpu"))
    while trainer.step < trainer.steps:
        trainer.train_step()
        plain.train_step()
    mine = trainer.validation_loss(_text(seed=5))
    for n, w in trainer.weights.items():
        w.data.copy_(plain.weights[n].data)
    assert mine < trainer.validation_loss(_text(seed=5)) - 0.05


def test_the_gradient_is_that_of_reading_under_the_lanes_own_weights(monkeypatch) -> None:
    """Every weight's gradient, before Adam, is the sum over lanes of the loss's by that weight."""
    trainer = _through()
    for _ in range(5):
        trainer.train_step()
    base, reader = trainer.base(), trainer.reader
    state = trainer.stream.state_dict()
    segment = next(trainer.stream)
    trainer.stream.load_state_dict(state)
    assert not bool(segment.new.any())
    assert any(bool((w != base.weights[n]).any()) for n, w in reader.weights.items())
    leaves = {n: w.clone().requires_grad_() for n, w in base.weights.items()}
    own = {n: leaves[n] + (reader.weights[n] - base.weights[n]) for n in trainer.dynamic}
    now = trainer.shape.read({**leaves, **own}, segment.inputs, segment.targets, reader.state)
    mean = (now.nll * segment.mask).sum() / segment.mask.sum()
    want = torch.autograd.grad(mean, list(leaves.values()))
    seen = gradients_of_a_step(trainer, monkeypatch)
    for name, g in zip(leaves, want, strict=True):
        torch.testing.assert_close(seen[name], g, rtol=1e-4, atol=1e-6)


def test_stage_1_through_the_adaptation_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resumed(_through, tmp_path)


def test_the_running_fisher_is_the_mean_of_squared_gradients() -> None:
    trainer = _through()
    gradients = {n: torch.full_like(w, 2.0) for n, w in trainer.reader.weights.items()}
    for _ in range(3):
        trainer.count(gradients, torch.tensor([True, True, False, True]))
    for r in trainer.base().rms.values():
        torch.testing.assert_close(r, torch.full_like(r, 2.0))


def test_dropout_is_refused_through_the_adaptation() -> None:
    with pytest.raises(UserError, match="without dropout"):
        validate(replaced(Config(), {"lm.through": "rms", "lm.dropout_output": 0.1}))


def test_the_hand_made_rule_rests_until_there_is_a_fisher() -> None:
    trainer = _through()
    trainer.train_step()
    for n, w in trainer.reader.weights.items():
        torch.testing.assert_close(w, trainer.weights[n].detach().expand_as(w))
    trainer.train_step()
    moved = [
        bool((w != trainer.weights[n].detach()).any()) for n, w in trainer.reader.weights.items()
    ]
    assert all(moved)
    assert isinstance(trainer.bound(trainer.base()).rule, RMS)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the whole path


@pytest.mark.slow
def test_every_rule_is_trained_and_scored_by_its_name(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    """All learned rules, all hand-made ones, a cache on top; a rule starts as a learned one."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    rules = [*(r for r in RULES if r != "mlp"), "static+cache", "three_levels+cache"]
    flags = as_flags(dataclasses.replace(finished.config, out=folder))
    learned = [r for r in LEARNED if r != "mlp"]
    flags += ["--meta.hidden", "2", "--meta-steps", "1", "--meta.unroll", "3"]
    flags += ["--max-articles", "2"]
    done = command(
        "train", *flags, "--stages", "meta", "evaluate",
        "--train-rules", *learned, "--rules", *rules,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    totals = {(r["rule"], r["protocol"]): r for r in rows if r["kind"] == "total"}
    for rule in rules:
        for protocol in ("article", "stream"):
            assert totals[rule, protocol]["word_perplexity"] > 1
    nats = {rule: totals[rule, "article"]["nll"] for rule in rules}
    others = {rule: n for rule, n in nats.items() if rule != "two_levels"}  # may not FLUSH yet
    assert len(set(others.values())) == len(others), "every rule is another one"
    assert nats["static+cache"] < nats["static"]
    assert totals["adam", "article"]["settings"].keys() == {"rate", "decay", "momentum", "square"}
    assert totals["three_levels+cache", "stream"]["settings"]["cache weight"] > 0
    done = command(
        "train", *flags, "--stages", "meta", "evaluate", "--train-rules", "mlp",
        "--meta.start", "three_levels", "--meta-steps", "0", "--rules", "mlp",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    mlp = next(r for r in rows if (r["kind"], r["rule"]) == ("total", "mlp"))
    assert mlp["nll"] == pytest.approx(nats["three_levels"], rel=1e-5), "an exact start"
    done = command(
        "train", *flags, "--stages", "meta", "evaluate", "--train-rules", "three_levels",
        "--meta.learn", "theta_0", "static", "--rules", "three_levels",
    )  # fmt: skip
    assert done.code == 0, done.err
    tensors, _ = load_tensors(RunFolder(folder).checkpoint("three_levels"), "")
    assert {n for n in tensors if n.startswith("weights/")} >= {"weights/embedding"}


def test_a_start_that_is_not_trained_yet_is_named(
    finished: Finished, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    flags = as_flags(dataclasses.replace(finished.config, out=folder))
    done = command("train", *flags, "--stages", "meta", "--meta.start", "lstm")
    assert "--meta.start lstm: this rule is not trained in" in done.error


def test_pes_moves_what_is_in_thousandths_ten_times_as_far() -> None:
    """The scale of FLUSH, of the fast and of the slow memory."""
    base = tiny_base(DYNAMIC, layers=1)
    rule = LinearGates(slow=True)
    start = start_at(rule, RMS(), as_parameters({"rate": 0.02, "decay": 0.05}, base), base)
    settings = MetaConfig(lanes=1, gradient="pes", pes_pairs=1, pes_sigma=0.03)
    evolution = MetaTrainer(base, rule, start, _text(), settings, 0).evolution
    assert evolution is not None
    sizes = evolution.sigma_P.split([p.numel() for p in start.values()])
    found = {n: float(s[0]) for n, s in zip(start, sizes, strict=True)}
    scaled = {"flush_scale", "slow/flush_scale"}
    assert found == pytest.approx({n: 0.3 if n in scaled else 0.03 for n in start})


@pytest.mark.parametrize("guard", [0.0, 2.0])
def test_training_through_a_rule_follows_the_guard(guard: float) -> None:
    config = Config(adapt=AdaptConfig(guard=guard), model=ModelConfig(8, 8))
    trainer = ThroughRMS(config, RecurrentLM(12, 8, 8, 1), _text(), torch.device("cpu"))
    assert trainer.base().limit == (guard or math.inf)
