"""`surprisal`: does the explanation make a language model expect the texts in which the unit fires?

Each text is read twice, after a prompt with the explanation and after a neutral one. Its gain is
the mean over its tokens of how much more likely the explanation makes them, in nats. The score is
the AUROC of the gain between firing and silent texts. Paulo et al. 2024 (arXiv 2410.13928).
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.clients.client import Failed, Prompt, Reading, Usage
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.sampler import Class, Contrasts
from lmmono.registry.scorer_settings import SurprisalSettings
from lmmono.scores.judging import area_row, failure_of, joined_hash, present_classes, shown_text
from lmmono.scores.score_job import Row, ScoreJob, usage_columns

WITH = "The following text has to do with this: {}\n\n"
"""What is read before a text, with the explanation."""

WITHOUT = "The following text is an ordinary one:\n\n"
"""What is read before a text, without one."""

CLASSES: tuple[Class, ...] = ("firing", "silent", "near_miss")


def mean_logprob(reading: Reading, before: str) -> float:
    """Return the mean log-probability of the tokens that begin after `before`, in nats.

    NaN where there is none. A token that begins before and ends after it is left out.
    """
    if reading.failure is not None:
        return float("nan")
    ends = list(accumulate(len(token) for token in reading.tokens))
    starts = [0, *ends[:-1]]
    logprobs = [
        logprob
        for start, logprob in zip(starts, reading.logprobs, strict=True)
        if start >= len(before) and logprob is not None
    ]
    return float(np.mean(logprobs)) if logprobs else float("nan")


def score_surprisal(job: ScoreJob) -> list[Row]:
    """Score units by the AUROC of the gain; texts are read once without an explanation."""
    assert job.client is not None
    settings = job.settings_as(SurprisalSettings)
    contrasts = job.reader.contrasts(
        job.hook,
        "score",
        settings.n,
        window=settings.window,
        units=job.units,
        ranked=settings.ranked,
    )
    units, index = contrasts.units.tolist(), contrasts.of(CLASSES)
    texts = _texts(job, contrasts)
    used = sorted(texts)
    plain = dict(zip(used, job.client.read([WITHOUT + texts[i] for i in used]), strict=True))
    rows: list[Row] = []
    for control, explanations in job.explanations(units).items():
        for i, (unit, explanation) in enumerate(zip(units, explanations, strict=True)):
            gains, failed, cost = _gains(job, explanation, index[i], texts, plain)
            sides = present_classes(index[i], len(CLASSES))
            for metric, other in (("surprisal", 1), ("surprisal_near_miss", 2)):
                both = gains[sides[0]], gains[sides[other]]
                row = area_row(job, metric, unit, *both, explanation.failed or failed)
                rows.append(row | cost | {"control": control})
                cost = {"prompt_hash": cost.get("prompt_hash")}  # what it took is told once
    return rows


def _texts(job: ScoreJob, contrasts: Contrasts) -> dict[int, str]:
    words, index = read_vocabulary(job.store), contrasts.of(CLASSES)
    ids = contrasts.excerpts.token_ids
    return {int(i): shown_text(ids[i], None, words) for i in np.unique(index[index >= 0])}


def _gains(
    job: ScoreJob,
    explanation: Explanation,
    index: ndarray,
    texts: dict[int, str],
    plain: dict[int, Reading],
) -> tuple[Float[ndarray, " records"], Failed | None, Row]:
    """Return the gain of each record, why there are none, and what asking took.

    NaN where there is no record or the model did not read it.
    """
    gains = np.full(len(index), np.nan)
    if explanation.text is None:
        return gains, None, {}
    assert job.client is not None
    before, present = WITH.format(explanation.text), np.flatnonzero(index >= 0)
    readings: Sequence[Reading] = job.client.read([before + texts[int(index[i])] for i in present])
    neutral = [plain[int(index[i])] for i in present]
    for i, reading, other in zip(present, readings, neutral, strict=True):
        gains[i] = mean_logprob(reading, before) - mean_logprob(other, WITHOUT)
    failures = [reading.failed for reading in (*readings, *neutral)]
    failed = failure_of(failures, bool(np.isnan(gains[present]).all()))
    usage = usage_columns(sum((reading.usage for reading in readings), Usage()))
    return gains, failed, usage | {"prompt_hash": joined_hash([Prompt(text=before).sha256])}
