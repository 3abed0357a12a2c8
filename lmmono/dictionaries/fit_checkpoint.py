"""Checkpoints of an unfinished fit: one file, written whole or not at all, read without pickle.

`checkpoint.safetensors` holds weights, Adam's moments and firing counters as tensors, and the rest
(step, schedules, scaling, digest) as JSON in its header. Restoring it gives the bits of a fit that
never stopped.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmmono.errors import DictionaryError
from lmmono.files.atomic import disk_faults, sync

FILE = "checkpoint.safetensors"


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint; a failure leaves the one before it in place.

    Raises:
        RunError: The disk refuses.
    """
    fresh = folder / (FILE + ".tmp")
    with disk_faults(fresh):
        content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(content, fresh, metadata={"facts": json.dumps(facts)})
        sync(fresh)
        os.replace(fresh, folder / FILE)
        sync(folder)


def load_checkpoint(folder: Path, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and facts of the checkpoint in a folder, or None without one.

    Raises:
        DictionaryError: It is damaged, or belongs to other settings or vectors.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DictionaryError(
            f"{path}: cannot go on from this checkpoint ({error}); remove it to start again"
        ) from error
    if facts["digest"] != digest:
        raise DictionaryError(
            f"{path}: was made with other settings, another seed or other vectors; restore them, "
            "choose another folder, or remove the file to start again"
        )
    return tensors, facts


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint that a finished fit no longer needs."""
    for name in (FILE, FILE + ".tmp"):
        (folder / name).unlink(missing_ok=True)
