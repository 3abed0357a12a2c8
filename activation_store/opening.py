"""One door to stores and lakes."""

import os
from typing import TYPE_CHECKING, TypeAlias, overload

from activation_store import store
from activation_store.catalog import verification
from activation_store.catalog.verification import Report
from activation_store.errors import StoreError
from activation_store.lake import lake_commit, lake_schema
from activation_store.lake.lake_files import LakeFiles
from activation_store.lake.lake_place import PREFIX, LakePlace, connect, lake_place, turn
from activation_store.lake.shared import Lake
from activation_store.store import Mode, Store

if TYPE_CHECKING:
    from activation_store.catalog.compaction import Compaction
    from activation_store.lake.lake_compaction import Compaction as LakeCompaction
else:  # for annotations only: these take numba to import
    Compaction = LakeCompaction = object

DataPath: TypeAlias = str | os.PathLike[str] | None
"""Folder or s3://bucket/prefix of a lake's data; a store has none."""


@overload
def open(
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    trusted: bool = False,
    overwrite: bool = False,
) -> Store: ...
@overload
def open(
    path: str, mode: Mode = "r", *, trusted: bool = False, data_path: str | os.PathLike[str]
) -> Lake: ...
@overload
def open(path: str, *, data_path: DataPath) -> Store | Lake: ...
def open(  # noqa: A001
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    trusted: bool = False,
    overwrite: bool = False,
    data_path: DataPath = None,
) -> Store | Lake:
    """Open the store at `path`, its folder or its `store.duckdb`; or a lake.

    Args:
        path: where the store is; a lake is "ducklake:sqlite:FILE", "ducklake:postgres:CONNECTION"
            or "ducklake:FILE".
        mode: "r" reads; "a" adds to an existing store, and brings it to today's schema; "w"
            creates one.
        trusted: let SQL do whatever DuckDB can, such as read other files. Without it SQL can only
            read this store.
        overwrite: with "w", replace a store that exists; not for a lake.
        data_path: folder or s3://bucket/prefix of a lake's data; a lake needs it, a store has none.

    Raises:
        NotAStoreError: nothing there, or no store.
        SchemaError: the store was written by a newer version of this package.
        ShardError: a file of the store is missing or has another size than it should.
        StoreError: with "w", there is a store already; a lake cannot be reached, or lies elsewhere.
        WriteError: the machine refused a write.
    """
    place = _lake_at(path, data_path)
    if place is None:
        return store.open(path, mode, trusted=trusted, overwrite=overwrite)
    if overwrite:
        raise StoreError(
            "a lake is not overwritten, for others use it; remove its catalogue and data yourself."
        )
    return _open_lake(place, mode, trusted)


def verify(
    path: str | os.PathLike[str], *, repair: bool = False, data_path: DataPath = None
) -> Report:
    """Check every byte of a store or a lake, also of one too damaged to be opened.

    Args:
        path: as for `open`.
        repair: drop what is lost; see `verification.verify` and `lake_repair.verify`.
        data_path: as for `open`.

    Raises:
        StoreError: as `open` does, or the machine refused the repair; nothing is changed.
    """
    place = _lake_at(path, data_path)
    if place is None:
        return verification.verify(path, repair=repair)
    from activation_store.lake.lake_repair import verify_lake

    return verify_lake(place, repair=repair)


def compact(
    path: str | os.PathLike[str], *, data_path: DataPath = None
) -> Compaction | LakeCompaction:
    """Merge the small shards of a store or a lake; the rows stay the same.

    Args:
        path: as for `open`.
        data_path: as for `open`.

    Raises:
        StoreError: as `open` does, or the machine refused; nothing is changed.
    """
    place = _lake_at(path, data_path)
    if place is None:
        from activation_store.catalog.compaction import compact

        return compact(path)
    with _open_lake(place, "a", trusted=False) as lake:
        return lake.compact()


def _lake_at(path: str | os.PathLike[str], data_path: DataPath) -> LakePlace | None:
    """Return the place of a lake, or None for the path of a store."""
    address = os.fspath(path)
    if address.startswith(PREFIX):
        return lake_place(address, data_path)
    if data_path is not None:
        raise StoreError(f"{address}: data_path is for a lake, whose address begins {PREFIX}")
    return None


def _open_lake(place: LakePlace, mode: Mode, trusted: bool) -> Lake:
    if mode not in ("r", "w", "a"):
        raise StoreError(f"mode: want 'r', 'w' or 'a', got {mode!r}.")
    LakeFiles(place).check(create=mode == "w")
    if mode == "w":
        with turn(place), connect(place, read_only=False) as con:
            lake_commit.run(con, place, lambda inside: lake_schema.create(inside, place))
    return Lake(place, mode, trusted)
