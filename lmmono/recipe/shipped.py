"""The recipes that come with lmmono: in a checkout in `recipes/`, installed beside the code."""

import shutil
from pathlib import Path

from lmmono.errors import RecipeError, nearest


def shipped_recipes() -> dict[str, Path]:
    """Return the recipe files that come with lmmono, by name."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path: Path) -> Path:
    """Return the file of a recipe: where the path says, or the shipped one of that bare name."""
    if path.exists() or path.parent != Path():
        return path
    return shipped_recipes().get(path.name.removesuffix(".yaml"), path)


def copy_recipe(name: str, to: Path) -> Path:
    """Copy a shipped recipe to a folder or a file of one's own, and return the file.

    Raises:
        RecipeError: There is no such recipe, or something is at the place already.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        raise RecipeError([f"no recipe {name!r} comes with lmmono; {nearest(name, recipes)}"])
    target = to / recipes[name].name if to.is_dir() else to
    if target.exists():
        raise RecipeError([f"{target}: is there already; say another file with --out"])
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(recipes[name], target))
