"""Where a lake lies: its DuckLake catalogue, the folder or bucket of its data, and who may write.

A password and keys of a bucket are given to DuckDB as secrets in memory: they are not stored, and
no query, message or representation shows them.
"""

import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import duckdb

from activation_store.catalog import door
from activation_store.catalog.catalogue import locked
from activation_store.catalog.views import quoted
from activation_store.errors import LockedError, NotAStoreError, StoreError

PREFIX = "ducklake:"
"""How the address of a lake begins."""
TURN_WAIT_SECONDS = 600.0
"""How long a writer waits for its turn."""
LAKE = "lake_catalogue"
"""Name under which a connection has the lake attached."""

Kind = Literal["sqlite", "postgres", "duckdb"]

_EXTENSIONS = {"sqlite": "sqlite_scanner", "postgres": "postgres_scanner", "duckdb": None}
_PASSWORD = re.compile(r"\bpassword\s*=\s*('(?:\\.|[^'\\])*'|\S+)\s*", re.IGNORECASE)
_OTHER_SECRET = re.compile(r"\b(sslpassword|passwd)\s*=", re.IGNORECASE)
_ADVISORY = int.from_bytes(hashlib.sha256(b"activation_store lake").digest()[:7])
_LONGEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class LakePlace:
    """The address of one lake."""

    kind: Kind
    """What holds the catalogue: a SQLite file, a PostgreSQL database or a DuckDB file."""
    catalogue: str
    """Absolute path of the file, or the connection string without its password."""
    data_path: str
    """Absolute folder or s3:// prefix of the data, without a slash at the end."""
    password: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The address as people give it, without the password."""
        return PREFIX + self.metadata

    @property
    def metadata(self) -> str:
        """The catalogue as DuckLake names it."""
        return self.catalogue if self.kind == "duckdb" else f"{self.kind}:{self.catalogue}"

    @property
    def is_remote(self) -> bool:
        """Whether the data lies in a bucket."""
        return self.data_path.startswith("s3://")


def lake_place(address: str, data_path: str | os.PathLike[str] | None) -> LakePlace:
    """Return the place of a lake; touches neither catalogue nor data.

    Raises:
        StoreError: the address names no catalogue, or there is no data path.

    >>> lake_place("ducklake:sqlite:/tmp/c.sqlite", "s3://acts/pile/").data_path
    's3://acts/pile'
    >>> lake_place("ducklake:postgres:dbname=acts password=x host=db", "/data").name
    'ducklake:postgres:dbname=acts host=db'
    """
    if not data_path:
        shown = re.sub(r"(sslpassword|passwd)\s*=\s*\S+", r"\1=***", _without_password(address)[0])
        raise StoreError(
            f"{shown}: say where the data of the lake lies: "
            'open(..., data_path="/shared/acts") or data_path="s3://bucket/prefix"; on the command '
            "line --data-path."
        )
    rest = address.removeprefix(PREFIX)
    if not rest:
        raise StoreError(
            f"{address!r}: want ducklake:sqlite:FILE, ducklake:postgres:CONNECTION or "
            "ducklake:FILE.ducklake."
        )
    data = os.fspath(data_path)
    data = data.rstrip("/") if data.startswith("s3://") else str(Path(data).absolute())
    if rest.startswith(("postgres:", "postgresql://")):
        connection, password = _without_password(_as_pairs(rest.removeprefix("postgres:")))
        if (match := _OTHER_SECRET.search(connection)) is not None:
            raise StoreError(
                f"ducklake:postgres: {match[1]}=... would be shown to everyone who reads the lake; "
                "write password=..., or put the connection into ~/.pg_service.conf and give "
                "ducklake:postgres:service=NAME."
            )
        return LakePlace("postgres", connection.strip(), data, password)
    kind: Kind = "sqlite" if rest.startswith("sqlite:") else "duckdb"
    return LakePlace(kind, str(Path(rest.removeprefix("sqlite:")).absolute()), data)


def check_paths(place: LakePlace) -> None:
    """Refuse paths of this machine that DuckDB reads as patterns, since others read them too.

    Raises:
        StoreError: names the path.
    """
    for path in ([] if place.kind == "postgres" else [place.catalogue]) + (
        [] if place.is_remote else [place.data_path]
    ):
        if re.search(r"[?*\[\]{}]", path):
            raise StoreError(
                f"{path}: DuckDB reads this name as a pattern; use one without ?*[]{{}}."
            )


def _as_pairs(connection: str) -> str:
    """Return a connection URI as `key=value ...`, the form that goes with a secret of DuckDB.

    Raises:
        StoreError: it has a port that is none.

    >>> _as_pairs("postgresql://me:x%20y@db:5433/acts?sslmode=require")
    "host='db' port='5433' dbname='acts' user='me' password='x y' sslmode='require'"
    """
    if not re.match(r"(postgres|postgresql):?//", connection):
        return connection
    parts = urlsplit(connection)
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    # several servers stand as host:port,host:port; an IPv6 address stands in brackets
    pairs = [re.fullmatch(r"\[?([^\]]*?)\]?(?::(\d+))?", host) for host in hosts.split(",")]
    if not all(pairs):
        raise StoreError("ducklake:postgresql://...: want host or host:port behind the @.")
    values = {
        "host": ",".join(pair[1] for pair in pairs if pair),
        "port": ",".join(pair[2] or "5432" for pair in pairs if pair) if ":" in hosts else "",
        "dbname": unquote(parts.path.lstrip("/")),
        "user": unquote(user),
        "password": unquote(password),
        **dict(parse_qsl(parts.query)),
    }
    quoted_values = {
        key: value.replace("\\", "\\\\").replace("'", "\\'") for key, value in values.items()
    }
    return " ".join(f"{key}='{value}'" for key, value in quoted_values.items() if value)


def _without_password(connection: str) -> tuple[str, str | None]:
    """Split a connection string, `key=value ...` or a URI, into the rest and its password."""
    if "://" in connection and (secret := urlsplit(connection).password) is not None:
        return connection.replace(f":{secret}@", "@", 1), unquote(secret)
    if (match := _PASSWORD.search(connection)) is not None:
        value = match[1]
        if value.startswith("'"):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        return _PASSWORD.sub("", connection), value
    return connection, None


def attach_lake(
    place: LakePlace,
    *,
    read_only: bool,
    files: Iterable[Path] = (),
    limits: door.QueryLimits | None = None,
    is_shut: bool = True,
    must_exist: bool = False,
) -> duckdb.DuckDBPyConnection:
    """Return a connection in memory that has the lake attached as `LAKE`.

    A connection that may write makes an empty DuckLake where there is none.

    Args:
        place: the address of the lake.
        read_only: whether nothing can be written.
        files: what the connection may read besides the lake.
        limits: what a query may take.
        is_shut: False leaves DuckDB's access to files, settings and extensions as it is.
        must_exist: make no DuckLake where there is none.

    Raises:
        NotAStoreError: there is no lake, or its catalogue is something else.
        StoreError: the catalogue cannot be reached, the data path is another one, or the extra
            `lake` is not installed.
    """
    must_exist = must_exist or read_only
    own = [] if place.kind == "postgres" else [Path(place.catalogue)]
    if own and must_exist and not own[0].is_file():
        raise NotAStoreError(f"{place.name}: no lake there; create it with mode='w'.")
    con = _prepared(place)
    options = [f"DATA_PATH {quoted(place.data_path + '/tables')}"]
    options += ["READ_ONLY"] if read_only else []
    options += [f"CREATE_IF_NOT_EXISTS {not must_exist}"]
    if place.kind == "sqlite":
        # readers go on while a writer commits
        options += ["META_JOURNAL_MODE 'WAL'", "META_BUSY_TIMEOUT 10000"]
    if place.kind == "duckdb":
        options += [f"META_STORAGE_VERSION '{door.STORAGE_VERSION}'"]
    if place.kind == "postgres":
        options += ["META_SECRET 'lake_password'"]
    attach = f"ATTACH {quoted(PREFIX + place.metadata)} AS {LAKE} ({', '.join(options)})"
    try:
        # DuckDB attaches no PostgreSQL database once it is shut; DuckLake's own queries, which read
        # nothing but its tables there, are all that runs before
        if place.kind == "postgres":
            con.execute(attach)
        if is_shut:
            own = [file for path in own for file in door.database_files(path)]
            door.shut(con, [*own, *files], [f"{place.data_path}/"], limits)
        if place.kind != "postgres":
            con.execute(attach)
    except duckdb.Error as fault:
        con.close()
        raise _unreachable(place, fault) from fault
    return con


def _prepared(place: LakePlace) -> duckdb.DuckDBPyConnection:
    """Return a connection with the extensions and the secrets that the lake needs."""
    wanted = ["ducklake", _EXTENSIONS[place.kind], "httpfs" if place.is_remote else None]
    files = extension_files([name for name in wanted if name is not None])
    con = duckdb.connect(":memory:", config=door.SETTINGS)
    for file in files:
        con.execute(f"LOAD {quoted(str(file))}")
    con.execute("SET parquet_metadata_cache = true")
    if place.kind == "postgres":
        option = f", PASSWORD {quoted(place.password)}" if place.password is not None else ""
        con.execute(f"CREATE SECRET lake_password (TYPE postgres{option})")
    if place.is_remote:
        # shards never change, so what is known of a file stays true
        con.execute("SET enable_http_metadata_cache = true")
        con.execute(_bucket_secret(place))
    return con


def extension_files(names: Sequence[str]) -> list[Path]:
    """Return the files of DuckDB extensions as the packages of extra `lake` bring them.

    Raises:
        StoreError: a package is missing, or is for another version of DuckDB.
    """
    files: list[Path] = []
    for name in names:
        package = f"duckdb-extension-{name.replace('_', '-')}"
        spec = importlib.util.find_spec(f"duckdb_extension_{name}")
        if spec is None or not spec.submodule_search_locations:
            raise StoreError(
                f"a lake needs the package {package}, which is not installed; "
                "run: pip install 'lmmono[lake]'"
            )
        folder = Path(spec.submodule_search_locations[0]) / "extensions"
        file = folder / f"v{duckdb.__version__}" / f"{name}.duckdb_extension"
        if not file.is_file():
            versions = ", ".join(sorted(path.name for path in folder.glob("v*"))) or "none"
            raise StoreError(
                f"{package} is for DuckDB {versions}, installed is v{duckdb.__version__}; run: "
                f"pip install '{package}=={duckdb.__version__}'"
            )
        files.append(file)
    return files


@dataclass(frozen=True, slots=True)
class BucketAccess:
    """How a bucket is reached, taken from the AWS_* environment variables."""

    key: str | None
    secret: str | None = field(repr=False)
    token: str | None = field(repr=False)
    region: str
    endpoint: str | None
    """host:port of a server other than Amazon's."""
    use_ssl: bool


