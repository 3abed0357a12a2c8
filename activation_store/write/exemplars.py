"""Exemplars: the token positions that stand for a unit, chosen in one pass.

Three choices, each the same for any grouping of the tokens into batches, commits and ranks:

- top: the largest activations above the threshold, one per document and one per text: of copies
  of a text, such as a page that was crawled many times, one stays. The earlier of equals wins.
- random: a uniform draw without replacement over all tokens with a finite activation.
- firing: the same over the tokens above the threshold. Ranked by activation and cut into
  `QUANTILE_BINS` parts of equal count, it gives the quantile exemplars: bin b stands for the b-th
  tenth of the unit's activations.

A draw keeps the k tokens with the smallest priorities, which depend on the seed, the unit, and the
tile and its tokens only. Hashing every (unit, token) would cost as much as the rest of the
capture, so the priorities of all tokens of one tile are drawn together, smallest first, as the
order statistics of n exponentials (A. Renyi, 1953) at random places; nearly always the first is
too large already.
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt16, UInt64

from activation_store.compiled import compiled

QUANTILE_BINS = 10  # `export_openai` writes tenths
DRAWS = 3
"""Version of the draws; a capture begun with another one cannot be resumed."""


TOP_SPARE = 2
"""Times `top_k` documents that are kept: copies of a text are dropped when the table is written.

Dropping them earlier would let the order of the tokens decide which stay: a document's best token
may come to be another one, of another text.
"""

TEXT_REACH = 8
"""Two exemplars are of one text where so many tokens before and after their own are the same."""


class Top(NamedTuple):
    """The best token of each of the best documents per unit, in no order."""

    act: Float32[np.ndarray, "units k"]
    seq: Int32[np.ndarray, "units k"]
    pos: UInt16[np.ndarray, "units k"]
    doc: Int32[np.ndarray, "units k"]
    text: UInt64[np.ndarray, "units k"]
    """Hash of the tokens around it, `text_key`."""
    size: Int64[np.ndarray, " units"]
    worst: Int64[np.ndarray, " units"]
    """Place of the entry that goes next, once the unit's list is full."""
    gate: Float32[np.ndarray, " units"]
    """Activation below which nothing can enter; -inf while the list is not full."""


class TokenSample(NamedTuple):
    """A uniform sample of tokens per unit, in no order."""

    key: Float64[np.ndarray, "units k"]
    """Priority, exponentially distributed with mean 1; the smallest stay."""
    act: Float32[np.ndarray, "units k"]
    seq: Int32[np.ndarray, "units k"]
    pos: UInt16[np.ndarray, "units k"]
    doc: Int32[np.ndarray, "units k"]
    size: Int64[np.ndarray, " units"]
    worst: Int64[np.ndarray, " units"]
    gate: Float64[np.ndarray, " units"]
    """Priority from which on nothing can enter; inf while the list is not full."""
    salt: UInt64[np.ndarray, " units"]
    """Hash of seed, purpose and unit."""


def new_top(n_units: int, k: int) -> Top:
    """Return lists that hold nothing yet and at most k documents per unit; k = 0 keeps none."""
    return Top(
        act=np.zeros((n_units, k), np.float32),
        seq=np.zeros((n_units, k), np.int32),
        pos=np.zeros((n_units, k), np.uint16),
        doc=np.zeros((n_units, k), np.int32),
        text=np.zeros((n_units, k), np.uint64),
        size=np.zeros(n_units, np.int64),
        worst=np.zeros(n_units, np.int64),
        gate=np.full(n_units, -np.inf if k else np.inf, np.float32),
    )


def new_sample(units: Int64[np.ndarray, " units"], k: int, seed: int, purpose: int) -> TokenSample:
    """Return samples of nothing yet and of at most k tokens per unit.

    Draws of one seed for different purposes are independent, and so are those of different units.
    """
    start = np.uint64((seed * 0x9E3779B1 + purpose) & 0xFFFFFFFFFFFFFFFF)
    salt = _mixed(_mixed(np.full(len(units), start)) + units.astype(np.uint64))
    n = len(units)
    return TokenSample(
        key=np.zeros((n, k)),
        act=np.zeros((n, k), np.float32),
        seq=np.zeros((n, k), np.int32),
        pos=np.zeros((n, k), np.uint16),
        doc=np.zeros((n, k), np.int32),
        size=np.zeros(n, np.int64),
        worst=np.zeros(n, np.int64),
        gate=np.full(n, np.inf if k else 0.0),
        salt=salt,
    )


