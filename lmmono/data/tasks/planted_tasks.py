"""Labelled texts of the planted language, whose classes are known because the grammar made them.

Three tasks, each on passages that documents of the language yield, no text twice in the whole
task, and the classes of every part balanced to within one text. The out-of-domain part `shifted`
tells the same classes of a language with other words' frequencies and other habits. A spurious
cue, where asked for, is a name before each text that goes with the class as often as wanted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int64

from lmmono.data.planted import Habits, Language, PlantedDocument
from lmmono.data.planted.lexicon import NAMES, TOPICS
from lmmono.data.tasks.overlap import text_key
from lmmono.data.tasks.task import Labelled, Task
from lmmono.errors import DataError, nearest
from lmmono.registry.tasks import PLANTED, PlantedKind

UNSEEN = 1_000_000
"""First document that tasks are drawn from: behind those of any corpus that models train on."""

SHIFTED = Habits(
    topic_change=0.7,
    generic_noun=0.5,
    opener=0.6,
    negation=0.5,
    never=0.7,
    singular=0.4,
    adjective=0.6,
    name=0.4,
    counted=0.25,
    attractor=0.6,
    relative=0.3,
    second_judgement=0.5,
    adverb=0.7,
)
"""Habits of the out-of-domain twin at full shift; none of them changes what a class means."""

Passage = tuple[str, int]
"""A text and its class."""


@dataclass(frozen=True, slots=True)
class PlantedTask:
    """What a planted task tells apart."""

    about: str
    """What is told apart, in a sentence."""
    label_names: tuple[str, ...]
    """The classes."""


PLANTED_TASKS: dict[PlantedKind, PlantedTask] = {
    "planted_topic": PlantedTask(
        "topic of a passage, its opening place left out", tuple(topic.name for topic in TOPICS)
    ),
    "planted_polarity": PlantedTask(
        "whether a sentence blames or praises, negation counted", ("blame", "praise")
    ),
    "planted_agreement": PlantedTask(
        "number of the verb that comes next, over the nouns between it and its subject",
        ("singular", "plural"),
    ),
}


@dataclass(frozen=True, slots=True)
class Cue:
    """A name before each text that may tell the class."""

    agreement: float
    """Share of texts whose name is that of their own class."""
    n_classes: int
    """Number of classes, and so of names."""

    def put(self, texts: list[str], labels: Int64[np.ndarray, "n"], seed: int) -> list[str]:
        """Return the texts with a name before each; exactly `round(agreement * n)` agree."""
        rng = np.random.default_rng((seed, len(texts), self.n_classes))
        named = (labels + rng.integers(1, self.n_classes, len(texts))) % self.n_classes
        agreeing = rng.permutation(len(texts))[: round(self.agreement * len(texts))]
        named[agreeing] = labels[agreeing]
        names = NAMES.split()
        return [f"{names[i]} , {text}" for i, text in zip(named.tolist(), texts, strict=True)]


def planted_task(
    name: str,
    *,
    n_train: int = 1000,
    n_val: int = 500,
    n_test: int = 500,
    seed: int = 0,
    language_seed: int = 0,
    shift: float = 1.0,
    cue: float | None = None,
) -> Task:
    """Return a planted task with the parts `train`, `val`, `test` and `ood:shifted`.

    Args:
        name: Which task; see `PLANTED_TASKS`.
        n_train: Texts to train on.
        n_val: Texts to choose on.
        n_test: Texts of each test part.
        seed: Seed of which documents and cues.
        language_seed: Seed of the language, as in a planted corpus.
        shift: How far the twin's habits go from the language's own to `SHIFTED`, in [0, 1]. Its
            words have other frequencies at any shift.
        cue: None puts no cue. Else its strength in [0, 1], from names at random to names that
            always tell the class, in all parts but two more test parts: `ood:cue_random`, where
            it tells nothing, and `ood:cue_reversed`, where it names another class as often as it
            told the own one.

    Raises:
        DataError: An unknown kind, a strength outside [0, 1], or fewer texts than classes.
    """
    kind = _kind(name)
    for setting, value in (("shift", shift), ("cue", cue)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise DataError(f"{kind}: want a {setting} in [0, 1], got {value}")
    task = PLANTED_TASKS[kind]
    n_classes = len(task.label_names)
    if min(n_train, n_val, n_test) < n_classes:
        raise DataError(
            f"{kind}: {min(n_train, n_val, n_test)} texts of {n_classes} classes in a part: want "
            "one each or more"
        )
    taken: set[bytes] = set()
    own = _passages(Language(language_seed), kind, seed)
    twin = _passages(Language(language_seed + 1, _shifted(shift)), kind, seed)
    sizes = {"train": n_train, "val": n_val, "test": n_test}
    drawn = {part: _balanced(own, n, n_classes, taken) for part, n in sizes.items()}
    drawn["ood:shifted"] = _balanced(twin, n_test, n_classes, taken)
    parts = _parts(drawn, own, n_test, n_classes, taken, cue, seed)
    source = f"planted language {language_seed}, documents from {UNSEEN + seed * UNSEEN} on"
    return Task(kind, task.about, "MIT, as this package", source, task.label_names, parts)


def _kind(name: str) -> PlantedKind:
    for kind in PLANTED:
        if kind == name:
            return kind
    raise DataError(f"planted task {name!r} is not known; {nearest(name, PLANTED)}")


def _parts(
    drawn: dict[str, list[Passage]],
    own: Iterator[Passage],
    n_test: int,
    n_classes: int,
    taken: set[bytes],
    strength: float | None,
    seed: int,
) -> dict[str, Labelled]:
    if strength is None:
        return {name: _labelled(passages, None, seed) for name, passages in drawn.items()}
    chance = 1.0 / n_classes
    agreement = chance + strength * (1.0 - chance)
    cues = dict.fromkeys(drawn, Cue(agreement, n_classes))
    cues["ood:cue_random"] = Cue(chance, n_classes)
    cues["ood:cue_reversed"] = Cue(1.0 - agreement, n_classes)
    for name in ("ood:cue_random", "ood:cue_reversed"):
        drawn[name] = _balanced(own, n_test, n_classes, taken)
    return {
        name: _labelled(passages, cues[name], seed + place)
        for place, (name, passages) in enumerate(drawn.items())
    }


def _labelled(passages: list[Passage], cue: Cue | None, seed: int) -> Labelled:
    texts = [text for text, _ in passages]
    labels = np.array([label for _, label in passages], np.int64)
    return Labelled(tuple(texts if cue is None else cue.put(texts, labels, seed)), labels)


def _shifted(shift: float) -> Habits:
    own = Habits()
    return Habits(
        **{
            field.name: (1 - shift) * getattr(own, field.name)
            + shift * getattr(SHIFTED, field.name)
            for field in fields(Habits)
        }
    )


def _balanced(
    passages: Iterator[Passage], n: int, n_classes: int, taken: set[bytes]
) -> list[Passage]:
    """Return the next passages of classes still wanted, none of them taken before."""
    left = [n // n_classes + (label < n % n_classes) for label in range(n_classes)]
    chosen: list[Passage] = []
    for text, label in passages:
        key = text_key(text)
        if left[label] and key not in taken:
            taken.add(key)
            left[label] -= 1
            chosen.append((text, label))
        if len(chosen) == n:
            break
    return chosen


def _passages(language: Language, kind: PlantedKind, seed: int) -> Iterator[Passage]:
    index = UNSEEN + seed * UNSEEN
    find = {
        "planted_topic": _topics,
        "planted_polarity": _judgements,
        "planted_agreement": _awaiting,
    }[kind]
    while True:
        yield from find(language.document(index))
        index += 1


def _topics(document: PlantedDocument) -> Iterator[Passage]:
    """Yield each section from behind its opening "at the PLACE ," on, with its topic."""
    words = document.words
    opened = np.flatnonzero(document.having("word_class.place")[:, 0])
    topics = document.having(*(f"topic.{topic.name}" for topic in TOPICS))
    first, after = _sentences(document)[-1]
    ends = [*(opened[1:] - 2).tolist(), len(words) - (after - first)]
    for place, end in zip(opened.tolist(), ends, strict=True):
        yield " ".join(words[place + 2 : end]), int(topics[place].argmax())


def _judgements(document: PlantedDocument) -> Iterator[Passage]:
    """Yield each sentence that praises more than it blames, or the other way round."""
    words = document.words
    praise, blame = document.having("negation.praise", "negation.blame").T
    for first, after in _sentences(document):
        balance = int(praise[first:after].sum()) - int(blame[first:after].sum())
        if balance:
            yield " ".join(words[first:after]), int(balance > 0)


def _awaiting(document: PlantedDocument) -> Iterator[Passage]:
    """Yield the words from the start of a sentence to a verb apart from its subject."""
    words = document.words
    far, plural = document.having("agreement.far_verb", "agreement.awaiting_plural").T
    starts = np.array([first for first, _ in _sentences(document)])
    for verb in np.flatnonzero(far).tolist():
        first = int(starts[np.searchsorted(starts, verb, side="right") - 1])
        yield " ".join(words[first:verb]), int(plural[verb - 1])


def _sentences(document: PlantedDocument) -> list[tuple[int, int]]:
    starts = np.flatnonzero(document.having("position.sentence_start")[:, 0]).tolist()
    return list(zip(starts, [*starts[1:], len(document.words)], strict=True))
