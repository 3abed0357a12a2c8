"""`population`: what an explanation's program predicts on every stored token, against the truth.

No record is drawn, so a unit that fires on one token of ten thousand is scored on all of its
firing and on all that is predicted beside it. Of some eighteen measures of how a unit follows a
concept only F1, IoU, AUPRC, cosine and Pearson over all inputs notice both halved and doubled
labels of rare units (NeuronEval, arXiv 2506.05774).

A token counts as predicted where the program predicts more than a threshold, that of the best F1
on split `explain`. All that is counted on split `score` is summed by document, and documents are
what the intervals draw:

    F1, IoU, precision, recall   ratios of sums: delta method, four more documents added
    cosine, Pearson              delete-one-document jackknife on Fisher's z
    AUPRC                        infinitesimal jackknife over documents on the logit scale

No percentile bootstrap: over few documents it covers less (`tests/test_coverage.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import activation_store as astore
from activation_store.compiled import compiled
from lmmono.clients.client import Failed
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation, Program
from lmmono.records.corpus_excerpts import PADDING, TokenGrid, cut, left_out_cells, read_grid
from lmmono.records.unit_rows import read_unit_rows
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import PopulationSettings
from lmmono.scores.score_job import Row, ScoreJob, over_documents, undefined
from lmmono.stats.intervals import Z, jackknife_interval, ratio_interval, student_quantile
from lmmono.types import Split

RATIO_METHOD = "delta method over documents, four more added (Agresti and Coull), Student t"
JACKKNIFE_METHOD = "jackknife over documents, Student t on Fisher's z"
AUPRC_METHOD = "infinitesimal jackknife over documents, Student t on the logit scale"

RATIOS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "population_f1": ((2, 0, 0), (2, 1, 1)),
    "population_precision": ((1, 0, 0), (1, 1, 0)),
    "population_recall": ((1, 0, 0), (1, 0, 1)),
    "population_iou": ((1, 0, 0), (1, 1, 1)),
}
"""Numerator and denominator of each ratio, as multiples of true positives, false positives and
false negatives."""


@dataclass(frozen=True)
class StoredTokens:
    """Every stored token of a split, in stored order."""

    grid: TokenGrid
    """Where they stand."""
    window: int
    """Most tokens that a program reads at once."""
    left_out: Bool[ndarray, " cells"] | None = None
    """Cells whose tokens do not count, though programs read them; None for no cell."""

    @cached_property
    def cells(self) -> Int[ndarray, " tokens"]:
        """Cell of each token."""
        is_token = self.grid.token_ids != PADDING
        return np.flatnonzero(is_token if self.left_out is None else is_token & ~self.left_out)

    @cached_property
    def place(self) -> Int[ndarray, " cells"]:
        """Number of the token in each cell; -1 for none."""
        place = np.full(len(self.grid.token_ids), -1, np.int32)
        place[self.cells] = np.arange(len(self.cells), dtype=np.int32)
        return place

    @cached_property
    def ids(self) -> Int[ndarray, " tokens"]:
        """Id of each token."""
        return self.grid.token_ids[self.cells]

    @cached_property
    def documents(self) -> Int[ndarray, " tokens"]:
        """Number of each token's document, from 0."""
        doc_ids = self.grid.doc_ids[self.cells]
        return np.unique(doc_ids, return_inverse=True)[1].astype(np.int32)

    @cached_property
    def n_documents(self) -> int:
        """Documents of the split."""
        return int(self.documents.max()) + 1

    @cached_property
    def of_id(self) -> Int[ndarray, " vocabulary"]:
        """How many tokens have each id."""
        return np.bincount(self.ids)

    @cached_property
    def windows(self) -> Int[ndarray, "windows window"]:
        """The same tokens cut into windows of one document each, as records are; all of them."""
        return cut(self.grid, self.window, 1, repeats=True).token_ids

    def predicted(self, program: Program) -> "Levels":
        """Return what a program predicts on every token."""
        if program.reads_one_token:  # a table of the vocabulary says all
            present = np.flatnonzero(self.of_id)
            values, inverse = _ranked(program.simulate(present[None, :].astype(np.int32))[0])
            level_of_id = np.zeros(len(self.of_id), np.int32)
            level_of_id[present] = inverse
            n_tokens = np.bincount(inverse, self.of_id[present], len(values))
            return Levels(values, level_of_id[self.ids], n_tokens)
        acts = program.simulate(self.windows)[self.windows != PADDING]
        if self.left_out is not None:  # the windows hold all tokens, in their order
            acts = acts[~self.left_out[self.grid.token_ids != PADDING]]
        values, inverse = _ranked(acts)
        n_tokens = np.bincount(inverse, minlength=len(values)).astype(np.float64)
        return Levels(values, inverse, n_tokens)


