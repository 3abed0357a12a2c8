"""Activations of language models in DuckDB and Parquet, open to SQL.

The public names stand in `__init__.pyi`, each imported when it is first used.
"""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
