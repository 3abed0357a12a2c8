"""The large states of writers: each a file beside the shards, listed with size and sha256.

They are many times the size of the rest of the catalogue, which every commit copies. Table
`writer_state` holds the name of the file in place of the bytes; older stores hold the bytes.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from activation_store.catalog.reader import size_fault
from activation_store.errors import ShardError, writing


@dataclass(frozen=True, slots=True)
class StateFile:
    """Where a state lies."""

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
        found = hashlib.sha256((folder / self.file).read_bytes()).hexdigest()
        return None if found == self.checksum else "its bytes were changed"


def write(folder: Path, store_id: str, number: int, data: bytes) -> StateFile:
    """Bring a state to the disk; it does not exist for anyone before a commit lists it.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    name = f"state-{store_id}-{number:06d}.npz"
    part = folder / f"{name}.part"
    with writing(folder / name):
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / name)
    return StateFile(name, len(data), hashlib.sha256(data).hexdigest())


def parsed(value: bytes) -> StateFile | None:
    """Return the file that a value of `writer_state` names; None where it is the bytes."""
    return StateFile(**json.loads(value)) if value.startswith(b"{") else None


def load(value: bytes, folder: Path) -> bytes:
    """Return the bytes that a value of `writer_state` stands for.

    Raises:
        ShardError: the file is missing or damaged.
    """
    if (file := parsed(value)) is None:
        return value
    if (fault := file.fault(folder)) is not None:
        raise ShardError(
            f"{folder / file.file}: {fault}. It is what a capture goes on from; bring it back, or "
            "run `lmmono store verify --repair` on the store, which says what is lost."
        )
    return (folder / file.file).read_bytes()


def listed(con: duckdb.DuckDBPyConnection) -> dict[str, StateFile]:
    """Return the files that the catalogue lists, by key."""
    rows = con.execute(
        "SELECT key, value FROM writer_state WHERE octet_length(value) < 1000 ORDER BY key"
    ).fetchall()
    found = {key: parsed(bytes(value)) for key, value in rows}
    return {key: file for key, file in found.items() if file is not None}


def all_names(con: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the names of all shards and states that the catalogue lists."""
    shards = {name for (name,) in con.execute("SELECT file FROM shards").fetchall()}
    return shards | {file.file for file in listed(con).values()}
