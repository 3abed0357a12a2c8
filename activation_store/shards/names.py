"""Parquet shards: their names, their rows in the catalogue, and what is left over after a kill."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow as pa

from activation_store.catalog.catalogue import Place
from activation_store.catalog.tables import replace

Kind = Literal["acts", "tokens", "vectors"]

# Integers are signed and 32 bit wide: Parquet stores narrower ones the same way, and DuckDB
# compares a bound parameter with a narrower or unsigned column only after a cast of the column,
# which keeps the filter from the row groups (100 M rows, one unit: 71 ms instead of 15 ms).
ACTS = pa.schema(
    {
        "hook": pa.dictionary(pa.int32(), pa.string()),
        "unit": pa.int32(),
        "seq_id": pa.int32(),
        "pos": pa.int32(),
        "act": pa.float32(),
    }
)
"""Columns of an acts shard: one hook; blocks of whole sequences, each by unit, seq_id, pos."""

TOKENS = pa.schema(
    {
        "seq_id": pa.int32(),
        "pos": pa.int32(),
        "doc_id": pa.int32(),
        "split": pa.dictionary(pa.int32(), pa.string()),
        "token_id": pa.int32(),
    }
)
"""Columns of a tokens shard, sorted by seq_id, pos."""

BLOCK_ACTS = 2_000_000
"""Acts of all hooks after which a block ends: what a query for one token's activations reads."""

ACTS_ROW_GROUP = 131_072
"""Rows per row group of an acts shard; a row group holds units of one block only."""

TOKENS_ROW_GROUP = 8_192
"""Rows per row group of a tokens shard: what one excerpt reads."""

_NAME = re.compile(
    r"((acts|tokens|vectors)-[0-9a-f]{12}-\d{6,}\.parquet|state-[0-9a-f]{12}-\d{6,}\.npz)(\.part)?"
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One row of table `shards`, in the order of its columns."""

    file: str
    """File name within the folder of shards."""
    kind: Kind
    hook: str | None
    """The one hook of the shard; None for tokens."""
    n_rows: int
    n_bytes: int
    checksum: str
    """sha256 of the file's bytes, hexadecimal."""
    unit_min: int | None
    unit_max: int | None
    seq_min: int | None
    seq_max: int | None


def shard_name(kind: Kind, store_id: str, number: int) -> str:
    """Return the file name of a shard; the store's id keeps names of two stores apart.

    >>> shard_name("acts", "0123456789ab", 12)
    'acts-0123456789ab-000012.parquet'
    """
    return f"{kind}-{store_id}-{number:06d}.parquet"


def next_number(con: duckdb.DuckDBPyConnection) -> int:
    """Return the smallest number above those of every listed shard."""
    ((number,),) = con.execute(
        "SELECT coalesce(max(CAST(regexp_extract(file, '-(\\d+)\\.parquet$', 1) AS BIGINT)), -1)"
        " + 1 FROM shards"
    ).fetchall()
    return int(number)


def register(con: duckdb.DuckDBPyConnection, shards: Iterable[Shard]) -> None:
    """List the shards in the catalogue that `con` has open for a commit."""
    replace(con, "shards", [asdict(shard) for shard in shards])


def listed(con: duckdb.DuckDBPyConnection) -> list[Shard]:
    """Return every shard that the catalogue lists, by kind, hook and name."""
    rows = con.execute(
        "SELECT file, kind, hook, n_rows, n_bytes, checksum, unit_min, unit_max, seq_min, seq_max"
        " FROM shards ORDER BY kind, hook, file"
    ).fetchall()
    return [Shard(*row) for row in rows]


def checksum(path: Path) -> str:
    """Return the sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unlisted(where: Place, names: set[str]) -> Iterator[Path]:
    """Yield files of shards and states in the folder whose names are not in `names`."""
    for path in sorted(where.folder.iterdir()):
        if _NAME.fullmatch(path.name) and path.name not in names:
            yield path


def sweep(where: Place, names: set[str]) -> int:
    """Remove unlisted shards and return how many; only for who holds the writer lock."""
    gone = list(unlisted(where, names))
    for path in gone:
        path.unlink()
    return len(gone)
