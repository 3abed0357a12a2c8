"""Figures of the robustness suites: values over levels, and the differences from a baseline.

Families are told apart by colour, marker and dash together, the same in every figure.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lmmono.errors import RunError
from lmmono.files.atomic import disk_faults
from lmmono.reports.robustness_tables import (
    by_name,
    curves_of,
    family_name,
    title_of,
)
from lmmono.reports.seed_means import over_seeds
from lmmono.reports.table import Interval
from lmmono.runs.folder import Run
from lmmono.studies.comparisons import Comparison, compare_families
from lmmono.suites.results import APART, REAL, Result, grouped
from lmmono.suites.robustness_run import run_results
from lmmono.types import Progress, silent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # for annotations only: matplotlib takes half a second to import
    Axes = Figure = object

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
"""Okabe and Ito's colours, which colour-blind people tell apart."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
"""One for each round through the colours."""

# the salt and the date are all that differs between two drawings of one thing
_RC: dict[Any, Any] = {"svg.hashsalt": "lmmono", "svg.fonttype": "none", "font.size": 9}

FIGURES = "robustness"
"""Folder of a run that holds the figures of its suites."""

Style = tuple[str, str, str]
"""Colour, marker and dash of a family."""


def figures_run(run: Run, *, progress: Progress = silent) -> dict[str, list[str]]:  # noqa: ARG001
    """Draw the figures of a run's suites into its folder `robustness/`, which appears when whole.

    Empty where there is nothing to draw: no suite has levels, or the recipe no family to hold the
    others against.

    Raises:
        RunError: The folder cannot be written.
    """
    with run.reading() as store:
        results = [result for result in run_results(run, store) if result.suite not in APART]
    fresh, final = run.dir / f"{FIGURES}.tmp", run.dir / FIGURES
    with disk_faults(fresh):
        for folder in (fresh, final):
            shutil.rmtree(folder, ignore_errors=True)
        fresh.mkdir(parents=True)
        families = run.recipe.robustness.families
        if families and any(result.level and result.corruption != REAL for result in results):
            robustness_figures(results, families[0].label, fresh)
        fresh.replace(final)
    return {"figures": sorted(path.name for path in final.iterdir())}


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
    import matplotlib as mpl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, figure in robustness_panels(results, baseline).items():
        path = folder / f"{name}.{format}"
        about = {"Date": None, "Creator": "lmmono"} if format == "svg" else {"Software": None}
        with mpl.rc_context(_RC):
            figure.savefig(path, format=format, dpi=150, metadata=about)
        paths.append(path)
    return paths


def robustness_panels(results: Sequence[Result], baseline: str) -> dict[str, Figure]:
    """Return the figures that `robustness_figures` writes, by suite and corruption.

    Raises:
        RunError: No row has a corruption with a level.
        DataError: No row is of the baseline.
    """
    curves = curves_of([result for result in results if result.corruption != REAL])
    if not curves:
        raise RunError("robustness figures: no row has a corruption with a level")
    styles = _styles(results)
    by_kind: dict[tuple[str, str], list[list[Result]]] = {}
    for curve in curves:
        first = next(result for result in curve if result.level)
        by_kind.setdefault((first.suite, first.corruption or ""), []).append(curve)
    return {
        re.sub(r"[^A-Za-z0-9_.-]", "_", "_".join(kind)): _figure(panels, baseline, styles)
        for kind, panels in by_kind.items()
    }


def _figure(
    panels: Sequence[Sequence[Result]], baseline: str, styles: Mapping[str, Style]
) -> Figure:
    """Draw one corruption: a column per panel, values above differences."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC):
        figure = Figure(figsize=(4.2 * len(panels) + 1.4, 6.2), layout="constrained")
        grid = figure.subplots(2, len(panels), squeeze=False, sharex="col")
        for column, curves in enumerate(panels):
            upper, lower = grid[0][column], grid[1][column]
            first = next(result for result in curves if result.level)
            upper.set_title(title_of(first, short=True), fontsize=9)
            upper.set_ylabel(first.metric)
            _draw_values(upper, curves, styles)
            _draw_differences(lower, curves, baseline, styles)
            lower.set_xlabel(f"level of {first.corruption}")
            lower.set_ylabel(f"less {baseline}, paired")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _draw_values(axes: "Axes", curves: Sequence[Result], styles: Mapping[str, Style]) -> None:
    for name, family in by_name(curves).items():
        in_order = sorted(family, key=lambda result: result.level or 0.0)
        points = grouped(in_order, lambda result: result.level)
        means = [over_seeds((r.value for r in part), part[0].metric) for part in points]
        none = Interval(math.nan, math.nan, math.nan)  # every seed failed
        ends = [(m.value, m.low, m.high) for m in (mean or none for mean in means)]
        _line(axes, [part[0].level or 0.0 for part in points], ends, name, styles[name])


def _draw_differences(
    axes: "Axes", curves: Sequence[Result], baseline: str, styles: Mapping[str, Style]
) -> None:
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    whole = [result for result in curves if not math.isnan(result.value)]
    levels = {result.condition: result.level or 0.0 for result in whole}
    families: dict[str, list[Comparison]] = {}
    for comparison in compare_families(whole, baseline):
        name = family_name(comparison.feature, comparison.budget)
        families.setdefault(name, []).append(comparison)
    for name, comparisons in families.items():
        comparisons.sort(key=lambda comparison: levels[comparison.condition])
        along = [levels[comparison.condition] for comparison in comparisons]
        effects = [comparison.effect for comparison in comparisons]
        intervals = [(effect.value, effect.ci_low, effect.ci_high) for effect in effects]
        _line(axes, along, intervals, name, styles[name])


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
    names = sorted({family_name(result.feature, result.budget) for result in results})
    n = len(_COLOURS)
    return {
        name: (_COLOURS[i % n], _MARKERS[i % n], _DASHES[i // n % len(_DASHES)])
        for i, name in enumerate(names)
    }
