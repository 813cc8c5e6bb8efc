"""The page in a real browser: what it shows is true, and every key, button and address works.

Needs Chromium (Debian: `apt-get install chromium`, or its path in CHROMIUM) and Playwright (the
extra `browser`); the test of accessibility needs axe-core too (`npm install axe-core`, the path of
its `axe.min.js` in AXE_CORE).
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import made_up_losses, made_up_words

from mlm.base.names import rule_label
from mlm.page.page import write_page
from mlm.page.top_k import SCHEMA, TopK
from mlm.report.losses import LossTable
from mlm.report.word_picture import colour_range, word_colour

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
AXE = Path(os.environ.get("AXE_CORE", "axe.min.js"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

LAPTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
CELLS = (
    "Array.from(document.querySelectorAll('#word tbody tr'))"
    ".map((row) => Array.from(row.children).map((cell) => cell.textContent))"
)
"""What the tables of the chosen word, or of the article, hold."""
Open = Callable[..., Any]
"""`opened("#article=2", viewport=PHONE)`: the page in a new tab, ready."""


def made_up() -> LossTable:
    rng = np.random.default_rng(2)
    articles = [made_up_words(n, rng) for n in (700, 260, 420)]
    articles[1][30:33] = ["</script>", "שלום", "🙂"]
    return made_up_losses(articles, titles=["One & <b>", "Two", "Three"])


@pytest.fixture(scope="module")
def table() -> LossTable:
    return made_up()


@pytest.fixture(scope="module")
def file(table: LossTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow as pa

    known = {
        "split": "valid",
        "rule": "three_levels",
        "protocol": "article",
        "article": 0,
        "position": 20,
        "pieces": [" wo", "rd"],
        "rank_before": 1234,
        "rank_after": 2,
        "entropy_before": 3.0,
        "entropy_after": 1.0,
        "pieces_before": [" the", "of"],
        "pieces_after": [" wo", " a"],
        "probabilities_before": [0.5, 0.25],
        "probabilities_after": [0.75, 0.125],
    }
    top_k = TopK("three_levels", "article", pa.Table.from_pylist([known], schema=SCHEMA))
    return write_page(table, tmp_path_factory.mktemp("page") / "words.html", top_k=top_k)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Open]:
    """Opens the page; at the end, no tab may have said anything on its console."""
    said: list[str] = []
    contexts: list[Any] = []

    def open_page(address: str = "", *, path: Path = file, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": LAPTOP, **options})
        contexts.append(context)
        context.set_default_timeout(15_000)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(path.as_uri() + address)
        tab.wait_for_selector(".w")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def address(tab: Any) -> dict[str, str]:
    return dict(part.split("=", 1) for part in tab.url.partition("#")[2].split("&"))


def pinned(tab: Any) -> int:
    """The number of the chosen word; 0 = none."""
    return int(address(tab).get("word", 0))


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("protocol", ["article", "stream"])
@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_fifty_words_show_the_losses_of_the_file(
    opened: Open, table: LossTable, protocol: str, unit: str
):
    tab = opened(f"#protocol={protocol}&unit={unit}&markup=1")
    factor = {"nats": 1.0, "bits": 1 / math.log(2)}[unit]
    rules = table.rules(protocol)
    choose = random.Random(f"{protocol} {unit}")
    rows = sorted(choose.sample(range(len(table.word_N)), 50))
    pairs = [choose.sample(rules, 2) for _ in rows]
    wanted = [
        {"article": int(table.ordinal_N[row]), "pinned": int(table.position_N[row])}
        | {"rule": rule, "against": against}
        for row, (rule, against) in zip(rows, pairs, strict=True)
    ]
    seen = tab.evaluate(
        "(wanted) => wanted.map((changes) => { show(changes);"
        f" return [document.querySelector('#word .lead b').textContent, {CELLS}]; }})",
        wanted,
    )
    for row, (rule, against), (lead, cells) in zip(rows, pairs, seen, strict=True):
        loss = {name: table.loss(name, protocol)[row] * factor for name in rules}
        shown = {cell[0]: cell[1:] for cell in cells}
        for name in rules:
            own, gain = shown[rule_label(name)]
            assert number(own) == pytest.approx(loss[name], abs=0.0058)
            if name != against:
                assert number(gain) == pytest.approx(loss[against] - loss[name], abs=0.0065)
        assert lead.endswith(unit)
        assert number(lead.split()[0]) == pytest.approx(loss[against] - loss[rule], abs=0.0065)


def test_the_panel_sums_up_the_article(opened: Open, table: LossTable):
    tab = opened("#article=2")
    rows = table.rows(1)
    static, best = (table.loss(r, "article")[rows] for r in ("static", "three_levels"))
    cells = tab.evaluate(CELLS)
    assert cells[0][0] == "3 levels"
    assert number(cells[0][1]) == pytest.approx(best.mean(), abs=0.001)
    assert number(cells[0][2]) == pytest.approx(math.exp(best.mean()), abs=0.1)
    words = list(table.word_N[rows])
    new = np.array([word not in words[:i] for i, word in enumerate(words)])
    gains = {name: (int(count), number(gain)) for name, count, gain in cells[2:]}
    assert gains["new to the article"][0] == new.sum()
    assert gains["seen before"][1] == pytest.approx((static - best)[~new].mean(), abs=0.001)
    bar = tab.locator("#bars button").nth(1)
    assert number(bar.locator(".value").inner_text()) == pytest.approx(
        (static - best).mean(), abs=0.006
    )
    assert bar.get_attribute("aria-current") == "true"


def test_words_have_the_colours_of_the_pictures_and_gains_a_line(opened: Open, table: LossTable):
    tab = opened()
    gain_N = table.loss("static", "article") - table.loss("three_levels", "article")
    limit = colour_range(gain_N)
    shown = tab.evaluate(
        "Array.from(document.querySelectorAll('.w')).filter((w) => w.shade).slice(0, 80)"
        ".map((w) => { const c = document.createElement('canvas').getContext('2d');"
        " c.fillStyle = getComputedStyle(w).backgroundColor; c.fillRect(0, 0, 1, 1);"
        " return [w.place, Array.from(c.getImageData(0, 0, 1, 1).data).slice(0, 3),"
        " getComputedStyle(w).textDecorationLine]; })"
    )
    assert len(shown) == 80
    for place, colour, line in shown:
        expected = [255 * part for part in word_colour(float(gain_N[place]), limit)]
        if gain_N[place] != 0:
            assert colour == pytest.approx(expected, abs=1.5)
        assert (line == "underline") == (gain_N[place] >= limit / 8), place
    assert f"±{limit:g} nats" in tab.inner_text("#limit-text")


def test_the_occurrences_of_a_word_are_counted_and_drawn(opened: Open, table: LossTable):
    words = list(table.word_N[table.rows(0)])
    word = next(w for w in words if w.startswith("word") and 4 <= words.count(w) <= 9)
    places = [i for i, w in enumerate(words) if w == word]
    tab = opened(f"#word={places[1] + 1}")
    assert f"2nd of {len(places)} occurrences" in tab.inner_text("#word")
    chart = tab.locator("#word svg.chart")
    told = chart.get_attribute("aria-label")
    static = table.loss("static", "article")[table.rows(0)][places]
    assert ", ".join(f"{loss:.1f}" for loss in static) in told
    assert chart.locator("circle").count() == 2 * len(places)
    assert tab.locator("#marks i.same").count() == len(places)
    tab.get_by_label("Next occurrence").click()
    assert pinned(tab) == places[2] + 1
    tab.keyboard.press("p")
    tab.keyboard.press("p")
    assert pinned(tab) == places[0] + 1
    tab.keyboard.press("p")  # there is none before
    assert pinned(tab) == places[0] + 1
    tab.keyboard.press("n")
    assert pinned(tab) == places[1] + 1


def test_what_was_expected_is_shown_where_it_is_stored(opened: Open):
    tab = opened("#word=21")
    text = tab.inner_text("#word")
    for part in ("wo · rd", "1,234", "the 50.0 %", "…of 25.0 %", "wo 75.0 %", "3.00", "1.00"):
        assert part in text, part
    tab.keyboard.press("ArrowRight")
    assert "Expected there" not in tab.inner_text("#word")


# ---------------------------------------------------------------- the hand


def test_a_hover_previews_and_a_click_pins_until_escape(opened: Open):
    tab = opened()
    tab.hover(".w >> nth=30")
    assert "click to keep" in tab.inner_text("#word")
    assert pinned(tab) == 0
    tab.click(".w >> nth=30")
    chosen = pinned(tab)
    assert chosen
    name = tab.inner_text("#word .name")
    tab.hover(".w >> nth=45")
    assert pinned(tab) == chosen
    tab.hover("#legend")
    assert tab.inner_text("#word .name") == name
    tab.mouse.wheel(0, 300)
    assert tab.inner_text("#word .name") == name
    tab.keyboard.press("Escape")
    assert pinned(tab) == 0
    assert "One & <b>" in tab.inner_text("#word .name")
    tab.click(".w >> nth=60")
    tab.get_by_label("Let the word go").click()
    assert pinned(tab) == 0


def test_arrows_move_by_word_and_by_line(opened: Open):
    tab = opened()
    tab.focus("#text")
    tab.keyboard.press("ArrowRight")
    first = pinned(tab)
    tab.keyboard.press("ArrowRight")
    assert pinned(tab) > first
    tab.keyboard.press("ArrowLeft")
    assert pinned(tab) == first
    for _ in range(3):
        tab.keyboard.press("ArrowDown")
    place = "document.querySelector('.w.on').getBoundingClientRect()"
    before = tab.evaluate(place)
    tab.keyboard.press("ArrowDown")
    after = tab.evaluate(place)
    assert 15 < after["top"] - before["top"] < 120
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate(place)["top"] == pytest.approx(before["top"], abs=1)
    assert tab.inner_text("#aloud")


def test_the_largest_gains_and_losses_are_walked_through(opened: Open, table: LossTable):
    tab = opened("#markup=1")
    gain_N = (table.loss("static", "article") - table.loss("three_levels", "article"))[:700]
    order = np.argsort(-gain_N, kind="stable") + 1
    for key, places in (("g", order), ("G", order[::-1])):
        for rank in range(3):
            tab.keyboard.press(key)
            assert gain_N[pinned(tab) - 1] == pytest.approx(gain_N[places[rank] - 1], abs=2e-3)
        assert tab.locator("#extremes [aria-current=true]").count() == 1
    tab.click("#previous-gain")
    tab.click("#next-gain")
    tab.click("#next-loss")
    tab.click("#previous-loss")
    tab.click("#gains button >> nth=4")
    assert gain_N[pinned(tab) - 1] == pytest.approx(gain_N[order[4] - 1], abs=2e-3)


def test_one_letter_keys_can_be_turned_off(opened: Open):
    tab = opened()
    tab.click("#settings-button")
    tab.uncheck("#shortcuts")
    tab.focus("#text")
    tab.keyboard.press("g")
    assert pinned(tab) == 0


def test_search_finds_words_in_every_article(opened: Open, table: LossTable):
    tab = opened()
    tab.keyboard.press("/")
    tab.keyboard.type("</SCRIPT> שלום")
    assert tab.inner_text("#hits") == "none here"
    tab.keyboard.press("Enter")
    assert (address(tab)["article"], pinned(tab)) == ("2", 31)
    assert tab.inner_text("#hits") == "1 of 1"
    tab.fill("#search", "word1")
    hits = tab.locator("#marks i.hit").count()
    found = [w for w in table.word_N[table.rows(1)] if "word1" in w]
    assert hits == len(found) > 3
    tab.keyboard.press("Enter")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.press("Escape")
    assert tab.locator("#marks i.hit").count() == 0


@pytest.mark.parametrize("slider", ["#strip", "#curve"])
def test_the_strip_and_the_curve_are_sliders(opened: Open, slider: str):
    tab = opened()
    node = tab.locator(slider)
    assert node.get_attribute("role") == "slider"
    assert node.get_attribute("aria-valuemax") == "700"
    node.focus()
    tab.keyboard.press("End")
    assert node.get_attribute("aria-valuenow") == "700"
    assert tab.evaluate("window.scrollY") > 200
    tab.keyboard.press("Home")
    assert node.get_attribute("aria-valuenow") == "1"
    tab.keyboard.press("PageUp")
    tab.keyboard.press("ArrowRight")
    assert node.get_attribute("aria-valuenow") == str(1 + 70 + 7)
    box = node.bounding_box()
    tab.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2)
    assert 280 < int(node.get_attribute("aria-valuenow")) < 420
    assert "word" in node.get_attribute("aria-valuetext")


def test_rules_protocols_units_and_the_range_are_chosen(opened: Open):
    tab = opened()
    tab.select_option("#rule", "rms")
    tab.select_option("#against", "sgd")
    tab.click("#protocols button >> nth=1")
    tab.click("#settings-button")
    tab.select_option("#unit", "bits")
    where = address(tab)
    assert [where[n] for n in ("rule", "against", "protocol", "unit")] == [
        "rms",
        "sgd",
        "stream",
        "bits",
    ]
    assert "bits" in tab.inner_text("#legend")
    assert "Krause" in tab.inner_text("#about")
    tab.click("#openings button >> nth=1")
    assert (address(tab)["rule"], address(tab)["against"]) == ("three_levels", "rms")
    tab.focus("#limit")
    before = tab.inner_text("#limit-text")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#limit-text") != before
    assert number(address(tab)["range"]) == number(tab.inner_text("#limit-text").split()[0][1:])
    tab.click("#curve-key button >> nth=0")
    assert address(tab)["rule"] == "static"


def test_explanations_and_keys_are_whole_lines(opened: Open):
    """No last line of a rule's explanation is a lone word, and a chart's key covers no axis."""
    lines = (
        "Array.from(document.querySelectorAll('#protocol-about, #about span')).map((node) => {"
        " const range = document.createRange(), rows = new Map();"
        " range.selectNodeContents(node);"
        " for (const box of range.getClientRects()) {"
        "   const row = Math.round(box.bottom / 4), had = rows.get(row) || [Infinity, 0];"
        "   rows.set(row, [Math.min(had[0], box.left), Math.max(had[1], box.right)]); }"
        " return Array.from(rows.values(), ([left, right]) => right - left); })"
    )
    for width in (1440, 1100, 390):
        tab = opened("#rule=rms&against=sgd&word=30", viewport={"width": width, "height": 900})
        if width == 390:
            tab.click("#settings-button")
        seen = [rows for rows in tab.evaluate(lines) if len(rows) > 1]
        assert all(rows[-1] > 0.4 * max(rows) for rows in seen), (width, seen)
        key = tab.evaluate(
            "Array.from(document.querySelectorAll('.key > *'), (part) => {"
            " const box = part.getBoundingClientRect(); return [box.left, box.right, box.top]; })"
        )
        if width != 390:
            (_, right, top), (left, _, next_top) = key
            assert right < left or top < next_top
            header, panel = (tab.locator(name).bounding_box() for name in ("#top", "#panel"))
            assert panel["y"] == pytest.approx(header["y"] + header["height"], abs=1)


def test_a_rule_against_itself_is_told_and_not_a_blank_page(opened: Open):
    tab = opened()
    tab.select_option("#against", "three_levels")
    assert "compared with itself" in tab.inner_text("#same")
    assert tab.locator(".w").count() > 50
    tab.select_option("#against", "static")
    assert not tab.is_visible("#same")


def test_articles_are_opened_in_three_ways(opened: Open):
    tab = opened()
    tab.click("#next-article")
    assert tab.inner_text("#word .name") == "Two"
    tab.select_option("#article", "2")
    assert tab.inner_text("#word .name") == "Three"
    assert tab.is_disabled("#next-article")
    tab.click("#previous-article")
    tab.click("#bars button >> nth=0")
    assert tab.inner_text("#word .name") == "One & <b>"


def test_markup_is_hidden_unless_asked_for(opened: Open, table: LossTable):
    tab = opened()
    text = tab.inner_text("#text")
    assert not re.search(r"@-@|=|↵", text)
    assert "every loss counts" in tab.inner_text("#hidden-note")
    tab.click("#settings-button")
    tab.check("#markup")
    shown = tab.evaluate("blocks.map((block) => block.node.textContent).join(' ')").split()
    words = [{"<eos>": "↵"}.get(word, word) for word in table.word_N[:700]]
    assert shown == words
    tab.check("#spaces")
    assert tab.locator("#text.spaces").count() == 1


def test_an_address_restores_the_view_and_a_wrong_one_is_ignored(opened: Open):
    tab = opened("#article=3&word=50&rule=sgd&against=rms&protocol=stream&unit=bits&search=word2")
    before = tab.url
    again = opened("#" + before.partition("#")[2])
    assert again.url == before
    assert again.inner_text("#word") == tab.inner_text("#word")
    assert again.input_value("#search") == "word2"
    wrong = opened(
        "#article=99&word=-1&rule=nonsense&against=%3Cb%3E&unit=ells&range=x&protocol=no"
    )
    assert address(wrong)["article"] == "1"
    assert address(wrong)["rule"] == "three_levels"


# ---------------------------------------------------------------- what leaves the page


def test_a_selection_is_copied_as_tsv(opened: Open, table: LossTable):
    tab = opened()
    tab.evaluate("document.addEventListener('copy', (e) => setTimeout(() => 0), true)")
    tab.evaluate(
        "() => { const words = document.querySelectorAll('.w'), range = document.createRange();"
        " range.setStart(words[10].firstChild, 0);"
        " range.setEnd(words[13].firstChild, words[13].firstChild.length);"
        " getSelection().addRange(range); }"
    )
    tab.click("#settings-button")
    rows = [line.split("\t") for line in tab.evaluate("tsvOf(selectedPlaces())").splitlines()]
    assert rows[0] == [
        "article",
        "place",
        "word",
        "three_levels (nats)",
        "static (nats)",
        "gain (nats)",
    ]
    assert len(rows) == 5
    for row in rows[1:]:
        place = int(row[1]) - 1
        assert row[2] == table.word_N[place]
        assert float(row[4]) == pytest.approx(table.loss("static", "article")[place], abs=1e-3)
    tab.click("#copy")
    assert "4 words copied" in tab.inner_text("#done")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_view_is_saved_as_a_picture(opened: Open, ending: str, tmp_path: Path):
    import xml.etree.ElementTree as ElementTree

    tab = opened("#article=2")
    tab.click("#settings-button")
    with tab.expect_download() as waiting:
        tab.click(f"#save-{ending}")
    download = waiting.value
    assert download.suggested_filename == f"words-B-three_levels-static.{ending}"
    path = tmp_path / download.suggested_filename
    download.save_as(path)
    if ending == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    texts = [node.text for node in ElementTree.parse(path).iter() if node.tag.endswith("text")]
    assert "</script>" in texts
    assert any("3 levels against static" in (text or "") for text in texts)


def test_the_table_holds_every_word(opened: Open, table: LossTable):
    tab = opened()
    tab.click("#settings-button")
    tab.click("#table-view")
    words: list[str] = []
    while True:
        words += tab.locator("#table tbody th").all_inner_texts()
        forward = tab.get_by_role("button", name="Next words")
        if forward.is_disabled():
            break
        forward.click()
    assert words == [{"<eos>": "↵"}.get(word, word) for word in table.word_N[:700]]
    assert address(tab)["table"] == "1"
    tab.click("#table-view")
    assert tab.is_visible("#text")


def test_what_was_left_out_is_said(opened: Open, table: LossTable, tmp_path: Path):
    cut = write_page(table, tmp_path / "cut.html", words=800)
    tab = opened("#article=2", path=cut)
    told = tab.inner_text("#left-out")
    assert "580 of 1,380 words are not in this file" in told
    assert "--page-words 1380" in told
    assert "160 further words" in tab.inner_text("#text")
    assert not opened().is_visible("#left-out")


def test_print_is_light_and_without_the_form(opened: Open):
    tab = opened("#word=30", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.is_visible("#top")
    assert not tab.is_visible("#word")
    assert tab.is_visible("#legend")
    assert "protocol article" in tab.inner_text("#print-title")


def test_without_colours_gains_and_losses_have_lines(opened: Open):
    tab = opened(forced_colors="active")
    styles = tab.evaluate(
        "['line', 'lose'].map((name) => getComputedStyle(document.querySelector('.w.' + name)))"
        ".map((style) => style.textDecorationStyle + ' ' + style.textDecorationLine)"
    )
    assert styles == ["solid underline", "dotted underline"]


def test_a_phone_shows_the_text_first_and_the_panel_as_a_sheet(opened: Open):
    tab = opened(viewport=PHONE, has_touch=True, is_mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.is_visible("#text")
    assert not tab.is_visible("#panel-body")
    assert not tab.is_visible("#controls")
    tab.tap(".w >> nth=90")  # low on the screen
    assert pinned(tab)
    assert tab.inner_text(".w.on") in tab.inner_text("#sheet")
    tab.tap("#sheet")
    assert tab.is_visible("#word")
    chosen, sheet = (tab.locator(name).bounding_box() for name in (".w.on", "#panel"))
    assert chosen["y"] + chosen["height"] < sheet["y"]  # the sheet leaves the word in sight
    tab.keyboard.press("Escape")
    assert not tab.is_visible("#panel-body")
    assert pinned(tab)
    tab.tap("#settings-button")
    assert tab.is_visible("#controls")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_lines_of_text_are_short_enough_to_read(opened: Open):
    tab = opened(viewport={"width": 2200, "height": 1000})
    longest = tab.evaluate(
        "() => { const lines = new Map(); for (const word of document.querySelectorAll('p .w')) {"
        " const top = Math.round(word.getBoundingClientRect().top);"
        " lines.set(top, (lines.get(top) || 0) + word.textContent.length + 1); }"
        " return Math.max(...lines.values()); }"
    )
    assert 50 < longest <= 81
    text, panel = (tab.locator(name).bounding_box() for name in ("#text", "#panel"))
    assert text["x"] + text["width"] < panel["x"]


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core: npm install axe-core, set AXE_CORE")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"color_scheme": "dark"},
        {"viewport": PHONE, "has_touch": True},
        {"viewport": PHONE, "color_scheme": "dark", "has_touch": True},
    ],
    ids=["light", "dark", "phone", "dark phone"],
)
def test_no_rule_of_accessibility_is_violated(opened: Open, options: dict[str, Any]):
    tab = opened("#word=30&search=word1", **options)
    tab.click("#settings-button")
    if "viewport" in options:
        tab.click("#sheet")
    for _ in range(2):  # the text, then the table
        tab.evaluate(AXE.read_text(encoding="utf-8"))
        found = tab.evaluate("axe.run()")["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []
        tab.evaluate("show({ table: true })")
