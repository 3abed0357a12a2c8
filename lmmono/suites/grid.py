"""The grid: every arm on every draw of a suite, row by row, without those that are stored already.

Draws come first and are the same for all arms; an arm's problems are fitted together. Rows are
given in groups, each to be committed before the next is computed, so a kill costs one group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from lmmono.probes.probe_jobs import FittedProbes, JudgedPart, ProbeJob, Solver
from lmmono.probes.problems import Problems
from lmmono.registry.suites import Suite
from lmmono.suites.bench import (
    Bench,
    Condition,
    Key,
    LabelledCodes,
    Measurement,
    ProbeArm,
    Rows,
    judged_texts,
    semantic_consistency,
)
from lmmono.suites.suite_draws import SuiteDraw, drawn, judged_parts

STRONGEST = 0.1
"""Share of the texts, those on which a coordinate is strongest, for its consistency there."""

CHUNK = 64
"""Problems of a job, at most: what a kill costs, and what one process has in hand."""


def suite_rows(
    bench: Bench, suite: Suite, stored: Mapping[Key, str], solve: Solver
) -> Iterator[Rows]:
    """Yield the rows of a suite that are not stored yet, in groups.

    Args:
        bench: The task with its codes.
        suite: One whose probes are judged on texts as they are.
        stored: Digests of the rows that exist, by key.
        solve: How probes are fitted.
    """
    parts = {
        p: drawn(bench.task, p, bench.settings.n_test) for p in judged_parts(suite, bench.task)
    }
    judged = {part: judged_texts(part, indices) for part, indices in parts.items()}

    def conditions(arm: ProbeArm, draw: SuiteDraw) -> list[Condition]:
        return [
            Condition(suite, arm, draw, part, texts, draw.corruption, draw.level)
            for part, texts in judged.items()
        ]

    def lacks(arm: ProbeArm, draw: SuiteDraw) -> bool:
        return any(bench.lacks(about, stored) for about in conditions(arm, draw))

    learnable: list[SuiteDraw] = []
    for draw in list(suite.load()(bench.task, bench.settings)):
        if not draw.failure:
            learnable.append(draw)
        else:  # nothing to learn from, whoever learns
            yield [
                bench.row(about, Measurement(failure=draw.failure))
                for arm in bench.arms
                for about in conditions(arm, draw)
                if bench.lacks(about, stored)
            ]
    work = [
        (arm, short[first : first + CHUNK])
        for arm in bench.arms
        if (short := [draw for draw in learnable if lacks(arm, draw)])
        for first in range(0, len(short), CHUNK)
    ]
    if not work:
        return
    ground = Ground.of(bench, [draw for _, short in work for draw in short])
    tests = {part: bench.codes(part, indices) for part, indices in parts.items()}
    facts = _facts_of_codes(bench, tests, work)
    jobs = (ground.job(arm, short, tests) for arm, short in work)
    for (arm, short), fitted in zip(work, solve(jobs), strict=True):
        seconds = fitted.seconds / len(short) / len(tests)
        yield [
            bench.row(
                about,
                Measurement.of(
                    fitted.right[about.split][i],
                    fitted.probes.failures[i],
                    {**probe_facts(fitted, i), **facts[about.split, arm.code.name]},
                    seconds,
                ),
            )
            for i, draw in enumerate(short)
            for about in conditions(arm, draw)
        ]


def _facts_of_codes(
    bench: Bench,
    tests: Mapping[str, LabelledCodes],
    work: Sequence[tuple[ProbeArm, list[SuiteDraw]]],
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what rows say of their test texts and of their code, by part and code."""
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for name in dict.fromkeys(arm.code.name for arm, _ in work):
        consistency = _consistency(tests["test"], name, bench.task.n_classes)
        facts |= {(part, name): {**texts.facts, **consistency} for part, texts in tests.items()}
    return facts


def _consistency(texts: LabelledCodes, name: str, n_classes: int) -> dict[str, Any]:
    """Return what a row says of how monosemantic a code is, on test texts."""
    code, labels = texts.codes[name], texts.labels
    value, n, active = semantic_consistency(code, labels, n_classes=n_classes)
    top, *_ = semantic_consistency(code, labels, n_classes=n_classes, strongest=STRONGEST)
    return {
        "semantic_consistency": None if np.isnan(value) else round(value, 4),
        "semantic_consistency_strongest": None if np.isnan(top) else round(top, 4),
        "n_consistent": n,
        "active_fraction": None if np.isnan(active) else round(active, 4),
    }


def probe_facts(fitted: FittedProbes, i: int) -> dict[str, Any]:
    """Return what a row says of probe i: its penalty, and what its learner notes."""
    l2 = float(fitted.probes.chosen_l2[i])
    note = fitted.probes.notes[i] if fitted.probes.notes else None
    return {"l2": None if np.isnan(l2) else l2, **({"note": note} if note else {})}


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """Training and validation texts of all draws together, with their codes."""

    train: Int64[np.ndarray, " n"]
    val: Int64[np.ndarray, " m"]
    train_codes: LabelledCodes
    val_codes: LabelledCodes
    n_classes: int

    @classmethod
    def of(cls, bench: Bench, draws: Sequence[SuiteDraw]) -> "Ground":
        """Encode the texts that draws use."""
        train = np.unique(np.concatenate([draw.train for draw in draws]))
        val = np.unique(np.concatenate([draw.val for draw in draws]))
        codes = bench.codes("train", train), bench.codes("val", val)
        return cls(train, val, *codes, bench.task.n_classes)

    def job(
        self, arm: ProbeArm, draws: Sequence[SuiteDraw], tests: Mapping[str, LabelledCodes]
    ) -> ProbeJob:
        """Return the problems of an arm's draws."""
        name = arm.code.name
        y, w = _over_all(self.train, self.train_codes, [(d.train, d.labels) for d in draws])
        y_val, w_val = _over_all(self.val, self.val_codes, [(d.val, d.val_labels) for d in draws])
        problems = Problems(
            x=torch.from_numpy(self.train_codes.codes[name]),
            y=y,
            x_val=torch.from_numpy(self.val_codes.codes[name]),
            y_val=y_val,
            n_classes=self.n_classes,
            seeds=tuple(draw.seed for draw in draws),
            w=w,
            w_val=w_val,
            clean_val=torch.from_numpy(self.val_codes.labels),
        )
        parts = {part: JudgedPart(codes.codes[name], codes.labels) for part, codes in tests.items()}
        return ProbeJob(problems, arm.learner, arm.budget, parts)


def _over_all(
    texts: Int64[np.ndarray, " n"],
    codes: LabelledCodes,
    draws: Sequence[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _"]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels of each draw over all texts, and which texts each may use."""
    labels = np.repeat(codes.labels[None].astype(np.int64), len(draws), axis=0)
    used = np.zeros(labels.shape, bool)
    for row, (chosen, drawn_labels) in enumerate(draws):
        at = np.searchsorted(texts, chosen)
        labels[row, at] = drawn_labels
        used[row, at] = True
    return torch.from_numpy(labels), torch.from_numpy(used)
