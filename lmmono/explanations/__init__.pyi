from lmmono.explanations.explain import Explanations as Explanations
from lmmono.explanations.llm_explainers import Ranking as Ranking
