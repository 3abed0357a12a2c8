"""Recall and precision of an explanation on records of both sides, for scorers that draw records.

`_recall`, of what the unit does, on the active side; `_precision`, of what is predicted, on the
predicted side; `_f1`, their harmonic mean. `_weighted` is what all draws together, weighted, say of
every excerpt: Pearson's correlation where activations are predicted, the F1 of whole records where
a judge says yes or no. See `lmmono.records.sides`. A token is predicted where the program predicts
more than the threshold of the best F1 on split `explain`, a record where one of its tokens is.

What is counted is one of three. tokens: what fires and what is predicted. records: in which
something fires, and to which the judge says yes. marks: on the active side the firing tokens are
marked, on the predicted side the predicted ones; the judge believes or denies the marks of a record
as a whole, and marked tokens are counted (no `_weighted`: each side asks another question).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.clients.client import Failed
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation, Program
from lmmono.records.sampler import MARKED_FRACTION, Class
from lmmono.records.sides import SidedRecords, read_sides
from lmmono.records.unit_rows import read_unit_rows
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import Side
from lmmono.scores.judging import MIN_RECORDS, Items, Marks, read_contrasting
from lmmono.scores.population import read_tokens
from lmmono.scores.score_job import Row, ScoreJob, over_documents, undefined
from lmmono.stats.agreement import pearson
from lmmono.stats.intervals import jackknife_interval, ratio_interval
from lmmono.stats.rates import best_threshold

SIDED = ("recall", "precision", "f1", "weighted")
"""Last parts of the metrics' names."""

METHOD = "delta method over documents, four more added (Agresti and Coull), Student t"
F1_METHOD = "delta method from recall and precision, each over documents"
PEARSON_METHOD = "jackknife over documents, Student t on Fisher's z, weighted draws"

Counted = Literal["tokens", "records", "marks"]
"""What recall and precision count."""

Judge = Callable[
    [Sequence[Items], Sequence[Bool[ndarray, " items"]], Sequence[Explanation]],
    "list[Bool[ndarray, ' items'] | Failed]",
]
"""Says of the items of each unit, those that there are, whether the unit fires in them, or why
there is no answer. What is left unanswered is a no."""


def sided_rows(
    job: ScoreJob,
    scorer: str,
    sides: tuple[Side, ...],
    per_side: int,
    window: int,
    *,
    counted: Counted,
    judge: Judge | None = None,
) -> list[Row]:
    """Return the rows of a scorer's units by side, controls included.

    Args:
        job: The job of the scorer.
        scorer: First part of the metrics' names.
        sides: Sides to draw; recall wants `active`, precision `predicted`, `_weighted` all three.
        per_side: Most records of a side.
        window: Most tokens of a record.
        counted: What is counted.
        judge: Who says yes to records; None lets the program.

    Raises:
        ExplainError: An explanation without a program.
    """
    units = checked_units(job.store, job.hook, job.units)
    by_control = job.explanations(units.tolist())
    thresholds = _thresholds(job, by_control, units, window)
    excerpts = job.reader.excerpts("score", window)
    controls = list(by_control)

    def predicted(row: int) -> list[Bool[ndarray, " excerpts"]]:
        frames: list[ndarray] = []
        for control in controls:
            program = by_control[control][row].program
            is_yes = np.zeros(len(excerpts), bool)
            if program is not None:
                acts = simulate_many(program, excerpts.token_ids)
                above = (acts > thresholds[control][row]) & (excerpts.token_ids >= 0)
                is_yes = np.any(np.asarray(above), axis=1)
            frames.append(is_yes)
        return frames

    drawn = read_sides(
        job.store, job.hook, excerpts, sides, per_side, predicted,
        units=units.tolist(), seed=job.seed,
    )  # fmt: skip
    rows: list[Row] = []
    names = SIDED[:3] if counted == "marks" else SIDED
    for control, records in zip(controls, drawn, strict=True):
        explanations = by_control[control]
        of_units = [
            _seen(records, i, explanation, thresholds[control][i], counted)
            for i, explanation in enumerate(explanations)
        ]
        answers = [None] * len(units) if judge is None else judge(*_asked(of_units), explanations)
        for i, (unit, seen, answer) in enumerate(
            zip(units.tolist(), of_units, answers, strict=True)
        ):
            explanation = explanations[i]
            failed = explanation.failed or (answer if isinstance(answer, Failed) else None)
            if failed is None and "active" in sides and not records.sizes[i, sides.index("active")]:
                failed = Failed("silent", "the unit fires in no excerpt of split score")
            facts = _facts(records, i) | {"control": control}
            columns: dict[str, Row] = {}
            if failed is None:
                says = None
                if answer is not None and not isinstance(answer, Failed):
                    says = answer.reshape(seen.weights.shape)
                columns = measured(seen, says, sides, counted)
            for name in names:
                outcome = undefined(failed, 0.0) if failed else columns[name]
                rows.append(job.row(f"{scorer}_{name}", unit, **facts, **outcome))
    return rows


