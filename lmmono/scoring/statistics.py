"""Scores that need no explanation: how much a unit's activation says about the token it is on."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import t as student_t

import activation_store as astore
from lmmono.metrics import METRICS, entropies

N_GROUPS = 10
"""Groups of documents for the interval: a jackknife that leaves one group out at a time."""

UNITS_AT_ONCE = 64

_ROWS = """WITH rows AS (
    SELECT seq_id, row_number() OVER (ORDER BY seq_id) - 1 AS i, count(*) OVER () AS n
    FROM (SELECT DISTINCT seq_id FROM tokens))"""

_MASS = f"""{_ROWS}
SELECT a.unit, a.doc_id % $n_groups AS part, t.token_id, sum(a.act) AS mass
FROM activations a
JOIN rows here ON here.seq_id = a.seq_id
JOIN rows there ON there.i = (here.i + $shift) % here.n
JOIN tokens t ON t.seq_id = there.seq_id AND t.pos = a.pos
WHERE a.hook = $hook AND a.act > 0
GROUP BY ALL ORDER BY ALL"""

_COUNTS = """SELECT doc_id % $n_groups AS part, token_id, count(*) AS n FROM tokens GROUP BY ALL"""


def score_token_selectivity(store: astore.Store, hook: str) -> None:
    """Score every unit of a hook by how few kinds of token carry its activation.

    The value is 1 - H(token | act) / H(token): the entropy of the token under the unit's activation
    mass, against its entropy over all captured tokens. 0 says the token does not matter, 1 says one
    token carries all. It rises by chance for units that fire rarely, so each unit also gets the
    control `shuffled`: its activations on the tokens of another row, at the same positions.

    Rows go to table `scores`: value, 95 % interval (jackknife over ten groups of documents), n the
    number of activations, with and without the control. Silent units have a NaN value and a reason.

    Raises:
        StoreError: the store is not open for writing.
    """
    n_tokens = store.sql("SELECT count(*) FROM tokens").fetchone()[0]
    half = store.sql("SELECT count(DISTINCT seq_id) // 2 FROM tokens").fetchone()[0]
    baseline = _token_counts(store)
    tables = [
        _score_rows(store, hook, baseline, shift, control, n_tokens)
        for control, shift in ((None, 0), ("shuffled", int(half)))
    ]
    store.append("scores", pa.concat_tables(tables))


def _token_counts(store: astore.Store) -> Float[ndarray, "parts d_vocab"]:
    """Return how often each token occurs in each group of documents."""
    columns = store.sql(_COUNTS, n_groups=N_GROUPS).fetchnumpy()
    counts = np.zeros((N_GROUPS, int(columns["token_id"].max()) + 1))
    counts[columns["part"], columns["token_id"]] = columns["n"]
    return counts


def _score_rows(
    store: astore.Store,
    hook: str,
    baseline: Float[ndarray, "parts d_vocab"],
    shift: int,
    control: str | None,
    n_tokens: int,
) -> pa.Table:
    """Return one row of `scores` per unit."""
    columns = store.sql(_MASS, hook=hook, shift=shift, n_groups=N_GROUPS).fetchnumpy()
    known = store.sql(
        "SELECT unit, n_active FROM unit_stats WHERE hook = $hook ORDER BY unit", hook=hook
    ).fetchnumpy()
    units = np.asarray(known["unit"])
    values = np.full((len(units), N_GROUPS + 1), np.nan)
    for first in range(0, len(units), UNITS_AT_ONCE):
        some = units[first : first + UNITS_AT_ONCE]
        low, high = np.searchsorted(columns["unit"], [some[0], some[-1] + 1])
        mass = np.zeros((len(some), *baseline.shape))
        place = np.searchsorted(some, columns["unit"][low:high])
        mass[place, columns["part"][low:high], columns["token_id"][low:high]] = columns["mass"][
            low:high
        ]
        values[first : first + len(some)] = _selectivities(mass, baseline)
    low_ends, high_ends = _jackknife_interval(values)
    silent = np.isnan(values[:, 0])
    metric = METRICS["token_selectivity"]
    n = len(units)
    return pa.table(
        {
            "metric": [metric.name] * n,
            "metric_version": pa.array([metric.version] * n, pa.int32()),
            "control": pa.array([control] * n, pa.string()),
            "hook": [hook] * n,
            "unit": pa.array(units, pa.int32()),
            "value": values[:, 0],
            "ci_low": low_ends,
            "ci_high": high_ends,
            "ci_level": [0.95] * n,
            "ci_method": [f"jackknife over {N_GROUPS} groups of documents"] * n,
            "n": pa.array(known["n_active"], pa.int64()),
            "n_tokens": pa.array([n_tokens] * n, pa.int64()),
            "n_failures": pa.array(silent.astype(np.int64)),
            "failure": pa.array(["silent" if s else None for s in silent], pa.string()),
        }
    )


def _selectivities(
    mass: Float[ndarray, "units parts d_vocab"], baseline: Float[ndarray, "parts d_vocab"]
) -> Float[ndarray, "units parts_plus_one"]:
    """Return the value over all documents, then without each group of them."""
    total, all_tokens = mass.sum(axis=1), baseline.sum(axis=0)
    columns = [1 - entropies(total) / entropies(all_tokens)]
    for part in range(mass.shape[1]):
        rest = np.maximum(total - mass[:, part], 0.0)
        columns.append(1 - entropies(rest) / entropies(all_tokens - baseline[part]))
    return np.stack(columns, axis=1)


def _jackknife_interval(
    values: Float[ndarray, "units parts_plus_one"],
) -> tuple[Float[ndarray, " units"], Float[ndarray, " units"]]:
    """Return the 95 % interval of each unit from its delete-a-group values (Student's t)."""
    left_out = values[:, 1:]
    n = left_out.shape[1]
    spread = left_out - left_out.mean(axis=1, keepdims=True)
    error = np.sqrt((n - 1) / n * np.square(spread).sum(axis=1))
    half = student_t.ppf(0.975, n - 1) * error
    return values[:, 0] - half, values[:, 0] + half
