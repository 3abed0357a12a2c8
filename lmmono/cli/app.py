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

from activation_store.printable import printable
from lmmono.cli import outcome
from lmmono.cli.output import Format, Outcome, OutputTable, prints_rows, reports
from lmmono.cli.serve_verbs import mcp, serve
from lmmono.cli.store_verbs import DataPath, store_app
from lmmono.cli.toy_verbs import toy_app
from lmmono.errors import ExplainError, LmmonoError, RecipeError, RunError, TrainingStopped
from lmmono.files.processes import this_process
from lmmono.types import Progress, silent

if TYPE_CHECKING:
    from lmmono.recipe import Recipe
    from lmmono.runs.folder import Run
else:  # for annotations only
    Recipe = Run = object

app = typer.Typer(
    name="lmmono",
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # [KEY=VALUE] in a help text is text
    context_settings={"help_option_names": ["-h", "--help"]},
)
import_app = typer.Typer(help="Import models that were trained elsewhere.", no_args_is_help=True)
app.add_typer(import_app, name="import")
app.add_typer(store_app, name="store")
app.add_typer(toy_app, name="toy")
app.command()(serve)
app.command()(mcp)


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
    methods = "methods"


RecipeFile = Annotated[
    str,
    typer.Argument(
        metavar="[RECIPE]", help="A recipe: a file, or the name of one that `lmmono recipes` lists."
    ),
]
RecipeOrRun = Annotated[
    str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, such as train.steps=500."),
]


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Analyse the neurons of language models: train, capture, explain, score, query in SQL."""
    from importlib import metadata

    if version:
        print(metadata.version("lmmono"))
        raise typer.Exit


@app.command()
def check(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...", help="Recipe files, then settings to override."
        ),
    ],
    files: Annotated[bool, typer.Option(help="Also check that the files they name exist.")] = True,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Run the model briefly: time, size and memory of the capture."
        ),
    ] = False,
) -> None:
    """Check recipes: list every error and every missing file at once. Writes nothing.

    Example: lmmono check recipes/quickstart.yaml train.steps=500 --measure
    """
    from lmmono.recipe import Recipe

    overrides = [text for text in recipes if "=" in text and not os.path.exists(text)]
    faults: list[str] = []
    for path in [text for text in recipes if text not in overrides] or [None]:
        try:
            runs = Recipe.check(path, *overrides) if files else Recipe.load(path, *overrides).runs()
        except RecipeError as error:
            faults += error.faults
            continue
        names = ", ".join(str(run.dir) for run in runs)
        print(
            printable(
                f"{path or 'pretrained'}: ok, {len(runs)} run{'s' * (len(runs) > 1)}: {names}"
            )
        )
        if measure:
            from lmmono.captures.forecast import forecast_recipe

            for run in runs:
                print(printable(f"{run.dir}: capture of {forecast_recipe(run)}"))
    if faults:
        raise RecipeError(dict.fromkeys(faults))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write instead of stdout.")] = None,
    page: Annotated[
        str | None, typer.Option(help="A page to read instead: settings, metrics, recipes, api.")
    ] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors, or a page of the documentation.

    Example: lmmono schema --out recipe.schema.json
    """
    from lmmono.cli.doc_pages import PAGES
    from lmmono.recipe.recipe import schema_text
    from lmmono.registry.lookup import find

    text = schema_text() if page is None else find("page", page, PAGES)()
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


@app.command("recipes")
@prints_rows
def recipes_(
    name: Annotated[str | None, typer.Argument(help="A recipe to copy.")] = None,
    out: Annotated[Path, typer.Option(help="Folder or file to copy it to.")] = Path(),
) -> OutputTable | None:
    """List the recipes that come with lmmono, or copy one, to be changed.

    Example: lmmono recipes quickstart --out my_study.yaml
    """
    from lmmono.cli.listing import list_shipped
    from lmmono.recipe.shipped import copy_recipe

    if name is None:
        return list_shipped()
    print(printable(str(copy_recipe(name, out))))
    return None


@app.command("ls")
@prints_rows
def list_(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    where: Annotated[
        Path | None, typer.Argument(help="Folder to look in; for hooks and dictionaries, a run.")
    ] = None,
) -> OutputTable:
    """List recipes, runs, stores; hooks or dictionaries of a run; explainers, scorers, methods ...

    Example: lmmono ls dictionaries runs/quickstart/crate
    """
    from lmmono.cli import listing

    default = Path("recipes" if what is Listed.recipes else "runs")
    return getattr(listing, f"list_{what.value}")(where or default)


