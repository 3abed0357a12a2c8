"""SHA-256 digests of files: what a damaged byte is found by."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder by its relative path; links are left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


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
