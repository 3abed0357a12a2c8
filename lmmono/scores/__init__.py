"""Scores of units, kept as rows in table `all_scores` of the store they were measured on."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
