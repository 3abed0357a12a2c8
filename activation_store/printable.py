"""Text and numbers on their way to people: what would drive a terminal is shown, not sent.

Text of a corpus, a model or a file may hold escape sequences (which set titles, fill the clipboard,
move the cursor) and characters that turn lines around. Every verb prints through `printable`, and
every `StoreError` and `LmmonoError` says its message through it.
"""

import re

# control characters but tab and newline; marks that change the direction of text, and other line
# separators (Unicode TR 36, "bidirectional text spoofing"); halves of surrogate pairs
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return text with control and direction characters shown by their number.

    >>> printable("a\x1b]0;title\x07 b\u202ec")
    'a<U+001B>]0;title<U+0007> b<U+202E>c'
    """
    return UNSAFE.sub(lambda match: f"<U+{ord(match.group()):04X}>", text)


_NOISE = 1e-14
"""Below it a number is what rounding left of 0: doubles near 1 are 2.2e-16 apart."""


def number(value: float | int | None, digits: int = 3) -> str:
    """Return a number in three digits, or all before the point; "–" for None and NaN.

    >>> number(0.123456), number(4632.1), number(12345), number(-6.94e-18), number(None)
    ('0.123', '4,632', '12,345', '0', '–')
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, int) or 10**digits <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= _NOISE else "0"
