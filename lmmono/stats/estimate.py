"""A measured number with its interval, and the coverage that all intervals here aim at."""

import math
from dataclasses import dataclass

LEVEL = 0.95
"""Coverage that every interval aims at; a stored row names it as `ci_level`."""

Interval = tuple[float, float]
"""Lower and upper end; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number, its interval, and what it was measured on."""

    value: float
    """The number; NaN where it is not defined, and then `failure` says why."""
    low: float
    """Lower end of the interval; NaN where there is none."""
    high: float
    """Upper end of the interval; NaN where there is none."""
    level: float
    """Coverage that the interval aims at."""
    method: str
    """How the interval was made, and what was drawn again."""
    n: int
    """Items that the number is about."""
    n_tokens: int
    """Tokens that were looked at; 0 where the number is about weights alone."""
    n_documents: int
    """Documents that they come from."""
    nan_fraction: float = 0.0
    """Share of the items for which the number is not defined; they are left out."""
    failure: str | None = None
    """Why there is no number."""

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        if self.failure is not None:
            return f"undefined ({self.failure})"
        if math.isnan(self.low):
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def row(self) -> dict[str, object]:
        """Return the columns of `all_scores` that say this; what is not defined is left empty."""
        numbers = {"value": self.value, "ci_low": self.low, "ci_high": self.high}
        return {
            **{name: None if math.isnan(value) else value for name, value in numbers.items()},
            "ci_level": self.level,
            "ci_method": self.method,
            "n": self.n,
            "n_tokens": self.n_tokens or None,
            "n_documents": self.n_documents or None,
            "nan_fraction": self.nan_fraction,
            "failure": self.failure,
        }
