"""Named streams of random numbers: one draw never moves because another one was added.

A stream is seeded by the caller's seed, by what is drawn for (hook, split, unit), and by the number
of its name. So the draws for a unit are the same whichever other units, kinds or scorers are asked
for. Numbers are part of stored results: a new stream takes a new one, an old one keeps its own.
"""

import numpy as np

STREAMS: dict[str, int | None] = {
    # the seed and the name of the hook or split alone
    "units": None,
    "labelled items": None,
    "tokens of a hook": None,
    # kinds of records, by their place in `sampler.KINDS`
    "records top": 0,
    "records quantile": 1,
    "records random": 2,
    "records firing": 3,
    "records near_miss": 4,
    # these two are seeded without a hook and without a unit: never equal to a kind of records
    "known units": 1,
    "court": 67,
    "false explanations": 2,
    "shuffled tokens": 1,
    "explanation of another unit": 7,
    # contrasts hold the name of a split, pairings do not: the two never draw the same numbers
    "contrasts": 11,
    "shuffled pairing": 11,
    "marks in silence": 13,
    "order of judged items": 17,
    "shuffled labels": 19,
    "shuffled classes": 23,
    "probed items": 29,
    "probe controls": 31,
    "intruder places": 37,
    "interval records": 41,
    "steered contexts": 43,
    "random directions": 47,
    "continuations": 53,
    "misplaced intervals": 59,
    "embedding pairing": 61,
    "mixtures of units": 67,
    "side active": 71,
    "side predicted": 73,
    "side random": 79,
}
"""Number of each stream; None adds nothing to the seed."""


def stream(name: str, seed: int, *drawn_for: str | int) -> np.random.Generator:
    """Return the generator of a stream, for a hook, split or unit named in this order.

    >>> stream("contrasts", 0, "hook", "score", 3).integers(100, size=3).tolist()
    [87, 87, 31]
    """
    numbers = [seed]
    for part in drawn_for:
        numbers += part.encode() if isinstance(part, str) else [int(part)]
    number = STREAMS[name]
    return np.random.default_rng(numbers if number is None else [*numbers, number])
