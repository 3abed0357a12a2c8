"""Tables and figures made from the stores of runs."""

from lmmono.reports.tables import Table, comparison

__all__ = ["Table", "comparison"]
