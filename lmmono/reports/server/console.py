"""Queries of people and programs that are not trusted: read-only, bounded, and stopped on demand.

The store refuses what could do more than read (`activation_store.catalog.door`). Here every query
also gets little time, memory and disk, few rows and short cells, so that no answer fills a page or
a client's memory; and few run at a time.
"""

import json
import math
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import activation_store as astore
from activation_store.catalog.schema_reference import column_comments, entries
from lmmono.errors import RunError, nearest

CELL = 2_000
"""Characters of a cell; what is longer is cut and says so."""
COLUMNS = 200
"""Columns of a result."""
AT_ONCE = 4
"""Queries that run at one time; DuckDB gives each all cores, so more only slow one another down."""
LONGEST_QUERY = 20_000
"""Characters of a query: DuckDB's parser takes memory that no limit counts."""

_NUMBERS = re.compile(r"U?(TINY|SMALL|BIG)?INT(EGER)?|FLOAT|DOUBLE|BOOLEAN")
_WIDE = re.compile(r"U?HUGEINT|DECIMAL.*")


@dataclass(frozen=True, slots=True)
class ConsoleLimits:
    """What one query may take."""

    seconds: float = 10.0
    """Wall time."""
    memory_bytes: int = 1_000_000_000
    """Memory of DuckDB, for all queries of a store together."""
    rows: int = 1_000
    """Rows that are given; further ones are left out, and the answer says so."""
    spill_bytes: int = 1_000_000_000
    """Disk for what outgrows the memory."""

    def of_store(self) -> astore.QueryLimits:
        """Return the limits that the store itself keeps; rows are cut here instead of refused."""
        return astore.QueryLimits(
            seconds=self.seconds, memory_bytes=self.memory_bytes, spill_bytes=self.spill_bytes
        )


@dataclass(frozen=True, slots=True)
class QueryAnswer:
    """The rows of a query, as JSON can hold them."""

    columns: tuple[str, ...]
    """Names; a second one of a name is `name_1`."""
    types: tuple[str, ...]
    """DuckDB's types."""
    rows: tuple[tuple[Any, ...], ...]
    """Numbers, booleans, None and text; nested values are JSON text."""
    is_cut: bool
    """There were more rows."""
    seconds: float
    """Wall time."""

    def json(self) -> dict[str, Any]:
        """Return the answer as it is sent, NaN and infinities as null."""
        rows = [
            {n: _finite(cell) for n, cell in zip(self.columns, row, strict=True)}
            for row in self.rows
        ]
        return {
            "columns": [
                {"name": n, "type": kind} for n, kind in zip(self.columns, self.types, strict=True)
            ],
            "rows": rows,
            "n_rows": len(rows),
            "is_cut": self.is_cut,
            "seconds": round(self.seconds, 4),
        }


class Busy(RunError):
    """As many queries run as may."""


