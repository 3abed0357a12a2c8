"""From a recipe file and overrides to checked recipes, with every fault told at once."""

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import ValidationError

from lmmono.errors import DataError, RecipeError, nearest
from lmmono.recipe.faults import clash_fault, faults_of, keys_of, shown
from lmmono.recipe.recipe import SECTIONS, Recipe, recipe_schema, row_clash
from lmmono.recipe.section import Section
from lmmono.recipe.sections import (
    Data,
    FilesCorpus,
    FolderTokenizer,
    HubCorpus,
    PretrainedModel,
    Train,
)
from lmmono.recipe.shipped import find_recipe, shipped_recipes
from lmmono.recipe.tree import (
    MAX_BYTES,
    Fault,
    Origin,
    Path,
    Tree,
    Values,
    read_override,
    read_tree,
)
from lmmono.registry.lookup import load

MAX_RUNS = 1000
"""Runs of a study: each is checked by itself, in about two milliseconds, and gets a folder."""


NO_RECIPE = "pretrained"
"""The shipped recipe that a model and a text of one's own are put into, where no file is named."""


def load_recipe(
    path: str | FilePath | None, overrides: Sequence[str], *, with_files: bool = False
) -> Recipe:
    """Read and check a recipe file, and with it the files that it names; see `Recipe.load`."""
    changes: list[Tree] = []
    unreadable: list[str] = []
    for text in overrides:
        try:
            changes.append(read_override(text))
        except RecipeError as error:
            unreadable += error.faults
    file = shipped_recipes()[NO_RECIPE] if path is None else find_recipe(FilePath(path))
    try:
        tree = read_tree(_read_text(file), str(path or file))
    except RecipeError as error:
        raise RecipeError([*error.faults, *unreadable]) from None
    if path is None:
        for placeholder in (("name",), ("model", "path"), ("data", "corpus")):
            tree.remove(*placeholder)
    for change in changes:
        _override(tree, change)
    if path is None:
        _name_after_model(tree)
    tree.faults += _seed_faults(tree)
    tree.faults += _select(tree, changes)
    recipe, faults = _check(tree, with_files)
    runs, run_faults = _expand(tree, with_files)
    # of a run only what is neither known already nor inside a setting known to be wrong
    wrong = {fault.path for fault in faults}
    news = [
        fault
        for fault in run_faults
        if replace(fault, arm="") not in faults
        and not any(fault.path[:n] in wrong for n in range(1, len(fault.path)))
    ]
    faults = [*tree.faults, *faults, *news]
    if faults or unreadable:
        raise RecipeError([*map(str, sorted(set(faults))), *unreadable])
    assert recipe is not None
    return runs[0] if len(runs) == 1 else recipe


def runs_of(recipe: Recipe) -> tuple[Recipe, ...]:
    """Return the recipe of every run of a study; see `Recipe.runs`."""
    tree = Tree(Origin(f"recipe {recipe.name}"), recipe.model_dump(exclude_unset=True))
    runs, faults = _expand(tree)
    if faults:
        raise RecipeError(map(str, sorted(set(faults))))
    return tuple(runs)


def _name_after_model(tree: Tree) -> None:
    """Name the run of a model and a text that came without a recipe, if both came."""
    model, data = (tree.values.get(key) for key in ("model", "data"))
    if not (isinstance(model, dict) and "path" in model) or not (
        isinstance(data, dict) and "corpus" in data
    ):
        raise RecipeError(
            [
                "no recipe: name one such as quickstart (`lmmono recipes` lists them), or give a "
                "model and a text: model.path=FOLDER_OR_HUB_NAME data.corpus.paths=[texts/*.txt]"
            ]
        )
    if "name" not in tree.values:
        last = re.sub(r"[^A-Za-z0-9_.-]+", "-", FilePath(str(model["path"])).resolve().name)
        tree.set(("name",), last.lstrip("_.-") or NO_RECIPE, {(): tree.top})


def _read_text(path: FilePath) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # a device or a log may have no end
        if len(content) > MAX_BYTES:
            raise RecipeError([f"{path}: want a recipe of at most {MAX_BYTES:,} bytes"])
        return content.decode("utf-8")
    except FileNotFoundError:
        near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near += shipped_recipes()
        hint = nearest(str(path), near)
        raise RecipeError([f"{path}: no such file; {hint}"]) from None
    except IsADirectoryError:
        raise RecipeError([f"{path}: want a recipe file, got a folder"]) from None
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not text in UTF-8 (byte {error.start})"]) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError([f"{path}: cannot be read: {reason}"]) from None


def _override(tree: Tree, change: Tree) -> None:
    path = change.top.path
    tree.faults += change.faults
    if path[0] in ("arms", "folder"):
        message = f"{path[0]} cannot be overridden; override the setting, or say arm=..."
        tree.faults.append(Fault(change.top, path, message))
        return
    value = _at(change.values, path)
    if path == ("seed",) and "seeds" in tree.values:
        path, value = ("seeds",), (value,)
    elif path == ("seeds",):
        tree.remove("seed")
    tree.set(path, value, change.below(change.top.path))


