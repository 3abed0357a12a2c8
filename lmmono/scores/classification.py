"""Classification scorers: does the explanation tell where the unit fires from where it does not?

`detection` asks about whole records: the unit fires somewhere in it, or nowhere. `fuzz` marks
tokens and asks whether the unit fires on exactly these. Both are balanced: as many records of each
class. Paulo et al. 2024, "Automatically interpreting millions of features in large language models"
(arXiv 2410.13928). Unlike theirs, marks of the two classes lie at the same positions, the text is
never replaced, records are drawn without replacement from documents that did not explain the unit,
and what the judge leaves unanswered is counted.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from lmmono.clients.client import Failed
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.sampler import Class, Contrasts
from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import ClassificationSettings, FuzzSettings
from lmmono.scores.judging import (
    CHANCE,
    MIN_RECORDS,
    Items,
    Judgement,
    Marks,
    judge_by_client,
    judge_by_program,
    no_marks,
    predicted,
    read_contrasting,
)
from lmmono.scores.score_job import Row, ScoreJob, program_of, undefined, usage_columns
from lmmono.scores.two_sided import sided_rows, threshold_judge
from lmmono.stats.rates import (
    ACCURACY_METHOD,
    AUROC_METHOD,
    PRECISION_METHOD,
    auroc,
    auroc_interval,
    average_precision,
    average_precision_interval,
    balanced_accuracy,
    best_threshold,
)


def detect(job: ScoreJob) -> list[Row]:
    """Score units by whole records: firing ones against silent ones and against near misses."""
    classes: tuple[Class, ...] = ("firing", "silent", "near_miss")
    names = {"silent": "detection", "near_miss": "detection_near_miss"}
    rows = _Classification(job, classes, names, no_marks).rows()
    settings = job.settings_as(ClassificationSettings)
    if settings.sides:
        judge = None if job.client is None else partial(_ask_sides, job, settings)
        sides = settings.sides, settings.per_side, settings.window
        rows += sided_rows(job, "detection", *sides, counted="records", judge=judge)
    return rows


def _ask_sides(
    job: ScoreJob,
    settings: ClassificationSettings,
    items: Sequence[Items],
    present: Sequence[Bool[ndarray, " items"]],
    explanations: Sequence[Explanation],
) -> list[Bool[ndarray, " items"] | Failed]:
    """Ask a language model about the records of both sides; what it does not answer is a no."""
    assert job.client is not None
    order: list[Int[ndarray, " places"]] = []
    for explanation, of_unit in zip(explanations, present, strict=True):
        rng = stream("order of judged items", job.seed, job.hook, explanation.unit)
        order.append(rng.permutation(np.flatnonzero(of_unit)))
    words = read_vocabulary(job.store)
    answers = judge_by_client(
        job.client, explanations, items, order, words, settings.batch, settings.max_tokens
    )
    return [answer.failed or answer.fires == 1 for answer in answers]


def fuzz(job: ScoreJob) -> list[Row]:
    """Score units by marked tokens: true marks against marks in silence and against wrong ones."""
    classes: tuple[Class, ...] = ("firing", "silent", "more_firing")
    names = {"silent": "fuzz", "more_firing": "fuzz_active"}
    rows = _Classification(job, classes, names, marked_tokens).rows()
    settings = job.settings_as(FuzzSettings)
    if settings.sides:
        if job.client is not None:
            judge = partial(_ask_sides, job, settings)
        else:
            judge = threshold_judge(
                job,
                classes,
                marked_tokens,
                lambda items, explanation: predicted(program_of(explanation), items),
            )
        sides = settings.sides, settings.per_side, settings.window
        rows += sided_rows(job, "fuzz", *sides, counted="marks", judge=judge)
    return rows


def marked_tokens(contrasts: Contrasts, seed: int) -> Bool[ndarray, "units records window"]:
    """Return what is marked in firing, silent and more firing records, in this order.

    Firing records show where the unit fires. The others get the marks of a firing record at the
    same positions, so that neither number nor place of the marks tells; in more firing ones, tokens
    on which the unit does fire are left out, and as many others are marked.
    """
    true_marks = contrasts.marks("firing")
    silent = np.zeros_like(true_marks)
    wrong = np.zeros_like(true_marks)
    ids = contrasts.token_ids(("silent", "more_firing")).reshape(
        len(true_marks), 2, *silent[0].shape
    )
    fires = contrasts.acts[:, 3] > 0
    for i, unit in enumerate(contrasts.units):
        rng = stream("marks in silence", seed, int(unit))
        like = true_marks[i][true_marks[i].any(axis=1)]
        if len(like):
            for marks, allowed in ((silent, ids[i, 0] >= 0), (wrong, (ids[i, 1] >= 0) & ~fires[i])):
                for record, free in enumerate(allowed):
                    marks[i, record] = _moved(like[record % len(like)], free, rng)
    return np.concatenate([true_marks, silent, wrong], axis=1)


def _moved(
    marks: Bool[ndarray, " window"], free: Bool[ndarray, " window"], rng: np.random.Generator
) -> Bool[ndarray, " window"]:
    """Return the same marks where they are free, and as many others at random."""
    kept = marks & free
    spare = np.flatnonzero(free & ~kept)
    n = min(int(marks.sum() - kept.sum()), len(spare))
    kept[rng.choice(spare, n, replace=False)] = True
    return kept


class _Classification:
    """One scorer at work on one hook."""

    def __init__(
        self, job: ScoreJob, classes: tuple[Class, ...], names: dict[str, str], marks: Marks
    ) -> None:
        self._job, self._classes, self._names = job, classes, names
        self._score = read_contrasting(job, "score", classes, marks)
        self._learn = None
        if job.client is None:
            self._learn = read_contrasting(job, "explain", classes, marks)
        units = [int(unit) for unit in self._score.contrasts.units]
        self._units, self._explanations = units, job.explanations(units)
        rng = [stream("order of judged items", job.seed, job.hook, unit) for unit in units]
        self._order = [
            of_unit.permutation(np.flatnonzero(present))
            for of_unit, present in zip(rng, self._score.present, strict=True)
        ]

    def rows(self) -> list[Row]:
        """Return the rows of all units, controls included."""
        rows: list[Row] = []
        for control, explanations in self._explanations.items():
            started = time.perf_counter()
            judgements = self._judged(explanations)
            each_took = (time.perf_counter() - started) / max(len(judgements), 1)
            if self._job.client is None:
                usage = [replace(judgement.usage, seconds=each_took) for judgement in judgements]
                pairs = zip(judgements, usage, strict=True)
                judgements = [replace(judgement, usage=took) for judgement, took in pairs]
            rows += self._rows(control, explanations, judgements)
            if control is None and self._job.controls:
                pairs = zip(judgements, self._order, strict=True)
                shuffled = [_shuffled(judgement, order) for judgement, order in pairs]
                rows += self._rows("shuffled_pairing", explanations, shuffled)
        return rows

    def _judged(self, explanations: Sequence[Explanation]) -> list[Judgement]:
        job, score = self._job, self._score
        if job.client is not None:
            words = read_vocabulary(job.store)
            settings = job.settings_as(ClassificationSettings)
            order = [
                places if self._lacks(i) is None else places[:0]
                for i, places in enumerate(self._order)
            ]
            return judge_by_client(
                job.client,
                explanations,
                score.items,
                order,
                words,
                settings.batch,
                settings.max_tokens,
            )
        return [self._by_program(i, explanation) for i, explanation in enumerate(explanations)]

    def _by_program(self, i: int, explanation: Explanation) -> Judgement:
        learn = self._learn
        assert learn is not None
        nothing = np.full(len(self._score.items[i].token_ids), np.nan)
        if explanation.failure is not None or self._lacks(i) is not None:
            return Judgement(nothing, nothing)
        program = program_of(explanation)
        scores = predicted(program, learn.items[i])
        others = np.concatenate([learn.of(i, 1), learn.of(i, 2)])
        threshold = best_threshold(scores[learn.of(i, 0)], scores[others])
        return judge_by_program(program, self._score.items[i], threshold)

    def _lacks(self, i: int) -> Failed | None:
        """Return why a unit cannot be scored at all, or None."""
        for asked in (self._score, self._learn):
            if asked is not None:
                n_others = max(len(asked.of(i, 1)), len(asked.of(i, 2)))
                if min(len(asked.of(i, 0)), n_others) < MIN_RECORDS:
                    return Failed("too_few_records")
        return None

    def _rows(
        self,
        control: str | None,
        explanations: Sequence[Explanation],
        judgements: Sequence[Judgement],
    ) -> list[Row]:
        rows: list[Row] = []
        for i, (explanation, judgement) in enumerate(zip(explanations, judgements, strict=True)):
            cost = usage_columns(judgement.usage)
            for which, name in enumerate(self._names.values(), start=1):
                firing, other = self._score.of(i, 0), self._score.of(i, which)
                failed = explanation.failed or self._lacks(i) or judgement.failed
                if failed is None and min(len(firing), len(other)) < MIN_RECORDS:
                    failed = Failed("too_few_records")
                facts = self._facts(i, firing, other) | {"control": control}
                facts["prompt_hash"] = judgement.prompt_hash
                measures = _measured(name, judgement, firing, other, failed)
                for metric, columns in measures.items():
                    rows.append(self._job.row(metric, self._units[i], **facts, **columns, **cost))
                    cost = {}  # what asking took is told once
        return rows

    def _facts(self, i: int, firing: ndarray, other: ndarray) -> Row:
        both = np.concatenate([firing, other])
        contrasts = self._score.contrasts
        excerpts = contrasts.excerpts
        index = contrasts.of(self._classes)[i][both]
        return {
            "n": len(both),
            "n_records": len(both),
            "n_documents": len(np.unique(excerpts.doc_ids[index])),
            "n_tokens": int((excerpts.token_ids[index] >= 0).sum()),
        }


def _shuffled(judgement: Judgement, order: Int[ndarray, " items"]) -> Judgement:
    """Return a judgement whose answers belong to other items: each is given the next one's."""
    scores, fires = judgement.scores.copy(), judgement.fires.copy()
    scores[order], fires[order] = np.roll(scores[order], 1), np.roll(fires[order], 1)
    return Judgement(scores, fires, judgement.failed, prompt_hash=judgement.prompt_hash)


