"""A generated language with known truth (interim grammar)."""

import numpy as np

VERSION = 0


class Language:
    """Seeded documents."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def text(self, index: int) -> str:
        """Return one document."""
        rng = np.random.default_rng([self.seed, index])
        nouns, verbs = ["dog", "cat", "man", "boat"], ["runs", "sleeps", "sings"]
        words: list[str] = []
        for _ in range(10):
            noun, verb = nouns[rng.integers(4)], verbs[rng.integers(3)]
            words += ["the", noun, verb, "and", "the", nouns[rng.integers(4)], verb, "."]
        return " ".join(words)
