"""The one sampler of activation records: excerpts chosen for each unit, with its activations.

All activations of a hook are read once (`sample_windows`); what differs between those who ask is
which windows they choose for a unit, from what it does in them:

    explaining, simulation    read_records           top, quantile, random, firing, near misses
    classification, intruder  read_contrasts         firing excerpts next to silent ones
    papers' protocols         read_token_windows     text around single tokens, across documents
    Bricken et al. 2023       read_interval_records  nine tokens at every level of the activation
    two-sided scores          sides.read_sides       where a unit fires, is said to, anywhere

Draws depend on the seed, the hook, the unit and the kind alone, so a unit gets the same records
whichever other units or kinds are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.records.corpus_excerpts import PADDING, Excerpts, TokenGrid, read_grid
from lmmono.records.seeds import stream
from lmmono.records.unit_rows import read_unit_rows
from lmmono.records.units import checked_units

CELLS_AT_ONCE = 64_000_000
"""Maxima per unit and excerpt held in memory together: 0.25 GB."""

UNITS_AT_ONCE = 512
"""Units whose windows are gathered together: 0.1 GB at 800 windows of 64 tokens."""


@dataclass(frozen=True, slots=True)
class UnitActs:
    """What one unit does on a split, for choosing its windows."""

    unit: int
    """Index of the unit."""
    cells: Int[ndarray, " rows"]
    """Cells of the grid where it is active."""
    acts: Float[ndarray, " rows"]
    """Activation in each, above 0."""
    largest: Float[ndarray, " excerpts"]
    """Largest activation in each excerpt, 0 where it is silent; empty where windows are none."""


def sample_windows(
    store: astore.Store,
    hook: str,
    units: Int[ndarray, " units"],
    grid: TokenGrid,
    n: int,
    choose: Callable[[UnitActs], Int[ndarray, " chosen"]],
    cells_of: Callable[[Int[ndarray, "units n"]], Int[ndarray, "units n window"]],
    excerpts: Excerpts | None = None,
) -> tuple[Int[ndarray, "units n"], Float[ndarray, "units n window"], Float[ndarray, " units"]]:
    """Choose n windows for each unit; return the choice, activations, and each unit's maximum.

    Args:
        store: An open store.
        hook: A hook captured as rows.
        units: Units, ascending.
        grid: Tokens that windows are cut from.
        n: Windows per unit.
        choose: Returns a number for each window of a unit; -1 for none.
        cells_of: Turns these numbers into cells; -1 where a window has no token.
        excerpts: The excerpts, where maxima by excerpt are wanted for choosing.
    """
    chosen, max_act = np.full((len(units), n), -1), np.zeros(len(units), np.float32)
    acts: list[ndarray] = []
    owner = None if excerpts is None else excerpts.of_cells()
    n_excerpts = 0 if excerpts is None else len(excerpts)
    at_once = max(1, min(UNITS_AT_ONCE, CELLS_AT_ONCE // max(n_excerpts, 1)))
    done = 0
    for rows in read_unit_rows(store, hook, units, grid, units_at_once=at_once):
        shape = (len(rows.units), 0)
        largest = np.zeros(shape) if owner is None else rows.largest(owner, n_excerpts)
        for i, unit in enumerate(rows.units):
            unit_acts = UnitActs(int(unit), *rows.of(i), largest[i])
            chosen[done + i] = choose(unit_acts)
            over = unit_acts.acts if owner is None else largest[i]
            max_act[done + i] = over.max(initial=0.0)
        block = slice(done, done + len(rows.units))
        acts.append(rows.gather(cells_of(chosen[block]), len(grid.token_ids)))
        done = block.stop
    if not acts:
        acts = [np.zeros(cells_of(chosen).shape, np.float32)]
    return chosen, np.concatenate(acts), max_act


def filled(chosen: ndarray, n: int) -> Int[ndarray, " n"]:
    """Return n choices, -1 for those that there are not."""
    return np.concatenate([chosen, np.full(n - len(chosen), -1)])


# ---- records by kind --------------------------------------------------------------------------

Kind = Literal["top", "quantile", "random", "firing", "near_miss"]
"""How a record was chosen.

top: the largest maximum, one per document. quantile: drawn from equally wide bins of the maximum,
among firing excerpts. random: uniform over all excerpts, firing or not. firing: uniform over firing
excerpts. near_miss: silent excerpts that hold the token on which the unit fires most in all.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

Ranks = dict[Kind, tuple[int, ...]]
"""Ranks within the list of each kind, 0 is first."""

