"""What each learner of `lmmono.probes.gradient` minimises, and how it descends."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lmmono.probes import losses
from lmmono.probes.descent import Batch, Objective
from lmmono.probes.logistic import L2_PATH

L2_GRID = L2_PATH[:6]
"""Penalties that gradient learners try: the stronger ones of the logistic path."""

N_STEPS = 300
MIXED_DRAWS = 8
"""Partners of each row in mixup, drawn once."""
RAMP_STEPS = 100
"""Steps over which co-teaching comes to drop its full share of rows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a gradient learner learns."""

    objective: Callable[[Batch], Objective]
    """Makes the loss for a batch of probes."""
    bound: float = 0.5
    """Largest curvature of the loss in the logits; 0.5 for cross entropy (Bohning 1992)."""
    preconditioned: bool = True
    l2: tuple[float, ...] = L2_GRID
    keep: tuple[int, ...] = (N_STEPS,)
    """Numbers of steps after which the weights are candidates."""
    n_probes: int = 1
    """Probes per candidate, which start apart and are averaged at the end."""
    start: float = 0.0
    """Standard deviation of the first weights."""
    needs_noise: bool = False
    """Whether the noise matrix is needed: the given one, else one that is estimated."""
    needs_rate: bool = False
    """Whether the share of wrong labels is needed; it is estimated."""


def plain(
    loss: Callable[[Float[Tensor, "q c n"], Tensor], Tensor],
) -> Callable[[Batch], Objective]:
    """Return the objective of a loss of logits and labels alone."""
    return lambda batch: lambda logits, step: loss(logits, batch.y)  # noqa: ARG005


def forward(batch: Batch) -> Objective:
    """Return the loss corrected by the noise matrix."""
    assert batch.noise is not None
    noise = batch.noise
    return lambda logits, step: losses.forward_corrected(logits, batch.y, noise)  # noqa: ARG005


def early_learning(batch: Batch) -> Objective:
    """Return ELR, whose targets follow what the probe says from step to step."""
    targets: Tensor | None = None

    def objective(logits: Tensor, step: int) -> Tensor:
        nonlocal targets
        before = torch.zeros_like(logits) if targets is None or not step else targets
        targets = losses.early_targets(before, logits)
        return losses.early_regularised(logits, batch.y, targets)

    return objective


def mixup(batch: Batch) -> Objective:
    """Return mixup with uniform shares (Beta(1, 1)), a mean over `MIXED_DRAWS` fixed draws."""
    n, drawn = batch.y.shape[1], dict[int, tuple[Tensor, Tensor]]()
    for seed in batch.seeds:
        generator = torch.Generator().manual_seed(seed)
        partners = [torch.randperm(n, generator=generator) for _ in range(MIXED_DRAWS)]
        shares = torch.rand(MIXED_DRAWS, n, generator=generator, dtype=torch.float64)
        drawn[seed] = torch.stack(partners), shares
    partners = torch.stack([drawn[seed][0] for seed in batch.seeds], dim=1)
    shares = torch.stack([drawn[seed][1] for seed in batch.seeds], dim=1)

    def objective(logits: Tensor, step: int) -> Tensor:  # noqa: ARG001
        total = torch.zeros_like(logits[..., 0, :])
        for partner, share in zip(partners, shares.to(logits.dtype), strict=True):
            total = total + losses.mixed_cross_entropy(logits, batch.y, partner, share)
        return total / MIXED_DRAWS

    return objective


def co_teaching(batch: Batch) -> Objective:
    """Return the cross entropy of the rows that a probe's peer finds easiest. Han et al. 2018.

    The first half of the batch are the peers of the second. Each step a probe sees half of the
    rows, drawn from its seed, and of them drops min(step / `RAMP_STEPS`, 1) times the rate. Losses
    are scaled up to all rows, so that the penalty means the same throughout.
    """
    n = batch.y.shape[1]
    rates = torch.tensor(batch.rates, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]

    def objective(logits: Tensor, step: int) -> Tensor:
        of_rows = losses.cross_entropy(logits, batch.y)
        seen = torch.stack([torch.rand(n, generator=g) for g in generators]) < 0.5
        n_kept = seen.sum(dim=1) * (1 - min(step / RAMP_STEPS, 1) * rates)
        n_kept = n_kept.round().long().clamp_min(1)
        of_peer = of_rows.detach().roll(len(logits) // 2, dims=0)
        chosen = losses.small_loss_rows(of_peer.where(seen, torch.inf), n_kept)
        return of_rows * chosen * (n / n_kept[:, None]).to(of_rows.dtype)

    return objective


def _early_stops() -> tuple[int, ...]:
    """Return numbers of steps, each about a quarter more than the one before."""
    steps = [1]
    while steps[-1] < N_STEPS:
        steps.append(min(N_STEPS, max(steps[-1] + 1, round(steps[-1] * 1.25))))
    return tuple(steps)


_SYMMETRIC_BOUND = 0.5 * (losses.FIT - losses.REVERSE * losses.LOG_ZERO)

PLANS: dict[str, Plan] = {
    "label_smoothing": Plan(plain(losses.label_smoothing)),
    "gce": Plan(plain(losses.generalised_cross_entropy)),
    "sce": Plan(plain(losses.symmetric_cross_entropy), bound=_SYMMETRIC_BOUND),
    "forward": Plan(forward, needs_noise=True),
    "elr": Plan(early_learning, bound=0.5 * (1 + losses.EARLY), preconditioned=False),
    "mixup": Plan(mixup, bound=1.0),
    "early_stopping": Plan(
        plain(losses.cross_entropy), preconditioned=False, l2=(0.0,), keep=_early_stops()
    ),
    "co_teaching": Plan(
        co_teaching, bound=1.0, preconditioned=False, n_probes=2, start=0.01, needs_rate=True
    ),
}
"""Plans by the name of their learner."""
