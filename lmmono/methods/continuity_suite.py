"""Suite `continuity`: models tuned with and without constraints, under the battery.

At each seed every way to tune of `robustness.fine_tuning` (its `objective_sets` above all) learns
from the same clean texts. Rows are in table `robustness`: column `metric` says which number,
`corruption` and `level` what was done to the texts. The first way to tune is the one whose attacks
are tried on the others.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lmmono.data.planted.graded_edits import Attribute
from lmmono.data.tasks.planted_tasks import planted_task
from lmmono.data.tasks.task import Labelled
from lmmono.errors import DataError, ModelError, RobustnessError, TrainError
from lmmono.methods import continuity_battery as battery
from lmmono.methods.continuity_battery import BatteryValue
from lmmono.probes.finetuning import Classifier, LabelledTexts, finetune
from lmmono.probes.probe_jobs import Solver
from lmmono.recipe.objective_settings import Continuity
from lmmono.registry.metrics import METRICS
from lmmono.registry.suites import Suite
from lmmono.registry.tasks import PLANTED
from lmmono.suites.attacks import AttackReport
from lmmono.suites.bench import Bench, Condition, Key, Measurement, Rows, judged_texts
from lmmono.suites.inputs import TEST, synonyms_for
from lmmono.suites.suite_draws import SuiteDraw, drawn
from lmmono.suites.tuned import Tuner, tuned_classifier, tuners

READ: dict[str, Attribute] = {
    "planted_topic": "topics",
    "planted_polarity": "polarity",
    "planted_agreement": "number",
}
"""What the classes of a planted task are made of: the attribute that graded edits change."""

CUE_TEXTS = 1000
"""Training texts of the task with a planted cue, where a recipe takes all texts."""


def continuity_rows(
    bench: Bench, suite: Suite, stored: Mapping[Key, str], solve: Solver
) -> Iterator[Rows]:
    """Yield the rows that are not stored yet, tuned model by tuned model."""
    del solve  # no probe is fitted
    study = bench.settings.continuity
    indices = drawn(bench.task, TEST, study.n_texts)
    judged = f"{judged_texts(TEST, indices)} {study.model_dump_json()} {bench.settings.attacks}"
    data = bench.task.part(TEST).take(indices)
    for draw in suite.load()(bench.task, bench.settings):
        against: dict[str, AttackReport] = {}
        for i, tuner in enumerate(tuners(bench.settings.fine_tuning)):
            about = Condition(suite, tuner, draw, TEST, judged, None, None)
            # the accuracy on clean texts stands for all: rows of a model are stored together
            if bench.lacks(about, stored):
                yield _rows(bench, about, tuner, draw, data, against, is_first=i == 0)
            elif i == 0 and _later(bench, about, stored):  # its rows are there, its attacks are not
                _rows(bench, about, tuner, draw, data, against, is_first=True)


def _later(bench: Bench, about: Condition, stored: Mapping[Key, str]) -> bool:
    """Say whether another way to tune still lacks its rows, which want the first one's attacks."""
    if not bench.settings.continuity.attacks:
        return False
    others = (replace(about, entrant=t) for t in tuners(bench.settings.fine_tuning)[1:])
    return any(bench.lacks(other, stored) for other in others)


def _rows(
    bench: Bench,
    about: Condition,
    tuner: Tuner,
    draw: SuiteDraw,
    data: Labelled,
    against: dict[str, AttackReport],
    *,
    is_first: bool,
) -> Rows:
    """Tune a model and return all its rows, or the one that says why there are none."""
    began = time.perf_counter()
    try:
        classifier, lr = tuned_classifier(bench, tuner, draw)
        values = list(_values(bench, classifier, draw.seed, data, against, is_first))
        cue = list(_cue_rows(bench, about, tuner, draw.seed))
    except (RobustnessError, ModelError, TrainError, DataError) as fault:
        failed = Measurement(n=len(data), failure=str(fault))
        return [bench.row(about, replace(failed, seconds=time.perf_counter() - began))]
    facts = {
        "lr": lr,
        "epoch": classifier.chosen_epoch + 1,
        **{f"objective/{name}": round(v, 6) for name, v in classifier.best.terms.items()},
    }
    rows: Rows = []
    for part in (TEST, *bench.task.ood):
        some = (
            data
            if part == TEST
            else bench.task.part(part).take(
                drawn(bench.task, part, bench.settings.continuity.n_texts)
            )
        )
        right = classifier.predict(some.texts).argmax(axis=1) == some.labels
        measured = Measurement(
            int(right.sum()), len(right), None, time.perf_counter() - began, facts
        )
        rows.append(bench.row(replace(about, split=part), measured))
    return [*rows, *(_row(bench, about, tuner, value) for value in values), *cue]


