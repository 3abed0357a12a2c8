"""What a store brings into a lake, and what all stores of a lake add up to.

A store publishes by name of shard: what it published before is not taken again, so a publication
that was killed is simply repeated. Statistics and exemplars of a hook are merged from the state of
every store that captured it, in the order of the stores' ids, so they do not depend on who
published first.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from activation_store.catalog import catalogue, tables
from activation_store.catalog.catalogue import Place, Presence
from activation_store.catalog.compaction import write_tokens
from activation_store.errors import ContentError, ShardError
from activation_store.hooks import Rows, Skip, Vectors
from activation_store.shards.encoding import Target
from activation_store.shards.names import (
    Shard,
    listed,
    load_state,
    next_number,
    register,
    shard_name,
)
from activation_store.write import state
from activation_store.write.accumulator import new_seen
from activation_store.write.sequences import SequenceTable, from_ranges, shared, to_ranges
from activation_store.write.summary import RowsTotal, VectorsTotal, write_tables

_COPIED = (
    *("runs", "dictionaries", "neighbours", "promotes"),
    *("explanations", "all_scores", "robustness"),
    *("unit_lives", "unit_steps"),
)
_CAPTURE = "capture "
_TOKENS = "tokens"
_ATTEMPTS = 5  # at reading a store whose writer commits meanwhile

_COUNT_LISTED = """
UPDATE hooks SET n_acts = coalesce((
    SELECT sum(s.n_rows) FROM shards s
    WHERE s.hook = hooks.hook
        AND s.kind = CASE hooks.kind WHEN 'rows' THEN 'acts' ELSE 'vectors' END
), 0)
"""
"""Less than what was captured where a repair has dropped shards."""

Held = Mapping[str, np.ndarray]
Upload = Callable[[Path, Shard], int]


@dataclass(frozen=True, slots=True)
class Publication:
    """What one call of `publish` did."""

    store_id: str
    n_shards: int
    """Shards that were new to the lake."""
    n_bytes: int
    """Bytes that were copied; 0 for what an earlier attempt had copied."""


@dataclass(frozen=True, slots=True)
class Source:
    """A store as it was when its publication began."""

    presence: Presence
    """Keeps a compaction of the store from removing shards that it replaces."""
    where: Place
    store_id: str
    meta: dict[str, str]
    shards: tuple[Shard, ...]
    states: dict[str, bytes]
    """What table `writer_state` stands for, by key."""
    tables: dict[str, pa.Table]


class RankCapture(NamedTuple):
    """The state of one rank's capture, with the settings that decide whether it can be merged."""

    held: Held
    settings: Mapping[str, Any]


