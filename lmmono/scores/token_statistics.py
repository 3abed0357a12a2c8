"""Scores that need no explanation: how much a unit's activation says about the token it is on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import t as student_t

import activation_store as astore
from lmmono.registry.metrics import METRICS
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.stats.formulas import entropies

N_GROUPS = 10
"""Groups of documents for the interval: a jackknife that leaves one group out at a time."""

ROWS_AT_ONCE = 8_000_000
"""Activations held in memory together, about 0.3 GB with what is made of them."""

MAX_UNITS_AT_ONCE = 64


def token_selectivity(job: ScoreJob) -> list[Row]:
    """Return the rows of `score_token_selectivity` for a job; it has no settings and no seed."""
    units = None if job.units is None else set(job.units)
    rows = _token_selectivity(job.store, job.hook).to_pylist()
    return [
        row
        for row in rows
        if (units is None or row["unit"] in units) and (job.controls or row["control"] is None)
    ]


def score_token_selectivity(store: astore.Store, hook: str) -> None:
    """Score every unit of a hook by how few kinds of token carry its activation.

    The value is 1 - H(token | act) / H(token): the entropy of the token under the unit's activation
    mass, against its entropy over all captured tokens. 0 says the token does not matter, 1 says one
    token carries all. It rises by chance for units that fire rarely, so each unit also gets the
    control `shuffled`: its activations on the tokens of another row, at the same positions.

    Rows go to table `scores`: value, 95 % interval (jackknife over ten groups of documents), n the
    number of activations, with and without the control. A silent unit has no value and a reason.

    Raises:
        StoreError: the store is not open for writing.
    """
    store.append("scores", _token_selectivity(store, hook))


def _token_selectivity(store: astore.Store, hook: str) -> pa.Table:
    tokens = _Tokens.read(store)
    query = "SELECT unit, n_active FROM unit_stats WHERE hook = $hook ORDER BY unit"
    known = _columns(store, query, hook=hook)
    values = np.full((2, len(known["unit"]), N_GROUPS + 1), np.nan)
    for first, last in _chunks(known["n_active"]):
        low, high = int(known["unit"][first]), int(known["unit"][last - 1])
        mass = _mass(store, hook, low, high, tokens)
        rows = known["unit"][first:last] - low
        values[:, first:last] = _selectivities(mass[:, rows], tokens.counts)
    tables = [
        _table(hook, known, of_control, control, tokens.ids.size)
        for of_control, control in zip(values, (None, "shuffled"), strict=True)
    ]
    return pa.concat_tables(tables)


def _columns(store: astore.Store, query: str, **params: Any) -> dict[str, ndarray]:
    """Return a query's columns as arrays; integer columns have no missing values here."""
    table = store.sql(query, **params).to_arrow_table()
    return {name: table[name].to_numpy() for name in table.column_names}


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The captured tokens as arrays, to look up what an activation was on."""

    seq_ids: Int[ndarray, " rows"]
    ids: Int[ndarray, "rows n_ctx"]
    parts: Int[ndarray, "rows n_ctx"]
    """Group of the token's document."""
    counts: Float[ndarray, "parts d_vocab"]
    """How often each token occurs in each group."""

    @classmethod
    def read(cls, store: astore.Store) -> "_Tokens":
        """Read all tokens of a store."""
        query = "SELECT seq_id, pos, doc_id, token_id FROM tokens ORDER BY seq_id, pos"
        columns = _columns(store, query)
        seq_ids, rows = np.unique(columns["seq_id"], return_inverse=True)
        shape = (len(seq_ids), int(columns["pos"].max()) + 1)
        ids, parts = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        ids[rows, columns["pos"]] = columns["token_id"]
        parts[rows, columns["pos"]] = columns["doc_id"] % N_GROUPS
        counts = np.zeros((N_GROUPS, int(ids.max()) + 1))
        np.add.at(counts, (columns["doc_id"] % N_GROUPS, columns["token_id"]), 1.0)
        return cls(seq_ids, ids, parts, counts)