N_BINS = 10
"""Bins of kind quantile, equally wide between 0 and the unit's maximum."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many records of each kind a unit gets, where there are so many."""

    top: int = 0
    quantile: int = 0
    """Over all bins, shared out evenly, the strongest bins first."""
    random: int = 0
    firing: int = 0
    near_miss: int = 0

    def kinds(self) -> tuple[Kind, ...]:
        """Return the kind of each record of a unit."""
        return tuple(kind for kind in KINDS for _ in range(getattr(self, kind)))

    def total(self) -> int:
        """Return the records per unit."""
        return len(self.kinds())


def counts_for(ranks: Ranks) -> Counts:
    """Return how many records of each kind hold these ranks."""
    return Counts(**{kind: max(chosen) + 1 for kind, chosen in ranks.items()})


@dataclass(frozen=True, slots=True)
class Records:
    """Records of several units of one hook; column r of all units has the same kind."""

    hook: str
    """Hook of the units."""
    excerpts: Excerpts
    """What `index` points into."""
    units: Int[ndarray, " units"]
    """The units, ascending."""
    kinds: tuple[Kind, ...]
    """Kind of each column; within a kind, columns are in rank order (top: strongest first)."""
    index: Int[ndarray, "units records"]
    """Excerpt of each record; -1 where the unit has too few of that kind."""
    acts: Float[ndarray, "units records window"]
    """float32 activations, 0 where none is stored, in units of the hook."""
    max_act: Float[ndarray, " units"]
    """Largest stored activation of each unit in these excerpts; 0 where it is silent."""

    def columns(self, *kinds: Kind) -> Int[ndarray, " columns"]:
        """Return the columns of some kinds, in order."""
        return np.array([i for i, kind in enumerate(self.kinds) if kind in kinds], np.int64)

    def take(self, columns: Sequence[int] | Int[ndarray, " columns"]) -> "Records":
        """Return the same units with some columns only, in the order given."""
        columns = np.asarray(columns, np.int64)
        kinds = tuple(self.kinds[column] for column in columns)
        index, acts = self.index[:, columns], self.acts[:, columns]
        return Records(self.hook, self.excerpts, self.units, kinds, index, acts, self.max_act)

    def n_records(self, *kinds: Kind) -> Int[ndarray, " units"]:
        """Return how many records of some kinds each unit has; all kinds if none is named."""
        columns = self.columns(*(kinds or KINDS))
        return (self.index[:, columns] >= 0).sum(axis=1)

    def all_token_ids(self) -> Int[ndarray, "units records window"]:
        """Return the tokens of all units' records; records that there are not are all padding."""
        return self.excerpts.tokens_of(self.index)

    def token_ids(self, unit_row: int) -> Int[ndarray, "records window"]:
        """Return the tokens of one unit's records; records that there are not are all padding."""
        return self.excerpts.tokens_of(self.index[unit_row])


def read_records(
    store: astore.Store,
    hook: str,
    excerpts: Excerpts,
    counts: Counts,
    *,
    units: Sequence[int] | None = None,
    seed: int = 0,
) -> Records:
    """Choose the records of units from the excerpts of one split.

    Args:
        store: An open store.
        hook: A hook captured as rows.
        excerpts: Where records may come from; see `read_excerpts`.
        counts: Records per kind.
        units: Which units; None takes all of the hook.
        seed: Seed of what is drawn.

    Raises:
        ExplainError: The hook is not stored as rows, or has no such unit.
    """
    wanted = checked_units(store, hook, units)
    doc_ids = excerpts.doc_ids

    def choose(unit: UnitActs) -> Int[ndarray, " records"]:
        columns: list[ndarray] = [np.zeros(0, np.int64)]
        for kind in KINDS:
            if n := getattr(counts, kind):
                rng = stream(f"records {kind}", seed, hook, unit.unit)
                columns.append(filled(_of_kind(kind, n, rng, unit, excerpts, doc_ids), n))
        return np.concatenate(columns)

    index, acts, max_act = sample_windows(
        store, hook, wanted, excerpts.grid, counts.total(), choose, excerpts.cells_of, excerpts
    )
    return Records(hook, excerpts, wanted, counts.kinds(), index, acts, max_act)


