"""Checkpoints of an unfinished training: written whole or not at all, read without pickle.

A checkpoint is a folder with `weights.safetensors`, `optimizer.safetensors` and `state.json` (step,
data cursor, digests). It is written beside the old one and takes its place by a rename, so a crash
leaves the old or the new one. Restoring it gives the bits of a run that never stopped.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmmono.errors import TrainError
from lmmono.files.atomic import sync


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


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    """Write a checkpoint; a failure leaves the one before it in place."""
    fresh = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(_weights(model), fresh / "weights.safetensors")
    save_file(_moments(model, optimizer), fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(asdict(position)))
    for file in fresh.iterdir():
        sync(file)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, digest: str
) -> Position | None:
    """Restore model, optimizer and random numbers; return the position, or None without one.

    Raises:
        TrainError: the checkpoint is cut short, or belongs to another recipe.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # stopped between the two renames
        os.replace(old, folder)
    if not folder.exists():
        return None
    try:
        position = Position(**json.loads((folder / "state.json").read_text()))
        if position.digest != digest:
            raise TrainError(
                f"{folder}: was made by other settings of seed, data, model or train; "
                "restore them, or remove the folder to start again"
            )
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        _restore(model, optimizer, weights, moments)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TrainError(
            f"{folder}: cannot resume from this checkpoint ({error}); remove the folder to start "
            "again from step 0"
        ) from error
    return position


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint that a finished run no longer needs."""
    for name in (folder.name, folder.name + ".old", folder.name + ".tmp"):
        shutil.rmtree(folder.with_name(name), ignore_errors=True)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter once, by name (tied weights share one), and the buffers."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().contiguous() for name, tensor in named.items()}


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
    """Put tensors back where `_weights` and `_moments` took them from."""
    with torch.no_grad():
        for name, tensor in {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }.items():
            tensor.copy_(weights[name])
    for name, parameter in model.named_parameters():
        keys = [key for key in moments if key.rpartition("/")[0] == name]
        optimizer.state[parameter] = {
            key.rpartition("/")[2]: moments[key].to(parameter.device) for key in keys
        }
    torch.set_rng_state(moments["random/cpu"])
    if "random/cuda" in moments and torch.cuda.is_available():
        torch.cuda.set_rng_state(moments["random/cuda"])
