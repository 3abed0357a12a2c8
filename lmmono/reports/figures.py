"""Figures of what runs measured: equal input gives equal bytes; no display is needed."""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.errors import RunError
from lmmono.registry.metrics import METRICS
from lmmono.reports.dictionary_tables import Interval, Measured, check_measure, measured
from lmmono.reports.table import Interval as CellInterval
from lmmono.reports.table import ReportTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # for annotations only: matplotlib takes half a second to import
    Axes = Figure = object

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
"""Okabe and Ito's colours, which colour-blind people tell apart."""
_CONTROL_MARKERS = {
    "raw": "s",
    "pca": "D",
    "random": "x",
    "dense": "P",
    "shuffled": "v",
    "untrained": "^",
}
# the salt and the date are all that differs between two drawings of one thing
_RC: dict[Any, Any] = {"svg.hashsalt": "lmmono", "svg.fonttype": "none", "font.size": 9}
_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": "lmmono"},
    "png": {"Software": "lmmono"},
    "pdf": {"CreationDate": None, "Creator": "lmmono"},
}
"""What each kind of file says of itself, without a date: equal input gives equal bytes."""


def pareto_figure(
    source: Any,
    *,
    x: str = "l0",
    y: str = "fvu",
    hooks: Sequence[str] | None = None,
) -> Figure:
    """Return the figure that `pareto` writes to a file.

    Raises:
        RunError: A measure is unknown, or no dictionary has both.
        StoreError: A store cannot be opened.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    x, y = (_with_preset(measure) for measure in (x, y))
    points = [
        point
        for point in measured(source)
        if (hooks is None or point.hook in hooks)
        and not any(math.isnan(point.get(measure)[0]) for measure in (x, y))
    ]
    if not points:
        raise RunError(f"pareto: no dictionary has both {x} and {y}; run `lmmono dictionary` first")
    panels = list(dict.fromkeys((point.run, point.hook) for point in points))
    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(5.5 * n_columns, 4 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False).flat
        for axes, (run, hook) in zip(grid, panels, strict=False):
            part = [point for point in points if (point.run, point.hook) == (run, hook)]
            _draw(axes, part, x, y)
            axes.set_title(f"{run}: {hook}", fontsize=9)
        for axes in list(grid)[len(panels) :]:
            axes.set_axis_off()
    return figure


def pareto(
    source: Any,
    *,
    x: str = "l0",
    y: str = "fvu",
    hooks: Sequence[str] | None = None,
    path: str | Path = "pareto.svg",
) -> Path:
    """Draw one measure of dictionaries against another: a panel for each run and hook.

    Every dictionary is a point with the intervals of both measures; a line joins those that no
    other beats in both. Controls are grey, each kind with a marker of its own, and never on the
    line.

    Args:
        source: Stores, runs, their folders, `lmmono.reports.dictionary_tables.Measured`, or a
            sequence of these.
        x: Measure along: a metric with its preset in brackets, such as `l0`.
        y: Measure upwards: `fvu`, `ce_loss_recovered (mean)`; without a preset, `(mean)` is taken.
        hooks: Hooks to draw; None draws all.
        path: File to write; its suffix says of which kind: `.svg`, `.png` or `.pdf`.

    Returns:
        The file.

    Raises:
        RunError: A measure is unknown, no dictionary has both, or the suffix is another.
        StoreError: A store cannot be opened.
    """
    import matplotlib as mpl

    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in _METADATA:
        raise RunError(f"{path}: want a figure as .svg, .png or .pdf, got {kind or 'no suffix'!r}")
    figure = pareto_figure(source, x=x, y=y, hooks=hooks)
    with mpl.rc_context(_RC):
        figure.savefig(path, format=kind, metadata=_METADATA[kind])
    return Path(path)


def training_figure(table: ReportTable, path: str | Path = "training.svg") -> Path:
    """Draw every score of every arm against its loss, a point for each kept step.

    What differs along one line is training; what differs between lines at one loss is the arms.

    Args:
        table: The table "Along training" of `lmmono.reports.study_tables.study_tables`.
        path: File to write; its suffix says of which kind: `.svg`, `.png` or `.pdf`.

    Returns:
        The file.

    Raises:
        RunError: The table has no score, or the file cannot be of that kind.
    """
    target, names = Path(path), table.columns[5:]
    if target.suffix.lstrip(".") not in _METADATA:
        raise RunError(f"{target}: want a file that ends in .svg, .png or .pdf")
    if not names or not table.rows:
        raise RunError("no arm has scores at its kept steps")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(str(row[0]) for row in table.rows))
    with mpl.rc_context({"svg.hashsalt": "lmmono", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
        panels: Any = figure.subplots(1, len(names), squeeze=False)
        for i, (axes, name) in enumerate(zip(panels[0], names, strict=True)):
            for arm, colour in zip(arms, cycle(_COLOURS), strict=False):
                cells = [(row[3], row[5 + i]) for row in table.rows if row[0] == arm]
                points = [
                    (x, y)
                    for x, y in cells
                    if isinstance(x, CellInterval) and isinstance(y, CellInterval)
                ]
                ends = [
                    [0.0 if math.isnan(y.low) else y.value - y.low for _, y in points],
                    [0.0 if math.isnan(y.high) else y.high - y.value for _, y in points],
                ]
                axes.errorbar(
                    [x.value for x, _ in points],
                    [y.value for _, y in points],
                    yerr=ends,
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    color=colour,
                    label=arm,
                )
            axes.invert_xaxis()
            axes.set_xlabel("val loss, nats per token")
            axes.set_ylabel(f"{name}, less untrained")
        panels[0][0].legend(frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata=_METADATA[target.suffix.lstrip(".")])
    return target


def front(points: Sequence[Measured], x: str, y: str) -> list[Measured]:
    """Return the results that no other result beats in both measures, in the order of x."""
    signs = [-1 if METRICS[check_measure(m)].better == "higher" else 1 for m in (x, y)]

    def costs(point: Measured) -> tuple[float, float]:
        return signs[0] * point.get(x)[0], signs[1] * point.get(y)[0]

    kept: list[Measured] = []
    for point in sorted((point for point in points if point.control is None), key=costs):
        if not kept or costs(point)[1] < costs(kept[-1])[1]:
            kept.append(point)
    return sorted(kept, key=lambda point: point.get(x)[0])


def _draw(axes: "Axes", points: Sequence[Measured], x: str, y: str) -> None:
    """Draw the dictionaries of one run and hook."""
    archs = dict.fromkeys(point.arch for point in points if point.control is None)
    colours = dict(zip(archs, cycle(_COLOURS), strict=False))
    for point in points:
        colour = "0.55" if point.control else colours[point.arch]
        label = point.control or point.arch
        shown = axes.get_legend_handles_labels()[1]
        axes.errorbar(
            point.get(x)[0],
            point.get(y)[0],
            xerr=_arms(point.get(x)),
            yerr=_arms(point.get(y)),
            fmt=_CONTROL_MARKERS.get(point.control or "", "o"),
            color=colour,
            markersize=5,
            capsize=2,
            label=None if label in shown else label,
        )
    best = front(points, x, y)
    axes.plot([p.get(x)[0] for p in best], [p.get(y)[0] for p in best], color="0.3", linewidth=0.8)
    along = [point.get(x)[0] for point in points]
    if x == "l0" and max(along) >= 4 * min(along) > 0:
        axes.set_xscale("log")
    elif x == "l0":  # one L0 aimed at: what they missed it by is not the figure's subject
        axes.set_xlim(0.5 * min(along), 1.5 * max(along))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)


def _arms(interval: Interval) -> list[list[float]] | None:
    """Return the lengths of an error bar below and above, as matplotlib takes them."""
    value, low, high = interval
    if math.isnan(low):
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _with_preset(measure: str) -> str:
    """Name the ablation of a measure that has several.

    >>> _with_preset("ce_loss_recovered")
    'ce_loss_recovered (mean)'
    """
    metric = check_measure(measure)
    return f"{metric} (mean)" if measure == "ce_loss_recovered" else measure
