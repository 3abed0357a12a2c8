"""How well units tell true features: the unit is chosen on some documents, measured on others.

Choosing the best of thousands of units and the best threshold flatters on the tokens it was chosen
on. A unit may tell a feature by high or by low acts; that too is chosen.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from lmmono.stats.bootstrap import DocumentDraws, ratio

UNITS_AT_ONCE = 256
CANDIDATES = 16
"""Units tried for the best F1: so many by correlation, and so many by AUROC."""

Codes = Num[ndarray, "n units"]
Truth = Bool[ndarray, "n features"]
Drawn = Float[ndarray, "one_plus_resamples features"]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The units chosen for each feature; -1 where none is left."""

    known: Bool[ndarray, " features"]
    """Whether some of the tokens had the feature, and some had not; else nothing is chosen."""
    matched: Int[ndarray, " features"]
    """Unit of the one-to-one match with the largest sum of correlations, in size."""
    matched_sign: Float[ndarray, " features"]
    """1 where its acts rise with the feature, -1 where they fall."""
    ranked: Int[ndarray, " features"]
    """Unit of the best AUROC."""
    ranked_sign: Float[ndarray, " features"]
    """1 where high acts tell the feature, -1 where low ones do."""
    split: Int[ndarray, " features"]
    """Unit of the best F1."""
    split_sign: Float[ndarray, " features"]
    """As `ranked_sign`."""
    threshold: Float[ndarray, " features"]
    """The feature is said to be there where sign x act is above."""


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """Measures per feature on all documents, then on each redraw; NaN where not defined."""

    correlation: Drawn
    """Correlation of the matched unit with the feature, its sign chosen before."""
    auroc: Drawn
    """Chance that the unit's act is higher on a token with the feature than on one without."""
    f1: Drawn
    """2 TP / (2 TP + FP + FN) at the threshold."""


def scan(
    codes: Codes, truth: Truth
) -> tuple[Float[ndarray, "features units"], Float[ndarray, "features units"]]:
    """Return the correlation and the AUROC of every unit with every feature.

    A constant unit has correlation 0 and AUROC 0.5, a feature of all tokens or of none has NaN.
    """
    n, n_units = codes.shape
    there = truth.astype(np.float64)
    n_there = there.sum(axis=0)[:, None]
    centred = there - there.mean(axis=0)
    size = np.sqrt(np.square(centred).sum(axis=0))[:, None]
    correlation = np.empty((truth.shape[1], n_units))
    auroc = np.empty_like(correlation)
    for first in range(0, n_units, UNITS_AT_ONCE):
        part = slice(first, first + UNITS_AT_ONCE)
        acts = codes[:, part].astype(np.float64)
        acts -= acts.mean(axis=0)
        sizes = np.sqrt(np.square(acts).sum(axis=0))
        correlation[:, part] = centred.T @ acts / np.where(sizes > 0, sizes, np.inf)
        ranks = rankdata(codes[:, part], axis=0)
        above = there.T @ ranks - n_there * (n_there + 1) / 2
        auroc[:, part] = above / np.maximum(n_there * (n - n_there), 1.0)
    defined = size > 0
    correlation = correlation / np.where(defined, size, 1.0)
    return np.where(defined, correlation, np.nan), np.where(defined, auroc, np.nan)


def choose(
    codes: Codes,
    truth: Truth,
    correlation: Float[ndarray, "features units"],
    auroc: Float[ndarray, "features units"],
) -> Choice:
    """Choose a unit per feature, by each measure; what `scan` found of the same tokens is given."""
    n_features = truth.shape[1]
    size, lean = np.abs(np.nan_to_num(correlation)), np.abs(np.nan_to_num(auroc - 0.5))
    matched = np.full(n_features, -1)
    features, units = linear_sum_assignment(size, maximize=True)
    matched[features] = units
    ranked = lean.argmax(axis=1)
    every = np.arange(n_features)
    n_tried = min(CANDIDATES, size.shape[1])
    tried = [np.argpartition(-each, n_tried - 1, axis=1)[:, :n_tried] for each in (size, lean)]
    trials = np.zeros(size.shape, bool)
    trials[every[:, None], np.concatenate(tried, axis=1)] = True
    split, split_sign, threshold = _best_splits(codes, truth, trials)
    return Choice(
        known=~np.isnan(correlation[:, 0]),
        matched=matched,
        matched_sign=_sign(correlation[every, matched]),
        ranked=ranked,
        ranked_sign=_sign(auroc[every, ranked] - 0.5),
        split=split,
        split_sign=split_sign,
        threshold=threshold,
    )


def best_thresholds(
    acts: Num[ndarray, " n"], truth: Truth
) -> tuple[Float[ndarray, " features"], Float[ndarray, " features"]]:
    """Return the largest F1 of `act > threshold` for each feature, and a threshold that gives it.

    The threshold lies midway between two acts; without any act below it is -inf.

    >>> best_thresholds(np.array([0.0, 0.0, 1.0, 3.0]), np.array([[False, False, True, True]]).T)
    (array([1.]), array([0.5]))
    """
    order = np.argsort(-acts, kind="stable")
    acts = acts[order].astype(np.float64)
    below = np.append(acts[1:], -np.inf)
    ends = np.flatnonzero(below < acts)  # equal acts are on one side of every threshold
    hits = np.cumsum(truth[order], axis=0)[ends]
    f1 = 2 * hits / (ends[:, None] + 1 + truth.sum(axis=0))
    best = f1.argmax(axis=0)
    return f1[best, np.arange(truth.shape[1])], (acts + below)[ends[best]] / 2


