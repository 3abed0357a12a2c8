"""One way to look a record up by its name, and one to import what it stands for."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from lmmono.errors import LmmonoError, nearest

Record = TypeVar("Record")


def find(
    what: str, name: str, records: Mapping[str, Record], error: type[LmmonoError] = LmmonoError
) -> Record:
    """Return the record of a name.

    Args:
        what: The kind of thing, as messages call it: `scorer`.
        name: Its name.
        records: All of its kind.
        error: What to raise for an unknown name.

    Raises:
        LmmonoError: As `error`; names those that are near.

    >>> find("arch", "crat", {"crate": 1, "gpt2": 2})
    Traceback (most recent call last):
    lmmono.errors.LmmonoError: arch 'crat' is not known; did you mean crate?
    """
    if name not in records:
        raise error(f"{what} {name!r} is not known; {nearest(name, records)}")
    return records[name]


def load(home: str) -> Any:
    """Import and return what a record stands for.

    >>> load("math:floor")(1.5)
    1
    """
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)
