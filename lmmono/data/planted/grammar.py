"""The grammar of the planted language: one method per phrase, choices drawn, marks set.

A document has a main topic, a mood and a cast of two names. Its sections open with a place, which
sets the topic; its last sentence is a judgement. In outline, `|` for choices, `[]` for options:

    document  = section+ "in the end ," noun-phrase judgement "."
    section   = "at the" PLACE "," clause "." sentence+
    sentence  = [opener ","] ( clause | clause "and"|"but" clause | speech | count | sum ) "."
    speech    = NAME SAID '"' clause '"'  |  '"' clause '"' SAID NAME
    count     = NAME "counted" n "," n+1 "," ... "and" n+k NOUNS
    sum       = a NOUNS "and" b NOUNS "make" a+b NOUNS
    clause    = subject predicate
    subject   = NAME | NUMBER NOUNS [between] | DET [ADJ] NOUN [between]
    between   = PREP DET NOUN [PREP DET NOUN] | "that" (NAME | DET NOUN) DEED
    predicate = [negation] MOVE [ADV] | [negation] DEED DET [ADJ] NOUN | judgement
    judgement = "is"|"are" [NEG] [DEGREE] ADJ [("and"|"but"|"but not") ADJ]
"""

from dataclasses import dataclass
from functools import cache

from lmmono.data.planted.draws import Choice, Draws, weighted
from lmmono.data.planted.habits import Habits, Pools, TopicPools
from lmmono.data.planted.lexicon import NUMBERS, TOPICS, Forms, Lexicon, Number
from lmmono.data.planted.telling import AWAITING, Mark, Telling

SECTIONS = weighted((1, 2, 3), (1.0, 2.0, 1.0))
SENTENCES = weighted((2, 3, 4), (1.0, 2.0, 1.0))
SENTENCE_KINDS = weighted(
    ("clause", "joined", "speech", "count", "sum"), (0.44, 0.18, 0.22, 0.08, 0.08)
)
PREDICATES = weighted(("move", "deed", "judgement"), (0.35, 0.3, 0.35))
OPENERS = weighted(("at last ,", "of course ,", "once more ,", "in fact ,"), (4.0, 3.0, 2.0, 1.0))
MOODS = weighted((1, -1))
MAIN_TOPICS = weighted(tuple(range(len(TOPICS))))
N_NUMBERS = len(NUMBERS.split())
COUNT_LENGTHS = weighted((3, 4, 5))


