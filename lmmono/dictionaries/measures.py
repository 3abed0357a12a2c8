"""What a dictionary does to vectors: sums over documents, and the measures made of them.

Sums are float64 and kept per document, so that a measure can be made again of any draw of them.
A ratio here is a ratio of sums, never a mean of ratios.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from torch import Tensor

from lmmono.stats.bootstrap import DocumentDraws, ratio
from lmmono.stats.estimate import Estimate
from lmmono.stats.intervals import jackknife_interval

FLAT = 1e-12
"""Vectors whose variance is at most this share of their energy do not vary."""

DENSITY_EDGES = np.linspace(-7.0, 0.0, 29)
"""Edges of the density histogram in log10; a latent rarer than the first is in the first bin."""


class VectorSums:
    """Sums over documents of a hook's vectors: tokens, squared norms, the vectors themselves."""

    def __init__(self, n_documents: int, d_in: int, device: torch.device) -> None:
        self.tokens = torch.zeros(n_documents, dtype=torch.float64, device=device)
        self.energy = torch.zeros_like(self.tokens)
        self.vectors = torch.zeros(n_documents, d_in, dtype=torch.float64, device=device)

    def add(self, documents: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]) -> None:
        """Add the vectors of some tokens."""
        wide = x.double()
        self.tokens.index_add_(0, documents, torch.ones_like(wide[:, 0]))
        self.energy.index_add_(0, documents, wide.square().sum(1))
        self.vectors.index_add_(0, documents, wide)

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean vector of all tokens so far."""
        return self.vectors.sum(0) / self.tokens.sum()


_COLUMNS = ("active", "error", "along", "energy_hat", "cosine", "directed")


class CodeSums:
    """Sums over documents of what a dictionary makes of a hook's vectors."""

    def __init__(self, n_documents: int, d_sae: int, device: torch.device) -> None:
        self.sums = torch.zeros(n_documents, len(_COLUMNS), dtype=torch.float64, device=device)
        self.n_active = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.fired = torch.zeros(n_documents, d_sae, dtype=torch.bool, device=device)

    def add(
        self,
        documents: Int[Tensor, " n"],
        x: Float[Tensor, "n d_in"],
        acts: Float[Tensor, "n d_sae"],
        reconstructed: Float[Tensor, "n d_in"],
    ) -> None:
        """Add some tokens: their vectors, codes and reconstructions."""
        wide, hat = x.double(), reconstructed.double()
        along, norms = (wide * hat).sum(1), wide.norm(dim=1)
        norms_hat = hat.norm(dim=1)
        cosine = along / (norms * norms_hat).clamp_min(torch.finfo(torch.float64).tiny)
        active = acts != 0
        columns = (
            active.sum(1).double(),
            (wide - hat).square().sum(1),
            along,
            norms_hat.square(),
            cosine,  # 0 where the reconstruction is zero: a code that gives up gets no credit
            (norms > 0).double(),
        )
        self.sums.index_add_(0, documents, torch.stack(columns, 1))
        self.n_active += active.sum(0)
        token, latent = active.nonzero(as_tuple=True)
        self.fired[documents[token], latent] = True


@dataclass(frozen=True, slots=True, eq=False)
class CodeMeasures:
    """Measures of a code that need no further pass through the model."""

    l0: Estimate
    fvu: Estimate
    cosine: Estimate
    shrinkage: Estimate
    dead_fraction: Estimate
    density: Estimate
    n_active: Int[ndarray, " d_sae"]
    density_counts: Int[ndarray, " bins"]


def code_measures(draws: DocumentDraws, vectors: VectorSums, codes: CodeSums) -> CodeMeasures:
    """Return the measures of a code; the formulas stand in `lmmono.registry.metrics`."""
    sums = dict(zip(_COLUMNS, draws.totals(on_host(codes.sums)).T, strict=True))
    tokens = draws.totals(on_host(vectors.tokens))
    energy = draws.totals(on_host(vectors.energy))
    centre = np.square(draws.totals(on_host(vectors.vectors))).sum(1) / tokens
    spread = np.where(energy - centre > FLAT * energy, energy - centre, 0.0)
    n_active = on_host(codes.n_active)
    n_latents = len(n_active)
    n_directed = int(sums["directed"][0])
    return CodeMeasures(
        l0=draws.estimate(sums["active"] / tokens),
        fvu=draws.estimate(
            ratio(sums["error"], spread), failure=None if spread[0] > 0 else "vectors do not vary"
        ),
        cosine=draws.estimate(
            ratio(sums["cosine"], sums["directed"]),
            n=n_directed,
            nan_fraction=1 - n_directed / draws.n_tokens,
            failure=None if n_directed else "all vectors are zero",
        ),
        shrinkage=draws.estimate(
            ratio(sums["energy_hat"], sums["along"]),
            failure=None if sums["along"][0] > 0 else "reconstructions do not point along vectors",
        ),
        dead_fraction=dead_fraction(draws, on_host(codes.fired)),
        density=draws.estimate(sums["active"] / tokens / n_latents, n=n_latents),
        n_active=n_active,
        density_counts=density_counts(n_active, draws.n_tokens),
    )


def dead_fraction(draws: DocumentDraws, fired: Shaped[ndarray, "documents d_sae"]) -> Estimate:
    """Return the share of latents that fired in no document, with its jackknife interval.

    A redraw holds 63 % of the documents, so every redraw has more dead latents than the documents
    have, and percentiles of redraws would miss the number itself. Leaving one document out adds
    the latents that fired in it alone.
    """
    in_documents = fired.sum(axis=0)
    dead = float((in_documents == 0).mean())
    low = high = float("nan")
    if draws.n_documents > 1:
        only_there = fired[:, in_documents == 1].sum(axis=1)
        without = dead + only_there / fired.shape[1]
        low, high = jackknife_interval(dead, without, draws.level)
        low, high = max(float(low), 0.0), min(float(high), 1.0)
    sizes = (fired.shape[1], draws.n_tokens, draws.n_documents)
    return Estimate(dead, low, high, draws.level, "jackknife over documents", *sizes)


def density_counts(n_active: Int[ndarray, " d_sae"], n_tokens: int) -> Int[ndarray, " bins"]:
    """Return how many latents have log10(density) in each bin of `DENSITY_EDGES`.

    Latents that never fired are in none.

    >>> density_counts(np.array([0, 1, 10, 10]), 10)[[24, 27]]
    array([1, 2])
    """
    density = np.log10(n_active[n_active > 0] / n_tokens)
    return np.histogram(np.maximum(density, DENSITY_EDGES[0]), DENSITY_EDGES)[0]


def recovered(
    draws: DocumentDraws,
    clean: Float[ndarray, " one_plus_resamples"],
    spliced: Float[ndarray, " one_plus_resamples"],
    ablated: Float[ndarray, " one_plus_resamples"],
    n: int,
) -> Estimate:
    """Return (ablated - spliced) / (ablated - clean) of losses, made of equal draws.

    Not defined unless the ablation hurts on every redraw: what is not lost cannot be recovered.
    """
    lost = ablated - clean
    clear = bool((lost > 0).all())
    values = ratio(ablated - spliced, lost)
    return draws.estimate(values, n=n, failure=None if clear else "ablation does no clear harm")


def on_host(tensor: Tensor) -> Any:
    """Return a tensor as an array on the host."""
    return tensor.detach().cpu().numpy()
