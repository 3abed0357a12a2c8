"""Whether fits of other seeds find the same directions: one-to-one matches of latents by cosine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from lmmono.dictionaries.coding import on_host
from lmmono.dictionaries.estimator import Dictionary
from lmmono.errors import DictionaryError
from lmmono.registry.metrics import METRICS
from lmmono.stats.bootstrap import DocumentDraws
from lmmono.stats.estimate import Estimate
from lmmono.stats.intervals import jackknife_interval

Directions = Float[ndarray, "_ d_in"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StabilityReport:
    """How alike the decoder directions of several fits are, beside random directions.

    With three fits or more the intervals are over seeds (jackknife, so wide for few); with two,
    over matched latents, which says nothing of a third seed.
    """

    hook: str | None
    """Hook of the fits."""
    n_fits: int
    """Fits compared, each with every other."""
    threshold: float
    """Cosine above which a latent counts as found again."""
    signed: bool
    """Whether opposite directions differ."""
    cosine: Estimate
    """Mean cosine of matched latents, over all pairs of fits."""
    share: Estimate
    """Share of matched latents whose cosine is above the threshold."""
    floor_cosine: Estimate
    """The cosine of as many random directions, matched in the same way."""
    floor_share: Estimate
    """The share of as many random directions."""
    pairs: pa.Table
    """One row per pair of fits: first, second (their places), n_matched, cosine, share."""
    alive: "StabilityReport | None" = None
    """The same for the latents that fired, where counts were given."""

    def __repr__(self) -> str:
        head = f"StabilityReport({self.n_fits} fits at {self.hook})"
        lines = [head, *self._lines("all latents")]
        return "\n".join(lines + (self.alive._lines("alive latents") if self.alive else []))

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return rows of table `all_scores` under `name`, the dictionary's; the floor is a control.

        `preset` names what differs from all latents, signed, above 0.9.
        """
        return self._rows(name, []) + (self.alive._rows(name, ["alive"]) if self.alive else [])

    def _lines(self, which: str) -> list[str]:
        figures = {
            "cosine": (self.cosine, self.floor_cosine),
            f"share above {self.threshold:g}": (self.share, self.floor_share),
        }
        return [f"  {which}, {name}: {a!r}, random {b!r}" for name, (a, b) in figures.items()]

    def _rows(self, name: str | None, parts: list[str]) -> list[dict[str, Any]]:
        parts = parts + ([] if self.signed else ["unsigned"])
        above = [] if self.threshold == 0.9 else [f"above {self.threshold:g}"]
        presets = {"stability_cosine": parts, "stability_share": parts + above}
        figures = [
            ("stability_cosine", None, self.cosine),
            ("stability_cosine", "random_directions", self.floor_cosine),
            ("stability_share", None, self.share),
            ("stability_share", "random_directions", self.floor_share),
        ]
        return [
            {
                "metric": metric,
                "metric_version": METRICS[metric].version,
                "preset": ", ".join(presets[metric]) or None,
                "control": control,
                "hook": self.hook,
                "dictionary": name,
                "details": None if control else {"pairs": self.pairs.to_pylist()},
                **estimate.row(),
            }
            for metric, control, estimate in figures
        ]


