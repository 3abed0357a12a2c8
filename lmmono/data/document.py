"""One document, the unit of splitting, and how a very long one is handled in pieces."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

PIECE_CHARACTERS = 100_000
"""Length from which a text is handled in pieces, so that memory does not grow with it."""

_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, never cut before it is split."""

    text: str
    """The text as it was read."""
    name: str = ""
    """Where it came from, for people: `file:row`, `file:line`, `planted:17`."""


def pieces(text: str) -> Iterator[str]:
    """Yield a long text in pieces, cut before single blanks between two words.

    Joined, the pieces are the text. Unicode normal forms do not reach over a blank, and GPT-2's
    pattern and splitting at blanks both break there whatever stands around, so normalising or
    tokenizing the pieces gives what the whole would. A text without such blanks stays whole.

    >>> list(pieces("short texts stay whole"))
    ['short texts stay whole']
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        blank = _BETWEEN_WORDS.search(text, start + PIECE_CHARACTERS)
        if blank is None:
            break
        yield text[start : blank.start()]
        start = blank.start()
    yield text[start:]