def _of_kind(
    kind: Kind,
    n: int,
    rng: np.random.Generator,
    unit: UnitActs,
    excerpts: Excerpts,
    doc_ids: Int[ndarray, " excerpts"],
) -> Int[ndarray, " drawn"]:
    """Return up to n excerpts of a kind."""
    largest = unit.largest
    match kind:
        case "top":
            return _strongest_of_documents(largest, doc_ids, n)
        case "quantile":
            firing = np.flatnonzero(largest)
            bins = (largest[firing] / largest.max(initial=0.0) * N_BINS).astype(int)
            bins = np.minimum(bins, N_BINS - 1)  # the maximum itself closes the last bin
            shares = [len(part) for part in np.array_split(np.arange(n), N_BINS)]
            drawn = [
                draw_up_to(rng, firing[bins == b], share)
                for b, share in zip(range(N_BINS)[::-1], shares, strict=True)
            ]
            return np.concatenate(drawn)
        case "random":
            return draw_up_to(rng, np.arange(len(largest)), n)
        case "firing":
            return draw_up_to(rng, np.flatnonzero(largest), n)
        case "near_miss":
            return draw_up_to(
                rng, np.flatnonzero(_holds_favourite(unit, excerpts) & (largest == 0)), n
            )


def draw_up_to(rng: np.random.Generator, among: ndarray, n: int) -> ndarray:
    """Return up to n items, each at most once."""
    return rng.choice(among, min(n, len(among)), replace=False)


def _holds_favourite(unit: UnitActs, excerpts: Excerpts) -> Bool[ndarray, " excerpts"]:
    """Return which excerpts hold the token on which a unit fires most in all; none if silent."""
    if not len(unit.acts):
        return np.zeros(len(excerpts), bool)
    favourite = np.bincount(excerpts.grid.token_ids[unit.cells], unit.acts).argmax()
    return (excerpts.token_ids == favourite).any(axis=1)


def _strongest_of_documents(
    largest: Float[ndarray, " excerpts"], doc_ids: Int[ndarray, " excerpts"], n: int
) -> Int[ndarray, " drawn"]:
    """Return the n excerpts of the largest maxima, one per document, of equals the first."""
    n_firing = int(np.count_nonzero(largest))
    # 8 n mostly hold n documents; where one document repeats itself, 8 times as many are looked at
    n_near = 8 * n
    while n_firing:
        k = min(n_near, n_firing)
        least = largest[np.argpartition(-largest, k - 1)[:k]].min()
        among = np.flatnonzero(largest >= least)
        strongest = among[np.argsort(-largest[among], kind="stable")][:k]
        first = np.unique(doc_ids[strongest], return_index=True)[1]
        if len(first) >= n or n_near >= n_firing:
            return strongest[np.sort(first)][:n]
        n_near *= 8
    return np.zeros(0, np.int64)


# ---- contrasts: firing next to silent ---------------------------------------------------------

Class = Literal["firing", "silent", "near_miss", "more_firing"]
"""firing, more_firing: two draws without a record in common. near_miss: silent, but holds the token
on which the unit fires most in all."""

CLASSES: tuple[Class, ...] = get_args(Class)

MARKED_FRACTION = 0.3
"""A token of a record fires where its activation is this fraction of the record's maximum."""


@dataclass(frozen=True, slots=True)
class Contrasts:
    """Records of each class for some units of a hook."""

    excerpts: Excerpts
    """What `index` points into."""
    units: Int[ndarray, " units"]
    """The units, ascending."""
    index: Int[ndarray, "units classes n"]
    """Excerpt of each record by class; -1 where the unit has too few."""
    acts: Float[ndarray, "units classes n window"]
    """float32 activations, in units of the hook."""

    def token_ids(self, classes: Sequence[Class]) -> Int[ndarray, "units records window"]:
        """Return the tokens of the records of some classes, one class after the other."""
        return self.excerpts.tokens_of(self.of(classes))

    def of(self, classes: Sequence[Class]) -> Int[ndarray, "units records"]:
        """Return the excerpts of the records of some classes."""
        return self.index[:, [CLASSES.index(name) for name in classes]].reshape(len(self.units), -1)

    def marks(self, of: Class) -> Bool[ndarray, "units n window"]:
        """Return the tokens on which the unit fires in its records of a class."""
        acts = self.acts[:, CLASSES.index(of)]
        return (acts > 0) & (acts >= MARKED_FRACTION * acts.max(axis=2, keepdims=True))


