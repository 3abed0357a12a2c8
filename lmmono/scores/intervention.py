"""Does the unit do what its explanation says, and how much does it do at all?

`effect` needs no explanation: the KL of ablating a unit where it fires and of adding its maximum,
and the tokens that it promotes. `intervention` compares the change of all logits under steering,
at the same KL for every unit, with what the explanation's program predicts: that the unit promotes
the tokens which follow those on which it fires (`intervention`), or these themselves
(`intervention_own`). In the spirit of Paulo et al. 2024 (arXiv 2410.13928), there with a language
model that reads the changed text.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import t as student_t

from lmmono.clients.client import Failed
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.corpus_excerpts import PADDING, TokenGrid, read_grid
from lmmono.scores.score_job import Row, ScoreJob, program_of, undefined
from lmmono.scores.steering import UNITS_AT_ONCE, Steered, Steering
from lmmono.stats.estimate import LEVEL
from lmmono.stats.intervals import student_interval

MIN_COUNT = 5
"""Tokens that stand fewer times in the explain split are not predicted."""

N_SHOWN = 8
"""Promoted tokens that a row names."""

METHOD = "jackknife over prompts, Student t"
MEAN_METHOD = "Student t over prompts"


def score_effects(job: ScoreJob) -> list[Row]:
    """Score units by how much they change the next token; needs no explanation."""
    steering, words = Steering(job), read_vocabulary(job.store)
    rows = [_mean_row(job, "ablation_kl", unit, kl) for unit, kl in steering.ablated()]
    alive = [int(unit) for unit in steering.units if (steering.max_act.get(int(unit)) or 0.0) > 0]
    for first in range(0, len(alive), UNITS_AT_ONCE):
        some = alive[first : first + UNITS_AT_ONCE]
        for unit, kl in zip(some, steering.natural(some), strict=True):
            rows.append(_mean_row(job, "steering_kl", unit, kl))
    for control, random in ((None, False), ("random_direction", True)):
        if random and not job.controls:
            continue
        for steered in steering.steered(random):
            row = job.row("steering_strength", steered.unit, control=control)
            row |= {"n": len(steered.kl), "n_documents": steering.n_documents}
            if np.isnan(steered.strength):
                rows.append(row | undefined(Failed("no_effect"), None))
            else:
                details = {"promoted": _promoted(steered, words), "kl": float(steered.kl.mean())}
                rows.append(row | {"value": steered.strength, "details": details})
    return rows


def _mean_row(job: ScoreJob, metric: str, unit: int, kl: Float[ndarray, " prompts"]) -> Row:
    if not len(kl):
        return job.row(metric, unit, n=0, control=None, **undefined(Failed("silent"), 0.0))
    mean, low, high = student_interval([kl.astype(np.float64)])
    row = job.row(metric, unit, n=len(kl), value=mean, control=None, nan_fraction=0.0, n_failures=0)
    if np.isnan(low):
        return row
    return row | {"ci_low": max(low, 0.0), "ci_high": high, "ci_method": MEAN_METHOD}


def _promoted(steered: Steered, words: tuple[str, ...]) -> list[str]:
    order = np.argsort(-steered.changes.mean(axis=0), kind="stable")[:N_SHOWN]
    return [words[token] if token < len(words) else f"[{token}]" for token in order]


def score_interventions(job: ScoreJob) -> list[Row]:
    """Score units by how well their explanation predicts which tokens steering promotes."""
    steering = Steering(job)
    units = [int(unit) for unit in steering.units]
    explained = job.explanations(units)
    grid = read_grid(job.store, "explain")
    predictions = Predictions(grid, steering.prompts.shape[0], _d_vocab(job, grid))
    sides: list[tuple[str | None, str | None, bool]] = [(name, name, False) for name in explained]
    if job.controls:
        sides.append((None, "random_direction", True))
    steered_of = {random: {s.unit: s for s in steering.steered(random)} for random in
             {random for _, _, random in sides}}  # fmt: skip
    rows: list[Row] = []
    for of, control, random in sides:
        for unit, explanation in zip(units, explained[of], strict=True):
            steered = steered_of[random].get(unit)
            rows += _compared(job, unit, explanation, steered, predictions, control)
    return [row | {"n_documents": steering.n_documents} for row in rows]


def _d_vocab(job: ScoreJob, grid: TokenGrid) -> int:
    embedded: int = job.model.get_input_embeddings().weight.shape[0]
    return max(embedded, int(grid.token_ids.max()) + 1)


class Predictions:
    """What explanations predict of the logits, from the bigrams of the explain split."""

    def __init__(self, grid: TokenGrid, n_prompts: int, d_vocab: int) -> None:
        ids = grid.token_ids.astype(np.int64)
        same = (ids[1:] != PADDING) & (ids[:-1] != PADDING)
        same &= (grid.doc_ids[1:] == grid.doc_ids[:-1]) & (np.arange(1, len(ids)) % grid.n_ctx != 0)
        self._first, self._next = ids[:-1][same], ids[1:][same]
        self._counts = np.bincount(ids[ids != PADDING], minlength=d_vocab).astype(np.float64)
        self.known = np.flatnonzero(self._counts >= MIN_COUNT)
        self.n_prompts, self._d_vocab = n_prompts, d_vocab

    def own(self, explanation: Explanation) -> Float[ndarray, " d_vocab"]:
        """Return the program's activation on each token by itself, not below 0."""
        tokens = np.arange(self._d_vocab)[:, None]
        return np.maximum(program_of(explanation).simulate(tokens)[:, 0], 0.0)

    def following(self, explanation: Explanation) -> Float[ndarray, " d_vocab"]:
        """Return ln p(token after the unit's tokens) / p(token), smoothed by one count each.

        The unit's tokens weigh as much as its program's activation exceeds the mean over the text.
        """
        own = self.own(explanation)
        weight = np.maximum(own - (own * self._counts).sum() / self._counts.sum(), 0.0)[self._first]
        if not weight.any():
            return np.zeros(self._d_vocab)
        share = self._counts / self._counts.sum()
        mass = np.bincount(self._next, weight / weight.max(), self._d_vocab)
        smoothed = (mass + self.known.size * share) / (mass.sum() + self.known.size)
        return np.log(np.maximum(smoothed, 1e-12) / np.maximum(share, 1e-12))


