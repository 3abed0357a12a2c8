"""Text to tokens: corpora, splits, tokenizers, packing, and a language with known truth."""

from activation_store.exports import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
