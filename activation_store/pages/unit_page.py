"""One unit on a page: what it fires on and writes, what is said of it, and the SQL behind it all.

`unit_page` is the one function that a notebook, a report and a server show units by. It reads the
store alone: what needs the model (promoted tokens, nearest units) was put into tables before.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from markupsafe import Markup

from activation_store.errors import ContentError
from activation_store.pages.heatmap import heat_spans, in_notebook
from activation_store.pages.templating import environment
from activation_store.read.characters import whole_characters
from activation_store.read.queried import Queried, unit_stats

N_BARS = 24
"""Bars of the histogram: as many as a panel of 300 pixels shows apart."""
N_BUCKETS = 16
"""Parts of a sequence in the profile of positions."""
BATCH = 256
"""Units that are read together: a table is asked once for all of them."""
N_BLOCKS = 64
"""Blocks of `BATCH` units that a server keeps: their rows, without tokens and acts."""
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
        return Markup(template.render(page=self, heat=partial(_heat, scale=scale), **self.data))

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
    counting: "Counting | None" = None,
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
        counting: The store's tokens in memory, for who asks for one page after another.

    Raises:
        ContentError: The store has no such unit.
    """
    shape = options or PageOptions()
    if counting is None:
        reading = _Reading(store, hook, [unit], shape, None)
    else:
        reading = counting.block(hook, unit // BATCH, shape)
    for page in reading.pages(name, link or _own_link, ask, [unit]):
        return page
    unit_stats(store, hook, unit)  # raises with the hooks that there are
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
    counting: "Counting | None" = None,
) -> Iterator[UnitPage]:
    """Yield the pages of units of a hook, as `unit_page` makes them, read some at a time.

    A unit that the store does not have is left out.
    """
    shape = options or PageOptions()
    units = list(dict.fromkeys(int(unit) for unit in units))
    if counting is None and len(units) > 1:
        counting = Counting(store)
    for first in range(0, len(units), BATCH):
        some = units[first : first + BATCH]
        yield from _Reading(store, hook, some, shape, counting).pages(name, link or _own_link, ask)


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
FROM unit_stats JOIN ranks USING (unit) WHERE hook = $hook ORDER BY unit
"""

_CHOSEN = """SELECT unit, kind, rank, bin, act, doc_id, seq_id, pos FROM exemplars
    WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
    QUALIFY row_number() OVER (
        PARTITION BY unit, kind, CASE kind WHEN 'quantile' THEN bin END ORDER BY rank
    ) <= CASE kind WHEN 'top' THEN $top_k WHEN 'quantile' THEN $quantile_k ELSE $random_k END"""

_EXEMPLARS = f"""
WITH chosen AS MATERIALIZED (
    {_CHOSEN}
),
near AS MATERIALIZED (
    SELECT c.*, t.pos AS at_pos, coalesce(v.token, '[' || t.token_id || ']') AS token
    FROM chosen c
    JOIN token_ids t ON t.seq_id = c.seq_id AND t.doc_id = c.doc_id
        AND t.pos BETWEEN c.pos - $before AND c.pos + $after
    LEFT JOIN vocabulary v ON v.token_id = t.token_id
),
fired AS (
    SELECT unit, seq_id, pos AS at_pos, act AS at_act FROM acts
    WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
        AND seq_id IN (SELECT seq_id FROM chosen)
)
SELECT unit, kind, rank, bin, act, doc_id, seq_id, pos, min(at_pos) AS first_pos,
    list(token ORDER BY at_pos) AS tokens,
    list(coalesce(at_act, 0)::DOUBLE ORDER BY at_pos) AS acts
FROM near LEFT JOIN fired USING (unit, seq_id, at_pos)
GROUP BY unit, kind, rank, bin, act, doc_id, seq_id, pos
ORDER BY unit, kind, bin DESC, rank
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
WHERE p.hook = $hook AND p.unit BETWEEN $first AND $last AND list_contains($units, p.unit)
    AND p.rank <= $list_k
ORDER BY p.unit, p.sign DESC, p.rank
"""

_NEIGHBOURS = """
SELECT unit, kind, rank, neighbour, cosine, control FROM neighbours
WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
    AND rank <= $list_k