@compiled
@no_type_check
def mix(z: np.uint64) -> np.uint64:
    """Return a 64-bit hash: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
@no_type_check
def _mixed(values: np.ndarray) -> np.ndarray:
    out = np.empty_like(values)
    for i in range(values.shape[0]):
        out[i] = mix(values[i])
    return out


@compiled
@no_type_check
def position_key(seq: int, pos: int) -> np.uint64:
    """Return the number of a position, the same in any batch."""
    return (np.uint64(seq) << np.uint64(16)) | np.uint64(pos)


@compiled
@no_type_check
def text_key(
    tokens: Int32[np.ndarray, " rows"],
    docs: Int32[np.ndarray, " rows"],
    first: int,
    last: int,
    at: int,
) -> np.uint64:
    """Return a hash of the tokens around row `at`: of its document, within rows first..last-1."""
    key = np.uint64(0)
    for i in range(max(first, at - TEXT_REACH), min(last, at + TEXT_REACH + 1)):
        if docs[i] == docs[at]:
            # the token's place is part of it, so that a text at its beginning is another one
            key = mix(key ^ position_key(tokens[i], i - at + TEXT_REACH))
    return key


@compiled
@no_type_check
def offer_top(top: Top, u: int, act: float, seq: int, pos: int, doc: int, text: np.uint64) -> None:
    """Let one token into the list of unit u if it belongs there; exact for tokens in any order."""
    k = top.act.shape[1]
    n = top.size[u]
    docs, slot = top.doc[u], np.uint64(0)
    # a document is listed once: `or` of what matches, which is compiled to vector instructions
    for i in range(np.uint64(n)):
        slot |= i + np.uint64(1) if docs[i] == doc else np.uint64(0)
    place = np.int64(slot) - 1
    if place < 0 and n < k:
        place = n
        top.size[u] = n + 1
    else:
        if place < 0:
            place = top.worst[u]
        if not _ahead(act, seq, pos, top, u, place):
            return
    top.act[u, place] = act
    top.seq[u, place] = seq
    top.pos[u, place] = pos
    top.doc[u, place] = doc
    top.text[u, place] = text
    if top.size[u] == k:
        worst = _worst(top, u)
        top.worst[u] = worst
        top.gate[u] = top.act[u, worst]


@compiled
@no_type_check
def _worst(top: Top, u: int) -> int:
    """Return the place of the entry of a full list that ranks last."""
    k, acts, one = np.uint64(top.act.shape[1]), top.act[u], np.uint64(1)
    # two least numbers side by side: each waits for the one before in its own half only
    a, b, at_a, at_b = acts[0], np.float32(np.inf), np.uint64(0), np.uint64(0)
    for i in range(one, k - one, np.uint64(2)):
        x, y = acts[i], acts[i + one]
        at_a, a = (i, x) if x < a else (at_a, a)
        at_b, b = (i + one, y) if y < b else (at_b, b)
    if k % np.uint64(2) == 0 and acts[k - one] < a:
        at_a, a = k - one, acts[k - one]
    worst, least = (at_a, a) if a < b else (at_b, b)
    n_least = np.uint64(0)
    for i in range(k):
        n_least += np.uint64(acts[i] == least)
    if n_least > 1:
        for i in range(k):
            if acts[i] == least and _position(top, u, i) > _position(top, u, worst):
                worst = i
    return np.int64(worst)


@compiled
@no_type_check
def _position(top: Top, u: int, i: int) -> np.uint64:
    return position_key(top.seq[u, i], np.int64(top.pos[u, i]))


@compiled
@no_type_check
def _ahead(act: float, seq: int, pos: int, top: Top, u: int, i: int) -> bool:
    """Tell whether a token ranks before entry i: larger, or as large and earlier."""
    if act != top.act[u, i]:
        return act > top.act[u, i]
    return position_key(seq, pos) < _position(top, u, i)


@compiled
@no_type_check
def offer_sample(
    sample: TokenSample, u: int, key: float, act: float, seq: int, pos: int, doc: int
) -> None:
    """Let one token into the sample of unit u if its priority is small enough."""
    k = sample.act.shape[1]
    n = sample.size[u]
    if k == 0 or (n == k and key >= sample.gate[u]):
        return
    place = n if n < k else sample.worst[u]
    sample.key[u, place] = key
    sample.act[u, place] = act
    sample.seq[u, place] = seq
    sample.pos[u, place] = pos
    sample.doc[u, place] = doc
    sample.size[u] = n = min(n + 1, k)
    if n == k:
        keys, worst, gate = sample.key[u], np.uint64(0), -np.inf
        # unsigned: numba checks a signed index for one that counts from the end
        for i in range(np.uint64(k)):
            if keys[i] > gate:
                worst, gate = i, keys[i]
        sample.worst[u], sample.gate[u] = worst, gate


@compiled
@no_type_check
def fraction(h: np.uint64) -> float:
    """Return the hash as a number in [0, 1)."""
    return np.float64(h >> np.uint64(11)) * 2.0**-53


@compiled
@no_type_check
def is_drawn(salt: np.uint64, gate: float, tile_key: np.uint64, n: int) -> bool:
    """Tell whether the smallest of n priorities may enter; false means that none does.

    The smallest of n exponentials is -log(1 - h) / n for a uniform h, which is at least h / n.
    """
    return fraction(mix(salt ^ tile_key)) < np.float64(n) * gate


@compiled
@no_type_check
def draw_tile(
    sample: TokenSample,
    u: int,
    tile_key: np.uint64,
    at: UInt16[np.ndarray, " n"],
    acts: Float32[np.ndarray, "tokens units"],
    column: int,
    used: np.ndarray,
    seq: int,
    pos: int,
    docs: Int32[np.ndarray, " tokens"],
) -> None:
    """Offer n tokens of one tile to the sample of unit u, in the order of their priorities.

    `at` holds the places of the tokens in the tile, a column of `acts` the unit's activations;
    `used` is scratch of at least the same length. Few tokens are drawn, so nothing is copied.
    """
    n = at.shape[0]
    used[:n] = False
    state = sample.salt[u] ^ tile_key
    key = 0.0
    for i in range(n):
        key -= np.log(1.0 - fraction(mix(state))) / (n - i)
        if sample.size[u] == sample.act.shape[1] and key >= sample.gate[u]:
            return
        k = 0
        while True:
            state = mix(state)
            k = np.int64(fraction(mix(state ^ np.uint64(1))) * n)
            if not used[k]:
                break
        used[k] = True
        state = mix(state)
        act = acts[at[k], column]
        if np.isfinite(act):
            offer_sample(sample, u, key, act, seq, pos + at[k], docs[at[k]])


@compiled
@no_type_check
def merge_tops(into: Top, other: Top) -> None:
    """Take the lists of other tokens of the same units into `into`."""
    for u in range(other.size.shape[0]):
        for i in range(other.size[u]):
            # int64, as the kernel has it: `offer_top` is compiled once
            seq, pos, doc = other.seq[u, i], np.int64(other.pos[u, i]), other.doc[u, i]
            offer_top(into, u, other.act[u, i], seq, pos, doc, other.text[u, i])


@compiled
@no_type_check
def merge_samples(into: TokenSample, other: TokenSample) -> None:
    """Take the samples of other tokens of the same units into `into`."""
    for u in range(other.size.shape[0]):
        for i in range(other.size[u]):
            offer_sample(
                into,
                u,
                other.key[u, i],
                other.act[u, i],
                other.seq[u, i],
                np.int64(other.pos[u, i]),
                other.doc[u, i],
            )


class ChosenTokens(NamedTuple):
    """Exemplars of one kind for all units of a hook, by unit and rank."""

    place: Int64[np.ndarray, " n"]
    """Place of the unit among those captured."""
    rank: Int32[np.ndarray, " n"]
    """Order within the unit, 1 is first."""
    bin: Int32[np.ndarray, " n"] | None
    seq: Int32[np.ndarray, " n"]
    pos: UInt16[np.ndarray, " n"]
    doc: Int32[np.ndarray, " n"]
    act: Float32[np.ndarray, " n"]


def top_exemplars(top: Top, k: int) -> ChosenTokens:
    """Return up to k exemplars per unit, each of another text, the largest first."""
    order, is_filled = _order(top, -top.act)
    ranked = _ordered(top, order, is_filled)
    text = np.take_along_axis(top.text, order, axis=1)[is_filled]
    # of each text of a unit the first by rank
    by_text = np.lexsort((ranked.rank, text, ranked.place))
    unit, key = ranked.place[by_text], text[by_text]
    is_first = np.ones(len(by_text), bool)
    is_first[1:] = (unit[1:] != unit[:-1]) | (key[1:] != key[:-1])
    chosen = np.sort(by_text[is_first])
    place = ranked.place[chosen]
    rank = (np.arange(len(place)) - np.searchsorted(place, place) + 1).astype(np.int32)
    chosen, rank = chosen[rank <= k], rank[rank <= k]
    columns = (ranked.seq[chosen], ranked.pos[chosen], ranked.doc[chosen], ranked.act[chosen])
    return ChosenTokens(ranked.place[chosen], rank, None, *columns)


def random_exemplars(sample: TokenSample) -> ChosenTokens:
    """Return the sample in the order of its priorities, so that the first m are a sample of m."""
    return _ordered(sample, *_order(sample, sample.key))


def quantile_exemplars(sample: TokenSample) -> ChosenTokens:
    """Return the sample by ascending activation, cut into `QUANTILE_BINS` parts of equal count."""
    chosen = _ordered(sample, *_order(sample, sample.act))
    share = (chosen.rank - 1) * QUANTILE_BINS // sample.size[chosen.place]
    return chosen._replace(bin=share.astype(np.int32))


def _order(lists: Top | TokenSample, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of each unit's entries, by key and then by position, and which are some."""
    is_filled = np.arange(lists.act.shape[1]) < lists.size[:, None]
    return np.lexsort((lists.pos, lists.seq, key, ~is_filled), axis=1), is_filled


def _ordered(lists: Top | TokenSample, order: np.ndarray, is_filled: np.ndarray) -> ChosenTokens:
    columns = [
        np.take_along_axis(values, order, axis=1)[is_filled]
        for values in (lists.seq, lists.pos, lists.doc, lists.act)
    ]
    place, before = np.nonzero(is_filled)
    return ChosenTokens(place, (before + 1).astype(np.int32), None, *columns)
