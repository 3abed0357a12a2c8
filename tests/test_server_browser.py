"""The server in a real browser: every page, by keyboard, narrow and wide, light and dark.

Chromium is Debian's; nothing is downloaded. Any request that would leave the machine fails a test.
"""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from small_store import HOOK, HOSTILE

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)
pytest.importorskip("playwright", reason="needs playwright")
pytest.importorskip("uvicorn", reason="needs extra serve")
from playwright.sync_api import sync_playwright  # noqa: E402
from small_served import NASTY, small_served  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
UNIT = f"hook={quote(HOOK)}&unit=1"
ADDRESSES = {
    "home": "/",
    "units": "/units?run=crate&sort=gain&metric=m&n_least=0",
    "unit": f"/unit?run=crate&{UNIT}",
    "hostile": f"/unit?run=crate&hook={quote(HOSTILE)}&unit=1",
    "compare": f"/compare?run=crate&{UNIT}&other=gpt2&other_unit=2",
    "search": "/search?run=crate&q=cat",
    "said": "/search?run=crate&by=said&q=cats",
    "try": f"/try?run=crate&text={quote(NASTY)}",
    "edit": f"/edit?run=crate&{UNIT}&text=cat",
    "sql": f"/sql?run=crate&q={quote('FROM hooks')}",
    "fault": "/unit?run=nobody",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    import uvicorn

    from lmmono.reports.server.guard import Access
    from lmmono.reports.server.site import build_app

    served = small_served(tmp_path_factory.mktemp("browsed"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = build_app(served, Access(port=port))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@contextlib.contextmanager
def looked_at(browser, base, **settings):
    """Give a page; afterwards nothing has complained and nothing has left the machine."""
    context = browser.new_context(**settings)
    page = context.new_page()
    page.set_default_timeout(60_000)
    faults, away = [], []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    page.on("request", lambda r: None if r.url.startswith((base, "data:")) else away.append(r.url))
    page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
    yield page
    context.close()
    # the one page that is asked for in vain is told of by the browser itself
    assert [fault for fault in faults if "status of 400" not in fault] == []
    assert away == []


@pytest.mark.parametrize("width", [400, 1600])
def test_every_page_fits_and_says_nothing_to_the_console(browser, base, width, tmp_path):
    folder = Path(os.environ.get("LMMONO_SCREENSHOTS", tmp_path))
    scheme = "dark" if width == 1600 else "light"
    size = {"width": width, "height": 900}
    with looked_at(browser, base, viewport=size, color_scheme=scheme) as page:
        for name, address in ADDRESSES.items():
            page.goto(base + address)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (name, wide)
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(20, 20, 20)" if scheme == "dark" else "rgb(255, 255, 255)")
            page.screenshot(path=folder / f"{name}-{width}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, base, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with looked_at(browser, base, color_scheme=scheme) as page:
        for name, address in ADDRESSES.items():
            page.goto(base + address)
            found = axe.run(page).response["violations"]
            serious = [
                (name, each["id"], [node["html"] for node in each["nodes"]][:3])
                for each in found
                if each["impact"] in ("serious", "critical")
            ]
            assert serious == []


def test_by_keyboard_alone_from_the_first_page_to_a_unit_and_its_neighbour(browser, base):
    with looked_at(browser, base) as page:
        page.goto(base + "/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
        page.keyboard.press("Enter")
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.name") == "q":
                break
        page.keyboard.type("cat")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search?**")
        for _ in range(60):
            page.keyboard.press("Tab")
            if "/unit?" in (page.evaluate("document.activeElement.href") or ""):
                break
        page.keyboard.press("Enter")
        page.wait_for_url("**/unit?**")
        first = page.locator("article.unit").get_attribute("data-unit")
        page.keyboard.press("ArrowRight" if first == "0" else "ArrowLeft")
        page.wait_for_url(lambda url: f"unit={first}" not in url.rpartition("&")[2])
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"  # the focus can be seen


def test_the_console_runs_stops_saves_and_links(browser, base):
    with looked_at(browser, base) as page:
        page.goto(base + "/sql?run=crate")
        query = page.locator("#q")
        query.fill("SELECT '<img src=x onerror=alert(1)>' AS nasty, count(*) AS n FROM hooks")
        query.press("Control+Enter")
        page.wait_for_selector("#answer td")
        assert page.locator("#answer td").all_inner_texts() == ["<img src=x onerror=alert(1)>", "3"]
        page.locator("#save").click()
        page.goto(page.url)  # the address has the query
        assert "nasty" in query.input_value()
        assert page.locator("#own option").count() == 1
        query.fill("SELECT count(*) FROM range(1000000000000)")
        query.press("Control+Enter")
        page.locator("#stop:enabled").click()
        page.wait_for_selector("#answer .fault")
        assert any(
            w in page.locator("#answer .fault").inner_text() for w in ("stopped", "interrupted")
        )
        query.fill("DROP TABLE hooks")
        query.press("Control+Enter")
        page.get_by_text("DROP is not allowed here").wait_for()


def test_the_console_works_without_scripts(browser, base):
    with looked_at(browser, base, java_script_enabled=False) as page:
        page.goto(base + f"/sql?run=crate&q={quote('SELECT 41 + 1 AS n')}")
        page.get_by_role("button", name="Run").click()
        assert page.locator("#answer td").inner_text() == "42"
