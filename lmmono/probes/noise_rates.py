"""How wrong the labels of a problem are, estimated from its noisy labels alone."""

import torch
from jaxtyping import Float
from torch import Tensor

from lmmono.probes.problems import Problems
from lmmono.probes.tuning import tuned_logistic

ANCHOR = 0.97
"""Quantile of a class' probability that stands for texts which are certainly of it."""


def noise_rates(problems: Problems) -> tuple[float, ...]:
    """Return the share of wrong labels: the error of a tuned probe on noisy validation labels.

    It is too large by what the probe itself gets wrong. At most a half; 0 where a problem cannot be
    learned.

    Raises:
        RobustnessError: No problem can be learned.
    """
    wrong = tuned_logistic(problems).predict(problems.x_val).argmax(dim=-1) != problems.y_val
    rows = problems.val_rows
    rates = (wrong & rows).sum(dim=1) / rows.sum(dim=1).clamp_min(1)
    return tuple(min(0.5, rate) for rate in rates.tolist())


def noise_matrices(problems: Problems) -> Float[Tensor, "p c c"]:
    """Return P(given label = column | true label = row), after Patrini et al. 2017.

    A row is what a tuned probe says of the validation text that it holds for that class more than
    97 in 100 do. Validation texts are taken because the probe has not seen their labels. NaN where
    a problem cannot be learned.

    Raises:
        RobustnessError: No problem can be learned.
    """
    p_given = tuned_logistic(problems).predict(problems.x_val).exp()
    out = p_given.new_full((len(problems), problems.n_classes, problems.n_classes), torch.nan)
    for i, (p, rows) in enumerate(zip(p_given, problems.val_rows, strict=True)):
        seen = p[rows]
        if len(seen):
            place = max(0, round(ANCHOR * (len(seen) - 1)))
            out[i] = seen[seen.argsort(dim=0, stable=True)[place]]
    return out
