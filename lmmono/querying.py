"""Questions to the stores of one or several runs, in SQL."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.errors import RecipeError, RunError
from lmmono.recipe.tree import read_override
from lmmono.run import open_run

if TYPE_CHECKING:
    from pyarrow import Table
else:  # for annotations only
    Table = object


def answer(places: Sequence[Path], query: str, parameters: Sequence[str] = ()) -> Table:
    """Return what a query gives over the stores at `places`, opened for reading.

    Args:
        places: Run folders, store folders or store files.
        query: SQL; `$name` stands for a parameter.
        parameters: `name=value` each; the value as a recipe would hold it.

    Raises:
        RunError: A place holds no store, or a parameter is no `name=value`.
        StoreError: A store cannot be opened, or the query fails.
    """
    import activation_store as astore

    with astore.open(store_file(places[0])) as store:
        return store.sql(query, **_values(parameters)).to_arrow_table()


def store_file(place: Path) -> Path:
    """Return the store at a run folder, store folder or store file.

    Raises:
        RunError: There is none.
    """
    if place.is_file():
        return place
    if (place / "store.duckdb").is_file():
        return place / "store.duckdb"
    run = open_run(place)
    raise RunError(f"{run.dir}: holds no store yet; run `lmmono capture {run.dir}` first")


def _values(parameters: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in parameters:
        try:
            values |= read_override(text).values
        except RecipeError:
            raise RunError(f"--param {text}: want name=value such as unit=17") from None
    return values
