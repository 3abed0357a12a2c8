"""What FLINT's attributes are worth, as numbers on arrays; each has its record in `METRICS`.

alpha_jx = phi_j(x) w_jc for c, the class that the interpreter gives x; relevance r_jx =
alpha_jx / max_i |alpha_ix|, in [-1, 1]. Explanations are of texts on which both models
agree. Formulas of arXiv 2010.09345; where text and code differ the docstring says what is done.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from scipy.optimize import linear_sum_assignment

from lmmono.stats.formulas import entropies

TAUS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Thresholds 1 / tau of the paper's conciseness curve."""

PAIR = 0.2
"""Least global relevance of a class-attribute pair that is shown: the paper, natural images."""

Attributes = Float[ndarray, "n attribute"]
Relevance = Float[ndarray, "n attribute"]
Matrix = Float[ndarray, "c attribute"]


def contributions(
    phi: Attributes, weight: Float[ndarray, "attribute c"], classes: Int64[ndarray, " n"]
) -> Relevance:
    """Return alpha: what each attribute adds to the score of a text's class; sums to that score."""
    return phi * weight.T[classes]


def relevance(alpha: Relevance) -> Relevance:
    """Return alpha over its largest magnitude in the row; 0 in a row where nothing contributes.

    The authors' global path divides by the largest value instead, which differs only where that is
    not the largest magnitude.
    """
    most = np.abs(alpha).max(axis=1, keepdims=True)
    return np.divide(alpha, most, out=np.zeros_like(alpha), where=most > 0)


def global_relevance(
    r: Relevance, classes: Int64[ndarray, " n"], agree: Bool[ndarray, " n"], n_classes: int
) -> Matrix:
    """Return the mean relevance over the texts of each class on which g and f agree.

    The paper wants agreement, its code does not ask for it. NaN for a class that no text has.
    """
    matrix = np.full((n_classes, r.shape[1]), np.nan)
    for label in range(n_classes):
        of_class = agree & (classes == label)
        if of_class.any():
            matrix[label] = r[of_class].mean(axis=0)
    return matrix


def relevant(
    r: Float[ndarray, "*batch attribute"], tau: float
) -> Bool[ndarray, "*batch attribute"]:
    """Return which attributes explain each text: r > 1 / tau, so nothing that speaks against."""
    return r > 1.0 / tau


def conciseness_at(r: Relevance, tau: float) -> float:
    """Return the mean number of attributes with r > 1 / tau; below 1 where absences explain.

    The authors' script counts alpha > max alpha / tau, their notebook |alpha|; r > 1 / tau it is
    here, with r over the largest magnitude.
    """
    return float(relevant(r, tau).sum(axis=1).mean()) if len(r) else float("nan")


def fidelity(
    ours: Float[ndarray, "n c"], theirs: Float[ndarray, "n c"], where: ndarray | None = None
) -> tuple[float, int]:
    """Return the share of texts that two models put in the same class, and how many texts.

    Args:
        ours: Scores, logits or log-probabilities of the interpreter.
        theirs: The same of the predictor.
        where: Texts that count, such as those that the predictor gets wrong; None counts all.
    """
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    same = same if where is None else same[where]
    return (float(same.mean()), len(same)) if len(same) else (float("nan"), 0)


def divergence(log_p: Float[ndarray, "n c"], log_q: Float[ndarray, "n c"]) -> float:
    """Return the mean KL(p || q) in nats, p the predictor's and q the interpreter's."""
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


@dataclass(frozen=True, slots=True)
class Use:
    """How the attributes are used over texts."""

    dead: float
    """Share of attributes that no text has above 0."""
    effective: float
    """exp of the entropy of mean phi_j: how many attributes of equal mean it comes to; NaN if all
    are dead."""
    exclusivity: float
    """Mean over used attributes of the largest positive global relevance over their sum; 1 where
    every attribute speaks for one class. NaN where none speaks for any."""
    redundancy: float
    """Mean over live attributes of the largest |Pearson r| with another one; NaN below two."""
    absent: float
    """Share of texts whose largest contribution is negative: explained by absence."""


