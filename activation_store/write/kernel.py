"""One pass over a block of activations: moments, sketch, exemplars and the sparse entries.

A block is cut into tiles, runs of at most `TILE` tokens of one sequence, and each tile into strips
of `STRIP` units. A strip of a tile is copied to a buffer that stays in the fastest cache, and
everything is computed from there, so a block is read from memory once.

    block [tokens, units]      |<- STRIP ->|
      tile 0  seq 4, pos 0..127    load -> is_rectified? -> collect -> moments, sketch,
      tile 1  seq 4, pos 128..     |                                   exemplars, entries
      tile 2  seq 5, pos 0..       v  next tile, same strip: its units stay in the cache

Tiles lie on a fixed grid within their sequence: the result does not depend on how sequences are
grouped into blocks, to the bit.

Entries come out strip by strip, within a strip by tile, unit and position, with a count per (tile,
unit). `gather` merges the tiles of many blocks into columns sorted by (unit, seq_id, pos).
"""

from typing import Any, NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8, UInt16, UInt32, UInt64
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from activation_store.compiled import compiled
from activation_store.write.exemplars import (
    TokenSample,
    Top,
    draw_tile,
    is_drawn,
    mix,
    offer_top,
    position_key,
    text_key,
)
from activation_store.write.moments import SIDE, Counts, Moments, add_sums, bucket

TILE = 128  # most tokens in a tile: a count per (tile, unit) must fit in a byte
STRIP = 64  # units handled together: four cache lines of a row, and 32 kB per tile
_WORD = 32  # tokens whose marks share a word
_INFINITE = np.int32(0x7F800000)  # bits of the float32 that is infinite


class Tiles(NamedTuple):
    """Where the tokens of a block come from."""

    row: Int64[np.ndarray, " tiles"]
    """First row of the tile in the block."""
    length: Int64[np.ndarray, " tiles"]
    seq: Int32[np.ndarray, " tiles"]
    pos: Int64[np.ndarray, " tiles"]
    """Position of the first row within its sequence."""
    doc: Int32[np.ndarray, " rows"]
    token: Int32[np.ndarray, " rows"]
    text: UInt64[np.ndarray, " rows"]
    """`text_key` of the row where some unit has asked for it, else zero."""
    n_ctx: int
    """Rows per sequence of the block."""
    cut: Float32[np.ndarray, " rows"]
    """Smallest activation of the token that is kept; empty keeps all above the threshold."""
    floor: Float32[np.ndarray, " units"]
    """Smallest activation of the unit that is kept; empty keeps all above the threshold."""


class Seen(NamedTuple):
    """What a hook's tokens added up to; the arrays are changed in place."""

    moments: Moments
    sketch: Counts
    top: Top
    random: TokenSample
    firing: TokenSample
    odd: Int64[np.ndarray, "units 3"]
    """NaN, infinite and (for float16) overflowing activations per unit."""


class Entries(NamedTuple):
    """Sparse entries in the order of the pass; `used` counts entries and tiles filled so far."""

    pos: UInt16[np.ndarray, " entries"]
    act: Float32[np.ndarray, " entries"]
    per_unit: UInt8[np.ndarray, "tiles units"]
    seq: Int32[np.ndarray, " tiles"]
    start: Int64[np.ndarray, "tiles strips"]
    """First entry of the strip of the tile."""
    used: Int64[np.ndarray, "2"]


class Strip(NamedTuple):
    """Buffers for one strip of one tile."""

    act: Float32[np.ndarray, "tokens units"]
    bits: Int32[np.ndarray, "tokens units"]
    """The same memory."""
    marks: UInt32[np.ndarray, "words units"]
    """A bit per token: whether the value is above the threshold."""
    at: UInt16[np.ndarray, "units tokens"]
    """Rows of the finite values above the threshold, ascending; `n` of each unit."""
    fired: Float32[np.ndarray, "units tokens"]
    """Those values."""
    n: Int64[np.ndarray, " units"]
    finite: Int64[np.ndarray, " units"]
    shift: np.ndarray
    """What deviations are taken from."""
    sums: np.ndarray
    """Sums of the powers 1 to 4 of the deviations, [4, units]."""
    low: Float32[np.ndarray, " units"]
    high: Float32[np.ndarray, " units"]
    low_bits: Int32[np.ndarray, " units"]
    """The memory of `low`, and then of `high`."""
    high_bits: Int32[np.ndarray, " units"]
    bad: Float32[np.ndarray, " units"]
    """NaN where a value is not finite, else zero."""
    every: UInt16[np.ndarray, " tokens"]
    """All rows."""
    column: Float32[np.ndarray, " tokens"]
    """A unit's values in all rows."""
    used: np.ndarray


