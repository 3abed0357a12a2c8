"""Linear probes learned by gradient descent on any loss, many at a time.

Steps are accelerated (Nesterov 1983) and start afresh where they go uphill (O'Donoghue and Candes
2015). Their length follows from the rows: a bound on the loss' curvature in the logits, times the
eigenvalues of the rows, so there is no learning rate to tune. `preconditioned` steps go to the
minimum fast; the others are those of plain descent, which learns the strong directions first, as
early stopping needs. The penalty or the stopping time is chosen on validation labels, as noisy as
the training labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmmono.probes import losses
from lmmono.probes.cleaning import noise_matrices, noise_rates
from lmmono.probes.logistic import L2_PATH, Basis, basis, penalties
from lmmono.probes.problems import Probes, Problems, choose, empty_probes, same_rows

L2_GRID = L2_PATH[:6]
"""Penalties that gradient learners try: the stronger ones of the logistic path."""

N_STEPS = 300
"""Steps of a descent."""

MIXED_DRAWS = 8
"""Partners of each row in mixup, drawn once."""

RAMP_STEPS = 100
"""Steps over which co-teaching comes to drop its full share of rows."""

LOGITS_AT_ONCE = 1 << 21
"""Logits of probes that are trained together: about 8 MiB of each array."""


RowLosses = Callable[[Float[Tensor, "q c n"], int], Float[Tensor, "q n"]]
"""Losses of the rows of q probes from their logits and the number of steps taken; the gradient is
torch's."""


@dataclass(frozen=True, slots=True, eq=False)
class ProbeBatch:
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
    objective: RowLosses,
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
    penalty[..., -1] = 0  # the bias is free
    curvature = bound * on.squares + penalty
    rate = 1 / (curvature if preconditioned else curvature.amax(dim=-1, keepdim=True))
    q, c, r1 = start.shape
    at, ahead, age = start, start, start.new_zeros(q, 1, 1)
    snapshots: list[Tensor] = []
    for step in range(1, keep[-1] + 1):
        logits = (ahead.reshape(q * c, r1) @ on.rows.T).view(q, c, -1).requires_grad_()
        with torch.enable_grad():
            (of_logits,) = torch.autograd.grad(objective(logits, step - 1).sum(), logits)
        gradient = (of_logits.reshape(q * c, -1) @ on.rows).view(q, c, r1) + penalty * ahead
        after = ahead - rate * gradient
        moved = after - at
        # momentum that points uphill is dropped, each probe's for itself
        uphill = (gradient * moved).sum(dim=(1, 2), keepdim=True) > 0
        age = torch.where(uphill, 0, age + 1)
        at, ahead = after, after + (age / (age + 3)) * moved
        if step in keep:
            snapshots.append(at)
    return torch.stack(snapshots, dim=1)


@dataclass(frozen=True, slots=True)
class GradientPlan:
    """How a gradient learner learns: what it minimises, and how it descends."""

    objective: Callable[[ProbeBatch], RowLosses]
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
) -> Callable[[ProbeBatch], RowLosses]:
    """Return the objective of a loss of logits and labels alone."""
    return lambda batch: lambda logits, step: loss(logits, batch.y)  # noqa: ARG005


def forward(batch: ProbeBatch) -> RowLosses:
    """Return the loss corrected by the noise matrix."""
    assert batch.noise is not None
    noise = batch.noise
    return lambda logits, step: losses.forward_corrected(logits, batch.y, noise)  # noqa: ARG005


def early_learning(batch: ProbeBatch) -> RowLosses:
    """Return ELR, whose targets follow what the probe says from step to step."""
    targets: Tensor | None = None

    def objective(logits: Tensor, step: int) -> Tensor:
        nonlocal targets
        before = torch.zeros_like(logits) if targets is None or not step else targets
        targets = losses.early_targets(before, logits)
        return losses.early_regularised(logits, batch.y, targets)

    return objective


def mixup(batch: ProbeBatch) -> RowLosses:
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


def co_teaching(batch: ProbeBatch) -> RowLosses:
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


# curvature of fit * CE + reverse * RCE: RCE = -log(1e-4) (1 - p_y) curves by at most half of that
_SYMMETRIC_BOUND = 0.5 * (losses.FIT - losses.REVERSE * losses.LOG_ZERO)

