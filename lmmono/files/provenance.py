"""Where a result comes from: commit, versions, machine, and the memory that a stage took."""

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "lmmono",
    "accelerate",
    "datasets",
    "duckdb",
    "numba",
    "numpy",
    "pyarrow",
    "sae-lens",
    "tokenizers",
    "torch",
    "transformer-lens",
    "transformers",
)
"""Distributions whose versions can change a result."""


def versions() -> dict[str, str]:
    """Return the version of Python and of every package in `PACKAGES` that is installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_commit(folder: Path | None = None) -> str | None:
    """Return the commit of the working folder, `-dirty` added if tracked files have changed.

    None where the folder is in no repository, or git is not installed.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def machine() -> dict[str, str | int]:
    """Return what kind of machine this is: system, processor cores, memory in bytes."""
    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def reset_peak_memory() -> None:
    """Start a new measurement for `peak_memory_bytes`, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of the process' whole life


def peak_memory_bytes() -> int:
    """Return the most memory this process had resident since `reset_peak_memory`.

    Linux: `VmHWM` of this process, children not counted. Elsewhere, or where the system refuses the
    reset: `ru_maxrss`, the peak of the process' whole life.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, else kB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _git(folder: Path | None, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
