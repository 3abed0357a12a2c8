"""One document: the unit of splitting."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text, never cut before it is split."""

    text: str
    """The text as it was read."""
    name: str = ""
    """Where it came from, for people: `file:row`, `file:line`, `planted:17`."""
