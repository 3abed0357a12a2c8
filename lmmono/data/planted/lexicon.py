"""The words of the planted language: every form once, with what is known of it.

A form belongs to one word class and one number, so these can be read off the word alone. Only
the eight ambiguous nouns have two topics; which one is meant, the context must tell.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Int8

NO_TOPIC = -1


class WordClass(IntEnum):
    """What a word is in a sentence."""

    PUNCTUATION = 0
    DETERMINER = 1
    NOUN = 2
    VERB = 3
    COPULA = 4
    AUXILIARY = 5
    ADJECTIVE = 6
    ADVERB = 7
    PREPOSITION = 8
    CONJUNCTION = 9
    NEGATOR = 10
    NUMBER = 11
    NAME = 12
    PLACE = 13


class Number(IntEnum):
    """Grammatical number; a plural verb form is also the form after `do` and `does`."""

    NONE = -1
    SINGULAR = 0
    PLURAL = 1


@dataclass(frozen=True, slots=True)
class Word:
    """One form of the language."""

    form: str
    """The word as written."""
    word_class: WordClass
    """Its only class."""
    number: Number = Number.NONE
    """Its grammatical number, where the class has one."""
    polarity: int = 0
    """1 for a positive adjective, -1 for a negative one."""
    topics: tuple[int, ...] = ()
    """Topics it belongs to: none, one, or two for an ambiguous noun."""
    value: int = 0
    """What a number word counts."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic's own words; `word:form` gives an irregular plural or third person."""

    name: str
    """Name in features and labels."""
    places: str
    """Words that open a section of this topic and occur nowhere else."""
    nouns: str
    """Nouns, the ambiguous ones last."""
    moves: str
    """Verbs without an object, in the plural form."""
    deeds: str
    """Verbs with an object, in the plural form."""
    adjectives: str
    """Adjectives without polarity."""


TOPICS = (
    Topic(
        "sea",
        "harbor beach",
        "boat sailor wave anchor island whale net bass:basses seal",
        "sail drift sink",
        "row catch:catches",
        "wet deep",
    ),
    Topic(
        "music",
        "theater opera",
        "singer violin drum song choir piano melody:melodies bass:basses pitch:pitches",
        "sing dance hum",
        "play tune",
        "loud soft",
    ),
    Topic(
        "sport",
        "stadium arena",
        "player ball team coach:coaches goal race course pitch:pitches court",
        "run jump compete",
        "kick throw",
        "fast tall",
    ),
    Topic(
        "law",
        "courthouse tribunal",
        "judge lawyer witness:witnesses prisoner crime verdict jury:juries court cell",
        "argue testify:testifies wait",
        "accuse defend",
        "formal secret",
    ),
    Topic(
        "science",
        "laboratory observatory",
        "chemist atom magnet sample microscope robot theory:theories cell field",
        "react glow vibrate",
        "measure test",
        "electric tiny",
    ),
    Topic(
        "farm",
        "barn meadow",
        "farmer cow horse hen fence tractor pig field turkey",
        "graze sleep dig",
        "feed milk",
        "muddy green",
    ),
    Topic(
        "cooking",
        "kitchen restaurant",
        "cook knife:knives soup oven recipe spoon onion turkey nut",
        "boil burn simmer",
        "taste serve",
        "hot sweet",
    ),
    Topic(
        "craft",
        "workshop garage",
        "carpenter hammer engine ladder wheel nail wrench:wrenches nut seal",
        "break turn work",
        "build repair",
        "rusty heavy",
    ),
)
NOUNS = "friend child:children woman:women man:men stranger fact neighbor guest end"
MOVES = "come smile fall stay"
DEEDS = "see like find know"
ADJECTIVES = "old new last small big young red"
POSITIVE = "good kind bright calm brave clever honest lovely"
NEGATIVE = "bad cruel dull angry lazy foolish dirty awful"
ADVERBS = "slowly quickly often once again today"
DEGREES = "very quite"
PREPOSITIONS = "near behind beside under with of in"
NAMES = "Anna Boris Clara David Emma Felix Greta Henry Irene Jonas"
SPEECH = "said asked shouted whispered"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
DETERMINERS = {
    Number.NONE: "the",
    Number.SINGULAR: "this every each",
    Number.PLURAL: "these some many more",
}

Forms = tuple[int, int]
"""Ids of the singular and the plural form of one word, indexed by `Number`."""