def read_contrasts(
    store: astore.Store,
    hook: str,
    excerpts: Excerpts,
    n: int,
    *,
    units: Sequence[int] | None = None,
    seed: int = 0,
    ranked: bool = False,
) -> Contrasts:
    """Draw up to n records of each class for each unit.

    Args:
        store: An open store.
        hook: A hook captured as rows.
        excerpts: Where records may come from; see `read_excerpts`.
        n: Records of each class.
        units: Which units; None takes all of the hook.
        seed: Seed of what is drawn.
        ranked: A record fires where any token has a stored activation, and is silent where none
            has. A unit that fires on a third of all tokens has no silent record: then the tenth of
            the records with the largest maxima counts as firing, and those at or below the median
            as silent.

    Raises:
        ExplainError: The hook is not stored as rows, or has no such unit.
    """
    wanted = checked_units(store, hook, units)

    def choose(unit: UnitActs) -> Int[ndarray, " records"]:
        rng = stream("contrasts", seed, hook, excerpts.split, unit.unit)
        fires, quiet = unit.largest > 0, unit.largest == 0
        if ranked:
            fires &= unit.largest >= np.quantile(unit.largest, 0.9)
            quiet = (unit.largest <= np.median(unit.largest)) & ~fires
        near = quiet & _holds_favourite(unit, excerpts)
        firing = rng.permutation(np.flatnonzero(fires))
        silent = rng.permutation(np.flatnonzero(quiet))[:n]
        near[silent] = False  # no record twice
        near_miss = rng.permutation(np.flatnonzero(near))[:n]
        classes = (firing[:n], silent, near_miss, firing[n : 2 * n])
        return np.concatenate([filled(records, n) for records in classes])

    index, acts, _ = sample_windows(
        store,
        hook,
        wanted,
        excerpts.grid,
        len(CLASSES) * n,
        choose,
        excerpts.cells_of,
        excerpts,
    )
    shape = (len(wanted), len(CLASSES), n)
    return Contrasts(excerpts, wanted, index.reshape(shape), acts.reshape(*shape, excerpts.window))


# ---- windows around single tokens -------------------------------------------------------------


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

    Only for comparison with papers that cut text so: windows overlap, cross documents and repeat
    each other. A window holds the `window // 2` tokens before its token and the rest from it on, in
    the order of the rows, shorter at the ends of the text.

    Raises:
        ExplainError: A kind other than top and random, no such unit, or a hook not stored as rows.
    """
    if counts.total() != counts.top + counts.random:
        raise ExplainError("token-centred windows are of kind top and random only")
    wanted = checked_units(store, hook, units)
    token_cells = np.flatnonzero(grid.token_ids != PADDING)

    def choose(unit: UnitActs) -> Int[ndarray, " centres"]:
        top = unit.cells[np.lexsort((unit.cells, -unit.acts))[: counts.top]]
        rng = stream("records random", seed, hook, unit.unit)
        random = draw_up_to(rng, token_cells, counts.random)
        return np.concatenate([filled(top, counts.top), filled(random, counts.random)])

    def bounds(centres: ndarray) -> tuple[ndarray, ndarray]:
        start = centres - window // 2
        return np.maximum(start, 0), np.minimum(start + window, len(grid.token_ids))

    def cells_of(centres: ndarray) -> ndarray:
        first, stop = bounds(centres)
        cells = first[..., None] + np.arange(window)
        is_inside = (cells < stop[..., None]) & (centres >= 0)[..., None]
        return np.where(is_inside & (grid.token_ids[np.where(is_inside, cells, 0)] >= 0), cells, -1)

    centres, acts, max_act = sample_windows(
        store, hook, wanted, grid, counts.total(), choose, cells_of
    )
    # windows become excerpts, each once, told apart by first cell and length
    first, stop = bounds(centres)
    keys = np.where(centres >= 0, first * 2 * window + (stop - first), -1)
    unique, index = np.unique(keys, return_inverse=True)
    n_missing = int(len(unique) > 0 and unique[0] == -1)
    first, length = np.divmod(unique[n_missing:], 2 * window)
    columns = np.arange(window)
    cells = np.minimum(first[:, None] + columns, len(grid.token_ids) - 1)
    token_ids = np.where(columns < length[:, None], grid.token_ids[cells], np.int32(PADDING))
    excerpts = Excerpts(grid, window, first, token_ids)
    index = index.reshape(keys.shape) - n_missing
    return Records(hook, excerpts, wanted, counts.kinds(), index, acts, max_act)


# ---- all levels of a unit's activation --------------------------------------------------------

HALF = 4
"""Tokens on each side of an interval record's own token (Bricken et al. 2023: 9 in all)."""

