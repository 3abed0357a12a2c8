"""Token-centred windows: the text around a unit's strongest tokens, as some papers cut it.

Only for comparison with those papers: windows overlap, cross documents and repeat each other.
`records` holds what should be used.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.records.exemplar_records import Excerpts
from lmmono.records.record import KINDS, Counts, Records
from lmmono.records.token_grid import PADDING, TokenGrid
from lmmono.records.unit_rows import UnitRows, checked_units, read_unit_rows


def read_token_windows(
    store: astore.Store,
    hook: str,
    grid: TokenGrid,
    counts: Counts,
    *,
    window: int = 64,
    units: Sequence[int] | None = None,
    seed: int = 0,
) -> Records:
    """Choose windows around tokens: top ones where the unit is strongest, random ones anywhere.

    A window holds the `window // 2` tokens before its token and the rest from it on, in the order
    of the rows, shorter at the ends of the text. Unlike excerpts they are not kept apart.

    Raises:
        ExplainError: A kind other than top and random, no such unit, or a hook not stored as rows.
    """
    if counts.total() != counts.top + counts.random:
        raise ExplainError("token-centred windows are of kind top and random only")
    chosen = checked_units(store, hook, units)
    shape = (len(chosen), counts.total())
    centres, max_act = np.full(shape, -1), np.zeros(len(chosen), np.float32)
    firsts, acts = np.full(shape, -1), np.zeros((*shape, window), np.float32)
    done = 0
    for rows in read_unit_rows(store, hook, chosen, grid):
        mine = slice(done, done + len(rows.units))
        centres[mine], max_act[mine] = _centres(grid, counts, rows, (seed, *hook.encode()))
        firsts[mine] = np.where(centres[mine] >= 0, np.maximum(centres[mine] - window // 2, 0), -1)
        acts[mine] = rows.gather(firsts[mine], window, len(grid.token_ids))
        done = mine.stop
    excerpts, index = _excerpts(grid, firsts, centres, window)
    acts[np.where(index[:, :, None] >= 0, excerpts.token_ids[index], PADDING) == PADDING] = 0
    return Records(hook, excerpts, chosen, counts.kinds(), index, acts, max_act)


def _centres(
    grid: TokenGrid, counts: Counts, rows: UnitRows, seed: tuple[int, ...]
) -> tuple[Int[ndarray, "units records"], ndarray]:
    """Return the cells that windows are cut around, and each unit's largest activation."""
    centres = np.full((len(rows.units), counts.total()), -1)
    max_act = np.zeros(len(rows.units), np.float32)
    cells = np.flatnonzero(grid.token_ids != PADDING)
    for i, unit in enumerate(rows.units):
        at, act = rows.of(i)
        top = at[np.lexsort((at, -act))[: counts.top]]
        rng = np.random.default_rng((*seed, int(unit), KINDS.index("random")))
        random = rng.choice(cells, min(counts.random, len(cells)), replace=False)
        centres[i, : len(top)] = top
        centres[i, counts.top : counts.top + len(random)] = random
        max_act[i] = act.max(initial=0.0)
    return centres, max_act


def _excerpts(
    grid: TokenGrid, firsts: ndarray, centres: ndarray, window: int
) -> tuple[Excerpts, Int[ndarray, "units records"]]:
    """Return the windows as excerpts, each once, and which one each record is."""
    stops = np.minimum(centres - window // 2 + window, len(grid.token_ids))
    keys = np.where(firsts >= 0, firsts * 2 * window + (stops - firsts), -1)
    found, index = np.unique(keys, return_inverse=True)
    n_missing = int(found[0] == -1)
    first, length = np.divmod(found[n_missing:], 2 * window)
    columns = np.arange(window)
    cells = np.minimum(first[:, None] + columns, len(grid.token_ids) - 1)
    token_ids = np.where(columns < length[:, None], grid.token_ids[cells], np.int32(PADDING))
    return Excerpts(grid, window, first, token_ids), index.reshape(keys.shape) - n_missing
