from lmmono.studies.differences import Difference as Difference
from lmmono.studies.outcomes import Outcomes as Outcomes