def _seed_faults(tree: Tree) -> list[Fault]:
    keys = {"seed", "seeds"} & set(tree.values)
    message = "want seed (an integer >= 0) or seeds (a list of them), got "
    if len(keys) != 1:
        return [_fault(tree, ("seed",), message + ("both" if keys else "neither"))]
    if tree.values.get("seeds") == ():
        return [_fault(tree, ("seeds",), message + "an empty list")]
    return []


def _fault(tree: Tree, path: Path, message: str) -> Fault:
    return Fault(tree.origin(path), path, message)


def _select(tree: Tree, changes: Sequence[Tree]) -> list[Fault]:
    """Take out the arms that are not asked for; fit the others to the overrides."""
    arms = tree.values.get("arms")
    if not isinstance(arms, dict) or not arms:
        return []
    names, chosen = list(arms), tree.values.get("arm")
    if chosen is not None and chosen not in names:
        message = f"want one of {', '.join(names)}, got {shown(chosen)}"
        return [_fault(tree, ("arm",), message)]
    for name in names:
        contradicted = any(_contradicts(arms[name], change) for change in changes)
        if (chosen is not None and name != chosen) or contradicted:
            del arms[name]
        else:
            _fit_arm(tree, name, changes)
    if arms:
        return []
    last = changes[-1].top
    return [Fault(last, last.path, f"leaves none of the arms {', '.join(names)}")]


def _contradicts(arm: object, change: Tree) -> bool:
    """Say whether an arm itself sets an overridden key to another value."""
    if not isinstance(arm, dict):
        return False
    leaves = dict(_leaves(change.values))
    own = {
        (*key.split("."), *inner): leaf
        for key, value in arm.items()
        for inner, leaf in _leaves(value)
    }
    return any(path in leaves and leaves[path] != leaf for path, leaf in own.items())


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _fit_arm(tree: Tree, name: str, changes: Sequence[Tree]) -> None:
    """Let overrides inside a section that the arm replaces as a whole win over the arm."""
    arm = tree.values["arms"][name]
    for change in changes:
        path = change.top.path
        for key in arm if isinstance(arm, dict) else ():
            whole = tuple(key.split("."))
            if isinstance(arm[key], dict) and path[: len(whole)] == whole != path:
                inner: Path = ("arms", name, key, *path[len(whole) :])
                tree.set(inner, _at(change.values, path), change.below(path))


def _at(values: Values, path: Path) -> Any:
    for key in path:
        values = values[str(key)]
    return values


def _expand(tree: Tree, with_files: bool = False) -> tuple[list[Recipe], list[Fault]]:
    """Return the recipe of every run, or the faults of the runs."""
    runs: list[Recipe] = []
    faults: list[Fault] = []
    arms, seeds = tree.values.get("arms"), tree.values.get("seeds")
    arms = arms if isinstance(arms, dict) and arms else {None: None}
    n_runs = len(arms) * (len(seeds) if isinstance(seeds, tuple) else 1)
    if n_runs > MAX_RUNS:
        most = "arms" if len(arms) > 1 else "seeds"
        return [], [_fault(tree, (most,), f"want at most {MAX_RUNS} runs, got {n_runs:,}")]
    rest = tree.copy(without="arms")
    if "seeds" in rest.values:
        rest.remove("seed")
    for name in arms:
        arm = rest if name is None else _arm_tree(tree, rest, name)
        checked, wrong = _check(arm, with_files)
        wrong += [fault for fault in arm.faults if fault not in tree.faults]
        faults += [replace(fault, arm=name or "") for fault in wrong]
        if checked is not None and not wrong:
            runs += [Recipe.model_validate(values) for values in _per_seed(arm.values, name)]
    return runs, faults


def _per_seed(values: Values, arm: str | None) -> Iterator[Values]:
    values = _filled(values, Recipe)
    seeds = values.pop("seeds", ())
    if not seeds:
        yield {**values, "folder": arm} if arm else values
    for seed in seeds:
        folder = f"{arm}-seed{seed}" if arm else f"seed{seed}"
        yield {**values, "seed": seed, "folder": folder}


def _arm_tree(tree: Tree, rest: Tree, name: str) -> Tree:
    """Return the recipe of an arm: what stands outside the arms, with the arm's changes."""
    arm_tree, arm = rest.copy(without="arms"), tree.values["arms"][name]
    if not isinstance(arm, dict):
        return arm_tree
    arm_tree.values["arm"] = name
    for key, value in arm.items():
        origins = tree.below(("arms", name, key)) or {(): tree.top}
        path = tuple(key.split("."))
        if path[0] in SECTIONS:
            arm_tree.set(path, value, origins)
        else:
            message = f"want a setting of a section; {nearest(path[0], SECTIONS)}"
            arm_tree.faults.append(Fault(origins[()], path, message))
    return arm_tree


