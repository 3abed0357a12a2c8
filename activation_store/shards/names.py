"""The files next to a catalogue: names of shards and states, their rows, and what is left over.

A file counts when the catalogue lists it. What a killed process left behind is listed nowhere and
is removed by who writes next.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa

from activation_store.catalog.catalogue import Place, size_fault
from activation_store.catalog.tables import replace
from activation_store.errors import ShardError, writing

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

SHARD_ROWS = 16_000_000
"""Rows after which a shard of acts ends, at the next block."""

NUMBERS_PER_RANK = 10**7
"""Files that one rank of a capture may number: rank r has the numbers from r times this on."""

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


def file_number(name: str) -> int:
    """Return the number in the name of a shard or state.

    >>> file_number("acts-0123456789ab-000012.parquet")
    12
    """
    return int(name.split(".")[0].rsplit("-", 1)[1])


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


@dataclass(frozen=True, slots=True)
class StateFile:
    """The state of a writer, a file next to the shards: what a capture is resumed from.

    A state is many times the size of the rest of the catalogue, which every commit copies, so table
    `writer_state` holds this record of it in place of the bytes.
    """

    file: str
    """File name within the folder of shards."""
    n_bytes: int
    checksum: str
    """sha256 of the file's bytes, hexadecimal."""

    def value(self) -> bytes:
        """Return what stands in table `writer_state`."""
        return json.dumps(asdict(self)).encode()

    def fault(self, folder: Path) -> str | None:
        """Read the file and return what is wrong with it, or None."""
        if (fault := size_fault(folder / self.file, self.n_bytes)) is not None:
            return fault.removeprefix(f"{self.file} ")
        is_same = checksum(folder / self.file) == self.checksum
        return None if is_same else "its bytes were changed"


def write_state(
    folder: Path, store_id: str, number: int, write: Callable[[io.BufferedIOBase], object]
) -> StateFile:
    """Bring a state to the disk; it does not exist for anyone before a commit lists it.

    Args:
        folder: Folder of the shards.
        store_id: Id of the store.
        number: Number of the file.
        write: Writes the state into the open file.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    name = f"state-{store_id}-{number:06d}.npz"
    part = folder / f"{name}.part"
    with writing(folder / name):
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        state = StateFile(name, part.stat().st_size, checksum(part))
        part.replace(folder / name)
    return state


def state_file(value: bytes) -> StateFile | None:
    """Return the file that a value of `writer_state` names; None where it is the bytes."""
    if not value.startswith(b"{"):
        return None
    try:
        fields: dict[str, Any] = json.loads(value)
        file = StateFile(**fields)
    except (ValueError, TypeError, RecursionError):
        return None  # other JSON is garbage, as whoever reads it as bytes will find
    is_sound = isinstance(fields["file"], str) and isinstance(fields["n_bytes"], int)
    return file if is_sound else None


def load_state(value: bytes, folder: Path) -> bytes:
    """Return the bytes that a value of `writer_state` stands for.

    Raises:
        ShardError: the file is missing or damaged.
    """
    if (file := state_file(value)) is None:
        return value
    if (fault := file.fault(folder)) is not None:
        raise ShardError(
            f"{folder / file.file}: {fault}. A capture is resumed from it; bring it back, or "
            "run `lmmono store verify --repair` on the store, which says what is lost."
        )
    return (folder / file.file).read_bytes()


def listed_states(con: duckdb.DuckDBPyConnection) -> dict[str, StateFile]:
    """Return the files of states that the catalogue lists, by key."""
    # a record of a file takes some 150 bytes; what is larger is a state in the catalogue itself
    rows = con.execute(
        "SELECT key, value FROM writer_state WHERE octet_length(value) < 1000 ORDER BY key"
    ).fetchall()
    files = {key: state_file(bytes(value)) for key, value in rows}
    return {key: file for key, file in files.items() if file is not None}


def listed_names(con: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the names of all shards and states that the catalogue lists."""
    shards = {name for (name,) in con.execute("SELECT file FROM shards").fetchall()}
    return shards | {file.file for file in listed_states(con).values()}
