"""Probes learned on clean texts, judged on texts with noise: on their characters or in the model.

A noisy text is encoded once for all codes, so families meet the same noise; severity 0 is the
clean text and its stored codes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmmono.data.corruption.synonyms import (
    Synonyms,
    planted_synonyms,
    read_synonyms,
    wordnet_synonyms,
)
from lmmono.data.corruption.text_noise import corrupt_texts
from lmmono.errors import DataError, RobustnessError
from lmmono.probes.probe_jobs import FittedProbes, JudgedPart, Solver, which_right
from lmmono.probes.problems import Probes
from lmmono.registry.suites import MODEL_NOISE, Suite
from lmmono.registry.tasks import PLANTED
from lmmono.suites.bench import (
    Bench,
    Condition,
    Key,
    LabelledCodes,
    Measurement,
    ProbeArm,
    Rows,
    judged_texts,
)
from lmmono.suites.grid import Ground, probe_facts
from lmmono.suites.suite_draws import SuiteDraw, drawn
from lmmono.suites.text_codes import InputNoise

TEST = "test"


@dataclass(frozen=True, slots=True, eq=False)
class CleanProbes:
    """Clean probes of an arm, one per draw."""

    arm: ProbeArm
    fitted: FittedProbes

    def probe(self, i: int) -> Probes:
        """Return the probe of draw i alone."""
        probes, one = self.fitted.probes, slice(i, i + 1)
        return Probes(
            *(probes.weight[one], probes.bias[one], probes.chosen_l2[one]),
            *(probes.failures[one], probes.notes[one], probes.reads),
        )


def noised_rows(
    bench: Bench, suite: Suite, stored: Mapping[Key, str], solve: Solver
) -> Iterator[Rows]:
    """Yield the rows of test texts under every noise and severity that are not stored yet."""
    indices = drawn(bench.task, TEST, bench.settings.n_noised)
    texts = [bench.task.part(TEST).texts[i] for i in indices.tolist()]
    judged = judged_texts(TEST, indices)
    draws = list(suite.load()(bench.task, bench.settings))
    lacking: dict[tuple[int, str, int], list[Condition]] = {}
    for i, draw in enumerate(draws):
        for kind in bench.settings.input_noise:
            for severity in sorted({0, *bench.settings.severities}):
                conditions = [
                    Condition(suite, arm, draw, TEST, judged, kind, float(severity))
                    for arm in bench.arms
                ]
                short = [about for about in conditions if bench.lacks(about, stored)]
                if short:
                    lacking[i, kind, severity] = short
    if not lacking:
        return
    entrants = [about.entrant for short in lacking.values() for about in short]
    learned = learn(bench, [arm for arm in bench.arms if arm in entrants], draws, solve)
    clean = bench.codes(TEST, indices)
    for (i, kind, severity), short in lacking.items():
        probes = [learned[about.entrant.label, about.entrant.learner] for about in short]
        names = list(dict.fromkeys(probe.arm.code.name for probe in probes))
        noisy = clean
        if severity:
            noisy = _noised(bench, texts, clean, (kind, severity, draws[i].seed), names)
        yield [
            bench.row(about, _judged(probe, i, noisy))
            for about, probe in zip(short, probes, strict=True)
        ]


def learn(
    bench: Bench, arms: Sequence[ProbeArm], draws: Sequence[SuiteDraw], solve: Solver
) -> dict[tuple[str, str], CleanProbes]:
    """Return the probes of arms on draws, by label and learner."""
    ground = Ground.of(bench, draws)
    jobs = (ground.job(arm, draws, {}) for arm in arms)
    return {
        (arm.label, arm.learner): CleanProbes(arm, fitted)
        for arm, fitted in zip(arms, solve(jobs), strict=True)
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


def _noised(
    bench: Bench,
    texts: Sequence[str],
    clean: LabelledCodes,
    noise: tuple[str, int, int],
    names: Sequence[str],
) -> LabelledCodes | str:
    """Return the codes of texts with noise of a kind, severity and seed, or why there are none."""
    kind: Any = noise[0]
    severity, seed = noise[1:]
    try:
        if kind in MODEL_NOISE:
            encoded = bench.encoder.encode(
                texts, names=names, noise=InputNoise(kind, severity, seed)
            )
        else:
            lists = synonyms_for(bench) if kind == "synonyms" else None
            noisy = corrupt_texts(texts, kind, severity, seed=seed, synonyms=lists)
            encoded = bench.encoder.encode(noisy, names=names)
    except (DataError, RobustnessError) as fault:
        return str(fault)
    return replace(
        clean, codes=encoded.codes, n_truncated=encoded.n_truncated, n_tokenless=encoded.n_tokenless
    )


def _judged(probes: CleanProbes, i: int, texts: LabelledCodes | str) -> Measurement:
    """Return what the probe of draw i has right."""
    facts = probe_facts(probes.fitted, i)
    if isinstance(texts, str):
        return Measurement(failure=texts, facts=facts)
    part = JudgedPart(texts.codes[probes.arm.code.name], texts.labels)
    right = which_right(probes.probe(i), part)[0]
    return Measurement.of(right, probes.fitted.probes.failures[i], {**facts, **texts.facts})
