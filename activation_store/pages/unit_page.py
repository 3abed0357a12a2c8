"""One unit on a page: what it fires on and writes, what is said of it, and the SQL behind it all.

`unit_page` is the one function that a notebook, a report and a server show units by. It reads the
store alone: what needs the model (promoted tokens, nearest units) was put into tables before.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from markupsafe import Markup

from activation_store.errors import ContentError
from activation_store.pages.heatmap import heat_spans, in_notebook
from activation_store.pages.templating import environment
from activation_store.read.characters import whole_characters
from activation_store.unit import Queried, read_unit

N_BARS = 24
"""Bars of the histogram: as many as a panel of 300 pixels shows apart."""
N_BUCKETS = 16
"""Parts of a sequence in the profile of positions."""
BATCH = 64
"""Units that are read together: their acts are in memory at one time."""
RANKED = ("density", "mean", "skewness", "kurtosis", "q99", "max_act")
"""Statistics shown with the unit's rank among the units of its hook; 1 is the largest."""


@dataclass(frozen=True, slots=True)
class PageOptions:
    """How much of a unit a page shows."""

    top_k: int = 8
    """Strongest exemplars."""
    quantile_k: int = 1
    """Exemplars of each quantile bin."""
    random_k: int = 4
    """Random tokens: what the unit does where nobody chose it."""
    before: int = 20
    """Tokens shown before an exemplar, of its document."""
    after: int = 10
    """Tokens shown after it."""
    list_k: int = 10
    """Tokens and units in each list."""


@dataclass(frozen=True)
class UnitPage:
    """What a page shows of one unit."""

    name: str
    """What the heading calls the run."""
    hook: str
    unit: int
    data: dict[str, Any]
    """What is drawn, as JSON can hold it: `stats`, `ranks`, `n_units`, `exemplars` by kind,
    `histogram`, `positions`, `tokens`, `promotes`, `neighbours`, `explanations`, `scores`."""
    queries: dict[str, str]
    """The SQL behind each panel, with the unit's name in it."""
    link: Callable[[str, int], str] = field(repr=False)
    ask: Callable[[str], str] | None = field(repr=False)

    @cached_property
    def html(self) -> Markup:
        """The page as one `<article>`, without styles or scripts."""
        template = environment().get_template("unit.html.jinja")
        scale = self.data["stats"]["max_act"] or 0.0
        return Markup(template.render(page=self, heat=lambda e: _heat(e, scale), **self.data))

    @property
    def id(self) -> str:
        """The article's id: letters, digits and hyphens."""
        return re.sub(r"[^A-Za-z0-9]+", "-", f"unit {self.name} {self.hook} {self.unit}").strip("-")


def unit_page(
    store: Queried,
    hook: str,
    unit: int,
    *,
    name: str = "",
    link: Callable[[str, int], str] | None = None,
    ask: Callable[[str], str] | None = None,
    options: PageOptions | None = None,
) -> UnitPage:
    """Return the page of one unit; everything is read now, the markup is made when it is asked for.

    Args:
        store: Open store, or whatever answers SQL over its tables.
        hook: Hook stored as rows.
        unit: Index of the unit.
        name: What the heading calls the run.
        link: Address of another unit's page; by default `#hook:unit`.
        ask: Address of a console with a query in it; without one a query can be copied only.
        options: How much is shown.

    Raises:
        ContentError: The store has no such unit.
    """
    pages = unit_pages(store, hook, [unit], name=name, link=link, ask=ask, options=options)
    for page in pages:
        return page
    read_unit(store, hook, unit)  # raises with the hooks that there are
    raise ContentError(f"{store.path}: no unit {unit} of hook {hook!r}.")


def unit_pages(
    store: Queried,
    hook: str,
    units: Sequence[int],
    *,
    name: str = "",
    link: Callable[[str, int], str] | None = None,
    ask: Callable[[str], str] | None = None,
    options: PageOptions | None = None,
) -> Iterator[UnitPage]:
    """Yield the pages of units of a hook, as `unit_page` makes them, read some at a time.

    A unit that the store does not have is left out.
    """
    shape = options or PageOptions()
    for first in range(0, len(units), BATCH):
        some = [int(unit) for unit in units[first : first + BATCH]]
        yield from _Reading(store, hook, some, shape).pages(name, link or _own_link, ask)


