"""What is kept of one hook point: the settings of a capture, checked when they are made."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Integer

from activation_store.errors import ContentError

Dtype = Literal["float32", "float16"]

LARGEST: dict[str, float] = {
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
}
"""Largest finite value of each type that activations can be stored as."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Keep a hook's activations as sparse rows, with statistics and exemplars of every unit."""

    hook: str
    """Name of the tensor."""
    d: int
    """Width of the tensor in units, >= 1."""
    threshold: float = 0.0
    """An activation is stored, and counts as active, where it is above this."""
    max_density: float = 0.5
    """Refuse the hook where a larger share of its activations than this would be stored."""
    top_k: int = 32
    """Strongest exemplars per unit, one per document."""
    random_k: int = 16
    """Exemplars per unit drawn uniformly over all tokens."""
    quantile_k: int = 4
    """Exemplars per unit and tenth of its activations above the threshold."""
    dtype: Dtype = "float32"
    """Type that stored activations are rounded to; statistics use the value before rounding."""
    units: tuple[int, ...] | None = None
    """Units to keep; None keeps all."""
    top_p: float | None = None
    """Store only the smallest set of a token's activations that holds this share of their sum."""
    cuts: tuple[float, ...] | None = None
    """Store only a unit's activations of at least its cut, one for each unit kept, so that dense
    hooks take few bytes; statistics and exemplars see all activations all the same."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            ContentError: a setting is out of its range; names hook, setting, value and range.
        """
        sizes = min(self.top_k, self.random_k, self.quantile_k)
        _check(self.hook, "d", self.d, 1 <= self.d <= 2**31 - 1, "an integer >= 1")
        _check(self.hook, "top_k, random_k, quantile_k", sizes, sizes >= 0, "integers >= 0")
        _check(self.hook, "max_density", self.max_density, 0 < self.max_density <= 1, "in (0, 1]")
        _check(
            self.hook, "threshold", self.threshold, np.isfinite(self.threshold), "a finite number"
        )
        _check(self.hook, "dtype", self.dtype, self.dtype in LARGEST, "float32 or float16")
        if self.top_p is not None:
            _check(self.hook, "top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
            _check(self.hook, "threshold", self.threshold, self.threshold >= 0, ">= 0 with top_p")
        if self.cuts is not None:
            fits = len(self.cuts) == len(self.kept) and bool(np.isfinite(self.cuts).all())
            want = f"{len(self.kept)} finite numbers"
            _check(self.hook, "cuts", _shortened(self.cuts), fits, want)
        if self.units is not None:
            is_inside = len(self.units) > 0 and 0 <= min(self.units) <= max(self.units) < self.d
            ascends = list(self.units) == sorted(set(self.units))
            _check(
                self.hook,
                "units",
                _shortened(self.units),
                is_inside and ascends,
                f"ascending units between 0 and {self.d - 1}",
            )

    @property
    def kept(self) -> np.ndarray:
        """Units kept, ascending, int64."""
        return np.arange(self.d) if self.units is None else np.array(self.units, np.int64)

    @property
    def cutoff(self) -> np.float32:
        """Largest float32 not above the threshold: a float32 is above the one iff the other."""
        near = np.float32(self.threshold)
        return near if float(near) <= self.threshold else np.nextafter(near, np.float32(-np.inf))


@dataclass(frozen=True, slots=True)
class Vectors:
    """Keep a hook's activations whole, one vector per token."""

    hook: str
    """Name of the tensor."""
    d: int
    """Width of the tensor, >= 1."""
    dtype: Dtype = "float16"
    """Type that vectors are rounded to."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            ContentError: a setting is out of its range.
        """
        _check(self.hook, "d", self.d, self.d >= 1, "an integer >= 1")
        _check(self.hook, "dtype", self.dtype, self.dtype in LARGEST, "float32 or float16")


@dataclass(frozen=True, slots=True)
class Skip:
    """Tokens that a capture leaves out of statistics, exemplars, acts and vectors.

    The tokens themselves stay in the store, so excerpts show them. True where something is left
    out at all.
    """

    token_ids: tuple[int, ...] = ()
    """Ids to leave out, such as those of BOS and EOS, where many units of a model fire."""
    first: int = 0
    """Positions to leave out at the beginning of each sequence, >= 0; padding does not count."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be.

        Raises:
            ContentError: a setting is out of its range.
        """
        _check("skip", "first", self.first, self.first >= 0, "an integer >= 0")
        _check("skip", "token_ids", self.token_ids, min(self.token_ids, default=0) >= 0, "ids >= 0")

    def __bool__(self) -> bool:
        return bool(self.token_ids) or self.first > 0

    def mask(
        self,
        token_ids: Integer[np.ndarray, "batch n_ctx"],
        doc_ids: Integer[np.ndarray, "batch n_ctx"],
    ) -> Bool[np.ndarray, "batch n_ctx"]:
        """Return where a token is left out; padding (doc_id < 0) is neither."""
        real = doc_ids >= 0
        left_out = np.isin(token_ids, self.token_ids) | (np.cumsum(real, axis=1) <= self.first)
        return left_out & real


def _check(hook: str, name: str, got: object, holds: object, wanted: str) -> None:
    if not holds:
        raise ContentError(f"{hook}: {name}: want {wanted}, got {got!r}.")


def _shortened(numbers: tuple[object, ...]) -> str:
    shown = ", ".join(str(number) for number in numbers[:6])
    return f"[{shown}{', ...' if len(numbers) > 6 else ''}]"


NOTHING = Skip()
"""What a capture leaves out unless asked otherwise."""
