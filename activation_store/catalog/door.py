"""The one door to DuckDB: what a connection may touch, which SQL runs on it, for how long.

A store may come from a stranger, and so may a query. Every connection is shut before its first
query: it reads the files it is given and nothing else, loads no extension and keeps its settings.
A query of a caller is one statement that only reads, which its parse tree shows. It is stopped by
Ctrl-C and by a limit of time.
"""

import json
import math
import os
import re
import secrets
import select
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from activation_store.catalog.views import quoted
from activation_store.errors import QueryError, StoreError

Settings = dict[str, str | bool | int | float | list[str]]

# a job that was given few cores keeps to them in SQL too, as it does in torch and numpy
_cores = os.environ.get("OMP_NUM_THREADS", "")
THREADS: Settings = {"threads": int(_cores)} if _cores.isdigit() and int(_cores) else {}

SETTINGS: Settings = {
    **THREADS,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    # a Python variable of the caller is no table
    "python_enable_replacements": False,
}
"""Settings of every connection; the rest of the door is `shut`, for DuckDB takes it only later."""

STORAGE_VERSION = "v1.5.0"
"""Layout of the files that are written: of the oldest DuckDB that this package runs with (1.5.5),
so that a store made by DuckDB 2 opens there too."""


@dataclass(frozen=True, slots=True)
class QueryLimits:
    """What one query of a store may take; it ends with a `QueryError` beyond that."""

    seconds: float | None = 3600.0
    """Wall time of a query, > 0; None waits without end. The default ends what was forgotten."""
    memory_bytes: int | None = None
    """Memory of DuckDB, >= 1; None leaves it DuckDB's default, 80 % of the machine. DuckDB does not
    count lists and texts within one row."""
    rows: int | None = None
    """Rows of a result, >= 1; None for any number."""
    spill_bytes: int = 32 * 10**9
    """Disk for what outgrows the memory, >= 0; enough to sort 10^9 acts of 32 bytes in memory."""

    def __post_init__(self) -> None:
        """Refuse limits that cannot be.

        Raises:
            StoreError: a limit is out of its range.
        """
        for name, value, least in (
            ("memory_bytes", self.memory_bytes, 1),
            ("rows", self.rows, 1),
            ("spill_bytes", self.spill_bytes, 0),
        ):
            if value is not None and value < least:
                raise StoreError(f"limits: {name}: want an integer >= {least}, got {value!r}.")
        if self.seconds is not None and not 0 < self.seconds < 1e9:
            raise StoreError(f"limits: seconds: want a number > 0, got {self.seconds!r}.")


def database_files(file: Path) -> list[Path]:
    """Return what DuckDB opens for a database file: also its write-ahead log and checkpoint."""
    return [file, *(Path(f"{file}{end}") for end in (".wal", ".wal.checkpoint", ".wal.recovery"))]


def shut(
    con: duckdb.DuckDBPyConnection,
    files: Iterable[str | Path],
    folders: Iterable[str | Path] = (),
    limits: QueryLimits | None = None,
) -> None:
    """Leave a new connection able to use these files and folders, and nothing else."""
    limits = limits or QueryLimits()
    paths, below = (", ".join(quoted(str(path)) for path in places) for places in (files, folders))
    # DuckDB makes this folder when a query outgrows the memory, and removes it at the end
    spill = Path(tempfile.gettempdir()) / f"activation_store-{secrets.token_hex(8)}"
    statements = [
        "SET GLOBAL parquet_metadata_cache = true",
        f"SET temp_directory = {quoted(str(spill))}",
        f"SET max_temp_directory_size = '{limits.spill_bytes}B'",
        f"SET allowed_paths = [{paths}]",
        f"SET allowed_directories = [{below}]",
        "SET enable_external_access = false",
        "SET lock_configuration = true",
    ]
    if limits.memory_bytes is not None:
        statements.insert(0, f"SET memory_limit = '{limits.memory_bytes}B'")
    con.execute("; ".join(statements))


# --- which SQL runs -----------------------------------------------------------------------------

