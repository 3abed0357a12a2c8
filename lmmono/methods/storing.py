"""A folder for a small fitted network: what it is, and its weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmmono.errors import RobustnessError
from lmmono.files.atomic import atomic_folder
from lmmono.files.digests import damaged_files, file_digest
from lmmono.files.json_files import read_json

_WEIGHTS = "weights.safetensors"

Fitted = TypeVar("Fitted")


def save_fitted(folder: Path, about: dict[str, Any], network: nn.Module) -> Path:
    """Write a network with what it is, whole or not at all."""
    with atomic_folder(folder) as partial:
        tensors = {name: w.detach().contiguous() for name, w in network.state_dict().items()}
        save_file(tensors, partial / _WEIGHTS)
        about = {**about, "sha256": file_digest(partial / _WEIGHTS)}
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    return folder


def load_fitted(
    folder: Path, build: Callable[[dict[str, Any], dict[str, Tensor]], Fitted]
) -> Fitted:
    """Return what `build` makes of what `save_fitted` wrote: what it is, and its weights.

    Raises:
        RobustnessError: The folder holds nothing of it, or something damaged.
    """
    about = read_json(folder / "about.json", dict, RobustnessError)
    if faults := damaged_files(folder, {_WEIGHTS: str(about.get("sha256"))}):
        raise RobustnessError(f"{faults[0]}; fit it again")
    try:
        return build(about, load_file(folder / _WEIGHTS))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as fault:
        raise RobustnessError(
            f"{folder}: damaged, or of another kind ({type(fault).__name__}: {fault}); fit it again"
        ) from fault
