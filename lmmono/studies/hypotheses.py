"""What is expected of monosemantic codes, said before the run, and what came out.

A recipe names hypotheses in `robustness.hypotheses`; its digest is in the run's manifest before a
probe is fitted. Each is one-sided in its claim and judged two-sided, so that the opposite can come
out too. Nothing here reads a row that the hypothesis does not name.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.errors import DataError
from lmmono.registry.suites import BAG_OF_WORDS, Hypothesis, find_hypothesis
from lmmono.stats.significance import Effect, effect, holm
from lmmono.studies.comparisons import by_seed, text_differences, two_way_effect
from lmmono.studies.doses import (
    ACTIVE_FRACTION,
    STRONGEST_CONSISTENCY,
    Dose,
    dose_responses,
    doses_of,
    is_whole,
)
from lmmono.studies.effective import effective_robustness
from lmmono.suites.results import Result

ALPHA = 0.05
"""Any verdict but `not supported` needs p below this after Holm, and an interval without 0."""

MIN_SEEDS = 5
"""Seeds of a task that a verdict needs."""

MIN_DICTIONARIES = 20
"""Dictionaries of one width that H3 needs."""

MAX_ACTIVE = 0.9
"""Share of the texts on which a coordinate is active above which consistency measures nothing: the
largest share of a class among nearly all texts is that of the commonest class, whatever the code.
Mean-pooled latents are active on 99.5 % of AG News texts (median)."""

DENSE = ("raw", "random_projection", "pca", "dense_ae", "dense")
"""First words of families that are dense: what a monosemantic code must beat."""

OTHERS = (
    *("relu", "random_relu", "random_topk", "random", "neurons", "top_neurons"),
    *("shuffled", "untrained", "ica", "nmf", BAG_OF_WORDS),
)
"""First words of families that are neither: they learned nothing sparse, or the model did."""

Outcome = Literal["supported", "not supported", "opposite", "not tested"]

SURE: tuple[Outcome, ...] = ("supported", "opposite")
"""Outcomes that say something."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one family, or one width, says of a hypothesis."""

    what: str
    """The family with its budget, task or domain; for H3 the width."""
    against: str
    """What it was held against."""
    value: float
    """Mean difference in the metric; logits for H4, Spearman's correlation for H3."""
    ci_low: float
    """Lower end of the 95 % interval."""
    ci_high: float
    """Upper end."""
    p: float
    """Two-sided."""
    p_holm: float
    """p after Holm's correction over the findings of the hypothesis."""
    n: int
    """Seeds, over all tasks; for H3 dictionaries."""
    least_p: float = 0.0
    """The least p that so many can give."""
    all_below: float | None = None
    """Of several controls: largest upper end of the differences from each; None of one."""
    by_control: tuple[tuple[str, Effect], ...] = ()
    """The difference from each control by itself."""

    @property
    def outcome(self) -> Outcome:
        """What this finding says by itself."""
        if self.p_holm < ALPHA and self.ci_low > 0:
            return "supported"
        high = self.ci_high if self.all_below is None else self.all_below
        if self.p_holm < ALPHA and high < 0:
            return "opposite"
        return "not supported"


@dataclass(frozen=True, slots=True)
class HypothesisVerdict:
    """What came out of a hypothesis."""

    name: str
    """H1 to H4."""
    claim: str
    """What was expected."""
    outcome: Outcome
    """`supported`: some family is surely above 0 and none surely below; `opposite`: the reverse.

    For H1 and H2 that is surely better than every dense control, or surely worse than every one."""
    reason: str
    """The numbers behind it, or why it was not tested."""
    findings: tuple[Finding, ...] = ()
    """Every family by itself."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What hypotheses are judged on."""

    results: Sequence[Result]
    """Rows of one metric."""
    doses: Sequence[Dose] | None = None
    """How monosemantic each dictionary is, for H3; None takes what the rows say of their codes."""
    probe: str = "logistic"
    """Learner whose rows count: tuned on noisy validation labels."""
    claimed: Sequence[str] | None = None
    """Families that are claimed to be robust; None takes all that are neither dense nor others."""
    dense: Sequence[str] | None = None
    """Dense controls; None takes those whose first word is one of `DENSE`."""

    def is_claimed(self, feature: str) -> bool:
        """Say whether a family is one that the hypotheses are about."""
        if self.claimed is not None:
            return feature in self.claimed
        return not self.is_dense(feature) and first_word(feature) not in OTHERS

    def is_dense(self, feature: str) -> bool:
        """Say whether a family is a dense control."""
        return feature in self.dense if self.dense is not None else first_word(feature) in DENSE


