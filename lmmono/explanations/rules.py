"""`context_rules`: a few rules over a token and what stands before it, chosen one after the other.

A rule says "one of these keys: add this much". Rules are found by greedy forward selection, as in
matching pursuit: the rule that explains most of what is left, then all weights anew by ridge
regression. It ends at the limits on rules and terms, or when the best rule left explains no more
than the best of so many rules would by chance.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.explanations.contexts import CLASSES, PAIR, Context, Table, class_codes, context_keys
from lmmono.explanations.explainer_registry import Task
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.lookup import quoted, rounded

RIDGE = 1.0
"""Added to the number of tokens of a rule: a rule seen once goes half way."""

SHOWN_KEYS = 6
"""Most keys of a rule that a text names."""


def explain_by_rules(task: Task) -> list[Explanation]:
    """Explain each unit by rules; settings: `max_rules`, `max_terms` (keys of one rule)."""
    classes = class_codes(task.vocabulary)
    all_ids = task.records.all_token_ids()
    return [
        task.refused(i) or _explained(task, i, all_ids[i], classes)
        for i in range(len(task.records.units))
    ]


def _explained(task: Task, i: int, token_ids: ndarray, classes: bytes) -> Explanation:
    there = token_ids >= 0
    acts = task.records.acts[i][there].astype(np.float64)
    keys = {name: key[there] for name, key in context_keys(token_ids, classes).items()}
    rules = _Rules(keys, acts, task.settings["max_rules"], task.settings["max_terms"])
    found = rules.program(classes)
    text = rules.text(task.vocabulary)
    return task.explained(i, text, found, complexity=float(sum(len(t.keys) for t in found.tables)))


class _Rules:
    """The choice of rules for one unit."""

    def __init__(
        self,
        keys: dict[str, Int[ndarray, " tokens"]],
        acts: Float[ndarray, " tokens"],
        max_rules: int,
        max_terms: int,
    ) -> None:
        self._acts, self._max_terms = acts, max_terms
        self._groups = {
            name: np.unique(key, return_inverse=True, return_counts=True)
            for name, key in keys.items()
        }
        n_candidates = sum(len(values) for values, _, _ in self._groups.values())
        self._chance = 2 * np.log(max(n_candidates, 2))
        self._chosen: list[tuple[str, ndarray]] = []
        self._columns: list[ndarray] = []
        self._weights, self._constant = np.zeros(0), float(acts.mean())
        while len(self._chosen) < max_rules and self._add_best():
            self._fit()

    def _add_best(self) -> bool:
        """Add the rule that explains most of what is left; return whether it beats chance."""
        left = self._acts - self._predicted()
        best = max(
            ((*self._best_of(name, left), name) for name in self._groups),
            key=lambda found: found[0],
        )
        gain, codes, name = best
        if gain <= self._chance * max(float(left.var()), 1e-30) or left.var() < 1e-12:
            return False
        self._chosen.append((name, self._groups[name][0][codes]))
        self._columns.append(np.isin(self._groups[name][1], codes).astype(np.float64))
        return True

    def _best_of(self, name: str, left: ndarray) -> tuple[float, ndarray]:
        """Return the most that a set of keys of a group explains, and the set.

        Of all sets the best is a run of keys in order of their means (Breiman et al. 1984, 9.4);
        both ends of the order are tried, up to `max_terms` keys.
        """
        _, code, n = self._groups[name]
        sums = np.bincount(code, left, len(n))
        order = np.argsort(sums / (n + RIDGE), kind="stable")
        best: tuple[float, ndarray] = (0.0, order[:0])
        for end in (order[::-1], order):
            some = end[: self._max_terms]
            gains = np.square(np.cumsum(sums[some])) / (np.cumsum(n[some]) + RIDGE)
            size = int(np.argmax(gains)) + 1
            if gains[size - 1] > best[0]:
                best = (float(gains[size - 1]), some[:size])
        return best

    def _fit(self) -> None:
        """Fit all weights and the constant anew; the constant is not drawn to 0."""
        x = np.stack(self._columns, axis=1)
        centred = x - x.mean(axis=0)
        gram = centred.T @ centred + RIDGE * np.eye(x.shape[1])
        self._weights = np.linalg.solve(gram, centred.T @ self._acts)
        self._constant = float(self._acts.mean() - x.mean(axis=0) @ self._weights)

    def _predicted(self) -> ndarray:
        predicted = np.full(len(self._acts), self._constant)
        for column, weight in zip(self._columns, self._weights, strict=True):
            predicted += weight * column
        return predicted

    def program(self, classes: bytes) -> Context:
        """Return the chosen rules."""
        weights = rounded(self._weights)
        tables = tuple(
            Table(name, np.sort(keys), np.full(len(keys), weight))
            for (name, keys), weight in zip(self._chosen, weights, strict=True)
        )
        needs_classes = any("class" in table.group for table in tables)
        constant = float(rounded(np.array([self._constant]))[0])
        return Context(constant, tables, classes if needs_classes else b"")

    def text(self, vocabulary: tuple[str, ...]) -> str:
        """Return the rules as a phrase: what raises the prediction, the strongest first."""
        order = np.argsort(-self._weights, kind="stable").tolist()
        said = [
            ("" if weight > 0 else "not ") + _said(group, keys, vocabulary)
            for (group, keys), weight in ((self._chosen[i], self._weights[i]) for i in order)
        ]
        return "; ".join(said) or "no rule"


def _said(group: str, keys: Int[ndarray, " keys"], vocabulary: tuple[str, ...]) -> str:
    named = [_key_said(group, int(key), vocabulary) for key in keys[:SHOWN_KEYS]]
    more = len(keys) - len(named)
    tail = f" or {more} more" if more else ""
    words = {"before": "after ", "two_before": "two after ", "class before": "after a "}
    return words.get(group, "") + " or ".join(named) + tail


def _key_said(group: str, key: int, vocabulary: tuple[str, ...]) -> str:
    if group == "place":
        return f"token {key + 1} of the excerpt" if key < 4 else "token 5 or later of the excerpt"
    if group in ("token", "before", "two_before"):
        return quoted(key, vocabulary) if key >= 0 else "the beginning"
    if group in ("class", "class before"):
        return _class_said(key)
    first, second = divmod(key, PAIR)
    left = _class_said(first - 1) if "class" in group else _key_said("token", first - 1, vocabulary)
    of_second = "class" if group == "class after class" else "token"
    return f"{_key_said(of_second, second - 1, vocabulary)} after {left}"


def _class_said(code: int) -> str:
    return list(CLASSES.values())[code] if code >= 0 else "the beginning"