def bucket_access() -> BucketAccess:
    """Return what the environment says about reaching buckets."""
    env = os.environ
    address = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or ""
    return BucketAccess(
        key=env.get("AWS_ACCESS_KEY_ID"),
        secret=env.get("AWS_SECRET_ACCESS_KEY"),
        token=env.get("AWS_SESSION_TOKEN"),
        region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
        endpoint=urlsplit(address).netloc or None,
        use_ssl=not address.startswith("http://"),
    )


def _bucket_secret(place: LakePlace) -> str:
    access = bucket_access()
    facts = {
        "KEY_ID": access.key,
        "SECRET": access.secret,
        "SESSION_TOKEN": access.token,
        "REGION": access.region,
        "ENDPOINT": access.endpoint,
        "URL_STYLE": "path" if access.endpoint else None,
        "SCOPE": f"s3://{place.data_path.removeprefix('s3://').partition('/')[0]}",
    }
    options = [f"{name} {quoted(value)}" for name, value in facts.items() if value is not None]
    return f"CREATE SECRET lake_bucket (TYPE s3, USE_SSL {access.use_ssl}, {', '.join(options)})"


def redacted(place: LakePlace, fault: BaseException | str) -> str:
    """Return what DuckDB says on one line, without the password."""
    text = " ".join(str(fault).split())
    return text.replace(place.password, "***") if place.password else text