_TABLE_FUNCTIONS = {
    "birth",
    "coactivation",
    "death",
    "duckdb_columns",
    "duckdb_databases",
    "duckdb_functions",
    "duckdb_schemas",
    "duckdb_settings",
    "duckdb_tables",
    "duckdb_types",
    "duckdb_views",
    "excerpt",
    "exemplar_tokens",
    "exemplars",
    "fires",
    "fires_both",
    "fires_only",
    "follows",
    "generate_series",
    "histogram",
    "histogram_values",
    "json_each",
    "json_tree",
    "like_this",
    "pragma_table_info",
    "pragma_version",
    "range",
    "repeat",
    "summary",
    "token_profile",
    "twins",
    "unit",
    "units_on",
    "unnest",
}
_NAMED_TABLE = {"histogram", "histogram_values", "pragma_table_info"}
"""Table functions whose first argument is the name of a table, also as a text."""
_SCALAR_FUNCTIONS_REFUSED = {"currval", "nextval", "sleep_ms", "write_log"}
"""Functions that write, wait, or take the name of a sequence as a text."""
_SIZED_FUNCTIONS = {
    "array_resize",
    "generate_series",
    "list_resize",
    "lpad",
    "range",
    "repeat",
    "rpad",
}
_LARGEST_SIZE = 10**8
"""Items of a list, or characters of a text, that one call may make. DuckDB looks at limits of time
and memory between its blocks of rows and not within one value: a list of 3 * 10^9 numbers ended the
process. As a table the same functions make rows, which have no such bound."""
_PRIVATE = "__ducklake_metadata"
"""How the name of a lake's own database begins, which may hold the tables of others too."""
_ATTACHED = "catalogue of"
"""How the names of attached catalogue files begin, whose views are those of their makers."""
_EXPLAIN = re.compile(r"\s*explain\s+(?:analyze\s+)?(?=select|from|with|values)", re.IGNORECASE)


