"""Rows of local files: text, CSV, JSON, Parquet, plain or compressed; `.json` alone is read whole.

It refuses what it cannot read exactly: an unknown suffix, a broken line, bytes that are no UTF-8
and a truncated stream are errors that name the file and the place. Folders that `datasets` wrote
with `save_to_disk` are read by it.
"""

import csv
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
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lmmono.errors import DataError, nearest

FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
SAVED = "save_to_disk"
"""Format of a folder that `datasets` wrote."""
BESIDE = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Names of files that `datasets` puts beside the data."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
WANTED = f"want {', '.join(FORMATS)}, each plain or with {' or '.join(COMPRESSIONS)}"
GUESS_ROWS = 20
"""Rows that tell which column holds text: `datasets` and people put odd ones first."""
WRAPPED_CHARACTERS = 100
"""Mean length up to which lines may be prose that an editor wrapped, mostly at 72 or 80."""
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
    """One of `FORMATS`, or `SAVED`."""
    compression: str | None
    """`gzip`, `zstd`, or None."""

    def sha256(self) -> str:
        """Return the digest of the file's bytes as they lie.

        Raises:
            DataError: If it cannot be read.
        """
        try:
            if self.path.is_dir():
                parts = sorted(self.path.glob("*.arrow"))
                inside = [SourceFile(part, part.name, "", None).sha256() for part in parts]
                return hashlib.sha256(" ".join(inside).encode()).hexdigest()
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
    """Yield each row of a file that is no `.txt` as its name and its values.

    Names are `file:line`, from 1, for CSV and JSON lines and `file:row`, from 0, for the others.

    Args:
        file: The file to read.
        columns: Columns that every row must have; None takes what there is.

    Raises:
        DataError: If the file or a line of it cannot be read, or a column is missing.
    """
    return _READERS[file.format](file, columns)


def text_column(file: SourceFile, key: str) -> str:
    """Return the column of a file's texts: `text`, or else the only one that holds text.

    The first rows tell. Where several hold words parted by blanks, or none does and several hold
    strings, nothing is guessed.

    Args:
        file: A file with rows.
        key: The setting that names the column, for the error.

    Raises:
        DataError: There is not exactly one candidate; names the columns.
    """
    rows = (row for _, row in read_rows(file))
    first = list(islice(rows, 1))
    if first and "text" not in first[0]:
        first += islice(rows, GUESS_ROWS - 1)
    return guessed_column(first, str(file.path), key)


def guessed_column(first: Sequence[Mapping[str, Any]], where: str, key: str) -> str:
    """Return the column of text of some first rows; see `text_column`."""
    columns = list(dict.fromkeys(name for row in first for name in row))
    if not columns or "text" in columns:
        return "text"
    texts = {name: [row[name] for row in first if row.get(name)] for name in columns}
    strings = {
        name: [value for value in values if isinstance(value, str)]
        for name, values in texts.items()
        if any(isinstance(value, str) for value in values)
    }
    prose = [
        name
        for name, values in strings.items()
        if 2 * sum(" " in value.strip() for value in values) > len(values)
    ]
    # text of languages without blanks is told apart only where it is alone
    candidates = prose or list(strings)
    if len(candidates) == 1:
        return candidates[0]
    among = f"{len(candidates)} columns of text" if candidates else "no column of text"
    raise DataError(
        f"{where}: {among} among {', '.join(map(repr, columns))}; name the one to read as {key}"
    )


def text_split(files: Sequence[SourceFile], asked: str) -> tuple[str, str]:
    """Return how `.txt` files are split into documents, and a sentence that says so.

    `auto` takes blank lines where there are any, else one document per line where lines are few
    per file or long, and else one per file.

    Args:
        files: Files of any format.
        asked: `auto`, `file`, `line` or `blank_line`.
    """
    texts = [file for file in files if file.format == ".txt"]
    if not texts:
        return asked, ""
    n_lines = n_blocks = n_characters = 0
    for file in texts:
        is_inside = False
        for _, line in _lines(file):
            is_text = bool(line.strip())
            n_lines += is_text
            n_characters += len(line)
            n_blocks += is_text and not is_inside
            is_inside = is_text
    n_files = len(texts)
    counts = {"blank_line": n_blocks, "line": n_lines, "file": n_files}
    chosen = asked
    if asked == "auto":
        chosen = "file"
        if n_blocks > n_files:
            chosen = "blank_line"
        elif n_lines > n_files and n_characters > WRAPPED_CHARACTERS * n_lines:
            chosen = "line"
    others = ", ".join(f"{n:,} by {kind}" for kind, n in counts.items() if kind != chosen)
    files_are = f"{n_files:,} .txt file{'s are' if n_files > 1 else ' is'}"
    by = {"blank_line": "split at blank lines", "line": "split at lines", "file": "not split"}
    return chosen, (
        f"{files_are} {by[chosen]} (data.corpus.split: {asked}): {counts[chosen]:,} "
        f"document{'s' * (counts[chosen] > 1)}; {others}"
    )


