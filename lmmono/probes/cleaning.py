"""Labels cleaned before a logistic probe learns from them, through cleanlab and scikit-learn."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from lmmono.errors import RobustnessError
from lmmono.probes.basis import basis
from lmmono.probes.logistic import L2_PATH, fit_path
from lmmono.probes.problems import Probes, Problems
from lmmono.probes.tuning import learnable, same_rows, tuned_logistic

N_FOLDS = 5
NEIGHBOURS = 10


def pruned(problems: Problems) -> Probes:
    """Fit probes to the labels that confident learning finds nothing wrong with.

    Northcutt et al. 2021: labels at odds with what a probe says that has not seen them, as many of
    each kind as the joint count of given and confident labels has, are dropped by cleanlab. The
    probes are logistic ones of five folds (row i of a problem is in fold i mod 5) with the penalty
    that is chosen on noisy validation labels.

    Raises:
        RobustnessError: cleanlab is not installed, or no problem can be learned.
    """
    find_issues = _cleanlab()
    faults, tuned = learnable(problems), tuned_logistic(problems)
    kept = problems.rows.clone()
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        said = _unseen(problems, rows, members, tuned.chosen_l2[members]).exp().double().numpy()
        for i, p in zip(members.tolist(), said, strict=True):
            labels = problems.y[i][rows].numpy()
            issues = find_issues(labels, p / p.sum(axis=1, keepdims=True), n_jobs=1)
            kept[i, rows] = torch.from_numpy(~issues)
            notes[i] = f"{int(issues.sum())} of {len(labels)} labels dropped"
    return _told(_refitted(problems, kept), notes)


def relabelled(problems: Problems) -> Probes:
    """Fit probes to labels outvoted by those of the ten nearest training rows.

    Neighbours are those of least distance on standardised features. A row keeps its label unless
    another has more votes; a row has no vote on itself.

    Raises:
        RobustnessError: No problem can be learned.
    """
    faults, y = learnable(problems), problems.y.clone()
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        near = torch.from_numpy(_neighbours(basis(problems.x[rows]).rows[:, :-1].numpy()))
        for i in members.tolist():
            given = problems.y[i][rows]
            voted = outvoted(given, near, problems.n_classes)
            y[i, rows] = voted
            notes[i] = f"{int((voted != given).sum())} of {len(rows)} labels changed"
    return _told(tuned_logistic(replace(problems, y=y)), notes)


def outvoted(
    labels: Int64[Tensor, "n"], near: Int64[Tensor, "n k"], n_classes: int
) -> Int64[Tensor, "n"]:
    """Return the label with the most votes of each row's neighbours; the row's own among equals."""
    votes = torch.zeros(len(labels), n_classes)
    votes.scatter_add_(1, labels[near], torch.ones(near.shape))
    own = votes.gather(1, labels[:, None])[:, 0]
    most, winner = votes.max(dim=1)
    return torch.where(most > own, winner, labels)


def _neighbours(x: Float[ndarray, "n d"]) -> Int64[ndarray, "n k"]:
    from sklearn.neighbors import NearestNeighbors

    n_neighbours = min(NEIGHBOURS, len(x) - 1)
    return NearestNeighbors(n_neighbors=n_neighbours).fit(x).kneighbors(return_distance=False)


def _unseen(
    problems: Problems,
    rows: Int64[Tensor, "rows"],
    members: Int64[Tensor, "members"],
    l2: Float[Tensor, "members"],
) -> Float[Tensor, "members rows c"]:
    """Return log-probabilities of training rows by probes that were fitted without them."""
    at = (l2[:, None] - torch.tensor(L2_PATH)).abs().argmin(dim=1)
    path, y = L2_PATH[: int(at.max()) + 1], problems.y[members][:, rows]
    fold, x = torch.arange(len(rows)) % N_FOLDS, problems.x[rows]
    out = torch.empty(len(members), len(rows), problems.n_classes)
    for k in range(N_FOLDS):
        rest, held = fold != k, fold == k
        fits = fit_path(x[rest], y[:, rest], n_classes=problems.n_classes, l2=path)
        out[:, held] = fits.at(at).log_probabilities(x[held])[:, 0].float()
    return out


def _refitted(problems: Problems, kept: Bool[Tensor, "p n"]) -> Probes:
    """Fit problems to the labels that are left, on the coordinates of all rows they had."""
    sound = [i for i, fault in enumerate(problems.faults()) if fault is None]
    left = replace(problems, w=kept).faults()
    probes = tuned_logistic(problems, kept=kept)
    failures = list(probes.failures)
    for i in sound:
        if left[i] is not None:
            failures[i] = f"after cleaning: {left[i]}"
            probes.weight[i], probes.bias[i], probes.chosen_l2[i] = torch.nan, torch.nan, torch.nan
    return replace(probes, failures=tuple(failures))


def _told(probes: Probes, notes: list[str | None]) -> Probes:
    """Return probes with a note added to each."""
    both = zip(notes, probes.notes, strict=True)
    joined = (", ".join(note for note in pair if note) or None for pair in both)
    return replace(probes, notes=tuple(joined))


def _cleanlab() -> Any:
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as fault:
        raise RobustnessError(
            "learner cleanlab needs one package more: pip install 'lmmono[noise]'"
        ) from fault
    return find_label_issues
