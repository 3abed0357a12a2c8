"""The stored activations of a hook, unit by unit, as cells of a grid of tokens.

Shards keep units together only within blocks of sequences, so what is read is brought into order by
counting, in one pass and without a sort.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

import activation_store as astore
from activation_store.compiled import compiled
from lmmono.records.corpus_excerpts import PADDING, TokenGrid

ROWS_AT_ONCE = 4_000_000
"""Stored activations held in memory together, about 0.1 GB with what is made of them."""


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The positive activations of some units of a hook on the tokens of a grid."""

    units: Int[ndarray, " units"]
    """The units, ascending."""
    starts: Int[ndarray, " units_plus_one"]
    """Rows `starts[i]` to `starts[i + 1]` belong to unit i."""
    cells: Int[ndarray, " rows"]
    """Cell of the grid of each row."""
    acts: Float[ndarray, " rows"]
    """float32 activation of each row, above 0, in units of the hook."""

    def of(self, i: int) -> tuple[Int[ndarray, " rows"], Float[ndarray, " rows"]]:
        """Return cells and activations of the i-th unit."""
        rows = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return self.cells[rows], self.acts[rows]

    def largest(
        self, owner: Int[ndarray, " cells"], n_owners: int
    ) -> Float[ndarray, "units owners"]:
        """Return each unit's largest activation per owner of cells; 0 where it is silent."""
        largest = np.zeros((len(self.units), n_owners), np.float32)
        _largest(self.starts, self.cells, self.acts, owner, largest)
        return largest

    def gather(
        self, cells: Int[ndarray, "units records window"], n_cells: int
    ) -> Float[ndarray, "units records window"]:
        """Return activations in windows of cells; 0 where none is stored, and for cell -1."""
        acts = np.zeros(cells.shape, np.float32)
        _gather(self.starts, self.cells, self.acts, cells, np.zeros(n_cells, np.float32), acts)
        return acts


def read_unit_rows(
    store: astore.Store,
    hook: str,
    units: Int[ndarray, " units"],
    grid: TokenGrid,
    *,
    units_at_once: int = 512,
) -> Iterator[UnitRows]:
    """Yield the activations of units on the tokens of a grid, as many units as fit in memory."""
    counts = dict(
        store.sql("SELECT unit, n_active FROM unit_stats WHERE hook = $hook", hook=hook).fetchall()
    )
    query = """SELECT unit, seq_id, pos, act FROM acts
        WHERE hook = $hook AND unit BETWEEN $low AND $high AND act > 0
            AND seq_id BETWEEN $first_seq AND $last_seq"""
    seqs = {"first_seq": int(grid.seq_ids[0]), "last_seq": int(grid.seq_ids[-1])}
    for first, last in unit_chunks([counts.get(int(u), 0) for u in units], units_at_once):
        chunk = units[first:last]
        low, high = int(chunk[0]), int(chunk[-1])
        # from 2 units in 4 on, a range that reads the others too is cheaper than a list to look in
        scattered = {} if high - low < 2 * len(chunk) else {"units": chunk.tolist()}
        wanted = query + (" AND unit IN (SELECT unnest($units))" if scattered else "")
        table = store.sql(wanted, hook=hook, low=low, high=high, **seqs, **scattered)
        yield _in_order(table.to_arrow_table(), chunk, grid)


def unit_chunks(n_active: Sequence[int], units_at_once: int) -> Iterator[tuple[int, int]]:
    """Yield [first, last) ranges of units that together fit in memory; at least one unit each."""
    first, n_rows = 0, 0
    for i, n in enumerate(n_active):
        if i > first and (n_rows + n > ROWS_AT_ONCE or i - first == units_at_once):
            yield first, i
            first, n_rows = i, 0
        n_rows += n
    if first < len(n_active):
        yield first, len(n_active)


def _in_order(table: pa.Table, units: Int[ndarray, " units"], grid: TokenGrid) -> UnitRows:
    slots = np.full(int(units[-1] - units[0]) + 1, -1, np.int32)
    slots[units - units[0]] = np.arange(len(units))
    unit, seq, pos, act = (table[name].to_numpy() for name in ("unit", "seq_id", "pos", "act"))
    starts, cells, acts = _count_sorted(
        unit,
        seq,
        pos,
        act,
        int(units[0]),
        slots,
        len(units),
        grid.seq_ids.astype(np.int32),
        grid.n_ctx,
        grid.token_ids != PADDING,
    )
    return UnitRows(units, starts, cells, acts)


@compiled
@no_type_check
def _count_sorted(
    unit: ndarray,
    seq: ndarray,
    pos: ndarray,
    act: ndarray,
    low: int,
    slots: ndarray,
    n_units: int,
    seq_ids: ndarray,
    n_ctx: int,
    is_token: ndarray,
) -> tuple[ndarray, ndarray, ndarray]:
    """Return starts per unit, cells and acts; rows of a unit keep the order they came in."""
    cell = np.full(len(unit), -1, np.int32)
    starts = np.zeros(n_units + 1, np.int64)
    last_seq, row = np.int32(-1), -1
    for i in range(len(unit)):
        slot = slots[unit[i] - low]
        if slot < 0:
            continue
        if seq[i] != last_seq:
            last_seq = seq[i]
            # by hand: compiling numpy's search takes seconds
            row, end = 0, len(seq_ids)
            while row < end:
                middle = (row + end) // 2
                if seq_ids[middle] < last_seq:
                    row = middle + 1
                else:
                    end = middle
            if row == len(seq_ids) or seq_ids[row] != last_seq:
                row = -1
        if row >= 0 and pos[i] < n_ctx and is_token[row * n_ctx + pos[i]]:
            cell[i] = row * n_ctx + pos[i]
            starts[slot + 1] += 1
    for slot in range(n_units):
        starts[slot + 1] += starts[slot]
    place = starts.copy()
    cells = np.empty(starts[-1], np.int32)
    acts = np.empty(starts[-1], np.float32)
    for i in range(len(unit)):
        if cell[i] >= 0:
            slot = slots[unit[i] - low]
            cells[place[slot]] = cell[i]
            acts[place[slot]] = act[i]
            place[slot] += 1
    return starts, cells, acts


@compiled
@no_type_check
def _largest(
    starts: ndarray, cells: ndarray, acts: ndarray, owner: ndarray, largest: ndarray
) -> None:
    for unit in range(len(starts) - 1):
        for i in range(starts[unit], starts[unit + 1]):
            of = owner[cells[i]]
            if of >= 0 and acts[i] > largest[unit, of]:
                largest[unit, of] = acts[i]


@compiled
@no_type_check
def _gather(
    starts: ndarray, cells: ndarray, acts: ndarray, windows: ndarray, dense: ndarray, out: ndarray
) -> None:
    # one unit's activations at a time are spread over all cells and taken off again, so that the
    # scratch row is cleared in the time of its activations, not of its cells
    for unit in range(len(starts) - 1):
        for i in range(starts[unit], starts[unit + 1]):
            dense[cells[i]] = acts[i]
        for record in range(windows.shape[1]):
            for offset in range(windows.shape[2]):
                cell = windows[unit, record, offset]
                if cell >= 0:
                    out[unit, record, offset] = dense[cell]
        for i in range(starts[unit], starts[unit + 1]):
            dense[cells[i]] = 0.0
