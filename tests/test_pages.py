"""Pages of units: right numbers, the SQL that gives them, and no text that does anything."""

import re
from html.parser import HTMLParser

import duckdb
import numpy as np
import pytest
from small_store import HOOK, HOSTILE, N_CTX, WORDS, D, small_store

import activation_store as astore
from activation_store.pages import text_heatmap, unit_page, unit_pages
from activation_store.pages.templating import static

UNIT = 3
WICKED = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe\u2066",
    "</span></bdi></article><style>*{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "' onmouseover='x",
    "&lt;b&gt;",
    "\ud7ff\x00\x9b31m",
    "<|endoftext|>",
)
"""Token strings that would do something where one place forgot to escape them."""
TAGS = {
    *("article", "b", "bdi", "button", "code", "dd", "details", "dl", "dt", "h2", "h3", "header"),
    *("li", "ol", "p", "path", "pre", "q", "rect", "section", "span", "summary", "svg", "table"),
    *("tbody", "td", "text", "th", "thead", "title", "tr", "a"),
}


class Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("pages") / "run")


@pytest.fixture(scope="module")
def page(small):
    with astore.open(small.path, "a") as store:
        add_rows(store, HOOK, "fires on cats")
        page = unit_page(store, HOOK, UNIT, name="small")
        page.html  # noqa: B018 - made while the store is open, and kept
        return page


def add_rows(store, hook, text):
    """Add what is said of a unit, its scores and controls, and what it writes."""
    who = {"hook": hook, "unit": UNIT}
    score = who | {"metric": "token_selectivity", "metric_version": 2, "n": 40}
    ends = {"ci_low": 0.6, "ci_high": 0.8, "ci_level": 0.95}
    store.append("explanations", [who | {"explainer": "judge", "model": text, "text": text}])
    untrained = score | {"unit": None, "control": "untrained_model", "value": 0.2}
    store.append(
        "all_scores",
        [score | {"value": 0.7} | ends, score | {"value": 0.1, "control": "shuffled"}, untrained],
    )
    ranked = [who | {"rank": rank, "control": 0.5} for rank in (1, 2)]
    write = [
        row | {"sign": sign, "token_id": row["rank"] + 3, "logit": logit}
        for row in ranked
        for sign, logit in (("up", 2.0), ("down", -1.0))
    ]
    near = [row | {"kind": "weights", "neighbour": 0, "cosine": 0.9} for row in ranked]
    store.append_all({"promotes": write, "neighbours": near})


def test_the_panels_hold_what_the_activations_say(small, page):
    acts = small.acts[HOOK][..., UNIT]
    firing, data = acts[acts > 0], page.data
    top = acts.max()
    bars = np.minimum((firing * 24 / top).astype(int), 23)
    assert data["histogram"] == np.bincount(bars, minlength=24).tolist()
    density = (acts > 0).mean(0)
    assert [row["density"] for row in data["positions"]] == pytest.approx(density)
    assert [row["first_pos"] for row in data["positions"]] == list(range(N_CTX))
    mass = np.bincount(small.token_ids.ravel(), acts.ravel(), len(WORDS)) / acts.sum()
    for row in data["tokens"]:
        token = row["token_id"]
        assert row["token"] == WORDS[token]
        assert row["mass"] == pytest.approx(mass[token])
        assert row["frequency"] == pytest.approx((small.token_ids == token).mean())
    assert sum(row["mass"] for row in data["tokens"]) == pytest.approx(1.0)
    densities = (small.acts[HOOK] > 0).mean((0, 1))
    assert data["ranks"]["density"] == 1 + (densities > densities[UNIT]).sum()
    assert data["n_units"] == D


def test_exemplars_hold_their_text_and_their_activations(small, page):
    top = page.data["exemplars"]["top"]
    assert top and [row["act"] for row in top] == sorted((r["act"] for r in top), reverse=True)
    for row in top:
        seq, first = row["seq_id"], row["first_pos"]
        places = range(first, first + len(row["tokens"]))
        assert row["tokens"] == [WORDS[small.token_ids[seq, pos]] for pos in places]
        assert row["acts"] == [small.acts[HOOK][seq, pos, UNIT] for pos in places]
        assert row["acts"][row["peak"]] == row["act"]
        assert {small.doc_ids[seq, pos] for pos in places} == {row["doc_id"]}


def test_scores_stand_beside_their_controls(page):
    (score,) = page.data["scores"]
    assert (score["value"], score["ci_low"]) == (0.7, 0.6)
    assert score["controls"] == {"shuffled": 0.1, "untrained_model": 0.2}
    text = "".join(Tags(page.html).text)
    assert "shuffled 0.1" in text and "[0.6, 0.8]" in text
    assert "judge says" in text and "fires on cats" in text


