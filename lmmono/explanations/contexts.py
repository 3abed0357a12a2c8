"""Contexts: what can be said of a token without a model, and programs that add up what it says.

A context group gives each token one key: the token itself, those before it, their character
classes, pairs of these, or the place in the excerpt. Two explainers choose among the keys:

`context_rules`: a few rules "one of these keys: add this much", found by greedy forward selection
as in matching pursuit: the rule that explains most of what is left, then all weights anew by ridge
regression. It ends at the limits on rules and terms, or when the best rule left explains no more
than the best of so many rules would by chance.

`context_boosted`: a weight for every context seen, by one pass of boosting over the groups from the
general to the special: each group's means of what is left are shrunk by how much its keys are known
to differ (see `lookup.shrink`), then taken off. It bounds `context_rules` from above: the same
contexts, without a limit on their number.
"""

import base64
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.explanations.explain_task import ExplainTask
from lmmono.explanations.explanation import Explanation, Program
from lmmono.explanations.token_lookup import quoted, rounded, shrink

PAIR = 1 << 24
"""A pair of keys a, b is (a + 1) * PAIR + b + 1; token ids are smaller: 16 million."""

FIRST_PLACES = 4
"""Places in an excerpt told apart; all later ones are one."""

RIDGE = 1.0
"""Added to the number of tokens of a rule: a rule seen once goes half way."""

SHOWN_KEYS = 6
"""Most keys of a rule that a text names."""

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
"""Groups from the general to the special, as `context_boosted` takes them."""

CLASSES: dict[str, str] = {
    "n": "line end or blank",
    "d": "number",
    "p": "punctuation",
    "a": "word in capitals",
    "c": "capitalised word",
    "C": "capitalised part of a word",
    "w": "word in small letters",
    "W": "part of a word in small letters",
    "x": "other script or byte",
}
"""Character classes of tokens, each token in one; words begin with a blank."""

_CODES = {letter: code for code, letter in enumerate(CLASSES)}


def character_class(token: str) -> str:
    r"""Return the letter of a token's character class.

    >>> [character_class(token) for token in (" The", "ing", " 19", "\n", ".", "<0xC3>", " NA")]
    ['c', 'W', 'd', 'n', 'p', 'x', 'a']
    """
    text, begins_word = token.strip(), token[:1] == " "
    if not text:
        return "n"
    if text.startswith("<0x") or not text.isascii():
        return "x"
    if text.isdigit():
        return "d"
    if not any(letter.isalnum() for letter in text):
        return "p"
    if len(text) > 1 and text.isupper():
        return "a"
    if text[0].isupper():
        return "c" if begins_word else "C"
    return "w" if begins_word else "W"


def class_codes(vocabulary: tuple[str, ...]) -> bytes:
    """Return the code of each token's character class, one byte each."""
    return bytes(_CODES[character_class(token)] for token in vocabulary)


def context_keys(
    token_ids: Int[ndarray, "records window"], classes: bytes
) -> dict[str, Int[ndarray, "records window"]]:
    """Return the key of every token in every context group; -1 stands for what is not there."""
    ids = token_ids.astype(np.int64)
    before, two_before = _shifted(ids, 1), _shifted(ids, 2)
    keys = {"token": ids, "before": before, "two_before": two_before}
    keys["token after"] = (before + 1) * PAIR + ids + 1
    place = np.minimum(np.arange(ids.shape[1]), FIRST_PLACES)
    keys["place"] = np.broadcast_to(place, ids.shape)
    if classes:
        table = np.append(np.frombuffer(classes, np.uint8).astype(np.int64), -1)
        kind = table[np.where(ids < len(classes), ids, -1)]
        kind_before = table[np.where(before < len(classes), before, -1)]
        keys["class"], keys["class before"] = kind, kind_before
        keys["class after class"] = (kind_before + 1) * PAIR + kind + 1
        keys["token after class"] = (kind_before + 1) * PAIR + ids + 1
    return keys


def _shifted(ids: Int[ndarray, "records window"], n: int) -> Int[ndarray, "records window"]:
    shifted = np.full_like(ids, -1)
    shifted[:, n:] = ids[:, :-n]
    return shifted


@dataclass(frozen=True, slots=True)
class ContextTable:
    """What the keys of one group add to the prediction."""

    group: str
    """Name of the context group."""
    keys: Int[ndarray, " keys"]
    """Keys, ascending."""
    weights: Float[ndarray, " keys"]
    """What each adds, in units of the hook."""


