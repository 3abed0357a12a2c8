"""Contexts: what can be said of a token without a model, and programs that add up what it says.

A context group gives each token one key: the token itself, those before it, their character
classes, pairs of these, or the place in the excerpt.
"""

import base64
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.explanations.explanation import Program

PAIR = 1 << 24
"""A pair of keys a, b is (a + 1) * PAIR + b + 1; token ids are smaller."""

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
    place = np.minimum(np.arange(ids.shape[1]), 4)
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
class Table:
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
    tables: tuple[Table, ...]
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
            of = keys[table.group]
            at = np.minimum(np.searchsorted(table.keys, of), len(table.keys) - 1)
            predicted += np.where(table.keys[at] == of, table.weights[at], 0.0)
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
            Table(t["group"], np.array(t["keys"], np.int64), np.array(t["weights"], np.float64))
            for t in values["tables"]
        )
        classes = zlib.decompress(base64.b64decode(values["classes"]))
        return cls(float(values["constant"]), tables, classes)
