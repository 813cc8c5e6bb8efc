"""The evaluation harness gets the likelihoods of whole strings, with the harness itself."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from adapters.stand_in import Model
from conftest import Finished

import mlm
from mlm.base.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
TEXTS = ("The old mill, by the old river.", "", "The mill slept.\nThe river ran.")


@pytest.fixture
def harness() -> Any:
    """`mlm.adapters.harness`; most of these tests need the library."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `harness`)")
    return importlib.import_module("mlm.adapters.harness")


@pytest.fixture
def model(harness: Any) -> Any:
    """Of a model that costs nothing."""
    return harness.HarnessLM(Model())


def asked(*requests: tuple[Any, ...]) -> list[Any]:
    """Requests of the harness, as far as a model sees them."""
    return [SimpleNamespace(args=args) for args in requests]


def nats(text: str, rule: str = "best") -> float:
    """Minus log-likelihood of a text, the plain sum."""
    rows = Model().score_many([text, "x"], rule).to_pylist()
    return sum(row["surprisal_plain"] for row in rows if row["doc_id"] == 0) * math.log(2)


def test_texts_are_documents_of_their_own(model: Any) -> None:
    found = model.loglikelihood_rolling(asked(*((text,) for text in TEXTS)))
    assert found == pytest.approx([-nats(text) for text in TEXTS])
    assert found[1] == 0
    assert type(found[0]) is float


@pytest.mark.parametrize(
    ("said", "lanes"), [(None, None), ("auto", None), ("auto:4", None), (3, 3), ("8", 8)]
)
def test_batch_size_is_the_number_of_lanes(harness: Any, said: Any, lanes: int | None) -> None:
    assert harness.HarnessLM(Model(), batch_size=said).lanes == lanes
    assert harness.HarnessLM(Model()).lanes is None


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("The old mill by the old river", " slept."),
        ("The old mill by the old river ", "slept."),
        ("The old mill", ", by the river."),  # one word with what stands before it
        ("", "The old mill slept."),
        ("The mill.\n", "It slept."),
    ],
)
def test_a_continuation_is_what_it_adds(model: Any, context: str, continuation: str) -> None:
    ((found, greedy),) = model.loglikelihood(asked((context, continuation)), disable_tqdm=True)
    assert found == pytest.approx(nats(context) - nats(context + continuation))
    assert greedy is False


def test_continuations_of_one_context_do_not_know_each_other(model: Any) -> None:
    """The context is read once, and taught what comes after it by none of them."""
    context = "The mill by the river, the mill"
    asked_for = [" slept.", " slept.", " ran to the river.", ""]
    found = model.loglikelihood(asked(*((context, end) for end in asked_for)), disable_tqdm=True)
    each = [nats(context) - nats(context + end) for end in asked_for]
    assert [value for value, _ in found] == pytest.approx(each)
    assert found[0] == found[1]


def test_greedy_is_every_token_the_likeliest(model: Any) -> None:
    """What has come four times costs the stand-in little: rank 1. The context need not be."""
    context = "the mill " * 4 + "river"
    found = model.loglikelihood(asked((context, " the mill"), (context, " the brook")), True)
    assert [greedy for _, greedy in found] == [True, False]


def test_text_ends_before_the_first_stop(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def generate(self: Any, prompt: str, **flags: Any) -> str:
        seen.append((prompt, flags))
        return "the mill. the river\nran"

    monkeypatch.setattr("adapters.stand_in.Reader.generate", generate, raising=False)
    found = model.generate_until(
        asked(
            ("a", {"until": ["\n", "river"], "max_gen_toks": 7}),
            ("b", {"until": ".", "temperature": 0.5, "do_sample": True}),
            ("c", {"do_sample": True}),
            ("d", {"temperature": 0.5, "do_sample": False}),
        ),
        disable_tqdm=True,
    )
    whole = "the mill. the river\nran"
    assert found == ["the mill. the ", "the mill", whole, whole]
    assert [prompt for prompt, _ in seen] == ["a", "b", "c", "d"]
    assert [flags["words"] for _, flags in seen] == [7, 256, 256, 256]
    greedy, half, one, again = (flags["temperature"] for _, flags in seen)
    assert (half, one) == (0.5, 1.0)
    assert greedy == again < 1e-3


def test_a_trained_model_continues_greedily(harness: Any, finished: Finished) -> None:
    """After a full stop a line ends, as in all its text; likelihoods are differences."""
    model = harness.HarnessLM(str(finished.folder), rule="two_levels", batch_size="auto")
    context, text = " ".join(["badoku fegi lamone ."] * 9), "\n"
    found = model.loglikelihood(asked((context, text), (context, " lamone")), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]
    whole = model.loglikelihood_rolling(asked((context,), (context + text,)))
    assert found[0][0] == pytest.approx(whole[1] - whole[0], abs=1e-3)
    (written,) = model.generate_until(asked((context, {"max_gen_toks": 3})), disable_tqdm=True)
    assert len(written.split()) <= 3
    assert written.split(), "it writes"


def test_without_the_harness_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "mlm.adapters.harness", raising=False)
    with pytest.raises(UserError, match="extra `harness`"):
        importlib.import_module("mlm.adapters.harness")


def test_the_page_runs_a_task_of_local_text(
    harness: Any,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files and the lines of docs/adapters.md, on a trained model; both perplexities of it."""
    page = DOCS.read_text(encoding="utf-8").partition("## The evaluation harness")[2]
    files = re.findall(r"^`([\w./]+)`:\n\n```\w*\n(.*?)^```", page, re.M | re.S)
    for name, content in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0]
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("wikipedia-small", str(finished.folder)), names)
    found = names["found"]["results"]["my_text"]
    assert "word_perplexity" in capsys.readouterr().out
    (data,) = (content for name, content in files if name.endswith(".jsonl"))
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    rows = mlm.load(str(finished.folder)).score_many(texts).to_pylist()
    total = sum(row["surprisal_plain"] for row in rows) * math.log(2)
    theirs = sum(len(re.split(r"\s+", text)) for text in texts)
    log_perplexity = math.log(found["word_perplexity,none"])
    assert log_perplexity == pytest.approx(total / theirs)
    # Ours counts line ends as words, too; the page's formula links the two.
    ours = total / len(rows)
    assert any(row["word"].isspace() for row in rows)
    assert log_perplexity == pytest.approx(ours * len(rows) / theirs)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte,none"] == pytest.approx(total / size / math.log(2))
