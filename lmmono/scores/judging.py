"""Judges of records: a program, or a language model that reads the explanation.

A judge says of each record whether the unit fires in it, or at the marked tokens. What it does not
answer is NaN: counted, never left out.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from activation_store.read.characters import whole_characters
from lmmono.clients.client import (
    UNANSWERED,
    Answer,
    Client,
    Failed,
    Message,
    Prompt,
    Usage,
    final_answer,
)
from lmmono.explanations.explanation import Explanation, Program
from lmmono.records.sampler import Class, Contrasts
from lmmono.registry.scorer_settings import ContrastSettings
from lmmono.scores.score_job import Row, ScoreJob, undefined
from lmmono.stats.rates import AUROC_METHOD, auroc, auroc_interval
from lmmono.types import Split

MIN_RECORDS = 5
"""A class with fewer records is too small to score: `too_few_records`."""

CHANCE = 0.5
"""Balanced accuracy and AUROC of a judge that guesses; a unit without explanation gets it."""

N_ALTERNATIVES = 5
"""Alternatives asked for at each token, for the probability of a 1."""


@dataclass(frozen=True, slots=True)
class Items:
    """What is judged for one unit."""

    token_ids: Int[ndarray, "items window"]
    marked: Bool[ndarray, "items window"] | None
    """Tokens that are shown as firing; None where whole records are judged."""

    def take(self, chosen: ndarray) -> "Items":
        """Return some of the items."""
        marked = None if self.marked is None else self.marked[chosen]
        return Items(self.token_ids[chosen], marked)


Marks = Callable[[Contrasts, int], "Bool[ndarray, 'units records window'] | None"]
"""Marks the records of all classes, from a seed; None where whole records are judged."""


@dataclass(frozen=True, slots=True)
class Contrasting:
    """The items of all units of one split: `n` records of each class, one class after the other."""

    contrasts: Contrasts
    items: list[Items]
    present: Bool[ndarray, "units items"]
    n: int

    def of(self, i: int, which: int) -> Int[ndarray, " items"]:
        """Return the items of a class that there are for a unit."""
        places = np.arange(which * self.n, (which + 1) * self.n)
        return places[self.present[i, places]]


def read_contrasting(
    job: ScoreJob, split: Split, classes: tuple[Class, ...], marks: Marks
) -> Contrasting:
    """Draw the records of a job's classes, and mark them."""
    settings = job.settings_as(ContrastSettings)
    n = settings.n
    contrasts = job.reader.contrasts(
        job.hook, split, n, window=settings.window, units=job.units, ranked=settings.ranked
    )
    ids, marked = contrasts.token_ids(classes), marks(contrasts, job.seed)
    present = contrasts.of(classes) >= 0
    if marked is not None:
        present = present & marked.any(axis=2)
    by_unit = [None] * len(ids) if marked is None else marked
    items = [Items(one, mark) for one, mark in zip(ids, by_unit, strict=True)]
    return Contrasting(contrasts, items, present, n)


def no_marks(_: Contrasts, __: int) -> None:
    """Mark nothing: whole records are judged."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge said of one unit's items."""

    scores: Float[ndarray, " items"]
    """How sure it is that the unit fires; NaN where it did not answer."""
    fires: Float[ndarray, " items"]
    """1 or 0; NaN where it did not answer."""
    failed: Failed | None = None
    """Why there is no answer at all."""
    usage: Usage = field(default_factory=Usage)
    """What it took."""
    prompt_hash: str | None = None
    """sha256 of the prompts."""


def predicted(program: Program, items: Items) -> Float[ndarray, " items"]:
    """Return a program's score of each item: its predicted maximum, or mean on marked tokens."""
    acts, is_token = program.simulate(items.token_ids), items.token_ids >= 0
    if items.marked is None:
        return np.where(is_token, acts, -np.inf).max(axis=1)
    marked = items.marked & is_token
    return (acts * marked).sum(axis=1) / np.maximum(marked.sum(axis=1), 1)


def judge_by_program(program: Program, items: Items, threshold: float) -> Judgement:
    """Return a program's verdict; the threshold comes from other records."""
    scores = predicted(program, items)
    return Judgement(scores, (scores > threshold).astype(float))


