"""`anthropic_intervals`: predictions on short examples from all levels of a unit's activation.

Bricken et al. 2023, Towards Monosemanticity: 60 examples of 9 tokens, 6 around the strongest
tokens, 2 from each of 11 even intervals between 0 and the maximum and 2 from zero, 10 random ones
and 20 of the strongest tokens in other contexts. The value is Spearman's correlation of all
predictions with the truth; a constant prediction counts as 0, and a unit with fewer than 20 firing
examples is not defined. Here the examples come from other documents than the explanation, never
cross a document, and no text is shown twice.
"""

from dataclasses import dataclass, field, replace
from importlib import import_module

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.explanations.explanation import Explanation
from lmmono.explanations.llm_simulation import Simulation
from lmmono.records.token_grid import PADDING, TokenGrid, read_grid
from lmmono.records.unit_rows import UnitRows, checked_units, read_unit_rows
from lmmono.scores.explained import explanations_of, spent, undefined
from lmmono.scores.scorer_registry import Job, Row
from lmmono.scores.simulation import SIMULATORS
from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.unit_intervals import unit_intervals, unit_method

HALF = 4
"""Tokens on each side of an example's own token."""

WINDOW = 2 * HALF + 1

N_INTERVALS = 11
"""Even intervals between 0 and the unit's maximum."""

MIN_FIRING = 20
"""A unit with fewer firing examples is not defined."""

PLAN = {"top": 6, "interval": 2 * (N_INTERVALS + 1), "random": 10, "context": 20}
"""Examples of each kind; those of the intervals come strongest first, zero last."""

KINDS = np.repeat(np.arange(len(PLAN)), list(PLAN.values()))


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of some units; column r has kind `KINDS[r]`."""

    units: Int[ndarray, " units"]
    cells: Int[ndarray, "units examples"]
    """Cell of each example's own token; -1 where there is none."""
    token_ids: Int[ndarray, "units examples window"]
    acts: Float[ndarray, "units examples window"]


def window_cells(grid: TokenGrid, cells: Int[ndarray, " n"]) -> Int[ndarray, "n window"]:
    """Return the cells around each cell; -1 outside its row or document, and for cell -1."""
    around = cells[:, None] + np.arange(-HALF, HALF + 1)
    inside = (around >= 0) & (around < len(grid.doc_ids))
    safe = np.where(inside, around, 0)
    inside &= safe // grid.n_ctx == cells[:, None] // grid.n_ctx
    inside &= grid.doc_ids[safe] == grid.doc_ids[cells][:, None]
    return np.where(inside & (cells >= 0)[:, None], around, -1)


def read_examples(job: Job) -> tuple[TokenGrid, Examples]:
    """Choose the examples of the units of a job from split `score`.

    Raises:
        ExplainError: The split has no tokens, or the hook no such units.
    """
    grid = read_grid(job.store, "score")
    units = checked_units(job.store, job.hook, job.units)
    cells = np.full((len(units), len(KINDS)), -1)
    acts = np.zeros((*cells.shape, WINDOW), np.float32)
    ids = np.full(acts.shape, PADDING, np.int32)
    done = 0
    for rows in read_unit_rows(job.store, job.hook, units, grid):
        for i in range(len(rows.units)):
            choice = _Choice(grid, rows, i, (job.seed, *job.hook.encode()))
            cells[done] = choice.examples()
            around = window_cells(grid, cells[done])
            ids[done] = np.where(around >= 0, grid.token_ids[around], PADDING)
            acts[done] = np.where(around >= 0, choice.dense[around], 0)
            done += 1
    return grid, Examples(units, cells, ids, acts)


@dataclass(slots=True)
class _Choice:
    """The examples of one unit while they are chosen; none has the text of another."""

    grid: TokenGrid
    rows: UnitRows
    i: int
    seed: tuple[int, ...]
    dense: ndarray = field(init=False)
    shown: set[bytes] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.dense = np.zeros(len(self.grid.token_ids), np.float32)
        cells, acts = self.rows.of(self.i)
        self.dense[cells] = acts

    def examples(self) -> Int[ndarray, " examples"]:
        cells, acts = self.rows.of(self.i)
        rng = np.random.default_rng((*self.seed, int(self.rows.units[self.i]), 41))
        strongest = cells[np.argsort(-acts, kind="stable")]
        found = [self._new(strongest, PLAN["top"])]
        edges = acts.max(initial=0.0) * np.arange(N_INTERVALS, -1, -1) / N_INTERVALS
        for high, low in zip(edges[:-1], edges[1:], strict=True):
            found.append(self._new(rng.permutation(cells[(acts > low) & (acts <= high)]), 2))
        anywhere = rng.permutation(np.flatnonzero(self.grid.token_ids != PADDING))
        found.append(self._new(anywhere[self.dense[anywhere] == 0], 2))
        found.append(self._new(anywhere, PLAN["random"]))
        found.append(self._in_context(strongest, anywhere))
        return np.concatenate(found)

    def _in_context(self, strongest: ndarray, anywhere: ndarray) -> ndarray:
        """Return other places of the strongest tokens, one token after the other."""
        tokens, first = np.unique(self.grid.token_ids[strongest], return_index=True)
        order = tokens[np.argsort(first)][: PLAN["context"]]
        here = self.grid.token_ids[anywhere]
        places = [anywhere[here == token][: PLAN["context"]] for token in order]
        turns = [at[turn] for turn in range(PLAN["context"]) for at in places if turn < len(at)]
        return self._new(np.array(turns, np.int64), PLAN["context"])

    def _new(self, candidates: Int[ndarray, " n"], n: int) -> Int[ndarray, " wanted"]:
        """Return the first n candidates whose text is new; -1 where there are too few."""
        found = np.full(n, -1)
        k = 0
        for cell in candidates[: 50 * n]:
            around = window_cells(self.grid, np.array([cell]))[0]
            text = np.where(around >= 0, self.grid.token_ids[around], PADDING).tobytes()
            if text not in self.shown:
                self.shown.add(text)
                found[k] = cell
                k += 1
                if k == n:
                    break
        return found