@compiled
@no_type_check
def new_strip() -> Strip:
    """Return fresh buffers."""
    act = np.zeros((TILE, STRIP), np.float32)
    low, high = np.zeros(STRIP, np.float32), np.zeros(STRIP, np.float32)
    return Strip(
        act,
        act.view(np.int32),
        np.zeros((TILE // _WORD, STRIP), np.uint32),
        np.zeros((STRIP, TILE), np.uint16),
        np.zeros((STRIP, TILE), np.float32),
        np.zeros(STRIP, np.int64),
        np.zeros(STRIP, np.int64),
        np.zeros(STRIP),
        np.zeros((4, STRIP)),
        low,
        high,
        low.view(np.int32),
        high.view(np.int32),
        np.zeros(STRIP, np.float32),
        np.arange(TILE).astype(np.uint16),
        np.zeros(TILE, np.float32),
        np.zeros(TILE, np.bool_),
    )


@compiled
@no_type_check
def load(
    x: np.ndarray, row: int, n: int, c: int, width: int, threshold: np.float32, strip: Strip
) -> None:
    """Copy one strip of one tile, mark what is above the threshold, and find the extremes of bits.

    A strip at the edge is as wide as any; its rest is stale.
    """
    low, high = strip.low_bits, strip.high_bits
    low[:], high[:] = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    strip.marks[:] = 0
    for t in range(n):
        target = strip.act[t]
        if width == STRIP:
            source = x[row + t, c : c + STRIP]
            for u in range(STRIP):
                target[u] = source[u]
        else:
            for u in range(width):
                target[u] = x[row + t, c + u]
        marks = strip.marks[t // _WORD]
        bit = np.uint32(1) << np.uint32(t % _WORD)
        for u in range(STRIP):
            marks[u] |= bit if target[u] > threshold else np.uint32(0)
        bits = strip.bits[t]
        for u in range(STRIP):
            low[u] = min(low[u], bits[u])
            high[u] = max(high[u], bits[u])


@compiled
@no_type_check
def is_rectified(threshold: np.float32, width: int, strip: Strip) -> bool:
    """Tell whether all is finite, and zero where not above the threshold, as after a ReLU.

    The bits of such numbers have the order of the numbers, so the extremes are right already.
    """
    rectified = threshold == 0.0
    for u in range(width):
        rectified &= strip.low_bits[u] >= 0 and strip.high_bits[u] < _INFINITE
    if rectified:
        strip.bad[:] = 0.0
    return rectified


@compiled
@no_type_check
def set_shift(moments: Moments, c: int, width: int, strip: Strip) -> None:
    """Note what deviations of units c.. are taken from: the mean so far, or a value at first."""
    for u in range(width):
        shift = moments.mean[c + u] if moments.n[c + u] > 0 else np.float64(strip.act[0, u])
        strip.shift[u] = shift if np.isfinite(shift) else 0.0


@compiled
@no_type_check
def find_extremes(n: int, strip: Strip) -> None:
    """Find the smallest and largest value of all units, and mark those that are not finite."""
    low, high, bad = strip.low, strip.high, strip.bad
    for u in range(STRIP):
        low[u], high[u], bad[u] = np.inf, -np.inf, 0.0
    for t in range(n):
        row = strip.act[t]
        for u in range(STRIP):
            low[u] = min(low[u], row[u])
            high[u] = max(high[u], row[u])
            bad[u] += row[u] * np.float32(0.0)


@compiled
@no_type_check
def add_up(n: int, strip: Strip) -> None:
    """Sum powers of the deviations of all units, whatever their values."""
    s1, s2 = np.zeros(STRIP), np.zeros(STRIP)
    s3, s4 = np.zeros(STRIP), np.zeros(STRIP)
    shift = strip.shift
    for t in range(n):
        row = strip.act[t]
        for u in range(STRIP):
            d = np.float64(row[u]) - shift[u]
            d2 = d * d
            s1[u] += d
            s2[u] += d2
            s3[u] += d2 * d
            s4[u] += d2 * d2
    for u in range(STRIP):
        strip.sums[0, u] = s1[u]
        strip.sums[1, u] = s2[u]
        strip.sums[2, u] = s3[u]
        strip.sums[3, u] = s4[u]


@compiled
@no_type_check
def add_fired(n: int, width: int, strip: Strip) -> None:
    """Sum powers of the deviations of units that are zero but for their `fired` values."""
    for u in range(width):
        shift, m = strip.shift[u], strip.n[u]
        rest = np.float64(n - m)
        d2 = shift * shift
        s1, s2, s3, s4 = -rest * shift, rest * d2, -rest * d2 * shift, rest * d2 * d2
        for k in range(np.uint64(m)):
            d = np.float64(strip.fired[u, k]) - shift
            d2 = d * d
            s1 += d
            s2 += d2
            s3 += d2 * d
            s4 += d2 * d2
        sums = strip.sums
        sums[0, u], sums[1, u], sums[2, u], sums[3, u] = s1, s2, s3, s4


@compiled
@no_type_check
def drop_odd(n: int, c: int, width: int, odd: np.ndarray, strip: Strip) -> None:
    """Count NaN and infinities; redo sums and extremes of their units over what is finite."""
    for u in range(width):
        if strip.bad[u] == 0.0:
            continue
        strip.sums[:, u] = 0.0
        strip.low[u], strip.high[u] = np.inf, -np.inf
        for t in range(n):
            v = strip.act[t, u]
            if np.isfinite(v):
                d = np.float64(v) - strip.shift[u]
                strip.sums[0, u] += d
                strip.sums[1, u] += d * d
                strip.sums[2, u] += d * d * d
                strip.sums[3, u] += d * d * d * d
                strip.low[u] = min(strip.low[u], v)
                strip.high[u] = max(strip.high[u], v)
            else:
                strip.finite[u] -= 1
                odd[c + u, 0 if np.isnan(v) else 1] += 1


@intrinsic
@no_type_check
def _lowest(_context: Any, bits: Any) -> Any:
    """Return the place of the lowest bit that is set; there must be one."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)  # numba has no name for it

    return types.uint32(bits), generate


@compiled
@no_type_check
def collect(n: int, width: int, strip: Strip) -> None:
    """List the rows and values of the finite values above the threshold."""
    for u in range(np.uint64(width)):
        odd = strip.bad[u] != 0.0
        m = np.uint64(0)
        for word in range(np.uint64(TILE // _WORD)):
            bits = strip.marks[word, u]
            while bits:
                t = np.uint64(word * np.uint64(_WORD)) + np.uint64(_lowest(bits))
                bits &= bits - np.uint32(1)
                v = strip.act[t, u]
                strip.at[u, m] = t
                strip.fired[u, m] = v
                m += np.uint64(not (odd and np.isinf(v)))
        strip.n[u] = m
        strip.finite[u] = n


@compiled
@no_type_check
def scan(
    x: Float32[np.ndarray, "rows d"],
    tiles: Tiles,
    first: int,
    last: int,
    threshold: np.float32,
    largest: np.float32,
    seen: Seen,
    entries: Entries,
) -> None:
    """Take units first..last-1 of a block x [rows, d] into `seen` and, unless empty, `entries`.

    `entries` covers just these units. Activations above `largest` are counted, not kept.
    """
    # strips outside, tiles inside: moments, gates and counts of a strip's units stay in the cache
    strip = new_strip()
    n_tiles = tiles.row.shape[0]
    before = entries.used[1]
    for c in range(first, last, STRIP):
        width = min(STRIP, last - c)
        for tile in range(n_tiles):
            n = tiles.length[tile]
            load(x, tiles.row[tile], n, c, width, threshold, strip)
            set_shift(seen.moments, c, width, strip)
            rectified = is_rectified(threshold, width, strip)
            if not rectified:
                find_extremes(n, strip)
            collect(n, width, strip)
            if rectified:
                add_fired(n, width, strip)
            else:
                add_up(n, strip)
                drop_odd(n, c, width, seen.odd, strip)
            add_sums(seen.moments, c, width, strip.finite, strip.shift, strip.sums)
            _widen(c, width, seen.moments, strip)
            _count(n, c, width, rectified, seen.sketch, strip)
            _choose(tiles, tile, c, width, seen.top, seen.random, seen.firing, strip)
            if entries.pos.shape[0] > 0:
                entries.seq[before + tile] = tiles.seq[tile]
                entries.start[before + tile, (c - first) // STRIP] = entries.used[0]
                _append(tiles, tile, c, c - first, width, largest, seen.odd, strip, entries)
    if entries.pos.shape[0] > 0:
        entries.used[1] = before + n_tiles


@compiled
@no_type_check
def _widen(c: int, width: int, moments: Moments, strip: Strip) -> None:
    """Take the counts and extremes of a strip."""
    for u in range(width):
        moments.active[c + u] += strip.n[u]
        moments.low[c + u] = min(moments.low[c + u], strip.low[u])
        moments.high[c + u] = max(moments.high[c + u], strip.high[u])


@compiled
@no_type_check
def _count(n: int, c: int, width: int, rectified: bool, sketch: Counts, strip: Strip) -> None:
    """Count every finite value of a strip."""
    fired, bits = strip.fired.view(np.uint32), strip.column.view(np.uint32)
    for u in range(np.uint64(width)):
        counts = sketch[c + u]
        if rectified:
            for k in range(np.uint64(strip.n[u])):
                counts[np.uint64(bucket(fired[u, k]))] += np.uint32(1)
            counts[SIDE] += np.uint32(n - strip.n[u])
        else:
            for t in range(n):
                strip.column[t] = strip.act[t, u]
                if np.isfinite(strip.column[t]):
                    counts[np.uint64(bucket(bits[t]))] += np.uint32(1)


@compiled
@no_type_check
def _choose(
    tiles: Tiles,
    tile: int,
    c: int,
    width: int,
    top: Top,
    random: TokenSample,
    firing: TokenSample,
    strip: Strip,
) -> None:
    """Offer the tokens of a strip of a tile to the exemplars."""
    n, seq, pos = tiles.length[tile], tiles.seq[tile], tiles.pos[tile]
    docs = tiles.doc[tiles.row[tile] : tiles.row[tile] + n]
    tile_key = mix(position_key(seq, pos))
    for u in range(width):
        unit, m = c + u, strip.n[u]
        if m > 0 and strip.high[u] >= top.gate[unit]:
            _offer_best(tiles, tile, unit, u, top, strip)
        if is_drawn(firing.salt[unit], firing.gate[unit], tile_key, m):
            at = strip.at[u, :m]
            draw_tile(firing, unit, tile_key, at, strip.act, u, strip.used, seq, pos, docs)
        if is_drawn(random.salt[unit], random.gate[unit], tile_key, n):
            at = strip.every[:n]
            draw_tile(random, unit, tile_key, at, strip.act, u, strip.used, seq, pos, docs)


@compiled
@no_type_check
def _offer_best(tiles: Tiles, tile: int, unit: int, u: int, top: Top, strip: Strip) -> None:
    """Offer the best token of each run of one document: at most one of them can stay."""
    at, fired, n, row = strip.at[u], strip.fired[u], strip.n[u], tiles.row[tile]
    best = 0
    for k in range(1, n + 1):
        if k == n or tiles.doc[row + at[k]] != tiles.doc[row + at[best]]:
            act = fired[best]
            if act >= top.gate[unit]:
                pos = tiles.pos[tile] + at[best]
                place = row + at[best]
                text = tiles.text[place]
                if text == 0:  # the same for all units, hooks and threads: hashed once
                    first = place - pos  # the sequence's first row
                    text = text_key(tiles.token, tiles.doc, first, first + tiles.n_ctx, place)
                    tiles.text[place] = text
                offer_top(top, unit, act, tiles.seq[tile], pos, tiles.doc[place], text)
            best = k
        elif fired[k] > fired[best]:
            best = k


@compiled
@no_type_check
def _append(
    tiles: Tiles,
    tile: int,
    c: int,
    place: int,
    width: int,
    largest: np.float32,
    odd: np.ndarray,
    strip: Strip,
    entries: Entries,
) -> None:
    """Append the entries of a strip of a tile; `place` is its first unit among the entries'."""
    # numba checks a signed index for one that counts from the end; an unsigned one it does not
    end = np.uint64(entries.used[0])
    row, pos = tiles.row[tile], tiles.pos[tile]
    counts = entries.per_unit[entries.used[1] + tile]
    by_token, by_unit = tiles.cut.shape[0] > 0, tiles.floor.shape[0] > 0
    for u in range(np.uint64(width)):
        m = np.uint64(strip.n[u])
        begin = end
        if not by_token and not by_unit and strip.high[u] <= largest:
            for k in range(m):
                entries.pos[end + k] = pos + strip.at[u, k]
                entries.act[end + k] = strip.fired[u, k]
            end += m
        else:
            for k in range(m):
                v = strip.fired[u, k]
                if v > largest:
                    odd[c + u, 2] += 1
                elif (not by_token or v >= tiles.cut[row + strip.at[u, k]]) and (
                    not by_unit or v >= tiles.floor[c + u]
                ):
                    entries.pos[end] = pos + strip.at[u, k]
                    entries.act[end] = v
                    end += np.uint64(1)
        counts[place + u] = end - begin
    entries.used[0] = end


@compiled
@no_type_check
def gather(
    entries: Entries,
    order: np.ndarray,
    cursor: np.ndarray,
    first: int,
    last: int,
    seq: np.ndarray,
    pos: np.ndarray,
    act: np.ndarray,
) -> None:
    """Write units first..last-1 of `entries` as columns by (unit, seq_id, pos).

    `order` lists the tiles by sequence and position. `cursor` holds, per tile, the first entry not
    yet written of the current strip: units are asked for in order.
    """
    # unsigned indices spare the check for one that counts from the end: twice as fast
    end = np.uint64(0)
    from_pos, from_act = entries.pos, entries.act
    for u in range(first, last):
        if u % STRIP == 0:
            for tile in range(cursor.shape[0]):
                cursor[tile] = entries.start[tile, u // STRIP]
        for i in range(order.shape[0]):
            tile = order[i]
            n = np.uint64(entries.per_unit[tile, u])
            start = np.uint64(cursor[tile])
            name = entries.seq[tile]
            for k in range(n):
                seq[end + k] = name
                pos[end + k] = from_pos[start + k]
                act[end + k] = from_act[start + k]
            cursor[tile] = np.int64(start + n)
            end += n


def top_p_cuts(
    x: Float32[np.ndarray, "rows d"], threshold: np.float32, share: float
) -> Float32[np.ndarray, " rows"]:
    """Return per row the smallest activation of the smallest set that holds `share` of the sum.

    The sum is over the finite activations above the threshold; ties with the smallest stay too.
    """
    cuts = np.full(len(x), np.inf, np.float32)
    for t, row in enumerate(x):
        kept = np.sort(row[(row > threshold) & (row < np.inf)])  # NaN is not above it
        if len(kept):
            # cumsum adds one number after the other, in the order given: the same bits anywhere
            total = np.cumsum(kept, dtype=np.float64)[-1]
            is_enough = np.cumsum(kept[::-1], dtype=np.float64) >= share * total
            cuts[t] = kept[-1 - is_enough.argmax()] if is_enough.any() else kept[0]
    return cuts