@dataclass(frozen=True, slots=True)
class Context(Program):
    """A constant plus what tables of contexts add, never below 0."""

    kind: ClassVar[str] = "context"
    constant: float
    """Prediction where no key is found, in units of the hook."""
    tables: tuple[ContextTable, ...]
    """What is added."""
    classes: bytes = b""
    """Character class of each token id; empty where no table needs it."""

    def simulate(
        self, token_ids: Int[ndarray, "records window"]
    ) -> Float[ndarray, "records window"]:
        """Return the constant plus the weights of the keys of each token."""
        predicted = np.full(token_ids.shape, self.constant)
        keys = context_keys(token_ids, self.classes)
        for table in self.tables:
            key = keys[table.group]
            at = np.minimum(np.searchsorted(table.keys, key), len(table.keys) - 1)
            predicted += np.where(table.keys[at] == key, table.weights[at], 0.0)
        return np.where(token_ids >= 0, np.maximum(predicted, 0.0), 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the tables; the classes are packed."""
        return {
            "constant": self.constant,
            "tables": [
                {"group": t.group, "keys": t.keys.tolist(), "weights": t.weights.tolist()}
                for t in self.tables
            ],
            "classes": base64.b64encode(zlib.compress(self.classes)).decode(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Context":
        """Return the program that was described."""
        tables = tuple(
            ContextTable(
                t["group"], np.array(t["keys"], np.int64), np.array(t["weights"], np.float64)
            )
            for t in values["tables"]
        )
        classes = zlib.decompress(base64.b64decode(values["classes"]))
        return cls(float(values["constant"]), tables, classes)


def explain_by_rules(task: ExplainTask) -> list[Explanation]:
    """Explain each unit by rules; settings: `max_rules`, `max_terms` (keys of one rule)."""
    classes = class_codes(task.vocabulary)
    all_ids = task.records.all_token_ids()
    return task.explain_each(lambda i: _ruled(task, i, all_ids[i], classes))


def _ruled(task: ExplainTask, i: int, token_ids: ndarray, classes: bytes) -> Explanation:
    is_token = token_ids >= 0
    acts = task.records.acts[i][is_token].astype(np.float64)
    keys = {name: key[is_token] for name, key in context_keys(token_ids, classes).items()}
    rules = _Rules(keys, acts, task.settings["max_rules"], task.settings["max_terms"])
    program = rules.program(classes)
    n_terms = float(sum(len(table.keys) for table in program.tables))
    return task.explained(i, rules.text(task.vocabulary), program, complexity=n_terms)


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
        # the largest of n squared normal numbers is about 2 log n
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
            key=lambda candidate: candidate[0],
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
            ContextTable(name, np.sort(keys), np.full(len(keys), weight))
            for (name, keys), weight in zip(self._chosen, weights, strict=True)
        )
        needs_classes = any("class" in table.group for table in tables)
        constant = float(rounded(np.array([self._constant]))[0])
        return Context(constant, tables, classes if needs_classes else b"")

    def text(self, vocabulary: tuple[str, ...]) -> str:
        """Return the rules as a phrase: what raises the prediction, the strongest first."""
        order = np.argsort(-self._weights, kind="stable").tolist()
        phrases = [
            ("" if weight > 0 else "not ") + _phrase(group, keys, vocabulary)
            for (group, keys), weight in ((self._chosen[i], self._weights[i]) for i in order)
        ]
        return "; ".join(phrases) or "no rule"


def _phrase(group: str, keys: Int[ndarray, " keys"], vocabulary: tuple[str, ...]) -> str:
    named = [_key_phrase(group, int(key), vocabulary) for key in keys[:SHOWN_KEYS]]
    more = len(keys) - len(named)
    tail = f" or {more} more" if more else ""
    words = {"before": "after ", "two_before": "two after ", "class before": "after a "}
    return words.get(group, "") + " or ".join(named) + tail


def _key_phrase(group: str, key: int, vocabulary: tuple[str, ...]) -> str:
    if group == "place":
        late = f"token {FIRST_PLACES + 1} or later of the excerpt"
        return f"token {key + 1} of the excerpt" if key < FIRST_PLACES else late
    if group in ("token", "before", "two_before"):
        return quoted(key, vocabulary) if key >= 0 else "the beginning"
    if group in ("class", "class before"):
        return _class_phrase(key)
    first, second = divmod(key, PAIR)
    left = (
        _class_phrase(first - 1)
        if "class" in group
        else _key_phrase("token", first - 1, vocabulary)
    )
    of_second = "class" if group == "class after class" else "token"
    return f"{_key_phrase(of_second, second - 1, vocabulary)} after {left}"


def _class_phrase(code: int) -> str:
    return list(CLASSES.values())[code] if code >= 0 else "the beginning"


def explain_by_all_contexts(task: ExplainTask) -> list[Explanation]:
    """Explain each unit by all contexts of its records."""
    classes = class_codes(task.vocabulary)
    all_ids = task.records.all_token_ids()
    return task.explain_each(lambda i: _boosted(task, i, all_ids[i], classes))


def _boosted(task: ExplainTask, i: int, token_ids: ndarray, classes: bytes) -> Explanation:
    is_token = token_ids >= 0
    left = task.records.acts[i][is_token].astype(np.float64)
    keys = {name: key[is_token] for name, key in context_keys(token_ids, classes).items()}
    constant = float(left.mean())
    left -= constant
    tables: list[ContextTable] = []
    for group in (name for name in ORDER if name in keys):
        values, code = np.unique(keys[group], return_inverse=True)
        n = np.bincount(code).astype(np.float64)
        means = shrink(n, np.bincount(code, left), float(np.square(left).sum()))
        tables.append(ContextTable(group, values, rounded(means.shrunk)))
        left -= means.shrunk[code]
    n_terms = sum(len(table.keys) for table in tables)
    program = Context(float(rounded(np.array([constant]))[0]), tuple(tables), classes)
    text = f"{n_terms:,} weighted contexts, too many to read"
    return task.explained(i, text, program, complexity=float(n_terms))
