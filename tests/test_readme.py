"""The commands of README and docs/ are run as written, only smaller; the setup is .ci/run's."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import tyro
from conftest import Command
from tiny import as_flags, tiny_config, write_corpus

from benchmarks.growth import TIMED
from benchmarks.growth_unroll import Place
from benchmarks.readme import pages
from benchmarks.timing import SIZES, Machine, measure_machine
from mlm.models.recurrent import RecurrentLM
from mlm.settings.config import Config
from mlm.settings.presets import settings
from mlm.text.hub import HUB_CONFIGS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RUN = (README, *sorted((ROOT / "docs").glob("*.md")))
"""Pages whose commands are run."""
CI = ROOT / ".ci" / "run"
SCRIPTS = ("train", "evaluate", "visualize")
#: Steps that prepare or check the whole project: .ci/run must have a line that does each.
CI_STEPS = {
    "python3 -m venv .venv": r'^"?\S*python3\S* -m venv ',
    ". .venv/bin/activate": r"^source \S*/bin/activate",
    "pip install -r requirements.txt": r"pip install .*-r requirements\.txt$",
    "pytest": r"^python -m pytest$",
}
#: Text that stands for the reader's own.
PLACE = "path/to/text"
BENCHMARK_FLAGS = {
    "examples.own_model": "",
    "benchmarks.dynamic_sets": "--sets softmax.bias --budget 1 --steps 1 --words 100",
    "benchmarks.publish": "",
    "benchmarks.pareto": "--sets softmax.bias --segment 20 --budget 1 --steps 1 --words 100 "
    "--timing-tokens 100 --repetitions 1",
    "benchmarks.ceiling": "--rounds 1 --lanes 2 --segments 5 --unroll 2 --updates 1",
    "benchmarks.peers": "--rounds 1 --lanes 2 --segment 5 --unroll 2 --updates 1",
    "benchmarks.busy": "--rounds 1 --lanes 2 --segment 5 --updates 1",
    "benchmarks.rules": "--rows hand-made --budget 1 --steps 1 --words 100 --articles 1 "
    "--timing-tokens 100 --repetitions 1 --updates 2",
    "benchmarks.claim": "--seeds 1 --resamples 9 --budget 1 --steps 1 --articles 1 "
    "--segment 20 --rank 2 --lanes 2 --rival-segment 20 --rival-budget 1 --forms lstm all same "
    "--no-fewer --no-ablate",
    "benchmarks.unread": "--skip 20 --longer 1",
    "benchmarks.fisher": "--words 100 --priors 0 0.04 --segment 5 --budget 1",
    "benchmarks.claim_speed": "--tokens 160 --rounds 1",
    "benchmarks.parts": "",
    "benchmarks.reproduce": "",
    "benchmarks.growth": "--only lanes --rounds 1 --updates 1 --unroll 2",
}
#: The libraries that benchmarks compare with: they are not installed for the tests.
OPTIONAL = "pip install --no-deps -r benchmarks/requirements.txt"
#: tests/test_package.py installs it.
INSTALL = "pip install ."
#: tests/test_results.py does what it does, and writes nothing.
FILL = "python -m benchmarks.readme"
TINY = RecurrentLM(vocabulary=11, embedding=8, hidden=8, layers=1)


def commands_in(text: str) -> list[str]:
    """Every different command of a Markdown text, in order.

    Lines of ```bash blocks (comments and line continuations resolved, `&&` divided), and inline
    code that begins with `python`, `pytest` or `pip`.
    """
    found: dict[str, None] = {}
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:python3?|pytest|pip)\b[^`\n]*)`", prose)
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words:
                found[shlex.join(words)] = None
    return list(found)


def scaled(command: str, folder: Path) -> tuple[str, list[str]] | None:
    """(module, its words) that run `command` in `folder` on little text; None: others run it.

    Fails for a command that no test knows how to run.
    """
    if command in CI_STEPS or command in (OPTIONAL, INSTALL, FILL):
        return None
    python, *words = shlex.split(command)
    assert python in ("python", "python3"), f"README: no test runs `{command}`"
    if words[:3] == ["-m", "mlm", "score"]:
        return "mlm.cli.score", words[3:]
    if words[0] == "-m":
        assert words[1] in BENCHMARK_FLAGS, f"README: no test runs `{command}`"
        return words[1], [*words[2:], *BENCHMARK_FLAGS[words[1]].split()]
    script = words.pop(0).removesuffix(".py")
    assert script in SCRIPTS, f"README: no test runs `{command}`"
    small = _small(words, folder) if script == "train" and "--help" not in words else []
    for place, word in enumerate(words):
        if place and words[place - 1] == "--corpus":
            assert word in (*HUB_CONFIGS, "pydocs", PLACE), f"README: no text for `{command}`"
            words[place] = PLACE
        elif place and words[place - 1] == "--device":
            words[place] = "cpu"
    return script, [*words, *small]


def _small(words: list[str], folder: Path) -> list[str]:
    """Flags that make a new run a matter of a second or two; none for a run that goes on."""

    def value(flag: str, usual: str) -> str:
        return words[words.index(flag) + 1] if flag in words else usual

    corpus = value("--corpus", "pydocs")
    out = Path(value("--out", f"runs/{Path(corpus).name}"))
    later = {
        "adapt.fisher-words": 100,
        "meta.unroll": 2,
        "meta.steps": 1,
        "evaluation.budget": 1,
        "evaluation.tune-words": 100,
        "evaluation.max-articles": 2,
        "evaluation.resamples": 9,
    }
    if (folder / out / "config.json").exists():
        again = [(f"--{flag}", str(value)) for flag, value in later.items()]
        return [word for pair in again for word in pair] if "--rule" in words else []
    assert "--resume" not in words, f"README continues {out}, which no command before began"
    names = {flag.replace(".", "__").replace("-", "_"): value for flag, value in later.items()}
    config = tiny_config(Path("pydocs"), out, lm__epochs=0.3, lm__validations=1, **names)
    flags = as_flags(config)

    def drop(flag: str) -> None:
        place = flags.index(flag)
        del flags[place : place + 2]

    for flag in ("--out", "--lm.segment"):  # of the command's own
        if flag in words:
            drop(flag)
    if settings(value("--size", "tiny")).text.vocabulary == "word":  # the text has few words
        drop(next(flag for flag in flags if flag.endswith("vocabulary-size")))
    return flags if "--corpus" in words else ["--corpus", PLACE, *flags]


def _measure_machine_quickly(
    shape: RecurrentLM, device: torch.device, bf16: bool, small: bool
) -> Machine:
    return measure_machine(shape, device, bf16, small=True)


def test_commands_are_found() -> None:
    """The parser itself: blocks, comments, continuations, `&&`, tables; other blocks ignored."""
    text = (
        "Run `python train.py --help` or `mlm/reading/step.py`.\n\n```bash\n# first\n"
        "python3 -m venv .venv && python train.py \\\n  --out x  # a run\n```\n"
        "| `pytest` | tests |\n```python\npython evaluate.py\n```\n"
    )
    assert commands_in(text) == [
        "python3 -m venv .venv",
        "python train.py --out x",
        "python train.py --help",
        "pytest",
    ]