class Lexicon:
    """All words, an id for each, and their properties as arrays over ids."""

    def __init__(self) -> None:
        self.words: list[Word] = []
        self._ids: dict[str, int] = {}
        self._add_topics()
        self._add_content()
        self._add_function_words()
        self.word_class = self._column("word_class")
        self.number = self._column("number")
        self.polarity = self._column("polarity")
        self.value = self._column("value")
        self.only_topic = np.array(
            [w.topics[0] if len(w.topics) == 1 else NO_TOPIC for w in self.words], np.int8
        )

    def __getitem__(self, form: str) -> int:
        return self._ids[form]

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, forms: str) -> tuple[int, ...]:
        """Return the ids of blank-separated forms."""
        return tuple(self._ids[form] for form in forms.split())

    def nouns(self, forms: str) -> tuple[Forms, ...]:
        """Return singular and plural ids of nouns listed as in `Topic.nouns`."""
        return tuple((self[singular], self[plural]) for singular, plural in _inflected(forms))

    def verbs(self, forms: str) -> tuple[Forms, ...]:
        """Return singular and plural ids of verbs listed by their plural form."""
        return tuple((self[third], self[plural]) for plural, third in _inflected(forms))

    @property
    def ambiguous(self) -> tuple[Word, ...]:
        """The nouns of two topics, singular and plural forms."""
        return tuple(word for word in self.words if len(word.topics) == 2)

    def _column(self, name: str) -> Int8[np.ndarray, "n_words"]:
        return np.array([getattr(word, name) for word in self.words], np.int8)

    def _add(self, word: Word) -> None:
        number = self._ids.get(word.form)
        if number is None:
            self._ids[word.form] = len(self.words)
            self.words.append(word)
            return
        first = self.words[number]
        assert word.word_class == first.word_class == WordClass.NOUN, word
        both = Word(word.form, first.word_class, first.number, topics=first.topics + word.topics)
        self.words[number] = both

    def _add_all(self, forms: str, word_class: WordClass, polarity: int = 0) -> None:
        for form in forms.split():
            self._add(Word(form, word_class, polarity=polarity))

    def _add_pairs(self, forms: str, word_class: WordClass, topics: tuple[int, ...] = ()) -> None:
        stem_number, inflected_number = Number.SINGULAR, Number.PLURAL
        if word_class == WordClass.VERB:
            stem_number, inflected_number = inflected_number, stem_number
        for form, inflected in _inflected(forms):
            self._add(Word(form, word_class, stem_number, topics=topics))
            self._add(Word(inflected, word_class, inflected_number, topics=topics))

    def _add_topics(self) -> None:
        for i, topic in enumerate(TOPICS):
            self._add_pairs(topic.nouns, WordClass.NOUN, (i,))
            self._add_pairs(f"{topic.moves} {topic.deeds}", WordClass.VERB, (i,))
            for form in topic.adjectives.split():
                self._add(Word(form, WordClass.ADJECTIVE, topics=(i,)))
            for form in topic.places.split():
                self._add(Word(form, WordClass.PLACE, topics=(i,)))

    def _add_content(self) -> None:
        self._add_pairs(NOUNS, WordClass.NOUN)
        self._add_pairs(f"{MOVES} {DEEDS}", WordClass.VERB)
        self._add_all(ADJECTIVES, WordClass.ADJECTIVE)
        self._add_all(POSITIVE, WordClass.ADJECTIVE, polarity=1)
        self._add_all(NEGATIVE, WordClass.ADJECTIVE, polarity=-1)
        self._add_all(f"{ADVERBS} {DEGREES}", WordClass.ADVERB)
        self._add_all(NAMES, WordClass.NAME)
        self._add_all(f"{SPEECH} counted make", WordClass.VERB)

    def _add_function_words(self) -> None:
        for number, forms in DETERMINERS.items():
            for form in forms.split():
                self._add(Word(form, WordClass.DETERMINER, number))
        for value, form in enumerate(NUMBERS.split(), start=1):
            self._add(Word(form, WordClass.NUMBER, value=value))
        for number, copula, auxiliary in ((0, "is", "does"), (1, "are", "do")):
            self._add(Word(copula, WordClass.COPULA, Number(number)))
            self._add(Word(auxiliary, WordClass.AUXILIARY, Number(number)))
        self._add_all(f"{PREPOSITIONS} at", WordClass.PREPOSITION)
        self._add_all("and but that", WordClass.CONJUNCTION)
        self._add_all("not never", WordClass.NEGATOR)
        self._add_all('. , "', WordClass.PUNCTUATION)


def _inflected(forms: str) -> list[tuple[str, str]]:
    """Return each given form with its other one: `+s`, unless given as `form:other`."""
    pairs = [form.partition(":") for form in forms.split()]
    return [(form, other or form + "s") for form, _, other in pairs]
