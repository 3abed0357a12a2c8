"""Units as pages to look at: one function that a notebook, a report and a server share."""

from activation_store.pages.escaping import shown
from activation_store.pages.heatmap import Heatmap, text_heatmap
from activation_store.pages.unit_page import PageOptions, UnitPage, unit_page, unit_pages

__all__ = [
    "Heatmap",
    "PageOptions",
    "UnitPage",
    "shown",
    "text_heatmap",
    "unit_page",
    "unit_pages",
]
