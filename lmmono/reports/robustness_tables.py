"""Tables of the robustness suites, from the rows of table `robustness`.

Every number stands with its interval, and says what failed.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import activation_store as astore
from lmmono.errors import DataError, RunError
from lmmono.registry.metrics import METRICS
from lmmono.reports.continuity_tables import continuity_tables
from lmmono.reports.flint_tables import flint_tables
from lmmono.reports.seed_means import over_seeds
from lmmono.reports.table import ReportTable
from lmmono.runs.folder import Run
from lmmono.stats.significance import FEW_SEEDS, Effect, holm
from lmmono.studies.comparisons import Comparison, compare_families
from lmmono.studies.doses import (
    ROW_MEASURES,
    SCORED,
    Dose,
    dose_responses,
    doses_of,
    read_doses,
)
from lmmono.studies.effective import EffectiveRobustness, effective_robustness
from lmmono.studies.hypotheses import (
    ALPHA,
    DENSE,
    Evidence,
    HypothesisVerdict,
    NotTestedError,
    first_word,
    gains_of,
    verdicts,
)
from lmmono.suites.results import (
    APART,
    FINE_TUNING,
    FULL,
    Result,
    areas_and_starts,
    grouped,
    read_results,
    severity_changes,
)
from lmmono.suites.robustness_run import run_results
from lmmono.suites.tuned import tuners


def robustness_tables(
    store: astore.Store,
    *,
    baseline: str = "raw",
    hypotheses: Sequence[str] = (),
    metric: str = "accuracy",
    measure: str | None = None,
) -> list[ReportTable]:
    """Return what a store says of robustness: values, differences, areas, domains, verdicts.

    Args:
        store: Open store.
        baseline: Family that the others are held against.
        hypotheses: Those that the recipe registered.
        metric: Metric of the rows.
        measure: How monosemantic dictionaries are, for H3: a metric of scorers; None takes what the
            rows say of the codes that they are of.

    Raises:
        DataError: No row is of the baseline, or a hypothesis is unknown.
        RunError: There are no rows.
    """
    results = [result for result in read_results(store, metric) if result.suite not in APART]
    if not results:
        raise RunError(f"{store.path}: no rows of {metric} in table robustness")
    compared = compare_families(results, baseline)
    tables = [
        *level_tables(results),
        comparison_table(compared, title=f"Difference from {baseline}"),
        noise_table(results),
        change_table(results, baseline),
    ]
    if any((result.split or "").startswith("ood:") for result in results):
        tables.append(_effective(results))
    if (doses := dose_table(results, read_doses(store, SCORED))).rows:
        tables.append(doses)
    if hypotheses:
        evidence = Evidence(results, read_doses(store, [measure]) if measure else None)
        tables += verdict_tables(verdicts(hypotheses, evidence))
    return tables


def suite_tables(run: Run, *, every: bool = False, so_far: bool = False) -> list[ReportTable]:
    """Return what a run's suites came to: areas against its first family, and the verdicts.

    Empty where the recipe has no suites, or they are not done.

    Args:
        run: A run whose suites are done.
        every: Return what `robustness_tables` says instead: each level and difference too.
        so_far: Return what suites that were begun have stored; their tables say so.

    Raises:
        LockedError: The suites are being run at this moment.
    """
    settings, is_done = run.recipe.robustness, run.is_done("robustness")
    is_begun = "robustness" in run.manifest.stages and run.store_path.exists()
    if not settings.suites or not (is_done or (so_far and is_begun)):
        return []
    tables: list[ReportTable] = []
    with run.reading() as store:
        results = [result for result in run_results(run, store) if result.suite not in APART]
        if every and settings.families and results:
            baseline, names = settings.families[0].label, settings.hypotheses
            tables = robustness_tables(store, baseline=baseline, hypotheses=names)
        else:
            scored = read_doses(store, SCORED, _hook_of(run))
            if settings.families and results:
                baseline = settings.families[0].label
                tables += [noise_table(results), change_table(results, baseline)]
                tables.append(tuned_table(results, _ways(run)))
            tables.append(dose_table(results, scored))
            if settings.hypotheses:
                hypotheses, *rest = verdict_tables(verdicts(settings.hypotheses, Evidence(results)))
                tables += [replace(hypotheses, note=hypotheses.note + _registered(run)), *rest]
            tables += [*flint_tables(store), *continuity_tables(store, _ways(run))]
    end = run.name if is_done else f"{run.name}, so far"
    return [replace(table, title=f"{table.title}, {end}") for table in tables if table.rows]


def _ways(run: Run) -> list[str]:
    """Return the ways to tune that the recipe names, in its order."""
    return [tuner.label for tuner in tuners(run.recipe.robustness.fine_tuning)]


def _registered(run: Run) -> str:
    """Return which file of claims stood in the manifest when the run began."""
    claims = run.manifest.registered
    if claims is None:
        return ""
    return f" Claims: {claims['file']}, sha256 {claims['sha256'][:12]}, read at {claims['time']}."


def _hook_of(run: Run) -> str | None:
    hook = run.manifest.stages["robustness"].facts.get("hook")
    return None if hook is None else str(hook)


def _effective(results: Sequence[Result]) -> ReportTable:
    """Return the table of other domains; where there is no line, it says why."""
    elsewhere = [result for result in results if result.suite == "ood"]
    dense = sorted({result.feature for result in elsewhere if first_word(result.feature) in DENSE})
    try:
        return effective_table(effective_robustness(elsewhere, dense))
    except DataError as missing:
        return replace(effective_table([]), note=f"Not worked out: {missing}")


def level_tables(results: Sequence[Result]) -> list[ReportTable]:
    """Return a table per task and corruption: families down, levels along, means over seeds."""
    tables: list[ReportTable] = []
    for curves in curves_of(results):
        first = next(result for result in curves if result.level)
        ordered = sorted(curves, key=lambda result: result.level or 0.0)
        levels = list(dict.fromkeys(result.strength for result in ordered))
        rows = [
            (
                name,
                *(
                    _over_seeds([r for r in family if r.strength == level], first.metric)
                    for level in levels
                ),
            )
            for name, family in by_name(curves).items()
        ]
        tables.append(
            ReportTable(
                title=title_of(first),
                columns=("family", *map(_strength, levels)),
                rows=tuple(rows),
                note=f"{first.metric}, mean over seeds with its 95 % interval (Student t); "
                f"level 0 is clean.",
            )
        )
    return tables


def noise_table(results: Sequence[Result]) -> ReportTable:
    """Return what each family is worth without noise, what noise takes, and what share is left."""
    rows: list[tuple[str, ...]] = []
    curves = [(area, start) for area, start in areas_and_starts(results) if start is not None]
    arms: dict[tuple[Any, ...], list[tuple[Result, Result]]] = {}
    for area, start in curves:
        about = (area.task, area.condition, area.feature, area.budget)
        arms.setdefault(about, []).append((area, start))
    for pairs in arms.values():
        first, starts = pairs[0][0], [start for _, start in pairs]
        changes = [replace(area, value=area.value - start.value) for area, start in pairs]
        shares = [replace(area, value=area.value / max(start.value, 1e-9)) for area, start in pairs]
        cells = (_over_seeds(starts, first.metric), _over_seeds(changes), _over_seeds(shares))
        shots = "" if first.n_shots is None else f", {first.n_shots} per class"
        condition = f"{first.suite}: {first.corruption}, {first.probe}{shots}"
        rows.append((first.task, condition, family_name(first.feature, first.budget), *cells))
    return ReportTable(
        title="Without noise, and what noise takes",
        columns=("task", "condition", "family", "at 0", "change", "relative"),
        rows=tuple(rows),
        note="at 0: the value without noise. change: area under the curve over levels, divided by "
        "the largest level, less the value at 0. relative: that area over the value at 0. Means "
        "over seeds with 95 % intervals (Student t over seeds, for these test texts).",
    )


def change_table(results: Sequence[Result], baseline: str) -> ReportTable:
    """Return what noise takes away from each family, and from the baseline."""
    changes = severity_changes(results)
    return comparison_table(
        compare_families(changes, baseline) if changes else [],
        title="Change under noise",
        note="Area under the severity curve less the value at level 0; above 0 is a smaller loss.",
    )


def tuned_table(results: Sequence[Result], ways: Sequence[str]) -> ReportTable:
    """Return how ways to tune the model differ from the first of them, at each level of noise.

    Without rows where the model was tuned in one way or none.
    """
    tuned = [result for result in results if result.suite == FINE_TUNING and result.feature in ways]
    is_there = bool(ways) and any(result.feature == ways[0] for result in tuned)
    return comparison_table(
        compare_families(tuned, ways[0]) if is_there else [],
        title=f"Tuned models less {ways[0] if ways else 'none'}",
    )


def comparison_table(
    comparisons: Iterable[Comparison], *, title: str, note: str = ""
) -> ReportTable:
    """Return paired differences, one row each."""
    rows = [
        (
            comparison.task,
            _condition(comparison),
            family_name(comparison.feature, comparison.budget),
            f"{comparison.mean:.3f}",
            f"{comparison.baseline_mean:.3f}",
            _difference(comparison.effect),
            f"{comparison.effect.p:.2g}",
            f"{comparison.p_holm:.2g}",
            f"{comparison.win_rate:.0%}",
            f"{comparison.effect.n_seeds}"
            + (f" ({comparison.n_lost} lost)" if comparison.n_lost else ""),
        )
        for comparison in comparisons
    ]
    methods = (
        "two-way over seeds and test texts where rows say which texts are right; else over seeds "
        f"within tasks: Student t, BCa bootstrap from {FEW_SEEDS} seeds on"
    )
    return ReportTable(
        title=title,
        columns=(
            *("task", "condition", "family", "mean", "baseline", "difference"),
            *("p", "p (Holm)", "wins", "seeds"),
        ),
        rows=tuple(rows),
        note=f"{note} Family less baseline, paired by task, seed and noise draw; 95 % interval "
        f"({methods}); p of the same, or of flipping signs, two-sided; Holm over the families of "
        "a condition.".strip(),
    )


def _difference(effect: Effect) -> str:
    interval = f" [{effect.ci_low:+.3f}, {effect.ci_high:+.3f}]"
    return f"{effect.value:+.3f}" + ("" if math.isnan(effect.ci_low) else interval)


def effective_table(families: Iterable[EffectiveRobustness]) -> ReportTable:
    """Return how far above the baselines' line each family lies, domain by domain."""
    rows = [
        (
            family.task,
            family.split,
            family.feature,
            f"{family.at_home:.3f}",
            f"{family.elsewhere:.3f}",
            str(family.effect).partition(", p")[0],
            f"{family.effect.p:.2g}",
            f"{family.p_holm:.2g}",
            f"{family.intercept:+.2f} {family.slope:+.2f} x",
        )
        for family in families
    ]
    return ReportTable(
        title="Effective robustness",
        columns=(
            *("task", "domain", "family", "at home", "elsewhere", "above the line"),
            *("p", "p (Holm)", "line"),
        ),
        rows=tuple(rows),
        note="Logits above the line through the baselines' accuracies at home (x) and elsewhere.",
    )