def stability(
    dictionaries: Sequence[Dictionary],
    threshold: float = 0.9,
    *,
    signed: bool = True,
    firing: Sequence[Shaped[ndarray, " d_sae"]] | None = None,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> StabilityReport:
    """Match the decoder directions of several fits, each pair one-to-one for the largest sum.

    The matching (Hungarian) takes time with the third power of the number of latents: 11 seconds a
    pair for 8,192 on one core. Directions of length zero are left out; where two fits have unlike
    numbers of latents, the smaller number is matched.

    Args:
        dictionaries: Fits of one hook, with other seeds.
        threshold: Cosine above which a latent counts as found again.
        signed: Off for codes whose sign means nothing (PCA, ICA): the size of the cosine counts.
        firing: Tokens on which each latent fired, per fit, as `SAEReport.n_active`; adds the
            figures for latents that fired at all.
        seed: Seed of the random directions and of the intervals.
        n_resamples: Redraws of latents, for intervals of two fits.
        level: Coverage that the intervals aim at.

    Raises:
        DictionaryError: There are fewer than two fits, one is not fitted, they are of several
            widths or hooks, or counts do not fit them.
    """
    fits = list(dictionaries)
    _check(fits, firing)
    directions = [on_host(normalize(fit.tensors()["W_dec"].float(), dim=1)) for fit in fits]
    is_alive = [np.abs(rows).sum(1) > 0 for rows in directions]
    draws = DocumentDraws(0, 0, n_resamples, seed, level)

    def report(kept: Sequence[Bool[ndarray, " d_sae"]]) -> StabilityReport:
        chosen = [rows[keep] for rows, keep in zip(directions, kept, strict=True)]
        return _report(fits[0].hook, chosen, threshold, signed, draws)

    everything = report(is_alive)
    if firing is None:
        return everything
    fired = [keep & (np.asarray(count) > 0) for keep, count in zip(is_alive, firing, strict=True)]
    return replace(everything, alive=report(fired))


def matched_cosines(
    first: Directions, second: Directions, signed: bool = True
) -> Float[ndarray, " matched"]:
    """Return the cosines of the one-to-one match of unit directions with the largest sum.

    Kuhn 1955; as sae-lens' `mean_correlation_coefficient`, which takes sizes (`signed=False`).
    """
    cosines = first @ second.T
    cosines = cosines if signed else np.abs(cosines)
    chosen = linear_sum_assignment(cosines, maximize=True)
    return cosines[chosen].astype(np.float64)


def _check(fits: list[Dictionary], firing: Sequence[ndarray] | None) -> None:
    if len(fits) < 2:
        raise DictionaryError(f"stability: want two fits or more, got {len(fits)}")
    for what in ("d_in", "hook"):
        values = dict.fromkeys(getattr(fit, what) for fit in fits)
        if len(values) > 1 or 0 in values:
            raise DictionaryError(
                f"stability: want fitted dictionaries of one {what}, got "
                + ", ".join(str(value) for value in values)
            )
    sizes = [fit.d_sae for fit in fits]
    if firing is not None and [len(counts) for counts in firing] != sizes:
        raise DictionaryError(
            f"firing: want counts per latent for each fit, {sizes} of them, got "
            f"{[len(counts) for counts in firing]}"
        )


def _report(
    hook: str | None,
    directions: list[Directions],
    threshold: float,
    signed: bool,
    draws: DocumentDraws,
) -> StabilityReport:
    places = list(combinations(range(len(directions)), 2))
    if min(len(rows) for rows in directions) == 0:
        raise DictionaryError("stability: one of the fits has no latent to match: all are dead")
    matched = [matched_cosines(directions[i], directions[j], signed) for i, j in places]
    random = np.random.default_rng(draws.seed)
    one, other = (_random(random, rows) for rows in directions[:2])
    floor = [matched_cosines(one, other, signed)]
    is_above = [cosines > threshold for cosines in matched]
    pairs = {
        "first": [i for i, _ in places],
        "second": [j for _, j in places],
        "n_matched": [len(cosines) for cosines in matched],
        "cosine": [float(cosines.mean()) for cosines in matched],
        "share": [float(is_found.mean()) for is_found in is_above],
    }
    return StabilityReport(
        hook=hook,
        n_fits=len(directions),
        threshold=threshold,
        signed=signed,
        cosine=_estimate(matched, places, draws),
        share=_estimate(
            [is_found.astype(np.float64) for is_found in is_above], places, draws, lowest=0.0
        ),
        floor_cosine=_estimate(floor, places[:1], draws),
        floor_share=_estimate([(floor[0] > threshold).astype(np.float64)], places[:1], draws),
        pairs=pa.table(pairs),
    )


def _random(random: np.random.Generator, like: Directions) -> Directions:
    drawn = torch.from_numpy(random.standard_normal(like.shape).astype(np.float32))
    return on_host(normalize(drawn, dim=1))


def _estimate(
    values: list[Float[ndarray, " matched"]],
    places: list[tuple[int, int]],
    draws: DocumentDraws,
    lowest: float = -1.0,
) -> Estimate:
    """Return the mean over pairs of the mean over latents, with its interval."""
    n = sum(len(of_pair) for of_pair in values)
    if len(places) == 1:
        latents = replace(draws, n_documents=len(values[0]))
        estimate = latents.estimate(latents.totals(values[0]) / n, n=n)
        method = f"percentile bootstrap over matched latents, {draws.n_resamples} resamples"
        return replace(estimate, n_documents=0, method=method)
    means = np.array([of_pair.mean() for of_pair in values])
    n_fits = max(j for _, j in places) + 1
    without = [means[[fit not in pair for pair in places]].mean() for fit in range(n_fits)]
    value = float(means.mean())
    low, high = map(float, jackknife_interval(value, np.array(without), draws.level))
    return Estimate(
        value, max(low, lowest), min(high, 1.0), draws.level, "jackknife over seeds", n, 0, 0
    )
