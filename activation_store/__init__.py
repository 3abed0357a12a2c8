"""Activations of language models in DuckDB and Parquet, open to SQL."""

from typing import TYPE_CHECKING, Any

from activation_store.errors import StoreError
from activation_store.store import Store, open

if TYPE_CHECKING:
    from activation_store.capture import capture
    from activation_store.writer import Rows, Vectors, Writer

__all__ = ["Rows", "Store", "StoreError", "Vectors", "Writer", "capture", "open"]

_LAZY = {"Rows": "writer", "Vectors": "writer", "Writer": "writer", "capture": "capture"}


def __getattr__(name: str) -> Any:
    """Import what needs numba when it is first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"activation_store.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'activation_store' has no attribute {name!r}")
