"""One door to stores and lakes."""

import os
from typing import overload

from activation_store import store
from activation_store.errors import StoreError
from activation_store.lake import Lake, open_lake
from activation_store.lake_place import PREFIX
from activation_store.store import Mode, Store


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
def open(  # noqa: A001
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    trusted: bool = False,
    overwrite: bool = False,
    data_path: str | os.PathLike[str] | None = None,
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
    address = os.fspath(path)
    if not address.startswith(PREFIX):
        if data_path is not None:
            raise StoreError(f"{address}: data_path is for a lake, whose address begins {PREFIX}")
        return store.open(path, mode, trusted=trusted, overwrite=overwrite)
    if overwrite:
        raise StoreError(
            "a lake is not overwritten, for others use it; remove its catalogue and data yourself."
        )
    return open_lake(address, mode, data_path=data_path, trusted=trusted)