def use(phi: Attributes, r: Float[ndarray, "agreed attribute"], matrix: Matrix) -> Use:
    """Return the use of attributes over texts; `r` is of those on which both models agree."""
    lives = phi.max(axis=0, initial=0.0) > 0
    effective = float(np.exp(entropies(phi.mean(axis=0).astype(np.float64))))
    positive = np.nan_to_num(matrix).clip(min=0.0)
    total = positive.sum(axis=0)
    speaks = total > 0
    exclusivity = (positive.max(axis=0)[speaks] / total[speaks]).mean() if speaks.any() else np.nan
    varies = phi.std(axis=0) > 0
    redundancy = np.nan
    if varies.sum() > 1:
        correlation = np.abs(np.corrcoef(phi[:, varies].T.astype(np.float64)))
        np.fill_diagonal(correlation, 0.0)
        redundancy = correlation.max(axis=1).mean()
    absent = float((r.max(axis=1) < 1.0).mean()) if len(r) else float("nan")
    return Use(1.0 - float(lives.mean()), effective, float(exclusivity), float(redundancy), absent)


def matched_correlation(ours: Attributes, theirs: Float[ndarray, "n _"]) -> float:
    """Return the mean correlation of columns matched one to one: stability over two seeds.

    Divided by the smaller number of columns; a column that does not vary correlates with none.
    """
    correlation = _correlations(ours, theirs)
    rows, columns = linear_sum_assignment(-correlation)
    return float(correlation[rows, columns].mean())


def _correlations(
    ours: Float[ndarray, "n a"], theirs: Float[ndarray, "n b"]
) -> Float[ndarray, "a b"]:
    def standard(values: ndarray) -> ndarray:
        centred = values.astype(np.float64) - values.mean(axis=0)
        norm = np.linalg.norm(centred, axis=0)
        return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 0)

    return standard(ours).T @ standard(theirs)


def flips(ours: Relevance, theirs: Relevance) -> float:
    """Return the share of texts whose most relevant attribute is another one after an edit."""
    return float((ours.argmax(axis=1) != theirs.argmax(axis=1)).mean())


def overlap(ours: Relevance, theirs: Relevance, tau: float) -> float:
    """Return the mean Jaccard index of {j: r > 1 / tau} before and after; 1 if both are empty."""
    before, after = relevant(ours, tau), relevant(theirs, tau)
    either = (before | after).sum(axis=1)
    both = (before & after).sum(axis=1)
    return float(np.divide(both, either, out=np.ones(len(both)), where=either > 0).mean())


def attribute_distance(ours: Attributes, theirs: Attributes) -> Float[ndarray, " n"]:
    """Return D_Phi = |Phi(x) - Phi(x')|_1 / (|Phi(x)|_1 + |Phi(x')|_1 + 1e-6), in [0, 1]."""
    return np.abs(ours - theirs).sum(axis=1) / (
        np.abs(ours).sum(axis=1) + np.abs(theirs).sum(axis=1) + 1e-6
    )


def relevance_distance(ours: Relevance, theirs: Relevance) -> Float[ndarray, " n"]:
    """Return D_r = 1 - cos(r(x), r(x')); 1 where one of the two is 0."""
    dot = (ours * theirs).sum(axis=1)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return 1.0 - np.divide(dot, norms, out=np.zeros_like(dot), where=norms > 0)


def matched_on_halves(ours: Attributes, theirs: Float[ndarray, "n b"], *, seed: int = 0) -> float:
    """Return the mean correlation of each of `theirs` with one of `ours`, matched one to one.

    Matches and signs are chosen on half of the texts and measured on the other half; a column that
    does not vary there has 0.
    """
    order = np.random.default_rng(seed).permutation(len(ours))
    first, second = np.array_split(order, 2)
    chosen = _correlations(ours[first], theirs[first])
    rows, columns = linear_sum_assignment(-np.abs(chosen))
    held_out = _correlations(ours[second], theirs[second])[rows, columns]
    return float((np.sign(chosen[rows, columns]) * held_out).sum() / theirs.shape[1])
