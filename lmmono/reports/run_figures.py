"""Figures of reports: each function returns a matplotlib figure; `figure_svg` puts it on a page.

Colour is never alone: runs differ by marker too, and controls are grey crosses.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from lmmono.errors import RunError
from lmmono.reports.layer_summary import LayerSummary, layer_summaries
from lmmono.reports.table import Interval
from lmmono.runs.folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # for annotations only: matplotlib takes half a second to import
    Axes = Figure = object

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind people tell apart; without black, for dark pages."""
MARKERS = ("o", "s", "^", "D", "v", "P")
CONTROL = "0.55"
RC: dict[Any, Any] = {
    "svg.hashsalt": "lmmono",  # and without a date equal input gives equal bytes
    "svg.fonttype": "none",
    "font.size": 9,
    "legend.facecolor": "none",
    "legend.framealpha": 0.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Draw the loss of training and of held-out documents over steps, all runs in one panel.

    Raises:
        RunError: No run was trained here.
    """
    trained = [run for run in runs if (run.dir / "metrics.parquet").is_file()]
    if not trained:
        raise RunError("loss figure: no run has a metrics.parquet; pretrained models have no curve")
    figure, axes = _panels(1, width=6.4, height=3.2)
    for i, run in enumerate(trained):
        rows = run.metrics.to_pylist()
        faint: dict[str, Any] = {"alpha": 0.55, "linewidth": 1.0}
        for split, style in (("train", faint), ("val", {})):
            points = [
                (row["step"], row["value"])
                for row in rows
                if row["metric"] == "loss" and row["split"] == split and row["layer"] is None
            ]
            if points:
                marker = MARKERS[i % len(MARKERS)] if split == "val" else None
                points.sort()
                axes[0].plot(
                    [step for step, _ in points],
                    [loss for _, loss in points],
                    color=COLOURS[i % len(COLOURS)],
                    marker=marker,
                    markersize=5,
                    linestyle="-" if split == "train" else "--",
                    label=f"{run.name}, {split}",
                    **style,
                )
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("loss, nats per token")
    axes[0].legend(fontsize=8)
    return figure


def layer_figure(layers: Sequence[LayerSummary] | Sequence[Run]) -> Figure:
    """Draw density, kurtosis and dead share by layer, with intervals and untrained controls.

    Raises:
        RunError: Nothing was captured.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    summaries = _summaries(layers)
    figure, axes = _panels(
        3, width=3.4, height=2.6 + 0.12 * len({layer.hook for layer in summaries})
    )
    for panel, measure in zip(axes, ("density", "kurtosis", "dead share"), strict=True):
        _by_layer(panel, summaries, measure)
        if measure == "kurtosis":
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
    _legend(figure, axes)
    return figure


def score_figure(layers: Sequence[LayerSummary] | Sequence[Run]) -> Figure:
    """Draw every score by layer, with its interval; its controls are grey crosses beside it.

    Raises:
        RunError: Nothing was scored.
    """
    summaries = _summaries(layers)
    scores = dict.fromkeys(name for layer in summaries for name in layer.measures)
    scores = [name for name in scores if name not in ("density", "kurtosis", "dead share")]
    if not scores:
        raise RunError("score figure: no unit was scored; run `lmmono score` first")
    figure, axes = _panels(len(scores), width=4.2, height=2.6)
    for panel, score in zip(axes, scores, strict=True):
        _by_layer(panel, summaries, score)
    _legend(figure, axes)
    return figure


def attribute_figure(
    matrix: Any, classes: Sequence[str], attributes: Sequence[str], *, title: str = ""
) -> Figure:
    """Draw a class-by-attribute matrix of relevances, such as FLINT's, the numbers in the cells.

    Args:
        matrix: Numbers, [classes, attributes].
        classes: Names of the rows.
        attributes: Names of the columns.
        title: What stands above it.
    """
    values = np.asarray(matrix, dtype=np.float64)
    n_rows, n_columns = values.shape
    figure, (axes,) = _panels(1, width=1.6 + 0.55 * n_columns, height=1.2 + 0.4 * n_rows)
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    # quads, no image: a page that may load nothing may not even decode a picture of its own
    axes.pcolormesh(values, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.invert_yaxis()
    for row, column in np.ndindex(n_rows, n_columns):
        value = values[row, column]
        ink = "#fefefe" if abs(value) > 0.6 * most else "#111111"  # on its cell, in dark mode too
        label = "" if np.isnan(value) else f"{value:.2g}"
        centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
        axes.text(column + 0.5, row + 0.5, label, color=ink, **centred)
    axes.set_xticks(np.arange(n_columns) + 0.5, list(attributes), rotation=45, ha="right")
    axes.set_yticks(np.arange(n_rows) + 0.5, list(classes))
    axes.set_title(title, fontsize=9)
    return figure


def unit_figure(page: Any) -> Figure:
    """Draw one unit: its histogram on a log axis, and its density by position.

    Args:
        page: What `activation_store.pages.unit_page` returns.
    """
    figure, (left, right) = _panels(2, width=3.4, height=2.4)
    bars, stats, positions = page.data["histogram"], page.data["stats"], page.data["positions"]
    if bars:
        edges = np.linspace(0.0, stats["max_act"], len(bars) + 1)
        left.bar(edges[:-1], bars, np.diff(edges), align="edge", color=COLOURS[1])
        left.set_yscale("log")
    left.set_xlabel("activation")
    left.set_ylabel("tokens")
    right.bar(
        [row["first_pos"] for row in positions],
        [row["density"] for row in positions],
        [row["last_pos"] + 1 - row["first_pos"] for row in positions],
        align="edge",
        color=COLOURS[0],
    )
    if stats["density"] is not None:
        right.axhline(stats["density"], color=CONTROL, linestyle="--", linewidth=1.0)
    right.set_xlabel("position")
    right.set_ylabel("density")
    return figure


def figure_svg(figure: Figure, label: str) -> Markup:
    """Return a figure as SVG that a strict content-security policy lets be, in a page's own ink.

    Styles become attributes, black becomes the colour of the text around it and white nothing, so
    that a dark page reads it too.

    Args:
        figure: A matplotlib figure.
        label: What is seen, for those who do not see it.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with mpl.rc_context(RC):
        out, canvas, dpi = StringIO(), figure.canvas, figure.dpi
        # the bytes that `savefig` gives, which draws all of it once more before
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": "lmmono"})
        figure.set_canvas(canvas)
        figure.dpi = dpi
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'style="([^"]*)"', _attributes, svg)
    # names of one figure must not meet those of another on the same page
    mark = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{mark}', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{mark}", svg)
    head = (
        f'<svg role="img" aria-label="{escape(label)}" class="figure" fill="currentColor" '
        'stroke-linejoin="round" stroke-linecap="butt"'
    )
    return Markup(svg.replace("<svg", head, 1))


_INK = {"#000000": "currentColor", "#222222": "currentColor", "#4d4d4d": "currentColor",
        "#ffffff": "none"}  # fmt: skip


def _attributes(match: re.Match[str]) -> str:
    """Return a style as presentation attributes.

    >>> _attributes(re.match('style="(.*)"', 'style="fill: #ffffff; font: 9px Sans"'))
    'fill="none" font-size="9px" font-family="Sans"'
    """
    pairs: dict[str, str] = {}
    for part in match.group(1).split(";"):
        name, colon, value = part.partition(":")
        name, value = name.strip(), value.strip().replace('"', "'")
        if not colon:
            continue
        if name == "font":
            # such as "italic 9px 'DejaVu Sans', sans-serif"
            size = re.search(r"[\d.]+px", value)
            assert size is not None, value
            pairs["font-size"] = size.group()
            pairs["font-family"] = value[size.end() :].strip()
        elif name in ("fill", "stroke"):
            pairs[name] = _INK.get(value, value)
        else:
            pairs[name] = value
    return " ".join(f'{name}="{value}"' for name, value in pairs.items())


def _summaries(layers: Sequence[LayerSummary] | Sequence[Run]) -> list[LayerSummary]:
    runs = [layer for layer in layers if isinstance(layer, Run)]
    summaries = [layer for layer in layers if isinstance(layer, LayerSummary)]
    summaries += layer_summaries(runs) if runs else []
    if not summaries:
        raise RunError("figure of layers: nothing was captured; run `lmmono capture` first")
    return summaries


def _panels(n: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    n_columns = min(n, 3)
    n_rows = math.ceil(n / n_columns)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel().tolist()
    for axes in grid[n:]:
        axes.set_axis_off()
    return figure, grid[:n]


def _by_layer(axes: Axes, layers: Sequence[LayerSummary], measure: str) -> None:
    """Draw a measure of every run and hook: a row for each hook, a marker for each run."""
    with_it = [layer for layer in layers if measure in layer.measures]
    hooks = sorted({layer.hook for layer in with_it}, key=_depth)
    runs = list(dict.fromkeys(layer.run for layer in layers))
    names = set[str]()
    for layer in with_it:
        i = runs.index(layer.run)
        place = hooks.index(layer.hook) + 0.22 * (i - (len(runs) - 1) / 2)
        interval = layer.measures[measure]
        axes.errorbar(
            interval.value,
            place,
            xerr=_arms(interval),
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            markersize=5,
            capsize=2,
            label=layer.run if layer.run not in names else None,
        )
        names.add(layer.run)
        _draw_controls(axes, layer.controls.get(measure, {}), place, names)
    axes.set_yticks(range(len(hooks)), [_short(hook) for hook in hooks])
    axes.set_ylim(len(hooks) - 0.5, -0.5)  # the first layer stands at the top
    axes.set_title(measure, fontsize=9)
    axes.grid(axis="x", color="0.5", alpha=0.25, linewidth=0.6)


def _draw_controls(
    axes: Axes, controls: Mapping[str, float], place: float, names: set[str]
) -> None:
    for (name, value), marker in zip(controls.items(), ("x", "+", "1", "2", "3"), strict=False):
        label = f"control: {name}"
        axes.plot(
            value,
            place,
            marker=marker,
            linestyle="",
            color=CONTROL,
            markersize=6,
            label=label if label not in names else None,
        )
        names.add(label)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    named: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(
        [*named.values()], [*named], loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )


def _depth(hook: str) -> tuple[int, str]:
    """Return what sorts hooks by their block: 10 after 9."""
    block = re.search(r"\d+", hook)
    return (int(block.group()) if block else -1, hook)


def _short(hook: str) -> str:
    """Return a hook's name for a tick.

    >>> _short("blocks.1.hook_resid_post.hook_sae_acts_post"), _short("blocks.0.mlp.hook_post")
    ('1 resid_post latents', '0 mlp.post')
    """
    text = re.sub(r"\.?hook_sae_acts_post$", " latents", hook.removeprefix("blocks."))
    return text.replace("hook_", "").replace(".", " ", 1)


def _arms(interval: Interval) -> list[list[float]] | None:
    if math.isnan(interval.low):
        return None
    value = interval.value
    return [[max(0.0, value - interval.low)], [max(0.0, interval.high - value)]]
