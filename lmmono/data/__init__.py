"""Text to tokens: corpora, splits, tokenizers, packing, and a language with known truth."""
