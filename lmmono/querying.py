"""Questions to the stores of one or several runs, in SQL."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.errors import RecipeError, RunError
from lmmono.recipe.tree import read_override
from lmmono.run import open_run

if TYPE_CHECKING:
    from pyarrow import Table

    from activation_store import Store
else:  # for annotations only
    Store = Table = object


def answer(places: Sequence[Path], query: str, parameters: Sequence[str] = ()) -> Table:
    """Return what a query gives over the stores at `places`, opened for reading.

    Args:
        places: Run folders, store folders or store files. Of several, each is a schema named after
            its folder, and the first is found without a name too.
        query: SQL; `$name` stands for a parameter.
        parameters: `name=value` each; the value as a recipe would hold it.

    Raises:
        RunError: A place holds no store, or a parameter is no `name=value`.
        StoreError: A store cannot be opened, or the query fails.
    """
    with open_stores(places) as store:
        return store.sql(query, **_values(parameters)).to_arrow_table()


def open_stores(places: Sequence[Path]) -> Store:
    """Open the first store for reading and, where there are several, attach all by name.

    Raises:
        RunError: A place holds no store.
        StoreError: A store cannot be opened, or two folders have one name.
    """
    import activation_store as astore

    files = [store_file(place) for place in places]
    store = astore.open(files[0])
    for file in files if len(files) > 1 else ():
        store.attach(file, schema_name(file))
    return store


def schema_name(file: Path) -> str:
    """Return the name under which a store's tables are found: that of its folder.

    >>> schema_name(Path("runs/sweep/crate-seed0/store.duckdb"))
    'crate_seed0'
    """
    name = re.sub(r"\W", "_", file.resolve().parent.name)
    return name if name.isidentifier() else f"run_{name}"


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