def first_word(feature: str) -> str:
    """Return the kind of a family's name.

    >>> first_word("pca-16"), first_word("random_topk-64-8")
    ('pca', 'random_topk')
    """
    return re.split(r"[^a-z_]", feature, maxsplit=1)[0]


class NotTestedError(Exception):
    """Rows that do not suffice for a hypothesis; says which are missing."""


def verdicts(names: Sequence[str], evidence: Evidence) -> list[HypothesisVerdict]:
    """Return what came out of each hypothesis.

    Args:
        names: Those that the recipe registered.
        evidence: Rows of its run.

    Raises:
        DataError: A name is unknown.
    """
    return [_verdict(find_hypothesis(name), evidence) for name in names]


def _verdict(hypothesis: Hypothesis, evidence: Evidence) -> HypothesisVerdict:
    about = hypothesis.name, hypothesis.claim
    try:
        raw = hypothesis.load()(evidence)
    except (NotTestedError, DataError) as missing:
        return HypothesisVerdict(*about, "not tested", str(missing))
    if len(raw) * min(finding.least_p for finding in raw) >= ALPHA:
        over = f" over {len(raw)} findings" if len(raw) > 1 else ""
        reason = f"{raw[0].n} seeds give no p below {ALPHA}{over}; want more seeds"
        return HypothesisVerdict(*about, "not tested", reason)
    corrected = holm([finding.p for finding in raw])
    findings = tuple(replace(finding, p_holm=p) for finding, p in zip(raw, corrected, strict=True))
    sure: list[Outcome] = [
        name for name in SURE if any(finding.outcome == name for finding in findings)
    ]
    outcome: Outcome = sure[0] if len(sure) == 1 else "not supported"
    counts = ", ".join(
        f"{n} {name}"
        for name in ("supported", "opposite", "not supported")
        if (n := sum(finding.outcome == name for finding in findings))
    )
    best = max(findings, key=lambda finding: finding.value)
    reason = (
        f"of {len(findings)}: {counts}; best {best.what} against {best.against} {best.value:+.4f} "
        f"[{best.ci_low:+.4f}, {best.ci_high:+.4f}], p = {best.p_holm:.3g} (Holm)"
    )
    return HypothesisVerdict(*about, outcome, reason, findings)


def _noisy_labels(evidence: Evidence, low: float, high: float) -> list[Result]:
    """Return the rows of noisy labels whose margin is in a range."""
    rows = [
        result
        for result in evidence.results
        if result.suite == "noisy_labels" and result.probe == evidence.probe and result.level
    ]
    if rows and all(math.isnan(row.margin) for row in rows):
        raise NotTestedError("rows of noisy_labels do not say n_classes, so no margin is known")
    # margins are computed from rates: one on a bound is off it by rounding
    inside = [row for row in rows if low - 1e-9 <= row.margin <= high + 1e-9]
    if not inside:
        raise NotTestedError(f"no row of noisy_labels with a margin from {low:g} to {high:g}")
    return inside


def _against_dense(evidence: Evidence, rows: Sequence[Result]) -> list[Finding]:
    """Return each claimed family's difference from the best dense control of its budget."""
    findings: list[Finding] = []
    arms = sorted({(r.feature, r.budget) for r in rows if evidence.is_claimed(r.feature)})
    if not arms:
        raise NotTestedError("no family that is claimed to be robust has rows")
    for feature, budget in arms:
        same = [row for row in rows if row.budget == budget]
        controls = sorted({row.feature for row in same if evidence.is_dense(row.feature)})
        if controls:
            effects = {
                control: _effect(same, feature, control, of_seeds)
                for control, of_seeds in differences(same, feature, controls).items()
            }
            findings.append(from_all(f"{feature} ({budget})", effects))
    if not findings:
        raise NotTestedError("no dense control has rows at the budget of a claimed family")
    return findings


