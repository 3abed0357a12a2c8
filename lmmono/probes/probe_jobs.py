"""Probes of one feature on many draws: fitted together, in this process or in others.

A job holds everything a worker needs, so a worker has no model and no store. A problem that a
learner cannot learn is a probe of NaN with its failure: it ends no other.
"""

import os
import pickle
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lmmono.probes.problems import Probes, Problems, empty_probes
from lmmono.registry.suites import find_learner


@dataclass(frozen=True, slots=True, eq=False)
class JudgedPart:
    """Features of a part of a task, with labels."""

    x: Float32[np.ndarray, "n d"]
    labels: Int64[np.ndarray, " n"]


@dataclass(frozen=True, slots=True, eq=False)
class ProbeJob:
    """Problems of one feature and learner, and what their probes are judged on."""

    problems: Problems
    """The problems."""
    learner: str
    """Name of the learner."""
    budget: int | None
    """Coordinates that each probe may read; None for all."""
    parts: Mapping[str, JudgedPart]
    """Parts to judge the probes on."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedProbes:
    """Probes of a job, and which texts of each part each has right."""

    probes: Probes
    """One per problem; NaN where it failed."""
    right: dict[str, list[Bool[np.ndarray, " n"]]]
    """Which texts are right by part, an array per problem; none for one that failed."""
    seconds: float
    """Wall time of the job."""


@runtime_checkable
class Solver(Protocol):
    """How jobs are done: `solve_all` here, or in other processes."""

    def __call__(self, jobs: Iterable[ProbeJob]) -> Iterator[FittedProbes]:
        """Yield the results of jobs in their order."""
        ...


def solve(job: ProbeJob) -> FittedProbes:
    """Fit the probes of a job and see what they have right."""
    began = time.perf_counter()
    probes = fit_probes(job.problems, job.learner, job.budget)
    right = {name: which_right(probes, part) for name, part in job.parts.items()}
    return FittedProbes(probes, right, time.perf_counter() - began)


def which_right(probes: Probes, part: JudgedPart) -> list[Bool[np.ndarray, " n"]]:
    """Return which texts each probe has right; none for one that failed."""
    x, labels = probes.inputs(torch.from_numpy(part.x)), torch.from_numpy(part.labels)
    right = [np.zeros(len(labels), bool)] * len(probes)
    for i, failure in enumerate(probes.failures):
        if failure is None and len(labels):
            logits = x @ probes.weight[i].float().T + probes.bias[i].float()
            right[i] = (logits.argmax(dim=1) == labels).numpy()
    return right


def fit_probes(problems: Problems, learner: str, budget: int | None = None) -> Probes:
    """Return the probes of problems; one that cannot be learned is NaN, with its failure.

    With a budget a probe reads only the coordinates whose class means differ most on its own, noisy
    training labels; it is given back as a probe of all coordinates that is zero elsewhere.

    Args:
        problems: What to learn from.
        learner: Name of a learner.
        budget: Coordinates that each probe may read; None for all.

    Raises:
        RobustnessError: There is no such learner.
    """
    fit, probes = find_learner(learner).load(), empty_probes(problems, problems.faults())
    failures = list(probes.failures)
    notes: list[str | None] = [None] * len(problems)
    sound = [i for i, failure in enumerate(failures) if failure is None]
    d = problems.x.shape[1]
    k = d if budget is None else min(budget, d)
    for members in [[i] for i in sound] if k < d else [sound] if sound else []:
        part, chosen = problems.subset(members), torch.arange(d)
        if k < d:
            rows = part.rows[0]
            chosen = telling(part.x[rows], part.y[0][rows], part.n_classes, k)
            part = replace(part, x=part.x[:, chosen], x_val=part.x_val[:, chosen])
        fitted = fit(part)
        probes = replace(probes, reads=fitted.reads)
        probes.weight[members] = 0.0
        for at, i in enumerate(members):
            probes.weight[i][:, chosen] = fitted.weight[at].float()
            probes.bias[i], probes.chosen_l2[i] = fitted.bias[at].float(), fitted.chosen_l2[at]
            failures[i] = fitted.failures[at]
            notes[i] = fitted.notes[at] if fitted.notes else None
    return replace(probes, failures=tuple(failures), notes=tuple(notes))


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


def solve_all(jobs: Iterable[ProbeJob]) -> Iterator[FittedProbes]:
    """Do jobs one after the other in this process."""
    yield from map(solve, jobs)


@contextmanager
def solving(n_processes: int) -> Generator[Solver]:
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

        def solve_elsewhere(jobs: Iterable[ProbeJob]) -> Iterator[FittedProbes]:
            waiting: list[Future[bytes]] = []
            for job in jobs:
                waiting.append(pool.submit(_solve_pickled, pickle.dumps(job)))
                if len(waiting) > 2 * n_processes:
                    yield pickle.loads(waiting.pop(0).result())
            yield from (pickle.loads(future.result()) for future in waiting)

        yield solve_elsewhere


def _solve_pickled(job: bytes) -> bytes:
    """Do a job in a worker; as bytes, because torch would send tensors through shared memory."""
    return pickle.dumps(solve(pickle.loads(job)))
