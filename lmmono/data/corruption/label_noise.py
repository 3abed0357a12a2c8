"""Label noise of an exact amount: which labels flip, and to what, is drawn by seed alone.

Nothing else enters, so every learner and feature family meets the same noise at a seed; a higher
rate flips what a lower one does, to the same classes, and more. That noise was really put in is
asserted here and not left to whoever reads the labels.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from lmmono.errors import DataError, nearest
from lmmono.registry.suites import LABEL_NOISE, LabelNoise

Array = TypeVar("Array")

FOLDS = 5
"""Folds of the weak model, fewer where a class has fewer texts."""

_ORDER, _TARGET, _RACE = 1, 2, 3  # streams of one seed: which flip, to what, who is unsure first


@dataclass(frozen=True, slots=True, eq=False)
class NoisyLabels:
    """Labels with noise in them."""

    labels: Int64[np.ndarray, "n"]
    """The labels to learn from."""
    flipped: Bool[np.ndarray, "n"]
    """Where they differ from the clean ones."""
    kind: LabelNoise
    """How they were made."""
    rate: float
    """Share of labels asked to be flipped; for `matrix` and `real` as found, the share it gives."""
    confusion: Int64[np.ndarray, "n_classes n_classes"]
    """How many of each clean class (row) got each label (column)."""

    @property
    def learnable(self) -> bool:
        """Whether each class that occurs is still the commonest among the labels of its texts.

        Where it is not, more data leads a learner further from the truth.
        """
        others = self.confusion.copy()
        np.fill_diagonal(others, -1)
        occurs = self.confusion.sum(axis=1) > 0
        return bool((np.diag(self.confusion) > others.max(axis=1))[occurs].all())


@dataclass(frozen=True, slots=True, eq=False)
class _Noise:
    """What a kind of noise is made from: all checked."""

    labels: Int64[np.ndarray, "n"]
    n_classes: int
    seed: int
    rate: float | None

    @property
    def count(self) -> int:
        """Number of labels to flip."""
        assert self.rate is not None
        return round(self.rate * len(self.labels))

    def order(self) -> Int64[np.ndarray, "n"]:
        """Return all indices in the order in which they flip: the same for every rate."""
        rng = np.random.default_rng((self.seed, _ORDER))
        return rng.permutation(len(self.labels)).astype(np.int64)

    def uniform(self, stream: int) -> Float64[np.ndarray, "n"]:
        """Return a number in [0, 1) per label: the same for every rate."""
        return np.random.default_rng((self.seed, stream)).random(len(self.labels))

    def first(self, order: Int64[np.ndarray, "m"]) -> Bool[np.ndarray, "n"]:
        """Return the mask of as many labels as flip, from the front of an order."""
        mask = np.zeros(len(self.labels), bool)
        mask[order[: self.count]] = True
        return mask

    def any_other(self) -> Int64[np.ndarray, "n"]:
        """Return another class for each label, all equally likely."""
        step = 1 + np.floor(self.uniform(_TARGET) * (self.n_classes - 1)).astype(np.int64)
        return (self.labels + step) % self.n_classes


def signal_margin(rate: float, n_classes: int) -> float:
    """Return rho = 1 - rate C / (C - 1): what symmetric noise leaves of the signal of C classes.

    Noise of equal margin is equally hard for two and for a hundred classes; at 0 and below nothing
    can be learned.

    >>> signal_margin(0.45, 2) == signal_margin(0.675, 4)
    True
    """
    return 1.0 - rate * n_classes / (n_classes - 1)


def rate_at_margin(margin: float, n_classes: int) -> float:
    """Return the rate of symmetric noise that leaves a signal margin; see `signal_margin`.

    >>> rate_at_margin(0.4, 4)
    0.45
    """
    return round((1.0 - margin) * (n_classes - 1) / n_classes, 12)


def find_label_noise(name: str) -> LabelNoise:
    """Return the kind of a name.

    Raises:
        DataError: There is none; says which are near.
    """
    for kind in LABEL_NOISE:
        if kind == name:
            return kind
    raise DataError(f"label noise {name!r} is not known; {nearest(name, LABEL_NOISE)}")


def corrupt_labels(
    labels: Int64[np.ndarray, "n"],
    kind: str,
    rate: float | None,
    *,
    n_classes: int,
    seed: int,
    matrix: Float64[np.ndarray, "c c"] | None = None,
    margins: Float64[np.ndarray, "_"] | None = None,
    second: Int64[np.ndarray, "_"] | None = None,
    noisy: Int64[np.ndarray, "_"] | None = None,
) -> NoisyLabels:
    """Return labels of which exactly `round(rate * n)` are another class than their own.

    At rate 0 they are the clean labels. Under `matrix` each class flips `round(its share * its
    size)` times, so the total may differ from the rate by half a label per class.

    Args:
        labels: Clean labels, 0 to n_classes - 1.
        kind: How to make noise, see `LabelNoise`.
        rate: Share of labels to flip, in [0, 1]; None takes what `matrix` or `noisy` gives.
        n_classes: Number of classes.
        seed: Seed of which labels flip and to what.
        matrix: For `matrix`: probability of each label (column) by clean class (row). A rate
            scales what is off the diagonal to the share asked for.
        margins: For `instance`: by how much a weak model prefers the own class; small and negative
            ones flip first, with odds that fall by e per standard deviation.
        second: For `annotator`, and `instance` if given: the class that each label flips to.
        noisy: For `real`: the labels that were really given. A rate takes a part of their errors.

    Raises:
        DataError: An unknown kind, a rate outside [0, 1] or one that flips no label though it is
            not 0, labels that are no class, an input that the kind needs and that is missing or
            does not fit.
    """
    kind = find_label_noise(kind)
    _check(labels, kind, rate, n_classes)
    noise = _Noise(labels, n_classes, seed, rate)
    match kind:
        case "matrix":
            mask, target = _by_matrix(noise, _required("matrix", kind, matrix))
        case "real":
            mask, target = _real(noise, _required("noisy", kind, noisy))
        case "pair_flip":
            mask, target = noise.first(noise.order()), (labels + 1) % n_classes
        case "annotator":
            mask, target = (
                noise.first(noise.order()),
                _second(noise, _required("second", kind, second)),
            )
        case "instance":
            mask = noise.first(_unsure_first(noise, _required("margins", kind, margins)))
            target = noise.any_other() if second is None else _second(noise, second)
        case "symmetric":
            mask, target = noise.first(noise.order()), noise.any_other()
    return _noisy_labels(noise, kind, mask, target)


def _noisy_labels(
    noise: _Noise,
    kind: LabelNoise,
    mask: Bool[np.ndarray, "n"],
    target: Int64[np.ndarray, "n"],
) -> NoisyLabels:
    labels = np.where(mask, target, noise.labels)
    count = int(np.count_nonzero(labels != noise.labels))
    assert np.array_equal(labels != noise.labels, mask), "a label was flipped to its own class"
    assert labels.min() >= 0 and labels.max() < noise.n_classes, "a label was flipped to no class"
    if kind != "matrix" and noise.rate is not None:
        assert count == noise.count, f"{count} labels differ, want {noise.count}"
    if noise.rate and not count:
        raise DataError(
            f"{kind} noise: rate {noise.rate} of {len(labels)} labels flips none; want a rate "
            f"of at least {1 / len(labels):.3g}, or 0"
        )
    confusion = np.zeros((noise.n_classes, noise.n_classes), np.int64)
    np.add.at(confusion, (noise.labels, labels), 1)
    rate = count / len(labels) if noise.rate is None else noise.rate
    return NoisyLabels(labels, mask, kind, rate, confusion)


def _check(
    labels: Int64[np.ndarray, "n"], kind: LabelNoise, rate: float | None, n_classes: int
) -> None:
    if n_classes < 2:
        raise DataError(f"{kind} noise: {n_classes} class: there is no other to flip to")
    if not len(labels):
        raise DataError(f"{kind} noise: no labels")
    if labels.min() < 0 or labels.max() >= n_classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise DataError(f"{kind} noise: label {wrong} is no class; want 0 to {n_classes - 1}")
    if rate is None and kind not in ("matrix", "real"):
        raise DataError(f"{kind} noise needs a rate")
    if rate is not None and not 0.0 <= rate <= 1.0:
        raise DataError(f"{kind} noise: want a rate in [0, 1], got {rate}")


def _required(name: str, kind: LabelNoise, value: Array | None) -> Array:
    if value is None:
        raise DataError(f"{kind} noise needs `{name}`; see corrupt_labels")
    return value


def _unsure_first(noise: _Noise, margins: Float64[np.ndarray, "_"]) -> Int64[np.ndarray, "n"]:
    """Return the order of a race in which a label's pace is exp(-margin / deviation)."""
    _check_length(noise, "margins", margins)
    if not np.isfinite(margins).all():
        raise DataError("instance noise: `margins` holds numbers that are not finite")
    deviation = float(margins.std()) or 1.0
    waits = np.log(-np.log1p(-noise.uniform(_RACE)) + np.finfo(float).tiny)
    return np.argsort(waits + margins / deviation, kind="stable").astype(np.int64)