def threshold_judge(
    job: ScoreJob,
    classes: tuple[Class, ...],
    marks: Marks,
    score: Callable[[Items, Explanation], Float[ndarray, " items"] | Failed],
) -> Judge:
    """Return a judge that says yes above the threshold that is best on records of split `explain`.

    Args:
        job: The job of the scorer, whose settings say how many records teach the threshold.
        classes: Firing records, then others that it is told apart from.
        marks: What is marked in them.
        score: Returns a number per item, NaN where it has no answer.
    """
    learn = read_contrasting(job, "explain", classes, marks)

    def judge(
        items: Sequence[Items], present: Sequence[ndarray], explanations: Sequence[Explanation]
    ) -> list[ndarray | Failed]:
        answers: list[ndarray | Failed] = []
        for i, explanation in enumerate(explanations):
            answer: ndarray | Failed = Failed("too_few_records")
            others = [learn.of(i, which) for which in range(1, len(classes))]
            firing = learn.of(i, 0)
            if explanation.failed is not None:
                answer = explanation.failed
            elif min(len(firing), max(map(len, others))) >= MIN_RECORDS:
                answer = _above(
                    score(learn.items[i], explanation),
                    firing,
                    np.concatenate(others),
                    score(items[i].take(present[i]), explanation),
                    present[i],
                )
            answers.append(answer)
        return answers

    return judge


def _above(
    taught: ndarray | Failed, firing: ndarray, others: ndarray, asked: ndarray | Failed,
    present: Bool[ndarray, " items"],
) -> Bool[ndarray, " items"] | Failed:  # fmt: skip
    """Return which items are above the threshold that tells firing from other taught ones best."""
    if isinstance(taught, Failed):
        return taught
    if isinstance(asked, Failed):
        return asked
    a, b = (values[~np.isnan(values)] for values in (taught[firing], taught[others]))
    if not len(a) or not len(b):
        return Failed("no_answer")
    is_above = np.zeros(present.shape, bool)
    is_above[present] = asked > best_threshold(a, b)
    return is_above


def simulate_many(program: Program, ids: ndarray) -> Float[ndarray, "*shape"]:
    """Return what a program predicts; one that reads one token at a time by a table."""
    if not program.reads_one_token:
        return program.simulate(ids.reshape(-1, ids.shape[-1])).reshape(ids.shape)
    table = program.simulate(np.arange(max(int(ids.max(initial=0)), 0) + 1)[None, :])[0]
    return np.where(ids >= 0, table[ids], 0.0)


def _thresholds(
    job: ScoreJob, by_control: Mapping[str | None, list[Explanation]], units: ndarray, window: int
) -> dict[str | None, list[float]]:
    """Return the threshold of each control's explanation of each unit; NaN where it failed."""
    tokens = read_tokens(job.store, "explain", window, job.hook)
    thresholds: dict[str | None, list[float]] = {control: [] for control in by_control}
    done = 0
    for rows in read_unit_rows(job.store, job.hook, units, tokens.grid):
        for i in range(len(rows.units)):
            firing = tokens.place[rows.of(i)[0]]
            for control, explanations in by_control.items():
                explanation = explanations[done + i]
                if explanation.failure is None and explanation.program is None:
                    raise ExplainError(
                        f"{job.hook}: explanations by {explanation.explainer} have no program to "
                        f"draw the predicted side by; leave out sides="
                    )
                threshold = np.nan
                if explanation.program is not None:
                    threshold = tokens.predicted(explanation.program).best_threshold(firing)
                thresholds[control].append(threshold)
        done += len(rows.units)
    return thresholds


