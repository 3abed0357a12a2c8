"""A store in the layouts of other tools, explanations and scores included: one door for all."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import activation_store as astore
from activation_store.read.exporting import FORMATS
from lmmono.errors import ExplainError, nearest
from lmmono.interop.neuronpedia import export_neuronpedia
from lmmono.interop.openai_results import export_simulations

EXPLAINED: dict[str, Callable[..., Path]] = {
    "neuronpedia": export_neuronpedia,
    "openai-simulations": export_simulations,
}
"""Layouts that hold what is said of units; the others are those of `activation_store`."""


def export_store(
    store: astore.Store,
    to: str,
    out: str | os.PathLike[str],
    hooks: Sequence[str] = (),
) -> Path:
    """Write a store in the layout `to` and return the folder.

    Raises:
        ExplainError: another layout, a lake, or not one hook where one is wanted.
        StoreError: as the export of that layout does.
    """
    if to not in EXPLAINED:
        if to not in FORMATS:
            layouts = sorted({*EXPLAINED, *FORMATS})
            raise ExplainError(f"export: layout {to!r} is not known; {nearest(to, layouts)}")
        return astore.export(store, to, out, hooks)
    if store.is_lake:
        raise ExplainError(f"export: {to} reads a store, not a lake; export the store of the run")
    if len(hooks) != 1:
        raise ExplainError(f"export: {to} takes one hook, got {len(hooks)}")
    return EXPLAINED[to](store, out, hooks[0])
