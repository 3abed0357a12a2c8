"""Activations of language models in DuckDB and Parquet, open to SQL."""

from typing import TYPE_CHECKING, Any

from activation_store.catalog.door import QueryLimits
from activation_store.catalog.verification import Report
from activation_store.errors import (
    ContentError,
    DroppedWarning,
    LockedError,
    NotAStoreError,
    QueryError,
    SchemaError,
    ShardError,
    StoreError,
    WriteError,
)
from activation_store.hooks import Rows, Skip, Vectors
from activation_store.store import Info, QueryResult, Store, compact, open, verify
from activation_store.unit import Exemplar, Unit

if TYPE_CHECKING:
    from activation_store.read.exporting import export
    from activation_store.write.recorder import Batch, capture
    from activation_store.write.writer import Writer

__all__ = [
    "Batch",
    "ContentError",
    "DroppedWarning",
    "Exemplar",
    "Info",
    "LockedError",
    "NotAStoreError",
    "QueryError",
    "QueryLimits",
    "QueryResult",
    "Report",
    "Rows",
    "SchemaError",
    "ShardError",
    "Skip",
    "Store",
    "StoreError",
    "Unit",
    "Vectors",
    "WriteError",
    "Writer",
    "capture",
    "compact",
    "export",
    "open",
    "verify",
]

_LAZY = {
    "Writer": "write.writer",
    "Batch": "write.recorder",
    "capture": "write.recorder",
    "export": "read.exporting",
}


def __getattr__(name: str) -> Any:
    """Import what needs numba when it is first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"activation_store.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'activation_store' has no attribute {name!r}")