def notebook_html(pages: Sequence[UnitPage]) -> str:
    """Return pages with their styles, for a cell of a notebook."""
    return in_notebook(Markup("").join(page.html for page in pages))


def _own_link(hook: str, unit: int) -> str:
    return f"#{hook}:{unit}"


def _heat(exemplar: dict[str, Any], scale: float) -> Markup:
    return heat_spans(exemplar["tokens"], exemplar["acts"], scale, exemplar["peak"])


_STATS = f"""
WITH ranks AS (
    SELECT s.unit, count(*) AS n_units,
        {", ".join(f"1 + count(*) FILTER (o.{name} > s.{name}) AS rank_{name}" for name in RANKED)}
    FROM unit_stats s JOIN unit_stats o ON o.hook = s.hook
    WHERE s.hook = $hook AND list_contains($units, s.unit)
    GROUP BY s.unit
)
FROM unit_stats JOIN ranks USING (unit) WHERE hook = $hook
"""

_EXEMPLARS = """
WITH chosen AS MATERIALIZED (
    SELECT unit, kind, rank, bin, act, doc_id, seq_id, pos FROM exemplars
    WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
    QUALIFY row_number() OVER (
        PARTITION BY unit, kind, CASE kind WHEN 'quantile' THEN bin END ORDER BY rank
    ) <= CASE kind WHEN 'top' THEN $top_k WHEN 'quantile' THEN $quantile_k ELSE $random_k END
),
near AS MATERIALIZED (
    SELECT c.*, t.pos AS at_pos, t.token_id FROM chosen c
    JOIN token_ids t ON t.seq_id = c.seq_id AND t.doc_id = c.doc_id
        AND t.pos BETWEEN c.pos - $before AND c.pos + $after
),
fired AS (
    SELECT unit, seq_id, pos, act FROM acts
    WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
        AND seq_id IN (SELECT seq_id FROM chosen)
)
SELECT
    n.unit, n.kind, n.rank, n.bin, n.act, n.doc_id, n.seq_id, n.pos, min(n.at_pos) AS first_pos,
    list(coalesce(v.token, '[' || n.token_id || ']') ORDER BY n.at_pos) AS tokens,
    list(coalesce(f.act, 0)::DOUBLE ORDER BY n.at_pos) AS acts
FROM near n
LEFT JOIN vocabulary v ON v.token_id = n.token_id
LEFT JOIN fired f ON f.unit = n.unit AND f.seq_id = n.seq_id AND f.pos = n.at_pos
GROUP BY n.unit, n.kind, n.rank, n.bin, n.act, n.doc_id, n.seq_id, n.pos
ORDER BY n.unit, n.kind, n.bin DESC, n.rank
"""

_HISTOGRAM = """
SELECT a.unit, least(greatest(floor(a.act * $n_bars / s.max_act), 0), $n_bars - 1)::INTEGER AS bar,
    count(*) AS n
FROM acts a JOIN unit_stats s ON s.hook = a.hook AND s.unit = a.unit
WHERE a.hook = $hook AND a.unit BETWEEN $first AND $last AND list_contains($units, a.unit)
    AND s.max_act > 0
GROUP BY ALL ORDER BY ALL
"""

_POSITIONS = """
WITH places AS MATERIALIZED (SELECT pos, count(*) AS n FROM token_ids GROUP BY pos),
size AS (SELECT ceil((max(pos) + 1) / $n_buckets)::INTEGER AS width FROM places),
buckets AS (
    SELECT pos // width AS bucket, min(pos) AS first_pos, max(pos) AS last_pos, sum(n) AS n_tokens
    FROM places, size GROUP BY bucket
),
fired AS (
    SELECT unit, pos // width AS bucket, count(*) AS n_acts, sum(act::DOUBLE) AS total
    FROM acts, size
    WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
    GROUP BY ALL
)
SELECT u.unit, b.first_pos, b.last_pos,
    coalesce(f.n_acts, 0) / b.n_tokens AS density, coalesce(f.total, 0) / b.n_tokens AS mean_act
FROM (SELECT unnest($units)::INTEGER AS unit) u CROSS JOIN buckets b
LEFT JOIN fired f ON f.unit = u.unit AND f.bucket = b.bucket
ORDER BY u.unit, b.bucket
"""

