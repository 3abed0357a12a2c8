"""A folder for a small fitted network: what it is, and its weights."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmmono.errors import RobustnessError
from lmmono.files.atomic import atomic_folder
from lmmono.files.json_files import read_json


def save_fitted(folder: Path, about: dict[str, Any], network: nn.Module) -> Path:
    """Write a network with what it is, whole or not at all."""
    with atomic_folder(folder) as partial:
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        tensors = {name: w.detach().contiguous() for name, w in network.state_dict().items()}
        save_file(tensors, partial / "weights.safetensors")
    return folder


def load_fitted(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `save_fitted` wrote.

    Raises:
        RobustnessError: The folder holds nothing of it, or something damaged.
    """
    about = read_json(folder / "about.json", dict, RobustnessError)
    try:
        return about, load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as fault:
        raise RobustnessError(f"{folder}: no whole weights ({fault}); fit it again") from fault