def dose_table(results: Sequence[Result], scored: Sequence[Dose] = ()) -> ReportTable:
    """Return how the gain under label noise goes with each measure, over dictionaries of one width.

    Without rows where fewer than 3 dictionaries have a gain: of 20 on, H3 may be judged.

    Args:
        results: Rows of one metric; they say some measures themselves.
        scored: Further measures of the same dictionaries.
    """
    evidence = Evidence(results)
    doses = [dose for measure in ROW_MEASURES for dose in doses_of(results, measure)]
    try:
        responses = dose_responses([*doses, *scored], gains_of(evidence))
    except (NotTestedError, DataError):
        responses = []
    rows = [
        (
            response.measure,
            f"{response.width}",
            f"{response.n}",
            f"{response.rho:+.2f}" + _interval((response.ci_low, response.ci_high), "+.2f"),
            f"{response.p:.2g}",
            f"{response.slope:+.3g}" + _interval((response.slope_low, response.slope_high), "+.3g"),
        )
        for response in responses
    ]
    return ReportTable(
        title="Gain under label noise against measures of dictionaries",
        columns=("measure", "width", "dictionaries", "Spearman", "p", "slope"),
        rows=tuple(rows),
        note="Gain: mean over seeds and noisy conditions, less the best dense control, probes of "
        "all coordinates. Interval of Bonett and Wright; p of dealing gains out anew, two-sided, "
        "not corrected; slope of Theil and Sen, gain per unit of the measure. l0 is no measure of "
        "meaning: what goes with it as well may be its doing.",
    )


