"""The verb `robustness`: tasks made harder in chosen ways, and how probes on each family do.

Probes read one hook. Where none is named it is chosen once, on clean validation texts, before
anything is noisy; what each stream gave is a row of suite `layers`.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import nn

import activation_store as astore
from lmmono.data.tasks.reading import find_task
from lmmono.data.tasks.task import Task
from lmmono.errors import RobustnessError
from lmmono.files.json_files import settings_faults
from lmmono.models.hooks import match_hooks
from lmmono.probes.probe_jobs import Solver, solving
from lmmono.recipe.robustness_settings import Robustness
from lmmono.registry.lookup import load
from lmmono.registry.suites import BAG_OF_WORDS, Suite, find_suite
from lmmono.suites.attacks import attacked_rows
from lmmono.suites.bag_of_words import word_rows
from lmmono.suites.bench import (
    Bench,
    CodesInMemory,
    Condition,
    Encode,
    Key,
    Measurement,
    Rows,
    judged_texts,
    key_of,
)
from lmmono.suites.feature_families import FeatureFamily, as_family
from lmmono.suites.grid import Ground, suite_rows
from lmmono.suites.inputs import noised_rows
from lmmono.suites.results import CONTINUITY, FINE_TUNING, FLINT, AskedRows, Outcomes
from lmmono.suites.stored_codes import CodeStore
from lmmono.suites.suite_draws import SuiteDraw, drawn
from lmmono.suites.text_codes import ProbedCode, TextEncoder, probed_codes, streams
from lmmono.suites.tuned import tuned_rows, tuners
from lmmono.types import Progress, silent

DEFAULT = {"dense": None, "neurons": "neurons"}
"""Families where none are given: the stream as it is, and the neurons of its layer."""

_ROWS = {
    "clean": suite_rows,
    "noisy": noised_rows,
    "attacked": attacked_rows,
    "tuned": tuned_rows,
}

_STORED = """SELECT suite, task, feature, corruption, level, probe, n_shots, seed, split, metric,
    settings->>'digest' AS digest, value FROM robustness WHERE seed IS NOT NULL"""

_ASKED = """FROM robustness WHERE seed IS NOT NULL AND list_contains($suites::VARCHAR[], suite)
    AND list_contains($tasks::VARCHAR[], task) ORDER BY ALL"""


def robustness(
    model: nn.Module,
    tasks: str | Task | Sequence[str | Task] = "planted_topic",
    *,
    suite: str | Sequence[str] = "noisy_labels",
    features: Mapping[str, Any] | None = None,
    seeds: int = 5,
    hook: str | None = None,
    folder: str | None = None,
    into: astore.Store | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
    **settings: Any,
) -> Outcomes:
    """Measure how well probes on different codes do when a task is made harder.

    Every family meets the same subsets, flips and noise at a seed. With a store, features are kept
    in `features.duckdb` beside it and rows in its table `robustness`; rows that are there already,
    of the same features, texts and labels, are not computed again, so a call that was cut off goes
    on where it was. Without one, everything stays in memory.

    Args:
        model: Any model of `lmmono.models.hooks`.
        tasks: Names, see `lmmono ls tasks`, or tasks of your own, see `lmmono.read_task`.
        suite: Names of suites: noisy_labels, noisy_inputs, few_shot, ood, adversarial,
            fine_tuning, flint, continuity.
        features: Families by the name they get in tables; see
            `lmmono.suites.feature_families.as_family`.
            The others are compared with the first.
        seeds: Repetitions.
        hook: Hook that families read; None takes that of the dictionaries among them, or else
            chooses a stream on clean validation texts.
        folder: Where the sets of tasks lie that are not planted.
        into: A store opened with mode "a" or "w", of this model's activations.
        tokenizer: Where the model has none of its own, as `model.tokenizer`.
        progress: Told how many suites are done.
        **settings: Further fields of the recipe's section `robustness`, such as learners, budgets,
            n_train, label_noise or processes.

    Raises:
        RobustnessError: A setting, suite or family is unknown or does not fit, there is no
            tokenizer, or the store is of another model.
        DataError: A task cannot be read or used.
        ModelError: A hook matches nothing.
        StoreError: The store is not open for writing.
    """
    wanted: list[Any] = [tasks] if isinstance(tasks, str | Task) else list(tasks)
    suites = (suite,) if isinstance(suite, str) else tuple(suite)
    chosen = _checked({"suites": suites, "seeds": seeds, "hook": hook, **settings})
    for name in suites:
        find_suite(name)
    for task in wanted:
        if not isinstance(task, str | Task):
            raise RobustnessError(
                f"tasks: want names or tasks of lm.read_task, got {type(task).__name__}"
            )
    read = [task if isinstance(task, Task) else find_task(task, folder) for task in wanted]
    study = Study(model, read, dict(features or DEFAULT), chosen, into, tokenizer, progress)
    return study.run()


def _checked(settings: Mapping[str, Any]) -> Robustness:
    """Return the settings as a recipe's section.

    Raises:
        RobustnessError: One is unknown or out of range; names all of them.
    """
    names = ("learners", "poolings", "label_noise", "input_noise", "attacks")
    plain = {k: (v,) if k in names and isinstance(v, str) else v for k, v in settings.items()}
    try:
        return Robustness.model_validate(_with_tuples(plain))
    except ValidationError as error:
        raise RobustnessError(settings_faults("robustness", error)) from None


def _with_tuples(value: Any) -> Any:
    """Return a setting with tuples for lists, as sections want them."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(setting) for key, setting in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """Everything that a call was given, checked."""

    model: nn.Module
    tasks: Sequence[Task]
    features: Mapping[str, Any]
    settings: Robustness
    store: astore.Store | None
    tokenizer: Any
    progress: Progress
    fit_texts: Sequence[str] = ()
    """Texts that families are fitted on; none takes the training texts of each task."""

    def run(self) -> Outcomes:
        """Compute every row that is not stored, and return all."""
        began, computed = time.perf_counter(), list[dict[str, Any]]()
        self._check()
        with ExitStack() as opened:
            encode: Encode = CodesInMemory().encode
            if self.store is not None:
                codes = CodeStore(self.store.path.with_name("features.duckdb"))
                encode = opened.enter_context(codes).encode
            solve = opened.enter_context(solving(self.settings.processes))
            hook = self._hook(encode, solve)
            for rows in self._groups(hook, encode, solve):
                computed += rows
                if self.store is not None:
                    self.store.append("robustness", rows)
        rows = computed if self.store is None else self._asked_rows()
        seconds = time.perf_counter() - began
        n_found = len(rows) - len(computed)
        names = self._names()
        return Outcomes(self.store, tuple(rows), hook, names, len(computed), n_found, seconds)

    def _names(self) -> tuple[str, ...]:
        """Return the names of all that has rows, in tables' order."""
        words = (BAG_OF_WORDS,) if self.settings.bag_of_words else ()
        return (*self._named(), *words, *self._tuned())

    def _named(self) -> Iterator[str]:
        """Yield the names of features in tables."""
        for name in self.features:
            for i, pooling in enumerate(self.settings.poolings):
                yield f"{name}:{pooling}" if i else name

    def _tuned(self) -> list[str]:
        """Return the names of tuned models, and of what interprets them, in tables."""
        names: list[str] = []
        if {FINE_TUNING, CONTINUITY} & set(self.settings.suites):
            names += [tuner.label for tuner in tuners(self.settings.fine_tuning)]
        if FLINT in self.settings.suites:
            names += self.settings.flint.labels
        return names

    def _check(self) -> None:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise RobustnessError(f"tasks: want one or several different ones, got {names}")
        if not self.features:
            raise RobustnessError("features: want at least one family, such as {'dense': None}")
        odd = [name for name in self.features if set(name) & set("@:")]
        if odd:
            raise RobustnessError(f"features: want names without @ and :, got {odd[0]!r}")
        for name, source in self.features.items():
            as_family(name, source)

    def _families(self) -> dict[str, FeatureFamily]:
        return {name: as_family(name, source) for name, source in self.features.items()}

    def _hook(self, encode: Encode, solve: Solver) -> str:
        """Return the hook: as given, as dictionaries want it, or as clean validation texts say."""
        own = {f.hook for f in self._families().values() if f.hook}
        if self.settings.hook is not None:
            (hook,) = match_hooks(self.model, self.settings.hook)[:1]
            return hook
        if own:
            return sorted(own)[0]
        stored = {key: (digest, value) for key, digest, value in self._stored()}
        hook, rows = choose_hook(
            self.model,
            self.tokenizer,
            self.tasks,
            self.settings,
            encode=encode,
            solve=solve,
            stored=stored,
        )
        if self.store is not None and rows:
            self.store.append("robustness", rows)
        return hook

    def _groups(self, hook: str, encode: Encode, solve: Solver) -> Iterator[Rows]:
        """Yield rows that are not empty, task by task and suite by suite."""
        stored = {key: digest for key, digest, _ in self._stored()}
        suites = [find_suite(name) for name in self.settings.suites]
        total, done = len(self.tasks) * len(suites), 0
        for task in self.tasks:
            codes = probed_codes(self._families(), self.model, hook, self.settings.poolings)
            texts = self.fit_texts or task.part("train").texts
            encoder = TextEncoder(self.model, self.tokenizer, codes).fit(texts)
            self._check_model(encoder.model_digest)
            bench = Bench(task, encoder, self.settings, encode, self.store)
            for suite in suites:
                rows_of = _ROWS[suite.judged] if suite.rows is None else load(suite.rows)
                yield from filter(None, rows_of(bench, suite, stored, solve))
                if self.settings.bag_of_words and suite.judged == "clean":
                    yield from word_rows(bench, suite, stored)
                done += 1
                self.progress(f"robustness {task.name} {suite.name}", done, total)

    def _check_model(self, digest: str) -> None:
        """Refuse a store of another model's activations: the rows do not name the model."""
        if self.store is None:
            return
        query = "SELECT value FROM meta WHERE key = 'model_digest'"
        for (stored,) in self.store.sql(query).fetchall():
            if stored != digest:
                raise RobustnessError(
                    f"{self.store.path}: holds activations of another model; give a store of this "
                    "one, or none"
                )

    def _stored(self) -> list[tuple[Key, str, float | None]]:
        if self.store is None:
            return []
        rows = self.store.sql(_STORED).to_arrow_table().to_pylist()
        return [(key_of(row), row["digest"], row["value"]) for row in rows]

    def _asked_rows(self) -> list[dict[str, Any]]:
        """Return all rows that the study asks for, also those that were stored before."""
        assert self.store is not None
        tasks = [task.name for task in self.tasks]
        suites = list(self.settings.suites)
        rows = self.store.sql(_ASKED, suites=suites, tasks=tasks).to_arrow_table().to_pylist()
        asked = AskedRows(self.settings, tasks, self._names())
        return [
            {**row, "settings": json.loads(row["settings"])} for row in rows if asked.covers(row)
        ]