def _facts(records: SidedRecords, i: int) -> Row:
    index = records.index[i]
    drawn = (index >= 0).sum(axis=1)
    documents = records.excerpts.doc_ids[index[index >= 0]]
    return {
        "n": int(drawn.sum()),
        "n_records": int(drawn.sum()),
        "n_documents": len(np.unique(documents)),
        "n_tokens": int((records.excerpts.tokens_of(index) >= 0).sum()),
        "details": {
            side: {"n": int(drawn[at]), "of": int(records.sizes[i, at])}
            for at, side in enumerate(records.sides)
        },
    }


@dataclass(frozen=True, slots=True)
class SeenRecords:
    """The records of one unit, and what one explanation says of them."""

    token_ids: Int[ndarray, "sides n window"]
    truth: Float[ndarray, "sides n window"]
    predicted: Float[ndarray, "sides n window"]
    is_yes: Bool[ndarray, "sides n window"]
    marked: Bool[ndarray, "sides n window"] | None
    """What a judge is shown as firing; None where it sees whole records or is not asked."""
    weights: Float[ndarray, "sides n"]
    documents: ndarray
    """Document of each record; -1 where there is none."""

    @property
    def is_token(self) -> Bool[ndarray, "sides n window"]:
        """Whether each place holds a token."""
        return self.token_ids >= 0

    def counted(
        self, counted: Counted, says: Bool[ndarray, "sides n"] | None
    ) -> tuple[ndarray, ndarray, ndarray]:
        """Return by record how much fires, is said to fire, and both."""
        fires = (self.truth > 0) & self.is_token
        if counted == "records":
            yes = self.is_yes.any(axis=2) if says is None else says
            active = fires.any(axis=2)
            return active.astype(float), yes.astype(float), (active & yes).astype(float)
        yes = self.is_yes
        if counted == "marks":
            assert self.marked is not None and says is not None
            fires, yes = fires & self.marked, self.marked & says[..., None]
        parts = (fires, yes, fires & yes)
        fire, yes, both = (part.sum(axis=2).astype(float) for part in parts)
        return fire, yes, both


def _seen(
    records: SidedRecords, i: int, explanation: Explanation, threshold: float, counted: Counted
) -> SeenRecords:
    """Return the records of one unit; nothing is predicted where there is no program."""
    ids, truth = records.token_ids()[i], records.acts[i].astype(np.float64)
    acts = np.zeros(truth.shape)
    if explanation.program is not None:
        acts = simulate_many(explanation.program, ids) * (ids >= 0)
    is_yes, marked = (acts > threshold) & (ids >= 0), None
    if counted == "marks":
        is_strong = truth >= MARKED_FRACTION * truth.max(axis=2, keepdims=True)
        of_side = {"active": (truth > 0) & is_strong, "predicted": is_yes}
        marked = np.stack([of_side[side][at] for at, side in enumerate(records.sides)])
    index = records.index[i]
    documents = np.where(index >= 0, records.excerpts.doc_ids[index], -1)
    return SeenRecords(ids, truth, acts, is_yes, marked, records.weights()[i], documents)


def _asked(of_units: Sequence[SeenRecords]) -> tuple[list[Items], list[Bool[ndarray, " items"]]]:
    """Return the items of each unit, and which of them there are."""
    items: list[Items] = []
    for seen in of_units:
        window = seen.token_ids.shape[2]
        marked = None if seen.marked is None else seen.marked.reshape(-1, window)
        items.append(Items(seen.token_ids.reshape(-1, window), marked))
    return items, [(seen.documents >= 0).ravel() for seen in of_units]


