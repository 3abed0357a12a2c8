"""The grid: every arm on every draw of a suite, row by row, without those that are there already.

Draws come first and are the same for all arms; an arm's problems are fitted together. Rows are
given in groups, each to be committed before the next is computed, so a kill costs one group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from lmmono.probes.probing import Job, Part, Solve, Solved
from lmmono.probes.problems import Problems
from lmmono.registry.robustness import Suite
from lmmono.suites.bench import METRIC, Arm, Bench, Key, Texts, key_of
from lmmono.suites.suite import Draw, drawn, judged_parts
from lmmono.suites.text_codes import origin_of

CHUNK = 64
"""Problems of a job, at most."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One arm with the draws that have no rows yet."""

    arm: Arm
    draws: Sequence[Draw]


def suite_rows(
    bench: Bench, suite: Suite, there: Mapping[Key, str], solve: Solve
) -> Iterator[Rows]:
    """Yield the rows of a suite that are not there yet, in groups.

    Args:
        bench: The task with its features.
        suite: One whose probes are judged on texts as they are.
        there: Digests of the rows that exist, by key.
        solve: How probes are fitted.
    """
    parts = {
        p: drawn(bench.task, p, bench.settings.n_test) for p in judged_parts(suite, bench.task)
    }
    judged = {part: said(part, indices) for part, indices in parts.items()}
    draws = list(suite.load()(bench.task, bench.settings))
    for draw in (each for each in draws if each.failure):
        yield _failed(bench, suite, draw, judged, there)
    sound = [draw for draw in draws if not draw.failure]
    works = [
        Work(arm, [d for d in sound if _lacks(bench, suite, arm, d, judged, there)])
        for arm in bench.arms
    ]
    pending = [work for work in works if work.draws]
    if not pending:
        return
    ground = Ground.of(bench, [draw for work in pending for draw in work.draws])
    tests = {part: bench.texts(part, indices) for part, indices in parts.items()}
    plan = [part for work in pending for part in chunks(work)]
    jobs = (ground.job(work, tests) for work in plan)
    measured = {
        name: tests["test"].consistency(name)
        for name in dict.fromkeys(work.arm.feature.name for work in pending)
    }
    for work, solved in zip(plan, solve(jobs), strict=True):
        about = measured[work.arm.feature.name]
        yield [
            {**row, "settings": row["settings"] | about}
            for i, draw in enumerate(work.draws)
            for row in _rows(bench, suite, work, draw, (i, solved), tests, judged)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """Training and validation texts of all draws together, with their features."""

    train: Int64[np.ndarray, " n"]
    val: Int64[np.ndarray, " m"]
    train_texts: Texts
    val_texts: Texts
    n_classes: int

    @classmethod
    def of(cls, bench: Bench, draws: Sequence[Draw]) -> "Ground":
        """Encode the texts that draws use."""
        train, val = (
            np.unique(np.concatenate([getattr(draw, part) for draw in draws]))
            for part in ("train", "val")
        )
        texts = bench.texts("train", train), bench.texts("val", val)
        return cls(train, val, *texts, bench.task.n_classes)

    def job(self, work: Work, tests: Mapping[str, Texts]) -> Job:
        """Return the problems of an arm's draws."""
        name, draws = work.arm.feature.name, work.draws
        y, w = self._labels(draws, "train")
        y_val, w_val = self._labels(draws, "val")
        problems = Problems(
            x=torch.from_numpy(self.train_texts.features[name]),
            y=y,
            x_val=torch.from_numpy(self.val_texts.features[name]),
            y_val=y_val,
            n_classes=self.n_classes,
            seeds=tuple(draw.seed for draw in draws),
            w=w,
            w_val=w_val,
            clean_val=torch.from_numpy(self.val_texts.labels),
        )
        parts = {part: Part(texts.features[name], texts.labels) for part, texts in tests.items()}
        return Job(problems, work.arm.learner, work.arm.budget, parts)

    def _labels(self, draws: Sequence[Draw], part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the labels of each draw over all texts, and which texts each may use."""
        ground: Int64[np.ndarray, " n"] = getattr(self, part)
        clean = (self.train_texts if part == "train" else self.val_texts).labels
        labels = np.repeat(clean[None].astype(np.int64), len(draws), axis=0)
        used = np.zeros(labels.shape, bool)
        for i, draw in enumerate(draws):
            at = np.searchsorted(ground, getattr(draw, part))
            labels[i, at] = draw.labels if part == "train" else draw.val_labels
            used[i, at] = True
        return torch.from_numpy(labels), torch.from_numpy(used)


def chunks(work: Work) -> Iterator[Work]:
    """Yield an arm's draws in parts of at most `CHUNK`."""
    for first in range(0, len(work.draws), CHUNK):
        yield replace(work, draws=work.draws[first : first + CHUNK])


def said(part: str, indices: Int64[np.ndarray, " n"]) -> str:
    """Return which texts of a part are judged, as a hash."""
    return origin_of(part, [str(i) for i in indices.tolist()])


def _lacks(
    bench: Bench,
    suite: Suite,
    arm: Arm,
    draw: Draw,
    judged: Mapping[str, str],
    there: Mapping[Key, str],
) -> bool:
    """Say whether a row of a draw is missing, or was computed of something else."""
    return any(
        there.get(_key(bench, suite, arm, draw, part)) != bench.digest(arm, draw, texts)
        for part, texts in judged.items()
    )


def _key(bench: Bench, suite: Suite, arm: Arm, draw: Draw, part: str) -> Key:
    about = (draw.corruption, draw.level, arm.learner, draw.n_shots, draw.seed, part, METRIC)
    return (suite.name, bench.task.name, arm.label, *about)


def _failed(
    bench: Bench, suite: Suite, draw: Draw, judged: Mapping[str, str], there: Mapping[Key, str]
) -> Rows:
    """Return the rows of a draw that has nothing to learn from."""
    rows = [
        bench.row(
            suite,
            arm,
            draw,
            part,
            digest=bench.digest(arm, draw, texts),
            n_right=0,
            n=0,
            failure=draw.failure,
            seconds=0.0,
        )
        for arm in bench.arms
        for part, texts in judged.items()
    ]
    return [row for row in rows if there.get(key_of(row)) != row["settings"]["digest"]]


def _rows(
    bench: Bench,
    suite: Suite,
    work: Work,
    draw: Draw,
    made: tuple[int, Solved],
    tests: Mapping[str, Texts],
    judged: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one draw of an arm, one per part."""
    i, solved = made
    for part, texts in tests.items():
        yield bench.row(
            suite,
            work.arm,
            draw,
            part,
            digest=bench.digest(work.arm, draw, judged[part]),
            n_right=solved.n_right[part][i],
            n=len(texts.labels),
            failure=solved.probes.failures[i],
            seconds=solved.seconds / len(work.draws) / len(tests),
            facts=said_of_probe(solved, i) | texts.facts,
        )


def said_of_probe(solved: Solved, i: int) -> dict[str, Any]:
    """Return what a row says of probe i: its penalty, and what its learner notes."""
    l2 = float(solved.probes.chosen_l2[i])
    note = solved.probes.notes[i] if solved.probes.notes else None
    return {"l2": None if np.isnan(l2) else l2, **({"note": note} if note else {})}
