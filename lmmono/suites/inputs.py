"""Probes learned on clean texts, judged on texts with noise: on their characters or in the model.

A noisy text is encoded once for all features, so families meet the same noise; severity 0 is the
clean text and its stored features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from lmmono.data.corruption.synonyms import (
    Synonyms,
    planted_synonyms,
    read_synonyms,
    wordnet_synonyms,
)
from lmmono.data.corruption.texts import corrupt_texts
from lmmono.errors import DataError, RobustnessError
from lmmono.probes.probing import Part, Solve, Solved, right
from lmmono.probes.problems import Probes
from lmmono.registry.robustness import MODEL_NOISE, Suite
from lmmono.registry.tasks import PLANTED
from lmmono.suites.bench import METRIC, Arm, Bench, Key, Texts
from lmmono.suites.grid import Ground, Rows, Work, said, said_of_probe
from lmmono.suites.suite import Draw, drawn
from lmmono.suites.text_codes import InputNoise

TEST = "test"


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """Clean probes of an arm, one per draw."""

    arm: Arm
    solved: Solved

    def probe(self, i: int) -> Probes:
        """Return the probe of draw i alone."""
        probes = self.solved.probes
        notes = probes.notes[i : i + 1]
        one = (probes.weight[i : i + 1], probes.bias[i : i + 1], probes.chosen_l2[i : i + 1])
        return Probes(*one, probes.failures[i : i + 1], notes)


def noised_rows(
    bench: Bench, suite: Suite, there: Mapping[Key, str], solve: Solve
) -> Iterator[Rows]:
    """Yield the rows of test texts under every noise and severity that are not there yet."""
    indices = drawn(bench.task, TEST, bench.settings.n_noised)
    judged = said(TEST, indices)
    draws = list(suite.load()(bench.task, bench.settings))
    levels = sorted({0, *bench.settings.severities})
    cells = [(kind, level) for kind in bench.settings.input_noise for level in levels]
    lacking = {
        (i, cell): short
        for i, draw in enumerate(draws)
        for cell in cells
        if (short := [a for a in bench.arms if _lacks(bench, suite, a, draw, cell, judged, there)])
    }
    if not lacking:
        return
    wanted = {arm for short in lacking.values() for arm in short}
    learned = learn(bench, [arm for arm in bench.arms if arm in wanted], draws, solve)
    clean = bench.texts(TEST, indices)
    for (i, cell), short in lacking.items():
        texts = _noised(bench, indices, clean, draws[i], cell, short)
        yield [
            _row(bench, suite, learned[arm.label, arm.learner], (i, draws[i]), cell, texts, judged)
            for arm in short
        ]


def learn(
    bench: Bench, arms: Sequence[Arm], draws: Sequence[Draw], solve: Solve
) -> dict[tuple[str, str], Learned]:
    """Return the probes of arms on draws, by label and learner."""
    ground = Ground.of(bench, draws)
    jobs = (ground.job(Work(arm, draws), {}) for arm in arms)
    return {
        (arm.label, arm.learner): Learned(arm, solved)
        for arm, solved in zip(arms, solve(jobs), strict=True)
    }


def synonyms_for(bench: Bench) -> Synonyms:
    """Return which words may stand for each other in the texts of a task.

    Raises:
        DataError: The file of the settings cannot be read, or WordNet is not there.
    """
    path = bench.settings.synonyms
    if path is not None:
        texts = bench.task.part(TEST).texts
        return read_synonyms(path, {word for text in texts for word in text.split()})
    return planted_synonyms() if bench.task.name in PLANTED else wordnet_synonyms()


def _key(bench: Bench, suite: Suite, arm: Arm, draw: Draw, cell: tuple[str, int]) -> Key:
    about = (cell[0], float(cell[1]), arm.learner, None, draw.seed, TEST, METRIC)
    return (suite.name, bench.task.name, arm.label, *about)


def _lacks(
    bench: Bench,
    suite: Suite,
    arm: Arm,
    draw: Draw,
    cell: tuple[str, int],
    judged: str,
    there: Mapping[Key, str],
) -> bool:
    return there.get(_key(bench, suite, arm, draw, cell)) != bench.digest(arm, draw, judged)


def _noised(
    bench: Bench,
    indices: Int64[np.ndarray, " n"],
    clean: Texts,
    draw: Draw,
    cell: tuple[str, int],
    short: Sequence[Arm],
) -> Texts | str:
    """Return the features of noisy test texts, or why there are none."""
    kind: Any = cell[0]
    severity = cell[1]
    if not severity:
        return clean
    texts = [bench.task.part(TEST).texts[i] for i in indices.tolist()]
    names = list(dict.fromkeys(arm.feature.name for arm in short))
    try:
        if kind in MODEL_NOISE:
            noise = InputNoise(kind, severity, draw.seed)
            made = bench.encoder.encode(texts, names=names, noise=noise)
        else:
            lists = synonyms_for(bench) if kind == "synonyms" else None
            noisy = corrupt_texts(texts, kind, severity, seed=draw.seed, synonyms=lists)
            made = bench.encoder.encode(noisy, names=names)
    except (DataError, RobustnessError) as fault:
        return str(fault)
    return replace(
        clean,
        features=made.features,
        n_truncated=made.n_truncated,
        n_tokenless=made.n_tokenless,
    )


def _row(
    bench: Bench,
    suite: Suite,
    learned: Learned,
    of: tuple[int, Draw],
    cell: tuple[str, int],
    texts: Texts | str,
    judged: str,
) -> dict[str, Any]:
    (i, draw), arm = of, learned.arm
    failure = texts if isinstance(texts, str) else learned.solved.probes.failures[i]
    n_right, n, facts = 0, 0, dict[str, Any]()
    if isinstance(texts, Texts):
        part = Part(texts.features[arm.feature.name], texts.labels)
        n_right, n = right(learned.probe(i), part)[0], len(texts.labels)
        facts = texts.facts
    return bench.row(
        suite,
        arm,
        draw,
        TEST,
        digest=bench.digest(arm, draw, judged),
        n_right=n_right,
        n=n,
        failure=failure,
        seconds=0.0,
        corruption=cell[0],
        level=float(cell[1]),
        facts={**said_of_probe(learned.solved, i), **facts},
    )
