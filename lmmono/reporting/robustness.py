"""Tables and figures of the robustness suites, from the rows of table `robustness`.

Every number stands with its interval and its number of seeds; families are told apart by colour,
marker and name together.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import activation_store as astore
from lmmono.errors import DataError, RunError
from lmmono.metrics import METRICS
from lmmono.reporting.tables import Table
from lmmono.robust.comparisons import (
    FEW_SEEDS,
    Comparison,
    compare_families,
    grouped,
    student_interval,
)
from lmmono.robust.doses import read_doses
from lmmono.robust.effective import EffectiveRobustness, effective_robustness
from lmmono.robust.hypotheses import DENSE, Evidence, Verdict, first_word, verdicts
from lmmono.robust.results import FULL, REAL, Result, read_results, severity_areas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # for annotations only: matplotlib takes half a second to import
    Axes = object

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
"""Okabe and Ito's colours, which colour-blind people tell apart."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
"""One for each round through the colours."""

Style = tuple[str, str, str]
"""Colour, marker and dash of a family."""


def robustness_tables(
    store: astore.Store,
    *,
    baseline: str = "raw",
    hypotheses: Sequence[str] = (),
    metric: str = "accuracy",
    measure: str = "semantic_consistency",
) -> list[Table]:
    """Return what a store says of robustness: values, differences, areas, domains, verdicts.

    Args:
        store: Open store.
        baseline: Family that the others are held against.
        hypotheses: Those that the recipe registered.
        metric: Metric of the rows.
        measure: How monosemantic dictionaries are, for H3.

    Raises:
        DataError: No row is of the baseline, or a hypothesis is unknown.
        RunError: There are no rows.
    """
    results = read_results(store, metric)
    if not results:
        raise RunError(f"{store.path}: no rows of {metric} in table robustness")
    compared = compare_families(results, baseline)
    tables = [
        *level_tables(results),
        comparison_table(compared, title=f"Difference from {baseline}"),
        area_table(results, baseline),
    ]
    if any((each.split or "").startswith("ood:") for each in results):
        tables.append(_effective(results))
    if hypotheses:
        evidence = Evidence(results, read_doses(store, measure))
        tables.append(verdict_table(verdicts(hypotheses, evidence)))
    return tables


def _effective(results: Sequence[Result]) -> Table:
    """Return the table of other domains; where there is no line, it says why."""
    mine = [each for each in results if each.suite == "ood"]
    dense = sorted({each.feature for each in mine if first_word(each.feature) in DENSE})
    try:
        return effective_table(effective_robustness(mine, dense))
    except DataError as missing:
        return replace(effective_table([]), note=f"Not worked out: {missing}")


def level_tables(results: Sequence[Result]) -> list[Table]:
    """Return a table per task and corruption: families down, levels along, means over seeds."""
    tables: list[Table] = []
    for curves in _curves(results):
        first = next(each for each in curves if each.level)
        ordered = sorted(curves, key=lambda each: each.level or 0.0)
        levels = list(dict.fromkeys(each.strength for each in ordered))
        rows = [
            (name, *(_over_seeds([r for r in mine if r.strength == level]) for level in levels))
            for name, mine in _by_name(curves).items()
        ]
        tables.append(
            Table(
                title=_title(first),
                columns=("family", *map(_strength, levels)),
                rows=tuple(rows),
                note=f"{first.metric}, mean over seeds with its 95 % interval (Student t); "
                f"level 0 is clean.",
            )
        )
    return tables


def area_table(results: Sequence[Result], baseline: str) -> Table:
    """Return the areas under the severity curves, and how they differ from the baseline's."""
    areas = severity_areas(results)
    return comparison_table(
        compare_families(areas, baseline) if areas else [],
        title="Area under the severity curve",
        note="Area over levels from 0 on, divided by the largest level.",
    )


def comparison_table(found: Iterable[Comparison], *, title: str, note: str = "") -> Table:
    """Return paired differences, one row each."""
    rows = [
        (
            each.task,
            _condition(each),
            _name(each.feature, each.budget),
            f"{each.mean:.3f}",
            f"{each.baseline_mean:.3f}",
            f"{each.effect.value:+.3f} [{each.effect.ci_low:+.3f}, {each.effect.ci_high:+.3f}]",
            f"{each.effect.p:.2g}",
            f"{each.p_holm:.2g}",
            f"{each.win_rate:.0%}",
            f"{each.effect.n_seeds}" + (f" ({each.n_lost} lost)" if each.n_lost else ""),
        )
        for each in found
    ]
    methods = f"over seeds within tasks: Student t, BCa bootstrap from {FEW_SEEDS} seeds on"
    return Table(
        title=title,
        columns=(
            *("task", "condition", "family", "mean", "baseline", "difference"),
            *("p", "p (Holm)", "wins", "seeds"),
        ),
        rows=tuple(rows),
        note=f"{note} Family less baseline, paired by task, seed and noise draw; 95 % interval "
        f"({methods}); p of flipping signs, two-sided; Holm over the families of a "
        "condition.".strip(),
    )


