"""A table of text, as every table of a report is made."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A titled table of text, ready to print or to put on a page."""

    title: str
    """What it shows."""
    columns: tuple[str, ...]
    """Column heads."""
    rows: tuple[tuple[str, ...], ...]
    """One tuple of cells per row."""
    note: str = ""
    """How the numbers were made."""