N_INTERVALS = 11
"""Even intervals between 0 and the unit's maximum (Bricken et al. 2023)."""

INTERVAL_PLAN = {"top": 6, "interval": 2 * (N_INTERVALS + 1), "random": 10, "context": 20}
"""Interval records of each kind; those of the intervals come strongest first, zero last."""

INTERVAL_KINDS = np.repeat(np.arange(len(INTERVAL_PLAN)), list(INTERVAL_PLAN.values()))
"""Kind of each column, as its place in the plan."""

TRIES = 50
"""Candidates looked at for each record that is wanted: most texts repeat where a corpus does."""


@dataclass(frozen=True, slots=True)
class IntervalRecords:
    """Short records around single tokens; column r has kind `INTERVAL_KINDS[r]`."""

    grid: TokenGrid
    """The tokens that they are cut from."""
    units: Int[ndarray, " units"]
    """The units, ascending."""
    cells: Int[ndarray, "units records"]
    """Cell of each record's own token; -1 where there is none."""
    token_ids: Int[ndarray, "units records window"]
    """Tokens around it, of its row and document."""
    acts: Float[ndarray, "units records window"]
    """float32 activations, in units of the hook."""


def read_interval_records(
    store: astore.Store, hook: str, *, units: Sequence[int] | None = None, seed: int = 0
) -> IntervalRecords:
    """Choose records from all levels of each unit's activation, from split `score`.

    6 around the strongest tokens, 2 from each of 11 even intervals between 0 and the maximum and 2
    from zero, 10 random ones, and 20 of the strongest tokens in other contexts; no text twice.

    Raises:
        ExplainError: The split has no tokens, or the hook no such units.
    """
    grid = read_grid(store, "score")
    wanted = checked_units(store, hook, units)
    token_cells = np.flatnonzero(grid.token_ids != PADDING)

    def cells_of(cells: ndarray) -> ndarray:
        around = cells[..., None] + np.arange(-HALF, HALF + 1)
        is_inside = (around >= 0) & (around < len(grid.doc_ids)) & (cells >= 0)[..., None]
        inside = np.where(is_inside, around, 0)
        is_inside &= inside // grid.n_ctx == cells[..., None] // grid.n_ctx
        is_inside &= grid.doc_ids[inside] == grid.doc_ids[cells][..., None]
        return np.where(is_inside, around, -1)

    def choose(unit: UnitActs) -> Int[ndarray, " records"]:
        rng = stream("interval records", seed, hook, unit.unit)
        texts: set[bytes] = set()

        def new(candidates: ndarray, n: int) -> Int[ndarray, " n"]:
            """Return the first n candidates whose text is new; -1 where there are too few."""
            kept: list[int] = []
            for cell in candidates[: TRIES * n]:
                text = grid.tokens_at(cells_of(np.array([cell]))[0]).tobytes()
                if text not in texts:
                    texts.add(text)
                    kept.append(int(cell))
                if len(kept) == n:
                    break
            return filled(np.array(kept, np.int64), n)

        cells, acts = unit.cells, unit.acts
        strongest = cells[np.argsort(-acts, kind="stable")]
        columns = [new(strongest, INTERVAL_PLAN["top"])]
        edges = acts.max(initial=0.0) * np.arange(N_INTERVALS, -1, -1) / N_INTERVALS
        for high, low in zip(edges[:-1], edges[1:], strict=True):
            columns.append(new(rng.permutation(cells[(acts > low) & (acts <= high)]), 2))
        anywhere, is_active = rng.permutation(token_cells), np.zeros(len(grid.token_ids), bool)
        is_active[cells] = True
        columns.append(new(anywhere[~is_active[anywhere]], 2))
        columns.append(new(anywhere, INTERVAL_PLAN["random"]))
        # other places of the strongest tokens, one token after the other
        n = INTERVAL_PLAN["context"]
        tokens, first = np.unique(grid.token_ids[strongest], return_index=True)
        here = grid.token_ids[anywhere]
        places = [anywhere[here == token][:n] for token in tokens[np.argsort(first)][:n]]
        turns = [at[turn] for turn in range(n) for at in places if turn < len(at)]
        columns.append(new(np.array(turns, np.int64), n))
        return np.concatenate(columns)

    n = len(INTERVAL_KINDS)
    cells, acts, _ = sample_windows(store, hook, wanted, grid, n, choose, cells_of)
    return IntervalRecords(grid, wanted, cells, grid.tokens_at(cells_of(cells)), acts)
