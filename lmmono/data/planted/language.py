"""A planted language: its words, its features, and any document by number."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool

from lmmono.data.planted.draws import Draws
from lmmono.data.planted.features import DocumentMarks, Feature, features
from lmmono.data.planted.grammar import Grammar
from lmmono.data.planted.habits import Habits, Pools
from lmmono.data.planted.lexicon import TOPICS, Lexicon
from lmmono.data.planted.telling import Told

VERSION = 1
"""Raised with every change that gives another text or truth for a seed; part of data digests."""

_DOCUMENTS, _FREQUENCIES = 1, 2  # streams of one seed; no stream may be 0 (SeedSequence pads so)


@dataclass(frozen=True)
class PlantedDocument:
    """One document with its truth, which is worked out when first asked for."""

    text: str
    """The words joined by single blanks, punctuation included as words."""
    topic: str
    """The main topic, that of the first section."""
    mood: int
    """1 if the document's judgements mostly praise, -1 if they mostly blame."""
    nats: float
    """-log probability of the choices that made it, the end included."""
    _told: Told = field(repr=False)
    _language: "Language" = field(repr=False)

    @property
    def words(self) -> list[str]:
        """The words in order."""
        return self.text.split(" ")

    @cached_property
    def truth(self) -> Bool[np.ndarray, "n_words n_features"]:
        """Which features of the language each word has."""
        return self._detect(self._language.features)

    def having(self, *names: str) -> Bool[np.ndarray, "n_words n_names"]:
        """Return which words have the features of these names, without working out the others."""
        by_name = {feature.name: feature for feature in self._language.features}
        return self._detect([by_name[name] for name in names])

    def _detect(self, wanted: Sequence[Feature]) -> Bool[np.ndarray, "n_words n_wanted"]:
        reading = DocumentMarks(self._told, self._language.lexicon)
        return np.stack([feature.detect(reading) for feature in wanted], axis=1)


class Language:
    """A seeded language; `document(i)` is the same whatever else was asked for before.

    The seed sets the words' frequencies and affinities and the documents; the grammar, the words
    and the features are those of every language, so that languages of other seeds or habits are
    the same tasks on shifted text.

    Args:
        seed: Seed of frequencies and documents.
        habits: Probabilities of the grammar's choices.
    """

    def __init__(self, seed: int, habits: Habits = Habits()) -> None:  # noqa: B008 - frozen
        self.seed = seed
        self.habits = habits
        self.lexicon = Lexicon()
        self.features: tuple[Feature, ...] = features(self.lexicon)
        self.topics: tuple[str, ...] = tuple(topic.name for topic in TOPICS)
        rng = np.random.default_rng([seed, _FREQUENCIES])
        self._pools = Pools(self.lexicon, habits, rng)

    def __repr__(self) -> str:
        return (
            f"Language(seed={self.seed}, {len(self.lexicon)} words, {len(self.features)} features)"
        )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of the language."""
        return tuple(word.form for word in self.lexicon.words)

    def text(self, index: int) -> str:
        """Return the text of one document, without its truth."""
        return self._tell(index).telling.text()

    def document(self, index: int) -> PlantedDocument:
        """Return one document with its labels and truth."""
        grammar = self._tell(index)
        return PlantedDocument(
            text=grammar.telling.text(),
            topic=self.topics[grammar.main_topic],
            mood=grammar.mood,
            nats=grammar.draws.nats,
            _told=grammar.telling.told(),
            _language=self,
        )

    def source_entropy(self, n_documents: int) -> float:
        """Return the nats per token of the choices behind the first documents, their ends included.

        Two derivations of one text count as two, so the entropy of the text is at most this: a
        perfect model that sees whole documents has a loss no higher.
        """
        grammars = [self._tell(i) for i in range(n_documents)]
        n_tokens = sum(len(grammar.telling) + 1 for grammar in grammars)
        return sum(grammar.draws.nats for grammar in grammars) / n_tokens

    def _tell(self, index: int) -> Grammar:
        rng = np.random.default_rng([self.seed, _DOCUMENTS, index])
        grammar = Grammar(self.lexicon, self._pools, self.habits, Draws(rng))
        grammar.document()
        return grammar
