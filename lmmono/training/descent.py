"""Small networks trained by Adam: one loop, repeatable to the bit, resumable after a kill."""

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmmono.errors import TrainError
from lmmono.files.atomic import atomic_file


def minimise(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    folder: Path | None = None,
    key: str = "",
    checkpoint_every: int = 200,
) -> list[float]:
    """Train the weights of a module that want a gradient, and return the loss of every step.

    Everything random in `loss` is drawn from torch's global generator, which is as before at the
    end. With a folder the training is saved there every so many steps, goes on where it was after
    a kill, to the same bits, and leaves nothing behind when it is done.

    Args:
        module: What is trained; in training mode meanwhile, in evaluation mode afterwards.
        loss: Loss of a step, by the number of steps taken.
        steps: Number of steps.
        lr: Adam's learning rate.
        seed: Seed of the draws.
        folder: Where to save; None saves nothing.
        key: Says of which fit a save is; others in the folder are left alone.
        checkpoint_every: Steps between saves.

    Raises:
        TrainError: The loss is no number any more.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    name = hashlib.sha256(f"{key} {steps} {lr} {seed}".encode()).hexdigest()[:16]
    path = None if folder is None else folder / f"descent-{name}.pt"
    devices = list({p.device.index or 0 for p in weights if p.device.type == "cuda"})
    losses: list[float] = []
    module.train()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        if path is not None and path.is_file():
            saved = _read_state(path)
            module.load_state_dict(saved["module"])
            optimizer.load_state_dict(saved["optimizer"])
            losses = saved["losses"]
            torch.set_rng_state(saved["random"])
            for device, state in zip(devices, saved["random_cuda"], strict=True):
                torch.cuda.set_rng_state(state, device)
        for step in range(len(losses), steps):
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            if not losses[-1] < float("inf"):
                raise TrainError(
                    f"the loss is {losses[-1]} at step {step + 1}: want an lr below {lr:g}"
                )
            if path is not None and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                path.parent.mkdir(parents=True, exist_ok=True)
                state = {
                    "module": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                    "random": torch.get_rng_state(),
                    "random_cuda": [torch.cuda.get_rng_state(device) for device in devices],
                }
                _write_state(path, state)
    if path is not None:
        with suppress(FileNotFoundError):
            os.unlink(path)
    module.eval()
    return losses


def _write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a training behind its digest: torch reads a flipped bit without a word."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    with atomic_file(path) as partial:
        partial.write_bytes(hashlib.sha256(data).digest() + data)


def _read_state(path: Path) -> dict[str, Any]:
    """Return what `_write_state` wrote.

    Raises:
        TrainError: The file has other bytes.
    """
    content = path.read_bytes()
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        raise TrainError(
            f"{path}: damaged, so the fit cannot be resumed; remove the file to start it again"
        )
    return torch.load(io.BytesIO(data), weights_only=True)
