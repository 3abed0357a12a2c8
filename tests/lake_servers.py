"""A PostgreSQL server and one that speaks S3, on loopback, for as long as a test needs them."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

PASSWORD = "sesame's open"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def postgres_programs() -> Path | None:
    """Folder with initdb, pg_ctl and psql; None where PostgreSQL is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    folders += [Path(found).parent] if found else []
    return next((f for f in folders if (f / "initdb").exists() and (f / "psql").exists()), None)


@dataclass(frozen=True)
class Postgres:
    programs: Path
    port: int

    def address(self, database: str, password: str | None = PASSWORD, port: int = 0) -> str:
        quoted = "" if password is None else " password='" + password.replace("'", r"\'") + "'"
        return (
            f"ducklake:postgres:dbname={database} host=127.0.0.1 port={port or self.port}"
            f" user=lake{quoted}"
        )

    def sql(self, statement: str, database: str = "postgres") -> str:
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "lake", "-d", database]
        done = subprocess.run(
            [self.programs / "psql", *where, "-qAt", "-c", statement],
            env={**os.environ, "PGPASSWORD": PASSWORD},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout


@contextmanager
def postgres(programs: Path) -> Iterator[Postgres]:
    """Start a server of its own; initdb refuses root, so root hands over to another user."""
    root = os.geteuid() == 0
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = next(name for name in ("postgres", "nobody") if name in names) if root else None
    as_user = {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid}
    folder = Path(tempfile.mkdtemp(prefix="lake-postgres-", dir="/tmp"))
    secret, port = folder / "password", free_port()
    secret.write_text(PASSWORD)
    if user is not None:
        for path in (folder, secret):
            shutil.chown(path, user)

    def run(program: str, *arguments: str) -> None:
        # the server inherits the output of pg_ctl, so a pipe would never end
        with (folder / "out").open("ab") as out:
            subprocess.run(
                [programs / program, *arguments],
                cwd=folder,
                stdout=out,
                stderr=out,
                check=True,
                extra_groups=[] if root else None,
                **as_user,
            )

    try:
        with_password = ["-A", "scram-sha-256", "--pwfile", str(secret)]
        run("initdb", "-D", "data", "-U", "lake", "-E", "UTF8", "--no-sync", *with_password)
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run("pg_ctl", "-D", "data", "-w", "-o", f"{settings} -c fsync=off", "start")
        try:
            yield Postgres(programs, port)
        finally:
            run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def why_no_s3() -> str | None:
    missing = [n for n in ("moto", "flask", "flask_cors") if importlib.util.find_spec(n) is None]
    return f"needs {', '.join(missing)}, from extra dev" if missing else None


@contextmanager
def s3() -> Iterator[str]:
    """Start a server with a bucket named acts and yield its address."""
    port = free_port()
    with tempfile.TemporaryFile() as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=out,
        )
        try:
            _wait_for(port, server)
            bucket(f"http://127.0.0.1:{port}").create_dir("acts")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def bucket(address: str) -> pafs.S3FileSystem:
    return pafs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        region="us-east-1",
        scheme="http",
        endpoint_override=address.removeprefix("http://"),
        allow_bucket_creation=True,
    )


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server that speaks S3 ended at once"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server that speaks S3 did not start within a minute")
