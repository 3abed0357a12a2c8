"""The pages and the API of a server over runs, as a Starlette application.

Nothing that comes with a request names a file: runs are found by their name among those that were
opened, and the static files are read once, at the start.
"""

import re
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from activation_store.errors import ContentError, QueryError, StoreError
from activation_store.pages import text_heatmap, unit_page
from activation_store.pages.templating import environment
from activation_store.pages.unit_page import UnitPage
from lmmono.errors import LmmonoError, RunError
from lmmono.reports.pages.interest import ranked
from lmmono.reports.server.console import Busy, json_text
from lmmono.reports.server.feature import feature_json, hook_of_layer
from lmmono.reports.server.guard import Access, Guard
from lmmono.reports.server.saved import SAVED
from lmmono.reports.server.search import PAGE, STATISTICS, Explained, list_units, metrics
from lmmono.reports.server.served import Served, ServedRun

HERE = "lmmono.reports.server"
_STATIC = {
    "unit.css": "activation_store.pages",
    "unit.js": "activation_store.pages",
    "server.css": HERE,
    "server.js": HERE,
    "console.js": HERE,
}
_KINDS = {"css": "text/css", "js": "text/javascript"}
_UNIT = re.compile(r"[\s,]*(\S.*?):([0-9]{1,9})(?=[\s,]|$)")
KEPT_PAGES = 256
"""Unit pages that are kept in memory: people go back and forth between a few."""
MOST_UNITS = 20
"""Units whose activations on a text are shown."""


def build_app(served: Served, access: Access | None = None) -> ASGIApp:
    """Return the application over open runs, behind its guard.

    Args:
        served: Open runs; they are closed when the server ends.
        access: Who may ask.
    """
    return Starlette(
        routes=_Site(served).routes(),
        middleware=[Middleware(Guard, access=access or Access())],
        exception_handlers={HTTPException: _http_error, Exception: _our_error},
        lifespan=_closing(served),
    )


def _closing(served: Served) -> Any:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        served.close()

    return lifespan


def address(path: str, **query: Any) -> str:
    """Return a link of the site; parameters that are None or empty are left out.

    >>> address("/unit", run="crate", hook="blocks.1.mlp.hook_post", unit=17)
    '/unit?run=crate&hook=blocks.1.mlp.hook_post&unit=17'
    """
    pairs = {name: value for name, value in query.items() if value not in (None, "")}
    return path + (f"?{urlencode(pairs)}" if pairs else "")


def _fault(status: int, title: str, text: str) -> HTMLResponse:
    page = (
        environment(HERE)
        .get_template("fault.html.jinja")
        .render(title=title, text=text, runs=(), run=None, address=address, here="")
    )
    return HTMLResponse(page, status)


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _fault(error.status_code, error.detail, "")


def _our_error(_: Request, __: Exception) -> Response:
    return _fault(500, "This page failed", "The server's own log says why.")