@app.command("run")
@prints_rows
def run_(recipe: RecipeFile, overrides: Overrides = None) -> Outcome | None:
    """Run every stage of a recipe that is not finished yet, then show the runs side by side.

    Without a recipe it takes a pretrained model and a text, and the defaults of `pretrained`.

    Example: lmmono run recipes/quickstart.yaml train.lr=1e-3 out=other

    Example: lmmono run model.path=./my-model 'data.corpus.paths=[texts/*.txt]' out=runs/mine
    """
    return outcome.finished(_done(recipe, overrides))


@app.command()
@prints_rows
def train(target: RecipeOrRun, overrides: Overrides = None) -> Outcome | None:
    """Train the models of a recipe, or resume an interrupted training.

    Example: lmmono train recipes/quickstart.yaml model.arch=crate train.steps=500
    """
    return outcome.trained(_done(target, overrides, "train"))


@app.command()
@prints_rows
def sweep(recipe: RecipeFile, overrides: Overrides = None) -> OutputTable:
    """Search the learning rate of every arm of a recipe that has a sweep, and show all trials.

    `lmmono run` does the same first; trials that are finished are not made again.

    Example: lmmono sweep recipes/study_depth.yaml
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.pipeline.sweep import sweep
    from lmmono.recipe import Recipe

    study = Recipe.load(recipe, *(overrides or ()))
    if not study.sweep.lr:
        raise RecipeError([f"{recipe}: sweep.lr: want learning rates to try, got none"])
    with shown_progress() as progress:
        trials = sweep(study, progress=progress)
    columns = ("arm", "lr", "val loss", "± se", "density of layers", "kurtosis of layers", "chosen")
    marks = {(True, True): "yes, at the edge", (True, False): "yes", (False, False): ""}
    rows = [
        (
            trial.arm,
            trial.lr,
            round(trial.val_loss, 4),
            round(trial.val_loss_se, 4),
            " ".join(f"{density:.3f}" for density in trial.densities),
            " ".join(f"{kurtosis:.1f}" for kurtosis in trial.kurtoses),
            marks[trial.is_chosen, trial.is_edge],
        )
        for trial in trials
    ]
    note = (
        "val loss: nats per token on held-out documents, with its standard error over documents. "
        "At the edge: a better rate may lie beyond those tried."
    )
    return OutputTable(columns, rows, title="Learning rates", note=note, is_report=True)


@app.command()
def register(
    claims: Annotated[Path, typer.Argument(metavar="FILE", help="A file of registered tests.")],
    log: Annotated[Path, typer.Option(help="Log that a line is added to.")] = Path(
        "docs/registered.jsonl"
    ),
) -> None:
    """Note the sha256 of a file of claims, with commit and time, in a log that only grows.

    A recipe names the file as `registered`; the manifest of each run then holds the same sha256.

    Example: lmmono register recipes/registered/study_depth.yaml
    """
    from lmmono.files.provenance import git_commit
    from lmmono.recipe.registration import register

    entry = register(claims, log, git_commit())
    print(printable(f"{claims}: sha256 {entry['sha256']}, in {log} since {entry['time']}"))


@app.command()
@prints_rows
def capture(target: RecipeOrRun, overrides: Overrides = None) -> Outcome | None:
    """Stream activations of trained models into their stores.

    Example: lmmono capture runs/quickstart/crate
    """
    return outcome.captured(_done(target, overrides, "capture"))


@app.command()
@prints_rows
def dictionary(target: RecipeOrRun, overrides: Overrides = None) -> Outcome | None:
    """Learn the dictionaries of captured runs, and measure them; resumable.

    Example: lmmono dictionary recipes/dictionaries.yaml
    """
    return outcome.learned(_done(target, overrides, "dictionary"))


@app.command()
@prints_rows
def explain(target: RecipeOrRun, overrides: Overrides = None) -> Outcome | None:
    """Explain the units of captured runs, from documents that no score will see.

    Explanations by other explainers or settings stay beside the new ones.

    Example: lmmono explain runs/mine explain.explainers=[token_lookup]
    """
    return outcome.explained(_done(target, overrides, "explain"))


@app.command()
@prints_rows
def score(target: RecipeOrRun, overrides: Overrides = None) -> Outcome | None:
    """Score the units of captured runs and their explanations, next to controls.

    Example: lmmono score runs/quickstart/crate
    """
    return outcome.scored(_done(target, overrides, "score"))


@app.command()
@prints_rows
def promotes(target: RecipeOrRun, overrides: Overrides = None) -> Outcome | None:
    """Read each unit's direction through the last layers: tokens it makes likelier, and less so.

    Example: lmmono promotes runs/quickstart/crate
    """
    return outcome.promoted(_done(target, overrides, "promotes"))


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, or folders that hold runs."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path(
        "report.html"
    ),
    units: Annotated[
        int, typer.Option(min=0, help="Units of each hook that get a page, the best first.")
    ] = 8,
    all_units: Annotated[bool, typer.Option("--all-units", help="Give every unit a page.")] = False,
) -> None:
    """Write runs into one HTML file that opens from disk: where to look, layers, scores, units.

    Example: lmmono report runs/quickstart -o report.html
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.reports.pages.offline import report as made_of

    with shown_progress() as progress:
        page = made_of(*runs, units=None if all_units else units, progress=progress)
    print(printable(str(page.save(out))))
    _tell(repr(page))