def test_the_sql_of_every_panel_gives_what_the_panel_shows(small, page):
    with astore.open(small.path) as store:
        rows = {panel: store.sql(query).df() for panel, query in page.queries.items()}
        for query in page.queries.values():
            assert query in "".join(Tags(page.html).text) and "$" not in query
    data = page.data
    assert rows["exemplars"]["act"].tolist() == [
        row["act"] for kind in ("quantile", "random", "top") for row in data["exemplars"][kind]
    ]
    assert rows["histogram"]["n"].tolist() == [n for n in data["histogram"] if n]
    assert rows["tokens"]["mass"].tolist() == [row["mass"] for row in data["tokens"]]
    assert rows["positions"]["density"].tolist() == [r["density"] for r in data["positions"]]
    assert rows["stats"]["rank_density"].item() == data["ranks"]["density"]
    for panel in ("promotes", "neighbours"):
        assert len(rows[panel]) == sum(map(len, data[panel].values())) > 0
    assert len(rows["scores"]) == 3 and len(rows["explanations"]) == 1


def test_units_read_together_are_the_same_as_alone(small, page):
    with astore.open(small.path) as store:
        together = list(unit_pages(store, HOOK, [*range(D), 999], name="small"))
        alone = unit_page(store, HOOK, UNIT, name="small")
        assert [each.unit for each in together] == list(range(D)), "what is not there is left out"
        assert together[UNIT].data == alone.data == page.data
        assert together[UNIT].html == page.html
        with pytest.raises(astore.ContentError, match="no unit 999.*units 0 to 5"):
            unit_page(store, HOOK, 999)


def test_text_of_corpora_models_and_names_does_nothing(tmp_path):
    small = small_store(tmp_path / "run")
    with astore.open(small.path, "a") as store:
        store.add_vocabulary(WICKED)
        add_rows(store, HOSTILE, "".join(WICKED))
        page = unit_page(store, HOSTILE, UNIT, name=WICKED[0], ask=lambda sql: f"/sql?q={sql}")
        unit = store.unit(HOSTILE, UNIT)
        for html in (page.html, unit._repr_html_(), unit.exemplars()._repr_html_()):
            found = Tags(html)
            assert found.tags <= TAGS | {"div", "style"}
            assert not {name for name in found.attributes if name.startswith("on")}
            assert "style" not in found.attributes and html.count("<style>") <= 1
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)
    text = "".join(Tags(page.html).text)
    assert "<script>alert(1)</script>" in text and "<U+001B>[2J" in text and "<U+202E>" in text
    assert "style" not in Tags(page.html).tags, "a page has no style of its own"


def test_a_notebook_shows_the_same_page(small, page):
    with astore.open(small.path) as store:
        shown_unit = store.unit(HOOK, UNIT)._repr_html_()
        alone = unit_page(store, HOOK, UNIT)
    assert alone.html in shown_unit and static("unit.css") in shown_unit


def test_a_heat_map_is_read_by_colour_by_line_and_as_text():
    heat = text_heatmap(["the", " cat", " sat", "\n", "!"], [0.0, 2.0, 0.1, 0.0, -1.0], peak=1)
    assert heat.levels == [0, 9, 1, 0, -5]
    assert repr(heat) == "the «cat»⁹ sat¹\n!⁻⁵"
    assert heat.html == (
        'the <b class="h9" title="2">cat</b> <span class="h1" title="0.1">sat</span>↵'
        '<span class="n5" title="-1">!</span>'
    )
    css = static("unit.css")
    assert all(f".h{n} {{" in css and f".n{n} {{" in css for n in range(1, 10))
    assert text_heatmap(["a"], [0.5], scale=1.0).levels == [5]
    with pytest.raises(ValueError, match="got 1 acts for 2 tokens"):
        text_heatmap(["a", "b"], [1.0])


def test_characters_of_several_tokens_are_shown_whole():
    bytes_of_cat = ["<0xF0><0x9F>", "<0x90>", "<0xB1>"]
    heat = text_heatmap(["a", *bytes_of_cat, "家"], [0, 0, 3.0, 0, 1.0], peak=2)
    assert heat.html.startswith('a<b class="h9" title="3">🐱</b><span class="h3" title="1">家')


def test_a_store_without_exemplars_or_acts_has_a_page_too(tmp_path):
    with astore.open(tmp_path / "bare", "w") as store:
        pass
    with duckdb.connect(tmp_path / "bare" / "store.duckdb") as con:
        con.execute("INSERT INTO unit_stats (hook, unit, n_tokens, n_active) VALUES ('h', 0, 0, 0)")
    with astore.open(tmp_path / "bare") as store:
        text = "".join(Tags(unit_page(store, "h", 0).html).text)
    assert "never above the threshold" in text and "No exemplars are stored" in text