def _measured(
    name: str,
    judgement: Judgement,
    firing: Int[ndarray, " firing"],
    other: Int[ndarray, " other"],
    failed: Failed | None,
) -> dict[str, Row]:
    """Return the columns of each measure: balanced accuracy, AUROC, average precision."""
    metrics = (name, f"{name}_auroc", f"{name}_average_precision")
    if failed is not None:
        prior = len(firing) / max(len(firing) + len(other), 1)
        chances = (CHANCE, CHANCE, prior)
        return {
            metric: undefined(failed, value) for metric, value in zip(metrics, chances, strict=True)
        }
    a, b = judgement.fires[firing], judgement.fires[other]
    counts = {
        "tp": int((a == 1).sum()),
        "tn": int((b == 0).sum()),
        "fp": int((b == 1).sum()),
        "fn": int((a == 0).sum()),
        "unanswered": int(np.isnan(a).sum() + np.isnan(b).sum()),
    }
    right_a = counts["tp"] + np.isnan(a).sum() / 2
    right_b = counts["tn"] + np.isnan(b).sum() / 2
    n_a, n_b = len(firing), len(other)
    accuracy, low, high = balanced_accuracy(right_a, n_a, right_b, n_b)
    area = auroc(judgement.scores[firing], judgement.scores[other])
    precision = average_precision(judgement.scores[firing], judgement.scores[other])
    measures = (
        (accuracy, (low, high), ACCURACY_METHOD),
        (area, auroc_interval(area, n_a, n_b), AUROC_METHOD),
        (precision, average_precision_interval(precision, n_a), PRECISION_METHOD),
    )
    shared = {"nan_fraction": 0.0, "n_failures": counts["unanswered"], "details": counts}
    return {
        metric: {"value": value, "ci_low": ends[0], "ci_high": ends[1], "ci_method": method}
        | shared
        for metric, (value, ends, method) in zip(metrics, measures, strict=True)
    }
