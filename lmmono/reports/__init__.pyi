from lmmono.reports.figures import pareto as pareto
from lmmono.reports.tables import Table as Table
from lmmono.reports.tables import comparison as comparison