PLANS: dict[str, GradientPlan] = {
    "label_smoothing": GradientPlan(plain(losses.label_smoothing)),
    "gce": GradientPlan(plain(losses.generalised_cross_entropy)),
    "sce": GradientPlan(plain(losses.symmetric_cross_entropy), bound=_SYMMETRIC_BOUND),
    "forward": GradientPlan(forward, needs_noise=True),
    "elr": GradientPlan(early_learning, bound=0.5 * (1 + losses.EARLY), preconditioned=False),
    "mixup": GradientPlan(mixup, bound=1.0),
    "early_stopping": GradientPlan(
        plain(losses.cross_entropy), preconditioned=False, l2=(0.0,), keep=_early_stops()
    ),
    "co_teaching": GradientPlan(
        co_teaching, bound=1.0, preconditioned=False, n_probes=2, start=0.01, needs_rate=True
    ),
}
"""Plans by the name of their learner."""


def descended(problems: Problems, plan: str) -> Probes:
    """Fit a probe per problem by a plan of `PLANS`; the same seeds give the same bits."""
    how = PLANS[plan]
    probes, faults = empty_probes(problems, problems.faults()), list(problems.faults())
    noise, rates = None, tuple[float, ...]()
    notes: tuple[str | None, ...] = (None,) * len(problems)
    if how.needs_noise:
        noise = problems.noise if problems.noise is not None else noise_matrices(problems)
        smallest = torch.linalg.svdvals(noise.double().nan_to_num())[:, -1].tolist()
        for i, value in enumerate(smallest):
            if faults[i] is None and value < 1e-3:
                faults[i] = "the noise matrix cannot be inverted: labels say nothing of a class"
    if how.needs_rate:
        rates = noise_rates(problems)
        notes = tuple(f"reckons with {rate:.3f} of labels wrong" for rate in rates)
    l2_of_candidate = torch.tensor(how.l2).repeat_interleave(len(how.keep))
    for rows, members in same_rows(problems, faults):
        on = basis(problems.x[rows])
        logits = len(how.l2) * how.n_probes * problems.n_classes * len(rows)
        for part in members.split(max(1, LOGITS_AT_ONCE // logits)):
            weight = _candidates(on, problems, rows, part, how, noise, rates)
            q, n, c, r1 = weight.shape
            val = on.coordinates(problems.x_val)
            log_p = (weight.reshape(-1, r1) @ val.T).view(q, n, c, -1).movedim(2, 3)
            log_p = log_p.log_softmax(dim=-1)
            if noise is not None:  # what it would say of given labels
                log_p = (log_p.exp() @ noise[part][:, None].to(log_p.dtype)).log()
            best = choose(log_p, problems.y_val[part], problems.val_rows[part])
            chosen = weight[torch.arange(len(part)), best]
            probes.weight[part], probes.bias[part] = on.on_features(chosen)
            probes.chosen_l2[part] = l2_of_candidate[best]
    return Probes(probes.weight, probes.bias, probes.chosen_l2, tuple(faults), notes)


def _candidates(
    on: Basis,
    problems: Problems,
    rows: Int64[Tensor, "rows"],
    part: Int64[Tensor, "q"],
    plan: GradientPlan,
    noise: Float[Tensor, "p c c"] | None,
    rates: tuple[float, ...],
) -> Float[Tensor, "q candidates c r1"]:
    """Return the weights of every candidate of some problems: penalties times stopping times."""
    copies = len(part) * plan.n_probes
    problem_of = part.repeat_interleave(len(plan.l2)).repeat(plan.n_probes)
    members, per_probe = problem_of.tolist(), len(part) * len(plan.l2)
    batch = ProbeBatch(
        y=problems.y[problem_of][:, rows],
        n_classes=problems.n_classes,
        # the probes of a candidate start apart, those of its penalties from the same place
        seeds=tuple(
            plan.n_probes * problems.seeds[member] + i // per_probe
            for i, member in enumerate(members)
        ),
        noise=None if noise is None else noise[problem_of].to(on.rows.dtype),
        rates=tuple(rates[i] for i in members) if rates else (),
    )
    shape = (batch.n_classes, len(on.squares))
    start = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in batch.seeds
    ]
    weight = descend(
        on,
        plan.objective(batch),
        plan.start * torch.stack(start).to(on.rows.dtype),
        l2=penalties(plan.l2, problems.n_classes).to(on.rows.dtype).repeat(copies),
        bound=plan.bound,
        preconditioned=plan.preconditioned,
        keep=plan.keep,
    )
    weight = weight.view(plan.n_probes, len(part), len(plan.l2) * len(plan.keep), *weight.shape[2:])
    return weight.mean(dim=0)
