"""The report: one file that asks nobody, right in what it ranks and draws, seen in Chromium."""

import base64
import gzip
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import HOOK, copied, small_store
from test_cli import TINY, call

import activation_store as astore
import lmmono as lm
from activation_store.pages import unit_page
from lmmono.errors import RunError
from lmmono.reports.pages import interest, offline, twins
from lmmono.reports.run_figures import (
    attribute_figure,
    figure_svg,
    layer_figure,
    loss_figure,
    score_figure,
    unit_figure,
)
from lmmono.runs.folder import find_runs, open_run

CHROMIUM = Path("/usr/bin/chromium")
ASKED = """\
explain: {explainers: [token_lookup], units: 8, window: 32}
score: {scorers: [token_selectivity, simulation_tar], controls: false}
"""
WICKED = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of two tiny runs, explained and scored, one of them told something wicked."""
    folder = tmp_path_factory.mktemp("reported")
    (folder / "tiny.yaml").write_text(TINY + ASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(interest, "MIN_ACTIVATIONS", 5)
        assert call("run", "tiny.yaml") == 0
    folder /= "runs/tiny"
    (run, *_) = found = find_runs(folder)
    assert len(found) == 2
    with astore.open(run / "store.duckdb", "a") as store:
        row = {"explainer": WICKED, "seed": 0, "text": WICKED, "model": WICKED}
        hooks = store.sql("SELECT DISTINCT hook FROM unit_stats").fetchall()
        told = [row | {"hook": hook, "unit": unit} for (hook,) in hooks for unit in range(8)]
        store.append("explanations", told)
        relevance = {"metric": "attribute_relevance", "metric_version": 1, "dictionary": "flint"}
        relevance |= {"hook": "flint.hook_attributes", "explainer": "reviews"}
        cells = [(label, unit) for label in ("good", "bad") for unit in range(3)]
        store.append(
            "all_scores",
            [relevance | {"preset": label, "unit": unit, "value": 0.1} for label, unit in cells],
        )
    return folder


@pytest.fixture(scope="module")
def page(runs) -> offline.OfflineReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interest, "MIN_ACTIVATIONS", 5)
        return lm.report(*find_runs(runs), units=4)


class Tags(HTMLParser):
    """Collects elements with their attributes, and the text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_report_is_one_file_that_asks_nobody(page, tmp_path):
    path = page.save(tmp_path / "report.html")
    assert path.read_text("utf-8") == page.html
    assert re.fullmatch(r"OfflineReport\(.*: \d+ unit pages, \d+\.\d MB\)", repr(page))
    elements = Tags(page.html).elements
    for tag, attributes in elements:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href", "src"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {(a.get("href") or "")[1:].split("&")[0] for tag, a in elements if tag == "a"}
    packed = {a["data-page"] for tag, a in elements if tag == "script" and "data-page" in a}
    units = {each for each in anchors if each.startswith("unit-")}
    assert packed and anchors - units <= set(ids)
    (policy,) = [a["content"] for _, a in elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_its_unit_pages_are_those_of_the_one_function(page, runs):
    found = dict(re.findall(r'data-page="([^"]+)">([^<]+)<', page.html))
    pages = {name: gzip.decompress(base64.b64decode(text)).decode() for name, text in found.items()}
    assert len(pages) == page.n_units
    # 3 layers of 512 units are to fit into 15 MB, with 0.6 MB of other things
    assert max(map(len, found.values())) < 14.4e6 / (3 * 512) * 1.1
    run = open_run(find_runs(runs)[0])
    hook, unit = re.search(r'data-hook="([^"]+)" data-unit="(\d+)"', [*pages.values()][0]).groups()
    with astore.open(run.store_path) as store:
        alone = unit_page(store, hook, int(unit), name=run.name, link=offline._linker(run.name))
    assert pages[alone.id] == alone.html


def test_text_of_explainers_is_text_in_every_part(page):
    parsed = Tags(page.html)
    assert "<U+001B>[2J<U+202E>" in "".join(parsed.text)
    assert not any(tag == "img" for tag, _ in parsed.elements)
    scripts = [a for tag, a in parsed.elements if tag == "script"]
    kinds = {each["type"] for each in scripts}
    assert kinds == {"module", "application/x-unit-page"}


def test_every_section_that_has_something_is_there(page, runs):
    text = "".join(Tags(page.html).text)
    for part in (
        "Where to look first",
        "Training",
        "Layers",
        "Scores",
        "Explanations",
        "All units",
    ):
        assert part in text
    for run in map(open_run, find_runs(runs)):
        assert run.name in text and str(run.manifest.seed) in text
    assert "flint on reviews, relevance of attributes to classes" in text
    assert "simulation_tar" in text and "Pearson of t" in text, "each metric has its formula"


def test_a_missing_run_is_told(runs, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="want a run"):
        lm.report()
    with pytest.raises(RunError, match="no such run folder"):
        lm.report(tmp_path / "none")
    monkeypatch.chdir(runs)
    assert call("report", str(find_runs(runs)[0]), "-o", "one.html", "--units", "1") == 0
    assert (runs / "one.html").stat().st_size > 10_000
    assert call("report", "nowhere") == 2


def test_figures_are_matplotlibs_and_their_svg_has_no_style(runs):
    opened = [open_run(path) for path in find_runs(runs)]
    with astore.open(opened[0].store_path) as store:
        hook = store.sql("SELECT min(hook) FROM unit_stats").fetchall()[0][0]
        unit = unit_page(store, hook, 0)

    def drawn() -> list[Any]:
        return [
            *(draw(opened) for draw in (loss_figure, layer_figure, score_figure)),
            attribute_figure([[0.1, -0.9], [0.4, 0.2]], ["a", "b"], ["x", "<y>"], title="t"),
            unit_figure(unit),
        ]

    # drawn anew: to draw one figure twice moves its layout
    for figure, again in zip(drawn(), drawn(), strict=True):
        svg = figure_svg(figure, 'what "is" seen')
        assert "style" not in svg and "<metadata" not in svg and "#ffffff" not in svg
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == 'what "is" seen'
        assert svg == figure_svg(again, 'what "is" seen'), "equal input gives equal bytes"
    assert np.allclose(layer_figure(opened).axes[0].get_xlim()[0] >= -1, True)


def test_units_are_ranked_by_the_lower_end_less_their_control(tmp_path, monkeypatch):
    monkeypatch.setattr(interest, "MIN_ACTIVATIONS", 10)
    small = small_store(tmp_path / "run")
    score = {"metric": "token_selectivity", "metric_version": 2, "hook": HOOK, "n": 40}
    given = {0: (0.9, 0.2, 0.1), 1: (0.8, 0.7, 0.1), 2: (0.8, 0.7, 0.65), 3: (0.8, 0.7, -0.4)}
    rows = []
    for unit, (value, low, control) in given.items():
        ends = {"value": value, "ci_low": low, "ci_high": 0.95}
        rows.append(score | ends | {"unit": unit})
        rows.append(score | {"unit": unit, "value": control, "control": "shuffled"})
    with astore.open(small.path, "a") as store:
        store.append("all_scores", rows)
        found = interest.interesting(store)
        assert [each.unit for each in found] == [3, 1, 0, 2], "a negative control gives nothing"
        assert found[1].margin == pytest.approx(0.6) and not found[1].is_one_token
        acts = small.acts[HOOK][..., 1]
        assert f"Fires on {100 * (acts > 0).mean():.3g} %" in found[1].why
        told = found[1].control_says
        assert "0.8 [0.7, 0.95]. Control: shuffled gives 0.1, so the score is clear" in told
        monkeypatch.setattr(interest, "ONE_TOKEN", 0.0)
        assert [each.unit for each in interest.interesting(store, 2)] == [3, 1]
        monkeypatch.setattr(interest, "MIN_ACTIVATIONS", 10_000)
        assert interest.interesting(store) == []


def test_a_twin_is_the_unit_that_fires_alike(tmp_path):
    small = small_store(tmp_path / "a")
    other = copied(small.path, tmp_path / "b")
    with astore.open(small.path) as store, astore.open(other) as again:
        found = twins.best_twins(store, again, [(HOOK, unit) for unit in (2, 4)])
        acts = small.acts[HOOK].reshape(-1, 6).T
        correlations = np.corrcoef(acts)
        for twin in found:
            assert twin.twin == twin.unit and twin.correlation == pytest.approx(1.0, abs=1e-5)
            rest = np.sort(correlations[twin.unit])[-2]
            assert twin.second == pytest.approx(rest, abs=1e-5)
            assert abs(twin.chance) < 0.5
    strange = small_store(tmp_path / "c", seed=1)
    with astore.open(small.path) as store, astore.open(strange.path) as again:
        assert twins.best_twins(store, again, [(HOOK, 2)]) == [], "other tokens have no twins"


def test_the_browser_of_units_shows_the_page_that_is_asked_for(tmp_path):
    pytest.importorskip("anywidget")
    small = small_store(tmp_path / "run")
    with astore.open(small.path) as store:
        widget = lm.reports.browse(store, HOOK)
        assert widget.page == unit_page(store, HOOK, widget.unit).html
        widget.unit = 5
        assert widget.page == unit_page(store, HOOK, 5).html
        assert sorted(widget.orders["density"]) == list(range(6))
        with pytest.raises(RunError, match="no such unit"):
            lm.reports.browse(store, "nowhere")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"needs Debian's {CHROMIUM}")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_chromium_shows_the_report_without_a_word_or_a_request(
    page, browser, tmp_path, width, scheme
):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    path = page.save(tmp_path / "report.html")
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    tab = context.new_page()
    tab.set_default_timeout(120_000)  # a busy machine is no fault
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"file://{path}")
    # a unit, by keyboard
    link = tab.locator("#start table a").first
    link.focus()
    tab.keyboard.press("Enter")
    tab.locator("#viewer article").wait_for()
    assert tab.locator("#viewer article").count() == 1
    assert tab.evaluate("document.activeElement.id") == "viewer"
    # twins, side by side
    pair = tab.locator("#twins a").first
    if pair.count():
        pair.click()
        tab.locator("#viewer article").nth(1).wait_for()
    # sorted by density, largest first
    tab.locator("#units details").first.locator("summary").click()
    heads = tab.locator("#units table").first.locator("thead button")
    heads.nth(2).click()
    cells = tab.locator("#units table").first.locator("tbody td:nth-child(3)").all_inner_texts()
    values = [float(text) for text in cells if text != "–"]
    assert values == sorted(values, reverse=True)
    wide = tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, "nothing is wider than the window"
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    found = axe.Axe().run(tab).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], each["nodes"][0]["html"][:300]) for each in serious]
    # on A4 nothing is cut off, and a dark screen does not print dark
    tab.set_viewport_size({"width": 794, "height": 1123})
    tab.emulate_media(media="print", color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 794
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert said == []
    assert {url.partition("#")[0] for url in asked} == {f"file://{path}"}
    context.close()
