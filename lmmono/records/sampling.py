"""Which units are looked at: a few, drawn by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """A number of units of each hook, drawn by seed; made by `sample`."""

    n: int
    """Units per hook; all where it has no more."""
    seed: int
    """Seed of the draw."""

    def draw(self, hook: str, d: int) -> list[int]:
        """Return the units drawn from units 0 to d - 1 of a hook, ascending."""
        rng = np.random.default_rng((self.seed, *hook.encode()))
        return sorted(rng.choice(d, min(self.n, d), replace=False).tolist())


def sample(n: int, *, seed: int) -> Sample:
    """Return a draw of n units of each hook, for `units=`.

    >>> sample(3, seed=0).draw("blocks.0.mlp.hook_post", 512)
    [22, 32, 139]
    """
    return Sample(n, seed)


Units = Sequence[int] | Sample | None
"""Units of every hook: given, drawn, or None for all."""