def measured(
    seen: SeenRecords,
    answers: Bool[ndarray, "sides n"] | None,
    sides: tuple[Side, ...],
    counted: Counted,
) -> dict[str, Row]:
    """Return value and interval of each measure of one unit."""
    fires, says, both = seen.counted(counted, answers)
    columns: dict[str, Row] = {}
    for name, side, below in (("recall", "active", fires), ("precision", "predicted", says)):
        columns[name] = {"value": 0.0, "nan_fraction": 1.0, "failure": None}
        if side in sides:
            at = sides.index(side)
            columns[name] = _ratio(both[at], below[at], seen.documents[at])
    columns["f1"] = _harmonic(columns["recall"], columns["precision"], sides)
    if set(sides) != {"active", "predicted", "random"}:
        columns["weighted"] = {"value": 0.0, "nan_fraction": 1.0}
    elif counted == "tokens":
        columns["weighted"] = _weighted_pearson(seen)
    else:
        w = seen.weights
        documents, over, under = seen.documents, 2 * both * w, (fires + says) * w
        columns["weighted"] = _ratio(over.ravel(), under.ravel(), documents.ravel())
    return columns


def _ratio(over: ndarray, under: ndarray, documents: ndarray) -> Row:
    """Return a ratio of sums with its interval over documents; not defined where nothing counts."""
    present = documents >= 0
    number = np.unique(documents[present], return_inverse=True)[1]
    above, below = (np.bincount(number, part[present]) for part in (over, under))
    has_any = below > 0
    if not has_any.any():
        return {"value": 0.0, "nan_fraction": 1.0}
    value = float(above.sum() / below.sum())
    low, high = np.clip(ratio_interval(above[has_any], below[has_any]), 0.0, 1.0)
    ends = {"ci_low": float(min(low, value)), "ci_high": float(max(high, value))}
    method = over_documents(METHOD, int(has_any.sum()))
    return {"value": value, "nan_fraction": 0.0, **ends, "ci_method": method}


def _harmonic(recall: Row, precision: Row, sides: tuple[Side, ...]) -> Row:
    """Return the harmonic mean of recall and precision; 0 where nothing is predicted."""
    if recall["nan_fraction"] or not {"active", "predicted"} <= set(sides):
        return {"value": 0.0, "nan_fraction": 1.0}
    r, p = recall["value"], precision["value"]
    if precision["nan_fraction"] or not r or not p:
        return {"value": 0.0, "nan_fraction": 0.0}
    f1 = 2 * r * p / (r + p)
    # d f1 / d r = f1^2 / (2 r^2), and as much for p; the two sides are drawn apart
    halves = [
        f1**2 / (2 * side["value"] ** 2) * (side["ci_high"] - side["ci_low"]) / 2
        for side in (recall, precision)
    ]
    half = float(np.hypot(*halves))
    ends = {"ci_low": max(f1 - half, 0.0), "ci_high": min(f1 + half, 1.0)}
    return {"value": f1, "nan_fraction": 0.0, **ends, "ci_method": F1_METHOD}


def _weighted_pearson(seen: SeenRecords) -> Row:
    """Return Pearson's correlation over all excerpts, estimated from the weighted draws."""
    t, p = seen.truth * seen.is_token, seen.predicted * seen.is_token
    parts = (seen.is_token, t, p, t * t, p * p, t * p)
    sums = np.stack([part.sum(axis=2) for part in parts], axis=-1) * seen.weights[..., None]
    present = seen.documents >= 0
    names, number = np.unique(seen.documents[present], return_inverse=True)
    by_document = np.zeros((len(names), 6))
    np.add.at(by_document, number, sums[present])
    totals = by_document.sum(axis=0)
    value = float(pearson(totals))
    if np.isnan(value):
        return {"value": 0.0, "nan_fraction": 1.0}
    without = np.nan_to_num(pearson(totals - by_document))
    z, centre = (np.arctanh(np.clip(x, -1 + 1e-12, 1 - 1e-12)) for x in (without, np.array(value)))
    low, high = (float(end) for end in np.tanh(jackknife_interval(centre, z)))
    columns: Row = {"value": value, "nan_fraction": 0.0}
    if not np.isnan(low):
        columns |= {"ci_low": min(low, value), "ci_high": max(high, value)}
        columns["ci_method"] = over_documents(PEARSON_METHOD, len(names))
    return columns