_SYSTEM = """You are told what makes one unit of a language model fire, and shown numbered texts.
Decide for each text whether the unit fires {where}. Answer with one list of {zero_one} only, such \
as {example}: a 1 where it fires, a 0 where it does not, one entry per text, in order."""

_SHOWN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "colours",
        (" the door was<< red>> and", " a cold night in", " her<< blue>> eyes looked"),
        "[1,0,1]",
    ),
    (
        "the second half of a quotation",
        (' he said << no>>"', " we went home early"),
        "[0,0]",
    ),
)


def judge_by_client(
    client: Client,
    explanations: Sequence[Explanation],
    items: Sequence[Items],
    order: Sequence[ndarray],
    vocabulary: tuple[str, ...],
    batch: int,
    max_tokens: int | None = None,
) -> list[Judgement]:
    """Ask a language model about every unit's items, `batch` at a time in the order given.

    An item that is not in the order is not asked about and stays NaN.
    """
    prompts: list[Prompt] = []
    asked: list[tuple[int, ndarray]] = []
    for i, (explanation, of_unit, places) in enumerate(
        zip(explanations, items, order, strict=True)
    ):
        if explanation.text is not None:
            for first in range(0, len(places), batch):
                chosen = places[first : first + batch]
                prompts.append(_prompt(explanation.text, of_unit, chosen, vocabulary))
                asked.append((i, chosen))
    # three tokens a label, such as " 1,", and a few words before the list
    budget = 3 * batch + 8 if max_tokens is None else max_tokens
    answers = client.complete(prompts, max_tokens=budget, n_alternatives=N_ALTERNATIVES)
    return _collected(items, prompts, asked, answers)


def _collected(
    items: Sequence[Items],
    prompts: Sequence[Prompt],
    asked: Sequence[tuple[int, ndarray]],
    answers: Sequence[Answer],
) -> list[Judgement]:
    scores = [np.full(len(item.token_ids), np.nan) for item in items]
    fires = [np.full(len(item.token_ids), np.nan) for item in items]
    usages, hashes = [Usage() for _ in items], [list[str]() for _ in items]
    failures: list[list[Failed]] = [[] for _ in items]
    for (i, chosen), prompt, answer in zip(asked, prompts, answers, strict=True):
        usages[i] = usages[i] + answer.usage
        hashes[i].append(prompt.sha256)
        parsed = _parsed(answer, len(chosen))
        if parsed is None:
            wanted = f"want a list of {len(chosen)} labels, got {(answer.text or '')[:80]!r}"
            failures[i].append(answer.failed or Failed("unparsed", wanted))
        else:
            fires[i][chosen], scores[i][chosen] = parsed
    return [
        Judgement(
            scores[i],
            fires[i],
            failure_of(failures[i], bool(np.isnan(fires[i]).all())),
            usages[i],
            joined_hash(hashes[i]),
        )
        for i in range(len(items))
    ]


def failure_of(failures: Iterable[Failed | None], has_no_answer: bool) -> Failed | None:
    """Return why a unit has no judgement: nothing usable came back, or the judge was out of reach.

    An answer that cannot be read is the judge's fault and counted; one that never came would score
    the connection, so the unit is asked again.
    """
    named = sorted(
        (failure for failure in failures if failure is not None),
        key=lambda failure: failure.failure,
    )
    outage = [failure for failure in named if failure.failure in UNANSWERED]
    return next(iter(outage or (named if has_no_answer else [])), None)


def joined_hash(hashes: Sequence[str]) -> str | None:
    """Return one sha256 for the prompts of a unit; that of the only one, or None for none."""
    if len(hashes) <= 1:
        return hashes[0] if hashes else None
    return Prompt(text="".join(hashes)).sha256


def _prompt(
    text: str, items: Items, chosen: Int[ndarray, " batch"], vocabulary: tuple[str, ...]
) -> Prompt:
    is_marked = items.marked is not None
    where = "exactly on the tokens marked << >>" if is_marked else "anywhere in it"
    example = json.dumps([1, 0, 0, 1, 1][: len(chosen)]).replace(" ", "")
    system = _SYSTEM.format(where=where, zero_one="0s and 1s", example=example)
    messages = [Message("system", system)]
    for meaning, texts, answer in _SHOWN:
        shown = [text if is_marked else text.replace("<<", "").replace(">>", "") for text in texts]
        messages.append(Message("user", _question(meaning, shown)))
        messages.append(Message("assistant", answer))
    texts = [
        shown_text(
            items.token_ids[i], None if items.marked is None else items.marked[i], vocabulary
        )
        for i in chosen
    ]
    return Prompt((*messages, Message("user", _question(text, texts))))