_TOKENS = """
WITH firing AS (
    SELECT a.unit, t.token_id, count(*) AS n_acts, sum(a.act::DOUBLE) AS total, max(a.act) AS most
    FROM acts a JOIN token_ids t ON t.seq_id = a.seq_id AND t.pos = a.pos
    WHERE a.hook = $hook AND a.unit BETWEEN $first AND $last AND list_contains($units, a.unit)
    GROUP BY ALL
),
best AS (
    SELECT *, total / sum(total) OVER (PARTITION BY unit) AS mass FROM firing
    QUALIFY row_number() OVER (PARTITION BY unit ORDER BY total DESC, token_id) <= $list_k
),
counts AS (
    SELECT token_id, count(*) AS n_tokens, count(*) / (SELECT count(*) FROM token_ids) AS frequency
    FROM token_ids WHERE token_id IN (SELECT token_id FROM best) GROUP BY token_id
)
SELECT b.unit, b.token_id, coalesce(v.token, '[' || b.token_id || ']') AS token, b.mass,
    c.frequency, b.n_acts, c.n_tokens, b.n_acts / c.n_tokens AS density,
    b.total / b.n_acts AS mean_act, b.most AS max_act
FROM best b JOIN counts c USING (token_id) LEFT JOIN vocabulary v USING (token_id)
ORDER BY b.unit, b.mass DESC, b.token_id
"""

_PROMOTES = """
SELECT p.unit, p.sign, p.rank, p.token_id, coalesce(v.token, '[' || p.token_id || ']') AS token,
    p.logit, p.control
FROM promotes p LEFT JOIN vocabulary v USING (token_id)
WHERE p.hook = $hook AND list_contains($units, p.unit) AND p.rank <= $list_k
ORDER BY p.unit, p.sign DESC, p.rank
"""

_NEIGHBOURS = """
SELECT unit, kind, rank, neighbour, cosine, control FROM neighbours
WHERE hook = $hook AND list_contains($units, unit) AND rank <= $list_k ORDER BY unit, kind, rank
"""

_EXPLANATIONS = """
SELECT unit, explainer, seed, text, failure, reason, n_records, model FROM explanations
WHERE hook = $hook AND list_contains($units, unit) AND coalesce(rank, 1) = 1
ORDER BY unit, explainer, seed NULLS FIRST, created_at
"""

# the untrained control is another model, whose units are no partners of these: its mean stands here
_SCORES = """
SELECT u.unit, metric, metric_version, preset, explainer, judge, control, value, ci_low, ci_high,
    ci_level, n, nan_fraction, failure
FROM all_scores s
JOIN (SELECT unnest($units)::INTEGER AS unit) u ON s.unit = u.unit OR s.unit IS NULL
WHERE hook = $hook AND dictionary IS NULL
    AND (control IS DISTINCT FROM 'untrained_model') = (s.unit IS NOT NULL)
QUALIFY row_number() OVER (PARTITION BY u.unit, metric, preset, explainer, judge, control
    ORDER BY metric_version DESC, created_at DESC) = 1
ORDER BY u.unit, explainer NULLS FIRST, metric, preset NULLS FIRST, judge, control NULLS FIRST
"""

_PANELS = {
    "stats": _STATS,
    "exemplars": _EXEMPLARS,
    "histogram": _HISTOGRAM,
    "positions": _POSITIONS,
    "tokens": _TOKENS,
    "promotes": _PROMOTES,
    "neighbours": _NEIGHBOURS,
    "explanations": _EXPLANATIONS,
    "scores": _SCORES,
}
"""The query behind each panel."""

Row = dict[str, Any]


