"""Tables that put runs side by side: layers by their numbers, neurons by their words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.reports.dictionary_tables import Interval, measured, stabilities
from lmmono.runs.folder import Run

N_NEURONS = 6
MIN_ACTIVATIONS = 100
"""A neuron that fired less often is not shown: rare firing looks selective by chance."""
N_RESAMPLES = 1000

_UNITS = """
SELECT s.unit, s.density, s.n_active, s.kurtosis, real.value AS selectivity,
    shuffled.value AS shuffled
FROM unit_stats s
LEFT JOIN scores real ON real.hook = s.hook AND real.unit = s.unit
    AND real.metric = 'token_selectivity' AND real.control IS NULL
LEFT JOIN scores shuffled ON shuffled.hook = s.hook AND shuffled.unit = s.unit
    AND shuffled.metric = 'token_selectivity' AND shuffled.control = 'shuffled'
WHERE s.hook = $hook ORDER BY s.unit
"""

_MOST_SELECTIVE = """
SELECT real.hook, real.unit, real.value, real.ci_low, real.ci_high, shuffled.value AS shuffled,
    real.n, s.density
FROM scores real
JOIN scores shuffled ON shuffled.hook = real.hook AND shuffled.unit = real.unit
    AND shuffled.metric = real.metric AND shuffled.control = 'shuffled'
JOIN unit_stats s ON s.hook = real.hook AND s.unit = real.unit
WHERE real.metric = 'token_selectivity' AND real.control IS NULL AND real.n >= $min_activations
ORDER BY real.ci_low DESC, real.hook, real.unit LIMIT $n_neurons
"""


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of text, ready to print or to put on a page."""

    title: str
    """What it shows."""
    columns: tuple[str, ...]
    """Column heads."""
    rows: tuple[tuple[str, ...], ...]
    """One tuple of cells per row."""
    note: str = ""
    """How the numbers were made."""


def comparison(runs: Sequence[Run]) -> tuple[Table, ...]:
    """Return the layers of all runs in one table; those of each run's other stages in others."""
    from lmmono.reports.robustness_tables import run_tables  # which builds on Table

    learned = [run for run in runs if run.recipe.dictionary.learn]
    return (
        _layer_table(runs),
        *(_dictionary_table(run) for run in learned),
        *(_neuron_table(run) for run in runs),
        *(table for run in runs for table in run_tables(run)),
    )


def _dictionary_table(run: Run) -> Table:
    """Return the dictionaries of a run, hook by hook, results before controls."""
    planned = {each.name: each.entry_name for each in run.recipe.dictionary.planned}
    found = [each for each in measured(run) if each.name in planned]
    with astore.open(run.store_path) as store:
        alike, floor = stabilities(store), stabilities(store, "random_directions")
    found.sort(key=lambda each: (each.hook, each.control is not None))
    nothing = (math.nan, math.nan, math.nan)
    columns = {
        head: measure
        for head, measure in _DICTIONARY_COLUMNS.items()
        if any(measure in each.measures for each in found)
    }
    rows = [
        (
            each.hook,
            each.name,
            each.control or "",
            *(_number(each.get(measure)) for measure in columns.values()),
            _number(alike.get((each.hook, planned[each.name]), nothing)),
            f"{floor.get((each.hook, planned[each.name]), nothing)[0]:.3g}".replace("nan", "-"),
        )
        for each in found
    ]
    return Table(
        title=f"Dictionaries of {run.name}",
        columns=("hook", "dictionary", "control", *columns, "stability", "random"),
        rows=tuple(rows),
        note=(
            "On documents of the split score, with 95 % intervals over documents. L0: latents that "
            "are not zero per token. FVU: share of variance left unexplained. CE recovered: share "
            "of the loss that the ablation in brackets costs and the reconstruction does not; - "
            "where the ablation does no clear harm. dead: latents that were zero on all these "
            "tokens. MCC: mean correlation of planted features with latents matched one-to-one. "
            "stability: mean cosine of latents matched one-to-one between seeds, beside that of as "
            "many random directions. untrained: learned and judged on the untrained model."
        ),
    )


_DICTIONARY_COLUMNS = {
    "L0": "l0",
    "FVU": "fvu",
    "CE recovered (mean)": "ce_loss_recovered (mean)",
    "CE recovered (zero)": "ce_loss_recovered (zero)",
    "dead": "dead_fraction (nonzero)",
    "MCC": "mcc",
}


def _number(interval: Interval) -> str:
    """Return a value with its interval, as far as there are any."""
    value, low, high = interval
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" + ("" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]")


def _layer_table(runs: Sequence[Run]) -> Table:
    """Return one row per run and captured hook."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        with astore.open(run.store_path) as store:
            hooks = store.sql("SELECT DISTINCT hook FROM unit_stats ORDER BY hook").fetchall()
            rows += [_layer_row(run, store, hook) for (hook,) in hooks]
    return Table(
        title="Layers",
        columns=(
            "run",
            "hook",
            "val loss",
            "density",
            "dead",
            "kurtosis",
            "selectivity",
            "shuffled",
        ),
        rows=tuple(rows),
        note=(
            "val loss: nats per token, with the standard error over rows. density: share of pairs "
            "(token, neuron) above the threshold. dead: share of neurons never above it. kurtosis, "
            f"selectivity: median over neurons, in brackets its 95 % interval ({N_RESAMPLES} "
            "resamples of neurons). shuffled: selectivity of the same activations on other tokens."
        ),
    )


def _layer_row(run: Run, store: astore.Store, hook: str) -> tuple[str, ...]:
    """Return the cells of one hook of one run."""
    units = store.sql(_UNITS, hook=hook).to_arrow_table()
    facts = run.manifest.stages["train"].facts
    silent = units["n_active"].to_numpy() == 0
    return (
        run.name,
        hook,
        f"{facts['val_loss']:.3f} ± {facts['val_loss_se']:.3f}",
        f"{np.mean(units['density'].to_numpy()):.3f}",
        f"{silent.mean():.1%}",
        _median(units["kurtosis"].to_numpy()),
        _median(units["selectivity"].to_numpy()),
        _median(units["shuffled"].to_numpy()),
    )


def _median(values: Float[ndarray, " units"]) -> str:
    """Return the median over units that have a value, with its bootstrap interval."""
    data = values[~np.isnan(values)]
    if len(data) == 0:
        return "-"
    draws = np.random.default_rng(0).integers(len(data), size=(N_RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[draws], axis=1), [0.025, 0.975])
    return f"{np.median(data):.3g} [{low:.3g}, {high:.3g}]"


def _neuron_table(run: Run) -> Table:
    """Return the units of a run whose selectivity is surely highest, each with an excerpt."""
    with astore.open(run.store_path) as store:
        found = store.sql(
            _MOST_SELECTIVE, min_activations=MIN_ACTIVATIONS, n_neurons=N_NEURONS
        ).fetchall()
        rows = tuple(
            (
                hook,
                str(unit),
                f"{value:.3f} [{low:.3f}, {high:.3f}]",
                f"{shuffled:.3f}",
                f"{n:,}",
                f"{density:.4f}",
                store.exemplars(hook, unit, 1)[0].text.replace("\n", "⏎"),
            )
            for hook, unit, value, low, high, shuffled, n, density in found
        )
    return Table(
        title=f"Most selective units of {run.name}",
        columns=("hook", "unit", "selectivity", "shuffled", "activations", "density", "excerpt"),
        rows=rows,
        note=(
            "Ranked by the lower end of the 95 % interval of token selectivity, among units with "
            f"at least {MIN_ACTIVATIONS} activations."
        ),
    )
