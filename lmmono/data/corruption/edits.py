"""Small edits of one word, each of which changes it: typing slips, misread and look-alike letters.

An edit that cannot change a word returns None. Capitals stay capitals, and what is no letter stays.
"""

from collections.abc import Callable, Sequence

import numpy as np

Edit = Callable[[str, np.random.Generator], str | None]
"""Takes a word, returns it changed, or None where it cannot be."""

_ROWS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")

MISREAD: dict[str, tuple[str, ...]] = {
    "a": ("o",),
    "b": ("h", "6"),
    "c": ("e", "("),
    "cl": ("d",),
    "d": ("cl",),
    "e": ("c",),
    "f": ("t",),
    "g": ("q", "9"),
    "h": ("b", "li"),
    "i": ("1", "l"),
    "l": ("1", "i"),
    "m": ("rn", "nn"),
    "n": ("ri", "u"),
    "o": ("0", "c"),
    "q": ("g",),
    "rn": ("m",),
    "s": ("5",),
    "t": ("f", "+"),
    "u": ("ii", "n"),
    "v": ("y",),
    "vv": ("w",),
    "w": ("vv",),
    "y": ("v",),
    "z": ("2",),
    "B": ("8",),
    "D": ("O",),
    "G": ("6",),
    "I": ("l", "1"),
    "O": ("0", "Q"),
    "S": ("5",),
    "Z": ("2",),
}
"""What scanned print is read as, by the letters it is."""

LOOKALIKES: dict[str, str] = {
    "a": "\u0430",
    "c": "\u0441",
    "d": "\u0501",
    "e": "\u0435",
    "h": "\u04bb",
    "i": "\u0456",
    "j": "\u0458",
    "l": "\u04cf",
    "o": "\u043e",
    "p": "\u0440",
    "q": "\u051b",
    "s": "\u0455",
    "v": "\u03bd",
    "w": "\u051d",
    "x": "\u0445",
    "y": "\u0443",
    "A": "\u0391",
    "B": "\u0392",
    "C": "\u0421",
    "E": "\u0395",
    "H": "\u0397",
    "I": "\u0399",
    "K": "\u039a",
    "M": "\u039c",
    "N": "\u039d",
    "O": "\u039f",
    "P": "\u03a1",
    "S": "\u0405",
    "T": "\u03a4",
    "X": "\u03a7",
    "Y": "\u03a5",
    "Z": "\u0396",
}
"""Cyrillic and Greek letters that look like a Latin one (Unicode's confusables)."""


def _neighbours() -> dict[str, str]:
    """Return the keys around each letter on an American keyboard, whose rows are staggered."""
    places = {
        key: (row, place + 0.5 * row)
        for row, keys in enumerate(_ROWS)
        for place, key in enumerate(keys)
    }
    return {
        key: "".join(
            other
            for other, (other_row, other_place) in places.items()
            if other != key
            and abs(other_row - row) <= 1
            and abs(other_place - place) <= 1.0
            and other.isalpha()
        )
        for key, (row, place) in places.items()
        if key.isalpha()
    }


NEIGHBOURS: dict[str, str] = _neighbours()
"""Letters beside each letter on the keyboard."""


def press_neighbour(word: str, rng: np.random.Generator) -> str | None:
    """Return the word with one letter replaced by one beside it on the keyboard."""
    place = _pick([i for i, letter in enumerate(word) if letter.lower() in NEIGHBOURS], rng)
    return None if place is None else _put(word, place, 1, _beside(word[place], rng))


def insert_neighbour(word: str, rng: np.random.Generator) -> str | None:
    """Return the word with a letter from beside another one on the keyboard after that one."""
    place = _pick([i for i, letter in enumerate(word) if letter.lower() in NEIGHBOURS], rng)
    return None if place is None else _put(word, place + 1, 0, _beside(word[place], rng))


def swap(word: str, rng: np.random.Generator) -> str | None:
    """Return the word with two letters in a row, that differ, in the other order."""
    pairs = [
        i
        for i in range(len(word) - 1)
        if word[i] != word[i + 1] and word[i].isalpha() and word[i + 1].isalpha()
    ]
    place = _pick(pairs, rng)
    return None if place is None else _put(word, place, 2, word[place + 1] + word[place])


def drop(word: str, rng: np.random.Generator) -> str | None:
    """Return the word without one of its letters; a word of one letter keeps it."""
    letters = [i for i, letter in enumerate(word) if letter.isalpha()]
    place = _pick(letters if len(letters) > 1 else [], rng)
    return None if place is None else _put(word, place, 1, "")


def typo(word: str, rng: np.random.Generator) -> str | None:
    """Return the word with one slip: a neighbouring key, a swap, a letter lost or one too many."""
    return _first(word, (press_neighbour, swap, drop, insert_neighbour), rng)


def misread(word: str, rng: np.random.Generator) -> str | None:
    """Return the word with one letter, or two, read as scanning software misreads them."""
    misreadable = [
        (i, letters)
        for letters in MISREAD
        for i in range(len(word) - len(letters) + 1)
        if word.startswith(letters, i)
    ]
    if not misreadable:
        return None
    place, letters = misreadable[int(rng.integers(len(misreadable)))]
    read = MISREAD[letters]
    return _put(word, place, len(letters), read[int(rng.integers(len(read)))])


def lookalike(word: str, rng: np.random.Generator) -> str | None:
    """Return the word with one letter replaced by one of another alphabet that looks the same."""
    place = _pick([i for i, letter in enumerate(word) if letter in LOOKALIKES], rng)
    return None if place is None else _put(word, place, 1, LOOKALIKES[word[place]])


def recase(word: str, rng: np.random.Generator) -> str | None:
    """Return the word in capitals, in small letters, with a capital, or with its case swapped."""
    forms = [word.upper(), word.lower(), word.capitalize(), word.swapcase()]
    others = [form for form in dict.fromkeys(forms) if form != word]
    return others[int(rng.integers(len(others)))] if others else None


def repunctuate(word: str, rng: np.random.Generator) -> str | None:
    """Return the word without the marks at its end, or with one where it has none."""
    bare = word.rstrip(".,;:!?")
    if bare and bare != word:
        return bare
    if not bare:
        others = [mark for mark in ".,;:!?" if mark != word]
        return others[int(rng.integers(len(others)))]
    return word + ",.!?;:"[int(rng.integers(6))]


def _first(word: str, edits: Sequence[Edit], rng: np.random.Generator) -> str | None:
    """Return what the first edit that changes the word makes of it, tried in drawn order."""
    for i in rng.permutation(len(edits)).tolist():
        changed = edits[i](word, rng)
        if changed is not None:
            return changed
    return None


def _beside(letter: str, rng: np.random.Generator) -> str:
    keys = NEIGHBOURS[letter.lower()]
    pressed = keys[int(rng.integers(len(keys)))]
    return pressed.upper() if letter.isupper() else pressed


def _pick(places: list[int], rng: np.random.Generator) -> int | None:
    return places[int(rng.integers(len(places)))] if places else None


def _put(word: str, place: int, length: int, letters: str) -> str:
    return word[:place] + letters + word[place + length :]
