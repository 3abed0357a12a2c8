"""Labelled text tasks: the records, where they are read from, and the leakage check."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
