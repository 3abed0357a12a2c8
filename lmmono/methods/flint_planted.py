"""Whether attributes are the ones that were planted: those that the word alone decides.

A planted task's classes are told by some words: words of one topic, adjectives of praise and blame
with the negators, nouns by number. An interpreter that found the attributes behind the classes has
one for each.
"""

from functools import cache

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from lmmono.data.planted import Language
from lmmono.data.planted.lexicon import TOPICS, Number, Word, WordClass
from lmmono.data.tokenizing import exact_backend
from lmmono.dictionaries.recovery import RecoveryReport, recovery_of
from lmmono.methods.flint import Flint, Interpretation
from lmmono.methods.flint_measures import matched_on_halves
from lmmono.methods.flint_pictures import untrained_interpreter
from lmmono.methods.flint_report import FlintValue
from lmmono.registry.tasks import PLANTED

N_RESAMPLES = 200
"""Redraws of the texts behind intervals; enough for two digits."""


@cache
def word_attributes(task: str) -> tuple[tuple[str, ...], dict[str, tuple[bool, ...]]]:
    """Return the names of a planted task's attributes, and which each word has."""
    assert task in PLANTED
    words = Language(0).lexicon.words
    match task:
        case "planted_topic":
            names = tuple(f"{topic.name}_word" for topic in TOPICS)
            return names, {
                w.form: tuple(w.topics == (i,) for i in range(len(TOPICS))) for w in words
            }
        case "planted_polarity":
            return ("positive", "negative", "negator"), {w.form: _polarity(w) for w in words}
        case _:
            numbers = (Number.SINGULAR, Number.PLURAL)
            return ("noun_singular", "noun_plural"), {
                w.form: tuple(w.word_class == WordClass.NOUN and w.number == n for n in numbers)
                for w in words
            }


def _polarity(word: Word) -> tuple[bool, ...]:
    return word.polarity == 1, word.polarity == -1, word.word_class == WordClass.NEGATOR


def planted_truth(task: str, texts: list[str], flint: Flint) -> list[Bool[ndarray, "_ attribute"]]:
    """Return which planted attributes each token of each text has, the one before it none."""
    names, of_word = word_attributes(task)
    backend = exact_backend(flint.classifier.reader.tokenizer)
    none = (False,) * len(names)
    truths: list[ndarray] = []
    for text in texts:
        words = text.split(" ")
        of_words = np.array([of_word.get(word, none) for word in words], bool)
        ends = np.cumsum([len(word) + 1 for word in words])
        offsets = np.array(backend.encode(text, add_special_tokens=False).offsets, np.int64)
        last = np.searchsorted(ends, offsets[:, 1] - 1, side="right")  # the word of its last letter
        truths.append(np.concatenate([np.zeros((1, len(names)), bool), of_words[last]]))
    return truths


def planted_values(
    task: str, texts: list[str], flint: Flint, read: Interpretation, *, seed: int = 0
) -> list[FlintValue]:
    """Return how well attributes match the planted ones, beside controls.

    `mcc` is over tokens, `mcc_texts` over texts: of an attribute with the share of a text's tokens
    that have the planted one. Matches and signs are chosen on half of the texts and measured on the
    other half.
    """
    truths = planted_truth(task, texts, flint)
    recovered = _recovered(read, truths, seed)
    blank = Flint(mode=flint.mode)
    blank.settings, blank.hooks = flint.settings, flint.hooks
    blank._classifier = flint.classifier  # pyright: ignore[reportPrivateUsage]
    blank._interpreter = untrained_interpreter(flint, seed=seed)  # pyright: ignore[reportPrivateUsage]
    untrained = _recovered(blank.interpret(read.ids), truths, seed)
    shares: Float[ndarray, "n attribute"] = np.stack([truth[1:].mean(axis=0) for truth in truths])
    n = len(texts)
    return [
        FlintValue("mcc", recovered.code.mcc.value, n),
        FlintValue("mcc_shuffled", recovered.controls["shuffled_truth"].mcc.value, n),
        FlintValue("mcc_untrained", untrained.code.mcc.value, n),
        FlintValue("mcc_texts", matched_on_halves(read.phi, shares, seed=seed), n),
    ]


def _recovered(read: Interpretation, truths: list[ndarray], seed: int) -> RecoveryReport:
    lengths = [min(len(a), len(t)) for a, t in zip(read.acts, truths, strict=True)]  # texts are cut
    acts = [a[1:n] for a, n in zip(read.acts, lengths, strict=True)]
    here = [t[1:n] for t, n in zip(truths, lengths, strict=True)]
    documents = np.repeat(np.arange(len(lengths)), np.array(lengths) - 1)
    return recovery_of(
        np.concatenate(acts),
        np.concatenate(here),
        documents,
        seed=seed,
        n_resamples=N_RESAMPLES,
    )