def read_only(con: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    """Parse `query` and return it as the one statement that may run.

    `shut` keeps DuckDB from files and settings. That does not stop a `SELECT` from functions with
    effects (logging, profiling, raw memory addresses), nor from a table that a text names, so the
    parse tree is checked, and only table functions known to be harmless pass.

    Raises:
        QueryError: it does not parse, is not exactly one query, or could do more than read.
    """
    try:
        statements = con.extract_statements(query)
    except (duckdb.Error, UnicodeError) as fault:
        raise QueryError(f"{fault}") from fault
    if len(statements) != 1:
        raise QueryError(
            f"want one statement, got {len(statements)}; run them one by one. A PIVOT counts as "
            "one where it names its values: PIVOT ... ON unit IN (1, 2)."
        )
    statement = statements[0]
    text = statement.query
    if statement.type == duckdb.StatementType.EXPLAIN:
        match = _EXPLAIN.match(text)
        text = text[match.end() :] if match else ""
    elif statement.type != duckdb.StatementType.SELECT:
        kind = statement.type.name.replace("_", " ")
        raise QueryError(
            f"{kind} is not allowed here: the store is open for reading. Write with "
            "store.append(...) or a writer; for a PRAGMA use its table function, such as "
            "pragma_table_info('hooks'); open with trusted=True to run any SQL."
        )
    if text not in _checked:
        _check_tree(con, text)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        if len(text) <= _LONGEST_CHECKED:
            _checked.add(text)
    return statement


_checked: set[str] = set()
"""Queries that passed. What a tree says follows from the text alone, and a program asks the same
queries again and again: the statistics of all units took 6.8 ms of processor time, and take 5.7."""
_MOST_CHECKED, _LONGEST_CHECKED = 1_000, 10_000


def _check_tree(con: duckdb.DuckDBPyConnection, text: str) -> None:
    # no parameter: at the first one DuckDB imports pandas, which takes half a second
    shown = quoted((text or "EXPLAIN").replace("\0", " "))
    ((serialized,),) = con.execute(f"SELECT json_serialize_sql({shown})").fetchall()
    try:
        tree = json.loads(serialized)
    except RecursionError:
        raise QueryError(
            "the query nests some hundred operators or functions in each other, such as a sum of "
            "as many terms; use a list, as in list_sum([...]), or several columns."
        ) from None
    if tree["error"]:
        raise QueryError(
            "only SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW and EXPLAIN of these run "
            "here; for a PRAGMA use its table function, such as pragma_table_info('hooks')."
        )
    for node in _nodes(tree):
        _check_node(node)


def with_literals(query: str, params: Mapping[str, Any]) -> str | None:
    """Return a query with its parameters written out, or None where that is not surely the same.

    At its first parameter DuckDB imports pandas, if it is there: half a second of processor time,
    which is more than most questions to a store take. Texts, numbers and lists of them are written
    out; for anything else, and where a name has no value, DuckDB binds, or says what is wrong.

    >>> with_literals("SELECT '$a', $a || $b", {"a": "it's", "b": 3})
    "SELECT '$a', 'it''s' || (3)"
    """
    literals = {name: _literal(value) for name, value in params.items()}
    if None in literals.values():
        return None
    text = query.encode()  # positions of tokens are those of bytes
    starts = [start for start, _ in duckdb.tokenize(query)]
    parts: list[bytes] = []
    used, at = set[str](), 0
    for i, start in enumerate(starts):
        if text[start : start + 1] != b"$" or text[start : start + 2] == b"$$":
            continue
        match = _PARAMETER.match(text, start)
        # a name that begins a tag, as in $tag$text$tag$, is no parameter
        if match is None or starts[i + 1 : i + 2] != [start + 1]:
            return None
        name = match.group(1).decode()
        if name not in literals:
            return None
        parts += [text[at:start], str(literals[name]).encode()]
        at = match.end()
        used.add(name)
    return b"".join([*parts, text[at:]]).decode() if used == literals.keys() else None


_PARAMETER = re.compile(rb"\$([A-Za-z_]\w*)(?![\w$])")
_MOST_ITEMS = 1_000
"""Longer lists take DuckDB's parser longer than a parameter takes."""


def _literal(value: Any) -> str | None:
    """Return a value in SQL, of the type that it has as a parameter; None where that is unsure."""
    if value is None:
        return "NULL"
    if isinstance(value, str) and type(value) is str and "\0" not in value:
        return quoted(value)
    if type(value) is bool:
        return str(value)
    if type(value) is int and -(2**63) < value < 2**63:
        return f"({value})"
    if type(value) is float and math.isfinite(value):
        return f"({value!r}::DOUBLE)"
    if type(value) is list and 0 < len(value) <= _MOST_ITEMS and None not in value:
        items = [_literal(item) for item in value if type(item) in (int, str)]
        if len(items) == len(value) and len(set(map(type, value))) == 1 and None not in items:
            return f"[{', '.join(map(str, items))}]"
    return None


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of a serialized query, however deep."""
    branches = [tree]
    while branches:
        branch = branches.pop()
        if isinstance(branch, dict):
            yield branch
            branches += branch.values()
        elif isinstance(branch, list):
            branches += branch


def _check_node(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if kind == "TABLE_FUNCTION":
        name = node["function"]["function_name"].lower()
        if name not in _TABLE_FUNCTIONS:
            raise QueryError(
                f"table function {name} is not allowed here; allowed: "
                f"{', '.join(sorted(_TABLE_FUNCTIONS))}. Open with trusted=True to run any SQL."
            )
        if name in _NAMED_TABLE:
            _check_names(_names_in_argument(name, _arguments(node["function"])))
        node["function"] = _arguments(node["function"])  # it makes rows and not one value
    elif kind == "FUNCTION" and node["function_name"].lower() in _SIZED_FUNCTIONS:
        _check_size(node)
    elif kind == "FUNCTION" and node["function_name"].lower() in _SCALAR_FUNCTIONS_REFUSED:
        raise QueryError(f"function {node['function_name'].lower()} is not allowed here.")
    elif kind in ("BASE_TABLE", "SHOW_REF"):
        path = node.get("qualified_name", {}).get("path", [])  # DuckDB 2, beside the three
        named = [node.get(part, "") for part in ("catalog_name", "schema_name", "table_name")]
        _check_names([*named, *path])


def _check_size(node: dict[str, Any]) -> None:
    for argument in _arguments(node):
        while argument.get("type") == "OPERATOR_CAST":
            argument = argument["child"]  # noqa: PLW2901
        size = _constant(argument)
        if isinstance(size, float) and size > _LARGEST_SIZE:
            name = node["function_name"].lower()
            raise QueryError(
                f"{name} of {size:,.0f} makes one value of that size, which no limit would end; "
                f"want at most {_LARGEST_SIZE:,}. As a table, FROM range(...) makes any number of "
                "rows."
            )


def _arguments(function: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a function is called with; DuckDB 2 holds it under names."""
    if "children" in function:
        return function["children"]
    return [argument["expression"] for argument in function["arguments"]]


def _constant(node: dict[str, Any]) -> str | float | None:
    """Return the text or number that a node is; None where it is computed."""
    if node.get("type") != "VALUE_CONSTANT":
        return None
    if "literal" in node:  # DuckDB 2
        kind, text = node["literal"]["kind"], node["literal"].get("text")
        return float(text) if kind in ("INTEGER", "NUMERIC") else text
    value = node["value"].get("value")
    if isinstance(value, dict):  # the halves of a number of 128 bits
        return float(value["upper"]) * 2.0**64 + float(value["lower"])
    return float(value) if isinstance(value, int | float) else value


def _names_in_argument(function: str, arguments: Sequence[dict[str, Any]]) -> list[str]:
    """Return the parts of the table name that a table function is given.

    Raises:
        QueryError: it is computed, or more than plain names with dots.
    """
    first = arguments[0] if arguments else {}
    if first.get("type") == "COLUMN_REF":
        return first["column_names"]
    text = _constant(first)
    if not isinstance(text, str) or not re.fullmatch(r"\w+(\.\w+)*", text):
        raise QueryError(
            f"table function {function} is not allowed here with a name that is not plain; write "
            f"the name of a table of the store, such as {function}('hooks', ...)."
        )
    return text.split(".")


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name.lower().startswith(_PRIVATE):
            raise QueryError(
                f"{name} is the catalogue's own database, which may hold more than the lake; open "
                "with trusted=True to read it."
            )
        if name.lower().startswith(_ATTACHED):
            raise QueryError(
                f"{name!r} is the file of the catalogue, whose views may do anything; the same "
                "tables are found without that name."
            )


# --- how long it runs ---------------------------------------------------------------------------


_SETTLE = 255
"""Byte that asks the watching thread to say when it has read all before; no signal's number."""


class _Watch:
    """A thread that interrupts queries on Ctrl-C and at their deadline.

    While DuckDB works, Python's own handler of Ctrl-C cannot run: the main thread is not in Python.
    The operating system's signal is therefore also written to a pipe, which this thread reads.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # a signal handler must not wait
        os.set_blocking(self._reader, False)
        self._active: dict[int, tuple[duckdb.DuckDBPyConnection, float, bool]] = {}
        self._next = 0
        self._wakes_at = float("inf")
        self._overdue: set[int] = set()
        self._settled = threading.Condition(self._guard)
        self._n_asked = self._n_settled = 0
        threading.Thread(target=self._run, name="activation_store queries", daemon=True).start()

    @contextmanager
    def over(self, con: duckdb.DuckDBPyConnection, seconds: float | None) -> Generator[None]:
        """Watch what `con` does within the block.

        Raises:
            QueryError: it took longer than `seconds`.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        by_signal = threading.current_thread() is threading.main_thread() and (
            # a program with a handler of its own decides itself what Ctrl-C means
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        with self._guard:
            self._next += 1
            number = self._next
            self._active[number] = (con, deadline, by_signal)
            is_early = deadline < self._wakes_at
        if is_early:
            os.write(self._writer, b"\0")
        before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False) if by_signal else -1
        try:
            yield
        except (duckdb.InterruptException, RuntimeError, KeyboardInterrupt) as fault:
            if isinstance(fault, RuntimeError) and "interrupted" not in str(fault).lower():
                raise
            # where Python's handler came first, DuckDB left the call but not the query, and whoever
            # lets go of the connection would wait for its end
            con.interrupt()
            if by_signal:
                self._settle()
            if isinstance(fault, KeyboardInterrupt):
                raise
            if number in self._overdue:
                raise QueryError(
                    f"the query took longer than {seconds:g} s and was stopped; narrow it, or open "
                    "the store with limits=QueryLimits(seconds=...)."
                ) from fault
            if by_signal:
                raise KeyboardInterrupt from fault
            raise QueryError("the query was interrupted.") from fault
        finally:
            if by_signal:
                signal.set_wakeup_fd(before)
            with self._guard:
                del self._active[number]
                self._overdue.discard(number)

    def _settle(self) -> None:
        """Wait until all signals so far are read, so that none of them ends a later query."""
        with self._settled:
            self._n_asked += 1
            asked = self._n_asked
            os.write(self._writer, bytes([_SETTLE]))
            # the thread answers at once; a pipe full of signals must not hang the program
            self._settled.wait_for(lambda: self._n_settled >= asked, timeout=1.0)

    def _run(self) -> None:
        while True:
            with self._guard:
                deadlines = [deadline for _, deadline, _ in self._active.values()]
                self._wakes_at = min(deadlines, default=float("inf"))
                wait = max(0.0, self._wakes_at - time.monotonic())
            # what is overdue is interrupted again and again: it may not have begun to run before
            # a wait without end is None to select, which refuses infinity
            ready, _, _ = select.select(
                [self._reader], [], [], None if wait > 1e9 else max(wait, 0.05)
            )
            signals = os.read(self._reader, 4096) if ready else b""
            self._interrupt(by_signal=signal.SIGINT in signals)
            if n_asked := signals.count(_SETTLE):
                with self._settled:
                    self._n_settled += n_asked
                    self._settled.notify_all()

    def _interrupt(self, by_signal: bool) -> None:
        # a method of its own, so that this thread keeps no connection in a variable while it waits
        with self._guard:
            now = time.monotonic()
            for number, (con, deadline, is_main) in self._active.items():
                if now >= deadline:
                    self._overdue.add(number)
                if now >= deadline or (by_signal and is_main):
                    con.interrupt()


_watch: _Watch | None = None
_watch_guard = threading.Lock()


def watched(con: duckdb.DuckDBPyConnection, seconds: float | None):  # noqa: ANN201
    """Return a context in which Ctrl-C and a limit of time stop `con`; see `_Watch.over`."""
    global _watch  # noqa: PLW0603
    with _watch_guard:
        if _watch is None:
            _watch = _Watch()
            os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
    return _watch.over(con, seconds)


def _forget() -> None:
    global _watch, _watch_guard  # noqa: PLW0603
    _watch, _watch_guard = None, threading.Lock()