def _interval(ends: tuple[float, float], form: str) -> str:
    return "" if math.isnan(ends[0]) else f" [{ends[0]:{form}}, {ends[1]:{form}}]"


def verdict_tables(judged: Sequence[HypothesisVerdict]) -> list[ReportTable]:
    """Return the registered hypotheses with what came out, and each control by itself."""
    rows = tuple(
        (verdict.name, verdict.claim, verdict.outcome, verdict.reason) for verdict in judged
    )
    tables = [
        ReportTable(
            title="Hypotheses registered before the run",
            columns=("", "claim", "verdict", "numbers"),
            rows=rows,
            note="Supported: some family is surely above 0 and none surely below (p < 0.05 after "
            "Holm over all findings, 95 % interval without 0); opposite: the reverse. Against "
            "several controls: surely better than every one, or surely worse than every one.",
        )
    ]
    single = [
        (verdict.name, finding.what, control, effect)
        for verdict in judged
        for finding in verdict.findings
        for control, effect in finding.by_control
    ]
    if not single:
        return tables
    corrected = holm([effect.p for *_, effect in single])
    by_control = tuple(
        (name, what, control, _difference(effect), f"{effect.p:.2g}", f"{p:.2g}", _word(effect, p))
        for (name, what, control, effect), p in zip(single, corrected, strict=True)
    )
    methods = ", ".join(sorted({effect.ci_method for *_, effect in single}))
    return [
        *tables,
        ReportTable(
            title="Hypotheses, control by control",
            columns=("", "family", "control", "difference", "p", "p (Holm)", "verdict"),
            rows=by_control,
            note="Family less control. supported, opposite: above, below 0 with p < 0.05 after "
            f"Holm over this table; inconclusive: neither. Intervals: {methods}.",
        ),
    ]


