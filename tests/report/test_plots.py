"""The pictures: what is drawn, from what, and what happens when something is missing."""

from __future__ import annotations

import csv
import json
import math
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from fake_run import made_up_losses, made_up_words, make_run
from matplotlib.figure import Figure
from matplotlib.text import Text

from mlm.base.errors import UserError
from mlm.base.names import RULES
from mlm.report import figure2 as figure2_module
from mlm.report.drawing import RULE_STYLES, WIDTHS, Look, rule_style
from mlm.report.figure2 import (
    Panel,
    figure2,
    letter,
    moving_average,
    panels_of,
    smooth,
    window_points,
)
from mlm.report.losses import LossTable
from mlm.report.plots import (
    draw_all,
    gain_by_occurrence,
    gain_by_position,
    read_metrics,
    training_curves,
    word_picture,
)
from mlm.report.word_picture import colour_range, ink_on, word_colour

REPOSITORY = Path(__file__).parents[2]
HOSTILE = ["</script>", "&amp;", "$x_1$", "🙂", "שלום", "中文", "a--b", "\x07", '"q"', "\\n", "%s"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), splits=("valid", "test"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- figure 2


def test_the_moving_average_is_centred_and_keeps_straight_lines():
    line = np.arange(30.0)
    inside = slice(4, -4)
    np.testing.assert_allclose(moving_average(line)[inside], line[inside])
    impulse = np.zeros(21)
    impulse[10] = 8
    np.testing.assert_allclose(moving_average(impulse)[5:16], [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5, 0])
    np.testing.assert_allclose(moving_average(np.full(3, 5.0)), 5)  # shorter than the window
    np.testing.assert_allclose(moving_average(np.arange(5.0), 3), [0.5, 1, 2, 3, 3.5])


def test_windows_hold_200_words_of_one_article():
    rng = np.random.default_rng(0)
    table = made_up_losses([made_up_words(n, rng) for n in (450, 1, 530)])
    points = window_points(table, "stream", ["static", "rms"], [0, 1, 2])
    spans = list(zip(points.place_P, points.from_P, points.to_P, strict=True))
    # 50 words left over join the window before them, 130 make one of their own
    assert spans == [
        (0, 0, 200),
        (0, 200, 450),
        (1, 0, 1),
        (2, 0, 200),
        (2, 200, 400),
        (2, 400, 530),
    ]
    assert points.centre_P[-1] == 451 + 465
    expected = table.loss("rms", "stream")[451 + 200 : 451 + 400].mean()
    assert points.loss_P["rms"][4] == pytest.approx(expected)
    assert points.perplexity("rms")[4] == pytest.approx(math.exp(expected))


def test_figure2_draws_all_panels_over_the_stream(run: Path, tmp_path: Path):
    table = LossTable.load(run / "losses.parquet")
    paths = figure2(table, tmp_path)
    assert [p.suffix for p in paths] == [".png", ".svg", ".pdf", ".csv"]
    rows = read_csv(paths[-1])
    assert sorted({row["letter"] for row in rows}) == list("ABCDEFGH")
    point = next(row for row in rows if row["letter"] == "A" and row["from"] == "200")
    gain = float(point["perplexity_static"]) - float(point["perplexity_two_levels"])
    assert float(point["gain_perplexity_two_levels_vs_static"]) == pytest.approx(gain, rel=1e-3)
    nats = float(point["nats_static"]) - float(point["nats_rms"])
    assert float(point["gain_nats_rms_vs_static"]) == pytest.approx(nats, abs=1e-4)
    finer = float(point["perplexity_two_levels"]) - float(point["perplexity_three_levels"])
    assert float(point["gain_perplexity_three_levels_vs_two_levels"]) == pytest.approx(
        finer, abs=1e-3
    )
    stream = table.loss("two_levels", "stream")[200:400].mean()
    assert float(point["perplexity_two_levels"]) == pytest.approx(math.exp(stream), rel=1e-4)


def test_figure2_starts_and_ends_where_asked(run: Path, tmp_path: Path):
    table = LossTable.load(run / "losses.parquet")
    rows = read_csv(figure2(table, tmp_path, articles=2, first=3, protocol="article")[-1])
    assert {(row["letter"], row["article"]) for row in rows} == {("A", "3"), ("B", "4")}
    assert rows[0]["title"] == table.title(2)  # the third
    figure2(table, tmp_path, articles=99)
    for first in (0, len(table.articles) + 1):
        with pytest.raises(UserError, match=rf"no article {first}; its articles are numbered 1 to"):
            figure2(table, tmp_path, first=first)


def test_figure2_shows_the_winner_its_rival_and_the_curves_of_the_paper():
    rules = ["static", "sgd", "rms", "two_levels", "three_levels", "four_levels"]
    nats, perplexity, paper = panels_of(rules, "four_levels")
    assert nats == Panel("nats", ("four_levels", "rms", "two_levels"), "static")
    assert perplexity == Panel("perplexity", nats.rules, "static")
    assert paper == Panel("perplexity", ("three_levels",), "two_levels")
    assert paper.title == "3 levels over 2 levels"
    assert panels_of(["static", "mine"], "mine") == [
        Panel("nats", ("mine",), "static"),
        Panel("perplexity", ("mine",), "static"),
    ]
    assert panels_of(rules, "four_levels", "rms")[0].rules == ("four_levels", "two_levels")
    assert len(panels_of(rules, "four_levels", "rms")) == 2
    assert figure2_module.WINDOW * figure2_module.SMOOTHED == 1600


def test_lines_do_not_average_across_articles():
    gain, place = np.r_[np.zeros(5), np.ones(5)], np.repeat([0, 1], 5)
    np.testing.assert_array_equal(smooth(gain, place), gain)
    assert 0 < moving_average(gain)[4] < 1


def _contrast_with_white(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) + 0.05)


