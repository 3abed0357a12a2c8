"""From a recipe file and overrides to checked recipes, with every fault told at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from lmmono.errors import RecipeError, nearest
from lmmono.recipe.recipe import SECTIONS, Recipe, row_clash
from lmmono.recipe.schema import Schema, recipe_schema, resolve
from lmmono.recipe.sections import Data, Train
from lmmono.recipe.tree import Fault, Origin, Path, Tree, Values, read_override, read_tree
from lmmono.recipe.wording import clash_fault, faults_of, shown


def load_recipe(path: str | FilePath, overrides: Sequence[str]) -> Recipe:
    """Read and check a recipe file; see `Recipe.load`."""
    changes, unreadable = _read_overrides(overrides)
    try:
        tree = read_tree(_read_text(FilePath(path)), str(path))
    except RecipeError as error:
        raise RecipeError([*error.faults, *unreadable]) from None
    for change in changes:
        _override(tree, change)
    tree.faults += _seed_faults(tree)
    tree.faults += _select(tree, changes)
    recipe, faults = _check(tree)
    runs, run_faults = _expand(tree)
    faults = [*tree.faults, *faults, *_news(run_faults, faults)]
    if faults or unreadable:
        raise RecipeError([*map(str, sorted(set(faults))), *unreadable])
    assert recipe is not None
    return runs[0] if len(runs) == 1 else recipe


def _news(faults: Sequence[Fault], known: Sequence[Fault]) -> list[Fault]:
    """Return the faults of runs that are neither known nor inside a setting known to be wrong."""
    wrong = {fault.path for fault in known}
    return [
        fault
        for fault in faults
        if replace(fault, arm="") not in known
        and not any(fault.path[:n] in wrong for n in range(1, len(fault.path)))
    ]


def runs_of(recipe: Recipe) -> tuple[Recipe, ...]:
    """Return the recipe of every run of a study; see `Recipe.runs`."""
    tree = Tree(Origin(f"recipe {recipe.name}"), recipe.model_dump(exclude_unset=True))
    runs, faults = _expand(tree)
    if faults:
        raise RecipeError(map(str, sorted(set(faults))))
    return tuple(runs)


def _read_text(path: FilePath) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), near) if near else "name a recipe such as recipes/quickstart.yaml"
        raise RecipeError([f"{path}: no such file; {hint}"]) from None
    except IsADirectoryError:
        raise RecipeError([f"{path}: want a recipe file, got a folder"]) from None
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: not text in UTF-8 (byte {error.start})"]) from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}"]) from None


def _read_overrides(texts: Sequence[str]) -> tuple[list[Tree], list[str]]:
    changes: list[Tree] = []
    unreadable: list[str] = []
    for text in texts:
        try:
            changes.append(read_override(text))
        except RecipeError as error:
            unreadable += error.faults
    return changes, unreadable


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
    given = {"seed", "seeds"} & set(tree.values)
    if len(given) == 1:
        return []
    path: Path = ("seed",)
    got = "both" if given else "neither"
    message = f"want seed (an integer >= 0) or seeds (a list of them), got {got}"
    return [Fault(tree.origin(path), path, message)]


def _select(tree: Tree, changes: Sequence[Tree]) -> list[Fault]:
    """Take out the arms that are not asked for; fit the others to the overrides."""
    arms = tree.values.get("arms")
    if not isinstance(arms, dict) or not arms:
        return []
    known = list(arms)
    chosen = tree.values.get("arm")
    if chosen is not None and chosen not in arms:
        message = f"want one of {', '.join(known)}, got {shown(chosen)}"
        return [Fault(tree.origin(("arm",)), ("arm",), message)]
    for name in known:
        contradicted = any(_contradicts(arms[name], change) for change in changes)
        if (chosen is not None and name != chosen) or contradicted:
            del arms[name]
        else:
            _fit_arm(tree, name, changes)
    if arms:
        return []
    last = changes[-1].top
    return [Fault(last, last.path, f"leaves none of the arms {', '.join(known)}")]


def _contradicts(arm: object, change: Tree) -> bool:
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


def _expand(tree: Tree) -> tuple[list[Recipe], list[Fault]]:
    """Return the recipe of every run, or the faults of the runs."""
    runs: list[Recipe] = []
    faults: list[Fault] = []
    arms = tree.values.get("arms") or {}
    for name in arms if isinstance(arms, dict) and arms else [None]:
        arm = _arm_tree(tree, name)
        checked, found = _check(arm)
        found += [fault for fault in arm.faults if fault not in tree.faults]
        faults += [replace(fault, arm=name or "") for fault in found]
        if checked is not None and not found:
            runs += [Recipe.model_validate(values) for values in _per_seed(arm.values, name)]
    return runs, faults


def _per_seed(values: Values, arm: str | None) -> Iterator[Values]:
    values = _filled(values, recipe_schema(), recipe_schema())
    seeds = values.pop("seeds", ())
    if not seeds:
        yield {**values, "folder": arm} if arm else values
        return
    for seed in seeds:
        folder = f"{arm}-seed{seed}" if arm else f"seed{seed}"
        yield {**values, "seed": seed, "folder": folder}


def _arm_tree(tree: Tree, name: str | None) -> Tree:
    arm_tree = tree.copy()
    arms = arm_tree.values.pop("arms", None)
    if "seeds" in arm_tree.values:
        arm_tree.remove("seed")
    if name is None or not isinstance(arms[name], dict):
        return arm_tree
    arm_tree.values["arm"] = name
    for key, value in arms[name].items():
        origins = arm_tree.below(("arms", name, key)) or {(): tree.top}
        path = tuple(key.split("."))
        if path[0] in SECTIONS:
            arm_tree.set(path, value, origins)
        else:
            message = f"want a setting of a section; {nearest(path[0], SECTIONS)}"
            arm_tree.faults.append(Fault(origins[()], path, message))
    return arm_tree


def _check(tree: Tree) -> tuple[Recipe | None, list[Fault]]:
    root = recipe_schema()
    values = _filled(tree.values, root, root)
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        errors = [
            e for e in error.errors(include_url=False) if e["loc"] != ("seed",) or "seed" in values
        ]
        faults = faults_of(errors, tree, root)
    if not {str(f.path[0]) for f in faults if f.path} & {"data", "train"}:
        faults += _row_faults(values, tree)
    return None, list(dict.fromkeys(faults))


def _row_faults(values: Values, tree: Tree) -> list[Fault]:
    """Return the fault that the recipe's own check does not reach when other sections have some."""
    sections = [values.get("data", {}), values.get("train", {})]
    clash = row_clash(Data.model_validate(sections[0]), Train.model_validate(sections[1]))
    if clash is None:
        return []
    context: Mapping[str, Any] = clash.context or {}
    fields: list[Path] = [tuple(field.split(".")) for field in context["fields"]]
    return [clash_fault(fields, str(context["message"]), tree)]


def _filled(values: Values, schema: Schema, root: Schema) -> Values:
    """Return the settings with the default kind where a section is given without its kind."""
    filled = dict(values)
    for key, inner in schema.get("properties", {}).items():
        if not isinstance(filled.get(key), dict):
            continue
        default = inner.get("default")
        if "discriminator" in inner and isinstance(default, dict):
            tag = inner["discriminator"]["propertyName"]
            filled[key] = {tag: default[tag], **filled[key]}
        filled[key] = _filled(filled[key], resolve(inner, root), root)
    return filled
