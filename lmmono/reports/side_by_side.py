"""Tables that put runs side by side: layers by their numbers, neurons by their words."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from activation_store.printable import number
from lmmono.reports.dictionary_tables import Interval, measured, stabilities
from lmmono.reports.pages.interest import MIN_ACTIVATIONS
from lmmono.reports.table import ReportTable
from lmmono.reports.unit_tables import excerpts
from lmmono.runs.folder import Run

N_NEURONS = 6
N_RESAMPLES = 1000

_UNITS = """
SELECT s.unit, s.density, s.n_active, s.kurtosis, real.value AS selectivity,
    shuffled.value AS shuffled
FROM unit_stats s
LEFT JOIN all_scores real ON real.hook = s.hook AND real.unit = s.unit
    AND real.metric = 'token_selectivity' AND real.control IS NULL
LEFT JOIN all_scores shuffled ON shuffled.hook = s.hook AND shuffled.unit = s.unit
    AND shuffled.metric = 'token_selectivity' AND shuffled.control = 'shuffled'
WHERE s.hook = $hook ORDER BY s.unit
"""

_MOST_SELECTIVE = """
SELECT real.hook, real.unit, real.value, real.ci_low, real.ci_high, shuffled.value AS shuffled,
    real.n, s.density
FROM all_scores real
JOIN all_scores shuffled ON shuffled.hook = real.hook AND shuffled.unit = real.unit
    AND shuffled.metric = real.metric AND shuffled.control = 'shuffled'
JOIN unit_stats s ON s.hook = real.hook AND s.unit = real.unit
WHERE real.metric = 'token_selectivity' AND real.control IS NULL AND real.n >= $min_activations
ORDER BY real.ci_low DESC, real.hook, real.unit LIMIT $n_neurons
"""


def run_tables(runs: Sequence[Run]) -> tuple[ReportTable, ...]:
    """Return the layers of all runs in one table; those of each run's other stages in others."""
    learned = [run for run in runs if run.recipe.dictionary.learn]
    tested = [run for run in runs if run.recipe.robustness.suites]
    return (
        _layer_table(runs),
        *(table for run in learned for table in dictionary_tables(run)),
        *(_neuron_table(run) for run in runs),
        *(table for run in tested for table in _suite_tables(run)),
    )


def _suite_tables(run: Run) -> list[ReportTable]:
    # scipy and numba take seconds to import, and most runs have no suites
    from lmmono.reports.robustness_tables import suite_tables

    return suite_tables(run)


def dictionary_tables(run: Run) -> list[ReportTable]:
    """Return a table for each hook that the run has dictionaries of, results before controls."""
    entries = {planned.name: planned.entry_name for planned in run.recipe.dictionary.planned}
    dictionaries = [one for one in measured(run) if one.name in entries]
    with run.reading() as store:
        alike, floor = stabilities(store), stabilities(store, "random_directions")
    tables: list[ReportTable] = []
    for hook in dict.fromkeys(one.hook for one in dictionaries):
        of_hook = [one for one in dictionaries if one.hook == hook]
        of_hook.sort(key=lambda one: one.control is not None)
        columns = [
            (head, about, [_number(one.get(measure)) for one in of_hook])
            for head, measure, about in _DICTIONARY_COLUMNS
        ]
        nothing = (math.nan, math.nan, math.nan)
        between = [(one.hook, entries[one.name]) for one in of_hook]
        columns += [
            (
                "stability",
                "mean cosine of latents matched one-to-one between seeds",
                [_number(alike.get(key, nothing)) for key in between],
            ),
            (
                "random",
                "stability of as many random directions",
                [number(floor[key][0]) if key in floor else "-" for key in between],
            ),
        ]
        shown = [column for column in columns if set(column[2]) != {"-"}]
        names = [(one.name, one.control or "") for one in of_hook]
        tables.append(
            ReportTable(
                title=f"Dictionaries of {run.name}, {hook}",
                columns=("dictionary", "control", *(head for head, _, _ in shown)),
                rows=tuple(
                    (*name, *(cells[i] for _, _, cells in shown)) for i, name in enumerate(names)
                ),
                note="On documents of the split score, with 95 % intervals over documents. "
                "control: what a result is held against. "
                + "".join(f"{head}: {about}. " for head, about, _ in shown).strip(),
                spare=("CE (zero)", "random", "stability", "dead"),
            )
        )
    return tables


