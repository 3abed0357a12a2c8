"""Find the intruder: all records but one make the unit fire about as strongly; which one does not?

`intruder` shows marked records to a language model and no explanation: it scores whether the
records have something in common. `intruder_program` lets the program of an explanation choose.
Paulo et al. 2024 (arXiv 2410.13928). In each trial the firing records are neighbours in rank, no
record is shown twice, and the intruder's marks lie where those of a firing record do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.clients.client import Answer, Failed, Message, Prompt, Usage, final_answer
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.sampler import Contrasts
from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import AskedTrialSettings, TrialSettings
from lmmono.scores.classification import marked_tokens
from lmmono.scores.judging import MIN_RECORDS, Items, failure_of, joined_hash, predicted, shown_text
from lmmono.scores.score_job import Row, ScoreJob, program_of, undefined, usage_columns
from lmmono.stats.intervals import wilson
from lmmono.stats.rates import WILSON_METHOD

METHOD = f"{WILSON_METHOD} over trials of different records"


@dataclass(frozen=True, slots=True)
class Trials:
    """The trials of one unit."""

    token_ids: Int[ndarray, "trials size window"]
    marked: Bool[ndarray, "trials size window"]
    intruder: Int[ndarray, " trials"]
    """Place of the intruder in each trial, from 0."""
    n_documents: int
    """Documents of all records."""


def draw_trials(contrasts: Contrasts, n: int, size: int, seed: int) -> list[Trials]:
    """Return up to n trials of `size` records for each unit."""
    shape = (len(contrasts.units), 3, -1, contrasts.excerpts.window)
    marks = marked_tokens(contrasts, seed).reshape(shape)
    ids = contrasts.token_ids(("firing", "silent", "more_firing")).reshape(shape)
    trials: list[Trials] = []
    for i, unit in enumerate(contrasts.units.tolist()):
        rng = stream("intruder places", seed, unit)
        firing = np.flatnonzero(contrasts.index[i, 0] >= 0)
        silent = np.flatnonzero((contrasts.index[i, 1] >= 0) & marks[i, 1].any(axis=1))
        k = min(n, len(firing) // (size - 1), len(silent))
        strength = contrasts.acts[i, 0].max(axis=1)[firing]
        ranked = firing[np.argsort(-strength, kind="stable")]
        # the trials are spread over all ranks, each of records that follow each other
        first = np.linspace(0, len(ranked) - (size - 1), k).astype(int) if k else np.zeros(0, int)
        rows = ranked[first[:, None] + np.arange(size - 1)]
        places = rng.integers(size, size=k)
        own, other = ids[i, 0][rows], ids[i, 1][silent[:k]]
        own_marks, other_marks = marks[i, 0][rows], marks[i, 1][silent[:k]]
        used = np.concatenate(
            [contrasts.index[i, 0][rows].ravel(), contrasts.index[i, 1][silent[:k]]]
        )
        trials.append(
            Trials(
                _inserted(own, other, places),
                _inserted(own_marks, other_marks, places),
                places,
                len(np.unique(contrasts.excerpts.doc_ids[used])),
            )
        )
    return trials


def _inserted(own: ndarray, other: ndarray, places: Int[ndarray, " trials"]) -> ndarray:
    both = np.concatenate([own, other[:, None]], axis=1)
    size = both.shape[1]
    order = np.tile(np.arange(size), (len(places), 1))
    order = order - (order > places[:, None])
    order[np.arange(len(places)), places] = size - 1
    return np.take_along_axis(both, order[:, :, None], axis=1)


def _read(job: ScoreJob) -> tuple[list[int], list[Trials]]:
    settings = job.settings_as(TrialSettings)
    n, size = settings.trials, settings.size
    contrasts = job.reader.contrasts(
        job.hook,
        "score",
        n * (size - 1),
        window=settings.window,
        units=job.units,
        ranked=settings.ranked,
    )
    return contrasts.units.tolist(), draw_trials(contrasts, n, size, job.seed)


def score_by_programs(job: ScoreJob) -> list[Row]:
    """Score units by whether their program predicts least for the intruder."""
    units, trials = _read(job)
    rows: list[Row] = []
    for control, explanations in job.explanations(units).items():
        for i, (unit, explanation) in enumerate(zip(units, explanations, strict=True)):
            right = _by_program(explanation, trials[i])
            failed = explanation.failed
            rows.append(_row(job, "intruder_program", unit, trials[i], right, failed, control))
    return rows


def _by_program(explanation: Explanation, trials: Trials) -> Float[ndarray, " trials"]:
    """Return the credit of each trial: 1, or a share of it where several predictions are least."""
    if explanation.failure is not None:
        return np.zeros(0)
    program = program_of(explanation)
    k, size, window = trials.token_ids.shape
    flat = Items(trials.token_ids.reshape(-1, window), trials.marked.reshape(-1, window))
    scores = predicted(program, flat).reshape(k, size)
    least = scores == scores.min(axis=1, keepdims=True)
    return least[np.arange(k), trials.intruder] / least.sum(axis=1)


_SYSTEM = """You are shown numbered texts. In all but one, the marked tokens << >> are those on \
which one unit of a language model fires; in the other, the intruder, tokens are marked that have \
nothing to do with it. Answer with the number of the intruder only."""


def score_by_client(job: ScoreJob) -> list[Row]:
    """Score units by whether a language model finds the intruder."""
    assert job.client is not None
    units, trials = _read(job)
    words = read_vocabulary(job.store)
    prompts = [_prompts(of_unit, words) for of_unit in trials]
    asked_all = [prompt for of_unit in prompts for prompt in of_unit]
    max_tokens = (
        job.settings_as(AskedTrialSettings).max_tokens or 8
    )  # one number, and a word or two before it
    answers = iter(job.client.complete(asked_all, max_tokens=max_tokens))
    rows: list[Row] = []
    for unit, of_unit, asked in zip(units, trials, prompts, strict=True):
        rows += _rows_of(job, unit, of_unit, asked, [next(answers) for _ in asked])
    return rows


def _prompts(trials: Trials, words: tuple[str, ...]) -> list[Prompt]:
    prompts: list[Prompt] = []
    for ids, marked in zip(trials.token_ids, trials.marked, strict=True):
        texts = [shown_text(ids[i], marked[i], words) for i in range(len(ids))]
        shown = "\n".join(f"Text {i}: {text}" for i, text in enumerate(texts, start=1))
        prompts.append(Prompt((Message("system", _SYSTEM), Message("user", shown))))
    return prompts


def _rows_of(
    job: ScoreJob, unit: int, trials: Trials, asked: Sequence[Prompt], answers: Sequence[Answer]
) -> list[Row]:
    size = trials.token_ids.shape[1]
    named = np.array([_number(answer, size) for answer in answers], float).reshape(-1)
    usage = sum((answer.usage for answer in answers), Usage())
    has_no_answer = bool(len(answers) and np.isnan(named).all())
    failed = failure_of([answer.failed for answer in answers], has_no_answer)
    if failed is None and has_no_answer:
        wanted = f"want one number of 1 to {size}, got {(answers[0].text or '')[:80]!r}"
        failed = Failed("unparsed", wanted)
    extra = {"prompt_hash": joined_hash([prompt.sha256 for prompt in asked])}
    rows: list[Row] = []
    pairings: list[tuple[str | None, ndarray]] = [(None, trials.intruder)]
    if job.controls:
        pairings.append(("shuffled_pairing", np.roll(trials.intruder, 1)))
    for control, places in pairings:
        right = np.where(np.isnan(named), np.nan, named == places)
        row = _row(job, "intruder", unit, trials, right, failed, control)
        rows.append(row | extra | (usage_columns(usage) if control is None else {}))
    return rows


def _number(answer: Answer, size: int) -> float:
    """Return the place that an answer names, from 0; NaN where it names none."""
    numbers = re.findall(r"\d+", final_answer(answer.text or ""))
    if len(numbers) != 1 or not 1 <= int(numbers[0]) <= size:
        return np.nan
    return int(numbers[0]) - 1.0


def _row(
    job: ScoreJob,
    metric: str,
    unit: int,
    trials: Trials,
    right: Float[ndarray, " trials"],
    failed: Failed | None,
    control: str | None,
) -> Row:
    """Return the row of one unit; a trial without an answer counts as a guess."""
    n, chance = len(trials.intruder), 1 / job.settings_as(TrialSettings).size
    shared: Row = {"control": control, "n": n, "n_documents": trials.n_documents}
    shared |= {"n_records": n * trials.token_ids.shape[1]}
    shared |= {"n_tokens": int((trials.token_ids >= 0).sum())}
    if failed is None and n < MIN_RECORDS:
        failed = Failed("too_few_records")
    if failed is not None:
        return job.row(metric, unit, **shared, **undefined(failed, chance))
    unanswered = int(np.isnan(right).sum())
    total = float(np.nansum(right)) + unanswered * chance
    low, high = wilson(total, n)
    columns: Row = {"value": total / n, "ci_low": low, "ci_high": high, "ci_method": METHOD}
    details = {"right": float(np.nansum(right)), "unanswered": unanswered, "chance": chance}
    return job.row(
        metric, unit, **shared, **columns, nan_fraction=0.0, n_failures=unanswered, details=details
    )