ORDER BY unit, kind, rank
"""

_EXPLANATIONS = """
SELECT unit, explainer, seed, text, failure, reason, n_records, model FROM explanations
WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
    AND coalesce(rank, 1) = 1
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

_COUNTED = {
    "stats": _STATS,
    "exemplars": f"{_CHOSEN}\nORDER BY unit, kind, bin DESC, rank",
    "promotes": """
SELECT unit, sign, rank, token_id, logit, control FROM promotes
WHERE hook = $hook AND unit BETWEEN $first AND $last AND list_contains($units, unit)
    AND rank <= $list_k
ORDER BY unit, sign DESC, rank
""",
    "neighbours": _NEIGHBOURS,
    "explanations": _EXPLANATIONS,
    "scores": _SCORES,
}
"""What is left to ask where the tokens are in memory. A unit's acts are read once, and counted
there: SQL over units that lie apart would read all that lies between, four times."""

Row = dict[str, Any]


class Counting:
    """What one page after another asks of a store, in memory: its tokens, and units by blocks.

    Gives what the queries of `_PANELS` give, and may be shared by threads.
    """

    def __init__(self, store: Queried) -> None:
        self._store = store
        rows = store.sql("SELECT seq_id, pos, doc_id, token_id FROM token_ids").fetchnumpy()
        self._width = int(rows["pos"].max(initial=-1)) + 1
        keys = rows["seq_id"].astype(np.int64) * self._width + rows["pos"]
        order = np.argsort(keys)
        self._keys, self._ids, self._docs = (
            np.asarray(column)[order] for column in (keys, rows["token_id"], rows["doc_id"])
        )
        self._n_at = np.bincount(rows["pos"], minlength=self._width)
        self._n_of = np.bincount(self._ids)
        self._names = dict(store.sql("SELECT token_id, token FROM vocabulary").fetchall())
        self.block = lru_cache(maxsize=N_BLOCKS)(self._block)

    def _block(self, hook: str, number: int, options: PageOptions) -> "_Reading":
        units = range(number * BATCH, (number + 1) * BATCH)
        return _Reading(self._store, hook, units, options, self)

    def fill(
        self, hook: str, unit: int, max_act: float | None, rows: dict[str, list[Row]], shape: Any
    ) -> None:
        """Add the panels that the acts of a unit give, the windows of exemplars, and names."""
        query = "SELECT seq_id, pos, act FROM acts WHERE hook = $hook AND unit = $unit"
        stored = self._store.sql(query, hook=hook, unit=unit).fetchnumpy()
        pos, acts = np.asarray(stored["pos"]), np.asarray(stored["act"], np.float32)
        keys = stored["seq_id"].astype(np.int64) * self._width + pos
        if np.any(np.diff(keys) < 0):  # shards hold a unit's acts in order, but are several
            order = np.argsort(keys)
            pos, acts, keys = pos[order], acts[order], keys[order]
        windows = (self._window(row, keys, acts, shape) for row in rows["exemplars"])
        rows["exemplars"] = [row for row in windows if row["tokens"]]
        for row in rows["promotes"]:
            row["token"] = self._name(row["token_id"])
        bars = np.clip(np.floor(acts * np.float32(N_BARS) / (max_act or 1.0)), 0, N_BARS - 1)
        filled = np.bincount(bars.astype(np.int64), minlength=N_BARS).tolist()
        rows["histogram"] = [{"bar": bar, "n": n} for bar, n in enumerate(filled) if n]
        rows["positions"] = self._positions(pos, acts)
        rows["tokens"] = self._tokens(keys, acts, shape.list_k)

    def _name(self, token_id: int) -> str:
        return self._names.get(token_id) or f"[{token_id}]"

    def _window(self, row: Row, keys: Any, acts: Any, shape: PageOptions) -> Row:
        """Return an exemplar with the tokens around it, of its document, and the acts on them."""
        start = row["seq_id"] * self._width
        ends = max(0, row["pos"] - shape.before), min(self._width - 1, row["pos"] + shape.after)
        i, j = np.searchsorted(self._keys, [start + ends[0], start + ends[1] + 1])
        is_same = self._docs[i:j] == row["doc_id"]
        places = (self._keys[i:j][is_same] - start).tolist()
        first, stop = np.searchsorted(keys, [start + ends[0], start + ends[1] + 1])
        stored = dict(zip((keys[first:stop] - start).tolist(), acts[first:stop].tolist(),
                          strict=True))  # fmt: skip
        return {
            **row,
            "first_pos": places[0] if places else None,
            "tokens": [self._name(token) for token in self._ids[i:j][is_same].tolist()],
            "acts": [stored.get(place, 0.0) for place in places],
        }

    def _positions(self, pos: Any, acts: Any) -> list[Row]:
        width = -(-self._width // N_BUCKETS) or 1
        buckets = np.arange(self._width) // width
        n_tokens = np.bincount(buckets, self._n_at)
        density = np.bincount(pos // width, minlength=len(n_tokens)) / n_tokens
        mean = np.bincount(pos // width, acts.astype(np.float64), len(n_tokens)) / n_tokens
        return [
            {
                "first_pos": i * width,
                "last_pos": min((i + 1) * width, self._width) - 1,
                "density": float(density[i]),
                "mean_act": float(mean[i]),
            }
            for i in range(len(n_tokens))
        ]

    def _tokens(self, keys: Any, acts: Any, k: int) -> list[Row]:
        if not len(acts):
            return []
        ids = self._ids[np.searchsorted(self._keys, keys)]
        totals, n_acts = np.bincount(ids, acts.astype(np.float64)), np.bincount(ids)
        fired = np.flatnonzero(n_acts)
        best = fired[np.lexsort((fired, -totals[fired]))[:k]].tolist()
        return [
            {
                "token_id": token,
                "token": self._name(token),
                "mass": float(totals[token] / totals.sum()),
                "frequency": float(self._n_of[token] / len(self._ids)),
                "n_acts": int(n_acts[token]),
                "n_tokens": int(self._n_of[token]),
                "density": float(n_acts[token] / self._n_of[token]),
                "mean_act": float(totals[token] / n_acts[token]),
                "max_act": float(acts[ids == token].max()),
            }
            for token in best
        ]


class _Reading:
    """Some units of one hook, read together; in Arrow, so that a block of them stays small."""

    def __init__(
        self,
        store: Queried,
        hook: str,
        units: Sequence[int],
        options: PageOptions,
        counting: Counting | None,
    ) -> None:
        self._store, self._options, self._counting = store, options, counting
        self._hook, self._units = hook, list(units)
        queries = _PANELS if counting is None else _COUNTED
        self._tables = {panel: self._read(query) for panel, query in queries.items()}

    def _parameters(self, units: Sequence[int], query: str) -> dict[str, Any]:
        options = self._options
        values: dict[str, Any] = {
            "hook": self._hook,
            "units": list(units),
            "first": min(units),
            "last": max(units),
            "n_bars": N_BARS,
            "n_buckets": N_BUCKETS,
        }
        values |= {name: getattr(options, name) for name in PageOptions.__dataclass_fields__}
        return {name: values[name] for name in set(re.findall(r"\$(\w+)", query))}

    def _read(self, query: str) -> tuple[Any, Any]:
        """Return the rows of a panel, and the unit of each, ascending."""
        result = self._store.sql(query, **self._parameters(self._units, query))
        table = result.to_arrow_table()
        return table.drop_columns("unit"), np.array(table["unit"].to_pylist(), np.int64)

    def _rows(self, panel: str, unit: int) -> list[Row]:
        table, units = self._tables[panel]
        start, stop = np.searchsorted(units, [unit, unit + 1]).tolist()
        return table.slice(start, stop - start).to_pylist()

    def pages(
        self,
        name: str,
        link: Callable[[str, int], str],
        ask: Callable[[str], str] | None,
        units: Sequence[int] | None = None,
    ) -> Iterator[UnitPage]:
        """Yield the pages of some of the units, or of all."""
        for unit in self._units if units is None else units:
            if not (stats := self._rows("stats", unit)):
                continue
            queries = {
                panel: _filled(query, self._parameters([unit], query))
                for panel, query in _PANELS.items()
            }
            yield UnitPage(name, self._hook, unit, self._data(unit, stats[0]), queries, link, ask)

    def _data(self, unit: int, stats: Row) -> dict[str, Any]:
        of = {panel: self._rows(panel, unit) for panel in self._tables if panel != "stats"}
        if self._counting is not None:
            self._counting.fill(self._hook, unit, stats["max_act"], of, self._options)
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