_DICTIONARY_COLUMNS = (
    ("L0", "l0", "latents that are not zero per token"),
    ("FVU", "fvu", "share of variance left unexplained"),
    (
        "CE (mean)",
        "ce_loss_recovered (mean)",
        "share of the loss that ablation by the mean costs and the reconstruction does not; - "
        "where the ablation does no clear harm",
    ),
    (
        "CE (zero)",
        "ce_loss_recovered (zero)",
        "share of the loss that ablation by zero costs and the reconstruction does not",
    ),
    ("dead", "dead_fraction (nonzero)", "latents that were zero on all these tokens"),
    ("MCC", "mcc", "mean correlation of planted features with latents matched one-to-one"),
)
"""Head, measure, and what it is."""


def _number(interval: Interval) -> str:
    """Return a value with its interval, as far as there are any."""
    value, low, high = interval
    if math.isnan(value):
        return "-"
    return number(value) + ("" if math.isnan(low) else f" [{number(low)}, {number(high)}]")


def _layer_table(runs: Sequence[Run]) -> ReportTable:
    """Return one row per run and captured hook."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        with run.reading() as store:
            hooks = store.sql("SELECT DISTINCT hook FROM unit_stats ORDER BY hook").fetchall()
            rows += [_layer_row(run, store, hook) for (hook,) in hooks]
    return ReportTable(
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
        spare=("dead", "kurtosis"),
    )


def _layer_row(run: Run, store: astore.Store, hook: str) -> tuple[str, ...]:
    """Return the cells of one hook of one run."""
    units = {
        name: np.ma.filled(np.ma.asarray(values, np.float64), np.nan)
        for name, values in store.sql(_UNITS, hook=hook).fetchnumpy().items()
    }
    facts = run.model_facts
    silent = units["n_active"] == 0
    return (
        run.recipe.folder or run.recipe.name,
        hook,
        f"{facts['val_loss']:.3f} ± {facts['val_loss_se']:.3f}",
        f"{np.mean(units['density']):.3f}",
        f"{silent.mean():.1%}",
        _median(units["kurtosis"]),
        _median(units["selectivity"]),
        _median(units["shuffled"]).partition(" ")[0],
    )


def _median(values: Float[ndarray, " units"]) -> str:
    """Return the median over units that have a value, with its bootstrap interval."""
    data = values[~np.isnan(values)]
    if len(data) == 0:
        return "-"
    draws = np.random.default_rng(0).integers(len(data), size=(N_RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[draws], axis=1), [0.025, 0.975])
    return f"{number(float(np.median(data)))} [{number(low)}, {number(high)}]"


def _around_peak(text: str, n_characters: int = 40) -> str:
    """Return an excerpt's part around its peak, which « and » mark.

    >>> _around_peak("one two three four «five» six seven eight nine ten", 20)
    '…ree four «five» six…'
    """
    first, last = text.find("«"), text.find("»")
    room = max(0, n_characters - (last - first + 1))
    start = max(0, first - (2 * room) // 3)  # what comes before is what a unit has seen
    end = min(len(text), last + 1 + room // 3)
    return "…" * (start > 0) + text[start:end] + "…" * (end < len(text))


def _neuron_table(run: Run) -> ReportTable:
    """Return the units of a run whose selectivity is surely highest, each with an excerpt."""
    with run.reading() as store:
        neurons = store.sql(
            _MOST_SELECTIVE, min_activations=MIN_ACTIVATIONS, n_neurons=N_NEURONS
        ).fetchall()
        texts = excerpts(store, [row[:2] for row in neurons], before=16, after=8)
        rows = tuple(
            (
                hook,
                str(unit),
                f"{value:.3f} [{low:.3f}, {high:.3f}]",
                number(round(shuffled, 3)),
                f"{n:,}",
                f"{density:.4f}",
                _around_peak(text),
            )
            for (hook, unit, value, low, high, shuffled, n, density), text in zip(
                neurons, texts, strict=True
            )
        )
    return ReportTable(
        title=f"Most selective units of {run.name}",
        columns=("hook", "unit", "selectivity", "shuffled", "activations", "density", "excerpt"),
        rows=rows,
        note=(
            "Ranked by the lower end of the 95 % interval of token selectivity, among units with "
            f"at least {MIN_ACTIVATIONS} activations."
        ),
        spare=("density", "activations"),
    )
