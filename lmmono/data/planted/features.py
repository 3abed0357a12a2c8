"""The named features of the planted language: for each, which words of a document have it.

A feature reads the document as it was told (words, topic, place in the sentence, marks), never
the joined text. `needs_context` says whether the word itself decides it or what came before; no
feature depends on later words, so a causal model can know each of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Int, Int8

from lmmono.data.planted.lexicon import TOPICS, Lexicon, Number, Word, WordClass
from lmmono.data.planted.telling import Mark, Told

Kind = Literal[
    "word_class",
    "topic",
    "sense",
    "bigram",
    "position",
    "agreement",
    "negation",
    "quoting",
    "number",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

IDIOMS = ("at last", "of course", "once more", "in fact", "old friend")
LATE = 64
EARLY = 5


@dataclass(frozen=True, slots=True)
class DocumentMarks:
    """A told document with the properties of its words looked up."""

    told: Told
    """The document."""
    lexicon: Lexicon
    """Its words."""

    @property
    def word_class(self) -> Int8[np.ndarray, "n_words"]:
        """Class of every word."""
        return self.lexicon.word_class[self.told.words]

    @property
    def number(self) -> Int8[np.ndarray, "n_words"]:
        """Grammatical number of every word."""
        return self.lexicon.number[self.told.words]

    @property
    def polarity(self) -> Int8[np.ndarray, "n_words"]:
        """Polarity of every word alone."""
        return self.lexicon.polarity[self.told.words]

    @property
    def topic_of_word(self) -> Int8[np.ndarray, "n_words"]:
        """The only topic of every word; -1 for generic and ambiguous words."""
        return self.lexicon.only_topic[self.told.words]

    @property
    def value(self) -> Int8[np.ndarray, "n_words"]:
        """What every number word counts; 0 for other words."""
        return self.lexicon.value[self.told.words]

    @property
    def index(self) -> Int[np.ndarray, "n_words"]:
        """Position of every word in the document."""
        return np.arange(len(self.told.words))

    def marked(self, bits: int) -> Bool[np.ndarray, "n_words"]:
        """Return where any of the bits is set."""
        return (self.told.marks & bits) != 0


Detector = Callable[[DocumentMarks], Bool[np.ndarray, "n_words"]]


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that a word of the language can mean."""

    name: str
    """Unique name, `kind.detail`."""
    kind: Kind
    """The kind of structure it tests."""
    description: str
    """The true explanation, as a person would give it."""
    needs_context: bool
    """False if the word alone decides it."""
    detect: Detector = field(repr=False, compare=False)
    """Which words of a document have it."""


def features(lexicon: Lexicon) -> tuple[Feature, ...]:
    """Return every feature of the language, kind by kind, in a fixed order."""
    return (
        *_word_classes(),
        *_topics(),
        *_senses(lexicon),
        *_bigrams(lexicon),
        *_positions(),
        *_agreement(),
        *_negation(),
        *_quoting(),
        *_numbers(),
    )


def _word_classes() -> Iterator[Feature]:
    singular, plural = Number.SINGULAR, Number.PLURAL
    forms = (
        ("determiner", "determiners", WordClass.DETERMINER, None),
        ("noun_singular", "singular nouns", WordClass.NOUN, singular),
        ("noun_plural", "plural nouns", WordClass.NOUN, plural),
        ("verb_singular", "verbs in the third person singular", WordClass.VERB, singular),
        ("verb_plural", "verbs in the plural or base form", WordClass.VERB, plural),
        ("verb_past", "verbs without number", WordClass.VERB, Number.NONE),
        ("adjective", "adjectives", WordClass.ADJECTIVE, None),
        ("adverb", "adverbs", WordClass.ADVERB, None),
        ("preposition", "prepositions", WordClass.PREPOSITION, None),
        ("conjunction", "the words and, but, that", WordClass.CONJUNCTION, None),
        ("name", "names of people", WordClass.NAME, None),
        ("place", "names of places", WordClass.PLACE, None),
    )
    for name, description, word_class, number in forms:
        yield Feature(
            f"word_class.{name}", "word_class", description, False, _of_class(word_class, number)
        )
    for name, description, sign in (
        ("positive", "adjectives of praise", 1),
        ("negative", "adjectives of blame", -1),
    ):
        yield Feature(f"word_class.{name}", "word_class", description, False, _of_sign(sign))


def _of_class(word_class: WordClass, number: Number | None) -> Detector:
    if number is None:
        return lambda r: r.word_class == word_class
    return lambda r: (r.word_class == word_class) & (r.number == number)


def _of_sign(sign: int) -> Detector:
    return lambda r: r.polarity == sign


def _topics() -> Iterator[Feature]:
    for i, topic in enumerate(TOPICS):
        yield Feature(
            f"topic.{topic.name}",
            "topic",
            f"any word of a passage about {topic.name}, from the place that opens it on",
            True,
            _in_topic(i),
        )
    for i, topic in enumerate(TOPICS):
        yield Feature(
            f"topic.{topic.name}_word",
            "topic",
            f"words that are only used about {topic.name}",
            False,
            _word_of_topic(i),
        )


def _in_topic(topic: int) -> Detector:
    return lambda r: r.told.topics == topic


def _word_of_topic(topic: int) -> Detector:
    return lambda r: r.topic_of_word == topic


