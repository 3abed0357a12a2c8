"""Noise in texts, by kind and severity 1 to 5; severity 0 gives the texts back as they are.

What a text becomes depends on the text, the kind, the severity and the seed, on nothing else: the
same text meets the same noise in any set, and a higher severity makes the edits of a lower one and
more. How many words are edited is the severity's share of the text's words, rounded up or down so
that the share is kept on average over short texts too.

The edits are our own. textattack does not install beside the pinned versions (the build of one of
its dependencies fails), and nlpaug, without a release since 2022, draws from the process' global
random state: with neither could a mask be the same for every family, or a count be exact.
"""

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from lmmono.data.corruption.edits import Edit
from lmmono.data.corruption.synonyms import Synonyms, wordnet_synonyms
from lmmono.errors import DataError
from lmmono.registry.lookup import load
from lmmono.registry.suites import TextCorruption, find_corruption

SEVERITIES = (0, 1, 2, 3, 4, 5)

_GAP = re.compile(r"(\s+)")
_GAPS = ("  ", "\n", "\t", " <br /> ", "\n\n", " - ", " * ", "\u00a0")

Pieces = list[str]
"""Words at even places, the white space between them at odd ones."""

Change = Callable[[Pieces, int, np.random.Generator], bool]
"""Edits the pieces at one place, in place; says whether it could."""


def corrupt_texts(
    texts: Sequence[str],
    kind: str,
    severity: int,
    *,
    seed: int,
    synonyms: Synonyms | None = None,
    require_change: bool = True,
) -> list[str]:
    """Return the texts with noise of one kind.

    Args:
        texts: The texts.
        kind: Which noise, see `lmmono.registry.suites.TEXT_CORRUPTIONS`.
        severity: 1, mild, to 5, strong; 0 returns the texts as they are.
        seed: Seed of which words are edited and how.
        synonyms: For `synonyms`: what may stand for a word; None takes WordNet's.
        require_change: Whether noise that changes none of the texts is an error; a few short texts
            of a training batch may have no place for it.

    Raises:
        DataError: An unknown kind or severity, noise that would change none of the texts, or
            synonyms that are not there.
    """
    corruption = find_corruption(kind)
    if severity not in SEVERITIES:
        raise DataError(f"{kind}: want a severity of 0 to 5, got {severity}")
    if severity == 0 or not texts:
        return list(texts)
    if corruption.home is None:
        change = _synonym(synonyms or wordnet_synonyms())
    else:
        one = load(corruption.home)
        change = _edit(one) if corruption.takes == "word" else one
    noisy = [_corrupt(text, corruption, change, severity, seed) for text in texts]
    n_changed = sum(new != old for new, old in zip(noisy, texts, strict=True))
    if not n_changed and require_change:
        raise DataError(
            f"{kind} of severity {severity} changes none of the {len(texts)} texts: they have no "
            "place for it, or too few words; give more or longer texts, or a higher severity"
        )
    return noisy


def pieces_of(text: str) -> Pieces:
    r"""Return the words of a text at even places and the white space between them at odd ones.

    >>> pieces_of("a  cat\n")
    ['a', '  ', 'cat', '\n', '']
    """
    return _GAP.split(text)


def _corrupt(
    text: str, corruption: TextCorruption, change: Change, severity: int, seed: int
) -> str:
    rng = np.random.default_rng((seed, *_numbers(corruption.name), *_numbers(text)))
    pieces = pieces_of(text)
    first = 0 if corruption.places == "words" else 1
    places = [i for i in range(first, len(pieces), 2) if pieces[i]]
    wanted = corruption.count(severity, len(places), rng.random())
    for place in rng.permutation(len(places)).tolist():
        if not wanted:
            break
        wanted -= change(pieces, places[place], rng)
    return "".join(pieces)


def _numbers(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def _edit(edit: Edit) -> Change:
    def change(pieces: Pieces, place: int, rng: np.random.Generator) -> bool:
        changed = edit(pieces[place], rng)
        assert changed != pieces[place], f"{changed!r} was not edited"
        pieces[place] = pieces[place] if changed is None else changed
        return changed is not None

    return change


def _synonym(synonyms: Synonyms) -> Change:
    def change(pieces: Pieces, place: int, rng: np.random.Generator) -> bool:
        others = standing_in(pieces[place], synonyms)
        if not others:
            return False
        pieces[place] = others[int(rng.integers(len(others)))]
        return True

    return change


def standing_in(word: str, synonyms: Synonyms) -> list[str]:
    """Return what may stand for a word as written: its marks kept, and its capitals.

    >>> standing_in("Good,", lambda word: ("fine",) if word == "good" else ())
    ['Fine,']
    """
    start = next((i for i, letter in enumerate(word) if letter.isalnum()), len(word))
    end = len(word) - next((i for i, mark in enumerate(reversed(word)) if mark.isalnum()), 0)
    core = word[start:end]
    if not core:
        return []
    others = [_cased(other, core) for other in synonyms(core.lower())]
    return [word[:start] + other + word[end:] for other in dict.fromkeys(others) if other != core]


def _cased(word: str, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like[:1].isupper() else word


def drop_word(pieces: Pieces, place: int, rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Take a word out with the gap next to it, unless it is the last one."""
    if sum(bool(word) for word in pieces[::2]) < 2:  # a text stays a text
        return False
    pieces[place] = ""
    gap = place + 1 if place + 1 < len(pieces) else place - 1
    pieces[gap] = ""
    return True


def swap_words(pieces: Pieces, place: int, rng: np.random.Generator) -> bool:  # noqa: ARG001
    """Swap a word with the next one."""
    other = place + 2
    if other >= len(pieces) or not pieces[other] or pieces[place] == pieces[other]:
        return False
    pieces[place], pieces[other] = pieces[other], pieces[place]
    return True


def widen_gap(pieces: Pieces, place: int, rng: np.random.Generator) -> bool:
    """Put another kind of gap in place of one."""
    others = [gap for gap in _GAPS if gap != pieces[place]]
    pieces[place] = others[int(rng.integers(len(others)))]
    return True