def test_every_rule_has_one_dark_style_of_its_own():
    assert set(RULE_STYLES) == set(RULES)
    assert len({str(style) for style in RULE_STYLES.values()}) == len(RULES)
    assert all(_contrast_with_white(colour) >= 4.5 for colour, _ in RULE_STYLES.values())
    for rule in RULES:
        assert rule_style(f"{rule}+cache")["color"] == rule_style(rule)["color"]


@pytest.mark.slow
@pytest.mark.parametrize("width", ["text", "column"])
def test_pictures_fit_a_paper(run: Path, tmp_path: Path, width: str):
    """Their width in inches, letters of 7 and 8 points, text as text."""
    look = Look(WIDTHS[width], ("svg", "pdf"))
    table = LossTable.load(run / "losses.parquet")
    drawn = [*figure2(table, tmp_path, look=look), *gain_by_position(table, tmp_path, look=look)]
    drawn += word_picture(table, tmp_path, article=0, pair=("rms", "static"), look=look)
    for path in drawn:
        if path.suffix == ".svg":
            root = ElementTree.parse(path).getroot()
            assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(72 * look.width)
            sizes = set(re.findall(r"font: (?:bold )?([\d.]+)px", path.read_text()))
            assert sizes <= {"7", "8"}, path.name
        if path.suffix == ".pdf":
            assert b"/Type3" not in path.read_bytes()