def _second(noise: _Noise, second: Int64[np.ndarray, "_"]) -> Int64[np.ndarray, "n"]:
    _check_length(noise, "second", second)
    own = np.flatnonzero(second == noise.labels)
    if len(own):
        raise DataError(
            f"`second` is the own class of {len(own)} labels, the first is label {own[0]}: want "
            "the likeliest of the other classes"
        )
    if second.min() < 0 or second.max() >= noise.n_classes:
        raise DataError(f"`second` holds what is no class; want 0 to {noise.n_classes - 1}")
    return second


def _real(
    noise: _Noise, noisy: Int64[np.ndarray, "_"]
) -> tuple[Bool[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    _check_length(noise, "noisy", noisy)
    errors = noisy != noise.labels
    if not errors.any() and noise.rate != 0.0:
        raise DataError("real noise: `noisy` are the clean labels, there is no noise in them")
    if noise.rate is None:
        return errors, noisy
    if noise.count > np.count_nonzero(errors):
        raise DataError(
            f"real noise: rate {noise.rate} asked for, the set's own is {errors.mean():.3g}; "
            "want no more than that"
        )
    order = noise.order()
    return noise.first(order[errors[order]]), noisy


def _by_matrix(
    noise: _Noise, matrix: Float64[np.ndarray, "c c"]
) -> tuple[Bool[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    sizes = np.bincount(noise.labels, minlength=noise.n_classes)
    others = _off_diagonal(noise, matrix)
    leaving = others.sum(axis=1)
    flips = float(leaving @ sizes) / len(noise.labels)
    if not flips and noise.rate != 0.0:
        raise DataError("matrix noise: the matrix flips no label of these classes")
    scale = 1.0 if noise.rate is None else noise.rate / (flips or 1.0)
    if (scale * leaving[sizes > 0] > 1.0 + 1e-9).any():
        limit = flips / leaving[sizes > 0].max()
        raise DataError(
            f"matrix noise: at rate {noise.rate} a class would flip more than all its labels; "
            f"want a rate of at most {limit:.3g}"
        )
    order, mask = noise.order(), np.zeros(len(noise.labels), bool)
    for label, size in enumerate(sizes.tolist()):
        members = order[noise.labels[order] == label]
        mask[members[: round(scale * float(leaving[label]) * size)]] = True
    upper = others.cumsum(axis=1)
    upper /= np.where(leaving > 0, upper[:, -1], 1.0)[:, None]
    drawn = (noise.uniform(_TARGET)[:, None] >= upper[noise.labels]).sum(axis=1)
    return mask, np.minimum(drawn, noise.n_classes - 1).astype(np.int64)


def _off_diagonal(noise: _Noise, matrix: Float64[np.ndarray, "c c"]) -> Float64[np.ndarray, "c c"]:
    if matrix.shape != (noise.n_classes, noise.n_classes):
        raise DataError(
            f"matrix noise: want {noise.n_classes} x {noise.n_classes}, got "
            f"{' x '.join(map(str, matrix.shape))}"
        )
    if (matrix < 0).any() or not np.allclose(matrix.sum(axis=1), 1.0, atol=1e-6):
        raise DataError("matrix noise: want probabilities whose rows sum to 1")
    others = matrix.copy()
    np.fill_diagonal(others, 0.0)
    return others


def _check_length(noise: _Noise, name: str, values: np.ndarray) -> None:
    if len(values) != len(noise.labels):
        raise DataError(f"{len(noise.labels)} labels but {len(values)} {name}: want one each")


@dataclass(frozen=True, slots=True, eq=False)
class Opinions:
    """What a weak model thinks of labelled texts that it has not seen while learning.

    Instance and annotator noise follow its doubts. It reads words, not the activations that are
    studied, so this noise favours no feature family.
    """

    margins: Float64[np.ndarray, "n"]
    """Probability of the own class minus that of the likeliest other; negative where it errs."""
    second: Int64[np.ndarray, "n"]
    """Likeliest class that is not the own one."""


def weak_opinions(
    texts: tuple[str, ...], labels: Int64[np.ndarray, "n"], *, n_classes: int, seed: int = 0
) -> Opinions:
    """Return a weak model's margins and second choices, out of fold.

    The model is a logistic regression on counts of words and pairs of words, hashed.

    Args:
        texts: The texts.
        labels: Their clean labels.
        n_classes: Number of classes.
        seed: Seed of the folds.

    Raises:
        DataError: A class has fewer texts than there must be in every fold, two.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    counts = np.bincount(labels, minlength=n_classes)
    folds = int(min(FOLDS, counts[counts > 0].min()))
    if folds < 2:
        raise DataError(
            f"a weak model needs two texts of each class or more, class {int(counts.argmin())} "
            f"has {int(counts.min())}"
        )
    features = HashingVectorizer(n_features=2**14, ngram_range=(1, 2), alternate_sign=False)
    model = LogisticRegression(max_iter=200)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    rows = features.transform(texts)
    out_of_fold: Any = cross_val_predict(model, rows, labels, cv=splits, method="predict_proba")
    probabilities = np.zeros((len(labels), n_classes))
    probabilities[:, np.flatnonzero(counts)] = out_of_fold
    return opinions(probabilities, labels)


def opinions(probabilities: Float64[np.ndarray, "n c"], labels: Int64[np.ndarray, "n"]) -> Opinions:
    """Return the margins and second choices of any model's probabilities."""
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = -np.inf
    second = others.argmax(axis=1).astype(np.int64)
    return Opinions(own - others[rows, second], second)
