"""Suite `flint`: classifiers with their interpreters, ablations and baselines, on clean labels.

At each seed a classifier is tuned for a task without any interpreter, the black box. FLINT by
design is tuned on the same texts, post hoc and baselines read the black box. Column `probe` says
whose value a row has: `classifier` or `interpreter`; column `metric` which measure it is.

    runs/x/flint/<task>/<feature>/<seed>-<digest>/
        classifier/, flint/   what is needed again, saved
        phi.npy               attributes of the test texts
        pictures.json         of the first seed: what attributes look like
        store.duckdb          of the first seed: their acts on the test texts
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray

import activation_store as astore
from lmmono.captures.capture import capture
from lmmono.data.corruption.text_noise import corrupt_texts
from lmmono.errors import RobustnessError
from lmmono.files.atomic import write_atomic
from lmmono.methods import flint_baselines as baselines
from lmmono.methods import flint_measures as measures
from lmmono.methods.flint import ATTRIBUTES, Flint, Interpretation, load_flint
from lmmono.methods.flint_objective import layer_hooks
from lmmono.methods.flint_pictures import as_json, class_attribute_rows, pictures
from lmmono.methods.flint_planted import planted_values
from lmmono.methods.flint_report import FlintValue, evaluate, shared_measures
from lmmono.models.hooks import bare
from lmmono.models.untrained import untrained
from lmmono.probes.finetuning import (
    Classifier,
    FineTuning,
    LabelledTexts,
    finetune,
    load_classifier,
)
from lmmono.probes.probe_jobs import Solver
from lmmono.recipe.objective_settings import FlintSettings
from lmmono.recipe.robustness_settings import FlintStudy
from lmmono.registry.metrics import METRICS
from lmmono.registry.suites import Suite
from lmmono.registry.tasks import PLANTED
from lmmono.stats.estimate import LEVEL
from lmmono.stats.intervals import wilson
from lmmono.suites.bench import CI_METHOD, Bench, Condition, Key, Measurement, Rows, judged_texts
from lmmono.suites.inputs import TEST
from lmmono.suites.suite_draws import SuiteDraw, drawn

Role = Literal["classifier", "interpreter"]

OFF: dict[str, dict[str, float]] = {
    "no_regularisers": {"conciseness_weight": 0.0, "diversity_weight": 0.0, "l1_weight": 0.0},
    "l1_only": {"conciseness_weight": 0.0, "diversity_weight": 0.0},
}
"""What each ablation of the interpreter by design leaves out."""

SHUFFLED, UNTRAINED = "flint_shuffled_labels", "flint_untrained_model"
"""Floors of the interpreter by design."""

BY_DESIGN = ("flint_by_design", "flint_objectives", *OFF, SHUFFLED, UNTRAINED)
"""Entrants that have a classifier of their own."""

SHARES = ("accuracy", "fidelity", "fidelity_errors", "fidelity_ood", "fidelity_noisy")
"""Measures that are shares of texts, and have Wilson's interval."""


@dataclass(frozen=True, slots=True)
class FlintEntrant:
    """A classifier or an interpreter in the table."""

    label: str
    """Name in column `feature`."""
    learner: Role
    """Name in column `probe`."""
    study: FlintStudy
    """What decides it."""

    @property
    def identity(self) -> tuple[list[Any], list[Any]]:
        """What it reads is the model; how it learns are the section's settings."""
        others = {"modes", "ablations", "floors", "baselines", "maximise"}
        return ["flint", self.label], [self.study.model_dump(mode="json", exclude=others)]

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"n_attributes": self.study.interpreter.n_attributes}