def read_source(where: Place) -> Source:
    """Read what a store has committed.

    Raises:
        StoreError: there is no store, or it cannot be read.
    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(ShardError):  # a writer removes its last state when it commits the next
            return _read_source(where)
    return _read_source(where)


def _read_source(where: Place) -> Source:
    presence = Presence([where.folder])
    with catalogue.opened(where) as con:
        meta = dict(con.execute("SELECT key, value FROM meta").fetchall())
        rows = con.execute("SELECT key, value FROM writer_state").fetchall()
        states = {key: load_state(bytes(value), where.folder) for key, value in rows}
        names = ("documents", "vocabulary", *_COPIED)
        contents = {name: con.execute(f"FROM {name}").to_arrow_table() for name in names}
        return Source(presence, where, meta["store_id"], meta, tuple(listed(con)), states, contents)


def take_in(con: duckdb.DuckDBPyConnection, source: Source, upload: Upload) -> Publication:
    """Bring the lake that `con` is in, within a transaction, to what the source has committed.

    Raises:
        ContentError: the source is of another model, corpus or settings, or holds sequences that
            another store has published for the same hook.
    """
    _check_pins(con, source)
    fresh = _fresh(con, source)
    states = dict(con.execute("SELECT key, value FROM writer_state").fetchall())
    ours = {f"{source.store_id} {key}": value for key, value in source.states.items()}
    shards = [shard for shard in fresh if shard.kind != "tokens"]
    shards += _tokens_once(con, source, fresh, upload)
    register(con, shards)
    _insert(
        con,
        "publications",
        pa.table(
            {
                "file": [shard.file for shard in fresh],
                "store_id": [source.store_id] * len(fresh),
                "n_rows": [shard.n_rows for shard in fresh],
            },
            schema=pa.schema({"file": pa.string(), "store_id": pa.string(), "n_rows": pa.int64()}),
        ),
    )
    if fresh or any(states.get(key) != value for key, value in ours.items()):
        _write_totals(con, source, _captures(states | ours))
        con.execute(_COUNT_LISTED)
    for key, value in ours.items():
        state.write(con, key, value)
    _add_corpus(con, source)
    for name in _COPIED:
        tables.replace(con, name, _different(con, name, source.tables[name]))
    return Publication(source.store_id, len(fresh), 0)


def _check_pins(con: duckdb.DuckDBPyConnection, source: Source) -> None:
    """Compare what a lake holds once with the source; the first source decides."""
    pinned = dict(con.execute("SELECT key, value FROM meta").fetchall())
    for name in ("model_digest", "n_ctx"):
        now = source.meta.get(name)
        if now is None:
            continue
        if pinned.setdefault(name, now) != now:
            raise ContentError(
                f"{source.where.file}: {name}: the lake holds {pinned[name]}, this store has {now};"
                " publish it to a lake of its own."
            )
        con.execute("DELETE FROM meta WHERE key = $1", [name])
        con.execute("INSERT INTO meta VALUES ($1, $2)", [name, now])


def _fresh(con: duckdb.DuckDBPyConnection, source: Source) -> list[Shard]:
    """Return the shards that the lake has not taken; forget those that the store compacted away."""
    query = "SELECT file FROM publications WHERE store_id = $1"
    taken = {file for (file,) in con.execute(query, [source.store_id]).fetchall()}
    gone = taken - {shard.file for shard in source.shards}
    if gone:
        kept = {shard.file for shard in listed(con)}
        if not taken <= kept:
            raise ContentError(
                f"{source.where.file}: its shards were rewritten after it was published, and the "
                "lake has them in another form too; what is new cannot be told from what the lake "
                "holds. RankCapture further sequences into a store of their own."
            )
        for table in ("shards", "publications"):
            con.execute(
                f"DELETE FROM {table} WHERE file IN (SELECT unnest($1::VARCHAR[]))", [sorted(taken)]
            )
        taken = set[str]()
    return [shard for shard in source.shards if shard.file not in taken]


def _insert(con: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    if rows.num_rows:
        con.register("rows_to_insert", rows)
        con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM rows_to_insert")
        con.unregister("rows_to_insert")


def _captures(states: Mapping[str, bytes]) -> list[RankCapture]:
    """Return the captures of all stores, by store and rank."""
    captures: list[RankCapture] = []
    for key in sorted(states):
        if key.partition(" ")[2].startswith(_CAPTURE):
            arrays = state.from_bytes(bytes(states[key]))
            captures.append(RankCapture(arrays, json.loads(str(arrays["settings"]))))
    return captures


def _write_totals(
    con: duckdb.DuckDBPyConnection, source: Source, captures: Sequence[RankCapture]
) -> None:
    """Replace the tables of every hook that the source captured by the totals over all stores."""
    ours = {
        name
        for key, value in source.states.items()
        if key.startswith(_CAPTURE)
        for name in json.loads(str(state.from_bytes(value)["settings"]))
        if name.startswith(("rows ", "vectors "))
    }
    stored = {
        f"{'rows' if shard.kind == 'acts' else 'vectors'} {shard.hook}"
        for shard in source.shards
        if shard.hook is not None
    }
    if missing := sorted(stored - ours):
        raise ContentError(
            f"{source.where.file}: no writer's state for {', '.join(missing)}, so its statistics "
            "cannot be merged with those of others; capture it with a writer of this package."
        )
    for name in sorted(ours):
        parts = [capture for capture in captures if name in capture.settings]
        seed = _agreed(source, name, parts)
        if name.startswith("rows "):
            write_tables(con, [_rows_total(name, parts, seed)], [], seed)
        else:
            write_tables(con, [], [_vectors_total(name, parts)], seed)


def _agreed(source: Source, name: str, parts: Sequence[RankCapture]) -> int:
    """Check that captures of one hook can be merged, and return their seed.

    Raises:
        ContentError: they have other settings, or a sequence was given to two of them.
    """
    first = parts[0].settings
    seen = to_ranges(np.zeros(0, np.int64))
    for part in parts:
        for setting in (name, "seed", "n_ctx", "skip"):
            if part.settings[setting] != first[setting]:
                raise ContentError(
                    f"{source.where.file}: {name}: {setting}: other stores of the lake have "
                    f"{first[setting]}, this one {part.settings[setting]}; capture with the same, "
                    "or publish to another lake."
                )
        both = shared(part.held["given"], seen)
        if len(both):
            n = int((both[:, 1] - both[:, 0] + 1).sum())
            raise ContentError(
                f"{source.where.file}: {name}: sequence {both[0, 0]} was published by another "
                f"store too ({n} in all); give each sequence to one store."
            )
        names = [from_ranges(seen), from_ranges(part.held["given"])]
        seen = to_ranges(np.sort(np.concatenate(names)))
    return int(first["seed"])


def _rows_total(name: str, parts: Sequence[RankCapture], seed: int) -> RowsTotal:
    settings = dict(parts[0].settings[name])
    units = settings.pop("units")
    rows = Rows(**settings, units=None if units is None else tuple(units))
    total = new_seen(rows, seed)
    n_tokens = n_acts = 0
    for part in parts:
        ours = {
            key.removeprefix(f"{name}:"): array
            for key, array in part.held.items()
            if key.startswith(f"{name}:")
        }
        seen = new_seen(rows, seed)
        state.arrays_to_seen(ours, seen)
        state.merge_seen(total, seen)
        counts = ours["counts"].tolist()
        n_tokens, n_acts = n_tokens + counts[0], n_acts + counts[1]
    return RowsTotal(rows, total, n_tokens, n_acts, _skip(parts[0]))


def _vectors_total(name: str, parts: Sequence[RankCapture]) -> VectorsTotal:
    odd = np.zeros(3, np.int64)
    counts = np.zeros(2, np.int64)
    for part in parts:
        place = [key for key in part.settings if key.startswith("vectors ")].index(name)
        odd += part.held["vectors.odd"][place]
        counts += part.held["vectors.counts"]
    n_tokens, n_vectors = counts.tolist()
    hook = Vectors(**parts[0].settings[name])
    return VectorsTotal(hook, n_tokens, n_vectors, odd, _skip(parts[0]))


def _skip(part: RankCapture) -> Skip:
    skip = part.settings["skip"]
    return Skip(tuple(skip["token_ids"]), skip["first"])


def _tokens_once(
    con: duckdb.DuckDBPyConnection, source: Source, fresh: Sequence[Shard], upload: Upload
) -> list[Shard]:
    """Return the shards of tokens to list: of sequences that no other store has published.

    Raises:
        ContentError: another store has published other tokens for the same sequence.
    """
    twice = _shared_sequences(con, source)
    written: list[Shard] = []
    for shard in fresh:
        if shard.kind != "tokens":
            continue
        if len(twice) == 0:
            written.append(shard)
            continue
        rows = pq.read_table(source.where.folder / shard.file)
        new = ~np.isin(rows.column("seq_id").to_numpy(), twice)
        if new.all():
            written.append(shard)
        elif new.any():
            number = next_number(con) + len(written)
            written.append(_written(con, rows.filter(pa.array(new)), number, upload))
    return written


def _shared_sequences(con: duckdb.DuckDBPyConnection, source: Source) -> np.ndarray:
    """Return the sequences whose tokens both this store and another one wrote."""
    stored = con.execute("SELECT key, value FROM writer_state").fetchall()
    others = [
        bytes(value)
        for key, value in stored
        if key.partition(" ")[2].startswith(_TOKENS) and not key.startswith(f"{source.store_id} ")
    ]
    ours = [value for key, value in source.states.items() if key.startswith(_TOKENS)]
    digests_there, here = _digests(others), _digests(ours)
    names, digests = here.items()
    theirs = digests_there.get(names)
    other = names[(theirs > 0) & (theirs != digests)]
    if len(other):
        raise ContentError(
            f"{source.where.file}: sequence {other[0]}: its tokens or documents differ from those "
            "in the lake; a lake holds one corpus. Publish to another lake."
        )
    return names[theirs > 0]


def _digests(states: Sequence[bytes]) -> SequenceTable:
    digests = SequenceTable()
    for value in states:
        arrays = state.from_bytes(value)
        digests.put(from_ranges(arrays["given"]), arrays["digest"])
    return digests


def _written(con: duckdb.DuckDBPyConnection, rows: pa.Table, number: int, upload: Upload) -> Shard:
    """Write tokens as a shard of the lake itself."""
    row = con.execute("SELECT value FROM meta WHERE key = 'store_id'").fetchone()
    assert row is not None
    split = rows.column("split").combine_chunks().dictionary_encode()
    rows = rows.set_column(rows.column_names.index("split"), "split", split)
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder), shard_name("tokens", row[0], number), "tokens", None)
        shard = write_tokens(target, rows)
        upload(Path(folder) / shard.file, shard)
    return shard


def _add_corpus(con: duckdb.DuckDBPyConnection, source: Source) -> None:
    """Add documents and vocabulary that the lake lacks.

    Raises:
        ContentError: the lake knows another text or string under the same number.
    """
    for table, key, same in (
        ("documents", "doc_id", "text_sha256"),
        ("vocabulary", "token_id", "token"),
    ):
        con.register("incoming", source.tables[table])
        twin = con.execute(
            f"SELECT t.{key} FROM {table} t JOIN incoming i USING ({key})"
            f" WHERE t.{same} IS DISTINCT FROM i.{same} LIMIT 1"
        ).fetchone()
        if twin is not None:
            con.unregister("incoming")
            raise ContentError(
                f"{source.where.file}: {table}: {key} {twin[0]} has another {same} in the lake; "
                "a lake holds one corpus. Publish to another lake."
            )
        missing = con.execute(
            f"FROM incoming i ANTI JOIN {table} t USING ({key}) ORDER BY {key}"
        ).to_arrow_table()
        con.unregister("incoming")
        _insert(con, table, missing)


def _different(con: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> pa.Table:
    """Return the rows that are not in the table already, to the letter."""
    if rows.num_rows == 0:
        return rows
    con.register("incoming", rows)
    try:
        return con.execute(f"FROM incoming EXCEPT FROM {table}").to_arrow_table()
    finally:
        con.unregister("incoming")