def _effect(
    rows: Sequence[Result], feature: str, control: str, of_seeds: Sequence[Float[ndarray, " _"]]
) -> Effect:
    """Return a family's difference from a control, over seeds and test texts where rows say both.

    Only conditions in which both have a value count.
    """
    cells = {(r.key, r.condition, r.feature): r for r in rows if not math.isnan(r.value)}
    ours = [
        row
        for (key, condition, name), row in cells.items()
        if name == feature and (key, condition, control) in cells
    ]
    theirs = [cells[row.key, row.condition, control] for row in ours]
    by_text = text_differences(ours, theirs)
    return effect(of_seeds) if by_text is None else two_way_effect(by_text)


def from_all(what: str, effects: Mapping[str, Effect]) -> Finding:
    """Return how a family differs from the best of several controls, none chosen by its luck.

    Better than the best is better than each, and the opposite is worse than each: p is then the
    largest one (an intersection-union test), and no correction is due. Between the two, worse than
    some and not than others, p is 1. The interval is that of the least difference: least lower,
    least upper end.
    """
    least = min(effects, key=lambda name: effects[name].value)
    value, some = effects[least].value, list(effects.values())
    same_sign = value > 0 or all(effect.value < 0 for effect in some)
    p = max(effect.p for effect in some) if same_sign else 1.0
    low, high = min(effect.ci_low for effect in some), min(effect.ci_high for effect in some)
    return Finding(
        *(what, least, value, low, high, p, 1.0, some[0].n_seeds, some[0].least_p),
        all_below=max(effect.ci_high for effect in some),
        by_control=tuple(effects.items()),
    )


def differences(
    rows: Sequence[Result], feature: str, controls: Sequence[str]
) -> dict[str, list[Float[ndarray, " _"]]]:
    """Return a family's mean difference from each control, one per seed of each task.

    Only conditions in which the family and all controls have a value count.
    """
    means = _common_means(rows, [feature, *controls])
    if not means:
        raise NotTestedError(f"{feature} and the controls share no condition with values")
    for task in sorted({task for task, _ in means}):
        n_seeds = sum(task == other for other, _ in means)
        if n_seeds < MIN_SEEDS:
            raise NotTestedError(f"task {task} has {n_seeds} whole seeds, want {MIN_SEEDS}")
    return {
        control: by_seed({key: values[0] - values[i] for key, values in means.items()})
        for i, control in enumerate(controls, start=1)
    }


def _common_means(
    rows: Sequence[Result], families: Sequence[str]
) -> dict[tuple[str, int], list[float]]:
    """Return the mean of each family over the conditions that all have, by task and seed."""
    values: dict[tuple[str, int], dict[object, dict[str, float]]] = {}
    for row in rows:
        if row.feature in families and not math.isnan(row.value):
            cells = values.setdefault((row.task, row.seed), {})
            cells.setdefault((row.draw, row.condition), {})[row.feature] = row.value
    means: dict[tuple[str, int], list[float]] = {}
    for key, cells in values.items():
        shared = [cell for cell in cells.values() if len(cell) == len(families)]
        whole = [[cell[family] for family in families] for cell in shared]
        if whole:
            means[key] = np.mean(whole, axis=0).tolist()
    return means


def judge_realistic_noise(evidence: Evidence) -> list[Finding]:
    """Judge H1 on labels of which few are wrong."""
    return _against_dense(evidence, _noisy_labels(evidence, 0.8, 1.0))


def judge_extreme_noise(evidence: Evidence) -> list[Finding]:
    """Judge H2 on labels that hardly tell anything."""
    return _against_dense(evidence, _noisy_labels(evidence, 0.0, 0.2))


