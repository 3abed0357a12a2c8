"""Whether text noise leaves the label alone, told from pairs of texts that differ in little else.

Both texts of a contrast pair say nearly the same and are of different classes, so the words that
one has and the other lacks decide the class. Noise that preserves labels hits those words no more
often than others, and leaves a text nearer to itself than to its partner. Where a classifier is
given, it tells whether the pairs can still be told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
from jaxtyping import Int64

from lmmono.data.corruption.edits import edit_distance
from lmmono.data.corruption.synonyms import Synonyms
from lmmono.data.corruption.texts import corrupt_texts
from lmmono.data.tasks.task import NO_PARTNER, Labelled
from lmmono.errors import DataError
from lmmono.suites.attacks import Predict


@dataclass(frozen=True, slots=True)
class Preservation:
    """What one kind of noise did to the contrast pairs at one severity."""

    kind: str
    """The noise."""
    severity: int
    """Its severity."""
    n_texts: int
    """Texts with a partner."""
    changed_fraction: float
    """Share of all words that the noise changed or lost."""
    decisive_changed_fraction: float
    """Share of the words that decide the class that it changed or lost; NaN where none does."""
    crossed_fraction: float
    """Share of texts that are no nearer to themselves than to their partner, by words edited."""
    became_partner_fraction: float
    """Share of texts that became their partner, so that the label is certainly wrong."""
    told_apart_fraction: float
    """Share of pairs of which the classifier gets both right under the noise; NaN without one."""
    told_apart_clean_fraction: float
    """The same share without noise."""

    @property
    def selectivity(self) -> float:
        """How much more often a word that decides is changed than a word at all; 1 is blind.

        NaN where the noise changes no word, as white space does.
        """
        if not self.changed_fraction:
            return float("nan")
        return self.decisive_changed_fraction / self.changed_fraction


@dataclass(frozen=True, slots=True)
class _Pair:
    """A text and its partner, as words."""

    words: list[str]
    partner: list[str]
    decisive: frozenset[int]


def audit_preservation(
    part: Labelled,
    kinds: Sequence[str],
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    seed: int,
    synonyms: Synonyms | None = None,
    predict: Predict | None = None,
) -> list[Preservation]:
    """Return what each kind of noise does to contrast pairs at each severity.

    Args:
        part: Texts with `pairs`, such as the part `ood:contrast` of `imdb_counterfactual`.
        kinds: Kinds of noise, see `lmmono.data.corruption.texts`.
        severities: Severities from 1 on.
        seed: Seed of the noise.
        synonyms: For `synonyms`.
        predict: A classifier trained on clean texts.

    Raises:
        DataError: The part has no pairs, or pairs of one class.
    """
    paired = _paired(part)
    texts, partners = paired.texts, _partners(paired)
    pairs = [_pair(texts[i], texts[j]) for i, j in enumerate(partners.tolist())]
    clean = _told_apart(predict, list(texts), paired, partners)
    found: list[Preservation] = []
    for kind in kinds:
        for severity in severities:
            made = corrupt_texts(texts, kind, severity, seed=seed, synonyms=synonyms)
            told = _told_apart(predict, made, paired, partners)
            found.append(_measured(kind, severity, made, pairs, (told, clean)))
    return found


def _measured(
    kind: str, severity: int, made: list[str], pairs: list[_Pair], told: tuple[float, float]
) -> Preservation:
    n_words = n_changed = n_decisive = n_decisive_changed = crossed = became = 0
    for text, pair in zip(made, pairs, strict=True):
        words = text.split()
        changed = _without_match(pair.words, words)
        n_words += len(pair.words)
        n_changed += len(changed)
        n_decisive += len(pair.decisive)
        n_decisive_changed += len(changed & pair.decisive)
        became += words == pair.partner
        crossed += edit_distance(words, pair.partner) <= edit_distance(words, pair.words)
    return Preservation(
        kind,
        severity,
        len(pairs),
        n_changed / n_words,
        n_decisive_changed / n_decisive if n_decisive else float("nan"),
        crossed / len(pairs),
        became / len(pairs),
        *told,
    )


def _paired(part: Labelled) -> Labelled:
    if part.pairs is None or (part.pairs == NO_PARTNER).all():
        raise DataError("the audit needs contrast pairs: this part has none")
    paired = part.take(np.flatnonzero(part.pairs != NO_PARTNER).astype(np.int64))
    alike = int((paired.labels == paired.labels[_partners(paired)]).sum())
    if alike:
        raise DataError(
            f"{alike} of {len(paired)} texts are of their partner's class: want pairs that differ"
        )
    return paired


def _partners(part: Labelled) -> Int64[np.ndarray, "n"]:
    assert part.pairs is not None
    return part.pairs


def _pair(text: str, partner: str) -> _Pair:
    words, others = text.split(), partner.split()
    return _Pair(words, others, frozenset(_without_match(words, others)))


def _without_match(words: list[str], others: list[str]) -> set[int]:
    """Return which words have no counterpart in the other text, when both are aligned."""
    matcher = SequenceMatcher(None, words, others, autojunk=False)
    unmatched = set(range(len(words)))
    for block in matcher.get_matching_blocks():
        unmatched -= set(range(block.a, block.a + block.size))
    return unmatched


def _told_apart(
    predict: Predict | None, texts: list[str], part: Labelled, partners: Int64[np.ndarray, "n"]
) -> float:
    if predict is None:
        return float("nan")
    right = np.asarray(predict(texts)).argmax(axis=1) == part.labels
    return float((right & right[partners]).mean())
