"""Codes of vectors in given directions: chosen greedily, by least squares, or non-negative.

Plain tensor arithmetic, the same on any device; a token's code does not depend on the others of
its batch, except for rounding. Directions are rows of unit norm (a dead one is zero).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

CHUNK_NUMBERS = 2**25
"""A pursuit holds k x d_in numbers per token: so many at a time, over the tokens coded together."""
RIDGE = 1e-6
"""Added to the squared length of directions, 1, before a least-squares fit."""
DEPENDENT = 1e-3
"""A chosen direction of which less than this is new to those before it stays unused."""


def random_directions(d_sae: int, d_in: int, seed: int) -> Float[Tensor, "d_sae d_in"]:
    """Return directions of unit norm, drawn evenly from the sphere; the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(d_sae, d_in, generator=random), dim=1)


def keep_largest(acts: Float[Tensor, "n d_sae"], k: int | None) -> Float[Tensor, "n d_sae"]:
    """Return the codes with all but the k coefficients of largest size set to zero.

    >>> keep_largest(torch.tensor([[3.0, -4.0, 1.0]]), 1)
    tensor([[ 0., -4.,  0.]])
    """
    if k is None or k >= acts.shape[1]:
        return acts
    chosen = acts.abs().topk(k, dim=1).indices
    return torch.zeros_like(acts).scatter(1, chosen, acts.gather(1, chosen))


def orthogonal_pursuit(
    x: Float[Tensor, "n d_in"], directions: Float[Tensor, "d_sae d_in"], k: int
) -> Float[Tensor, "n d_sae"]:
    """Return codes of k directions, each chosen to fit what those before it leave (OMP).

    All coefficients are fitted anew, by least squares, with every direction that comes in. Fewer
    than k are used where nothing is left to fit. Pati et al. 1993; scikit-learn's `omp`.
    """

    def best(residual: Tensor, chosen: Tensor) -> Tensor:
        return (residual @ directions.T).abs().scatter(1, chosen, -1.0).argmax(1)

    chunks = x.split(max(1, CHUNK_NUMBERS // (k * x.shape[1])))
    return torch.cat([_pursuit(part, directions, k, best) for part in chunks])


def largest_projections(
    x: Float[Tensor, "n d_in"], directions: Float[Tensor, "d_sae d_in"], k: int
) -> Float[Tensor, "n d_sae"]:
    """Return codes of the k directions with the largest projections, fitted by least squares.

    The normal equations get `RIDGE` on their diagonal, so that dependent directions share the fit.
    """

    def code(part: Tensor) -> Tensor:
        chosen = (part @ directions.T).abs().topk(k, dim=1).indices
        atoms = directions[chosen]
        gram = atoms @ atoms.mT + RIDGE * torch.eye(k, device=x.device)
        target = (atoms @ part[:, :, None]).double()
        fitted = torch.cholesky_solve(target, torch.linalg.cholesky(gram.double()))
        return x.new_zeros(len(part), len(directions)).scatter(1, chosen, fitted[:, :, 0].float())

    return torch.cat([code(part) for part in x.split(max(1, CHUNK_NUMBERS // (k * x.shape[1])))])


def non_negative_code(
    x: Float[Tensor, "n d_in"],
    directions: Float[Tensor, "d_sae d_in"],
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Float[Tensor, "n d_sae"]:
    """Return the non-negative codes that fit best, by coordinate descent from zero.

    The steps are those of scikit-learn's NMF solver (Cichocki and Phan 2009); here each token stops
    on its own, when the last sweep moved it less than `tolerance` times the first one.
    """
    gram, target = directions @ directions.T, x @ directions.T
    acts = torch.zeros_like(target)
    first, left = torch.zeros_like(target[:, 0]), torch.arange(len(x), device=x.device)
    for sweep in range(max_iterations):
        part, moved = _sweep(acts[left], target[left], gram)
        acts[left] = part
        first = moved if sweep == 0 else first
        left = left[moved > tolerance * first[left]]
        if not len(left):
            break
    return acts


def _sweep(acts: Tensor, target: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Improve each coefficient once, in order; return codes and the sum of projected gradients."""
    moved = torch.zeros_like(target[:, 0])
    for j in torch.nonzero(gram.diagonal() > 0).flatten().tolist():
        gradient = acts @ gram[j] - target[:, j]
        moved += torch.where(acts[:, j] == 0, gradient.clamp(max=0), gradient).abs()
        acts[:, j] = (acts[:, j] - gradient / gram[j, j]).clamp(min=0)
    return acts, moved


def _pursuit(
    x: Tensor, directions: Tensor, k: int, choose: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "n d_sae"]:
    """Fit directions by least squares as they are chosen: Gram-Schmidt, then back substitution."""
    n, d_in = x.shape
    chosen: Int64[Tensor, "n step"] = torch.zeros((n, 0), dtype=torch.int64, device=x.device)
    basis = x.new_zeros(n, k, d_in)
    upper = torch.eye(k, device=x.device).repeat(n, 1, 1)
    seen, residual = x.new_zeros(n, k), x
    for step in range(k):
        chosen = torch.cat([chosen, choose(residual, chosen)[:, None]], 1)
        new, before = directions[chosen[:, -1]], basis[:, :step]
        for _ in range(2):  # the second time removes what rounding left of the first
            parts = torch.einsum("nsd,nd->ns", before, new)
            upper[:, :step, step] += parts
            new = new - torch.einsum("ns,nsd->nd", parts, before)
        size = new.norm(dim=1)
        is_new = (size > DEPENDENT) & (residual.norm(dim=1) > 1e-6 * x.norm(dim=1))
        upper[:, step, step] = torch.where(is_new, size, torch.ones_like(size))
        basis[:, step] = new * (is_new / size.clamp(min=DEPENDENT))[:, None]
        seen[:, step] = (basis[:, step] * residual).sum(1)
        residual = residual - seen[:, step, None] * basis[:, step]
    fitted = torch.linalg.solve_triangular(upper, seen[:, :, None], upper=True)[:, :, 0]
    return x.new_zeros(n, len(directions)).scatter(1, chosen, fitted)


def on_host(tensor: Tensor) -> Any:
    """Return a tensor as an array on the host."""
    return tensor.detach().cpu().numpy()
