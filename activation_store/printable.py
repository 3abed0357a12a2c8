"""Text on its way to people: what would drive a terminal is shown instead of sent.

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