@app.command()
@prints_rows
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a store.")],
    unit: Annotated[
        str, typer.Argument(metavar="HOOK:UNIT", help="Such as blocks.1.mlp.hook_post:17.")
    ],
    exemplars: Annotated[int, typer.Option(min=1, help="Exemplars to show.")] = 8,
) -> Sequence[OutputTable]:
    """Show one unit whole: statistics, exemplars, tokens, explanations, scores with controls.

    A part of the hook's name is enough where one hook has it, as in blocks.1.mlp:17.

    Example: lmmono show runs/quickstart/crate blocks.1.mlp.hook_post:17
    """
    from lmmono.cli.querying import open_stores
    from lmmono.reports.unit_tables import find_unit, unit_tables

    with open_stores([run]) as store:
        hook, index = find_unit(store, unit)
        return reports(unit_tables(store, hook, index, k=exemplars))


@app.command()
@prints_rows
def history(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run with kept steps.")],
    unit: Annotated[
        str | None,
        typer.Argument(metavar="[HOOK:UNIT]", help="One unit, such as blocks.1.mlp.hook_post:17."),
    ] = None,
) -> Sequence[OutputTable]:
    """Show the kept steps of a training: losses, scores, and when units are born and die.

    Steps are kept by train.keep, as in train.keep.log=true.

    Example: lmmono history runs/study_depth/crate-2l-seed0 blocks.1.mlp:17
    """
    import activation_store as astore
    from lmmono.reports.history_tables import history_tables, unit_history_table
    from lmmono.reports.unit_tables import find_unit
    from lmmono.runs.folder import open_run

    run = open_run(target)
    if unit is None:
        return reports(history_tables(run))
    with astore.open(run.store_path) as store:
        hook, index = find_unit(store, unit)
    return reports([unit_history_table(run, hook, index)])


@app.command()
@prints_rows
def robustness(
    target: RecipeOrRun,
    overrides: Overrides = None,
    every: Annotated[
        bool, typer.Option("--all", help="Show every level and difference too, not only the areas.")
    ] = False,
) -> Sequence[OutputTable]:
    """Test how robust the codes of captured runs are as tasks get harder.

    Example: lmmono robustness recipes/robustness_planted.yaml --all
    """
    from lmmono.reports.robustness_tables import suite_tables

    runs = _done(target, overrides, "robustness")
    if not this_process().is_main:
        return []
    for run in runs:
        for figure in sorted((run.dir / "robustness").glob("*.svg")):
            _tell(str(figure))
    return reports(table for run in runs for table in suite_tables(run, every=every))


@app.command()
@prints_rows
def compare(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders that hold the runs of a study."),
    ],
) -> Sequence[OutputTable]:
    """Compare the arms of a scored study over training seeds, and arms that differ in one thing.

    Example: lmmono compare runs/study_layers
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.reports.study_tables import study_tables

    with shown_progress() as progress:
        return reports(study_tables(studies, progress))


@app.command()
@prints_rows
def results(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders that hold the runs of a study."),
    ],
    out: Annotated[Path, typer.Option(help="Page to write, or to rewrite between its marks.")],
) -> OutputTable:
    """Write what a study has come to so far into a page: progress, tables, verdicts.

    Only what stands between the marks of the page is made anew; the text around them stays.

    Example: lmmono results runs/study_depth --out docs/results/development.md
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.reports.result_page import write_result_page

    with shown_progress() as progress:
        first, *_ = reports(write_result_page(out, studies, progress))
    return first


