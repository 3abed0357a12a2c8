"""Runs as pages to look at: one file that opens from disk, and what it is made of."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
