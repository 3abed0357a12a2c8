"""What a verb prints when its stages are done: tables, and on stderr where it lies and what next.

Heavy imports wait inside functions: `lmmono --help` needs none of them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lmmono.cli.output import Outcome, OutputTable, reports
from lmmono.files.processes import this_process

if TYPE_CHECKING:
    from activation_store import Store
    from lmmono.reports.table import ReportTable
    from lmmono.runs.folder import Run
else:  # for annotations only
    Run = ReportTable = Store = object


def trained(runs: "Sequence[Run]") -> Outcome | None:
    """Return what training came to, a row per run."""
    if not this_process().is_main:
        return None
    columns = ("run", "parameters", "train tokens", "val loss", "± se", "seconds")
    rows: list[tuple[object, ...]] = []
    for run in runs:
        record = run.manifest.stages["train"]
        facts = [record.facts.get(name) for name in _FACTS]
        rows.append((str(run.dir), *facts, round(record.wall_seconds, 1)))
    note = "val loss: nats per token on held-out documents, with its standard error over rows."
    table = OutputTable(columns, rows, title="Trained", note=note, is_report=True)
    return Outcome([table], _next_steps(runs))


_FACTS = ("n_parameters", "train_tokens", "val_loss", "val_loss_se")


def captured(runs: "Sequence[Run]") -> Outcome | None:
    """Return what each store holds."""
    from lmmono.reports.unit_tables import hook_table

    return _of_stores(runs, lambda store, name: [hook_table(store, name)])


def learned(runs: "Sequence[Run]") -> Outcome | None:
    """Return what each dictionary is worth beside its controls."""
    from lmmono.reports.side_by_side import dictionary_tables

    return _of_runs(runs, dictionary_tables)


def explained(runs: "Sequence[Run]") -> Outcome | None:
    """Return what is said of units; where they are scored, the best and the worst of them."""
    from lmmono.reports.unit_tables import explanation_tables

    return _of_stores(runs, explanation_tables)


def scored(runs: "Sequence[Run]") -> Outcome | None:
    """Return means beside their controls, and the best and the worst units."""
    from lmmono.reports.unit_tables import score_tables

    return _of_stores(runs, score_tables)


def promoted(runs: "Sequence[Run]") -> Outcome | None:
    """Return the units that stand out most from random mixtures of units, with their tokens."""
    from lmmono.reports.unit_tables import promotes_table

    return _of_stores(runs, lambda store, name: [promotes_table(store, name)])


def finished(runs: "Sequence[Run]") -> Outcome | None:
    """Return all runs side by side, and where they are explained what that scores."""
    if not this_process().is_main:
        return None
    import activation_store as astore
    from lmmono.reports.side_by_side import run_tables
    from lmmono.reports.unit_tables import score_tables

    tables = [*run_tables(runs)]
    for run in runs:
        if run.recipe.explain.explainers:
            with astore.open(run.store_path) as store:
                tables += score_tables(store, run.name)
    return Outcome(reports(tables), _next_steps(runs))


def _of_stores(
    runs: "Sequence[Run]", tables_of: "Callable[[Store, str], list[ReportTable]]"
) -> Outcome | None:
    import activation_store as astore

    def of_run(run: "Run") -> "list[ReportTable]":
        with astore.open(run.store_path) as store:
            return tables_of(store, run.name)

    return _of_runs(runs, of_run)


def _of_runs(
    runs: "Sequence[Run]", tables_of: "Callable[[Run], Iterable[ReportTable]]"
) -> Outcome | None:
    if not this_process().is_main:
        return None
    tables = reports(table for run in runs for table in tables_of(run))
    return Outcome(tables, _next_steps(runs))


def _next_steps(runs: "Sequence[Run]") -> list[str]:
    """Return where the results lie and which command is the next one."""
    import activation_store as astore
    from lmmono.reports.unit_tables import best_unit
    from lmmono.runs.stages import STAGES

    first = runs[0]
    asked = [stage for stage in STAGES.values() if stage.is_asked(first.recipe)]
    left = [stage for stage in asked if not first.is_done(stage.name)]
    commands = [f"lmmono {left[0].verb or left[0].name} {first.dir}"] if left else []
    if first.is_done("capture"):
        with astore.open(first.store_path) as store:
            unit = best_unit(store)
        commands += [f"lmmono show {first.dir} {unit}"] if unit else []
        commands.append(f"lmmono sql {first.dir} .help")
        commands.append(f"lmmono report {' '.join(str(run.dir) for run in runs)} -o report.html")
    heads = ["next: ", *["      "] * len(commands)]
    return [
        *(f"results: {run.dir}" for run in runs),
        *(f"{head}{command}" for head, command in zip(heads, commands, strict=False)),
    ]
