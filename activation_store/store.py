"""An open store: what it holds, and SQL over it."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import duckdb

from activation_store import catalogue
from activation_store.errors import StoreError

if TYPE_CHECKING:
    from activation_store.writer import Rows, Vectors, Writer

Mode = Literal["r", "w", "a"]


def open(  # noqa: A001
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    trusted: bool = False,
    overwrite: bool = False,
) -> "Store":
    """Open the store at `path`, its folder or its `store.duckdb`.

    Args:
        path: where the store is.
        mode: "r" reads, "a" adds to an existing store, "w" creates one.
        trusted: lets SQL do whatever DuckDB can, such as read other files.
        overwrite: with "w", replaces a store that exists.

    Raises:
        NotAStoreError: nothing there, or no store.
    """
    where = catalogue.place(path)
    if mode == "w":
        catalogue.create(where, overwrite)
    return Store(where, mode, trusted)


class Store:
    """One open store; made by `activation_store.open`, closed by `close` or a `with` block."""

    def __init__(self, where: catalogue.Place, mode: Mode, trusted: bool) -> None:
        self.where = where
        self.mode = mode
        self.trusted = trusted
        self.meta = catalogue.read_meta(where)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; the store can be opened again at any time."""

    def sql(self, query: str, **params: Any) -> duckdb.DuckDBPyRelation:
        """Run a query; `$name` in it stands for the keyword argument of that name."""
        con = duckdb.connect(self.where.file, read_only=True)
        con.execute("SET file_search_path = $1", [str(self.where.file.parent)])
        return con.sql(query, params=params or None)

    def writer(
        self,
        *,
        rows: "Sequence[Rows]" = (),
        vectors: "Sequence[Vectors]" = (),
        n_ctx: int,
        seed: int = 0,
        commit_tokens: int = 1_000_000,
    ) -> "Writer":
        """Return a writer of activations; use it as a context manager."""
        from activation_store.writer import Writer

        if self.mode == "r":
            raise StoreError(f"{self.where.file}: open for reading; use mode='a' to add to it.")
        return Writer(
            self.where,
            rows=rows,
            vectors=vectors,
            n_ctx=n_ctx,
            seed=seed,
            commit_tokens=commit_tokens,
        )
