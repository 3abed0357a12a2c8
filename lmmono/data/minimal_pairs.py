"""Pairs of sentences that differ in grammaticality only, in BLiMP's format (arXiv 1912.00582)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmmono.data.text_files import read_rows, source_files
from lmmono.errors import DataError

COLUMNS = (("sentence_good", "sentence_bad", "UID"), ("good", "bad", "uid"))
"""Names of the good sentence, the bad one and the group: BLiMP's own, and short ones."""


@dataclass(frozen=True, slots=True)
class MinimalPair:
    """A grammatical sentence and its ungrammatical twin."""

    good: str
    """The grammatical sentence."""
    bad: str
    """The ungrammatical one."""
    group: str
    """The paradigm, BLiMP's UID; the file's name where rows have none."""


def read_minimal_pairs(path: str | Path) -> list[MinimalPair]:
    """Return the pairs of a `.jsonl` or `.parquet` file, or of all such files of a folder.

    Rows need the columns `sentence_good` and `sentence_bad` (with `UID`), as BLiMP ships them,
    or `good` and `bad` (with `uid`).

    Raises:
        DataError: If a file or column is missing, a value is no text, or there is no pair.
    """
    pairs: list[MinimalPair] = []
    for file in source_files([str(path)]):
        if file.format == ".txt":
            raise DataError(f"{file.path}: minimal pairs come in .jsonl or .parquet")
        group = file.name.split(".")[0]
        pairs += [_pair(row, group, where) for where, row in read_rows(file)]
    if not pairs:
        raise DataError(f"{path}: no minimal pairs in it")
    return pairs


def _pair(row: Mapping[str, Any], group: str, where: str) -> MinimalPair:
    for good, bad, uid in COLUMNS:
        if good in row and bad in row:
            sentences = row[good], row[bad]
            if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
                raise DataError(f"{where}: want two sentences in {good!r} and {bad!r}")
            return MinimalPair(*sentences, group=str(row.get(uid, group)))
    raise DataError(
        f"{where}: want the columns {' and '.join(COLUMNS[0][:2])}, or "
        f"{' and '.join(COLUMNS[1][:2])}; got {', '.join(row) or 'none'}"
    )
