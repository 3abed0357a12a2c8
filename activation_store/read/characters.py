"""Characters whose bytes are several tokens: joined before they are decoded, where text is shown.

Byte-level vocabularies cut most letters of most scripts, and all emoji, into tokens that are no
text alone; a vocabulary shows such bytes as `<0xE5>`. The SQL macro `whole_text` of `views.sql`
does the same for text.
"""

import re
from collections.abc import Sequence

_BYTE = re.compile(r"(<0x[0-9A-F]{2}>)")


def whole_characters(tokens: Sequence[str], peak: int | None = None) -> list[str]:
    """Return the tokens of a text as they are to be shown: joined, they read as the text.

    A character of several tokens stands at the first of them, or at the token `peak` where that is
    one of them, so that a mark around the peak's text marks it; the others' share of it is empty.
    Bytes that make no character, as where a window cuts one, stay as they are.

    >>> whole_characters(["a", "<0xE5><0xAE>", "<0xB6>", " b"])
    ['a', '家', '', ' b']
    >>> whole_characters(["a", "<0xE5><0xAE>", "<0xB6>", "<0xE5>"], peak=2)
    ['a', '', '家', '<0xE5>']
    """
    shown = [""] * len(tokens)
    run: list[tuple[int, int]] = []  # bytes that follow each other, each with its token

    def flush() -> None:
        at = 0
        while at < len(run):
            size = _character_size(bytes(byte for _, byte in run[at : at + 4]))
            owners = [owner for owner, _ in run[at : at + max(size, 1)]]
            if size:
                text = bytes(byte for _, byte in run[at : at + size]).decode()
                shown[peak if peak in owners else owners[0]] += text
            else:
                shown[owners[0]] += f"<0x{run[at][1]:02X}>"
            at += len(owners)
        run.clear()

    for i, token in enumerate(tokens):
        if "<0x" not in token and not run:
            shown[i] = token
            continue
        for piece in _BYTE.split(token):
            if _BYTE.fullmatch(piece):
                run.append((i, int(piece[3:5], 16)))
            elif piece:
                flush()
                shown[i] += piece
    flush()
    return shown


def _character_size(data: bytes) -> int:
    """Return how many bytes the first character of UTF-8 takes; 0 where they begin none."""
    for size in range(1, len(data) + 1):
        try:
            data[:size].decode()
        except UnicodeDecodeError:
            continue
        return size
    return 0
