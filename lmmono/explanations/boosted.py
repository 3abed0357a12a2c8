"""`context_boosted`: a weight for every context seen; what contexts explain when none is spared.

One pass of boosting over the context groups, from the general to the special: each group's means of
what is left are shrunk by how much its keys are known to differ (see `lookup.shrink`), then taken
off. It bounds `context_rules` from above: the same contexts, without a limit on their number.
"""

import numpy as np
from numpy import ndarray

from lmmono.explanations.contexts import Context, Table, class_codes, context_keys
from lmmono.explanations.explainer_registry import Task
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.lookup import rounded, shrink

ORDER = (
    "class",
    "token",
    "class before",
    "before",
    "class after class",
    "token after class",
    "token after",
    "two_before",
    "place",
)
"""Groups from the general to the special."""


def explain_by_all_contexts(task: Task) -> list[Explanation]:
    """Explain each unit by all contexts of its records."""
    classes = class_codes(task.vocabulary)
    all_ids = task.records.all_token_ids()
    return [
        task.refused(i) or _explained(task, i, all_ids[i], classes)
        for i in range(len(task.records.units))
    ]


def _explained(task: Task, i: int, token_ids: ndarray, classes: bytes) -> Explanation:
    there = token_ids >= 0
    left = task.records.acts[i][there].astype(np.float64)
    keys = {name: key[there] for name, key in context_keys(token_ids, classes).items()}
    constant = float(left.mean())
    left -= constant
    tables: list[Table] = []
    for group in (name for name in ORDER if name in keys):
        values, code = np.unique(keys[group], return_inverse=True)
        n = np.bincount(code).astype(np.float64)
        means = shrink(n, np.bincount(code, left), float(np.square(left).sum()))
        tables.append(Table(group, values, rounded(means.shrunk)))
        left -= means.shrunk[code]
    n_terms = sum(len(table.keys) for table in tables)
    program = Context(float(rounded(np.array([constant]))[0]), tuple(tables), classes)
    text = f"{n_terms:,} weighted contexts, too many to read"
    return task.explained(i, text, program, complexity=float(n_terms))
