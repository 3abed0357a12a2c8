"""What a writer must remember to go on after a commit, as bytes; see also `state_files`.

Also the merge of the states of several ranks: statistics, sketch and exemplars of disjoint tokens.
"""

import io
import json
from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np

from activation_store.write.exemplars import Draw, Top, merge_draw, merge_top
from activation_store.write.kernel import Seen
from activation_store.write.sketch import merge_sketch
from activation_store.write.statistics import Moments, merge_moments


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the arrays as the bytes of an `.npz` file; the same arrays give the same bytes."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **dict(arrays))
    return file.getvalue()


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays that `to_bytes` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def seen_to_arrays(seen: Seen) -> dict[str, np.ndarray]:
    """Return the state of a hook as named arrays; the sketch without its empty buckets."""
    # a part of the units at a time: the whole table is mostly memory that was never touched
    parts = [seen.sketch[i : i + 4096] for i in range(0, len(seen.sketch), 4096)]
    counts = np.concatenate([part[part != 0] for part in parts])
    narrow = counts.size == 0 or int(counts.max()) < 2**16
    arrays = {
        "odd": seen.odd,
        "sketch.filled": np.concatenate([np.packbits(part != 0, axis=1) for part in parts]),
        "sketch.counts": counts.astype(np.uint16) if narrow else counts,
    }
    for name in ("moments", "top", "random", "firing"):
        part = getattr(seen, name)
        arrays |= {f"{name}.{field}": getattr(part, field) for field in part._fields}
    return arrays


def arrays_to_seen(arrays: Mapping[str, np.ndarray], into: Seen) -> None:
    """Put the arrays of `seen_to_arrays` into a fresh state of the same settings."""
    n_buckets = into.sketch.shape[1]
    filled = np.unpackbits(arrays["sketch.filled"], axis=1, count=n_buckets).astype(bool)
    into.sketch[filled] = arrays["sketch.counts"]
    into.odd[:] = arrays["odd"]
    parts: dict[str, Moments | Top | Draw] = {
        "moments": into.moments,
        "top": into.top,
        "random": into.random,
        "firing": into.firing,
    }
    for name, part in parts.items():
        for field in part._fields:
            getattr(part, field)[...] = arrays[f"{name}.{field}"]


def merge_seen(into: Seen, other: Seen) -> None:
    """Take the state of other tokens of the same hook and settings into `into`."""
    merge_moments(into.moments, other.moments)
    merge_sketch(into.sketch, other.sketch)
    merge_top(into.top, other.top)
    merge_draw(into.random, other.random)
    merge_draw(into.firing, other.firing)
    np.add(into.odd, other.odd, out=into.odd)


def read(con: duckdb.DuckDBPyConnection, key: str) -> bytes | None:
    """Return what is stored under `key`, or None."""
    rows = con.execute("SELECT value FROM writer_state WHERE key = $1", [key]).fetchall()
    return bytes(rows[0][0]) if rows else None


def write(con: duckdb.DuckDBPyConnection, key: str, value: bytes) -> None:
    """Store `value` under `key` in place of what was there."""
    con.execute("DELETE FROM writer_state WHERE key = $1", [key])
    con.execute("INSERT INTO writer_state VALUES ($1, $2)", [key, value])


def settings_difference(stored: str, wanted: Mapping[str, Any]) -> list[str]:
    """Return, one line each, which settings differ from those stored as JSON."""
    before, now = json.loads(stored), json.loads(json.dumps(wanted))
    return [
        f"{name}: stored {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