class _Site:
    """The pages over some runs."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._said = {name: Explained(run) for name, run in served.runs.items()}
        self._pages = environment(HERE)
        # a store that is open for reading stays as it is, and so do its pages
        self._kept_page = lru_cache(maxsize=KEPT_PAGES)(self._read_page)
        self._static = {
            name: files(package).joinpath("static", name).read_bytes()
            for name, package in _STATIC.items()
        }

    def routes(self) -> list[Route]:
        """Return what can be asked. Plain functions: Starlette runs each in a thread."""
        pages: list[tuple[str, Callable[[Request], Response], str]] = [
            ("/", self.home, "GET"),
            ("/units", self.units, "GET"),
            ("/unit", self.unit, "GET"),
            ("/compare", self.compare, "GET"),
            ("/search", self.search, "GET"),
            ("/try", self.try_text, "GET"),
            ("/edit", self.edit, "GET"),
            ("/sql", self.sql, "GET"),
            ("/sql/run", self.run_sql, "POST"),
            ("/sql/stop", self.stop_sql, "POST"),
            ("/static/{name}", self.static, "GET"),
        ]
        programs: list[tuple[str, Callable[[Request], Response], str]] = [
            ("/api/runs", self.api_runs, "GET"),
            ("/api/units", self.api_units, "GET"),
            ("/api/unit", self.api_unit, "GET"),
            ("/api/sql", self.api_sql, "POST"),
            ("/api/feature/{model}/{layer}/{unit:int}", self.api_feature, "GET"),
        ]
        return [
            *(Route(path, _told(view, is_api=False), methods=[verb]) for path, view, verb in pages),
            *(
                Route(path, _told(view, is_api=True), methods=[verb])
                for path, view, verb in programs
            ),
        ]

    def _render(
        self, template: str, request: Request, run: ServedRun | None, **more: Any
    ) -> Response:
        page = self._pages.get_template(template).render(
            runs=self._served.runs.values(), run=run, address=address, here=request.url.path, **more
        )
        return HTMLResponse(page)

    def _run(self, request: Request) -> ServedRun:
        return self._served.run(request.query_params.get("run"))

    # --- pages --------------------------------------------------------------------------------

    def home(self, request: Request) -> Response:
        """Show the runs, and the units of each that stand out."""
        best = {name: _standing_out(run) for name, run in self._served.runs.items()}
        return self._render("home.html.jinja", request, None, best=best, title="Runs")

    def units(self, request: Request) -> Response:
        """List the units of a run."""
        run, asked = self._run(request), request.query_params
        known = metrics(run)
        metric = asked.get("metric") or (known[0] if known else None)
        sort = asked.get("sort") or ("gain" if known else "kurtosis")
        first = _whole(asked.get("first"), "first", 0)
        hook = asked.get("hook") or None
        found = list_units(
            run,
            hook=hook,
            sort=sort,
            ascending=asked.get("order") == "asc",
            metric=metric,
            n_least=_whole(asked.get("n_least"), "n_least", 20),
            first=first,
        )
        return self._render(
            *("units.html.jinja", request, run),
            found=found,
            metrics=known,
            statistics=STATISTICS,
            asked={
                "hook": hook, "metric": metric, "sort": sort, "first": first,
                "order": asked.get("order") or "desc", "n_least": asked.get("n_least") or "20",
            },
            page=PAGE,
            title=f"Units of {run.name}",
        )  # fmt: skip

    def _page_of(self, run: ServedRun, hook: str, unit: int) -> UnitPage:
        return self._kept_page(run.name, hook, unit)

    def _read_page(self, name: str, hook: str, unit: int) -> UnitPage:
        run = self._served.runs[name]
        return unit_page(
            run.store,
            hook,
            unit,
            name=run.name,
            link=lambda h, u: address("/unit", run=run.name, hook=h, unit=u),
            ask=lambda query: address("/sql", run=run.name, q=query),
            counting=run.counting,
        )

    def unit(self, request: Request) -> Response:
        """Show one unit."""
        run, (hook, unit) = self._run(request), _unit_of(request)
        run.require(hook, unit)
        return self._render(
            *("unit.html.jinja", request, run),
            page=self._page_of(run, hook, unit),
            hook=hook,
            unit=unit,
            d=run.hooks[hook],
            others=[other for other in self._served.runs.values() if other is not run],
            title=f"{hook} unit {unit} of {run.name}",
        )

    def compare(self, request: Request) -> Response:
        """Show a unit beside another; by default beside its best-matched unit in another run."""
        run, (hook, unit) = self._run(request), _unit_of(request)
        run.require(hook, unit)
        other = self._served.run(request.query_params.get("other") or run.name)
        asked = request.query_params.get("other_unit")
        other_hook = request.query_params.get("other_hook") or (hook if hook in other.hooks else "")
        fault, twins = "", list[Any]()
        if other is not run:
            try:
                twins = run.console.store.sql(
                    "SELECT hook_b, unit_b, correlation, n_both FROM "
                    "twins($a, $b, $hook, $unit, k := 5, in_hook := $other)",
                    a=run.name, b=other.name, hook=hook, unit=unit, other=other_hook or None,
                ).fetchall()  # fmt: skip
            except QueryError as error:
                fault = str(error)
        chosen: tuple[str, int] | None = None
        if asked is not None:
            chosen = (other_hook, _whole(asked, "other_unit", 0))
        elif twins:
            chosen = twins[0][:2]
        beside = None
        if chosen is not None:
            other.require(*chosen)
            beside = self._page_of(other, *chosen)
        return self._render(
            *("compare.html.jinja", request, run),
            page=self._page_of(run, hook, unit),
            beside=beside,
            other=other,
            twins=twins,
            fault=fault,
            hook=hook,
            unit=unit,
            title=f"{hook} unit {unit} side by side",
        )

    def search(self, request: Request) -> Response:
        """Find units by a text that they fire on, or by words that are said of them."""
        run, asked = self._run(request), request.query_params
        text, by = asked.get("q") or "", asked.get("by") or "fires"
        hook, rows, fault = asked.get("hook") or None, list[Any](), ""
        if len(text) > 200:
            raise RunError("q: want at most 200 characters.")
        if text.strip() and by == "fires":
            found = run.store.sql(
                "FROM units_on($text, of_hook := $hook) LIMIT $most",
                text=text,
                hook=hook,
                most=PAGE,
            )
            names = found.columns
            rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        elif text.strip():
            rows = self._said[run.name].find(text)
        return self._render(
            *("search.html.jinja", request, run),
            text=text,
            by=by,
            hook=hook,
            rows=rows,
            fault=fault,
            has_index=self._said[run.name].has_index,
            title=f"Search {run.name}",
        )

    def try_text(self, request: Request) -> Response:
        """Show what chosen units, or those that stand out, do on a text."""
        run, asked = self._run(request), request.query_params
        text = asked.get("text") or ""
        units = _units_of(asked.get("units") or "")
        for hook, unit in units:
            run.require(hook, unit)
        is_chosen, lines, fault = bool(units), list[Any](), ""
        if text.strip():
            largest = _largest(run)
            try:
                model = run.lab()
                if not units:
                    units = model.strongest(text, largest, 8)
                reading = model.read(text, units)
            except LmmonoError as error:
                fault = str(error)
            else:
                for hook, unit in units:
                    scale = largest[hook][unit] if hook in largest else None
                    acts = reading.acts[hook, unit]
                    heat = text_heatmap(reading.tokens, acts, scale=scale or None)
                    lines.append({"hook": hook, "unit": unit, "heat": heat.html, "most": max(acts)})
        return self._render(
            *("try.html.jinja", request, run),
            text=text,
            units=" ".join(f"{hook}:{unit}" for hook, unit in units) if is_chosen else "",
            lines=lines,
            fault=fault,
            title=f"Try a text on {run.name}",
        )

    def edit(self, request: Request) -> Response:
        """Show what an edit of one unit changes."""
        # torch, which no other page needs at the start, takes seconds to import
        from lmmono.reports.server.lab import KINDS

        run, asked = self._run(request), request.query_params
        hook, text = asked.get("hook") or next(iter(run.hooks), ""), asked.get("text") or ""
        unit, kind = _whole(asked.get("unit"), "unit", 0), asked.get("kind") or "ablate"
        value = _real(asked.get("value"), "value", 0.0)
        effect, fault = None, ""
        if text.strip():
            run.require(hook, unit)
            try:
                effect = run.lab().edit(text, hook, unit, kind, value)
            except LmmonoError as error:
                fault = str(error)
        return self._render(
            *("edit.html.jinja", request, run),
            hook=hook,
            unit=unit,
            kind=kind,
            kinds=KINDS,
            value=value,
            text=text,
            effect=effect,
            fault=fault,
            title=f"Edit a unit of {run.name}",
        )

    def sql(self, request: Request) -> Response:
        """Show the console, with a query in it that a link may bring; it runs when it is sent."""
        run = self._run(request)
        return self._render(
            *("sql.html.jinja", request, run),
            query=request.query_params.get("q")
            or "FROM unit_stats ORDER BY kurtosis DESC LIMIT 10",
            schema=run.console.schema(),
            columns=_column_help(run),
            saved=SAVED,
            key=secrets.token_hex(8),
            limits=run.console.limits,
            answer=None,
            fault="",
            title=f"SQL on {run.name}",
        )

    def run_sql(self, request: Request) -> Response:
        """Run a query; a script of the console gets the table alone, anybody else the page."""
        form = _form(request)
        run, query = self._served.run(form.get("run")), form.get("q") or ""
        answer, fault = None, ""
        try:
            answer = run.console.run(query, key=form.get("key") or "")
        except (StoreError, LmmonoError) as error:
            fault = str(error)
        if request.headers.get("x-part") == "answer":
            part = self._pages.get_template("answer.html.jinja").render(answer=answer, fault=fault)
            return HTMLResponse(part)
        return self._render(
            *("sql.html.jinja", request, run),
            query=query,
            schema=run.console.schema(),
            columns=_column_help(run),
            saved=SAVED,
            key=secrets.token_hex(8),
            limits=run.console.limits,
            answer=answer,
            fault=fault,
            title=f"SQL on {run.name}",
        )

    def stop_sql(self, request: Request) -> Response:
        """Stop the query of a key."""
        form = _form(request)
        return _json(
            {"stopped": self._served.run(form.get("run")).console.stop(form.get("key") or "")}
        )

    def static(self, request: Request) -> Response:
        """Return a style sheet or a script."""
        name = request.path_params["name"]
        if name not in self._static:
            raise HTTPException(404, "No such file")
        return Response(self._static[name], media_type=_KINDS[name.rpartition(".")[2]])

    # --- for programs -------------------------------------------------------------------------

    def api_runs(self, _: Request) -> Response:
        """Return the runs with their hooks."""
        return _json(
            [
                {"run": run.name, "hooks": run.hooks, "has_model": run.folder is not None}
                | run.counts
                for run in self._served.runs.values()
            ]
        )

    def api_units(self, request: Request) -> Response:
        """Return a page of a list of units."""
        run, asked = self._run(request), request.query_params
        found = list_units(
            run,
            hook=asked.get("hook") or None,
            sort=asked.get("sort") or "kurtosis",
            ascending=asked.get("order") == "asc",
            metric=asked.get("metric") or None,
            n_least=_whole(asked.get("n_least"), "n_least", 20),
            first=_whole(asked.get("first"), "first", 0),
        )
        return _json({"n": found.n, "units": found.rows})

    def api_unit(self, request: Request) -> Response:
        """Return what the page of a unit shows."""
        run, (hook, unit) = self._run(request), _unit_of(request)
        run.require(hook, unit)
        page = self._page_of(run, hook, unit)
        return _json(
            {"run": run.name, "hook": hook, "unit": unit, **page.data, "sql": page.queries}
        )

    def api_sql(self, request: Request) -> Response:
        """Return the rows of a query: the body is `{"run": ..., "query": ..., "rows": ...}`."""
        import json

        try:
            asked = json.loads(request.scope["lmmono.body"] or b"{}")
        except ValueError:
            raise RunError('body: want JSON such as {"query": "FROM hooks"}.') from None
        if not isinstance(asked, dict) or not isinstance(asked.get("query"), str):
            raise RunError('body: want JSON such as {"query": "FROM hooks"}.')
        rows = asked.get("rows")
        answer = self._served.run(asked.get("run")).console.run(
            asked["query"], rows=rows if isinstance(rows, int) and rows > 0 else None
        )
        return _json(answer.json())

    def api_feature(self, request: Request) -> Response:
        """Return a unit in the shape of Neuronpedia's API, which its clients read."""
        at = request.path_params
        run = self._served.run(at["model"])
        hook = hook_of_layer(run, at["layer"])
        run.require(hook, at["unit"])
        page = self._page_of(run, hook, at["unit"])
        return _json(feature_json(run.name, at["layer"], page))


