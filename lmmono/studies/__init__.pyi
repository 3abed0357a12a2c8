from lmmono.studies.differences import Difference as Difference
from lmmono.suites.results import Outcomes as Outcomes
