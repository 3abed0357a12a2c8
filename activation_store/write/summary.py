"""The tables that a capture keeps up to date: `hooks`, `unit_stats` and `exemplars`.

Each commit replaces the rows of the capture's hooks, so the tables always speak of exactly the
tokens that are committed.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from activation_store.hooks import Rows, Skip, Vectors
from activation_store.write.exemplars import (
    ChosenTokens,
    quantile_exemplars,
    random_exemplars,
    top_exemplars,
)
from activation_store.write.kernel import Seen
from activation_store.write.moments import RELATIVE_ERROR, quantiles, shape_of

QUANTILES = {
    "q01": 0.01,
    "q10": 0.1,
    "q25": 0.25,
    "q50": 0.5,
    "q75": 0.75,
    "q90": 0.9,
    "q99": 0.99,
    "q999": 0.999,
}
"""Columns of `unit_stats` and the quantiles they hold."""


@dataclass(frozen=True, slots=True)
class RowsTotal:
    """What all ranks have seen of a hook that is kept as rows."""

    rows: Rows
    seen: Seen
    n_tokens: int
    n_acts: int
    skip: Skip


@dataclass(frozen=True, slots=True)
class VectorsTotal:
    """What all ranks have seen of a hook that is kept whole."""

    hook: Vectors
    n_tokens: int
    n_vectors: int
    odd: Int64[np.ndarray, "3"]
    """NaN, infinite and overflowing activations."""
    skip: Skip


def write_tables(
    con: duckdb.DuckDBPyConnection,
    hooks: Sequence[RowsTotal],
    vectors: Sequence[VectorsTotal],
    seed: int,
) -> None:
    """Replace the rows of these hooks in the three tables."""
    with ThreadPoolExecutor(1) as ahead:  # the next hook's rows are made while one's are inserted
        jobs = [ahead.submit(_rows_of, hook) for hook in hooks[:1]]
        for i, hook in enumerate(hooks):
            stats, chosen = jobs.pop().result()
            # one ahead, not all: the rows of a model's layers are more than all else in a commit
            jobs += [ahead.submit(_rows_of, later) for later in hooks[i + 1 : i + 2]]
            _write_rows(con, hook, seed, stats, chosen)
    for whole in vectors:
        hook = whole.hook
        con.execute("DELETE FROM hooks WHERE hook = $1 AND kind = 'vectors'", [hook.hook])
        counts = dict(zip(("n_nan", "n_inf", "n_overflow"), whole.odd.tolist(), strict=True))
        facts = {"hook": hook.hook, "kind": "vectors", "d": hook.d, "dtype": hook.dtype}
        facts |= {"skip": _as_json(whole.skip)}
        seen = {"n_tokens": whole.n_tokens, "n_acts": whole.n_vectors}
        _insert_row(con, "hooks", {**facts, **seen, **counts})


def _rows_of(hook: RowsTotal) -> tuple[pa.Table, dict[str, pa.Table]]:
    return unit_stats(hook), exemplars(hook)


def _write_rows(
    con: duckdb.DuckDBPyConnection,
    hook: RowsTotal,
    seed: int,
    stats: pa.Table,
    chosen: dict[str, pa.Table],
) -> None:
    """Replace the rows of a hook that is kept as rows."""
    name = hook.rows.hook
    con.execute("DELETE FROM hooks WHERE hook = $1 AND kind = 'rows'", [name])
    con.execute("DELETE FROM unit_stats WHERE hook = $1", [name])
    con.execute("DELETE FROM exemplars WHERE hook = $1", [name])
    _insert_row(con, "hooks", _rows_facts(hook, seed))
    _insert(con, "unit_stats", stats, hook=name)
    for kind, rows in chosen.items():
        _insert(con, "exemplars", rows, hook=name, kind=kind)


def _insert(con: duckdb.DuckDBPyConnection, table: str, rows: pa.Table, **constants: str) -> None:
    """Insert rows, all of them with the columns `constants`."""
    assert table in ("unit_stats", "exemplars")
    con.register("rows_to_insert", rows)
    shared = ", ".join(f"${name} AS {name}" for name in constants)
    con.execute(f"INSERT INTO {table} BY NAME SELECT {shared}, * FROM rows_to_insert", constants)
    con.unregister("rows_to_insert")


def _insert_row(con: duckdb.DuckDBPyConnection, table: str, row: dict[str, object]) -> None:
    names = ", ".join(row)
    marks = ", ".join(["?"] * len(row))
    con.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))


def _rows_facts(hook: RowsTotal, seed: int) -> dict[str, object]:
    rows = hook.rows
    odd = hook.seen.odd.sum(axis=0).tolist()
    return {
        "hook": rows.hook,
        "kind": "rows",
        "d": rows.d,
        "units": None if rows.units is None else list(rows.units),
        "dtype": rows.dtype,
        "threshold": rows.threshold,
        "max_density": rows.max_density,
        "top_p": rows.top_p,
        "top_k": rows.top_k,
        "random_k": rows.random_k,
        "quantile_k": rows.quantile_k,
        "seed": seed,
        "n_tokens": hook.n_tokens,
        "n_acts": hook.n_acts,
        "n_nan": odd[0],
        "n_inf": odd[1],
        "n_overflow": odd[2],
        "quantile_error": RELATIVE_ERROR,
        "skip": _as_json(hook.skip),
    }


def _as_json(skip: Skip) -> str | None:
    return json.dumps(asdict(skip)) if skip else None


def unit_stats(hook: RowsTotal) -> pa.Table:
    """Return the rows of table `unit_stats` of one hook; NULL where a number is not defined."""
    moments = hook.seen.moments
    variance, skewness, kurtosis = shape_of(moments)
    cuts = hook.rows.cuts
    seen = moments.n > 0
    with np.errstate(invalid="ignore"):
        density = moments.active / moments.n
    numbers = {
        "density": density,
        "mean": np.where(seen, moments.mean, np.nan),
        "variance": variance,
        "skewness": skewness,
        "kurtosis": kurtosis,
        "min_act": np.where(seen, moments.low, np.nan).astype(np.float64),
        "max_act": np.where(seen, moments.high, np.nan).astype(np.float64),
    }
    levels = quantiles(hook.seen.sketch, moments.low, moments.high, tuple(QUANTILES.values()))
    numbers |= dict(zip(QUANTILES, levels.T, strict=True))
    return pa.table(
        {
            "unit": hook.rows.kept.astype(np.int32),
            "n_tokens": moments.n,
            "n_active": moments.active,
            "stored_from": pa.nulls(len(moments.n), pa.float64())
            if cuts is None
            else pa.array(cuts),
            **{name: pa.array(values, from_pandas=True) for name, values in numbers.items()},
        }
    )


def exemplars(hook: RowsTotal) -> dict[str, pa.Table]:
    """Return the rows of table `exemplars` of one hook, by kind."""
    chosen = {
        "top": top_exemplars(hook.seen.top, hook.rows.top_k),
        "random": random_exemplars(hook.seen.random),
        "quantile": quantile_exemplars(hook.seen.firing),
    }
    return {kind: _exemplar_rows(hook.rows.kept, rows) for kind, rows in chosen.items()}


def _exemplar_rows(units: np.ndarray, chosen: ChosenTokens) -> pa.Table:
    n = len(chosen.rank)
    return pa.table(
        {
            "unit": units[chosen.place].astype(np.int32),
            "rank": chosen.rank,
            "bin": pa.nulls(n, pa.int32()) if chosen.bin is None else pa.array(chosen.bin),
            "seq_id": chosen.seq.astype(np.int64),
            "pos": chosen.pos.astype(np.int32),
            "doc_id": chosen.doc,
            "act": chosen.act,
        }
    )