def _ranked(acts: Float[ndarray, " n"]) -> tuple[ndarray, ndarray]:
    """Return the distinct values, ascending, and which of them each act is."""
    values, inverse = np.unique(np.asarray(acts, np.float64), return_inverse=True)
    return values, inverse.reshape(-1).astype(np.int32)


def read_tokens(
    store: astore.Store, split: Split, window: int, hook: str | None = None
) -> StoredTokens:
    """Read every stored token of a split; with a hook without those that its capture left out.

    Raises:
        ExplainError: The store has none.
    """
    grid = read_grid(store, split)
    return StoredTokens(grid, window, None if hook is None else left_out_cells(store, hook, grid))


@dataclass(frozen=True, slots=True)
class Levels:
    """What a program predicts on the tokens of a split: its distinct values, and where they are."""

    values: Float[ndarray, " levels"]
    """Predicted activations, ascending."""
    of_token: Int[ndarray, " tokens"]
    """Level of each token."""
    n_tokens: Float[ndarray, " levels"]
    """Tokens of each level."""

    def best_threshold(self, firing: Int[ndarray, " firing"]) -> float:
        """Return the threshold of the best F1, half way between two levels.

        Of equally good ones the middle. Where no token fires, half of the largest prediction.

        Args:
            firing: Tokens on which the unit fires.
        """
        if not len(firing):
            return float(self.values[-1]) / 2
        hits = np.bincount(self.of_token[firing], minlength=len(self.values))
        right, predicted = _from_top(hits), _from_top(self.n_tokens)
        f1 = 2 * right / (predicted + len(firing))
        best = np.flatnonzero(f1 >= f1.max() - 1e-12)
        level = int(best[len(best) // 2])
        below = self.values[level - 1] if level else self.values[0] - 1.0
        return float(below + self.values[level]) / 2


def _from_top(counts: ndarray) -> Float[ndarray, " levels"]:
    """Return, for each level, the sum from there to the highest."""
    return np.cumsum(counts[::-1])[::-1].astype(np.float64)


@dataclass(frozen=True, slots=True)
class PopulationCounts:
    """What a unit does and what is predicted of it, summed by document."""

    sums: Float[ndarray, "documents 6"]
    """n, t, p, tt, pp, tp, as in `lmmono.stats.agreement`."""
    outcomes: Float[ndarray, "documents 3"]
    """True positives, false positives, false negatives."""
    auprc: float
    """Average precision: sum over levels of (R_k - R_{k-1}) P_k."""
    influence: Float[ndarray, " documents"]
    """How much the average precision rises with the weight of each document, over the number of
    documents; sums to 0."""


def count(
    tokens: StoredTokens,
    levels: Levels,
    threshold: float,
    firing: Int[ndarray, " firing"],
    acts: Float[ndarray, " firing"],
) -> PopulationCounts:
    """Sum up one unit and one program on every token.

    With TP and M the true positives and all tokens at or above a level, the average precision is
    the mean over firing tokens of TP / M at their level. A document's weight moves it through its
    own firing tokens, through TP of all that lie below them, and through M of all that lie below
    any of its tokens.
    """
    hits = np.bincount(levels.of_token[firing], minlength=len(levels.values)).astype(np.float64)
    right, n_predicted = _from_top(hits), np.maximum(_from_top(levels.n_tokens), 1.0)
    precision = right / n_predicted
    by_right, by_predicted = (
        np.cumsum(hits / n_predicted),
        np.cumsum(hits * precision / n_predicted),
    )
    first = int(np.searchsorted(levels.values, threshold, side="right"))
    everywhere = np.zeros((tokens.n_documents, 5))
    _sum_tokens(levels.of_token, tokens.documents, levels.values, first, by_predicted, everywhere)
    firing_sums = np.zeros((tokens.n_documents, 6))
    gain = precision + by_right
    _sum_firing(
        firing, acts, levels.of_token, tokens.documents, levels.values, first, gain, firing_sums
    )
    n, p, pp, said_here, lost = everywhere.T
    n_firing, t, tt, tp, both, gained = firing_sums.T
    auprc, influence = np.nan, np.zeros(tokens.n_documents)
    if len(firing):
        auprc = float((hits * precision).sum()) / len(firing)
        influence = (gained - lost - auprc * n_firing) / len(firing)
    return PopulationCounts(
        np.stack([n, t, p, tt, pp, tp], axis=1),
        np.stack([both, said_here - both, n_firing - both], axis=1),
        auprc,
        influence,
    )


@compiled
@no_type_check
def _sum_tokens(
    levels: ndarray,
    documents: ndarray,
    values: ndarray,
    first: int,
    by_said: ndarray,
    out: ndarray,
) -> None:
    """Add up, by document: tokens, predictions, their squares, predicted tokens, `by_said`."""
    for i in range(len(levels)):
        level, row = levels[i], out[documents[i]]
        value = values[level]
        row[0] += 1.0
        row[1] += value
        row[2] += value * value
        row[3] += level >= first
        row[4] += by_said[level]


@compiled
@no_type_check
def _sum_firing(
    firing: ndarray,
    acts: ndarray,
    levels: ndarray,
    documents: ndarray,
    values: ndarray,
    first: int,
    gain: ndarray,
    out: ndarray,
) -> None:
    """Add up, by document of firing tokens: how many, acts, squares, products, predicted, gain."""
    for i in range(len(firing)):
        level, row = levels[firing[i]], out[documents[firing[i]]]
        act = np.float64(acts[i])
        row[0] += 1.0
        row[1] += act
        row[2] += act * act
        row[3] += act * values[level]
        row[4] += level >= first
        row[5] += gain[level]


def cosine(sums: Float[ndarray, "*batch 6"]) -> Float[ndarray, "*batch"]:
    """Return the cosine of truth and prediction over all tokens; NaN where either is all 0."""
    tt, pp, tp = sums[..., 3], sums[..., 4], sums[..., 5]
    defined = (tt > 0) & (pp > 0)
    return np.where(defined, tp / np.sqrt(np.where(defined, tt * pp, 1.0)), np.nan)


def score_population(job: ScoreJob) -> list[Row]:
    """Score units on every stored token of split `score`; a row per measure, controls included.

    Raises:
        ExplainError: An explanation has no program.
    """
    settings = job.settings_as(PopulationSettings)
    units = checked_units(job.store, job.hook, job.units)
    learn, scored = (
        read_tokens(job.store, s, settings.window, job.hook) for s in ("explain", "score")
    )
    by_control = job.explanations(units.tolist())
    _check_programs(job, by_control.values())
    rows: list[Row] = []
    sides = [read_unit_rows(job.store, job.hook, units, tokens.grid) for tokens in (learn, scored)]
    done = 0
    for on_learn, on_score in zip(*sides, strict=True):  # the same chunks: they depend on the units
        for i, unit in enumerate(on_score.units.tolist()):
            learned = learn.place[on_learn.of(i)[0]]
            cells, acts = on_score.of(i)
            firing = scored.place[cells]
            for control, explanations in by_control.items():
                explanation = explanations[done + i]
                facts: Row = {"control": control, "n": len(scored.ids)}
                facts |= {"n_tokens": len(scored.ids), "n_documents": scored.n_documents}
                failed, columns = explanation.failed, dict[str, Row]()
                if explanation.program is not None and failed is None:
                    threshold = learn.predicted(explanation.program).best_threshold(learned)
                    levels = scored.predicted(explanation.program)
                    counts = count(scored, levels, threshold, firing, acts)
                    columns = measured(counts)
                    columns["population_f1"] |= {"details": _details(counts, threshold)}
                if failed is None and not len(firing):
                    failed = Failed("silent", "the unit fires on no token of split score")
                for metric in METRICS_OF:
                    outcome = undefined(failed, 0.0) if failed else columns[metric]
                    rows.append(job.row(metric, unit, **facts, **outcome))
        done += len(on_score.units)
        job.progress(f"population {job.hook}", done, len(units))
    return rows


def _check_programs(job: ScoreJob, explained: Iterable[list[Explanation]]) -> None:
    for explanations in explained:
        for explanation in explanations:
            if explanation.failure is None and explanation.program is None:
                raise ExplainError(
                    f"{job.hook}: explanations by {explanation.explainer} have no program, and no "
                    "judge reads every token; score them by detection or fuzz with client="
                )


METRICS_OF = (*RATIOS, "population_auprc", "population_cosine", "population_pearson")
"""Metrics of `population`, the headline first."""


def _details(counts: PopulationCounts, threshold: float) -> dict[str, float]:
    both, wrong, missed = counts.outcomes.sum(axis=0).tolist()
    return {"threshold": threshold, "n_both": both, "n_predicted": both + wrong,
            "n_firing": both + missed}  # fmt: skip


def measured(counts: PopulationCounts) -> dict[str, Row]:
    """Return value and interval of each measure of a unit."""
    columns: dict[str, Row] = {}
    n_documents = len(counts.outcomes)
    for metric, (above, below) in RATIOS.items():
        over, under = counts.outcomes @ np.array(above), counts.outcomes @ np.array(below)
        has_any = under > 0
        value = float(over.sum() / under.sum()) if has_any.any() else np.nan
        low, high = np.clip(ratio_interval(over[has_any], under[has_any]), 0.0, 1.0)
        columns[metric] = _told(value, low, high, RATIO_METHOD, int(has_any.sum()))
    low, high = auprc_interval(counts)
    columns["population_auprc"] = _told(counts.auprc, low, high, AUPRC_METHOD, n_documents)
    totals = counts.sums.sum(axis=0)
    left_out = totals - counts.sums
    for name, measure in (("cosine", cosine), ("pearson", _pearson)):
        value = float(measure(totals))
        z = np.arctanh(np.clip(np.nan_to_num(measure(left_out)), -1 + 1e-12, 1 - 1e-12))
        centre = np.arctanh(np.clip(np.nan_to_num(value), -1 + 1e-12, 1 - 1e-12))
        low, high = np.tanh(jackknife_interval(centre, z))
        method = JACKKNIFE_METHOD
        columns[f"population_{name}"] = _told(value, low, high, method, n_documents)
    return columns


def _pearson(sums: Float[ndarray, "*batch 6"]) -> Float[ndarray, "*batch"]:
    n, t, p, tt, pp, tp = np.moveaxis(sums, -1, 0)
    n = np.maximum(n, 1)
    both = (tt - t * t / n) * (pp - p * p / n)
    defined = both > 1e-20 * np.maximum(tt * pp, 1e-300)
    return np.where(
        defined, np.clip((tp - t * p / n) / np.sqrt(np.where(defined, both, 1)), -1, 1), np.nan
    )


def auprc_interval(counts: PopulationCounts) -> tuple[float, float]:
    """Return the interval of an average precision over documents, on the logit scale.

    The variance is m / (m - 1) times the sum of squared influences of m documents. It is at least
    that of as many independent items as documents in which the unit fires (Boyd et al. 2013), so
    that documents which all agree do not make an interval of width 0.
    """
    n_firing = int((counts.outcomes[:, [0, 2]].sum(axis=1) > 0).sum())
    m = len(counts.influence)
    if not n_firing or m < 2:
        return np.nan, np.nan
    p = (counts.auprc * n_firing + 0.5) / (n_firing + 1)
    scale = p * (1 - p)
    error = np.sqrt(m / (m - 1) * float(np.square(counts.influence).sum())) / scale
    half = max(float(student_quantile(m - 1)) * error, Z / np.sqrt(n_firing * scale))
    centre = np.log(p / (1 - p))
    low, high = (1 / (1 + np.exp(-(centre + sign * half))) for sign in (-1, 1))
    return float(min(low, counts.auprc)), float(max(high, counts.auprc))


def _told(value: float, low: float, high: float, method: str, n_documents: int) -> Row:
    """Return the columns of a value; one that is not defined is 0."""
    if np.isnan(value):
        return {"value": 0.0, "nan_fraction": 1.0}
    columns: Row = {"value": float(value), "nan_fraction": 0.0, "n_failures": 0}
    if not np.isnan(low):
        # the straightened scale ends just before 1, so a perfect value would lie outside
        columns |= {"ci_low": float(min(low, value)), "ci_high": float(max(high, value))}
        columns["ci_method"] = over_documents(method, n_documents)
    return columns
