"""Edits of planted texts whose distance in meaning is known: words that differ in one attribute.

A content word has a number, a polarity and topics. Replaced by a word that has all of them alike it
leaves the meaning; by one that differs in exactly one of them, it changes one attribute. Texts that
differ in the same number of words can so be 0, 1, 2, ... attributes apart.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from lmmono.data.planted.lexicon import Lexicon, Word, WordClass

_CONTENT = (WordClass.NOUN, WordClass.VERB, WordClass.ADJECTIVE)


@dataclass(frozen=True, slots=True)
class _Neighbours:
    """Words that may stand in a word's place."""

    alike: tuple[str, ...]
    """All attributes alike."""
    apart: tuple[str, ...]
    """One attribute different."""


Attribute = Literal["number", "polarity", "topics"]
"""What a content word has."""


def attributes_apart(first: Word, second: Word) -> list[Attribute]:
    """Return which of number, polarity and topics two words of one class differ in."""
    names: tuple[Attribute, ...] = ("number", "polarity", "topics")
    return [name for name in names if getattr(first, name) != getattr(second, name)]


@cache
def _neighbours(attribute: Attribute | None) -> dict[str, _Neighbours]:
    """Return the neighbours of each content word that has both kinds; ambiguous nouns are out."""
    lexicon = Lexicon()
    words = [w for w in lexicon.words if w.word_class in _CONTENT and len(w.topics) < 2]
    neighbours: dict[str, _Neighbours] = {}
    for word in words:
        others = [w for w in words if w.word_class == word.word_class and w.form != word.form]
        alike = tuple(w.form for w in others if not attributes_apart(word, w))
        apart = tuple(
            w.form
            for w in others
            if len(names := attributes_apart(word, w)) == 1 and attribute in (None, *names)
        )
        if alike and apart:
            neighbours[word.form] = _Neighbours(alike, apart)
    return neighbours


def graded_edit(
    text: str, *, n_words: int, distance: int, seed: int, attribute: Attribute | None = None
) -> str | None:
    """Return a text with some words replaced, of which some change one attribute each.

    Which words are replaced depends on text and seed alone, and a larger distance changes the
    attributes that a smaller one does, so edits of one text differ in their distance only.

    Args:
        text: A text of the planted language.
        n_words: Words that are replaced.
        distance: How many of them change an attribute; the others leave the meaning.
        seed: Seed of the words.
        attribute: Which attribute changes; None takes any.

    Returns:
        The edited text; None where the text has fewer words that can be replaced.
    """
    assert 0 <= distance <= n_words, (distance, n_words)
    words, neighbours = text.split(" "), _neighbours(attribute)
    places = [i for i, word in enumerate(words) if word in neighbours]
    if len(places) < n_words:
        return None
    rng = np.random.default_rng((seed, *text.encode()))
    for rank, place in enumerate(rng.permutation(places)[:n_words].tolist()):
        pick = rng.random()
        choices = neighbours[words[place]]
        others = choices.apart if rank < distance else choices.alike
        words[place] = others[int(pick * len(others))]
    return " ".join(words)
