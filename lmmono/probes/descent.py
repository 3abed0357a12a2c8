"""Linear probes learned by gradient descent on any loss, many at a time.

Steps are accelerated (Nesterov 1983) and start afresh where they go uphill (O'Donoghue and Candes
2015). Their length follows from the rows: a bound on the loss' curvature in the logits, times the
eigenvalues of the rows, so there is no learning rate to tune. `preconditioned` steps go to the
minimum fast; the others are those of plain descent, which learns the strong directions first, as
early stopping needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmmono.probes.basis import Basis

Objective = Callable[[Float[Tensor, "q c n"], int], Float[Tensor, "q n"]]
"""Losses of the rows of q probes from their logits and the number of steps taken; the gradient is
torch's."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Labels of probes that are trained together on the same rows."""

    y: Int64[Tensor, "q n"]
    """Given labels."""
    n_classes: int
    seeds: tuple[int, ...]
    """Seed of each probe."""
    noise: Float[Tensor, "q c c"] | None = None
    """Noise matrix of each probe, where one is known or estimated."""
    rates: tuple[float, ...] = ()
    """Share of wrong labels that each probe reckons with, where one is estimated."""


def descend(
    on: Basis,
    objective: Objective,
    start: Float[Tensor, "q c r1"],
    *,
    l2: Float[Tensor, "q"],
    bound: float,
    preconditioned: bool,
    keep: Sequence[int],
) -> Float[Tensor, "q steps c r1"]:
    """Return the weights after each of some numbers of steps.

    Args:
        on: Rows.
        objective: Loss of each row.
        start: First weights.
        l2: Penalty of each probe, to the sum of losses; the bias is free.
        bound: Largest curvature of a row's loss in its logits, 0.5 for cross entropy.
        preconditioned: Step by the curvature of each direction, not by the largest.
        keep: Numbers of steps, ascending; the last ends the descent.
    """
    penalty = l2[:, None, None].expand(-1, 1, len(on.squares)).clone()
    penalty[..., -1] = 0
    curvature = bound * on.squares + penalty
    rate = 1 / (curvature if preconditioned else curvature.amax(dim=-1, keepdim=True))
    at, ahead, age = start, start, start.new_zeros(len(start), 1, 1)
    kept: list[Tensor] = []
    for step in range(1, keep[-1] + 1):
        gradient = _gradient(on, objective, ahead, step - 1) + penalty * ahead
        after = ahead - rate * gradient
        moved = after - at
        uphill = (gradient * moved).sum(dim=(1, 2), keepdim=True) > 0
        age = torch.where(uphill, 0, age + 1)
        at, ahead = after, after + (age / (age + 3)) * moved
        if step in keep:
            kept.append(at)
    return torch.stack(kept, dim=1)


def _gradient(
    on: Basis, objective: Objective, weight: Float[Tensor, "q c r1"], step: int
) -> Float[Tensor, "q c r1"]:
    """Return the gradient of the summed losses."""
    q, c, r1 = weight.shape
    logits = (weight.reshape(q * c, r1) @ on.rows.T).view(q, c, -1).requires_grad_()
    with torch.enable_grad():
        (of_logits,) = torch.autograd.grad(objective(logits, step).sum(), logits)
    return (of_logits.view(q * c, -1) @ on.rows).view(q, c, r1)


def seeded_start(on: Basis, batch: Batch, scale: float) -> Float[Tensor, "q c r1"]:
    """Return normal weights of a standard deviation, each probe's from its own seed."""
    shape = (batch.n_classes, len(on.squares))
    drawn = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in batch.seeds
    ]
    return scale * torch.stack(drawn).to(on.rows.dtype)