def flint_rows(
    bench: Bench, suite: Suite, stored: Mapping[Key, str], solve: Solver
) -> Iterator[Rows]:
    """Yield the rows that are not stored yet, classifier by classifier and interpreter."""
    del solve  # no probe is fitted
    study, phi, is_new = bench.settings.flint, dict[tuple[str, int], ndarray](), False
    draws = list(suite.load()(bench.task, bench.settings))
    for draw in draws:
        one = _FlintDraw(bench, suite, draw)
        for label in study.labels:
            rows, values = one.rows(label, stored)
            if values is not None:
                phi[label, draw.seed] = values
            is_new |= bool(rows)
            yield rows
    if is_new:
        for draw in draws:
            yield _FlintDraw(bench, suite, draw).stability(phi)


class _FlintDraw:
    """Everything of one task at one seed."""

    def __init__(self, bench: Bench, suite: Suite, draw: SuiteDraw) -> None:
        self._bench, self._suite, self._draw = bench, suite, draw
        self._study, task = bench.settings.flint, bench.task
        self._indices = drawn(task, TEST, bench.settings.n_test)
        self.test = task.part(TEST).take(self._indices)
        train = task.part("train")
        self._train = LabelledTexts([train.texts[i] for i in draw.train.tolist()], draw.labels)
        val = task.part("val")
        self._val = LabelledTexts([val.texts[i] for i in draw.val.tolist()], draw.val_labels)

    def rows(self, label: str, stored: Mapping[Key, str]) -> tuple[Rows, ndarray | None]:
        """Return the rows of one entrant that are not stored, and its attributes of test texts."""
        roles: tuple[Role, ...] = ("interpreter",)
        if label == "black_box":
            roles = ("classifier",)
        elif label in BY_DESIGN:
            roles = ("classifier", "interpreter")
        lacks = any(self._bench.lacks(self._about(label, role), stored) for role in roles)
        kept = self._folder(label)
        phi = kept / "phi.npy" if kept else None
        if not lacks:
            return [], _read_attributes(phi) if phi is not None and phi.is_file() else None
        began = time.perf_counter()
        try:
            by_role, attributes = self._measured(label)
        except RobustnessError as fault:
            failed = Measurement(n=len(self.test), failure=str(fault))
            return [self._bench.row(self._about(label, role), failed) for role in roles], None
        seconds = time.perf_counter() - began
        if phi is not None and attributes is not None:
            phi.parent.mkdir(parents=True, exist_ok=True)
            np.save(phi, attributes)
        return [
            self._row(label, role, value, seconds)
            for role, values in by_role.items()
            for value in values
        ], attributes

    def stability(self, phi: Mapping[tuple[str, int], ndarray]) -> Rows:
        """Return how well attributes of this seed match those of the others, on the same texts."""
        rows: Rows = []
        for label in self._study.labels:
            ours = phi.get((label, self._draw.seed))
            others = [
                x for (name, seed), x in phi.items() if name == label and seed != self._draw.seed
            ]
            if ours is not None and others:
                values = [measures.matched_correlation(ours, x) for x in others]
                value = FlintValue("attribute_stability", float(np.mean(values)), len(self.test))
                rows.append(self._row(label, "interpreter", value, 0.0))
        return rows

    def _measured(self, label: str) -> tuple[dict[Role, list[FlintValue]], ndarray | None]:
        """Return the values of an entrant by role, and its attributes of test texts."""
        n_attributes, seed = self._study.interpreter.n_attributes, self._draw.seed
        match label:
            case "black_box":
                return {"classifier": [self._accuracy(self.black_box)]}, None
            case "lime":
                return {"interpreter": self._of_lime()}, None
            case _ if label.startswith("flint_") or label in OFF:
                return self._of_flint(label)
            case "linear_probe":
                hooks = self._hooks
                read = baselines.linear_probe(self.black_box, hooks, self._train, self.test)
            case "topics":
                read = baselines.topics(
                    self.black_box, self._train, self.test, n_attributes=n_attributes, seed=seed
                )
            case "sae_head":
                read = baselines.sae_head(
                    self.black_box,
                    self._hooks[-1],
                    self._train,
                    self.test,
                    n_attributes=n_attributes,
                    seed=seed,
                )
            case "neurons":
                read = baselines.neurons_head(
                    self.black_box,
                    self._hooks[-1],
                    self._train,
                    self.test,
                    n_attributes=n_attributes,
                )
            case _:
                read = baselines.concept_bottleneck(
                    self.black_box,
                    self._hooks,
                    self._train,
                    self.test,
                    corrected=label == "concepts_corrected",
                )
        return {"interpreter": shared_measures(read, self.test.labels)}, read.phi

    def _of_flint(self, label: str) -> tuple[dict[Role, list[FlintValue]], ndarray]:
        flint = self._fitted(label)
        study, seed = self._study, self._draw.seed
        task = self._bench.task
        ood = [text for part in task.ood for text in task.part(part).texts[: len(self.test)]]
        texts = list(self.test.texts)
        edited = corrupt_texts(texts, study.edit, 3, seed=seed)
        report = evaluate(
            flint, self.test, ood=ood, edited=edited, n_explained=study.n_explained, seed=seed
        )
        values, read = list(report.values), flint.interpret(texts)
        if task.name in PLANTED:
            values += planted_values(task.name, texts, flint, read, seed=seed)
        if seed == 0:
            self._show(label, flint, read)
        by_role: dict[Role, list[FlintValue]] = {"interpreter": values}
        if flint.mode == "by_design":
            by_role["classifier"] = [self._accuracy(flint.classifier)]
        return by_role, read.phi

    def _fitted(self, label: str) -> Flint:
        """Return a FLINT, that of the folder where it is finished there."""
        study, folder = self._study, self._folder(label)
        if folder is not None and (folder / "flint" / "flint.json").is_file():
            reader = self._bench.encoder.reader
            return load_flint(folder / "flint", self._bench.encoder.model, reader.tokenizer)
        settings: FlintSettings = study.interpreter.model_copy(update=OFF.get(label, {}))
        is_post_hoc, how = label == "flint_post_hoc", self._how
        if label == "flint_objectives":
            how = replace(how, objectives=study.objectives)
        flint = Flint(
            mode="post_hoc" if is_post_hoc else "by_design",
            tuning=how,
            seed=self._draw.seed,
            **{name: getattr(settings, name) for name in type(settings).model_fields},
        )
        model, train = self._bench.encoder.model, self._train
        if label == UNTRAINED:
            model = untrained(model, seed=self._draw.seed)
        if label == SHUFFLED:  # validation labels stay: the last epoch is kept, whatever they say
            order = np.random.default_rng(self._draw.seed).permutation(len(train.labels))
            train = LabelledTexts(train.texts, train.labels[order])
        flint.fit(
            self.black_box if is_post_hoc else model,
            train,
            self._val,
            n_classes=self._bench.task.n_classes,
            tokenizer=self._bench.encoder.reader.tokenizer,
            folder=None if folder is None else folder / "fit",
        )
        if folder is not None:
            flint.save(folder / "flint")
        return flint

    @property
    def _how(self) -> FineTuning:
        study = self._study
        return FineTuning(
            epochs=study.epochs,
            steps=study.steps,
            batch_texts=study.batch_texts,
            lr=study.lr,
            pooling=study.pooling,
        )

    @cached_property
    def black_box(self) -> Classifier:
        """The classifier that is tuned without any interpreter."""
        folder, encoder = self._folder("black_box"), self._bench.encoder
        if folder is not None and (folder / "classifier" / "classifier.json").is_file():
            return load_classifier(folder / "classifier", encoder.model, encoder.reader.tokenizer)
        classifier = finetune(
            encoder.model,
            self._train,
            self._val,
            n_classes=self._bench.task.n_classes,
            seed=self._draw.seed,
            settings=self._how,
            tokenizer=encoder.reader.tokenizer,
            folder=None if folder is None else folder / "fit",
        )
        if folder is not None:
            classifier.save(folder / "classifier")
        return classifier

    @cached_property
    def _hooks(self) -> tuple[str, ...]:
        return layer_hooks(bare(self.black_box.network.body), self._study.interpreter.layers)

    def _of_lime(self) -> list[FlintValue]:
        texts = self.test.texts[: self._study.n_lime]
        ours = baselines.lime_classes(self.black_box, texts, seed=self._draw.seed)
        theirs = self.black_box.predict(texts).argmax(axis=1)
        n = len(texts)
        return [
            FlintValue("accuracy", float((ours == self.test.labels[:n]).mean()), n),
            FlintValue("fidelity", float((ours == theirs).mean()), n),
        ]

    def _accuracy(self, classifier: Classifier) -> FlintValue:
        right = classifier.predict(self.test.texts).argmax(axis=1) == self.test.labels
        return FlintValue("accuracy", float(right.mean()), len(right))

    def _show(self, label: str, flint: Flint, read: Interpretation) -> None:
        """Write what attributes look like: pictures, their acts, rows of the run's store."""
        folder, store, task = self._folder(label), self._bench.store, self._bench.task
        if folder is None or store is None:
            return
        shown = pictures(flint, read, maximise=self._study.maximise, seed=self._draw.seed)
        about = {"task": task.name, "feature": label, "seed": self._draw.seed}
        pictured = as_json(shown, task.label_names, **about)
        write_atomic(folder / "pictures.json", json.dumps(pictured, indent=1) + "\n")
        rows = class_attribute_rows(
            read, task.label_names, task=task.name, feature=label, seed=self._draw.seed
        )
        store.append("all_scores", rows)
        words = [
            {
                "hook": ATTRIBUTES,
                "unit": picture.attribute,
                "explainer": "decoder_words",
                "seed": self._draw.seed,
                "text": ", ".join(picture.words),
            }
            for picture in shown
            if picture.words
        ]
        with astore.open(folder / "store.duckdb", mode="w") as acts:
            capture(
                flint.model, list(self.test.texts), hooks=ATTRIBUTES, max_density=1.0, into=acts
            )
            acts.append_all({"all_scores": rows, "explanations": words})

    def _folder(self, label: str) -> Path | None:
        """Return where an entrant's files are: by what decides them, so that no other is taken."""
        if self._bench.store is None:
            return None
        digest = self._bench.digest(self._about(label, "interpreter"))
        root = self._bench.store.path.parent / "flint" / self._bench.task.name / label
        return root / f"{self._draw.seed}-{digest}"

    def _about(self, label: str, role: Role) -> Condition:
        entrant = FlintEntrant(label, role, self._study)
        judged = judged_texts(TEST, self._indices)
        return Condition(self._suite, entrant, self._draw, TEST, judged, None, None)

    def _row(self, label: str, role: Role, value: FlintValue, seconds: float) -> dict[str, Any]:
        about = self._about(label, role)
        is_value = math.isfinite(value.value)
        n_right = round(value.value * value.n) if is_value and value.metric == "accuracy" else 0
        row = self._bench.row(about, Measurement(n_right, max(1, value.n), seconds=seconds))
        low, high = (None, None)
        is_share = is_value and value.metric in SHARES
        if is_share:
            low, high = wilson(value.value * value.n, value.n)
        return row | {
            "metric": value.metric,
            "metric_version": METRICS[value.metric].version,
            "value": value.value if is_value else None,
            "ci_low": low,
            "ci_high": high,
            "ci_level": LEVEL if is_share else None,
            "ci_method": CI_METHOD if is_share else None,
            "n": value.n,
            "failure": None if is_value else f"{value.metric} is not defined on these texts",
        }


def _read_attributes(path: Path) -> ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as fault:
        raise RobustnessError(
            f"{path}: damaged ({fault}); remove its folder, and the attributes are made again"
        ) from fault