def score_intervals(job: Job) -> list[Row]:
    """Score units by Spearman's correlation over the examples' tokens, controls included."""
    grid, examples = read_examples(job)
    units = examples.units.tolist()
    rows: list[Row] = []
    for control, explanations in explanations_of(job, units).items():
        predicted, failures, took = _predicted(job, explanations, examples.token_ids)
        mine = _rows(job, grid, examples, predicted, failures, control)
        rows += [row | columns for row, columns in zip(mine, took, strict=True)]
        if control is None and job.controls:
            moved = replace(examples, acts=_misplaced(examples.acts, job.seed))
            rows += _rows(job, grid, moved, predicted, failures, "shuffled_pairing")
            centre = np.zeros(predicted.shape)
            centre[..., HALF] = 1.0
            nothing: list[str | None] = [None] * len(units)
            rows += _rows(job, grid, examples, centre, nothing, "centre_token")
    return rows


def _misplaced(
    acts: Float[ndarray, "units examples window"], seed: int
) -> Float[ndarray, "units examples window"]:
    """Return the activations of other examples, moved round by 1 to 8 tokens.

    Examples are centred on tokens that fire, so another example alone would be partly right.
    """
    rng = np.random.default_rng((seed, 59))
    order, shifts = rng.permutation(len(KINDS)), rng.integers(1, WINDOW, len(KINDS))
    rolled = [np.roll(acts[:, at], shift, axis=1) for at, shift in zip(order, shifts, strict=True)]
    return np.stack(rolled, axis=1)


def _predicted(
    job: Job, explanations: list[Explanation], token_ids: Int[ndarray, "units examples window"]
) -> tuple[Float[ndarray, "units examples window"], list[str | None], list[Row]]:
    module, _, name = SIMULATORS[job.settings["simulator"]].partition(":")
    simulate = getattr(import_module(module), name)
    failures: list[str | None] = [each.failure for each in explanations]
    good = [i for i, failure in enumerate(failures) if failure is None]
    took: list[Row] = [{} for _ in explanations]
    predicted = np.zeros(token_ids.shape)
    answers = simulate(job, [explanations[i] for i in good], token_ids[good])
    for i, answer in zip(good, answers, strict=True):
        if isinstance(answer, str):
            failures[i] = answer
        elif isinstance(answer, Simulation):
            predicted[i], failures[i] = answer.acts, answer.failure
            took[i] = {**spent(answer.usage), "prompt_hash": answer.prompt_hash}
        else:
            predicted[i] = answer
    return predicted, failures, took


def _rows(
    job: Job,
    grid: TokenGrid,
    examples: Examples,
    predicted: Float[ndarray, "units examples window"],
    failures: list[str | None],
    control: str | None,
) -> list[Row]:
    present = examples.cells >= 0
    there = examples.token_ids != PADDING
    sums, agreement = record_sums(examples.acts, predicted, there), AGREEMENTS["spearman"]
    value = agreement.of(sums.sum(axis=1))
    low, high = unit_intervals(sums, present, KINDS, agreement)
    firing = (examples.acts > 0).any(axis=2).sum(axis=1)
    rows: list[Row] = []
    for i, unit in enumerate(examples.units.tolist()):
        n = int(present[i].sum())
        documents = grid.doc_ids[examples.cells[i][present[i]]]
        known: Row = {"n": n, "n_records": n, "n_tokens": int(there[i].sum()), "control": control}
        known["n_documents"] = len(np.unique(documents))
        failure = failures[i] or ("too_few_records" if firing[i] < MIN_FIRING else None)
        if failure is not None:
            known |= undefined(failure, 0.0)
        else:
            undefined_here = bool(np.isnan(value[i]))
            known |= {"value": 0.0 if undefined_here else float(value[i])}
            known |= {"nan_fraction": float(undefined_here), "n_failures": 0}
            if not np.isnan(low[i]) and not undefined_here:
                fewest = int(min(present[i][kind == KINDS].sum() for kind in np.unique(KINDS)))
                known |= {"ci_low": float(low[i]), "ci_high": float(high[i])}
                known["ci_method"] = unit_method(fewest, int(firing[i]))
        rows.append(job.row("anthropic_intervals", unit, **known))
    return rows
