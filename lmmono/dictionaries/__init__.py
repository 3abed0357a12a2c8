"""Dictionaries: learned codes of a hook's vectors, their controls, and what they are worth."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
