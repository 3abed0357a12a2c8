"""Questions to the stores of one or several runs, and to lakes, in SQL."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.errors import RecipeError, RunError
from lmmono.recipe.tree import read_override
from lmmono.runs.folder import open_run

if TYPE_CHECKING:
    from pyarrow import Table

    from activation_store import Lake, Store
else:  # for annotations only
    Lake = Store = Table = object

LAKE = "ducklake:"
"""How the address of a lake begins."""


def answer(
    places: Sequence[str | Path],
    query: str,
    parameters: Sequence[str] = (),
    data_path: str | None = None,
) -> Table:
    """Return what a query gives over the stores at `places`, opened for reading.

    Args:
        places: Run folders, store folders or store files; the first may be a lake's address. Of
            several, each store is a schema named after its folder, and the first place is found
            without a name too.
        query: SQL; `$name` stands for a parameter.
        parameters: `name=value` each; the value as a recipe would hold it.
        data_path: Folder or s3:// prefix of the lake's data.

    Raises:
        RunError: A place holds no store, or a parameter is no `name=value`.
        StoreError: A store cannot be opened, or the query fails.
    """
    with open_stores(places, data_path) as store:
        return store.sql(query, **_values(parameters)).to_arrow_table()


def open_stores(places: Sequence[str | Path], data_path: str | None = None) -> Store | Lake:
    """Open the first place for reading and, where there are several, attach all stores by name.

    Raises:
        RunError: A place holds no store.
        StoreError: A store cannot be opened, two folders have one name, or a lake is not the first.
    """
    import activation_store as astore

    files = [store_address(place) for place in places]
    store = astore.open(files[0], data_path=data_path)
    for file in files if len(files) > 1 else ():
        if file != files[0] or not file.startswith(LAKE):
            store.attach(file, schema_name(Path(file)))
    return store


def store_address(place: str | Path) -> str:
    """Return the address of a lake as it is, and else the store at a place.

    Raises:
        RunError: There is none.
    """
    text = str(place)
    return text if text.startswith(LAKE) else str(store_file(Path(place)))


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
