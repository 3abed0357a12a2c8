"""Tables of a training with kept steps: what each step is worth, when units are born and die."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

import activation_store as astore
from lmmono.errors import RunError
from lmmono.registry.scorers import SCORERS
from lmmono.reports.table import Interval, ReportTable
from lmmono.runs.folder import Run
from lmmono.runs.kept import kept_runs

_HOOKS = """
SELECT hook, step, avg(density), median(correlation), median(other_unit),
    avg(coalesce(is_born, false)::INT), avg(is_dead::INT), count(*)
FROM unit_history GROUP BY hook, step ORDER BY hook, step
"""

_BIRTHS = """
SELECT hook, birth, count(*) AS n, CASE WHEN any_value(ci_method) NOT LIKE 'none%'
    THEN count(*) FILTER (birth_low < birth OR birth_high > birth) END
FROM unit_lives GROUP BY hook, birth ORDER BY hook, birth NULLS LAST
"""

_UNIT = """
SELECT step, density, correlation, ci_low, ci_high, other_unit FROM unit_history
WHERE hook = $hook AND unit = $unit ORDER BY step
"""

_MEANS = """
SELECT metric, explainer, value, ci_low, ci_high FROM hook_scores
WHERE hook = 'blocks.*.mlp.hook_post' AND list_contains($metrics, metric) AND value IS NOT NULL
ORDER BY metric, explainer
"""


def history_tables(run: Run) -> list[ReportTable]:
    """Return the tables of a captured run that has kept steps; scores by step where it has some.

    Raises:
        RunError: It kept no step, or they are not captured yet.
        StoreError: A store cannot be read.
    """
    runs = _steps_of(run)
    with astore.open(run.store_path) as store:
        by_hook = store.sql(_HOOKS).fetchall()
        births = store.sql(_BIRTHS).fetchall()
        ((n_documents, method),) = store.sql(
            "SELECT max(n_documents), any_value(ci_method) FROM unit_lives"
        ).fetchall()
    facts = {step: one.model_facts for step, one in runs.items()}
    rows = [
        (
            hook,
            step,
            facts[step]["train_tokens"],
            facts[step]["val_loss"],
            density,
            correlation,
            other,
            f"{born:.1%}",
            f"{dead:.1%}",
        )
        for hook, step, density, correlation, other, born, dead, _ in by_hook
    ]
    n_units = {hook: n for hook, *_, n in by_hook}
    tables = [
        ReportTable(
            title=f"{run.name}: units at each kept step",
            columns=(
                *("hook", "step", "tokens", "val loss", "density"),
                *("correlation", "other unit", "born", "dead"),
            ),
            rows=tuple(rows),
            note=(
                "val loss: nats per token. correlation: of an activation at this step with that of "
                "the last step, over tokens; median over units. other unit: with the last "
                "activation of the next unit, which is what two units have in common anyway. born: "
                "units whose correlation is or was above 0.5. dead: units that fire on no token "
                "from here to the end."
            ),
        ),
        ReportTable(
            title=f"{run.name}: births",
            columns=("hook", "birth", "units", "share", "unsure"),
            rows=tuple(
                (hook, "never" if birth is None else birth, n, f"{n / n_units[hook]:.1%}", unsure)
                for hook, birth, n, unsure in births
            ),
            note=(
                "birth: first kept step at which the correlation with the final self is above "
                f"0.5. unsure: units whose 95 % interval ({method}) holds another step. "
                f"{n_documents} documents or groups of them."
            ),
        ),
    ]
    return [*tables, *_score_table(run, runs)]


def unit_history_table(run: Run, hook: str, unit: int) -> ReportTable:
    """Return one unit at each kept step.

    Raises:
        RunError: The run kept no step, or they are not captured yet.
        StoreError: The store cannot be read.
    """
    runs = _steps_of(run)
    with astore.open(run.store_path) as store:
        steps = store.sql(_UNIT, hook=hook, unit=unit).fetchall()
        lives = [
            store.sql(
                f"SELECT * EXCLUDE (n_documents) {of}($hook, $unit)", hook=hook, unit=unit
            ).fetchall()
            for of in ("FROM birth", "FROM death")
        ]
    words = ["never" if not rows or rows[0][0] is None else _ends(*rows[0]) for rows in lives]
    return ReportTable(
        title=f"{run.name}: {hook}:{unit}",
        columns=("step", "val loss", "density", "correlation", "other unit"),
        rows=tuple(
            (
                step,
                runs[step].model_facts["val_loss"],
                density,
                None if r is None else Interval(r, *(np.nan if e is None else e for e in ends)),
                other,
            )
            for step, density, r, *ends, other in steps
        ),
        note=f"birth: {words[0]}; death: {words[1]}; with 95 % intervals over documents.",
    )


def _ends(step: int, low: int | None, high: int | None) -> str:
    if low is None and high is None:
        return f"step {step}"
    return f"step {step} [{low}, {'never' if high is None else high}]"


def _steps_of(run: Run) -> dict[int, Run]:
    """Return the runs of all steps, the last one included."""
    if run.recipe.is_pretrained or not run.recipe.train.kept_steps:
        raise RunError(f"{run.dir}: kept no step; train it with train.keep.log=true")
    if not run.is_done("steps"):
        raise RunError(f"{run.dir}: kept steps are not captured; run `lmmono capture {run.dir}`")
    return {**kept_runs(run), run.recipe.train.last_step: run}


def _score_table(run: Run, runs: dict[int, Run]) -> Sequence[ReportTable]:
    """Return the means of explanation scores at each step, where the steps are scored."""
    metrics = [
        scorer.metrics[0]
        for scorer in SCORERS.values()
        if scorer.per == "unit" and {"explanation", "program"} & set(scorer.needs)
    ]
    means: dict[tuple[str, str], dict[int, Interval]] = {}
    with ExitStack() as stack:
        for step, one in runs.items():
            if not one.is_done("score"):
                return []
            store = stack.enter_context(astore.open(one.store_path))
            for metric, explainer, value, *ends in store.sql(_MEANS, metrics=metrics).fetchall():
                low, high = (np.nan if end is None else end for end in ends)
                means.setdefault((metric, explainer), {})[step] = Interval(value, low, high)
    if not means:
        return []
    return [
        ReportTable(
            title=f"{run.name}: scores at each kept step",
            columns=("step", "val loss", *(f"{m} of {e}" for m, e in means)),
            rows=tuple(
                (step, one.model_facts["val_loss"], *(by.get(step) for by in means.values()))
                for step, one in runs.items()
            ),
            note=(
                "Means over hooks of means over units, all blocks; units without a defined score "
                "count as guessing. Intervals are over units of one model."
            ),
        )
    ]
