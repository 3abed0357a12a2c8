"""Whether a lake is whole: every shard is read, and what is lost can be dropped."""

from pathlib import Path

import duckdb

from activation_store.catalog.verification import Report, catalogue_faults, drop
from activation_store.errors import NotAStoreError
from activation_store.lake import lake_commit, lake_schema
from activation_store.lake.lake_files import LakeFiles
from activation_store.lake.lake_place import LAKE, LakePlace, connect, turn
from activation_store.shards.names import Shard, listed

Broken = dict[Shard, str]


def verify_lake(place: LakePlace, *, repair: bool = False) -> Report:
    """Check a lake that is not open, also one too damaged to be opened; see `verify`.

    Raises:
        NotAStoreError: there is no lake.
        SchemaError: it was written by a newer version of this package.
        StoreError: the catalogue or the data cannot be reached, or as `verify` does.
    """
    files = LakeFiles(place)
    files.check(create=False)
    with connect(place, read_only=not repair) as con:
        meta = lake_schema.read_meta(con, place)
        if meta is None:
            raise NotAStoreError(f"{place.name}: an empty DuckLake; create it with mode='w'.")
        lake_schema.check_version(place, meta)
        return verify(con, files, repair=repair)


def verify(con: duckdb.DuckDBPyConnection, files: LakeFiles, *, repair: bool) -> Report:
    """Check the catalogue of a lake and the bytes of every shard.

    Args:
        con: a connection that has the lake attached.
        files: of the lake.
        repair: take shards that are missing or damaged out of the catalogue, in one commit; what is
            left of a damaged file is renamed to `<file>.damaged`. A shard that is as its store
            wrote it comes back when that store is published again.

    Raises:
        LockedError: others were writing all the time; nothing is changed.
        WriteError: the machine or the server refused.
    """
    report, broken = _check(con, files)
    if not (repair and broken):
        return report
    with turn(files.place):
        dropped = lake_commit.run(con, files.place, lambda inside: _repair(inside, files, broken))
    again, _ = _check(con, files)
    return Report(again.path, report.n_shards, again.n_bytes, again.faults, dropped)


def _check(con: duckdb.DuckDBPyConnection, files: LakeFiles) -> tuple[Report, Broken]:
    con.execute(f"USE {LAKE}")
    shards = listed(con)
    faults = list(catalogue_faults(con))
    broken = {shard: fault for shard in shards if (fault := files.fault(shard)) is not None}
    faults += [f"{shard.file}: {fault}" for shard, fault in broken.items()]
    n_bytes = sum(shard.n_bytes for shard in shards if shard not in broken)
    return Report(Path(files.place.name), len(shards), n_bytes, tuple(faults)), broken


def _repair(con: duckdb.DuckDBPyConnection, files: LakeFiles, broken: Broken) -> tuple[str, ...]:
    dropped = tuple(
        f"{drop(con, shard, fault)}; {_way_back(con, shard)}" for shard, fault in broken.items()
    )
    for shard in broken:
        files.set_aside(shard.file)
    lake_schema.write_views(con, files)
    return dropped


def _way_back(con: duckdb.DuckDBPyConnection, shard: Shard) -> str:
    """Forget that the shard was published, so that it can be again, and say how."""
    row = con.execute("SELECT store_id FROM publications WHERE file = $1", [shard.file]).fetchone()
    con.execute("DELETE FROM publications WHERE file = $1", [shard.file])
    if row is None:
        return "made by the lake from several shards: publish all stores to a new lake"
    return f"publish store {row[0]} again to have it back"
