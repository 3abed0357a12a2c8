from lmmono.explanations.explain import Explanations as Explanations
from lmmono.explanations.llm_ranking import Ranking as Ranking
