from lmmono.reports.figures import pareto as pareto
from lmmono.reports.side_by_side import run_tables as run_tables
from lmmono.reports.table import ReportTable as ReportTable
