"""How wrong labels are, estimated from the labels alone; and labels cleaned before a probe learns.

Nothing here sees a true label. Cleaning is cleanlab's, or a vote of neighbours; what is left is
learned by a logistic probe.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmmono.errors import RobustnessError
from lmmono.probes.logistic import L2_PATH, basis, fit_path, tuned_logistic
from lmmono.probes.problems import Probes, Problems, same_rows

ANCHOR = 0.97
"""Quantile of a class' probability that stands for texts which are certainly of it: Patrini et al.
2017 take 0.97 where the largest would be an outlier."""

N_FOLDS = 5
"""Folds of confident learning, cleanlab's default."""

NEIGHBOURS = 10
"""Training rows that vote on a label."""


def noise_rates(problems: Problems) -> tuple[float, ...]:
    """Return the share of wrong labels: the error of a tuned probe on noisy validation labels.

    It is too large by what the probe itself gets wrong. At most a half; 0 where a problem cannot be
    learned.
    """
    probes = tuned_logistic(problems)
    wrong = probes.predict(problems.x_val).argmax(dim=-1) != problems.y_val
    rows = problems.val_rows
    rates = ((wrong & rows).sum(dim=1) / rows.sum(dim=1).clamp_min(1)).tolist()
    return tuple(
        0.0 if failure else min(0.5, rate)
        for failure, rate in zip(probes.failures, rates, strict=True)
    )


def noise_matrices(problems: Problems) -> Float[Tensor, "p c c"]:
    """Return P(given label = column | true label = row), after Patrini et al. 2017.

    A row is what a tuned probe says of the validation text that it holds for that class more than
    97 in 100 do. Validation texts are taken because the probe has not seen their labels. NaN where
    a problem cannot be learned.
    """
    p_given = tuned_logistic(problems).predict(problems.x_val).exp()
    matrices = p_given.new_full((len(problems), problems.n_classes, problems.n_classes), torch.nan)
    for i, (p, rows) in enumerate(zip(p_given, problems.val_rows, strict=True)):
        seen = p[rows]
        if len(seen):
            place = max(0, round(ANCHOR * (len(seen) - 1)))
            matrices[i] = seen[seen.argsort(dim=0, stable=True)[place]]
    return matrices


def pruned(problems: Problems) -> Probes:
    """Fit probes to the labels that confident learning finds nothing wrong with.

    Northcutt et al. 2021: labels at odds with what a probe says that has not seen them, as many of
    each kind as the joint count of given and confident labels has, are dropped by cleanlab. The
    probes are logistic ones of five folds (row i of a problem is in fold i mod 5) with the penalty
    that is chosen on noisy validation labels. Features are standardised by all rows.

    Raises:
        RobustnessError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as fault:
        raise RobustnessError(
            "learner cleanlab needs one package more: pip install 'lmmono[noise]'"
        ) from fault
    faults, tuned = problems.faults(), tuned_logistic(problems)
    kept = problems.rows.clone()
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        log_p = _log_p_unseen(problems, rows, members, tuned.chosen_l2[members])
        for i, p in zip(members.tolist(), log_p.exp().double().numpy(), strict=True):
            labels = problems.y[i][rows].numpy()
            try:
                issues = find_label_issues(labels, p / p.sum(axis=1, keepdims=True), n_jobs=1)
            except ValueError as fault:  # labels that cleanlab refuses end one problem, not all
                kept[i, rows], notes[i] = False, f"cleanlab: {fault}"
                continue
            kept[i, rows] = torch.from_numpy(~issues)
            notes[i] = f"{int(issues.sum())} of {len(labels)} labels dropped"
    left = replace(problems, w=kept).faults()
    return _after_cleaning(tuned_logistic(problems, kept=kept), faults, left, notes)


def relabelled(problems: Problems) -> Probes:
    """Fit probes to labels outvoted by those of the ten nearest training rows.

    Neighbours are those of least distance on standardised features. A row keeps its label unless
    another has more votes; a row has no vote on itself.
    """
    from sklearn.neighbors import NearestNeighbors

    faults, y = problems.faults(), problems.y.clone()
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        x = basis(problems.x[rows]).rows[:, :-1].numpy()
        neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(x) - 1)).fit(x)
        near = torch.from_numpy(neighbours.kneighbors(return_distance=False))
        for i in members.tolist():
            labels = problems.y[i][rows]
            voted = outvoted(labels, near, problems.n_classes)
            y[i, rows] = voted
            notes[i] = f"{int((voted != labels).sum())} of {len(rows)} labels changed"
    cleaned = replace(problems, y=y)
    return _after_cleaning(tuned_logistic(cleaned), faults, cleaned.faults(), notes)


def outvoted(
    labels: Int64[Tensor, "n"], near: Int64[Tensor, "n k"], n_classes: int
) -> Int64[Tensor, "n"]:
    """Return the label with the most votes of each row's neighbours; the row's own among equals."""
    votes = torch.zeros(len(labels), n_classes)
    votes.scatter_add_(1, labels[near], torch.ones(near.shape))
    own = votes.gather(1, labels[:, None])[:, 0]
    most, winner = votes.max(dim=1)
    return torch.where(most > own, winner, labels)


def _log_p_unseen(
    problems: Problems,
    rows: Int64[Tensor, "rows"],
    members: Int64[Tensor, "members"],
    l2: Float[Tensor, "members"],
) -> Float[Tensor, "members rows c"]:
    """Return log-probabilities of training rows by probes that were fitted without them."""
    at = (l2[:, None] - torch.tensor(L2_PATH)).abs().argmin(dim=1)
    path, y = L2_PATH[: int(at.max()) + 1], problems.y[members][:, rows]
    fold, x = torch.arange(len(rows)) % N_FOLDS, problems.x[rows]
    log_p = torch.empty(len(members), len(rows), problems.n_classes)
    for k in range(N_FOLDS):
        rest, held_out = fold != k, fold == k
        fits = fit_path(x[rest], y[:, rest], n_classes=problems.n_classes, l2=path)
        log_p[:, held_out] = fits.at(at).log_probabilities(x[held_out])[:, 0].float()
    return log_p


def _after_cleaning(
    probes: Probes,
    before: tuple[str | None, ...],
    after: tuple[str | None, ...],
    notes: list[str | None],
) -> Probes:
    """Return probes with their notes; one whose cleaned labels cannot be learned has failed."""
    failures = list(before)
    for i, fault in enumerate(after):
        if before[i] is None and fault is not None:
            failures[i] = f"after cleaning: {fault}"
            probes.weight[i], probes.bias[i], probes.chosen_l2[i] = torch.nan, torch.nan, torch.nan
    joined = (
        ", ".join(note for note in pair if note) or None
        for pair in zip(notes, probes.notes, strict=True)
    )
    return replace(probes, failures=tuple(failures), notes=tuple(joined))
