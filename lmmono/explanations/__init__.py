"""What units mean: excerpts and records from a store, explainers, and the clients they ask."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
