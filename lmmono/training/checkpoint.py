"""Checkpoints of an unfinished training: atomic, checked by digest, read without pickle.

A checkpoint is a folder with `weights.safetensors`, `optimizer.safetensors` and `state.json` (step,
data cursor, digests). A crash while it is written leaves the old one. Restoring it gives the bits
of a run that never stopped.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmmono.errors import TrainError
from lmmono.files.atomic import atomic_folder, recover_folder
from lmmono.files.digests import damaged_files, folder_digests
from lmmono.files.json_files import read_json


@dataclass(frozen=True, slots=True)
class Position:
    """Where a training stands."""

    step: int
    """Optimizer steps taken; also the cursor into the seeded order of batches."""
    digest: str
    """Digest of the recipe sections that made it."""
    smooth_loss: float | None
    """Smoothed training loss, nats per token; None before the first reading."""
    unread_losses: list[float]
    """Losses of the last steps, not logged yet."""
    unread_terms: list[list[float | None]] = field(default_factory=list[list[float | None]])
    """The columns of their objectives; None where a term was no part of a step."""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """What a loop keeps besides, as JSON."""


@dataclass(frozen=True, slots=True)
class StoredPosition:
    """What `state.json` holds."""

    position: Position
    """Where the training stands."""
    files: dict[str, str]
    """SHA-256 of the other files."""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    """Write a checkpoint; a failure leaves the one before it in place.

    Raises:
        RunError: The disk refuses.
    """
    with atomic_folder(folder) as fresh:
        save_weights(model, fresh / "weights.safetensors")
        save_file(_moments(model, optimizer), fresh / "optimizer.safetensors")
        state = {"position": asdict(position), "files": folder_digests(fresh)}
        (fresh / "state.json").write_text(json.dumps(state))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, digest: str
) -> Position | None:
    """Restore model, optimizer and random numbers; return the position, or None without one.

    Raises:
        TrainError: The checkpoint is damaged, or belongs to another recipe.
    """
    recover_folder(folder)
    if not folder.exists():
        return None
    way_out = "remove the folder to start again from step 0"
    state = read_json(folder / "state.json", StoredPosition, TrainError, way_out=way_out)
    files, position = state.files, state.position
    if position.digest != digest:
        raise TrainError(
            f"{folder}: was made by other settings of seed, data, model or train; "
            "restore them, or remove the folder to start again"
        )
    if faults := damaged_files(folder, files):
        raise _unusable(folder, "; ".join(faults))
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        _restore(model, optimizer, weights, moments)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unusable(folder, str(error)) from error
    return position


def _unusable(folder: Path, reason: str) -> TrainError:
    return TrainError(
        f"{folder}: cannot resume from this checkpoint ({reason}); remove the folder to start "
        "again from step 0"
    )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write every parameter once, by name (tied weights share one), and the buffers."""
    named = _tensors(model)
    save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put back what `save_weights` wrote.

    Raises:
        KeyError: A tensor is missing.
        RuntimeError: One is of another shape.
    """
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(weights[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `<parameter>/<moment>`, and the random number states."""
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
) -> None:
    """Put tensors back where `save_weights` and `_moments` took them from."""
    restore_weights(model, weights)
    for name, parameter in model.named_parameters():
        keys = [key for key in moments if key.rpartition("/")[0] == name]
        optimizer.state[parameter] = {
            key.rpartition("/")[2]: moments[key].to(parameter.device) for key in keys
        }
    torch.set_rng_state(moments["random/cpu"])
    if "random/cuda" in moments and torch.cuda.is_available():
        torch.cuda.set_rng_state(moments["random/cuda"])
