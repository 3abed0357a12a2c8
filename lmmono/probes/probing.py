"""Probes of one feature on many draws: fitted together, in this process or in others.

A job holds everything a worker needs, so a worker has no model and no store. With a budget a probe
reads only the coordinates whose class means differ most on its own, noisy training labels; it is
given back as a probe of all coordinates that is zero elsewhere.
"""

import os
import pickle
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from lmmono.probes.problems import Probes, Problems
from lmmono.registry.robustness import find_learner


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Features of a part of a task, with labels."""

    x: Float32[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Problems of one feature and learner, and what their probes are judged on."""

    problems: Problems
    """The problems."""
    learner: str
    """Name of the learner."""
    budget: int | None
    """Coordinates that each probe may read; None for all."""
    parts: Mapping[str, Part]
    """Parts to judge the probes on."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """Probes of a job, and how many texts of each part each has right."""

    probes: Probes
    """One per problem; NaN where it failed."""
    n_right: dict[str, list[int]]
    """Right texts by part, one number per problem."""
    seconds: float
    """Wall time of the job."""


@runtime_checkable
class Solve(Protocol):
    """How jobs are done: `solve_all` here, or in other processes."""

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Solved]:
        """Yield the results of jobs in their order."""
        ...


def solve(job: Job) -> Solved:
    """Fit the probes of a job and count what they have right."""
    began = time.perf_counter()
    probes = fit_probes(job.problems, job.learner, job.budget)
    n_right = {name: right(probes, part) for name, part in job.parts.items()}
    return Solved(probes, n_right, time.perf_counter() - began)


def right(probes: Probes, part: Part) -> list[int]:
    """Return how many texts each probe has right; 0 for one that failed."""
    x, labels = torch.from_numpy(part.x), torch.from_numpy(part.labels)
    if not len(part.labels):
        return [0] * len(probes)
    counts: list[int] = []
    for probe in range(len(probes)):
        logits = x @ probes.weight[probe].float().T + probes.bias[probe].float()
        counts.append(int((logits.argmax(dim=1) == labels).sum()))
    return [0 if f else n for n, f in zip(counts, probes.failures, strict=True)]


def fit_probes(problems: Problems, learner: str, budget: int | None = None) -> Probes:
    """Return the probes of problems; one that cannot be learned is NaN, with its failure.

    Args:
        problems: What to learn from.
        learner: Name of a learner.
        budget: Coordinates that each probe may read; None for all.

    Raises:
        RobustnessError: There is no such learner.
    """
    fit, faults = find_learner(learner).load(), problems.faults()
    sound = [i for i, fault in enumerate(faults) if fault is None]
    if budget is not None and budget < problems.x.shape[1]:
        found = [_on_budget(problems.subset([i]), learner, budget) for i in sound]
    else:
        found = [fit(problems.subset(sound))] if sound else []
    return _scattered(problems, sound, found, faults)


def _on_budget(problem: Problems, learner: str, budget: int) -> Probes:
    rows = problem.rows[0]
    chosen = telling(problem.x[rows], problem.y[0][rows], problem.n_classes, budget)
    narrow = replace(problem, x=problem.x[:, chosen], x_val=problem.x_val[:, chosen])
    probes = find_learner(learner).load()(narrow)
    weight = probes.weight.new_zeros(1, problem.n_classes, problem.x.shape[1])
    weight[:, :, chosen] = probes.weight
    return replace(probes, weight=weight)


def telling(
    x: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], n_classes: int, k: int
) -> Int64[Tensor, " k"]:
    """Return the k coordinates in which some class mean is farthest, in deviations, from the mean.

    Labels may be noisy: those that the probe learns from, never others.
    """
    centred = x.double() - x.double().mean(0)
    deviation = centred.square().mean(0).sqrt()
    member = torch.nn.functional.one_hot(labels, n_classes).double()
    counts = member.sum(0).clamp_min(1.0)
    means = (member.T @ centred) / counts[:, None]
    # a class of few texts has a mean that is far off by chance
    distance = (means.abs() * counts.sqrt()[:, None]).amax(0)
    varies = deviation > 1e-9
    score = torch.where(varies, distance / deviation.where(varies, 1.0), -1.0)
    return score.topk(k).indices.sort().values


def _scattered(
    problems: Problems,
    sound: Sequence[int],
    found: Sequence[Probes],
    faults: tuple[str | None, ...],
) -> Probes:
    """Return the probes of all problems from those of the sound ones."""
    p, c, d = len(problems), problems.n_classes, problems.x.shape[1]
    weight = torch.full((p, c, d), torch.nan)
    bias, l2 = torch.full((p, c), torch.nan), torch.full((p,), torch.nan)
    failures, notes = list(faults), list[str | None]([None]) * p
    if found:
        at = torch.tensor(list(sound))
        weight[at] = torch.cat([each.weight for each in found]).float().cpu()
        bias[at] = torch.cat([each.bias for each in found]).float().cpu()
        l2[at] = torch.cat([each.chosen_l2 for each in found]).float().cpu()
        told = [f for each in found for f in each.failures]
        noted = [n for each in found for n in each.notes or (None,) * len(each)]
        for i, failure, note in zip(sound, told, noted, strict=True):
            failures[i], notes[i] = failure, note
    return Probes(weight, bias, l2, tuple(failures), tuple(notes))


def solve_all(jobs: Iterable[Job]) -> Iterator[Solved]:
    """Do jobs one after the other in this process."""
    yield from map(solve, jobs)


@contextmanager
def solving(n_processes: int) -> Generator[Solve]:
    """Yield how jobs are done by so many processes; with one they are done in this one.

    Jobs wait at most two per process, so that features of few jobs are in memory at a time.
    """
    if n_processes == 1:
        yield solve_all
        return
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    with ProcessPoolExecutor(
        n_processes, get_context("spawn"), initializer=torch.set_num_threads, initargs=(n_threads,)
    ) as pool:

        def solve_there(jobs: Iterable[Job]) -> Iterator[Solved]:
            waiting: list[Future[bytes]] = []
            for job in jobs:
                waiting.append(pool.submit(_solve_pickled, pickle.dumps(job)))
                if len(waiting) > 2 * n_processes:
                    yield pickle.loads(waiting.pop(0).result())
            for each in waiting:
                yield pickle.loads(each.result())

        yield solve_there


def _solve_pickled(job: bytes) -> bytes:
    """Do a job in a worker; as bytes, because torch would send tensors through shared memory."""
    return pickle.dumps(solve(pickle.loads(job)))