def _unreachable(place: LakePlace, fault: duckdb.Error) -> StoreError:
    text = redacted(place, fault)
    if "does not match existing data path" in text:
        return StoreError(
            f"{place.name}: its data lies elsewhere: {text.partition(' You can')[0]} Give the "
            "data_path with which the lake was created."
        )
    if "does not exist" in text and "explicitly disabled" in text:
        return NotAStoreError(f"{place.name}: no lake there; create it with mode='w'.")
    if "password" in text or "authentication" in text:
        return StoreError(
            f"{place.name}: the server refused the user or the password: {text}. Give the "
            "password in PGPASSWORD, in ~/.pgpass or in the connection string."
        )
    return StoreError(
        f"{place.name}: cannot open the catalogue: {text}. Check that its server or folder is "
        "there and that you may use it."
    )


@contextmanager
def turn(place: LakePlace, wait_seconds: float | None = None) -> Generator[None]:
    """Hold the right to write to the lake; a process that dies gives it back.

    Writers of all processes and machines take turns: by a file lock beside a SQLite or DuckDB
    catalogue, by an advisory lock in PostgreSQL.

    Raises:
        LockedError: others have been writing for `wait_seconds`, by default `TURN_WAIT_SECONDS`.
        StoreError: the catalogue's server cannot be reached.
    """
    wait = TURN_WAIT_SECONDS if wait_seconds is None else wait_seconds
    if place.kind != "postgres":
        with locked(Path(f"{place.catalogue}.lock"), wait):
            yield
        return
    with _prepared(place) as con:
        try:
            con.execute(
                f"ATTACH {quoted(place.catalogue)} AS turns (TYPE postgres, SECRET lake_password)"
            )
        except duckdb.Error as fault:
            raise _unreachable(place, fault) from fault
        _acquire(con, place, time.monotonic() + wait)
        yield


def _acquire(con: duckdb.DuckDBPyConnection, place: LakePlace, deadline: float) -> None:
    """Take the advisory lock; it is held until the connection is closed."""
    query = (
        f"SELECT * FROM postgres_query('turns', 'SELECT pg_try_advisory_xact_lock({_ADVISORY})')"
    )
    pause = 0.01
    while True:
        con.execute("BEGIN")
        row = con.execute(query).fetchone()
        if row is not None and row[0]:
            return
        con.execute("ROLLBACK")
        if time.monotonic() >= deadline:
            raise LockedError(
                f"{place.name}: other processes have been writing to this lake all the time; "
                "run again later. What you publish stays in your own store."
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
