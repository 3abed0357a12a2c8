"""The command line: one verb per stage.

What a user can cause is told in one message, exit code 2. Ctrl-C is 130 and SIGTERM 143, both with
everything saved that was finished. Verbs import what they need themselves, so that `--help` and
`check` answer at once.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmmono.cli.store_verbs import DataPath, store_app
from lmmono.cli.toy_verbs import toy_app
from lmmono.errors import LmmonoError, RecipeError, TrainingStopped
from lmmono.files.processes import this_process
from lmmono.types import silent

if TYPE_CHECKING:
    from lmmono.recipe import Recipe
    from lmmono.reports.tables import Table
    from lmmono.runs.folder import Run
else:  # for annotations only
    Recipe = Run = Table = object

app = typer.Typer(
    name="lmmono",
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
import_app = typer.Typer(help="Bring in models that were trained elsewhere.", no_args_is_help=True)
app.add_typer(import_app, name="import")
app.add_typer(store_app, name="store")
app.add_typer(toy_app, name="toy")


class Listed(StrEnum):
    """What `lmmono ls` can list."""

    recipes = "recipes"
    runs = "runs"
    stores = "stores"
    hooks = "hooks"
    dictionaries = "dictionaries"
    explainers = "explainers"
    scorers = "scorers"
    tasks = "tasks"


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
RecipeOrRun = Annotated[
    Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe file, or a run folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as train.steps=500."),
]


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Neuron analysis of language models: train, capture, ask in SQL."""
    from importlib import metadata

    if version:
        print(metadata.version("lmmono"))
        raise typer.Exit


@app.command()
def check(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Files, overrides.")
    ],
) -> None:
    """Say every fault of recipes at once; write nothing."""
    overrides = [text for text in recipes if _is_override(text)]
    faults: list[str] = []
    for path in (text for text in recipes if not _is_override(text)):
        faults += _faults(path, overrides)
    if faults:
        raise RecipeError(dict.fromkeys(faults))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from lmmono.recipe.recipe import schema_text

    if out is None:
        print(schema_text(), end="")
    else:
        out.write_text(schema_text(), encoding="utf-8")


@app.command("ls")
def list_(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    where: Annotated[
        Path | None, typer.Argument(help="A folder; a run for hooks and dictionaries.")
    ] = None,
) -> None:
    """List recipes, runs, stores; hooks, dictionaries of a run; explainers, scorers or tasks."""
    from lmmono.cli import listing
    from lmmono.cli.terminal import show_table

    default = Path("recipes" if what is Listed.recipes else "runs")
    found = getattr(listing, f"list_{what.value}")(where or default)
    show_table(found.columns, found.rows)