VAL = "val"

# never asked for by name: its draw is made in `choose_hook`
LAYERS = Suite("layers", "which stream tells clean validation texts apart best", home="")


def choose_hook(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    settings: Robustness,
    *,
    encode: Encode,
    solve: Solver,
    stored: Mapping[Key, tuple[str, float | None]],
) -> tuple[str, Rows]:
    """Return the stream that tells clean validation texts apart best, and the rows that are new.

    Every stream is tried with the rows as they are and the first pooling; taken is the one whose
    probe is right most often, on average over the tasks, the lower of equals.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None where the model has it.
        tasks: Tasks that count alike.
        settings: Says how many texts are used, and the pooling.
        encode: How texts are encoded.
        solve: How probes are fitted.
        stored: Digest and value of the rows that exist, by key.
    """
    hooks, rows = streams(model), list[dict[str, Any]]()
    totals = dict.fromkeys(hooks, 0.0)
    once = settings.model_copy(update={"learners": ("logistic",), "budgets": ()})
    for task in tasks:
        codes = [ProbedCode(h, FeatureFamily("raw"), h, settings.poolings[0]) for h in hooks]
        encoder = TextEncoder(model, tokenizer, codes).fit(task.part("train").texts)
        bench = Bench(task, encoder, once, encode)
        train, val = drawn(task, "train", settings.n_train), drawn(task, VAL, settings.n_val)
        labels, val_labels = task.part("train").labels[train], task.part(VAL).labels[val]
        draw, judged = SuiteDraw(0, train, labels, val, val_labels), judged_texts(VAL, val)
        conditions = [Condition(LAYERS, arm, draw, VAL, judged, None, None) for arm in bench.arms]
        lacking: list[Condition] = []
        for arm, about in zip(bench.arms, conditions, strict=True):
            digest, value = stored.get(bench.key(about), ("", None))
            if digest == bench.digest(about) and value is not None:
                totals[arm.code.hook] += value
            else:
                lacking.append(about)
        if not lacking:
            continue
        ground = Ground.of(bench, [draw])
        arms = [arm for arm in bench.arms if arm in [about.entrant for about in lacking]]
        jobs = (ground.job(arm, [draw], {VAL: ground.val_codes}) for arm in arms)
        for arm, about, fitted in zip(arms, lacking, solve(jobs), strict=True):
            failure, right = fitted.probes.failures[0], fitted.right[VAL][0]
            row = bench.row(about, Measurement.of(right, failure, {}, fitted.seconds))
            totals[arm.code.hook] += row["value"] or 0.0
            rows.append(row)
    return max(hooks, key=totals.__getitem__), rows