class _Reading:
    """Some units of one hook, read together."""

    def __init__(
        self, store: Queried, hook: str, units: Sequence[int], options: PageOptions
    ) -> None:
        self._store, self._options = store, options
        self._hook, self._units = hook, list(units)
        self._rows = {panel: self._read(query) for panel, query in _PANELS.items()}

    def _parameters(self, units: Sequence[int], query: str) -> dict[str, Any]:
        options = self._options
        known: dict[str, Any] = {
            "hook": self._hook,
            "units": list(units),
            "first": min(units),
            "last": max(units),
            "n_bars": N_BARS,
            "n_buckets": N_BUCKETS,
        }
        known |= {name: getattr(options, name) for name in PageOptions.__dataclass_fields__}
        return {name: known[name] for name in set(re.findall(r"\$(\w+)", query))}

    def _read(self, query: str) -> dict[int, list[Row]]:
        result = self._store.sql(query, **self._parameters(self._units, query))
        names = result.columns
        of_unit: dict[int, list[Row]] = defaultdict(list)
        for cells in result.fetchall():
            row = dict(zip(names, cells, strict=True))
            of_unit[row.pop("unit")].append(row)
        return of_unit

    def pages(
        self,
        name: str,
        link: Callable[[str, int], str],
        ask: Callable[[str], str] | None,
    ) -> Iterator[UnitPage]:
        for unit in self._units:
            if unit not in self._rows["stats"]:
                continue
            queries = {
                panel: _filled(query, self._parameters([unit], query))
                for panel, query in _PANELS.items()
            }
            yield UnitPage(name, self._hook, unit, self._data(unit), queries, link, ask)

    def _data(self, unit: int) -> dict[str, Any]:
        of = {panel: rows.get(unit, []) for panel, rows in self._rows.items()}
        (stats,) = of["stats"]
        ranks = {name: stats.pop(f"rank_{name}") for name in RANKED}
        n_units = stats.pop("n_units")
        exemplars: dict[str, list[Row]] = {"top": [], "quantile": [], "random": []}
        for row in of["exemplars"]:
            exemplars[row["kind"]].append(_exemplar(row))
        bars = [0] * N_BARS
        for row in of["histogram"]:
            bars[row["bar"]] = row["n"]
        return {
            "stats": {"unit": unit, **stats},
            "ranks": ranks,
            "n_units": n_units,
            "exemplars": exemplars,
            "histogram": bars if any(bars) else [],
            "positions": of["positions"],
            "tokens": of["tokens"],
            "promotes": {s: [r for r in of["promotes"] if r["sign"] == s] for s in ("up", "down")},
            "neighbours": {
                kind: [row for row in of["neighbours"] if row["kind"] == kind]
                for kind in ("coactivation", "weights")
            },
            "explanations": of["explanations"],
            "scores": _with_controls(of["scores"]),
        }


def _exemplar(row: Row) -> Row:
    peak = row["pos"] - row["first_pos"]
    return {**row, "tokens": whole_characters(row["tokens"], peak), "peak": peak}


def _with_controls(rows: Sequence[Row]) -> list[Row]:
    """Return the scores of a unit, each with the values of its controls by their names."""
    by_key: dict[tuple[Any, ...], Row] = {}
    controls: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        key = (row["metric"], row["preset"], row["explainer"], row["judge"])
        control = row.pop("control")
        if control is None:
            by_key[key] = row
        elif row["value"] is not None and math.isfinite(row["value"]):
            controls[key][control] = row["value"]
    return [{**row, "controls": controls[key]} for key, row in by_key.items()]


def _filled(query: str, parameters: dict[str, Any]) -> str:
    """Return a query with its parameters written out, for somebody to paste.

    >>> _filled("FROM t WHERE hook = $hook AND unit = $unit", {"hook": "it's", "unit": 3})
    "FROM t WHERE hook = 'it''s' AND unit = 3"
    """

    def literal(match: re.Match[str]) -> str:
        value = parameters[match.group(1)]
        return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)

    return re.sub(r"\$(\w+)", literal, query).strip()
