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
from lmmono.records.sampler import Class
from lmmono.registry.scorer_settings import SurprisalSettings
from lmmono.scores.judging import (
    Items,
    area_row,
    failure_of,
    joined_hash,
    no_marks,
    present_classes,
    shown_text,
)
from lmmono.scores.score_job import Row, ScoreJob, usage_columns
from lmmono.scores.two_sided import sided_rows, threshold_judge

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
    words, plain = read_vocabulary(job.store), dict[str, Reading]()
    used = contrasts.excerpts.token_ids[np.unique(index[index >= 0])]
    _read_plain(job, [shown_text(ids, None, words) for ids in used], plain)
    token_ids = contrasts.token_ids(CLASSES)
    rows: list[Row] = []
    for control, explanations in job.explanations(units).items():
        for i, (unit, explanation) in enumerate(zip(units, explanations, strict=True)):
            gains, present = np.full(len(index[i]), np.nan), index[i] >= 0
            texts = [shown_text(ids, None, words) for ids in token_ids[i][present]]
            gains[present], failed, cost = _gains(job, explanation, texts, plain)
            sides = present_classes(index[i], len(CLASSES))
            for metric, other in (("surprisal", 1), ("surprisal_near_miss", 2)):
                both = gains[sides[0]], gains[sides[other]]
                row = area_row(job, metric, unit, *both, explanation.failed or failed)
                rows.append(row | cost | {"control": control})
                cost = {"prompt_hash": cost.get("prompt_hash")}  # what it took is told once
    if settings.sides:

        def gains_of(items: Items, explanation: Explanation) -> Float[ndarray, " items"] | Failed:
            texts = [shown_text(ids, None, words) for ids in items.token_ids]
            _read_plain(job, texts, plain)
            gains, failed, _ = _gains(job, explanation, texts, plain)
            return failed or gains

        judge = threshold_judge(job, CLASSES[:2], no_marks, gains_of)
        sides = settings.sides, settings.per_side, settings.window
        rows += sided_rows(job, "surprisal", *sides, counted="records", judge=judge)
    return rows


def _read_plain(job: ScoreJob, texts: Sequence[str], plain: dict[str, Reading]) -> None:
    """Have the texts that are not among those read yet read without an explanation."""
    assert job.client is not None
    missing = sorted(set(texts) - plain.keys())
    readings = job.client.read([WITHOUT + text for text in missing])
    plain.update(zip(missing, readings, strict=True))


def _gains(
    job: ScoreJob, explanation: Explanation, texts: Sequence[str], plain: dict[str, Reading]
) -> tuple[Float[ndarray, " texts"], Failed | None, Row]:
    """Return the gain of each text, why there are none, and what asking took.

    NaN where the model did not read it.
    """
    gains = np.full(len(texts), np.nan)
    if explanation.text is None:
        return gains, None, {}
    assert job.client is not None
    before = WITH.format(explanation.text)
    readings: Sequence[Reading] = job.client.read([before + text for text in texts])
    neutral = [plain[text] for text in texts]
    for i, (reading, other) in enumerate(zip(readings, neutral, strict=True)):
        gains[i] = mean_logprob(reading, before) - mean_logprob(other, WITHOUT)
    failures = [reading.failed for reading in (*readings, *neutral)]
    failed = failure_of(failures, bool(np.isnan(gains).all()))
    usage = usage_columns(sum((reading.usage for reading in readings), Usage()))
    return gains, failed, usage | {"prompt_hash": joined_hash([Prompt(text=before).sha256])}
