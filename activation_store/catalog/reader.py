"""The connection that answers queries: in memory, over one store or several, locked by default.

Each store is attached read-only and stands behind a catalogue in memory with the same tables, views
and macros; the views name the shards by absolute paths, so queries work from any folder, from any
thread and after another store is attached.
"""

import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import duckdb

from activation_store.catalog import migrations
from activation_store.catalog.catalogue import Place
from activation_store.catalog.views import create_views, quoted
from activation_store.errors import NotAStoreError, ShardError, StoreError, damaged_shard

_RESERVED = {"memory", "main", "temp", "system", "copied", "lake"}
"""Names of databases that a connection has, or makes."""
_FILE = re.compile(r"[\w.-]+\.parquet")


def connect(places: Mapping[str, Place], trusted: bool) -> duckdb.DuckDBPyConnection:
    """Return a connection over the stores at `places`.

    Args:
        places: name to store; the store named "" is found without a name.
        trusted: leave DuckDB's access to files, settings and extensions as it is.

    Raises:
        NotAStoreError: a catalogue cannot be read.
        ShardError: a shard is missing or has another size than the catalogue says.
        SchemaError: a store was written under a newer schema.
    """
    con = duckdb.connect(":memory:", config=_settings(trusted))
    try:
        con.execute("SET GLOBAL parquet_metadata_cache = true")
        shards = [path for name, place in places.items() for path in attach(con, name, place)]
        if not trusted:
            lock(con, shards)
    except BaseException:
        con.close()
        raise
    return con


def _settings(trusted: bool) -> dict[str, str | bool | int | float | list[str]]:
    if trusted:
        return {}
    return {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "allow_persistent_secrets": False,
        "python_enable_replacements": False,
    }


def check_name(path: str | os.PathLike[str], name: str, taken: Iterable[str]) -> None:
    """Refuse to attach what cannot be, or under a name that cannot be.

    Raises:
        StoreError: `path` is a lake, or the name is taken or reserved.
    """
    if os.fspath(path).startswith("ducklake:"):
        raise StoreError(
            f"cannot attach the lake {name}: only stores can be attached. Open the lake itself and "
            "attach the stores to it; two lakes join where all stores are published to one."
        )
    refused = _RESERVED | set(taken)
    if not name.isidentifier() or name in refused:
        raise StoreError(
            f"cannot attach {path} as {name!r}: want a new name of letters, digits and _, and "
            f"none of {', '.join(sorted(refused))}."
        )


def attach(con: duckdb.DuckDBPyConnection, name: str, place: Place) -> list[Path]:
    """Attach one store under `name` and return the paths of its shards."""
    hidden = f'"{name}_catalogue"'
    at = ""
    if name:
        con.execute(f"ATTACH ':memory:' AS {identifier(name)}")
        at = f"{identifier(name)}."
    migrations.attach(con, place, hidden)
    try:
        for table in migrations.expected_tables():
            con.execute(f"CREATE VIEW {at}{table} AS SELECT * FROM {hidden}.{table}")
        paths = checked_shards(con, place, f"{hidden}.")
    except duckdb.Error as fault:
        raise NotAStoreError(f"{place.file}: damaged: {str(fault).splitlines()[0]}") from fault
    try:
        create_views(con, place.folder, at, f"{hidden}.")
    except duckdb.Error as fault:
        raise damaged_shard(fault, place.file) from fault
    return paths


def checked_shards(con: duckdb.DuckDBPyConnection, place: Place, source: str = "") -> list[Path]:
    """Return the paths of the listed shards after a look at their sizes.

    Raises:
        ShardError: one is missing, shorter or longer than listed; names up to three.
        NotAStoreError: the catalogue lists something that cannot be a shard's name.
    """
    rows = con.execute(f"SELECT file, n_bytes FROM {source}shards ORDER BY file").fetchall()
    faults: list[str] = []
    for file, n_bytes in rows:
        if not _FILE.fullmatch(file):
            raise NotAStoreError(f"{place.file}: lists {file!r}, which is no name of a shard.")
        if (fault := size_fault(place.folder / file, n_bytes)) is not None:
            faults.append(fault)
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ShardError(
            f"{place.folder}: {'; '.join(faults[:3])}{more}. Bring the files back, or run "
            f"`lmmono store verify --repair {place.file}`, which drops only what is lost and says "
            "what."
        )
    return [place.folder / file for file, _ in rows]


def size_fault(path: Path, n_bytes: int) -> str | None:
    """Return what a look at the size of a shard finds wrong, or None."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    return None if found == n_bytes else f"{path.name} has {found} bytes, want {n_bytes}"


def identifier(name: str) -> str:
    """Return `name` as an SQL identifier.

    >>> identifier('gpt"2')
    '"gpt""2"'
    """
    return '"' + name.replace('"', '""') + '"'


def lock(
    con: duckdb.DuckDBPyConnection, shards: Sequence[Path], folders: Sequence[str] = ()
) -> None:
    """Leave the connection able to use these files, and to do nothing else to the machine."""
    listing = ", ".join(quoted(str(path)) for path in shards)
    below = ", ".join(quoted(folder) for folder in folders)
    # DuckDB makes this folder when a query outgrows the memory, and removes it at the end
    spill = Path(tempfile.gettempdir()) / f"activation_store-{secrets.token_hex(8)}"
    for statement in (
        f"SET temp_directory = {quoted(str(spill))}",
        f"SET allowed_paths = [{listing}]",
        f"SET allowed_directories = [{below}]",
        "SET enable_external_access = false",
        "SET lock_configuration = true",
    ):
        con.execute(statement)