def test_letters_go_on_after_z():
    assert [letter(i) for i in (0, 25, 26, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]


# ---------------------------------------------------------------- the other curves


def test_gain_by_position_draws_every_rule_and_protocol(run: Path, tmp_path: Path):
    rows = read_csv(gain_by_position(LossTable.load(run / "losses.parquet"), tmp_path)[-1])
    curves = {(row["protocol"], row["rule"]) for row in rows}
    assert len(curves) == 8
    assert ("article", "static") not in curves
    key = ("article", "rms", "0")
    first = next(row for row in rows if (row["protocol"], row["rule"], row["from"]) == key)
    evaluation = json.loads((run / "evaluation.json").read_text())
    same = next(
        row
        for row in evaluation
        if (row["kind"], row["split"], row["protocol"]) == ("position", "valid", "article")
        and (row["rule"], row["from"]) == ("rms", 0)
    )
    assert float(first["nats_per_word_gained"]) == pytest.approx(
        same["nats_per_word_gained"], rel=1e-4
    )
    assert float(first["low"]) < same["nats_per_word_gained"] < float(first["high"])


def test_gain_by_occurrence_draws_the_losses_of_the_words_that_come_back(run: Path, tmp_path: Path):
    rows = read_csv(gain_by_occurrence(LossTable.load(run / "losses.parquet"), tmp_path)[-1])
    assert {(r["protocol"], r["rule"]) for r in rows} >= {("article", "static"), ("stream", "rms")}
    key = ("article", "rms", "5", "10", "2")
    names = ("protocol", "rule", "first_loss_from", "first_loss_to", "from")
    drawn = next(row for row in rows if tuple(row[name] for name in names) == key)
    evaluation = json.loads((run / "evaluation.json").read_text())
    same = next(
        row
        for row in evaluation
        if (row["kind"], row["split"]) == ("occurrence", "valid")
        and tuple(str(row[name]) for name in names) == key
    )
    assert float(drawn["loss"]) == pytest.approx(same["nll"] / same["words"], rel=1e-4)
    assert float(drawn["low"]) < same["nats_per_word_gained"] < float(drawn["high"])


def test_words_that_never_come_back_make_no_picture_of_occurrences(tmp_path: Path):
    table = made_up_losses([["a", "b", "a", "<eos>"]])
    assert gain_by_occurrence(table, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_training_curves_tolerate_what_is_missing(tmp_path: Path):
    assert training_curves(tmp_path) == []
    lines = [
        '{"stage": "lm", "step": 1, "train_loss": 5.0}',
        '{"stage": "lm", "step": 2, "train_loss": NaN, "valid_loss": 4.0}',
        '{"stage": "lm"}',
        '{"stage": "meta", "step": 3, "gain_per_word": 0.1}',
        '{"stage": "evaluation"}',
        "[1, 2]",
        '{"stage": "lm", "step": 4, "tra',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5
    rows = read_csv(training_curves(tmp_path)[-1])
    assert [(r["stage"], r["curve"], r["x"], r["y"]) for r in rows] == [
        ("lm", "train_loss", "1", "5"),
        ("lm", "valid_loss", "2", "4"),
        ("meta", "gain_per_word", "3", "0.1"),
    ]
    (tmp_path / "metrics.jsonl").write_text('{"stage": "evaluation"}\n')
    assert training_curves(tmp_path) == []


def test_the_word_picture_is_safe_for_any_word(tmp_path: Path):
    words = ["=", "T", "=", "<eos>", "<eos>", *HOSTILE, "long" * 60, "<eos>", "end"]
    table = made_up_losses([words], titles=["$a_$ </svg> 🙂"])
    paths = word_picture(table, tmp_path, article=0, pair=("rms", "static"))
    ElementTree.parse(paths[1])
    rows = read_csv(paths[-1])
    assert [row["word"] for row in rows] == words
    for row, loss, static in zip(rows, table.losses["rms"], table.losses["static"], strict=True):
        assert float(row["gain"]) == pytest.approx(static - loss, rel=1e-4, abs=1e-5)


def test_the_word_picture_refuses_words_that_are_not_there(run: Path, tmp_path: Path):
    table = LossTable.load(run / "losses.parquet")
    with pytest.raises(
        UserError, match=r"article 2 of split 'valid' has 350 words; it has no word 351"
    ):
        word_picture(table, tmp_path, article=1, start=350, pair=("rms", "static"))
    paths = word_picture(table, tmp_path, article=1, start=340, pair=("rms", "static"))
    rows = read_csv(paths[-1])
    assert [(row["article"], row["place"]) for row in rows][::9] == [("2", "341"), ("2", "350")]
    assert len(rows) == 10  # up to the article's end


def test_colours_are_white_at_zero_symmetric_and_clipped():
    assert word_colour(0, 2) == (1, 1, 1)
    assert word_colour(9, 2) == pytest.approx([0x43 / 255, 0x93 / 255, 0xC3 / 255])
    assert word_colour(-9, 2) == pytest.approx([0xD6 / 255, 0x60 / 255, 0x4D / 255])
    assert word_colour(1, 2) == pytest.approx([1 - 0.5**0.6 * (1 - c) for c in word_colour(2, 2)])
    assert colour_range(np.r_[np.zeros(1000), 100.0]) < 1  # one outlier does not set the range
    assert colour_range(np.zeros(3)) > 0


def test_the_ink_flips_with_the_background():
    assert ink_on((1, 1, 1)) == "#000000"
    assert ink_on((0.1, 0.2, 0.3)) == "#ffffff"


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("width", ["text", pytest.param("column", marks=pytest.mark.slow)])
def test_no_label_is_cut_or_lies_under_another(
    width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path, **how: object) -> None:
        figure.draw_without_rendering()
        drawn[Path(path).name] = figure
        Path(path).write_bytes(b"drawn")

    monkeypatch.setattr(Figure, "savefig", keep)
    rules = ("static", "sgd", "rms", "two_levels", "three_levels")
    make_run(tmp_path, rules=rules, lengths=(1300, 350, 2350), resamples=9)
    draw_all(tmp_path, look=Look(width=WIDTHS[width], formats=("png",)))
    assert len(drawn) == 6
    for name, figure in drawn.items():
        inches, slack = figure.get_tightbbox(), 0.03  # markers of lines without a point lie at 0
        assert min(inches.x0, inches.y0) > -slack, name
        assert inches.x1 < figure.get_figwidth() + slack, name
        assert inches.y1 < figure.get_figheight() + slack, name
        labels = [figure.get_supxlabel(), *(one.xaxis.label.get_text() for one in figure.axes)]
        labels += [one.get_title("left") for one in figure.axes]
        texts = [text for text in figure.findobj(Text) if text.get_text() in set(labels) - {""}]
        texts += [t for axes in figure.axes for t in axes.texts if t.get_text()]
        assert texts or "words" in name
        for legend in figure.legends:
            box = legend.get_window_extent()
            under = [t.get_text() for t in texts if t.get_window_extent().overlaps(box)]
            assert not under, name


@pytest.mark.slow
def test_everything_is_drawn_from_the_folder_alone(run: Path):
    paths = draw_all(run, passage=(4, 101))
    names = {path.relative_to(run).as_posix() for path in paths}
    stems = [
        "figure2",
        "gain_by_occurrence",
        "gain_by_position",
        "words_start",
        "words_middle",
        "words_4_101",
        "training",
    ]
    assert names == {f"figures/{s}{e}" for s in stems for e in (".png", ".svg", ".pdf", ".csv")}
    for path in paths:
        assert path.stat().st_size > 100
        if path.suffix == ".svg":
            ElementTree.parse(path)
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    assert (run / "figures/figure2_test.png") in draw_all(run, "test", 1)
    assert not [path for path in run.rglob(".*") if path.is_file()]  # nothing half-written


@pytest.mark.slow
def test_drawing_twice_gives_the_same_bytes(run: Path, tmp_path: Path):
    table = LossTable.load(run / "losses.parquet")
    for kind in (figure2, gain_by_position):
        first, second = (kind(table, tmp_path / folder) for folder in "12")
        for one, two in zip(first, second, strict=True):
            assert one.read_bytes() == two.read_bytes(), one.name


@pytest.mark.slow
def test_a_run_of_one_word_is_drawn(tmp_path: Path):
    make_run(tmp_path, lengths=(1,), rules=("static", "rms"), protocols=("article",))
    assert (tmp_path / "figures/words_start.png") in draw_all(tmp_path)


def test_a_protocol_that_was_not_measured_is_refused(tmp_path: Path):
    table = made_up_losses([["a", "b", "<eos>"]], protocols=("article",))
    assert figure2(table, tmp_path)  # without a wish, the one there is
    with pytest.raises(UserError, match=r"'stream' was not measured .* present: article"):
        figure2(table, tmp_path, protocol="stream")


def test_static_alone_is_refused(tmp_path: Path):
    make_run(tmp_path, lengths=(50,), rules=("static",))
    with pytest.raises(UserError, match=r"pictures compare 'static' with another rule"):
        draw_all(tmp_path)


def visualize(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the script as its command line would, in this process; return the exit code."""
    monkeypatch.setattr(sys, "argv", ["visualize.py", *arguments])
    try:
        runpy.run_path(str(REPOSITORY / "visualize.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


@pytest.mark.slow
def test_the_command_prints_the_paths(tmp_path: Path):
    make_run(tmp_path, lengths=(60, 50), rules=("static", "rms"), protocols=("article",))
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "visualize.py"), str(tmp_path), "--articles", "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert str(tmp_path / "words.html") in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}/nowhere"], "not found; name the folder"),
        (["{run}/figures"], "losses.parquet not found; run `python evaluate.py`"),
        (["{run}/broken"], "cannot be read"),
        (["{run}", "--articles", "0"], "--articles"),
        (["{run}", "--split", "train"], "no split 'train', only test, valid"),
        (["{run}", "--first", "50"], "no article 50; its articles are numbered 1 to"),
        (["{run}", "--first", "50", "--only", "words"], "no article 50"),
        (["{run}", "--first", "0"], "--first is 0; it must be at least 1"),
        (["{run}", "--passage", "99", "1"], "no article 99"),
        (["{run}", "--passage", "1", "9999"], "it has no word 9999: choose one from 1 to"),
    ],
)
def test_the_command_fails_with_one_clear_line(
    run: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for folder in ("broken", "figures"):
        (run / folder).mkdir(exist_ok=True)
    (run / "broken" / "losses.parquet").write_bytes(b"PAR1 nonsense")
    assert visualize(monkeypatch, *(text.format(run=run) for text in arguments)) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_an_unknown_flag_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert visualize(monkeypatch, str(run), "--no-such-flag") not in (0, 1)