def effective_table(found: Iterable[EffectiveRobustness]) -> Table:
    """Return how far above the baselines' line each family lies, domain by domain."""
    rows = [
        (
            each.task,
            each.split,
            each.feature,
            f"{each.at_home:.3f}",
            f"{each.elsewhere:.3f}",
            str(each.effect).partition(", p")[0],
            f"{each.effect.p:.2g}",
            f"{each.p_holm:.2g}",
            f"{each.intercept:+.2f} {each.slope:+.2f} x",
        )
        for each in found
    ]
    return Table(
        title="Effective robustness",
        columns=(
            *("task", "domain", "family", "at home", "elsewhere", "above the line"),
            *("p", "p (Holm)", "line"),
        ),
        rows=tuple(rows),
        note="Logits above the line through the baselines' accuracies at home (x) and elsewhere.",
    )


def verdict_table(found: Iterable[Verdict]) -> Table:
    """Return the registered hypotheses with what came out."""
    rows = tuple((each.name, each.claim, each.outcome, each.reason) for each in found)
    return Table(
        title="Hypotheses registered before the run",
        columns=("", "claim", "verdict", "numbers"),
        rows=rows,
        note="Supported: some family is surely above 0 and none surely below (p < 0.05 after Holm "
        "over all findings, 95 % interval without 0); opposite: the reverse.",
    )


