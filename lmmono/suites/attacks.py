"""Finished probes under attack: greedy edits of texts chosen against a classifier, queries counted.

An attack sees what the classifier answers, never its weights. It ranks the words of a text by how
much the own class loses when each is deleted, then edits them in that order until the class
changes. Sources: DeepWordBug (arXiv 1801.04354) for the character edits, TextFooler (arXiv
1907.11932) for the word edits and the order; the sentence encoder of TextFooler is left out, so
word candidates are as good as the lists they come from.

In suite `adversarial` the edits are chosen against each probe, so families do not meet the same
texts, but the same attack with the same limits. A row's value is the share of texts that the probe
has right after the attack; at level 0, before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64

from lmmono.data.corruption.edits import drop, insert_neighbour, press_neighbour, swap
from lmmono.data.corruption.synonyms import Synonyms
from lmmono.data.corruption.text_noise import Pieces, pieces_of, standing_in
from lmmono.errors import DataError, RobustnessError, nearest
from lmmono.probes.probe_jobs import Solver
from lmmono.registry.suites import Attack, Suite
from lmmono.suites.bench import Bench, Condition, Key, Measurement, Rows, judged_texts
from lmmono.suites.grid import probe_facts
from lmmono.suites.inputs import TEST, CleanProbes, learn, synonyms_for
from lmmono.suites.suite_draws import drawn

Predict = Callable[[list[str]], Float[np.ndarray, "n c"]]
"""Takes texts, returns a score of each class for each; the largest is the answer."""

ATTACKS: tuple[Attack, ...] = get_args(Attack)

_SLIPS = (swap, press_neighbour, drop, insert_neighbour)

Candidates = Callable[[str], list[str]]
"""Takes a word as written, returns what it may be replaced by."""


@dataclass(frozen=True, slots=True)
class AttackLimits:
    """What an attack may spend."""

    max_changed: float = 0.3
    """Share of a text's words that may be changed; at least one word may."""
    max_queries: int = 1000
    """Texts that the classifier may be asked about, per attacked text."""


@dataclass(frozen=True, slots=True)
class AttackedText:
    """What became of one text."""

    text: str
    """The text as it was."""
    adversarial: str
    """The text as the attack left it."""
    label: int
    """Its true class."""
    success: bool
    """Whether the classifier was right before and is wrong now."""
    skipped: bool
    """Whether the classifier was wrong before, so that there was nothing to attack."""
    changed: tuple[int, ...]
    """Which words were changed, in the order in which they were."""
    n_words: int
    """Number of words of the text."""
    queries: int
    """Texts that the classifier was asked about, the first included."""


@dataclass(frozen=True, slots=True)
class AttackReport:
    """What an attack did to a set of texts."""

    attack: str
    """Name of the attack."""
    limits: AttackLimits
    """What it was allowed."""
    results: tuple[AttackedText, ...]
    """One record per text, in their order."""

    @property
    def clean_accuracy(self) -> float:
        """Share of texts that the classifier gets right before the attack."""
        return float(np.mean([not result.skipped for result in self.results]))

    @property
    def accuracy_under_attack(self) -> float:
        """Share of texts that it gets right before and after."""
        return float(np.mean([not (r.skipped or r.success) for r in self.results]))

    @property
    def success_rate(self) -> float:
        """Share of attacked texts whose class the attack changed; NaN where none was attacked."""
        attacked = [result.success for result in self.results if not result.skipped]
        return float(np.mean(attacked)) if attacked else float("nan")

    @property
    def changed_fraction(self) -> float:
        """Mean share of words changed in the successful attacks; NaN where there is none."""
        shares = [len(r.changed) / r.n_words for r in self.results if r.success]
        return float(np.mean(shares)) if shares else float("nan")

    @property
    def mean_queries(self) -> float:
        """Mean number of queries per attacked text; NaN where none was attacked."""
        queries = [result.queries for result in self.results if not result.skipped]
        return float(np.mean(queries)) if queries else float("nan")

    def __repr__(self) -> str:
        return (
            f"AttackReport({self.attack}: {len(self.results)} texts, accuracy "
            f"{self.clean_accuracy:.3f} to {self.accuracy_under_attack:.3f}, "
            f"{self.mean_queries:.1f} queries)"
        )


