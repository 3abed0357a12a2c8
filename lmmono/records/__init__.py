"""Windows of text around units: which windows, and what the unit does on them."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