def _told(view: Callable[[Request], Response], *, is_api: bool) -> Any:
    """Return an endpoint that runs a view in a thread, and tells errors of users."""
    from starlette.concurrency import run_in_threadpool

    async def endpoint(request: Request) -> Response:
        request.scope["lmmono.body"] = await request.body()
        try:
            return await run_in_threadpool(view, request)
        except Busy as error:
            return _json({"error": str(error)}, 429) if is_api else _fault(429, "Busy", str(error))
        except (LmmonoError, StoreError) as error:
            status = 404 if isinstance(error, ContentError) else 400
            if is_api:
                return _json({"error": str(error)}, status)
            return _fault(status, "That did not work", str(error))

    return endpoint


def _json(value: Any, status: int = 200) -> Response:
    return Response(json_text(value), status, media_type="application/json")


def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form that a browser has sent as text."""
    from urllib.parse import parse_qsl

    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise RunError("body: want a form.")
    text = request.scope["lmmono.body"].decode("utf-8", "replace")
    return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=20))


def _whole(text: str | None, name: str, default: int) -> int:
    if text is None or text == "":
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise RunError(f"{name}: want a whole number, got {text[:40]!r}.")
    return int(text)


def _real(text: str | None, name: str, default: float) -> float:
    if text is None or text == "":
        return default
    if not re.fullmatch(r"-?[0-9]{1,6}(\.[0-9]{1,9})?", text):
        raise RunError(f"{name}: want a number such as 2.5, got {text[:40]!r}.")
    return float(text)


def _unit_of(request: Request) -> tuple[str, int]:
    asked = request.query_params
    if not asked.get("hook") or not asked.get("unit"):
        raise RunError("want a hook and a unit in the address.")
    return asked["hook"], _whole(asked["unit"], "unit", 0)


def _units_of(text: str) -> list[tuple[str, int]]:
    """Return units that are written HOOK:UNIT, with blanks or commas between them."""
    units: list[tuple[str, int]] = []
    at = 0
    while rest := text[at:].strip(" \t\r\n,"):
        found = _UNIT.match(text, at)
        if found is None:
            raise RunError(f"units: want HOOK:UNIT, got {rest[:80]!r}.")
        units.append((found[1], int(found[2])))
        at = found.end()
    if len(units) > MOST_UNITS:
        raise RunError(f"units: want at most {MOST_UNITS}, got {len(units)}.")
    return units


def _largest(run: ServedRun) -> dict[str, list[float | None]]:
    """Return the largest act of every unit, by hook, in the order of the units."""
    rows = run.store.sql("SELECT hook, unit, max_act FROM unit_stats").fetchall()
    largest: dict[str, list[float | None]] = {hook: [None] * d for hook, d in run.hooks.items()}
    for hook, unit, act in rows:
        if hook in largest and unit < len(largest[hook]):
            largest[hook][unit] = act
    return largest


def _standing_out(run: ServedRun) -> tuple[str | None, list[dict[str, Any]]]:
    """Return ten units worth a look, ranked as a report ranks them, and the metric of the ranking.

    Without scores, the most peaked ones of those that fire often enough.
    """
    known = metrics(run)
    if not known:
        return None, list_units(run, sort="kurtosis").rows[:10]
    best = [f"{row['hook']}:{row['unit']}" for row in ranked(run.store, 10, metric=known[0])[:10]]
    rows = list_units(run, metric=known[0], n_least=None, picked=best).rows
    return known[0], sorted(rows, key=lambda row: best.index(f"{row['hook']}:{row['unit']}"))


def _column_help(run: ServedRun) -> dict[str, list[str]]:
    """Return the columns of each table, for the list beside the console."""
    rows = run.console.store.sql(
        "SELECT view_name, list(column_name ORDER BY column_index) FROM duckdb_views() v "
        "JOIN duckdb_columns() c "
        "ON c.table_name = v.view_name AND c.database_name = v.database_name "
        "WHERE v.database_name = 'memory' AND NOT v.internal GROUP BY ALL"
    ).fetchall()
    return dict(rows)
