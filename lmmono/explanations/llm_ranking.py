"""The best of several explanations, by records of split `explain` that their writer did not see.

Records of split `score` are never read here: what picks an explanation must not score it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.clients.client import Usage
from lmmono.errors import ExplainError
from lmmono.explanations.explainer_registry import Task
from lmmono.explanations.llm_simulation import Simulation, simulate
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import Counts, Kind, Records

N_TOP, N_RANDOM = 5, 5
"""Records that rank, of those that were not shown."""

Score = Callable[[str, Int[ndarray, "records window"], Float[ndarray, "records window"]], float]
"""How good an explanation is on tokens and their activations; more is better, NaN is worst."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What ranks explanations, given by the caller."""

    name: str
    """Name in tables."""
    score: Score
    """Explanation, tokens and activations to a number."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Records of one unit that were not shown."""

    token_ids: Int[ndarray, "records window"]
    """Tokens; negative where there is none."""
    acts: Float[ndarray, "records window"]
    """Activations, in units of the hook."""


def held_out(task: Task) -> list[HeldOut]:
    """Return, for each unit of a task, records of split `explain` that are not the task's own.

    Raises:
        ExplainError: The task has no store.
    """
    if task.store is None:
        raise ExplainError(f"{task.explainer}: ranking explanations reads records from a store")
    shown = task.records
    n_top = N_TOP + len(shown.columns("top")) + len(shown.columns("firing", "quantile"))
    counts = Counts(top=n_top, random=N_RANDOM + len(shown.kinds))
    units = [int(unit) for unit in shown.units]
    records = RecordReader(task.store, seed=task.seed).records(
        shown.hook, "explain", counts, window=shown.excerpts.window, units=units
    )
    seen = [_places(shown, i) for i in range(len(units))]
    return [_unseen(records, i, seen[i]) for i in range(len(units))]


def _places(records: Records, i: int) -> set[tuple[int, int]]:
    index = records.index[i][records.index[i] >= 0]
    excerpts = records.excerpts
    return set(
        zip(excerpts.seq_ids[index].tolist(), excerpts.first_pos[index].tolist(), strict=True)
    )


def _unseen(records: Records, i: int, seen: set[tuple[int, int]]) -> HeldOut:
    excerpts, taken = records.excerpts, list[int]()
    wanted: dict[Kind, int] = {"top": N_TOP, "random": N_RANDOM}
    for kind, n in wanted.items():
        free: list[int] = []
        for column in records.columns(kind):
            excerpt = int(records.index[i, column])
            place = (int(excerpts.seq_ids[excerpt]), int(excerpts.first_pos[excerpt]))
            if excerpt >= 0 and place not in seen:
                free.append(int(column))
                seen = seen | {place}
        taken += free[:n]
    return HeldOut(records.token_ids(i)[taken], records.acts[i][taken])


def rank_values(
    task: Task, by: Ranking | str, texts: Sequence[Sequence[str]]
) -> list[list[tuple[float, Usage]]]:
    """Return the value of each candidate of each unit, and what finding it took.

    Args:
        task: The units.
        by: `simulation`, the correlation of activations that the client expects with the true
            ones; or the caller's own.
        texts: Candidates of each unit.

    Raises:
        ExplainError: There is no such ranking.
        ClientError: The client gives no log-probabilities of its prompt.
    """
    records = held_out(task)
    if isinstance(by, Ranking):
        return [
            [(by.score(text, own.token_ids, own.acts), Usage()) for text in candidates]
            for own, candidates in zip(records, texts, strict=True)
        ]
    if by != "simulation":
        raise ExplainError(f"rank_by: want 'simulation' or a Ranking, got {by!r}")
    assert task.client is not None
    each = [(text, own) for own, some in zip(records, texts, strict=True) for text in some]
    ids = [own.token_ids for _, own in each]
    found = simulate(task.client, [text for text, _ in each], ids, task.vocabulary)
    values = iter(zip(found, each, strict=True))
    return [[_valued(*next(values)) for _ in range(len(candidates))] for candidates in texts]


def _valued(found: Simulation, of: tuple[str, HeldOut]) -> tuple[float, Usage]:
    own = of[1]
    there = own.token_ids >= 0
    expected, true = found.acts[there], own.acts[there].astype(np.float64)
    if found.failure or not (np.ptp(expected) > 0 and np.ptp(true) > 0):
        return float("nan"), found.usage
    return float(np.corrcoef(expected, true)[0, 1]), found.usage
