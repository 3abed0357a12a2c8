"""One pass over a block of activations: moments, sketch, exemplars and the sparse entries.

A block is cut into tiles, runs of at most `TILE` tokens of one sequence, and each tile into strips
of `STRIP` units. A strip of a tile is copied to a buffer that stays in the fastest cache, and
everything is computed from there, so a block is read from memory once. Tiles lie on a fixed grid
within their sequence: the result does not depend on how sequences are grouped into blocks, to the
bit.

Entries come out strip by strip, within a strip by tile, unit and position, with a count per (tile,
unit). `gather` merges the tiles of many blocks into columns sorted by (unit, seq_id, pos).
"""

from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8, UInt16

from activation_store.compiled import compiled
from activation_store.write.exemplars import (
    Draw,
    Top,
    draw_tile,
    is_drawn,
    mix,
    offer_top,
    position_key,
)
from activation_store.write.sketch import SIDE, Counts, bucket
from activation_store.write.statistics import Moments, add_sums
from activation_store.write.strips import (
    STRIP,
    Strip,
    add_fired,
    add_up,
    collect,
    drop_odd,
    find_extremes,
    is_rectified,
    load,
    new_strip,
    set_shift,
)


class Tiles(NamedTuple):
    """Where the tokens of a block come from."""

    row: Int64[np.ndarray, " tiles"]
    """First row of the tile in the block."""
    length: Int64[np.ndarray, " tiles"]
    seq: Int32[np.ndarray, " tiles"]
    pos: Int64[np.ndarray, " tiles"]
    """Position of the first row within its sequence."""
    doc: Int32[np.ndarray, " rows"]
    cut: Float32[np.ndarray, " rows"]
    """Smallest activation of the token that is kept; empty keeps all above the threshold."""


class Seen(NamedTuple):
    """What a hook's tokens added up to; the arrays are changed in place."""

    moments: Moments
    sketch: Counts
    top: Top
    random: Draw
    firing: Draw
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
    # strips outside, tiles inside: what is known of a strip's units stays in the cache
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
    random: Draw,
    firing: Draw,
    strip: Strip,
) -> None:
    """Offer the tokens of a strip of a tile to the exemplars."""
    n, seq, pos = tiles.length[tile], tiles.seq[tile], tiles.pos[tile]
    docs = tiles.doc[tiles.row[tile] : tiles.row[tile] + n]
    tile_key = mix(position_key(seq, pos))
    for u in range(width):
        unit, m = c + u, strip.n[u]
        if m > 0 and strip.high[u] >= top.gate[unit]:
            _offer_best(unit, u, seq, pos, docs, top, strip)
        if is_drawn(firing.salt[unit], firing.gate[unit], tile_key, m):
            at, values = strip.at[u, :m], strip.fired[u, :m]
            draw_tile(firing, unit, tile_key, at, values, strip.used, seq, pos, docs)
        if is_drawn(random.salt[unit], random.gate[unit], tile_key, n):
            at, values = strip.every[:n], strip.act[:n, u]
            draw_tile(random, unit, tile_key, at, values, strip.used, seq, pos, docs)


@compiled
@no_type_check
def _offer_best(
    unit: int, u: int, seq: int, pos: int, docs: np.ndarray, top: Top, strip: Strip
) -> None:
    """Offer the best token of each run of one document: at most one of them can stay."""
    at, fired = strip.at[u], strip.fired[u]
    best = 0
    for k in range(1, strip.n[u]):
        if docs[at[k]] != docs[at[best]]:
            offer_top(top, unit, fired[best], seq, pos + at[best], docs[at[best]])
            best = k
        elif fired[k] > fired[best]:
            best = k
    offer_top(top, unit, fired[best], seq, pos + at[best], docs[at[best]])


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
    # an index without a sign spares the check for one from the end
    end = np.uint64(entries.used[0])
    row, pos = tiles.row[tile], tiles.pos[tile]
    counts = entries.per_unit[entries.used[1] + tile]
    whole = tiles.cut.shape[0] == 0
    for u in range(np.uint64(width)):
        m = np.uint64(strip.n[u])
        begin = end
        if whole and strip.high[u] <= largest:
            for k in range(m):
                entries.pos[end + k] = pos + strip.at[u, k]
                entries.act[end + k] = strip.fired[u, k]
            end += m
        else:
            for k in range(m):
                v = strip.fired[u, k]
                if v > largest:
                    odd[c + u, 2] += 1
                elif whole or v >= tiles.cut[row + strip.at[u, k]]:
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
    # an index without a sign spares the check for one from the end: twice as fast
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


@compiled
@no_type_check
def top_p_cuts(
    x: Float32[np.ndarray, "rows d"], threshold: np.float32, share: float
) -> Float32[np.ndarray, " rows"]:
    """Return per row the smallest activation of the smallest set that holds `share` of the sum.

    The sum is over the finite activations above the threshold; ties with the smallest stay too.
    """
    cuts = np.empty(x.shape[0], np.float32)
    for t in range(x.shape[0]):
        row = x[t]
        kept = row[(row > threshold) & np.isfinite(row)]
        kept = np.sort(kept)
        total, part = 0.0, 0.0
        for i in range(kept.shape[0]):
            total += kept[i]
        i = kept.shape[0]
        while i > 0 and part < share * total:
            i -= 1
            part += kept[i]
        cuts[t] = kept[i] if kept.shape[0] else np.inf
    return cuts
