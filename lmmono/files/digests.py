"""SHA-256 digests of files: what a damaged byte is found by."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the digest of every file below a folder by its relative path.

    Args:
        folder: Folder; links are not followed.
        leave_out: Relative paths without a digest, such as the index that the digests go into.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: file_digest(path) for name, path in names.items() if name not in leave_out}


def damaged_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return one fault for each file that is missing or has other bytes than its digest says."""
    faults: list[str] = []
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif file_digest(path) != digest:
            faults.append(f"{path}: other bytes than were written (sha256 differs)")
    return faults