def _values(
    bench: Bench,
    classifier: Classifier,
    seed: int,
    data: Labelled,
    against: dict[str, AttackReport],
    is_first: bool,
) -> Iterator[BatteryValue]:
    """Yield the battery; the attacks on the first model are left in `against`."""
    study, name = bench.settings.continuity, bench.task.name
    yield from battery.clean_values(classifier, data, seed=seed)
    noises = {noise.kind: noise.strength for noise in study.noises}
    wants_words = "synonyms" in noises or "words" in study.attacks
    synonyms = synonyms_for(bench) if wants_words else None
    yield from battery.noise_values(classifier, data, noises, seed=seed, synonyms=synonyms)
    if name in PLANTED:
        yield from battery.graded_values(
            classifier, data, seed=seed, n_words=study.graded_words, attribute=READ[name]
        )
    yield from battery.pair_values(classifier, data, seed=seed)
    yield from battery.embedding_attack_values(classifier, data, study.radii, seed=seed)
    some = data.take(np.arange(min(len(data), bench.settings.n_attacked)))
    for value, report in battery.attack_values(
        classifier,
        some,
        study.attacks,
        seed=seed,
        synonyms=synonyms,
        against=None if is_first else against,
    ):
        yield value
        if is_first and report is not None:
            against[report.attack] = report


def _row(bench: Bench, about: Condition, tuner: Tuner, value: BatteryValue) -> dict[str, Any]:
    """Return the row of a number of the battery; `seen` says whether tuning met its noise."""
    own = replace(about, corruption=value.group, level=value.level)
    estimate = value.estimate.row()
    names = ("value", "ci_low", "ci_high", "ci_level", "ci_method", "n", "failure")
    constraints = (
        objective for objective in tuner.how.objectives if isinstance(objective, Continuity)
    )
    met = {noise.kind for constraint in constraints for noise in constraint.perturbations}
    facts = {"seen": value.group in met}
    return {
        **bench.row(own, Measurement(0, max(1, value.estimate.n), facts=facts)),
        "metric": value.metric,
        "metric_version": METRICS[value.metric].version,
        **{name: estimate[name] for name in names},
    }


def _cue_rows(bench: Bench, about: Condition, tuner: Tuner, seed: int) -> Iterator[dict[str, Any]]:
    """Yield accuracy where a planted cue tells nothing, and where it tells the wrong class.

    The same model is tuned anew on texts whose first word tells the class as often as the settings
    say, by the first of its learning rates.
    """
    settings, strength = bench.settings, bench.settings.continuity.cue
    if strength is None or bench.task.name not in PLANTED:
        return
    n = settings.continuity.n_texts
    task = planted_task(
        bench.task.name,
        n_train=settings.n_train or CUE_TEXTS,
        n_val=settings.n_val or CUE_TEXTS,
        n_test=n,
        seed=seed,
        cue=strength,
    )
    train, val = (
        LabelledTexts(part.texts, part.labels) for part in (task.part("train"), task.part("val"))
    )
    classifier = finetune(
        bench.encoder.model,
        train,
        val,
        n_classes=task.n_classes,
        seed=seed,
        settings=replace(tuner.how, lr=tuner.rates[0]),
        tokenizer=bench.encoder.reader.tokenizer,
    )
    for split in (TEST, "ood:cue_random", "ood:cue_reversed"):
        part = task.part(split)
        right = classifier.predict(part.texts).argmax(axis=1) == part.labels
        own = replace(about, split=split, corruption="cue", level=strength)
        yield bench.row(own, Measurement(int(right.sum()), len(right)))
