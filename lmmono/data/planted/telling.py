"""A document while it is told: words with the topic, place in the sentence and marks of each."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from lmmono.data.planted.lexicon import NO_TOPIC, Lexicon, Number


class Mark:
    """Bits that the grammar sets on a word; the first four are states that last several words."""

    QUOTED = 1 << 0
    NEGATED = 1 << 1
    AWAITING_SINGULAR = 1 << 2
    AWAITING_PLURAL = 1 << 3
    FAR_VERB = 1 << 4
    ATTRACTED_VERB = 1 << 5
    COUNTING = 1 << 6
    SUM = 1 << 7
    COUNTED_NOUN = 1 << 8
    OPENING_QUOTE = 1 << 9
    CLOSING_QUOTE = 1 << 10


AWAITING = {Number.SINGULAR: Mark.AWAITING_SINGULAR, Number.PLURAL: Mark.AWAITING_PLURAL}


@dataclass(frozen=True, slots=True)
class Told:
    """A finished document: one entry per word."""

    words: Int[np.ndarray, "n_words"]
    """Word ids in the lexicon."""
    topics: Int[np.ndarray, "n_words"]
    """Topic of the last place named, -1 before the first."""
    positions: Int[np.ndarray, "n_words"]
    """Words since the sentence began."""
    marks: Int[np.ndarray, "n_words"]
    """Bits of `Mark`."""


class Telling:
    """The words said so far and the state that the next word will carry."""

    def __init__(self, words: Lexicon) -> None:
        self.topic = NO_TOPIC
        self._lexicon = words
        self._state = 0
        self._position = 0
        self._words: list[int] = []
        self._topics: list[int] = []
        self._positions: list[int] = []
        self._marks: list[int] = []

    def __len__(self) -> int:
        return len(self._words)

    def say(self, word: int, mark: int = 0) -> None:
        """Add one word with its own mark and every state that is on."""
        self._words.append(word)
        self._topics.append(self.topic)
        self._positions.append(self._position)
        self._marks.append(self._state | mark)
        self._position += 1

    def phrase(self, forms: str) -> None:
        """Add fixed words, separated by blanks."""
        for form in forms.split():
            self.say(self._lexicon[form])

    def turn_on(self, state: int) -> None:
        """Let every word from the next one on carry a state."""
        self._state |= state

    def turn_off(self, state: int) -> None:
        """End a state before the next word."""
        self._state &= ~state

    def end_sentence(self) -> None:
        """Say the period; a sentence leaves no state behind."""
        assert self._state == 0, self._state
        self.phrase(".")
        self._position = 0

    def told(self) -> Told:
        """Return the whole document."""
        columns = (self._words, self._topics, self._positions, self._marks)
        return Told(*(np.array(column, np.int64) for column in columns))

    def text(self) -> str:
        """Return the words joined by single blanks."""
        entries = self._lexicon.words
        return " ".join([entries[word].form for word in self._words])
