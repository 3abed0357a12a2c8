"""Tables and figures made from the stores of runs."""

from lmmono.reporting.tables import Table, comparison

__all__ = ["Table", "comparison"]
