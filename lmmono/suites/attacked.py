"""Finished probes under attack: edits of test texts that are chosen against each probe itself.

So families do not meet the same texts here, but the same attack with the same limits. A row's value
is the share of texts that the probe has right after the attack; at level 0, before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from lmmono.data.corruption.synonyms import Synonyms
from lmmono.errors import DataError, RobustnessError
from lmmono.probes.probing import Solve
from lmmono.registry.robustness import Suite
from lmmono.suites.attacks import AttackReport, Limits, Predict, attack
from lmmono.suites.bench import METRIC, Arm, Bench, Key
from lmmono.suites.grid import Rows, said, said_of_probe
from lmmono.suites.inputs import Learned, learn, synonyms_for
from lmmono.suites.suite import Draw, drawn

LIMITS = Limits()
"""What an attack may change and ask."""

TEST = "test"


def attacked_rows(
    bench: Bench, suite: Suite, there: Mapping[Key, str], solve: Solve
) -> Iterator[Rows]:
    """Yield the rows of every attack on every probe that are not there yet, probe by probe."""
    indices = drawn(bench.task, TEST, bench.settings.n_attacked)
    judged = said(TEST, indices)
    draws = list(suite.load()(bench.task, bench.settings))
    lacking = [
        (i, arm, method)
        for i, draw in enumerate(draws)
        for arm in bench.arms
        for method in bench.settings.attacks
        if any(
            there.get(_key(bench, suite, arm, draw, method, level))
            != bench.digest(arm, draw, judged)
            for level in (0.0, LIMITS.max_changed)
        )
    ]
    if not lacking:
        return
    wanted = {arm for _, arm, _ in lacking}
    learned = learn(bench, [arm for arm in bench.arms if arm in wanted], draws, solve)
    texts = [bench.task.part(TEST).texts[i] for i in indices.tolist()]
    for i, arm, method in lacking:
        probe = learned[arm.label, arm.learner]
        report = _report(bench, probe, i, method, texts, draws[i].seed)
        yield list(_rows(bench, suite, probe, (i, draws[i]), method, report, judged))


def _key(bench: Bench, suite: Suite, arm: Arm, draw: Draw, method: str, level: float) -> Key:
    about = (method, level, arm.learner, None, draw.seed, TEST, METRIC)
    return (suite.name, bench.task.name, arm.label, *about)


def _report(
    bench: Bench, probe: Learned, i: int, method: Any, texts: Sequence[str], seed: int
) -> AttackReport | str:
    """Return what an attack did to a probe, or why there was none."""
    failure = probe.solved.probes.failures[i]
    if failure is not None:
        return failure
    labelled = bench.task.part(TEST)
    indices = drawn(bench.task, TEST, bench.settings.n_attacked)
    try:
        lists: Synonyms | None = synonyms_for(bench) if method == "words" else None
        return attack(
            _predict(bench, probe, i),
            texts,
            labelled.labels[indices],
            method=method,
            seed=seed,
            limits=LIMITS,
            synonyms=lists,
        )
    except (DataError, RobustnessError) as fault:
        return str(fault)


def _predict(bench: Bench, probe: Learned, i: int) -> Predict:
    """Return the probe of a draw as a function of texts."""
    name, probes = probe.arm.feature.name, probe.probe(i)

    def predict(texts: list[str]) -> Float[np.ndarray, "n c"]:
        made = bench.encoder.encode(texts, names=[name]).features[name]
        return probes.predict(torch.from_numpy(made))[0].numpy()

    return predict


def _rows(
    bench: Bench,
    suite: Suite,
    probe: Learned,
    of: tuple[int, Draw],
    method: str,
    report: AttackReport | str,
    judged: str,
) -> Iterator[dict[str, Any]]:
    """Yield the rows before and after an attack."""
    i, draw = of
    for level in (0.0, LIMITS.max_changed):
        n_right, n, facts = 0, 0, dict[str, Any]()
        if isinstance(report, AttackReport):
            n = len(report.results)
            share = report.accuracy_under_attack if level else report.clean_accuracy
            n_right, facts = round(share * n), _facts(report)
        yield bench.row(
            suite,
            probe.arm,
            draw,
            TEST,
            digest=bench.digest(probe.arm, draw, judged),
            n_right=n_right,
            n=n,
            failure=report if isinstance(report, str) else None,
            seconds=0.0,
            corruption=method,
            level=level,
            facts={**said_of_probe(probe.solved, i), **facts},
        )


def _facts(report: AttackReport) -> dict[str, Any]:
    """Return what a row says of an attack; None where nothing was attacked."""
    told = {
        "success_rate": report.success_rate,
        "changed_fraction": report.changed_fraction,
        "mean_queries": report.mean_queries,
        "max_queries": report.limits.max_queries,
    }
    return {name: None if np.isnan(value) else value for name, value in told.items()}
