"""Non-negative maps and the non-negative cross entropy of NCL (Wang et al. 2024, 2403.12459).

The cross entropy reads logits ReLU(e) ReLU(W)^T without a bias (the authors' definition in issue 2
of PKU-ML/non_neg; the code of 2410.21331 keeps signed weights and a bias, and is another thing). It
is called `nonneg_ce` here, since NCE also stands for normalised cross entropy and for
noise-contrastive estimation. As a learner of probes it is a convex problem and solved as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from lmmono.probes.logistic import L2_PATH
from lmmono.probes.problems import Probes, Problems, choose, empty_probes, same_rows
from lmmono.registry.suites import NonNegativeMap

L2_GRID = L2_PATH[:6]
"""Penalties that are tried, those of the other learners without a path."""

MAX_ITERATIONS = 300
"""Of L-BFGS-B, at one penalty; the next begins where the last ended."""


def rep_relu(z: Tensor) -> Tensor:
    """Return ReLU(z) with the gradient of GELU, so that what is 0 can come back to life."""
    soft = functional.gelu(z)
    return torch.relu(z).detach() + (soft - soft.detach())  # the difference is 0 exactly


MAPS: dict[NonNegativeMap, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "rep_relu": rep_relu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "exp": torch.exp,
    "leakyrelu": functional.leaky_relu,
}
"""What NCL's code offers; gelu and leakyrelu go a little below 0."""


class NonNegativeHead(nn.Module):
    """A classifier's head with logits ReLU(e) ReLU(W)^T and no bias.

    Weights begin as |N(0, 0.02)|: one that is below 0 has no gradient. One that training takes
    there stays there, which is the constraint.
    """

    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_classes, d_model))
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.weight.abs_()

    def forward(self, features: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch c"]:
        """Return the logits."""
        return functional.linear(torch.relu(features), torch.relu(self.weight))


def nonneg_logistic(problems: Problems, *, l2: Sequence[float] = L2_GRID) -> Probes:
    """Fit min sum CE(max(x, 0) W^T, y) + l2 / 2 |W|^2 over W >= 0, without a bias.

    Coordinates are divided by their root mean square, never centred: 0 stays 0. The penalty is
    chosen on validation labels, as noisy as the training labels.
    """
    faults = problems.faults()
    probes = replace(empty_probes(problems, faults), reads="positive")
    notes: list[str | None] = [None] * len(problems)
    for rows, members in same_rows(problems, faults):
        x = problems.x[rows].clamp_min(0).double()
        size = x.square().mean(dim=0).sqrt()
        inverse = torch.where(size > 0, 1 / size.where(size > 0, 1), 0)
        scaled = (x * inverse).numpy()
        val = problems.x_val.clamp_min(0).double() * inverse
        for i in members.tolist():
            labels = problems.y[i][rows].numpy()
            path, converged = _path(scaled, labels, problems.n_classes, l2)
            log_p = (torch.from_numpy(path) @ val.T).transpose(1, 2).log_softmax(dim=-1)
            best = int(choose(log_p[None], problems.y_val[[i]], problems.val_rows[[i]]))
            probes.weight[i] = torch.from_numpy(path[best]) * inverse
            probes.bias[i], probes.chosen_l2[i] = 0.0, l2[best]
            if not converged[best]:
                notes[i] = f"stopped after {MAX_ITERATIONS} iterations, before it converged"
    return replace(probes, notes=tuple(notes))


def _path(
    x: Float[ndarray, "n d"], labels: Int64[ndarray, " n"], n_classes: int, l2: Sequence[float]
) -> tuple[Float[ndarray, "l c d"], list[bool]]:
    """Return the weights at every penalty, and whether each has converged."""
    target = np.eye(n_classes)[labels]
    weight, weights, converged = np.zeros((n_classes, x.shape[1])), list[Any](), list[bool]()

    def loss(flat: Any, penalty: float) -> tuple[float, Any]:
        w = flat.reshape(weight.shape)
        logits = x @ w.T
        top = logits.max(axis=1, keepdims=True)
        log_sum = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        value = (log_sum[:, 0] - (logits * target).sum(axis=1)).sum() + penalty / 2 * (w**2).sum()
        return value, ((np.exp(logits - log_sum) - target).T @ x + penalty * w).ravel()

    for penalty in l2:
        bounds = [(0.0, None)] * weight.size
        options = {"maxiter": MAX_ITERATIONS, "maxfun": 4 * MAX_ITERATIONS}
        solution = minimize(
            loss, weight.ravel(), (penalty,), "L-BFGS-B", jac=True, bounds=bounds, options=options
        )
        weight = np.asarray(solution.x).reshape(weight.shape)
        weights.append(weight)
        converged.append(bool(solution.success))
    return np.stack(weights), converged