def _compared(
    job: ScoreJob,
    unit: int,
    explanation: Explanation,
    steered: Steered | None,
    predictions: Predictions,
    control: str | None,
) -> list[Row]:
    failed = explanation.failed
    if steered is None:
        failed = failed or Failed("silent")
    elif np.isnan(steered.strength):
        failed = failed or Failed("no_effect")
    metrics = ("intervention", "intervention_own")
    counts: Row = {"control": control, "n": predictions.n_prompts}
    if failed is not None or steered is None:
        assert failed is not None
        shared = counts | undefined(failed, 0.0)
        return [job.row(metric, unit, **shared) for metric in metrics]
    counts |= {"n_failures": 0, "details": {"strength": steered.strength}}
    rows: list[Row] = []
    both = predictions.following(explanation), predictions.own(explanation)
    for metric, predicted in zip(metrics, both, strict=True):
        value, low, high = correlation(
            steered.changes[:, predictions.known].astype(np.float64), predicted[predictions.known]
        )
        row = job.row(metric, unit, value=value, nan_fraction=0.0, **counts)
        if np.isnan(value):
            row |= {"value": 0.0, "nan_fraction": 1.0}
        elif not np.isnan(low):
            row |= {"ci_low": low, "ci_high": high, "ci_method": METHOD}
        rows.append(row)
    return rows


def correlation(
    changes: Float[ndarray, "prompts tokens"], predicted: Float[ndarray, " tokens"]
) -> tuple[float, float, float]:
    """Return Pearson's r of the mean change with the prediction, and its interval over prompts.

    NaN where the prediction is constant. The interval is on Fisher's z.
    """
    total, n = changes.sum(axis=0), len(changes)
    value = _pearson(total, predicted)
    if n < 3 or np.isnan(value):
        return value, float("nan"), float("nan")
    left = _straight(_pearson(total - changes[i], predicted) for i in range(n))
    error = np.sqrt((n - 1) / n * np.square(left - left.mean()).sum())
    half = float(student_t.ppf((1 + LEVEL) / 2, n - 1)) * error
    centre = _straight([value])[0]
    return value, float(np.tanh(centre - half)), float(np.tanh(centre + half))


def _straight(values: Iterable[float]) -> Float[ndarray, " n"]:
    return np.arctanh(np.clip(np.array(list(values)), -1 + 1e-12, 1 - 1e-12))


def _pearson(a: ndarray, b: ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale > 1e-12 else float("nan")