def _chunks(n_active: Int[ndarray, " units"]) -> Iterator[tuple[int, int]]:
    """Yield [first, last) ranges of units that together fit in memory; at least one unit each."""
    first, held = 0, 0
    for i, n in enumerate(n_active):
        if i > first and (held + n > ROWS_AT_ONCE or i - first == MAX_UNITS_AT_ONCE):
            yield first, i
            first, held = i, 0
        held += n
    if first < len(n_active):
        yield first, len(n_active)


def _mass(
    store: astore.Store, hook: str, low: int, high: int, tokens: _Tokens
) -> Float[ndarray, "2 units parts d_vocab"]:
    """Return the activation mass of units low..high per group and token, true and shuffled."""
    query = """SELECT unit, seq_id, pos, act FROM acts
        WHERE hook = $hook AND unit BETWEEN $low AND $high AND act > 0"""
    columns = _columns(store, query, hook=hook, low=low, high=high)
    row = np.searchsorted(tokens.seq_ids, columns["seq_id"])
    pos, n_parts, d_vocab = columns["pos"], *tokens.counts.shape
    shape = (high - low + 1, n_parts, d_vocab)
    start = (columns["unit"].astype(np.int64) - low) * n_parts + tokens.parts[row, pos]
    other = (row + len(tokens.seq_ids) // 2) % len(tokens.seq_ids)
    return np.stack(
        [
            np.bincount(
                start * d_vocab + tokens.ids[there, pos], columns["act"], int(np.prod(shape))
            ).reshape(shape)
            for there in (row, other)
        ]
    )


def _selectivities(
    mass: Float[ndarray, "2 units parts d_vocab"], counts: Float[ndarray, "parts d_vocab"]
) -> Float[ndarray, "2 units parts_plus_one"]:
    """Return the value over all documents, then without each group of them."""
    total, all_tokens = mass.sum(axis=2), counts.sum(axis=0)
    columns = [1 - entropies(total) / entropies(all_tokens)]
    for part in range(len(counts)):
        rest = np.maximum(total - mass[:, :, part], 0.0)
        columns.append(1 - entropies(rest) / entropies(all_tokens - counts[part]))
    return np.stack(columns, axis=2)


def _jackknife_interval(
    values: Float[ndarray, "units parts_plus_one"],
) -> tuple[Float[ndarray, " units"], Float[ndarray, " units"]]:
    """Return the 95 % interval of each unit from its delete-a-group values (Student's t).

    It ends at 1, above which no value can be.
    """
    left_out = values[:, 1:]
    n = left_out.shape[1]
    spread = left_out - left_out.mean(axis=1, keepdims=True)
    half = student_t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * np.square(spread).sum(axis=1))
    return values[:, 0] - half, np.minimum(values[:, 0] + half, 1.0)


def _table(
    hook: str,
    known: dict[str, ndarray],
    values: Float[ndarray, "units parts_plus_one"],
    control: str | None,
    n_tokens: int,
) -> pa.Table:
    """Return one row of `scores` per unit."""
    metric, n = METRICS["token_selectivity"], len(values)
    low, high = _jackknife_interval(values)
    silent = np.isnan(values[:, 0])
    fixed = {
        "metric": metric.name,
        "metric_version": metric.version,
        "hook": hook,
        "ci_level": 0.95,
        "ci_method": f"jackknife over {N_GROUPS} groups of documents",
        "n_tokens": n_tokens,
    }
    columns = {name: pa.repeat(value, n) for name, value in fixed.items()}
    numbers = {"value": values[:, 0], "ci_low": low, "ci_high": high}
    columns |= {name: pa.array(each, from_pandas=True) for name, each in numbers.items()}
    columns["unit"] = pa.array(known["unit"], pa.int32())
    columns["n"] = pa.array(known["n_active"], pa.int64())
    columns["n_failures"] = pa.array(silent.astype(np.int64))
    columns["failure"] = pa.array(["silent" if each else None for each in silent], pa.string())
    columns["control"] = pa.array([control] * n, pa.string())
    return pa.table(columns)