@app.command("run")
def run_(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Do every stage of every run that is not done yet, then compare the runs."""
    from lmmono.recipe import Recipe
    from lmmono.reports.tables import comparison

    runs = _done(Recipe.load(recipe, *overrides or ()).runs())
    _show(comparison(runs))


@app.command()
def train(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Train the models of a recipe; go on where an interrupted training stopped."""
    _done(_runs_of(target, overrides), "train")


@app.command()
def capture(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Stream activations of trained models into their stores."""
    _done(_runs_of(target, overrides), "capture")


@app.command()
def dictionary(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Learn the dictionaries of captured runs, and judge them; go on where it stopped."""
    _done(_runs_of(target, overrides), "dictionary")


@app.command()
def explain(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Explain the units of captured runs, from documents that no score will see."""
    _done(_runs_of(target, overrides), "explain")


@app.command()
def score(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Score the units of captured runs, and what was said of them; controls beside them."""
    _done(_runs_of(target, overrides), "score")


@app.command()
def robustness(target: RecipeOrRun, overrides: Overrides = None) -> None:
    """Make tasks harder, and measure which codes of captured runs serve best then."""
    from lmmono.reports.robustness_tables import run_tables

    for run in _done(_runs_of(target, overrides), "robustness"):
        for path in sorted((run.dir / "robustness").glob("*.svg")):
            print(path)
        _show(run_tables(run))


@app.command()
def compare(
    studies: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Folders of a study's runs.")
    ],
) -> None:
    """Compare the arms of scored studies over training seeds, and twins of each other."""
    from lmmono.cli.terminal import shown_progress
    from lmmono.reports.study_tables import study_tables

    with shown_progress() as progress:
        tables = study_tables(studies, progress)
    _show(tables)


@app.command("audit-scorer")
def audit_scorer(
    name: Annotated[str, typer.Argument(help="A scorer; see `lmmono ls scorers`.")],
    n_documents: Annotated[int, typer.Option(min=100, help="Documents, half for scores.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Seed of text, noise and lies.")] = 0,
    run: Annotated[
        Path | None, typer.Option(help="Ask about this run's neurons; of the planted language.")
    ] = None,
) -> None:
    """Say how often a scorer ranks true explanations of planted units above false ones."""
    from lmmono.cli.terminal import show_table, shown_progress
    from lmmono.scores.audit import audit_scorer

    with shown_progress() as progress:
        found = audit_scorer(name, run=run, n_documents=n_documents, seed=seed, progress=progress)
    show_table(
        tuple(found.rows[0]), [tuple(row.values()) for row in found.rows], title=found.metric
    )


@app.command()
def sql(
    stores: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs, stores or a lake, then the query.")
    ],
    query: Annotated[str, typer.Argument(help="SQL; $name stands for a --param.")],
    param: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE")] = None,
    data_path: DataPath = None,
    csv: Annotated[bool, typer.Option("--csv", help="CSV on stdout.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False,
    arrow: Annotated[bool, typer.Option("--arrow", help="Arrow IPC stream on stdout.")] = False,
) -> None:
    """Ask a store in SQL, reading only; several runs are schemas named by their folders."""
    from lmmono.cli.querying import answer
    from lmmono.cli.terminal import write_result

    if csv + json + arrow > 1:
        raise typer.BadParameter("want at most one of --csv, --json, --arrow")
    format = "csv" if csv else "json" if json else "arrow" if arrow else "table"
    write_result(answer(stores, query, param or [], data_path), format)


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Let a trained model go on from a text."""
    from lmmono.models.generation import generate
    from lmmono.runs.folder import open_run

    run = open_run(target)
    print(generate(run, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed))


@import_app.command("crate-lm")
def import_crate_lm(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A released .pt file.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    n_heads: Annotated[int | None, typer.Option(min=1, help="If the file does not say.")] = None,
) -> None:
    """Turn a released CRATE or GPT-2 checkpoint into a Hugging Face folder."""
    from lmmono.models.released import import_released

    print(import_released(checkpoint, out, n_heads=n_heads))


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        app()
    except BaseException as error:
        sys.exit(_exit_code(error))


def _exit_code(error: BaseException) -> int | str | None:
    """Tell an error that the user can act on; let our own mistakes through with their trace."""
    if isinstance(error, SystemExit) and error.code != 130:
        return error.code
    if isinstance(error, SystemExit | KeyboardInterrupt):
        _tell("stopped; what was finished is kept, the same command goes on from there")
        return 130
    if isinstance(error, BrokenPipeError):  # the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if not (isinstance(error, LmmonoError | OSError) or _is_store_error(error)):
        raise error
    _tell(str(error))
    return 143 if isinstance(error, TrainingStopped) else 2


def _is_store_error(error: BaseException) -> bool:
    """Say whether the store's error root is among the error's classes, without importing it."""
    roots = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return ("activation_store", "StoreError") in roots


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _faults(path: str, overrides: Sequence[str]) -> list[str]:
    """Return the faults of a recipe; where there are none, say what it stands for."""
    from lmmono.recipe import Recipe

    try:
        runs = Recipe.load(path, *overrides).runs()
    except RecipeError as error:
        return list(error.faults)
    print(
        f"{path}: ok, {len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(str(r.dir) for r in runs)}"
    )
    return []


def _runs_of(target: Path, overrides: Sequence[str] | None) -> "tuple[Recipe, ...]":
    from lmmono.recipe import Recipe

    path = target / "recipe.yaml" if (target / "manifest.json").is_file() else target
    return Recipe.load(path, *overrides or ()).runs()


def _done(recipes: "Sequence[Recipe]", *verbs: str) -> "list[Run]":
    """Do the stages of some verbs of every run, or all stages; show progress, and say it."""
    from lmmono.cli.terminal import shown_progress
    from lmmono.pipeline import open_for, run_stages
    from lmmono.runs.folder import changes, open_run

    runs: list[Run] = []
    for recipe in recipes:
        run = open_for(recipe)
        if run.set_aside:
            before = changes(open_run(run.set_aside).recipe, recipe)
            _tell(f"{run.dir}: other settings' results set aside in {run.set_aside}")
            _tell("\n".join(f"  {line}" for line in before))
        with shown_progress() if this_process().is_main else nullcontext(silent) as progress:
            runs.append(run_stages(run, *verbs, progress=progress))
        if verbs and this_process().is_main:
            print(run)
    return runs


def _show(tables: "Sequence[Table]") -> None:
    from lmmono.cli.terminal import show_table

    for table in tables:
        show_table(table.columns, table.rows, title=table.title, note=table.note)
