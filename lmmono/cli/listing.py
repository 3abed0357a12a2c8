"""What lies around: recipes, runs, stores, hook names, dictionaries and instruments, as rows."""

from pathlib import Path

from lmmono.cli.output import OutputTable
from lmmono.errors import RecipeError, RunError
from lmmono.files.json_files import read_json
from lmmono.recipe import Recipe
from lmmono.recipe.shipped import shipped_recipes
from lmmono.runs.folder import find_runs, open_run
from lmmono.runs.manifest import Manifest
from lmmono.runs.stages import STAGES


def list_recipes(folder: Path) -> OutputTable:
    """List the recipe files of a folder; one with faults says so in place of its runs."""
    rows: list[tuple[object, ...]] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            recipe = Recipe.load(path)
            runs = ", ".join(str(run.dir) for run in recipe.runs())
            rows.append((str(path), runs, recipe.about))
        except RecipeError as error:
            rows.append((str(path), f"{len(error.faults)} faults; lmmono check {path}", ""))
    return OutputTable(("recipe", "runs", "about"), tuple(rows))


def list_shipped() -> OutputTable:
    """List the recipes that come with lmmono, by the names that `lmmono run` knows."""
    recipes = {name: Recipe.load(path) for name, path in shipped_recipes().items()}
    rows = ((name, len(one.runs()), one.about) for name, one in recipes.items())
    return OutputTable(("recipe", "runs", "about"), tuple(rows))


def list_runs(folder: Path) -> OutputTable:
    """List the run folders under a folder, with their stages; a damaged one says so."""
    rows: list[tuple[object, ...]] = []
    for path in find_runs(folder):
        try:  # the manifest alone: to check every recipe takes ten times as long
            records = Manifest.read(path).stages
        except RunError as error:
            rows.append((str(path), f"damaged: {str(error).splitlines()[0]}", None, None))
            continue
        begun = [name for name in STAGES if name in records]
        stages = ", ".join(f"{name} {records[name].state}" for name in begun)
        model = records.get("open") or records.get("train")
        loss = model.facts.get("val_loss") if model else None
        rows.append((str(path), stages, loss, _megabytes(path)))
    return OutputTable(("run", "stages", "val loss", "MB"), tuple(rows))


def list_stores(folder: Path) -> OutputTable:
    """List the activation stores under a folder, those of vectors alone too."""
    paths = sorted([*folder.rglob("store.duckdb"), *folder.rglob("vectors.duckdb")])
    rows = tuple((str(path), _megabytes(path) + _megabytes(path.with_suffix(""))) for path in paths)
    return OutputTable(("store", "MB"), rows)


def list_hooks(path: Path) -> OutputTable:
    """List the hooks of a run's model in the order they run, with their numbers per token."""
    from lmmono.models.hooks import hook_widths

    return OutputTable(("hook", "width"), tuple(hook_widths(open_run(path).model).items()))


def list_dictionaries(path: Path) -> OutputTable:
    """List the dictionaries in a run's folder, as they lie there: fitted, or begun."""
    folder = open_run(path).dir / "dictionaries"
    rows: list[tuple[object, ...]] = []
    for place in sorted(folder.glob("*/*")):
        hook, name, about = place.parent.name, place.name, place / "dictionary.json"
        if not about.is_file():
            rows.append((hook, name, "not finished", None, str(place)))
            continue
        try:
            facts = read_json(about, dict, RunError)
            widths = f"{facts['d_in']} -> {facts['d_sae']}"
            rows.append((hook, name, widths, facts["seed"], str(place)))
        except (RunError, KeyError) as fault:
            rows.append((hook, name, f"damaged: {type(fault).__name__}: {fault}", None, str(place)))
    return OutputTable(("hook", "dictionary", "widths", "seed", "folder"), tuple(rows))


def list_explainers(_: Path) -> OutputTable:
    """List what explains units, with what each needs besides a store."""
    from lmmono.registry.explainers import EXPLAINERS

    rows = (
        (explainer.name, ", ".join(explainer.needs), explainer.about)
        for explainer in EXPLAINERS.values()
    )
    return OutputTable(("explainer", "needs", "about"), tuple(rows))


def list_scorers(_: Path) -> OutputTable:
    """List what scores units, with what each needs besides a store, and what guessing gets."""
    from lmmono.registry.scorers import SCORERS

    rows = (
        (
            scorer.name,
            ", ".join(scorer.needs),
            scorer.chance,
            scorer.least_density,
            ", ".join(scorer.presets),
            scorer.about,
        )
        for scorer in SCORERS.values()
    )
    columns = ("scorer", "needs", "chance", "least_density", "presets", "about")
    return OutputTable(columns, tuple(rows))


def list_methods(_: Path) -> OutputTable:
    """List loss terms, adapters, heads, interpreters and comparators, with source and status."""
    from lmmono.registry.methods import METHODS

    rows = (
        (m.name, m.role, ", ".join(m.places), m.paper, m.variant, m.status, m.about)
        for m in METHODS.values()
    )
    names = ("method", "role", "named in", "paper", "variant", "status", "about")
    return OutputTable(names, tuple(rows))


def list_tasks(_: Path) -> OutputTable:
    """List the tasks of the robustness suites, with their other domains and where they lie."""
    from lmmono.data.tasks.planted_tasks import PLANTED_TASKS
    from lmmono.registry.tasks import TASK_NAMES, find_record

    rows: list[tuple[object, ...]] = []
    for name in TASK_NAMES:
        if name in PLANTED_TASKS:
            task = PLANTED_TASKS[name]
            rows.append((name, len(task.label_names), "shifted", "planted", task.about))
        else:
            record = find_record(name)
            place = ", ".join(dict.fromkeys(t.place for t in (*record.files, *record.hub)))
            rows.append((name, len(record.label_names), ", ".join(record.ood), place, record.about))
    return OutputTable(("task", "classes", "other domains", "place", "about"), tuple(rows))


def _megabytes(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)
