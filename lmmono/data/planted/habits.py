"""What a planted language prefers: the grammar's probabilities, and seeded word frequencies.

Two languages with one grammar and other habits are the same task on a shifted distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from lmmono.data.planted import lexicon as lex
from lmmono.data.planted.draws import Choice, mixed, weighted, zipf
from lmmono.data.planted.lexicon import Forms, Lexicon


@dataclass(frozen=True, slots=True)
class Habits:
    """Probabilities of the grammar's choices, each in [0, 1]."""

    topic_change: float = 0.4
    """A later section leaves the document's main topic."""
    generic_noun: float = 0.2
    """A noun belongs to no topic."""
    mood_kept: float = 0.9
    """A judgement, negation counted, has the sign of the document's mood."""
    opener: float = 0.2
    """A sentence begins with a fixed phrase and a comma."""
    negation: float = 0.3
    """A predicate is negated."""
    never: float = 0.4
    """A negated predicate takes `never` rather than `not`."""
    singular: float = 0.55
    """A noun phrase is singular."""
    adjective: float = 0.25
    """A noun phrase has an adjective."""
    old_friend: float = 0.03
    """A noun phrase is an "old friend"."""
    name: float = 0.25
    """A subject is a name."""
    counted: float = 0.12
    """A subject is counted by a number word."""
    attractor: float = 0.4
    """A prepositional phrase stands between subject and verb."""
    relative: float = 0.15
    """A relative clause stands between subject and verb."""
    second_judgement: float = 0.3
    """A judgement is followed by another, after `and` or `but`."""
    adverb: float = 0.35
    """A verb without object takes an adverb."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{field.name}: want a probability in [0, 1], got {value}")


class TopicPools:
    """The words of one topic, mixed with generic ones, with seeded frequencies and affinities."""

    def __init__(
        self, words: Lexicon, topic: lex.Topic, habits: Habits, rng: np.random.Generator
    ) -> None:
        own, generic = words.nouns(topic.nouns), words.nouns(lex.NOUNS)
        moves = words.verbs(f"{topic.moves} {lex.MOVES}")
        deeds = words.verbs(f"{topic.deeds} {lex.DEEDS}")
        self.places = zipf(words.ids(topic.places), rng)
        self.nouns = mixed(
            zipf(own, rng, exponent=0.5), zipf(generic, rng, exponent=0.5), habits.generic_noun
        )
        self.adjectives = zipf(words.ids(f"{topic.adjectives} {lex.ADJECTIVES}"), rng)
        self.moves = _affinities(own + generic, moves, rng)
        self.deeds = _affinities(own + generic, deeds, rng)


class Pools:
    """Every choice of words that the grammar makes."""

    def __init__(self, words: Lexicon, habits: Habits, rng: np.random.Generator) -> None:
        self.topics = tuple(TopicPools(words, topic, habits, rng) for topic in lex.TOPICS)
        self.names = weighted(words.ids(lex.NAMES))
        self.speech = zipf(words.ids(lex.SPEECH), rng)
        self.adverbs = zipf(words.ids(lex.ADVERBS), rng)
        self.degrees = zipf(words.ids(lex.DEGREES), rng)
        self.prepositions = zipf(words.ids(lex.PREPOSITIONS), rng)
        self.judgements = {
            1: zipf(words.ids(lex.POSITIVE), rng),
            -1: zipf(words.ids(lex.NEGATIVE), rng),
        }
        self.determiners = tuple(
            mixed(
                weighted(words.ids(lex.DETERMINERS[lex.Number.NONE])),
                zipf(words.ids(lex.DETERMINERS[number]), rng),
                0.4,
            )
            for number in (lex.Number.SINGULAR, lex.Number.PLURAL)
        )


def _affinities(
    nouns: Sequence[Forms], verbs: Sequence[Forms], rng: np.random.Generator
) -> dict[Forms | None, Choice[Forms]]:
    """Return the verbs each noun prefers, and under None those of a name."""
    subjects: list[Forms | None] = [None, *nouns]
    return {noun: zipf(verbs, rng, exponent=1.5) for noun in subjects}