@app.command()
@prints_rows
def variance(
    studies: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders that hold the runs of a study."),
    ],
    scorer: Annotated[
        list[str] | None, typer.Option(help="Scorers of explanations; repeatable.")
    ] = None,
    explainer: Annotated[
        list[str] | None, typer.Option(help="Explainers of the runs; repeatable.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of records.")] = 3,
    units: Annotated[
        int | None, typer.Option(min=2, help="Units of each hook; all by default.")
    ] = None,
) -> Sequence[OutputTable]:
    """Tell which choice moves a score: corpus half, record draw, explainer, training seed, arm.

    Example: lmmono variance runs/study_layers --explainer token_lookup --explainer context_rules
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.reports.study_tables import variance_tables

    with shown_progress() as progress:
        return reports(
            variance_tables(
                studies,
                scorers=scorer or ["simulation_random", "detection"],
                explainers=explainer or ["token_lookup"],
                n_draws=draws,
                n_units=units,
                progress=progress,
            )
        )


@app.command("audit-scorer")
@prints_rows
def audit_scorer(
    name: Annotated[str, typer.Argument(help="A scorer; see `lmmono ls scorers`.")],
    n_documents: Annotated[
        int, typer.Option(min=100, help="Documents to generate; half are for scoring.")
    ] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Audit on the neurons of this run, which must be of the planted language."
        ),
    ] = None,
    densities: Annotated[
        bool,
        typer.Option("--densities", help="Audit on units that fire on 0.01 % to 10 % of tokens."),
    ] = False,
) -> OutputTable:
    """Measure how often a scorer ranks true explanations of planted units above false ones.

    Example: lmmono audit-scorer simulation_tar --densities
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.scores.audit import audit_scorer
    from lmmono.scores.court import audit_densities

    with shown_progress() as progress:
        if densities:
            if run is not None:
                raise ExplainError("--densities makes units of its own; leave out --run")
            verdict = audit_densities(name, seed=seed, progress=progress)
            rows = [tuple(row.values()) for row in verdict.rows]
            return OutputTable(tuple(verdict.rows[0]), rows, title=verdict.metric)
        audit = audit_scorer(name, run=run, n_documents=n_documents, seed=seed, progress=progress)
    rows = [tuple(row.values()) for row in audit.rows]
    return OutputTable(tuple(audit.rows[0]), rows, title=audit.metric)


@app.command(context_settings={"ignore_unknown_options": True})  # a query may begin with a comment
@prints_rows
def sql(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... QUERY",
            help="Runs, stores or a lake, then the query; - reads it from stdin.",
        ),
    ],
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read the query from a file.")
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A value for $NAME in the query; repeatable."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most rows to give; a table shows 100 by default.")
    ] = None,
    data_path: DataPath = None,
    format: Format = "table",
    wide: bool = False,
) -> None:
    """Query a store in SQL, read-only; `.help` lists tables and macros, `.help NAME` columns.

    Several runs are schemas named by their folders. The query may be several statements.

    Example: lmmono sql runs/quickstart/crate "FROM exemplars('blocks.1.mlp.hook_post', 17, 4)"
    """
    from lmmono.cli.querying import read_question, write_answer

    places, query = read_question(words, file)
    write_answer(places, query, param or [], data_path, format, limit, wide)


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Check every byte of a run folder: models, dictionaries, stores; exit code 2 if damaged.

    Example: lmmono verify runs/quickstart/crate
    """
    from lmmono.pipeline.whole_run import check_run

    report = check_run(target)
    if report.faults:
        raise RunError("\n".join(report.faults))
    print(printable(str(report)))


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Generate text with a trained model.

    Example: lmmono generate runs/quickstart/crate "the red" --max-tokens 20
    """
    from lmmono.runs.folder import open_run
    from lmmono.runs.generation import generate

    run = open_run(target)
    text = generate(run, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
    print(printable(text))


@import_app.command("crate-lm")
def import_crate_lm(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A released .pt file.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    n_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Number of attention heads, if the file does not give it."),
    ] = None,
) -> None:
    """Turn a released CRATE or GPT-2 checkpoint into a Hugging Face folder.

    Example: lmmono import crate-lm crate_12L.pt --out models/crate_12l
    """
    from lmmono.models.released import import_released

    print(printable(str(import_released(checkpoint, out, n_heads=n_heads))))


