"""The L2 penalty of a logistic probe, chosen on validation labels.

Chosen is the penalty with the best accuracy on a problem's validation rows, among equals the one
with the least log-loss, among those the strongest. Whose labels these are (the noisy ones of the
problem, or clean ones) is for the learner to say.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmmono.errors import RobustnessError
from lmmono.probes.basis import basis
from lmmono.probes.logistic import AT_ONCE, L2_PATH, MAX_ITERATIONS, fit_path
from lmmono.probes.problems import Probes, Problems

LOGITS_AT_ONCE = 1 << 25
"""Validation logits of problems whose penalties are chosen together: 128 MiB."""


def tuned_logistic(
    problems: Problems,
    *,
    labels: Int64[Tensor, "p m"] | None = None,
    l2: Sequence[float] = L2_PATH,
    kept: Bool[Tensor, "p n"] | None = None,
) -> Probes:
    """Fit a logistic probe per problem, its penalty chosen on validation labels.

    Problems that use the same rows are solved together.

    Args:
        problems: What to learn from.
        labels: Validation labels to choose by; None: the problems' own, noisy ones.
        l2: Penalties, from strong to weak.
        kept: Training rows to learn from; the others still count where features are standardised.

    Raises:
        RobustnessError: No problem can be learned.
    """
    faults = learnable(problems)
    labels = problems.y_val if labels is None else labels
    probes = empty_probes(problems, faults)
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        on = basis(problems.x[rows])
        logits = len(l2) * problems.y_val.shape[1] * problems.n_classes
        for part in members.split(max(1, min(AT_ONCE, LOGITS_AT_ONCE // logits))):
            path = fit_path(
                on,
                problems.y[part][:, rows],
                n_classes=problems.n_classes,
                l2=l2,
                weights=None if kept is None else kept[part][:, rows].to(on.rows.dtype),
            )
            said = path.log_probabilities(problems.x_val)
            best = choose(said, labels[part], problems.val_rows[part])
            weight, bias = path.at(best).weights()
            probes.weight[part], probes.bias[part] = weight[:, 0], bias[:, 0]
            probes.chosen_l2[part] = torch.tensor(l2)[best]
            for i, spent in zip(part.tolist(), path.at(best).n_iterations[:, 0], strict=True):
                if spent >= MAX_ITERATIONS:
                    notes[i] = f"stopped after {MAX_ITERATIONS} iterations, before it converged"
    return Probes(probes.weight, probes.bias, probes.chosen_l2, faults, tuple(notes))


def oracle_logistic(problems: Problems) -> Probes:
    """Fit as `tuned_logistic` does, its penalty chosen on the true validation labels.

    Raises:
        RobustnessError: The problems do not hold the true labels.
    """
    if problems.clean_val is None:
        raise RobustnessError(
            "learner oracle_logistic: want Problems.clean_val, the true validation labels; without "
            "them take learner logistic"
        )
    return tuned_logistic(problems, labels=problems.clean_val.expand_as(problems.y_val))


def choose(
    log_probabilities: Float[Tensor, "p l m c"],
    labels: Int64[Tensor, "p m"],
    rows: Bool[Tensor, "p m"],
) -> Int64[Tensor, "p"]:
    """Return the index of the best of l candidates of each problem, the first among equals."""
    p, n_candidates, m, _ = log_probabilities.shape
    at = labels[:, None, :, None].expand(p, n_candidates, m, 1)
    n = rows.sum(dim=1, keepdim=True).clamp_min(1)
    loss = -(log_probabilities.gather(-1, at)[..., 0].clamp_min(-1e4) * rows[:, None]).sum(-1) / n
    right = (log_probabilities.argmax(dim=-1) == labels[:, None]) & rows[:, None]
    n_right = right.sum(dim=-1)
    loss[n_right < n_right.amax(dim=1, keepdim=True)] = torch.inf
    return loss.argmin(dim=1)


def learnable(problems: Problems) -> tuple[str | None, ...]:
    """Return what ails each problem.

    Raises:
        RobustnessError: All of them have something.
    """
    faults = problems.faults()
    check_some(faults)
    return faults


def check_some(faults: Sequence[str | None]) -> None:
    """Check that some problem can be learned.

    Raises:
        RobustnessError: None can.
    """
    if not faults:
        raise RobustnessError("problems: there are none; want at least one")
    if all(fault is not None for fault in faults):
        raise RobustnessError(
            f"problems: none of {len(faults)} can be learned; the first: {faults[0]}"
        )


def empty_probes(problems: Problems, faults: tuple[str | None, ...]) -> Probes:
    """Return probes that are NaN, to be filled where there is no fault."""
    p, c, d = len(problems), problems.n_classes, problems.x.shape[1]
    new = problems.x.new_full
    return Probes(
        new((p, c, d), torch.nan), new((p, c), torch.nan), torch.full((p,), torch.nan), faults
    )


def same_rows(
    problems: Problems, faults: Sequence[str | None]
) -> Iterator[tuple[Int64[Tensor, "rows"], Int64[Tensor, "members"]]]:
    """Yield the training rows and the members of each set of problems that use the same rows."""
    at = torch.tensor([i for i, fault in enumerate(faults) if fault is None])
    masks, of = torch.unique(problems.rows[at], dim=0, return_inverse=True)
    for i, mask in enumerate(masks):
        yield mask.nonzero()[:, 0], at[of == i]