def _word(effect: Effect, p: float) -> str:
    if p >= ALPHA:
        return "inconclusive"
    return "supported" if effect.value > 0 else "opposite"


def curves_of(results: Sequence[Result]) -> list[list[Result]]:
    """Return the rows of each curve with those of its clean point, which has no kind or its own."""

    def about(row: Result) -> tuple[Any, ...]:
        return row.suite, row.task, row.learner, row.n_shots, row.metric, row.split

    clean = [result for result in results if result.level == 0.0]
    noisy = [result for result in results if result.level]
    curves: list[list[Result]] = []
    for points in grouped(noisy, lambda result: (about(result), result.corruption)):
        starts = [result for result in clean if about(result) == about(points[0])]
        own = [result for result in starts if result.corruption == points[0].corruption]
        curves.append([*(own or [r for r in starts if r.corruption is None]), *points])
    return curves


def by_name(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return results by family and budget, in the order of their names."""
    families: dict[str, list[Result]] = {}
    for result in results:
        families.setdefault(family_name(result.feature, result.budget), []).append(result)
    return dict(sorted(families.items()))


def family_name(feature: str, budget: str) -> str:
    """Return a family with its budget, where it has one."""
    return feature if budget == FULL else f"{feature} ({budget})"


def _over_seeds(results: Sequence[Result], metric: str | None = None) -> str:
    """Return the mean over seeds with its interval; says how many rows have no value."""
    mean = over_seeds((result.value for result in results), metric)
    if mean is None:
        return "-" if not results else f"failed: {results[0].failure}"
    n_failed = sum(math.isnan(result.value) for result in results)
    return f"{mean}" + (f" ({n_failed} failed)" if n_failed else "")


def title_of(first: Result, *, short: bool = False) -> str:
    """Return what a curve is of."""
    shots = "" if first.n_shots is None else f", {first.n_shots} per class"
    split = "" if first.split in (None, "test") else f" -> {first.split}"
    if short:
        return f"{first.task}{split}{shots}"
    better = METRICS[first.metric].better if first.metric in METRICS else "neither"
    arrow = "" if better == "neither" else f" ({better} is better)"
    probe = f", {first.learner}" if first.learner else ""
    return f"{first.task}{split}, {first.corruption}{probe}{shots}: {first.metric}{arrow}"


def _strength(level: float | str | None) -> str:
    return f"{level:.3g}" if isinstance(level, float) else str(level or "")


def _condition(comparison: Comparison) -> str:
    suite, corruption, level, probe, n_shots, _, split = comparison.condition
    kind = "clean" if corruption is None or level == 0.0 else f"{corruption}"
    strength = f" {_strength(level)}" if level else ""
    shots = "" if n_shots is None else f", {n_shots} per class"
    domain = "" if split in (None, "test") else f", {split}"
    return f"{suite}: {kind}{strength}" + (f", {probe}" if probe else "") + shots + domain