class Console:
    """Runs queries on one store within limits; threads may share it."""

    def __init__(self, store: astore.Store, limits: ConsoleLimits | None = None) -> None:
        self.store = store
        self.limits = limits or ConsoleLimits()
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._guard = threading.Lock()
        self._running: dict[str, astore.QueryResult | None] = {}
        self._stopped: set[str] = set()

    def run(self, query: str, *, key: str = "", rows: int | None = None) -> QueryAnswer:
        """Return what one query gives.

        Args:
            query: One statement that reads.
            key: Name under which `stop` finds it.
            rows: Most rows, at most those of the limits.

        Raises:
            QueryError: It is refused, wrong, was stopped or took too long.
            Busy: Too many run already, or one of this key does.
        """
        if len(query) > LONGEST_QUERY:
            raise astore.QueryError(
                f"want a query of at most {LONGEST_QUERY:,} characters, got {len(query):,}"
            )
        if "\0" in query:  # where DuckDB ends to read
            raise astore.QueryError("want a query without the character U+0000")
        if not self._slots.acquire(blocking=False):
            raise Busy(f"{AT_ONCE} queries run already; wait for one to end, or stop it")
        try:
            with self._guard:
                if key and key in self._running:
                    raise Busy("a query of this name runs already")
                if key:
                    self._running[key] = None
            return self._run(query, key, min(rows or self.limits.rows, self.limits.rows))
        finally:
            with self._guard:
                self._running.pop(key, None)
                self._stopped.discard(key)
            self._slots.release()

    def _run(self, query: str, key: str, n_most: int) -> QueryAnswer:
        began = time.monotonic()
        result = self.store.sql(query)
        names, types = _told_apart(result.columns), tuple(map(str, result.types))
        if len(names) > COLUMNS:
            raise astore.QueryError(f"want at most {COLUMNS} columns, got {len(names)}")
        columns = [f"{_cell(i, kind)} AS c{i}" for i, kind in enumerate(types, start=1)]
        plain = result.project(", ".join(columns)).limit(n_most + 1)
        with self._guard:
            if key in self._stopped:
                raise astore.QueryError("the query was stopped.")
            if key:
                self._running[key] = plain
        found = plain.fetchall()
        cells = tuple(tuple(_value(cell, kind) for cell, kind in zip(row, types, strict=True))
                      for row in found[:n_most])  # fmt: skip
        return QueryAnswer(names, types, cells, len(found) > n_most, time.monotonic() - began)

    def stop(self, key: str) -> bool:
        """Stop the query of a key; False where none runs."""
        with self._guard:
            if key not in self._running:
                return False
            self._stopped.add(key)
        for _ in range(40):  # again and again: what has not begun to run cannot be interrupted yet
            with self._guard:
                if key not in self._stopped:
                    break
                result = self._running.get(key)
            if result is not None:
                result.interrupt()
            time.sleep(0.05)
        return True

    def schema(self, names: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return tables, views and macros with what their rows are, those named with columns.

        Raises:
            RunError: There is no such table or macro.
        """
        known = {entry.name: entry for entry in entries()}
        comments = column_comments()
        shown: list[dict[str, Any]] = []
        for name in names or known:
            if name not in known:
                raise RunError(f"{name}: no such table or macro; {nearest(name, known)}")
            entry = known[name]
            one: dict[str, Any] = entry._asdict()
            if names and entry.kind != "macro":
                found = self.store.sql(f"DESCRIBE FROM {name}").fetchall()
                one["columns"] = [
                    {"name": c, "type": kind, "about": comments.get((name, c), "")}
                    for c, kind, *_ in found
                ]
            shown.append(one)
        return shown


def _cell(i: int, kind: str) -> str:
    """Return the SQL that makes the i-th column a number or a short text."""
    if _NUMBERS.fullmatch(kind):
        return f"#{i}"
    if _WIDE.fullmatch(kind):
        return f"#{i}::VARCHAR"
    text = f"#{i}::VARCHAR"
    if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION")):
        text = f"to_json(#{i})::VARCHAR"
    return (
        f"CASE WHEN length({text}) > {CELL} THEN left({text}, {CELL}) || '… (' || "
        f"length({text}) || ' characters)' ELSE {text} END"
    )


def _value(cell: Any, kind: str) -> Any:
    if cell is None or not _WIDE.fullmatch(kind):
        return cell
    return float(cell) if kind.startswith("DECIMAL") else int(cell)


def _finite(cell: Any) -> Any:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Return column names that are all different.

    >>> _told_apart(["hook", "unit", "hook"])
    ('hook', 'unit', 'hook_1')
    """
    unique: list[str] = []
    for name in names:
        candidate, n = name, 0
        while candidate in unique or (n and candidate in names):
            n += 1
            candidate = f"{name}_{n}"
        unique.append(candidate)
    return tuple(unique)


def json_text(value: Any) -> str:
    """Return JSON that any page or program may hold: plain ASCII, without NaN."""
    return json.dumps(_all_finite(value), default=str, allow_nan=False)


def _all_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _all_finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_all_finite(v) for v in value]
    return _finite(value)
