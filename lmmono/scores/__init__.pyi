from lmmono.scores.audit import Audit as Audit
from lmmono.scores.audit import audit_scorer as audit_scorer
from lmmono.scores.score import Scores as Scores