def judge_doses(evidence: Evidence) -> list[Finding]:
    """Return how the gain under label noise goes with the measure, width by width."""
    rows = [row for row in _noisy_labels(evidence, 0.0, 1.0) if is_whole(row)]
    gains = gains_of(evidence, rows)
    top = doses_of(rows, STRONGEST_CONSISTENCY)
    doses = (top or doses_of(rows)) if evidence.doses is None else evidence.doses
    active = [dose.value for dose in doses_of(rows, ACTIVE_FRACTION) if dose.feature in gains]
    is_of_all = evidence.doses is None and not top
    if is_of_all and active and np.median(active) > MAX_ACTIVE:
        raise NotTestedError(
            f"pooled codes are active on {np.median(active):.1%} of the texts (median over "
            f"dictionaries), so that their consistency is near 0 whatever the code; want at most "
            f"{MAX_ACTIVE:.0%}: sparser dictionaries, or a measure of scorers"
        )
    widths = Counter(dose.width for dose in doses if dose.feature in gains)
    if max(widths.values(), default=0) < MIN_DICTIONARIES:
        most = ", ".join(f"{n} of width {width}" for width, n in sorted(widths.items()))
        raise NotTestedError(
            f"want {MIN_DICTIONARIES} dictionaries of one width with a measure and a gain, "
            f"got {most or 'none'}"
        )
    responses = [r for r in dose_responses(doses, gains) if r.n >= MIN_DICTIONARIES]
    if not responses:
        raise NotTestedError("the measure or the gain is the same in all dictionaries")
    return [
        Finding(f"width {r.width}", r.measure, r.rho, r.ci_low, r.ci_high, r.p, 1.0, r.n)
        for r in responses
    ]


def gains_of(evidence: Evidence, rows: Sequence[Result] | None = None) -> Mapping[str, float]:
    """Return each claimed family's mean gain over the best dense control, at the full budget.

    Args:
        evidence: Says which families are claimed and which are controls.
        rows: Rows to take it from; None: all of the evidence's under label noise.

    Raises:
        NotTestedError: There are none of either, or too few.
    """
    if rows is None:
        rows = _noisy_labels(evidence, 0.0, 1.0)
    full = [row for row in rows if is_whole(row)]
    controls = sorted({row.feature for row in full if evidence.is_dense(row.feature)})
    claimed = sorted({row.feature for row in full if evidence.is_claimed(row.feature)})
    if not controls or not claimed:
        raise NotTestedError("want rows of dictionaries and of a dense control at the full budget")
    gains: dict[str, float] = {}
    for feature in claimed:
        by_control = differences(full, feature, controls).values()
        gains[feature] = min(
            float(np.mean([of_task.mean() for of_task in part])) for part in by_control
        )
    return gains


def judge_other_domains(evidence: Evidence) -> list[Finding]:
    """Return each claimed family's effective robustness, domain by domain."""
    rows = [r for r in evidence.results if r.suite == "ood" and r.probe == evidence.probe]
    dense = sorted({row.feature for row in rows if evidence.is_dense(row.feature)})
    compared = [r for r in rows if evidence.is_claimed(r.feature) or r.feature in dense]
    if not any((row.split or "").startswith("ood:") for row in compared):
        raise NotTestedError("no row of suite ood on another domain")
    distances = effective_robustness(compared, dense)
    if not distances:
        raise NotTestedError("no family that is claimed to be robust has rows")
    few = min(distance.effect.n_seeds for distance in distances)
    if few < MIN_SEEDS:
        raise NotTestedError(f"want {MIN_SEEDS} seeds, got {few}")
    line = "line of " + ", ".join(dense)
    return [
        Finding(
            f"{distance.feature}: {distance.task} -> {distance.split[4:]}",
            line,
            distance.effect.value,
            distance.effect.ci_low,
            distance.effect.ci_high,
            distance.effect.p,
            1.0,
            distance.effect.n_seeds,
            distance.effect.least_p,
        )
        for distance in distances
    ]