def _check(tree: Tree, with_files: bool) -> tuple[Recipe | None, list[Fault]]:
    values = _filled(tree.values, Recipe)
    try:
        recipe = Recipe.model_validate(values)
        return recipe, list(_missing_files(recipe, tree)) if with_files else []
    except ValidationError as error:
        errors = [
            e for e in error.errors(include_url=False) if e["loc"] != ("seed",) or "seed" in values
        ]
        faults = faults_of(errors, tree, recipe_schema())
    if not {str(f.path[0]) for f in faults if f.path} & {"data", "train"}:
        faults += _row_faults(values, tree)
    return None, list(dict.fromkeys(faults))


def _missing_files(recipe: Recipe, tree: Tree) -> Iterator[Fault]:
    """Yield a fault for each file or folder that a recipe names and that is not there."""
    wrong = set[Path]()
    for path, name in _named_files(recipe):
        if FilePath(name).exists() or next(glob.iglob(name, recursive=True), None):
            continue
        folder = FilePath(name).parent
        if not folder.is_dir():
            hint = f": there is no folder {folder}"
        else:
            near = sorted(str(path) for path in folder.iterdir())
            hint = f"; {nearest(name, near)}" if near else f": there is nothing in {folder}"
        want = "want a file, folder or glob that is there"
        wrong.add(path[:3])
        yield _fault(tree, path, f"{want}, got {shown(name)}{hint}")
    for i, task in enumerate(recipe.robustness.tasks):
        path = ("robustness", "tasks", i)
        if task.path is not None and not recipe.robustness.suites:
            message = "no suite uses it; name some, such as robustness.suites=[noisy_labels]"
            yield _fault(tree, path, message)
        elif task.path is not None and path not in wrong:
            try:
                load("lmmono.data.tasks.reading:own_task")(task)
            except DataError as error:
                yield _fault(tree, path, str(error))


def _named_files(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Yield the files, folders and globs of this machine that a recipe names, with their keys."""
    data, robustness = recipe.data, recipe.robustness
    names: dict[Path, str | None] = {
        ("train", "minimal_pairs"): recipe.train.minimal_pairs,
        ("registered",): recipe.registered,
    }
    if isinstance(data.corpus, FilesCorpus):
        names |= {("data", "corpus", "paths", i): p for i, p in enumerate(data.corpus.paths)}
    if isinstance(data.corpus, HubCorpus) and data.corpus.name.startswith((".", "/")):
        names["data", "corpus", "name"] = data.corpus.name
    if isinstance(data.tokenizer, FolderTokenizer):
        names["data", "tokenizer", "path"] = data.tokenizer.path
    if robustness.suites:
        names["robustness", "folder"] = robustness.folder
        names["robustness", "synonyms"] = robustness.synonyms
        for i, task in enumerate(robustness.tasks):
            names["robustness", "tasks", i, "path"] = task.path
            for name, other in task.ood.items():
                names["robustness", "tasks", i, "ood", name, "path"] = other.path
    if isinstance(recipe.model, PretrainedModel):
        local = {"path": recipe.model.path, "adapter": recipe.model.adapter}
        names |= {
            ("model", key): name for key, name in local.items() if name and not is_hub_name(name)
        }
    yield from ((path, name) for path, name in names.items() if name is not None)


def is_hub_name(name: str) -> bool:
    """Say whether a name can be one of the Hugging Face Hub: `gpt2`, `openai-community/gpt2`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) is not None


def _row_faults(values: Values, tree: Tree) -> list[Fault]:
    """Return the fault that the recipe's own check does not reach when other sections have some."""
    data, train, model = (values.get(key, {}) for key in ("data", "train", "model"))
    if isinstance(model, dict) and model.get("arch") == "pretrained":
        return []
    clash = row_clash(Data.model_validate(data), Train.model_validate(train))
    if clash is None:
        return []
    context: Mapping[str, Any] = clash.context or {}
    fields = [keys_of(field) for field in context["fields"]]
    return [clash_fault(fields, str(context["message"]), tree)]


def _filled(values: Values, section: type[Section]) -> Values:
    """Return the settings with the kind where a section is given without it.

    That is the default kind, or, where that lacks a key, the only kind that has them all: `paths`
    makes a corpus of files, `path` a pretrained model.
    """
    filled = dict(values)
    for key, field in section.model_fields.items():
        factory, entry = field.default_factory, filled.get(key)
        kind = factory if isinstance(factory, type) and issubclass(factory, Section) else None
        if not isinstance(entry, dict) or not (kind or field.discriminator):
            continue
        if field.discriminator:
            tag = str(field.discriminator)
            kinds = [k for k in get_args(field.annotation) if set(entry) <= set(k.model_fields)]
            if kind not in kinds and len(kinds) == 1:
                kind = kinds[0]
            if tag not in entry and kind is not None:
                (name,) = get_args(kind.model_fields[tag].annotation)
                entry = {tag: name, **entry}
        filled[key] = _filled(entry, kind) if kind is not None else entry
    return filled
