"""A bag of words on the same texts and labels: what a probe of any code must be held against.

A probe on a small model's stream may lose to counting words, and a code that is more robust than a
stream which is worse than words says little. So these rows stand beside those of the codes, of the
same draws: words weighted by how rare they are, logistic regression, its penalty chosen on the
validation labels, which are as noisy as the training labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from lmmono.registry.suites import BAG_OF_WORDS, Suite
from lmmono.suites.bench import Bench, Condition, Key, Measurement, Rows, judged_texts
from lmmono.suites.suite_draws import SuiteDraw, drawn, judged_parts

PENALTIES = (0.1, 1.0, 10.0, 100.0)
"""Inverse penalties (scikit-learn's C) that are tried."""


@dataclass(frozen=True, slots=True)
class BagOfWords:
    """The words of a text, in no order, with a logistic regression."""

    label: str = BAG_OF_WORDS
    learner: str = "logistic"

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """Nothing of the model; what it is and what is tried."""
        return [], [self.label, list(PENALTIES)]

    @property
    def facts(self) -> dict[str, Any]:
        """It reads all words."""
        return {"budget": "full"}


def word_rows(bench: Bench, suite: Suite, stored: Mapping[Key, str]) -> Iterator[Rows]:
    """Yield the rows of a suite that are not stored yet, a draw at a time."""
    parts = {
        part: drawn(bench.task, part, bench.settings.n_test)
        for part in judged_parts(suite, bench.task)
    }
    judged = {part: judged_texts(part, indices) for part, indices in parts.items()}
    entrant = BagOfWords()
    for draw in suite.load()(bench.task, bench.settings):
        conditions = [
            Condition(suite, entrant, draw, part, texts, draw.corruption, draw.level)
            for part, texts in judged.items()
        ]
        short = [about for about in conditions if bench.lacks(about, stored)]
        if not short:
            continue
        if draw.failure:
            yield [bench.row(about, Measurement(failure=draw.failure)) for about in short]
            continue
        right, facts, failure = _right(bench, draw, {a.split: parts[a.split] for a in short})
        yield [
            bench.row(about, Measurement.of(right[about.split], failure, facts)) for about in short
        ]


def _right(
    bench: Bench, draw: SuiteDraw, parts: Mapping[str, Int64[np.ndarray, " n"]]
) -> tuple[dict[str, Bool[np.ndarray, " n"]], dict[str, Any], str | None]:
    """Return which texts of each part are right, what was chosen, and why there is nothing."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    nothing = {part: np.zeros(len(indices), bool) for part, indices in parts.items()}
    if len(np.unique(draw.labels)) < 2:
        return nothing, {}, "one_class"
    # words of one letter too, and marks: the planted language has such
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    train = words.fit_transform(_texts(bench, "train", draw.train))
    val = words.transform(_texts(bench, "val", draw.val))
    best: tuple[float, float, Any] | None = None
    for c in PENALTIES:
        model = LogisticRegression(C=c, max_iter=2_000).fit(train, draw.labels)
        score = float(np.mean(model.predict(val) == draw.val_labels)) if len(draw.val) else 0.0
        if best is None or score > best[0]:
            best = score, c, model
    assert best is not None
    right: dict[str, Bool[np.ndarray, " n"]] = {}
    for part, indices in parts.items():
        labels = bench.task.part(part).labels[indices]
        right[part] = nothing[part]
        if len(labels):
            predictions = best[2].predict(words.transform(_texts(bench, part, indices)))
            right[part] = np.asarray(predictions == labels, bool)
    return right, {"c": best[1], "n_words": len(words.vocabulary_)}, None


def _texts(bench: Bench, part: str, indices: Int64[np.ndarray, " n"]) -> Sequence[str]:
    texts = bench.task.part(part).texts
    return [texts[i] for i in indices.tolist()]