@import_app.command("llama2c")
def import_llama2c(
    checkpoint: Annotated[Path, typer.Argument(metavar="BIN", help="A .bin of version 0.")],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="The tokenizer that belongs to it, a tok*.bin.")
    ] = None,
) -> None:
    """Turn a model of karpathy/llama2.c into a Hugging Face folder.

    Example: lmmono import llama2c stories260K.bin --tokenizer tok512.bin --out models/stories
    """
    from lmmono.interop.llama2c import import_llama2c

    print(printable(str(import_llama2c(checkpoint, out, tokenizer))))


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
    # DuckDB turns Ctrl-C into a RuntimeError of its own
    is_interrupt = isinstance(error, RuntimeError) and "interrupted" in str(error).lower()
    if isinstance(error, SystemExit | KeyboardInterrupt) or is_interrupt:
        _tell("stopped; what was finished is kept, the same command resumes from there")
        return 130  # 128 + SIGINT, as shells say it
    if isinstance(error, BrokenPipeError):  # the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if _is_memory_error(error):
        first = str(error).splitlines()[0] if str(error) else "the machine refused"
        _tell(f"not enough memory: {first}; what was finished is kept. Lower batch_tokens or d_sae")
        return 2
    # a store's error cannot have been raised where its module was never imported
    store = sys.modules.get("activation_store.errors")
    kinds = (LmmonoError, OSError, *([store.StoreError] if store else []))
    if not isinstance(error, kinds):
        raise error
    _tell(str(error))
    return 143 if isinstance(error, TrainingStopped) else 2  # 143: 128 + SIGTERM


def _is_memory_error(error: BaseException) -> bool:
    """Say whether memory ran out; torch says it in a RuntimeError."""
    text = str(error)
    torch_says = "can't allocate memory" in text or "out of memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torch_says)


def _tell(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)


def _done(target: str, overrides: Sequence[str] | None, *verbs: str) -> "list[Run]":
    """Do the stages of some verbs of every run of a recipe or folder, or all stages."""
    from lmmono.cli.terminal import shown_progress
    from lmmono.pipeline import open_for, run_stages
    from lmmono.runs.folder import changes, open_run

    with shown_progress() if this_process().is_main else nullcontext(silent) as progress:
        wanted = _recipes_of(target, overrides or (), progress)
    runs: dict[int, Run] = {}
    # every arm with the first seed, then with the next: a study that is stopped has whole seeds
    seeds = list(dict.fromkeys(recipe.seed for recipe, _ in wanted))
    for i in sorted(range(len(wanted)), key=lambda i: seeds.index(wanted[i][0].seed)):
        recipe, folder = wanted[i]
        run = open_for(recipe, folder)
        if run.set_aside:
            differences = changes(open_run(run.set_aside).recipe, recipe)
            _tell(f"{run.dir}: other settings' results set aside in {run.set_aside}")
            _tell("\n".join(f"  {line}" for line in differences))
        before = run.manifest.stages
        with shown_progress() if this_process().is_main else nullcontext(silent) as progress:
            runs[i] = run_stages(run, *verbs, progress=progress)
        if this_process().is_main:
            for warning in run.warnings:
                _tell(f"{run.dir}: warning: {warning}")
            # a call that read no text does not open the corpus
            readers, stages = (run.model_stage, "capture"), run.manifest.stages
            has_read = any(stages.get(name) != before.get(name) for name in readers)
            for note in run.corpus.notes if has_read else ():
                _tell(f"{run.dir}: text: {note}")
    return [runs[i] for i in sorted(runs)]


def _recipes_of(
    target: str, overrides: Sequence[str], progress: Progress
) -> "list[tuple[Recipe, Path | None]]":
    """Return the recipe of every run, with the folder of a run that is named itself.

    The learning rates of a sweep are searched for first, where that is not done.

    A run folder may have been moved since its recipe was written, so it is worked on where it is,
    unless an override says where else. Settings alone are a pretrained model and its text.
    """
    from lmmono.recipe import Recipe

    folder = Path(target)
    if "=" in target and not folder.exists():
        recipe = Recipe.load(None, target, *overrides)
        if this_process().is_main:
            _tell(
                f"no recipe, so the settings of `pretrained`; name {recipe.name}, seed "
                f"{recipe.seed}; all are written to {recipe.dir / 'recipe.yaml'}"
            )
        return [(one, None) for one in recipe.runs()]
    if not (folder / "manifest.json").is_file():
        study = Recipe.load(target, *overrides)
        if not study.sweep.lr:
            return [(recipe, None) for recipe in study.runs()]
        from lmmono.pipeline.sweep import settled_runs

        return [(recipe, None) for recipe in settled_runs(study, progress=progress)]
    recipe = Recipe.load(folder / "recipe.yaml", *overrides)
    is_elsewhere = any(text.partition("=")[0].strip() in ("out", "name") for text in overrides)
    return [(recipe, None if is_elsewhere else folder)]