def attack(
    predict: Predict,
    texts: Sequence[str],
    labels: Int64[np.ndarray, "n"],
    *,
    method: str,
    seed: int = 0,
    limits: AttackLimits = AttackLimits(),  # noqa: B008 - frozen
    synonyms: Synonyms | None = None,
) -> AttackReport:
    """Attack a classifier on texts and return what came of each.

    Args:
        predict: The classifier.
        texts: Texts to attack; those that it gets wrong are skipped and counted.
        labels: Their true classes.
        method: A name of `ATTACKS`. `characters`: swaps, slips, losses and insertions of one
            letter. `words`: words that may stand for the one there, by `synonyms`.
        seed: Seed of the character edits: each word has the same ones against every classifier.
        limits: What it may change and ask.
        synonyms: For `words`; see `lmmono.data.corruption.synonyms`.

    Raises:
        DataError: An unknown method, no texts, another number of labels, or no synonyms given.
    """
    if method not in ATTACKS:
        raise DataError(f"attack {method!r} is not known; {nearest(method, ATTACKS)}")
    if not texts or len(texts) != len(labels):
        raise DataError(f"attack: {len(texts)} texts and {len(labels)} labels: want one each")
    candidates = slips(seed)
    if method == "words":
        if synonyms is None:
            raise DataError("a word attack needs `synonyms`; see lmmono.data.corruption.synonyms")
        candidates = partial(standing_in, synonyms=synonyms)
    results = [
        _attacked(predict, text, label, candidates, limits)
        for text, label in zip(texts, labels.tolist(), strict=True)
    ]
    return AttackReport(method, limits, tuple(results))


def slips(seed: int) -> Candidates:
    """Return the character edits of words: one of each of the four slips, drawn by word."""

    def candidates(word: str) -> list[str]:
        rng = np.random.default_rng((seed, *word.encode("utf-8", "surrogatepass")))
        others = [slip(word, rng) for slip in _SLIPS]
        return list(dict.fromkeys(other for other in others if other is not None))

    return candidates


class _CountedQueries:
    """The classifier with its queries counted and limited."""

    def __init__(self, predict: Predict, label: int, limit: int) -> None:
        self.queries = 0
        self._predict, self._label, self._limit = predict, label, limit

    def margins(self, texts: list[str]) -> Float[np.ndarray, "n"]:
        """Return by how much the own class leads for as many of the texts as may be asked."""
        texts = texts[: self._limit - self.queries]
        if not texts:
            return np.empty(0)
        self.queries += len(texts)
        scores = np.asarray(self._predict(texts), float)
        own = scores[:, self._label].copy()
        scores = scores.copy()
        scores[:, self._label] = -np.inf
        return own - scores.max(axis=1)


def _attacked(
    predict: Predict, text: str, label: int, candidates: Candidates, limits: AttackLimits
) -> AttackedText:
    asked = _CountedQueries(predict, label, limits.max_queries)
    pieces = pieces_of(text)
    places = [i for i in range(0, len(pieces), 2) if pieces[i]]
    lead = float(asked.margins([text])[0])
    if lead <= 0:
        return AttackedText(text, text, label, False, True, (), len(places), asked.queries)
    allowed = max(1, int(limits.max_changed * len(places)))
    changed: list[int] = []
    for word in _by_importance(asked, pieces, places):
        if lead <= 0 or len(changed) == allowed:
            break
        place = places[word]
        others = candidates(pieces[place])
        margins = asked.margins([_with(pieces, place, other) for other in others])
        if len(margins) and margins.min() < lead:
            best = int(margins.argmin())
            pieces[place], lead = others[best], float(margins[best])
            changed.append(word)
    return AttackedText(
        *(text, "".join(pieces), label, lead <= 0, False),
        *(tuple(changed), len(places), asked.queries),
    )


