"""The server of runs: every page, who may ask, what the console refuses, and shapes of its API."""

import json
import re
import threading
import time
from html.parser import HTMLParser

import pytest
from console_escapes import ESCAPES
from small_store import HOOK, HOSTILE, WORDS

import activation_store as astore
from lmmono.errors import ModelError, RunError

pytest.importorskip("starlette", reason="needs extra serve")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")
from small_served import NASTY, small_served  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from lmmono.reports.server import console, search  # noqa: E402
from lmmono.reports.server.guard import Access, Guard  # noqa: E402
from lmmono.reports.server.site import build_app  # noqa: E402

BASE = "http://127.0.0.1:8765"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    opened = small_served(tmp_path_factory.mktemp("served"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(served):
    return TestClient(build_app(served), base_url=BASE)


class Elements(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def page_addresses(hook: str) -> list[str]:
    from urllib.parse import quote

    named = quote(hook)
    return [
        "/", "/units", f"/units?hook={named}&sort=gain&metric=m",
        "/units?sort=unit&order=asc&n_least=0", f"/unit?hook={named}&unit=1",
        f"/compare?hook={named}&unit=1&other_hook={named}&other_unit=2",
        f"/compare?hook={named}&unit=1&other=gpt2", "/search?q=cat",
        "/search?by=said&q=cats", f"/search?q={quote(NASTY)}", "/try", f"/try?units={named}:1",
        f"/edit?hook={named}&unit=1", "/sql", f"/sql?q={quote(NASTY)}",
    ]  # fmt: skip


@pytest.mark.parametrize("hook", [HOOK, HOSTILE])
def test_every_page_answers_and_holds_no_markup_of_a_text(client, hook):
    for address in page_addresses(hook):
        answer = client.get(address)
        assert answer.status_code == 200, (address, answer.text)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f‮]", answer.text)
        for tag, attributes in Elements(answer.text).tags:
            assert tag not in ("style", "iframe", "object", "base", "embed", "meta http-equiv")
            assert tag != "b" or "title" in attributes  # the one mark of an exemplar's token
            assert not [name for name in attributes if name == "style" or name.startswith("on")]
            if tag == "script":
                assert (attributes["src"] or "").startswith("/static/")
            for name in ("src", "href", "action"):
                assert not re.match(r"\s*(javascript|https?|//)", attributes.get(name) or "")


def test_a_unit_beside_its_twin_and_the_way_to_it(client):
    assert "/compare?run=crate" in client.get("/unit", params={"hook": HOOK, "unit": 1}).text
    text = client.get("/compare", params={"hook": HOOK, "unit": 1, "other": "gpt2"}).text
    assert "hold other tokens at the same places" in text  # two texts have no twins
    both = client.get(
        "/compare", params={"hook": HOOK, "unit": 1, "other": "gpt2", "other_unit": 3}
    )
    assert both.text.count('class="unit"') == 2


def test_units_are_sorted_by_score_minus_control_and_by_statistics(served):
    run = served.first
    best = search.list_units(run, sort="gain", metric="m", n_least=0)
    assert [(row["unit"], row["control"]) for row in best.rows[:2]] == [(1, 0.2), (2, 0.9)]
    assert best.rows[0]["gain"] == pytest.approx(0.7)
    densities = [r["density"] for r in search.list_units(run, sort="density", n_least=0).rows]
    assert densities == sorted(densities, reverse=True)
    with pytest.raises(RunError, match="no such statistic"):
        search.list_units(run, sort="density; DROP TABLE hooks")


def test_units_are_found_by_a_text_and_by_what_is_said(client):
    answer = client.get("/search", params={"run": "gpt2", "q": WORDS[1]})
    assert f"unit={1}" in re.findall(r'<th scope="row"><a href="([^"]*)"', answer.text)[0]
    said = client.get("/search", params={"by": "said", "q": "cats"})
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in said.text


def test_a_user_mistake_is_told_and_never_a_trace(client):
    for address, status in (
        ("/unit", 400), ("/unit?hook=x&unit=1", 404), (f"/unit?hook={HOOK}&unit=9999", 404),
        ("/unit?hook=x&unit=-1", 400), ("/units?run=nobody", 400), ("/units?sort=x", 400),
        ("/units?first=x", 400), ("/edit?value=1e999", 400), ("/try?units=x", 400),
        ("/nowhere", 404), ("/static/../../secret.txt", 404), ("/api/unit", 400),
        ("/static/%2e%2e%2fsecret.txt", 404),
    ):  # fmt: skip
        answer = client.get(address)
        assert answer.status_code == status, address
        assert "Traceback" not in answer.text
        assert "the-secret" not in answer.text


# --- who may ask ----------------------------------------------------------------------------------


def test_only_the_host_that_is_meant_and_pages_of_its_own_are_answered(client):
    assert client.get("/", headers={"host": "evil.example:8765"}).status_code == 421
    assert client.get("/", headers={"host": "127.0.0.1:80"}).status_code == 421
    assert client.get("/", headers={"host": "localhost:8765"}).status_code == 200
    form = {"q": "FROM hooks", "run": "crate"}
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ):
        assert client.post("/sql/run", data=form, headers=headers).status_code == 403, headers
    assert client.post("/sql/run", data=form, headers={"origin": BASE}).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/sql?q=FROM+hooks", headers=link).status_code == 200
    assert client.get("/api/runs", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_other_methods_and_large_requests_are_refused(client):
    assert client.put("/").status_code == 405
    assert client.request("TRACE", "/").status_code == 405
    assert client.post("/sql/run", content=b"q=" + b"x" * 300_000).status_code == 413

    def pieces():
        for _ in range(30):
            yield b"x" * 10_000

    assert client.post("/sql/run", content=pieces()).status_code == 413
    assert client.get("/?" + "x" * 61_000).status_code == 414
    plain = {"content-type": "text/plain"}  # what a form of another site could send as JSON
    assert client.post("/sql/run", content=b"{}", headers=plain).status_code == 400


def test_with_a_token_nothing_is_answered_without_it(served):
    token = "t" * 24
    guarded = TestClient(
        build_app(served, Access(token=token)), base_url=BASE, follow_redirects=False
    )
    for address in ("/", "/static/server.css", "/api/runs", "/?token=wrong", "/nowhere"):
        assert guarded.get(address).status_code == 401, address
    assert guarded.get("/", headers={"authorization": f"Bearer {token}"}).status_code == 200
    assert guarded.get("/", headers={"authorization": f"Basic {token}"}).status_code == 401
    first = guarded.get(f"/units?run=crate&token={token}")
    assert (first.status_code, first.headers["location"]) == (303, "/units?run=crate")
    cookie = first.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert guarded.get("/units?run=crate").status_code == 200
    fresh = TestClient(
        build_app(served, Access(token=token)), base_url=BASE, follow_redirects=False
    )
    away = fresh.get(f"{BASE}//evil.example/?token={token}")
    assert away.headers["location"].startswith("/evil")


def test_beyond_loopback_a_token_is_needed(served):
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(RunError, match="a token is needed"):
            Access(host)
    with pytest.raises(RunError, match="at least 16"):
        Access(token="short")
    names = Access("0.0.0.0", 80, "t" * 20, ("box.example",)).hosts()
    assert names == {"box.example:80", "box.example"}
    assert Guard  # the one that build_app puts before every route


# --- the console ----------------------------------------------------------------------------------


def ask(client, query: str, **more):
    return client.post("/api/sql", json={"query": query, **more})


def test_none_of_over_100_attempts_gets_out_of_the_console(client, served):
    assert len(ESCAPES) >= 100
    root = served.first.store.path.parent.parent
    folder = root / "crate"
    shard = next((folder / "store").glob("acts-*.parquet"))
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    settings = "SELECT name, value FROM duckdb_settings() ORDER BY name"
    before = served.first.console.store.sql(settings).fetchall()
    got_out = []
    for attempt in ESCAPES:
        query = attempt.format(
            out=root / "out", secret=root / "secret.txt", folder=folder, shard=shard
        )
        answer = ask(client, query)
        if answer.status_code != 400 or "the-secret" in answer.text:
            got_out.append((attempt, answer.status_code, answer.text[:200]))
    assert got_out == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == files
    assert served.first.console.store.sql(settings).fetchall() == before
    assert ask(client, "SELECT count(*) AS n FROM hooks").json()["rows"] == [{"n": 3}]


def test_an_answer_is_bounded_in_rows_cells_and_columns(client):
    many = ask(client, "FROM range(100000)").json()
    assert (many["n_rows"], many["is_cut"]) == (1000, True)
    assert ask(client, "FROM range(5)", rows=3).json()["n_rows"] == 3
    (row,) = ask(client, "SELECT repeat('x', 1000000) AS a, [1, 2] AS b, 1.5 AS c").json()["rows"]
    assert len(row["a"]) < 2100 and row["a"].endswith("(1000000 characters)")
    assert (row["b"], row["c"]) == ("[1,2]", 1.5)
    odd = ask(
        client, "SELECT 'nan'::DOUBLE AS a, 1 AS a, 170141183460469231731::HUGEINT AS h, NULL"
    )
    assert odd.json()["rows"] == [{"a": None, "a_1": 1, "h": 170141183460469231731, "NULL": None}]
    wide = "SELECT " + ", ".join(f"{i} AS c{i}" for i in range(201))
    assert "at most 200 columns" in ask(client, wide).json()["error"]
    assert "at most 20,000 characters" in ask(client, "SELECT 1" + " " * 20_001).json()["error"]


ENDLESS = "SELECT count(*) FROM range(1000000000000) a"


def test_a_query_can_be_stopped_and_the_console_goes_on(client):
    answers = []
    form = {"q": ENDLESS, "run": "crate", "key": "k1"}
    asking = threading.Thread(target=lambda: answers.append(client.post("/sql/run", data=form)))
    asking.start()
    deadline = time.monotonic() + 60
    while not client.post("/sql/stop", data={"run": "crate", "key": "k1"}).json()["stopped"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    asking.join(60)
    assert re.search("interrupted|stopped", answers[0].text)
    assert client.post("/sql/stop", data={"run": "crate", "key": "k1"}).json() == {"stopped": False}
    assert ask(client, "SELECT 1 AS a").json()["rows"] == [{"a": 1}]


def test_a_query_ends_at_its_limit_and_few_run_at_once(served):
    limits = console.ConsoleLimits(seconds=0.3)
    path = served.first.store.path
    with astore.open(path, limits=limits.of_store()) as store:
        one = console.Console(store, limits)
        with pytest.raises(astore.QueryError, match="took longer than 0.3 s"):
            one.run(ENDLESS)
        for _ in range(console.AT_ONCE):
            assert one._slots.acquire(blocking=False)
        with pytest.raises(console.Busy, match="run already"):
            one.run("SELECT 1")


# --- shapes ---------------------------------------------------------------------------------------


def test_a_unit_comes_in_neuronpedias_shape(client):
    answer = client.get("/api/feature/crate/0-lmmono/1")
    feature = json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))
    assert (feature["modelId"], feature["layer"], feature["index"]) == ("crate", "0-lmmono", "1")
    assert feature["maxActApprox"] > 0 and 0 < feature["frac_nonzero"] < 1
    best = feature["activations"][0]
    assert len(best["tokens"]) == len(best["values"])
    assert best["values"][best["maxValueTokenIndex"]] == best["maxValue"]
    (said,) = feature["explanations"]
    assert said["typeName"] == "token_lookup" and said["scores"][0]["value"] == 0.9
    for name in ("pos_str", "neg_str", "freq_hist_data_bar_heights", "comments", "lists"):
        assert isinstance(feature[name], list)
    assert client.get(f"/api/feature/crate/{HOOK}/1").json()["hookName"] == HOOK
    assert client.get("/api/feature/crate/7-lmmono/1").status_code == 404
    assert client.get("/api/feature/nobody/0-lmmono/1").status_code == 400


def test_the_api_lists_runs_and_units_and_shows_one(client):
    runs = client.get("/api/runs").json()
    assert [run["run"] for run in runs] == ["crate", "gpt2"]
    listed = client.get("/api/units", params={"sort": "density", "n_least": 0}).json()
    assert listed["n"] == len(listed["units"]) == 12
    unit = client.get("/api/unit", params={"hook": HOOK, "unit": 1}).json()
    assert {"stats", "ranks", "exemplars", "scores", "sql"} <= unit.keys()


# --- a model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab():
    from small_models import small
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lmmono.reports.server.lab import Lab

    words = ["<end>", "the", "cat", "sat", *(f"w{i}" for i in range(46))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    model = small()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    return Lab(model, tokenizer, 32)


def test_a_text_is_read_and_an_edit_changes_what_comes_next(lab):
    hook = "blocks.1.mlp.hook_post"
    reading = lab.read("the cat sat", [(hook, 0), (hook, 3)])
    assert {len(acts) for acts in reading.acts.values()} == {len(reading.tokens)}
    same = lab.edit("the cat sat", hook, 0, "scale", 1.0, max_tokens=4)
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.continuation_before == same.continuation_after
    pushed = lab.edit("the cat sat", hook, 0, "steer", 50.0, max_tokens=4)
    assert pushed.kl > 0.01
    changes = [abs(each.after - each.before) for each in pushed.tokens]
    assert changes == sorted(changes, reverse=True)
    for wrong in ("hook_nothing", "blocks.9.mlp.hook_post"):
        with pytest.raises(ModelError, match="no hook of the model itself"):
            lab.read("the cat", [(wrong, 0)])
    with pytest.raises(ModelError, match="at most 4,000 characters"):
        lab.read("x" * 5000, [])
    with pytest.raises(ModelError, match="want one of ablate"):
        lab.edit("the cat", hook, 0, "explode", 1.0)


def test_units_that_stand_out_on_a_text_come_near_their_largest_act(lab):
    hook = "blocks.1.mlp.hook_post"
    reading = lab.read("the cat sat", [(hook, u) for u in range(8)])
    largest = [max(reading.acts[hook, u]) or 1.0 for u in range(8)]
    largest[2] = largest[2] / 10
    chosen = lab.strongest("the cat sat", {hook: largest, "a latent": [1.0]}, 3)
    if max(reading.acts[hook, 2]) > 0:
        assert chosen[0] == (hook, 2)
    assert len(chosen) <= 3
