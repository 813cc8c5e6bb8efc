"""How long the word-loss page takes in a browser: python -m benchmarks.page [--words 300000]

Needs Chromium and Playwright (`pip install mlm[browser]`). The losses are made up. By default an
article is about as long as in WikiText-103's test split; `--articles 1` makes one of all words.
`seconds` is what a reader waits; `work` is the processor's time of the page's main thread, which
other programs on the machine change little.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from mlm.base.errors import UserError, run_cli
from mlm.base.names import EOS
from mlm.page.page import write_page
from mlm.report.losses import LossTable, column_name

RULES = ("static", "sgd", "rms", "two_levels", "three_levels", "four_levels")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
"""The browser: Debian's package `chromium`, or what the variable names."""

MEASURE = """async (change) => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const started = performance.now();
  change === "rule" ? show({ rule: "rms" }) : window.scrollTo(0, document.body.scrollHeight / 2);
  await frame();
  return performance.now() - started;
}"""


def made_up(words: int, articles: int) -> LossTable:
    """Losses of `words` words in `articles` articles; paragraphs of about 100 words."""
    rng = np.random.default_rng(0)
    word_N = np.array([f"w{i}" for i in range(20_000)], dtype=object)[
        np.minimum(rng.zipf(1.3, words) - 1, 19_999)
    ]
    word_N[99::100] = EOS
    static_N = rng.gamma(2.0, 2.4, words)
    losses = {
        column_name(rule, protocol): np.maximum(static_N - place * rng.normal(0.2, 1, words), 0)
        for protocol in ("article", "stream")
        for place, rule in enumerate(RULES)
    }
    article_N = np.minimum(np.arange(words) * articles // words, articles - 1)
    first_A = np.searchsorted(article_N, np.arange(articles))
    return LossTable(
        split="valid",
        article_N=article_N.astype(np.int32),
        position_N=(np.arange(words) - first_A[article_N]).astype(np.int32),
        word_N=word_N,
        titles={a: f"Article {a}" for a in range(articles)},
        losses={name: loss_N.astype(np.float32) for name, loss_N in losses.items()},
    )


def measured(page: Path) -> dict[str, dict[str, float]]:
    """What the browser needs to load the page, to recolour it and to scroll far: seconds on the
    clock, and of the main thread's work."""
    try:
        # By name, so that types are checked the same with and without it.
        sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright
    except ImportError:
        raise UserError("playwright is not installed; pip install 'mlm[browser]'") from None
    if not Path(CHROMIUM).exists():
        raise UserError(f"{CHROMIUM} not found; install Chromium or name it in CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        inside = tab.context.new_cdp_session(tab)
        inside.send("Performance.enable", {"timeDomain": "threadTicks"})

        def work() -> float:
            found = inside.send("Performance.getMetrics")["metrics"]
            return next(metric["value"] for metric in found if metric["name"] == "TaskDuration")

        started = time.perf_counter()
        tab.goto(page.as_uri(), timeout=120_000)
        tab.wait_for_function("document.querySelector('.w') !== null && blocks[0].stamp >= 0")
        seconds, done = {"load": time.perf_counter() - started}, work()
        spent = {"load": done}
        for name, change in (("recolour", "rule"), ("scroll", "scroll")):
            seconds[name] = tab.evaluate(MEASURE, change) / 1000
            spent[name], done = work() - done, work()
        browser.close()
    return {"seconds": seconds, "work": spent}


def main() -> None:
    """Parse the command line, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=300_000)
    parser.add_argument("--articles", type=int, default=70)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(made_up(options.words, options.articles), Path(folder) / "words.html")
        size = page.stat().st_size / 1e6
        times = {
            kind: {name: round(seconds, 3) for name, seconds in parts.items()}
            for kind, parts in measured(page).items()
        }
    print(json.dumps({**vars(options), "megabytes": round(size, 1), **times}))


if __name__ == "__main__":
    run_cli(main)
