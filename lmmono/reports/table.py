"""A table, as every table of a report is made."""

import math
from dataclasses import dataclass

from activation_store.printable import number


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with its interval, as one cell."""

    value: float
    """The number."""
    low: float
    """Lower end; NaN where there is none."""
    high: float
    """Upper end."""

    def __str__(self) -> str:
        """Return both in three digits.

        >>> str(Interval(0.2664, 0.2381, 0.296))
        '0.266 [0.238, 0.296]'
        """
        ends = "" if math.isnan(self.low) else f" [{number(self.low)}, {number(self.high)}]"
        return f"{number(self.value)}{ends}"


class Controls(dict[str, float]):
    """Values by the name of the control, as one cell."""

    def __str__(self) -> str:
        """Return them in three digits.

        >>> str(Controls(shuffled=0.00123, untrained_model=0.5))
        'shuffled 0.00123, untrained_model 0.5'
        """
        return ", ".join(f"{name} {number(value)}" for name, value in self.items())


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A titled table, ready to print or to put on a page."""

    title: str
    """What it shows."""
    columns: tuple[str, ...]
    """Column heads."""
    rows: tuple[tuple[object, ...], ...]
    """One tuple of cells per row: text, numbers, `Interval`, `Controls`; None is an empty cell."""
    note: str = ""
    """How the numbers were made."""
    spare: tuple[str, ...] = ()
    """Columns that a narrow terminal may leave out, the first one first."""