@pytest.mark.parametrize(
    "line",
    ["make all", "python other.py", "python -m mlm", "python train.py --corpus mine", "pip list"],
)
def test_an_unknown_command_fails(line: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="README"):
        scaled(line, tmp_path)


def test_setup_is_what_ci_does() -> None:
    lines = CI.read_text(encoding="utf-8").splitlines()
    shown = commands_in(README.read_text(encoding="utf-8"))
    for step, pattern in CI_STEPS.items():
        assert step in shown, f"README does not show `{step}`"
        assert any(re.search(pattern, line) for line in lines), f".ci/run lacks `{step}`"
    assert CI.stat().st_mode & 0o111, ".ci/run cannot be executed"


@pytest.mark.timeout(900)  # thirty commands, on cores that other work may share
@pytest.mark.slow
@pytest.mark.parametrize("and_docs", [False, True], ids=["readme", "docs"])
def test_every_command_runs(
    and_docs: bool, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's (and then those of docs/), in an empty folder, on a tiny corpus, with tiny settings.

    Pictures are drawn by `visualize.py`; the others, for which that would be most of the time,
    leave it out.
    """
    write_corpus(tmp_path / PLACE, train=6, valid=3, test=3)
    (tmp_path / "README.md").write_text("# A kettle\n\nThe kettle sings.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "S", TINY)
    monkeypatch.setattr("benchmarks.ceiling.measure_machine", _measure_machine_quickly)
    monkeypatch.setitem(TIMED, "lanes", (Place(TINY), (1, 2)))
    monkeypatch.setattr("mlm.stages.evaluate.draw", lambda folder, split=None: [])
    ran = []
    shown = RUN if and_docs else [README]
    for line in commands_in("\n\n".join(page.read_text(encoding="utf-8") for page in shown)):
        if line.startswith("cp -r "):
            source, copy = line.split()[2:]
            shutil.copytree(source, copy)
            continue
        step = scaled(line, tmp_path)
        if step is None:
            continue
        module, words = step
        outcome = command(module, *words)
        assert outcome.code == 0, f"README: `{line}`, run as {module} {words}:\n{outcome.err}"
        ran.append(line)
    assert (tmp_path / "runs" / "pydocs" / "figures" / "figure2.png").is_file()
    assert not (tmp_path / "results").exists(), "results/ is for what was published"
    assert "python train.py" in ran
    assert {line.split()[1] for line in ran} >= {f"{script}.py" for script in SCRIPTS}


@pytest.mark.parametrize("page", [page for page in pages() if ROOT / page not in RUN])
def test_commands_of_other_pages_are_understood(
    page: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take hours; their flags are parsed, by `train.py` and by every benchmark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlm.stages.order.run_stages", lambda config: None)
    variables: dict[str, list[str]] = {}
    for line in commands_in((ROOT / page).read_text(encoding="utf-8")):
        first, *rest = shlex.split(line)
        if found := re.fullmatch(r"(\w+)=(.*)", first):
            variables[f"${found[1]}"] = shlex.split(found[2])
            continue
        words = [word for one in rest for word in variables.get(one, [one])]
        if first != "python" or "..." in words:
            continue
        if words[0] == "train.py":
            outcome = command("train", *words[1:])
            assert outcome.code == 0, f"{page}: `{line}`:\n{outcome.err}"
        elif words[0] == "-m" and words[1].startswith("benchmarks."):
            options = getattr(importlib.import_module(words[1]), "Options", None)
            if options is not None:
                tyro.cli(options, args=words[2:])


def test_python_of_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The few lines, with the released model."""
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith("import ")]
    assert len(lines) <= 6
    exec(code, {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) > 20
    assert rows[0][0] == "The"
    assert abs(float(rows[0][1]) - float(rows[0][2])) < 0.1, "nothing is learned before a word"
    total, learned = (sum(float(row[k]) for row in rows) for k in (1, 2))
    assert learned < 0.8 * total, "a text that repeats itself is learned"


def test_readme_is_short() -> None:
    assert README.stat().st_size <= 9_000


def test_train_needs_no_arguments(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python train.py` as it stands in README: the default settings reach the stages."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("mlm.stages.order.run_stages", seen.append)
    outcome = command("train")
    assert outcome.code == 0, outcome.err
    assert seen == [Config()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_train_without_arguments(tmp_path: Path) -> None:
    """The promise of README: at most six minutes on two cores, the table, the pictures, the gain.

    Twice the time is allowed, because other work may share the cores.
    """
    clock = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - clock
    assert done.returncode == 0, done.stderr
    assert seconds < 720
    run = tmp_path / "runs" / "pydocs"
    rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    totals = {(r["rule"], r["protocol"]): r for r in rows if r["kind"] == "total"}
    for protocol in ("article", "stream"):
        assert totals["three_levels", protocol]["interval"][0] > 0.05, "it must win clearly"
        learned, rms = totals["three_levels", protocol], totals["rms", protocol]
        assert learned["nll"] <= rms["nll"], "it must not lose to the hand-made rule"
    ends = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [name for name, _ in ends] == ["page", "tables", "figures"]
    assert all((tmp_path / path).exists() for _, path in ends)
