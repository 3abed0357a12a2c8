"""To which split a document belongs: a pure function of its text, drawn before any other choice.

Because nothing else enters, an explanation can never see a document that scores it: two copies of
one text fall together wherever they come from, in whatever order, in whatever corpus.
"""

import hashlib
import unicodedata

from lmmono.data.document import pieces
from lmmono.recipe.sections import Splits
from lmmono.types import Split


def normalised(text: str) -> str:
    r"""Return the text that two copies share: NFKC, case folded, runs of white space as one blank.

    >>> normalised("  The\tCAT\n sat ")
    'the cat sat'
    """
    words = (unicodedata.normalize("NFKC", piece).casefold().split() for piece in pieces(text))
    return " ".join(" ".join(part) for part in words)


def split_of(text: str, splits: Splits) -> Split:
    """Return the split of a document, the same for equal normalised text.

    The held-out splits lie at the low end, in the order val, explain, score, so that changing a
    later fraction moves no document between the earlier ones.

    >>> split_of("The cat sat.", Splits()) == split_of(" the cat  SAT.", Splits())
    True
    """
    digest = hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    upper = 0.0
    held_out: tuple[tuple[Split, float], ...] = (
        ("val", splits.val_fraction),
        ("explain", splits.explain_fraction),
        ("score", splits.score_fraction),
    )
    for split, fraction in held_out:
        upper += fraction
        if position < upper:
            return split
    return "train"