def _by_importance(asked: _CountedQueries, pieces: Pieces, places: list[int]) -> list[int]:
    """Return the numbers of the words, first the one whose loss costs the own class most."""
    if len(places) < 2:
        return list(range(len(places)))
    margins = asked.margins([_with(pieces, place, "") for place in places])
    return np.argsort(margins, kind="stable").tolist()


def _with(pieces: Pieces, place: int, word: str) -> str:
    return "".join([*pieces[:place], word, *pieces[place + 1 :]])


LIMITS = AttackLimits()
"""What an attack of suite `adversarial` may change and ask."""


def attacked_rows(
    bench: Bench, suite: Suite, stored: Mapping[Key, str], solve: Solver
) -> Iterator[Rows]:
    """Yield the rows of every attack on every probe that are not stored yet, probe by probe."""
    indices = drawn(bench.task, TEST, bench.settings.n_attacked)
    judged = judged_texts(TEST, indices)
    draws = list(suite.load()(bench.task, bench.settings))
    lacking: list[tuple[int, str, list[Condition]]] = []
    for (i, draw), arm, method in product(enumerate(draws), bench.arms, bench.settings.attacks):
        conditions = [
            Condition(suite, arm, draw, TEST, judged, method, level)
            for level in (0.0, LIMITS.max_changed)
        ]
        if any(bench.lacks(about, stored) for about in conditions):
            lacking.append((i, method, conditions))
    if not lacking:
        return
    entrants = [conditions[0].entrant for _, _, conditions in lacking]
    learned = learn(bench, [arm for arm in bench.arms if arm in entrants], draws, solve)
    for i, method, conditions in lacking:
        entrant = conditions[0].entrant
        probes = learned[entrant.label, entrant.learner]
        report = _report(bench, probes, i, method, indices, draws[i].seed)
        yield [bench.row(about, _measured(about, report, probes, i)) for about in conditions]


def _report(
    bench: Bench,
    probes: CleanProbes,
    i: int,
    method: str,
    indices: Int64[np.ndarray, " n"],
    seed: int,
) -> AttackReport | str:
    """Return what an attack did to the probe of draw i, or why there was none."""
    failure = probes.fitted.probes.failures[i]
    if failure is not None:
        return failure
    name, probe = probes.arm.code.name, probes.probe(i)

    def predict(texts: list[str]) -> Float[np.ndarray, "n c"]:
        codes = bench.encoder.encode(texts, names=[name]).codes[name]
        return probe.predict(torch.from_numpy(codes))[0].numpy()

    part = bench.task.part(TEST)
    try:
        return attack(
            predict,
            [part.texts[at] for at in indices.tolist()],
            part.labels[indices],
            method=method,
            seed=seed,
            limits=LIMITS,
            synonyms=synonyms_for(bench) if method == "words" else None,
        )
    except (DataError, RobustnessError) as fault:
        return str(fault)


def _measured(
    about: Condition, report: AttackReport | str, probes: CleanProbes, i: int
) -> Measurement:
    """Return what a probe has right before or after an attack."""
    facts: dict[str, Any] = probe_facts(probes.fitted, i)
    if isinstance(report, str):
        return Measurement(failure=report, facts=facts)
    n = len(report.results)
    share = report.accuracy_under_attack if about.level else report.clean_accuracy
    values = {
        "success_rate": report.success_rate,
        "changed_fraction": report.changed_fraction,
        "mean_queries": report.mean_queries,
        "max_queries": report.limits.max_queries,
    }  # None where nothing was attacked
    facts |= {name: None if np.isnan(value) else value for name, value in values.items()}
    return Measurement(round(share * n), n, facts=facts)