def measure(
    codes: Codes,
    truth: Truth,
    documents: Int[ndarray, " n"],
    choice: Choice,
    draws: DocumentDraws,
) -> Detection:
    """Measure chosen units on other documents, numbered from 0.

    A feature of no token, or of all, is NaN.
    """
    n_there = truth.sum(axis=0)
    defined = choice.known & (n_there > 0) & (n_there < len(truth))

    def acts_of(units: ndarray, signs: ndarray) -> Float[ndarray, "n features"]:
        return np.where(units >= 0, codes[:, units].astype(np.float64) * signs, 0.0)

    def by_document(columns: list[ndarray]) -> Float[ndarray, "documents features columns"]:
        sums = np.zeros((draws.n_documents, truth.shape[1], len(columns)))
        np.add.at(sums, documents, np.stack(columns, axis=2))
        return sums

    correlation = _correlation(
        draws.totals(by_document(_moments(acts_of(choice.matched, choice.matched_sign), truth)))
    )
    placed = draws.totals(
        by_document(_placements(acts_of(choice.ranked, choice.ranked_sign), truth))
    )
    said = acts_of(choice.split, choice.split_sign) > choice.threshold
    outcomes = [said & truth, said & ~truth, ~said & truth]
    hits, alarms, misses = np.moveaxis(
        draws.totals(by_document([each.astype(np.float64) for each in outcomes])), 2, 0
    )
    f1 = np.where(hits + misses > 0, ratio(2 * hits, 2 * hits + alarms + misses), np.nan)
    return Detection(
        *(np.where(defined, each, np.nan) for each in (correlation, _auroc(placed), f1))
    )


def _best_splits(
    codes: Codes, truth: Truth, tried: Bool[ndarray, "features units"]
) -> tuple[Int[ndarray, " features"], Float[ndarray, " features"], Float[ndarray, " features"]]:
    """Return the unit, sign and threshold of each feature's largest F1 among the units it tries."""
    n_features = truth.shape[1]
    f1, units, signs = np.full(n_features, -1.0), np.zeros(n_features, int), np.ones(n_features)
    thresholds = np.full(n_features, -np.inf)
    for unit in np.flatnonzero(tried.any(axis=0)).tolist():
        features = np.flatnonzero(tried[:, unit])
        for sign in (1.0, -1.0):
            found, cuts = best_thresholds(sign * codes[:, unit], truth[:, features])
            better = found > f1[features]
            at = features[better]
            f1[at], units[at], signs[at], thresholds[at] = found[better], unit, sign, cuts[better]
    return units, signs, thresholds


def _sign(values: Float[ndarray, " features"]) -> Float[ndarray, " features"]:
    return np.where(values < 0, -1.0, 1.0)


def _moments(acts: Float[ndarray, "n features"], truth: Truth) -> list[ndarray]:
    """Return what a correlation is made of, per token; acts are centred against cancellation."""
    acts = acts - acts.mean(axis=0)
    there = truth.astype(np.float64)
    return [np.ones_like(acts), there, acts, acts * acts, there * acts]


def _correlation(sums: Float[ndarray, "draws features 5"]) -> Drawn:
    n, there, act, squares, both = np.moveaxis(sums, 2, 0)
    spread = np.maximum(n * squares - act * act, 0.0)
    silent = spread <= 1e-12 * np.maximum(n * squares, np.finfo(np.float64).tiny)
    size = np.sqrt(np.maximum(n * there - there * there, 0.0) * spread)
    found = ratio(n * both - there * act, size)
    return np.where(silent, 0.0, found)  # a unit that is constant tells nothing


def _placements(acts: Float[ndarray, "n features"], truth: Truth) -> list[ndarray]:
    """Return per token: where its act lies among those of the other kind, and its kind.

    Sums of placements over documents give the interval of an AUROC whose tokens hang together
    (Obuchowski 1997), as a ratio of sums each.
    """
    ranks, above, below = rankdata(acts, axis=0), np.zeros_like(acts), np.zeros_like(acts)
    for feature, there in enumerate(truth.T):
        if there.any() and not there.all():
            for kind, column in ((there, above), (~there, below)):
                own = rankdata(acts[kind, feature])
                column[kind, feature] = (ranks[kind, feature] - own) / (~kind).sum()
    there = truth.astype(np.float64)
    return [above, there, np.where(truth, 0.0, 1.0 - below), 1.0 - there]


def _auroc(sums: Float[ndarray, "draws features 4"]) -> Drawn:
    above, n_there, below, n_other = np.moveaxis(sums, 2, 0)
    of_there, of_other = ratio(above, n_there), ratio(below, n_other)
    return of_there + of_other - of_there[:1]