def robustness_figures(
    results: Sequence[Result],
    baseline: str,
    folder: str | Path,
    *,
    format: Literal["svg", "png"] = "svg",
) -> list[Path]:
    """Draw a figure per corruption: values over levels, and below them what the baseline lacks.

    Panels are tasks, with their numbers of shots; bars are 95 % intervals over seeds, those of the
    lower row of paired differences. Equal input gives equal bytes.

    Args:
        results: Rows of one metric.
        baseline: Family that the others are held against.
        folder: Where the figures go; made if it is not there.
        format: Kind of file.

    Returns:
        The files, `<suite>_<corruption>.<format>`.

    Raises:
        RunError: No row has a corruption with a level.
        DataError: No row is of the baseline.
    """
    curves = _curves([each for each in results if each.corruption != REAL])
    if not curves:
        raise RunError("robustness figures: no row has a corruption with a level")
    styles = _styles(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_kind: dict[tuple[str, str], list[list[Result]]] = {}
    for curve in curves:
        first = next(each for each in curve if each.level)
        by_kind.setdefault((first.suite, first.corruption or ""), []).append(curve)
    paths: list[Path] = []
    for kind, panels in by_kind.items():
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", "_".join(kind))
        _figure(panels, baseline, styles, folder / f"{name}.{format}")
        paths.append(folder / f"{name}.{format}")
    return paths


def _figure(
    panels: Sequence[Sequence[Result]], baseline: str, styles: Mapping[str, Style], path: Path
) -> None:
    """Draw one corruption: a column per panel, values above differences."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # the salt and the date are all that differs between two drawings of one thing
    with mpl.rc_context({"svg.hashsalt": "lmmono", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(panels) + 1.4, 6.2), layout="constrained")
        grid = figure.subplots(2, len(panels), squeeze=False, sharex="col")
        for column, curves in enumerate(panels):
            upper, lower = grid[0][column], grid[1][column]
            first = next(each for each in curves if each.level)
            upper.set_title(_title(first, short=True), fontsize=9)
            upper.set_ylabel(first.metric)
            _draw_values(upper, curves, styles)
            _draw_differences(lower, curves, baseline, styles)
            lower.set_xlabel(f"level of {first.corruption}")
            lower.set_ylabel(f"less {baseline}, paired")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper")
        about = {"Date": None, "Creator": "lmmono"} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, format=path.suffix[1:], dpi=150, metadata=about)


def _draw_values(axes: "Axes", curves: Sequence[Result], styles: Mapping[str, Style]) -> None:
    for name, mine in _by_name(curves).items():
        points = grouped(sorted(mine, key=lambda each: each.level or 0.0), lambda each: each.level)
        intervals = [_mean_interval([each.value for each in part]) for part in points]
        _line(axes, [part[0].level or 0.0 for part in points], intervals, name, styles[name])


def _draw_differences(
    axes: "Axes", curves: Sequence[Result], baseline: str, styles: Mapping[str, Style]
) -> None:
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    whole = [each for each in curves if not math.isnan(each.value)]
    levels = {each.condition: each.level or 0.0 for each in whole}
    found: dict[str, list[Comparison]] = {}
    for each in compare_families(whole, baseline):
        found.setdefault(_name(each.feature, each.budget), []).append(each)
    for name, mine in found.items():
        mine.sort(key=lambda each: levels[each.condition])
        intervals = [(e.effect.value, e.effect.ci_low, e.effect.ci_high) for e in mine]
        _line(axes, [levels[each.condition] for each in mine], intervals, name, styles[name])


def _line(
    axes: "Axes",
    along: Sequence[float],
    intervals: Sequence[tuple[float, float, float]],
    name: str,
    style: Style,
) -> None:
    values, low, high = np.array(intervals).T
    arms = np.nan_to_num(np.clip([values - low, high - values], 0.0, None))
    colour, marker, dash = style
    axes.errorbar(
        list(along),
        values,
        yerr=arms,
        color=colour,
        marker=marker,
        linestyle=dash,
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=name,
    )


def _styles(results: Sequence[Result]) -> dict[str, Style]:
    """Return a style for each family, the same in every figure."""
    names = sorted({_name(each.feature, each.budget) for each in results})
    n = len(_COLOURS)
    return {
        name: (_COLOURS[i % n], _MARKERS[i % n], _DASHES[i // n % len(_DASHES)])
        for i, name in enumerate(names)
    }


def _curves(results: Sequence[Result]) -> list[list[Result]]:
    """Return the rows of each curve with those of its clean point, which has no kind or its own."""

    def about(each: Result) -> tuple[Any, ...]:
        return each.suite, each.task, each.probe, each.n_shots, each.metric, each.split

    clean = [each for each in results if each.level == 0.0]
    noisy = [each for each in results if each.level]
    found: list[list[Result]] = []
    for mine in grouped(noisy, lambda each: (about(each), each.corruption)):
        starts = [each for each in clean if about(each) == about(mine[0])]
        own = [each for each in starts if each.corruption == mine[0].corruption]
        found.append([*(own or [r for r in starts if r.corruption is None]), *mine])
    return found


def _by_name(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for each in results:
        found.setdefault(_name(each.feature, each.budget), []).append(each)
    return dict(sorted(found.items()))


def _name(feature: str, budget: str) -> str:
    return feature if budget == FULL else f"{feature} ({budget})"


def _over_seeds(results: Sequence[Result]) -> str:
    """Return the mean over seeds with its interval; says how many rows have no value."""
    values = [each.value for each in results if not math.isnan(each.value)]
    failed = len(results) - len(values)
    if not values:
        return "-" if not results else f"failed: {results[0].failure}"
    mean, low, high = _mean_interval(values)
    text = f"{mean:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")
    return text + (f" ({failed} failed)" if failed else "")


def _mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    known = np.array([value for value in values if not math.isnan(value)])
    if len(known) < 2:
        return (float(known.mean()) if len(known) else math.nan), math.nan, math.nan
    return float(known.mean()), *student_interval([known])


def _title(first: Result, *, short: bool = False) -> str:
    """Return what a curve is of."""
    shots = "" if first.n_shots is None else f", {first.n_shots} per class"
    split = "" if first.split in (None, "test") else f" -> {first.split}"
    if short:
        return f"{first.task}{split}{shots}"
    better = METRICS[first.metric].better if first.metric in METRICS else "neither"
    arrow = "" if better == "neither" else f" ({better} is better)"
    probe = f", {first.probe}" if first.probe else ""
    return f"{first.task}{split}, {first.corruption}{probe}{shots}: {first.metric}{arrow}"


def _strength(level: float | str | None) -> str:
    return f"{level:.3g}" if isinstance(level, float) else str(level or "")


def _condition(found: Comparison) -> str:
    suite, corruption, level, probe, n_shots, _, split = found.condition
    kind = "clean" if corruption is None or level == 0.0 else f"{corruption}"
    strength = f" {_strength(level)}" if level else ""
    shots = "" if n_shots is None else f", {n_shots} per class"
    domain = "" if split in (None, "test") else f", {split}"
    return f"{suite}: {kind}{strength}" + (f", {probe}" if probe else "") + shots + domain
