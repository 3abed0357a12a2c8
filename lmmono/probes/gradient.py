"""Probes learned by gradient descent, their penalty or stopping time chosen on noisy labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmmono.probes.basis import Basis, basis
from lmmono.probes.descent import Batch, descend, seeded_start
from lmmono.probes.logistic import penalties
from lmmono.probes.noise_rates import noise_matrices, noise_rates
from lmmono.probes.objectives import PLANS, Plan
from lmmono.probes.problems import Probes, Problems
from lmmono.probes.tuning import check_some, choose, empty_probes, learnable, same_rows

LOGITS_AT_ONCE = 1 << 21
"""Logits of probes that are trained together: about 8 MiB of each array."""


def descended(problems: Problems, plan: str) -> Probes:
    """Fit a probe per problem by a plan of `PLANS`; the same seeds give the same bits.

    Raises:
        RobustnessError: No problem can be learned.
    """
    how = PLANS[plan]
    faults = learnable(problems)
    probes, faults = empty_probes(problems, faults), list(faults)
    known = _Known.of(problems, how, faults)
    check_some(faults)
    n_candidates = len(how.l2) * how.n_probes
    for rows, members in same_rows(problems, faults):
        on = basis(problems.x[rows])
        logits = n_candidates * problems.n_classes * len(rows)
        for part in members.split(max(1, LOGITS_AT_ONCE // logits)):
            weight = _candidates(on, problems, rows, part, how, known)
            said = _log_probabilities(on, weight, problems.x_val)
            if known.noise is not None:  # what it would say of given labels
                said = (said.exp() @ known.noise[part][:, None].to(said.dtype)).log()
            at = choose(said, problems.y_val[part], problems.val_rows[part])
            chosen = weight[torch.arange(len(part)), at]
            probes.weight[part], probes.bias[part] = on.back(chosen)
            l2 = torch.tensor(how.l2).repeat_interleave(len(how.keep))
            probes.chosen_l2[part] = l2[at]
    return Probes(probes.weight, probes.bias, probes.chosen_l2, tuple(faults), known.notes)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What a plan is told of the noise in each problem."""

    noise: Float[Tensor, "p c c"] | None
    rates: tuple[float, ...]
    notes: tuple[str | None, ...]

    @classmethod
    def of(cls, problems: Problems, plan: Plan, faults: list[str | None]) -> "_Known":
        """Return it, estimated where it is not given; adds the faults that it shows."""
        noise, rates = None, tuple[float, ...]()
        notes: tuple[str | None, ...] = (None,) * len(problems)
        if plan.needs_noise:
            noise = problems.noise if problems.noise is not None else noise_matrices(problems)
            smallest = torch.linalg.svdvals(noise.double().nan_to_num())[:, -1].tolist()
            for i, value in enumerate(smallest):
                if faults[i] is None and value < 1e-3:
                    faults[i] = "the noise matrix cannot be inverted: labels say nothing of a class"
        if plan.needs_rate:
            rates = noise_rates(problems)
            notes = tuple(f"reckons with {rate:.3f} of labels wrong" for rate in rates)
        return cls(noise, rates, notes)


def _candidates(
    on: Basis,
    problems: Problems,
    rows: Int64[Tensor, "rows"],
    part: Int64[Tensor, "q"],
    plan: Plan,
    known: _Known,
) -> Float[Tensor, "q candidates c r1"]:
    """Return the weights of every candidate of some problems."""
    copies = len(part) * plan.n_probes
    of = part.repeat_interleave(len(plan.l2)).repeat(plan.n_probes)
    members = of.tolist()
    batch = Batch(
        y=problems.y[of][:, rows],
        n_classes=problems.n_classes,
        seeds=_apart([problems.seeds[i] for i in members], plan.n_probes),
        noise=None if known.noise is None else known.noise[of].to(on.rows.dtype),
        rates=tuple(known.rates[i] for i in members) if known.rates else (),
    )
    weight = descend(
        on,
        plan.objective(batch),
        seeded_start(on, batch, plan.start),
        l2=penalties(plan.l2, problems.n_classes).to(on.rows.dtype).repeat(copies),
        bound=plan.bound,
        preconditioned=plan.preconditioned,
        keep=plan.keep,
    )
    weight = weight.view(plan.n_probes, len(part), len(plan.l2) * len(plan.keep), *weight.shape[2:])
    return weight.mean(dim=0)


def _apart(seeds: Sequence[int], n_probes: int) -> tuple[int, ...]:
    """Return seeds that differ between the probes of a candidate, not between penalties."""
    each = len(seeds) // n_probes
    return tuple(n_probes * seed + i // each for i, seed in enumerate(seeds))


def _log_probabilities(
    on: Basis, weight: Float[Tensor, "q candidates c r1"], x: Float[Tensor, "m d"]
) -> Float[Tensor, "q candidates m c"]:
    q, n, c, r1 = weight.shape
    logits = (weight.reshape(-1, r1) @ on.of(x).T).view(q, n, c, len(x))
    return logits.movedim(2, 3).log_softmax(dim=-1)
