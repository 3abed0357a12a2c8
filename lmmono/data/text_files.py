"""Rows of local files: text, JSON lines and Parquet, plain or compressed, never read whole.

It refuses what it cannot read exactly: an unknown suffix, a broken line, bytes that are no UTF-8
and a truncated stream are errors that name the file and the place.
"""

import glob
import hashlib
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lmmono.errors import DataError, nearest

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
WANTED = f"want {', '.join(FORMATS)}, each plain or with {' or '.join(COMPRESSIONS)}"
PARQUET_ROWS = 256
"""Rows decoded at once: whole articles are tens of kB, so this stays in the tens of MB."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read."""

    path: Path
    """Where it lies."""
    name: str
    """What it is called in document names and digests: its path below the folder asked for."""
    format: str
    """One of `FORMATS`."""
    compression: str | None
    """`gzip`, `zstd`, or None."""

    def sha256(self) -> str:
        """Return the digest of the file's bytes as they lie.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error


def source_files(paths: Iterable[str]) -> list[SourceFile]:
    """Return the files of paths, folders and globs: sorted within each, every file once.

    A folder gives every readable file below it, hidden ones excepted.

    Raises:
        DataError: If a path is missing, a glob or folder holds nothing readable, or a file that
            is named has an unknown suffix.
    """
    files: dict[Path, SourceFile] = {}
    for pattern in paths:
        for file in _expand(pattern):
            files.setdefault(file.path.resolve(), file)
    return _named_apart(list(files.values()))


def _named_apart(files: list[SourceFile]) -> list[SourceFile]:
    """Return the files with as many parent folders in equal names as tell them apart.

    A document is found again by its file's name, so two files must not share one.
    """
    n_with = Counter(file.name for file in files)
    deepest = max((len(file.path.resolve().parts) for file in files), default=0)
    for n_parts in range(2, deepest + 1):
        if max(n_with.values(), default=1) == 1:
            break
        files = [
            replace(file, name="/".join(file.path.resolve().parts[-n_parts:]))
            if n_with[file.name] > 1
            else file
            for file in files
        ]
        n_with = Counter(file.name for file in files)
    return files


def read_rows(
    file: SourceFile, columns: Sequence[str] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each row of a `.jsonl` or `.parquet` file as its name and its values.

    Names are `file:line`, from 1, for JSON lines and `file:row`, from 0, for Parquet.

    Args:
        file: The file to read.
        columns: Columns that every row must have; None takes what there is.

    Raises:
        DataError: If the file or a line of it cannot be read, or a column is missing.
    """
    reader = _json_rows if file.format == ".jsonl" else _parquet_rows
    return reader(file, columns)


def read_paragraphs(file: SourceFile) -> Iterator[tuple[str, str]]:
    """Yield the paragraphs of a text file, split at blank lines, as `file:line` and text."""
    first, lines = 0, list[str]()
    for number, line in _lines(file):
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            yield f"{file.name}:{first}", "\n".join(lines)
            lines = []
    if lines:
        yield f"{file.name}:{first}", "\n".join(lines)


def row_count(file: SourceFile) -> int | None:
    """Return the number of rows where the file says it without being read, else None."""
    if file.format != ".parquet" or file.compression is not None:
        return None
    with _parquet(file) as parquet:
        return parquet.metadata.num_rows


def missing_column(where: str, wanted: str, columns: Sequence[str]) -> DataError:
    """Return the error for a column that is not there, with the way out."""
    return DataError(
        f"{where}: no column {wanted!r}; it has {', '.join(map(repr, columns)) or 'none'}; "
        f"{nearest(wanted, columns)}"
    )


def _expand(pattern: str) -> list[SourceFile]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [_source(path, path.name)]
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
        files = [_source(p, p.relative_to(path).as_posix()) for p in inside if _is_readable(p)]
        if not files:
            raise DataError(f"folder {path} holds no file to read: {WANTED}")
        return files
    if glob.has_magic(pattern):
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [_source(p, p.name) for p in paths if p.is_file()]
        if not files:
            raise DataError(f"no file matches {pattern!r} in {Path.cwd()}: mind the working folder")
        return files
    raise _missing(path)


def _missing(path: Path) -> DataError:
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    where = f"in {path.parent.absolute()}"
    return DataError(
        f"no file or folder {path.name!r} {where}; {nearest(path.name, siblings)}"
        if siblings
        else f"no file {path}: the folder {path.parent.absolute()} is missing or empty"
    )


def _is_hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _is_readable(path: Path) -> bool:
    return _suffixes(path)[0] in FORMATS


def _suffixes(path: Path) -> tuple[str, str | None]:
    name = path.name.lower()
    for suffix, compression in COMPRESSIONS.items():
        if name.endswith(suffix):
            return Path(name.removesuffix(suffix)).suffix, compression
    return Path(name).suffix, None


def _source(path: Path, name: str) -> SourceFile:
    suffix, compression = _suffixes(path)
    if suffix not in FORMATS:
        raise DataError(f"{path}: cannot read files that end in {path.suffix!r}: {WANTED}")
    return SourceFile(path, name, suffix, compression)


@contextmanager
def _bytes(file: SourceFile) -> Generator[BinaryIO]:
    """Open a file for reading its decompressed bytes; a broken stream is an error."""
    try:
        with pa.input_stream(str(file.path), compression=file.compression) as stream:
            yield cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{file.path}: cannot be read as {file.compression or 'a plain file'}: {error}; "
            "is it complete?"
        ) from error


def _lines(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield each line's number, from 1, and its text without the line end."""
    offset = 0
    with _bytes(file) as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise DataError(
                    f"{file.path}:{number}: byte {at} (0x{raw[error.start]:02X}) is no UTF-8; "
                    "convert the file to UTF-8"
                ) from error
            offset += len(raw)
            yield number, line.rstrip("\r\n")


def _json_rows(
    file: SourceFile, columns: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: no JSON at column {error.colno}: {error.msg}; want one object per line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: want a JSON object, got {type(row).__name__}")
        values = cast(dict[str, Any], row)
        for column in columns or ():
            if column not in values:
                raise missing_column(where, column, list(values))
        yield f"{file.name}:{number}", values


def _parquet_rows(
    file: SourceFile, columns: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with _parquet(file) as parquet:
        names = list(parquet.schema_arrow.names)
        for column in columns or ():
            if column not in names:
                raise missing_column(str(file.path), column, names)
        row = 0
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=columns):
            for values in _python_rows(file, row, batch):
                yield f"{file.name}:{row}", values
                row += 1


def _python_rows(file: SourceFile, first: int, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        last = first + batch.num_rows - 1
        raise DataError(
            f"{file.path}: rows {first} to {last} hold text that is no UTF-8: "
            f"byte 0x{error.object[error.start]:02X} at {error.start} of a value"
        ) from error


@contextmanager
def _parquet(file: SourceFile) -> Generator[pq.ParquetFile]:
    with tempfile.TemporaryFile() as unpacked:
        source: Any = file.path
        if file.compression is not None:  # Parquet is read from its end: no stream will do
            with _bytes(file) as stream:
                shutil.copyfileobj(stream, unpacked)
            source = unpacked
        try:
            with pq.ParquetFile(source) as parquet:
                yield parquet
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file.path}: no readable Parquet: {error}") from error
