"""AdamW and its learning rate, as the paper's recipe has them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lmmono.recipe.sections import Train


def build_optimizer(
    model: nn.Module, settings: Train, more: Sequence[dict[str, Any]] = ()
) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and embeddings and leaves vectors alone (as nanoGPT).

    Args:
        model: What is trained.
        settings: How.
        more: Further groups of weights, those of objectives.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        *more,
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True
    )


def lr_at(step: int, settings: Train) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then a cosine.

    >>> s = Train(steps=110, warmup_steps=10, lr=1.0, min_lr_fraction=0.1)
    >>> [round(lr_at(k, s), 3) for k in (0, 9, 10, 60, 110)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.lr * settings.min_lr_fraction
    return floor + (settings.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate, times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
