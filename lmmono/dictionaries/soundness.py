"""What must hold before a fit begins, and what after it has ended."""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lmmono.dictionaries.vector_source import Vectors
from lmmono.errors import DictionaryError
from lmmono.stats.formulas import fvu

SCALING_BATCHES = 16
"""Batches, from the first on, that decide the scale of the input."""
MOST_EPOCHS = 1_000
"""A fit that would see each vector more often is refused."""


@dataclass(frozen=True)
class Opening:
    """What the first batches say, before any step is taken."""

    scales: dict[str, float]
    """By hook: sqrt(d_in) over the mean norm."""
    probes: dict[str, Tensor]
    """By hook: the first batch."""


def open_vectors(source: Vectors) -> Opening:
    """Read the first batches of the seeded order.

    Raises:
        DictionaryError: All vectors of a hook are zero, NaN or infinite.
    """
    n_batches = min(SCALING_BATCHES, -(-source.n_tokens // source.batch_tokens))
    sums, n = dict.fromkeys(source.widths, 0.0), 0
    probes: dict[str, Tensor] = {}
    for number, batch in enumerate(source.batches()):
        if number == n_batches:
            break
        probes = probes or {hook: x.clone() for hook, x in batch.items()}
        n += len(next(iter(batch.values())))
        for hook, x in batch.items():
            sums[hook] += float(x.norm(dim=-1).double().sum())
    for hook, total in sums.items():
        if total == 0.0:
            raise DictionaryError(f"{hook or 'vectors'}: the first {n} vectors are all zero")
    scales = {hook: math.sqrt(d) * n / sums[hook] for hook, d in source.widths.items()}
    return Opening(scales, probes)


def check_enough(source: Vectors, name: str, steps: int, d_sae: int) -> None:
    """Check that there are vectors enough to learn from.

    Raises:
        DictionaryError: There are fewer than one per latent, or the steps repeat each more than
            `MOST_EPOCHS` times.
    """
    n, wanted = source.n_tokens, steps * source.batch_tokens
    if n < d_sae:
        raise DictionaryError(
            f"{name}: {n:,} different vectors for {d_sae:,} latents; want at least one per latent: "
            "capture more tokens, or lower d_sae"
        )
    if wanted > MOST_EPOCHS * n:
        raise DictionaryError(
            f"{name}: {steps:,} steps of {source.batch_tokens:,} vectors go {wanted / n:,.0f} "
            f"times over the {n:,} vectors there are (one epoch); want at most {MOST_EPOCHS:,} "
            "epochs: capture more tokens, or take at most "
            f"{MOST_EPOCHS * n // source.batch_tokens:,} steps"
        )


def fvu_of(x: Float[Tensor, "n d"], reconstruction: Float[Tensor, "n d"]) -> float:
    """Return the fraction of variance unexplained over a set of vectors; NaN without variance."""
    return fvu(float((x - reconstruction).double().square().sum()), variation(x))


def variation(x: Float[Tensor, "n d"]) -> float:
    """Return the sum of the squared distances of vectors from their mean."""
    exact = x.double()
    return float((exact - exact.mean(0)).square().sum())


def check_alive(name: str, settings: Any, reached: dict[str, float]) -> None:
    """Check that a fit came to something.

    Raises:
        DictionaryError: All latents are dead, or the reconstruction is worse than the mean vector.
    """
    fault = None
    if reached["dead_fraction"] == 1.0 or reached["l0"] == 0.0:
        fault = "all latents are dead"
    elif not reached["fvu"] <= 1.0:
        fault = f"FVU is {reached['fvu']:.3g}: worse than the mean vector"
    if fault is None:
        return
    advice = [f"more steps (now {settings.steps:,})", f"another lr (now {settings.lr:g})"]
    if getattr(settings, "coefficient", None):
        advice.append(f"a smaller coefficient (now {settings.coefficient:g})")
    if getattr(settings, "k", None):
        advice.append(f"a larger k (now {settings.k})")
    if getattr(settings, "target_l0", None):
        advice.append(f"a larger target_l0 (now {settings.target_l0:g})")
    if settings.scaling == "none":
        advice.append("scaling='norm'")
    raise DictionaryError(f"{name}: after the fit {fault}; try {', '.join(advice)}")
