"""What a weak model thinks of each text: the doubts that instance and annotator noise follow.

The model reads words, not the activations that are studied, so its noise favours no feature family.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from lmmono.errors import DataError

FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Opinions:
    """A weak model's view of labelled texts that it has not seen while learning."""

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
    held: Any = cross_val_predict(model, rows, labels, cv=splits, method="predict_proba")
    probabilities = np.zeros((len(labels), n_classes))
    probabilities[:, np.flatnonzero(counts)] = held
    return opinions(probabilities, labels)


def opinions(probabilities: Float64[np.ndarray, "n c"], labels: Int64[np.ndarray, "n"]) -> Opinions:
    """Return the margins and second choices of any model's probabilities."""
    rows = np.arange(len(labels))
    own = probabilities[rows, labels]
    others = probabilities.copy()
    others[rows, labels] = -np.inf
    second = others.argmax(axis=1).astype(np.int64)
    return Opinions(own - others[rows, second], second)