def read_texts(file: SourceFile, split: str) -> Iterator[tuple[str, str]]:
    """Yield the documents of a text file as names and texts: whole, by line, or by blank line."""
    match split:
        case "file":
            text = "\n".join(line for _, line in _lines(file))
            yield file.name, text
        case "line":
            for number, line in _lines(file):
                if line.strip():
                    yield f"{file.name}:{number}", line
        case _:
            yield from read_paragraphs(file)


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
        if saved := saved_files(path):
            return saved
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        files = [
            _source(file, file.relative_to(path).as_posix())
            for file in inside
            if has_readable_suffix(file.name) and file.name not in BESIDE
        ]
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


def has_readable_suffix(name: str) -> bool:
    """Return whether a name ends as files do that can be read."""
    return _suffixes(Path(name))[0] in FORMATS


def saved_files(path: str | Path) -> list[SourceFile]:
    """Return the data sets of a folder that `save_to_disk` wrote: itself, or one per split."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        return [SourceFile(folder, folder.name, SAVED, None)]
    if not (folder / "dataset_dict.json").is_file():
        return []
    splits = sorted(path.parent for path in folder.glob("*/state.json"))
    return [SourceFile(path, f"{folder.name}/{path.name}", SAVED, None) for path in splits]


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


def _lines(file: SourceFile, *, bare: bool = True) -> Iterator[tuple[int, str]]:
    """Yield each line's number, from 1, and its text, `bare` without the line end."""
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
            yield number, line.rstrip("\r\n") if bare else line


def _csv_rows(
    file: SourceFile, columns: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    limit = csv.field_size_limit()
    try:
        yield from _delimited(file, columns)
    finally:
        csv.field_size_limit(limit)


def _delimited(
    file: SourceFile, columns: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the module's own is 128 KiB, less than a book

    def decoded() -> Iterator[str]:
        for number, line in _lines(file, bare=False):
            if "\0" in line:
                raise DataError(
                    f"{file.path}:{number}: a NUL character; want a text file, saved as UTF-8"
                )
            yield line

    lines = decoded()
    head = next(lines, "")
    comma = "\t" if file.format == ".tsv" else ","
    if comma == "," and "," not in head and ";" in head:  # where a comma is the decimal point
        comma = ";"
    reader = csv.reader(chain([head], lines), delimiter=comma, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(
                f"{file.path}:1: column {twice!r} stands twice; want names of their own"
            )
        for column in columns or ():
            if column not in names:
                raise missing_column(str(file.path), column, names)
        line = reader.line_num + 1
        for row in reader:
            if row:  # a blank line is no row
                if len(row) != len(names):
                    raise DataError(
                        f"{file.path}:{line}: want {len(names)} columns, got {len(row)}"
                    )
                yield f"{file.name}:{line}", dict(zip(names, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file.path}:{reader.line_num}: no readable CSV: {error}") from error


_ODD_JSON: dict[type[Exception], str] = {
    RecursionError: "nested too deeply",
    ValueError: "a number of more digits than Python reads",
}
"""What Python's reader of JSON raises beside its own error, in words."""


def _whole_json_rows(
    file: SourceFile, columns: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the objects of a list, alone or as the only list of an object, or of JSON lines."""
    text = "".join(line for _, line in _lines(file, bare=False))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # many call JSON lines .json
            yield from _json_rows(file, columns)
            return
        raise DataError(f"{file.path}:{error.lineno}: no JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{file.path}: no JSON: {_ODD_JSON[type(error)]}") from error
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    rows: Any = lists[0] if len(lists) == 1 else value
    if not isinstance(rows, list):
        raise DataError(f"{file.path}: want a list of objects, got {type(value).__name__}")
    for i, row in enumerate(cast(list[Any], rows)):
        if not isinstance(row, dict):
            raise DataError(f"{file.path}: item {i}: want an object, got {type(row).__name__}")
        values = cast(dict[str, Any], row)
        for column in columns or ():
            if column not in values:
                raise missing_column(f"{file.path}: item {i}", column, list(values))
        yield f"{file.name}:{i}", values


def _saved_rows(
    file: SourceFile, columns: Sequence[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_from_disk(file.path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: no readable data set: {error}; save it again") from error
    names = list(rows.column_names)
    for column in columns or ():
        if column not in names:
            raise missing_column(str(file.path), column, names)
    for i, row in enumerate(rows.select_columns(list(columns)) if columns else rows):
        yield f"{file.name}:{i}", cast(Mapping[str, Any], row)


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
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: no JSON: {_ODD_JSON[type(error)]}") from error
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


_READERS = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".json": _whole_json_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
    SAVED: _saved_rows,
}