def _question(meaning: str, texts: Sequence[str]) -> str:
    numbered = "\n".join(f"Text {i}: {text}" for i, text in enumerate(texts, start=1))
    return f"The unit fires on: {meaning}\n{numbered}"


def shown_text(
    token_ids: Int[ndarray, " window"],
    marked: Bool[ndarray, " window"] | None,
    vocabulary: tuple[str, ...],
) -> str:
    """Return a record as people read it, one line, neighbouring marked tokens in one pair of marks.

    >>> shown_text(np.array([0, 1, 0, -1]), np.array([False, True, False, False]), ("a", "b"))
    'a<<b>>a'
    """
    is_token = token_ids >= 0
    on = [
        False,
        *([False] * int(is_token.sum()) if marked is None else marked[is_token].tolist()),
        False,
    ]
    parts: list[str] = []
    words = [vocabulary[i] if i < len(vocabulary) else f"[{i}]" for i in token_ids[is_token]]
    for i, word in enumerate(whole_characters(words)):
        parts.append(f"{'<<' * (on[i + 1] and not on[i])}{word}")
        parts.append(">>" * (on[i + 1] and not on[i + 2]))
    return "".join(parts).replace("\n", "\\n")


def _parsed(answer: Answer, n: int) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]] | None:
    """Return the labels and how sure each is, or None where the answer is no list of n labels."""
    text = final_answer(answer.text or "")
    bracketed = re.search(r"\[([^\]]*)\]", text)
    digits = re.fullmatch(r"\s*[01](\s*,?\s*[01])*\s*", bracketed[1] if bracketed else text)
    labels = np.array([float(digit) for digit in re.findall("[01]", digits[0])]) if digits else None
    if labels is None or len(labels) != n:
        return None
    sure = _probabilities(answer)
    return labels, labels if len(sure) != n else sure


def _probabilities(answer: Answer) -> Float[ndarray, " digits"]:
    """Return P(1) / (P(0) + P(1)) at each token of the answer that is a digit."""
    shares: list[float] = []
    for token, alternatives in zip(answer.tokens, answer.alternatives, strict=False):
        if token.strip(" [],") in ("0", "1"):
            mass = {"0": 0.0, "1": 0.0}
            for other, logprob in {token: -np.inf, **alternatives}.items():
                digit = other.strip(" [],")
                if digit in mass:
                    mass[digit] += float(np.exp(logprob))
            total = mass["0"] + mass["1"]
            shares.append(mass["1"] / total if total > 0 else float(token.strip(" [],")))
    return np.array(shares)


def present_classes(index: Int[ndarray, " records"], n_classes: int) -> list[ndarray]:
    """Return the places of the records that there are, by class; classes are equally long."""
    return [places[index[places] >= 0] for places in np.split(np.arange(len(index)), n_classes)]


def area_row(
    job: ScoreJob,
    metric: str,
    unit: int,
    firing: Float[ndarray, " firing"],
    other: Float[ndarray, " other"],
    failed: Failed | None,
) -> Row:
    """Return the row of a unit whose value is the AUROC of one number per record.

    A record whose number is NaN is counted as a failure and ties with all others.
    """
    n = len(firing) + len(other)
    counts: Row = {"n": n, "n_records": n}
    unanswered = int(np.isnan(firing).sum() + np.isnan(other).sum())
    if failed is None and min(len(firing), len(other)) < MIN_RECORDS:
        failed = Failed("too_few_records")
    if failed is None and unanswered == n:
        failed = Failed("no_answer")
    if failed is not None:
        return job.row(metric, unit, **counts, **undefined(failed, CHANCE))
    value = auroc(firing, other)
    low, high = auroc_interval(value, len(firing), len(other))
    counts |= {"value": value, "ci_low": low, "ci_high": high, "ci_method": AUROC_METHOD}
    return job.row(metric, unit, **counts, nan_fraction=0.0, n_failures=unanswered)
