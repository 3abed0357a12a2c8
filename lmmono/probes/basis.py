"""The coordinates in which a set of training rows is easy to learn from.

Rows are standardised and turned to the eigenvectors of their Gram matrix, after which every L2
penalty of every problem on these rows has the same diagonal bound of its Hessian (Bohning 1992):
x'Wx <= x'x / 2. Turning keeps the penalty |w|^2, so a probe fitted here is the probe that would be
fitted on the standardised rows; where there are fewer rows than dimensions it needs only as many
coordinates as there are rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Rows in r coordinates and a last one, constant 1, that takes the bias."""

    rows: Float[Tensor, "n r1"]
    squares: Float[Tensor, "r1"]
    """Sum of squares of each column of `rows`."""
    shift: Float[Tensor, "d"]
    """Mean of each dimension of the features."""
    directions: Float[Tensor, "d r"]
    """Eigenvectors, each dimension divided by its standard deviation (0 where it is constant)."""

    def of(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m r1"]:
        """Return other rows in these coordinates."""
        turned = (x.to(self.rows.dtype) - self.shift) @ self.directions
        return torch.cat([turned, turned.new_ones(len(x), 1)], dim=1)

    def back(
        self, weight: Float[Tensor, "*batch r1"]
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Return weights and biases on the features as they came."""
        on_features = weight[..., :-1] @ self.directions.T
        return on_features, weight[..., -1] - on_features @ self.shift


def basis(x: Float[Tensor, "n d"], *, standardise: bool = True) -> Basis:
    """Return the basis of training rows, in their precision (the eigenvectors in float64).

    Args:
        x: Rows.
        standardise: Divide each dimension by its standard deviation; else it is only centred.
    """
    exact = x.double()
    shift = exact.mean(dim=0)
    exact = exact - shift
    spread = exact.square().mean(dim=0).sqrt()
    varies = spread > 1e-6 * shift.abs() + torch.finfo(torch.float64).tiny
    inverse = torch.where(varies, 1 / spread.where(varies, 1) if standardise else 1.0, 0.0)
    exact *= inverse
    squares, turn = _eigenvectors(exact)
    directions = inverse[:, None] * turn
    rows = torch.cat([exact @ turn, exact.new_ones(len(x), 1)], dim=1)
    squares = torch.cat([squares, squares.new_full((1,), len(x))])
    parts = (rows, squares, shift, directions)
    return Basis(*(part.to(x.dtype).contiguous() for part in parts))


def _eigenvectors(
    x: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, "r"], Float[Tensor, "d r"]]:
    """Return eigenvalues and orthonormal eigenvectors of x'x, largest first; zeros left out."""
    n, d = x.shape
    squares, vectors = torch.linalg.eigh(x.T @ x if d <= n else x @ x.T)
    kept = squares > squares[-1].clamp_min(0) * 1e-12 * max(n, d)
    squares, vectors = squares[kept].flip(0), vectors[:, kept].flip(1)
    return squares, vectors if d <= n else x.T @ vectors / squares.sqrt()