def _senses(lexicon: Lexicon) -> Iterator[Feature]:
    singulars = [word for word in lexicon.ambiguous if word.number == Number.SINGULAR]
    for word in singulars:
        for topic in word.topics:
            name = TOPICS[topic].name
            yield Feature(
                f"sense.{word.form}_{name}",
                "sense",
                f"the noun {word.form} where it is about {name}",
                True,
                _sense(lexicon, word, topic),
            )


def _sense(lexicon: Lexicon, word: Word, topic: int) -> Detector:
    singular = lexicon[word.form]
    plural = singular + 1  # the lexicon adds both forms of a noun together
    assert lexicon.words[plural].topics == word.topics, word
    return lambda r: np.isin(r.told.words, (singular, plural)) & (r.told.topics == topic)


def _bigrams(lexicon: Lexicon) -> Iterator[Feature]:
    for idiom in IDIOMS:
        first, second = lexicon.ids(idiom)
        yield Feature(
            f"bigram.{idiom.replace(' ', '_')}",
            "bigram",
            f'the second word of "{idiom}"',
            True,
            _bigram(first, second),
        )


def _bigram(first: int, second: int) -> Detector:
    def detect(r: DocumentMarks) -> Bool[np.ndarray, "n_words"]:
        on = r.told.words == second
        on[1:] &= r.told.words[:-1] == first
        on[0] = False
        return on

    return detect


def _positions() -> Iterator[Feature]:
    rules: tuple[tuple[str, str, Detector], ...] = (
        ("sentence_start", "the first word of a sentence", lambda r: r.told.positions == 0),
        ("second_word", "the second word of a sentence", lambda r: r.told.positions == 1),
        ("document_start", f"the first {EARLY} words of a document", lambda r: r.index < EARLY),
        ("late", f"any word after the first {LATE} of a document", lambda r: r.index >= LATE),
    )
    for name, description, detect in rules:
        yield Feature(f"position.{name}", "position", description, True, detect)


def _agreement() -> Iterator[Feature]:
    marks = (
        (
            "awaiting_singular",
            "words between a singular subject noun and its verb",
            Mark.AWAITING_SINGULAR,
        ),
        (
            "awaiting_plural",
            "words between a plural subject noun and its verb",
            Mark.AWAITING_PLURAL,
        ),
        ("far_verb", "a verb with words between it and its subject noun", Mark.FAR_VERB),
        (
            "attracted_verb",
            "a verb whose nearest noun before it differs in number from its subject",
            Mark.ATTRACTED_VERB,
        ),
    )
    for name, description, bits in marks:
        yield Feature(f"agreement.{name}", "agreement", description, True, _marked(bits))


def _marked(bits: int) -> Detector:
    return lambda r: r.marked(bits)


def _negation() -> Iterator[Feature]:
    scope = Mark.NEGATED
    rules: tuple[tuple[str, str, bool, Detector], ...] = (
        ("negator", "the words not and never", False, _of_class(WordClass.NEGATOR, None)),
        (
            "scope",
            "words after not or never until the clause ends",
            True,
            _marked(scope),
        ),
        (
            "negated_positive",
            "an adjective of praise that is negated",
            True,
            lambda r: (r.polarity == 1) & r.marked(scope),
        ),
        (
            "negated_negative",
            "an adjective of blame that is negated",
            True,
            lambda r: (r.polarity == -1) & r.marked(scope),
        ),
        (
            "praise",
            "a judgement that praises: a positive adjective, or a negated negative one",
            True,
            lambda r: np.where(r.marked(scope), -r.polarity, r.polarity) == 1,
        ),
        (
            "blame",
            "a judgement that blames: a negative adjective, or a negated positive one",
            True,
            lambda r: np.where(r.marked(scope), -r.polarity, r.polarity) == -1,
        ),
    )
    for name, description, needs_context, detect in rules:
        yield Feature(f"negation.{name}", "negation", description, needs_context, detect)


def _quoting() -> Iterator[Feature]:
    marks = (
        ("inside", "words between quotation marks", Mark.QUOTED),
        ("opening", "a quotation mark that opens", Mark.OPENING_QUOTE),
        ("closing", "a quotation mark that closes", Mark.CLOSING_QUOTE),
    )
    for name, description, bits in marks:
        yield Feature(f"quoting.{name}", "quoting", description, True, _marked(bits))
    yield Feature(
        "quoting.verb",
        "quoting",
        "a verb, or a form of be or do, that is quoted",
        True,
        lambda r: r.marked(Mark.QUOTED) & np.isin(r.word_class, VERBAL),
    )


VERBAL = (WordClass.VERB, WordClass.COPULA, WordClass.AUXILIARY)


def _numbers() -> Iterator[Feature]:
    rules: tuple[tuple[str, str, bool, Detector], ...] = (
        ("word", "number words", False, lambda r: r.value > 0),
        ("large", "number words from seven up", False, lambda r: r.value >= 7),
        (
            "counting",
            "a number word that continues a count by one",
            True,
            _marked(Mark.COUNTING),
        ),
        ("sum", "the result of an addition", True, _marked(Mark.SUM)),
        (
            "counted_noun",
            "a noun right after a number word",
            True,
            _marked(Mark.COUNTED_NOUN),
        ),
    )
    for name, description, needs_context, detect in rules:
        yield Feature(f"number.{name}", "number", description, needs_context, detect)