@cache
def _between(first: int, last: int) -> Choice[int]:
    return weighted(range(first, last + 1))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a verb must agree with."""

    number: Number
    noun: Forms | None
    """None for a name, which agrees as a singular but awaits nothing."""
    head_at: int = -1
    """Index of the head noun in the document."""
    last_number: Number = Number.NONE
    """Number of the last common noun before the verb."""


class Grammar:
    """Tells one document; the result is in `telling`, its cost in `draws.nats`."""

    def __init__(self, words: Lexicon, pools: Pools, habits: Habits, draws: Draws) -> None:
        self.telling = Telling(words)
        self.draws = draws
        self._words, self._pools, self._habits = words, pools, habits
        self._numbers = words.ids(NUMBERS)
        self.mood = draws.pick(MOODS)
        self.main_topic = draws.pick(MAIN_TOPICS)
        self._cast = weighted((draws.pick(pools.names), draws.pick(pools.names)))

    @property
    def _topic(self) -> TopicPools:
        return self._pools.topics[self.telling.topic]

    def document(self) -> None:
        """Tell the whole document."""
        for i in range(self.draws.pick(SECTIONS)):
            topic = self.main_topic
            if i > 0 and self.draws.chance(self._habits.topic_change):
                topic = self.draws.pick(MAIN_TOPICS)
            self._section(topic)
        self.telling.phrase("in the end ,")
        self._judgement(self._noun_phrase())
        self.telling.end_sentence()

    def _section(self, topic: int) -> None:
        self.telling.phrase("at the")
        self.telling.topic = topic
        self.telling.say(self.draws.pick(self._topic.places))
        self.telling.phrase(",")
        self._clause()
        self.telling.end_sentence()
        for _ in range(self.draws.pick(SENTENCES)):
            self._sentence()

    def _sentence(self) -> None:
        if self.draws.chance(self._habits.opener):
            self.telling.phrase(self.draws.pick(OPENERS))
        match self.draws.pick(SENTENCE_KINDS):
            case "clause":
                self._clause()
            case "joined":
                self._clause()
                self.telling.phrase("and" if self.draws.chance(0.5) else "but")
                self._clause()
            case "speech":
                self._speech()
            case "count":
                self._count()
            case _:
                self._sum()
        self.telling.end_sentence()

    def _speech(self) -> None:
        if self.draws.chance(0.7):
            self._name()
            self.telling.say(self.draws.pick(self._pools.speech))
            self._quote()
        else:
            self._quote()
            self.telling.say(self.draws.pick(self._pools.speech))
            self._name()

    def _quote(self) -> None:
        quote_mark = self._words['"']
        self.telling.say(quote_mark, Mark.OPENING_QUOTE)
        self.telling.turn_on(Mark.QUOTED)
        self._clause()
        self.telling.turn_off(Mark.QUOTED)
        self.telling.say(quote_mark, Mark.CLOSING_QUOTE)

    def _count(self) -> None:
        length = self.draws.pick(COUNT_LENGTHS)
        first = self.draws.pick(_between(1, N_NUMBERS - length + 1))
        self._name()
        self.telling.phrase("counted")
        for i in range(length):
            if i > 0:
                self.telling.phrase("and" if i == length - 1 else ",")
            self._number(first + i, Mark.COUNTING if i > 0 else 0)
        self._counted_noun(self.draws.pick(self._topic.nouns), first + length - 1)

    def _sum(self) -> None:
        total = self.draws.pick(_between(2, N_NUMBERS))
        first = self.draws.pick(_between(1, total - 1))
        noun = self.draws.pick(self._topic.nouns)
        for value, after in ((first, "and"), (total - first, "make")):
            self._number(value)
            self._counted_noun(noun, value)
            self.telling.phrase(after)
        self._number(total, Mark.SUM)
        self._counted_noun(noun, total)

    def _number(self, value: int, mark: int = 0) -> None:
        self.telling.say(self._numbers[value - 1], mark)

    def _counted_noun(self, noun: Forms, value: int) -> Number:
        number = Number.SINGULAR if value == 1 else Number.PLURAL
        self.telling.say(noun[number], Mark.COUNTED_NOUN)
        return number

    def _name(self) -> None:
        self.telling.say(self.draws.pick(self._cast))

    def _clause(self) -> None:
        subject = self._subject()
        match self.draws.pick(PREDICATES):
            case "move":
                self._verb(subject, self.draws.pick(self._topic.moves[subject.noun]))
                if self.draws.chance(self._habits.adverb):
                    self.telling.say(self.draws.pick(self._pools.adverbs))
            case "deed":
                self._verb(subject, self.draws.pick(self._topic.deeds[subject.noun]))
                self._determined_noun()
            case _:
                self._judgement(subject)
        self.telling.turn_off(Mark.NEGATED)

    def _subject(self) -> Subject:
        if self.draws.chance(self._habits.name):
            self._name()
            return Subject(Number.SINGULAR, None)
        return self._noun_phrase()

    def _noun_phrase(self) -> Subject:
        if self.draws.chance(self._habits.counted):
            value = self.draws.pick(_between(1, N_NUMBERS))
            self._number(value)
            noun = self.draws.pick(self._topic.nouns)
            number = self._counted_noun(noun, value)
        else:
            noun, number = self._determined_noun()
        head_at = len(self.telling) - 1
        self.telling.turn_on(AWAITING[number])
        return Subject(number, noun, head_at, self._distance(number))

    def _determined_noun(self) -> tuple[Forms, Number]:
        if self.draws.chance(self._habits.old_friend):
            self.telling.say(self.draws.pick(self._pools.determiners[Number.SINGULAR]))
            self.telling.phrase("old friend")
            return self._words.nouns("friend")[0], Number.SINGULAR
        singular = self.draws.chance(self._habits.singular)
        number = Number.SINGULAR if singular else Number.PLURAL
        self.telling.say(self.draws.pick(self._pools.determiners[number]))
        if self.draws.chance(self._habits.adjective):
            self.telling.say(self.draws.pick(self._topic.adjectives))
        noun = self.draws.pick(self._topic.nouns)
        self.telling.say(noun[number])
        return noun, number

    def _distance(self, number: Number) -> Number:
        """Say what separates a head noun from its verb; return the number of the last noun."""
        if self.draws.chance(self._habits.attractor):
            number = self._prepositional_phrase()
            if self.draws.chance(0.2):
                number = self._prepositional_phrase()
        elif self.draws.chance(self._habits.relative):
            number = self._relative_clause(number)
        return number

    def _prepositional_phrase(self) -> Number:
        self.telling.say(self.draws.pick(self._pools.prepositions))
        return self._determined_noun()[1]

    def _relative_clause(self, number: Number) -> Number:
        self.telling.phrase("that")
        if self.draws.chance(0.3):
            self._name()
            noun, inner = None, Number.SINGULAR
        else:
            noun, inner = self._determined_noun()
            number = inner
        self.telling.say(self.draws.pick(self._topic.deeds[noun])[inner])
        return number

    def _verb(self, subject: Subject, verb: Forms) -> None:
        """Say the verb in the subject's number, with its negation if it has one."""
        if not self.draws.chance(self._habits.negation):
            self._agreeing(subject, verb)
        elif self.draws.chance(self._habits.never):
            self._negator("never")
            self._agreeing(subject, verb)
        else:
            self._agreeing(subject, (self._words["does"], self._words["do"]))
            self._negator("not")
            self.telling.say(verb[Number.PLURAL])

    def _negator(self, form: str) -> None:
        self.telling.phrase(form)
        self.telling.turn_on(Mark.NEGATED)

    def _agreeing(self, subject: Subject, verb: Forms) -> None:
        mark = 0
        self.telling.turn_off(Mark.AWAITING_SINGULAR | Mark.AWAITING_PLURAL)
        if subject.noun is not None and len(self.telling) - subject.head_at > 1:
            mark = Mark.FAR_VERB
            if subject.last_number != subject.number:
                mark |= Mark.ATTRACTED_VERB
        self.telling.say(verb[subject.number], mark)

    def _judgement(self, subject: Subject) -> None:
        self._agreeing(subject, (self._words["is"], self._words["are"]))
        negated = self.draws.chance(self._habits.negation)
        if negated:
            self._negator("never" if self.draws.chance(self._habits.never) else "not")
        if self.draws.chance(0.3):
            self.telling.say(self.draws.pick(self._pools.degrees))
        self._judge(negated)
        if self.draws.chance(self._habits.second_judgement):
            self._second_judgement(negated)
        self.telling.turn_off(Mark.NEGATED)

    def _second_judgement(self, negated: bool) -> None:
        self.telling.turn_off(Mark.NEGATED)
        turned = not negated and self.draws.chance(0.5)
        self.telling.phrase("but" if negated or turned else "and")
        if turned:
            self._negator("not")
        self._judge(turned)

    def _judge(self, negated: bool) -> None:
        meant = self.mood if self.draws.chance(self._habits.mood_kept) else -self.mood
        self.telling.say(self.draws.pick(self._pools.judgements[-meant if negated else meant]))
