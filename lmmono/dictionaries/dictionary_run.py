"""The dictionaries of a run: fitted, judged, and written next to what they are about.

    runs/x/vectors.duckdb, vectors/          vectors of the split `train`, captured once and kept
           dictionaries/<hook>/<name>/       one folder per dictionary, checkpoints on the way there
           store.duckdb                      tables `dictionaries`, `all_scores`, latents as hooks

Resumable: what is finished is skipped. Each dictionary is judged on documents of the split `score`,
at the model that its vectors came from. Those of one hook are judged in one pass, so their
intervals are of the same redraws.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

import activation_store as astore
from lmmono.captures.capture import capture, left_out_tokens
from lmmono.dictionaries.classical import Classical
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.estimator import Dictionary, load_dictionary, read_about
from lmmono.dictionaries.evaluation import SAEReport, evaluate
from lmmono.dictionaries.recovery import recovery
from lmmono.dictionaries.sae import SAE, fit_together
from lmmono.dictionaries.stability import stability
from lmmono.dictionaries.vector_source import VectorSource, as_vectors, model_vectors, shuffled
from lmmono.errors import DictionaryError
from lmmono.files.atomic import atomic_folder
from lmmono.files.signals import ended_by_sigterm
from lmmono.models.hooks import match_hooks
from lmmono.models.pretrained import on_best_device
from lmmono.models.untrained import untrained
from lmmono.recipe.dictionary_settings import (
    SIGNED,
    Decomposition,
    Dictionaries,
    Planned,
    TrainedControl,
)
from lmmono.registry.metrics import METRICS
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent

StoredRows = dict[tuple[str, str], dict[str, Any]]
"""Rows of table `dictionaries` by hook and name."""


def dictionary_run(run: Run, *, progress: Progress = silent) -> dict[str, int]:
    """Learn and judge the dictionaries of a captured run's recipe; return the facts.

    Every entry is fitted on every hook with every seed. A fit that comes to nothing does not stop
    the others; they are judged first, and then it is raised. On shuffled vectors, or on those of an
    untrained model, nothing is what there may be to find: there it is a row of `all_scores`.

    Raises:
        DictionaryError: Vectors are too few, or fits came to nothing; names all of them.
        ModelError: A hook name matches nothing.
        TrainingStopped: SIGTERM arrived; everything is saved.
    """
    settings = run.recipe.dictionary
    hooks = match_hooks(on_best_device(run.model), settings.hooks)
    stored = settings.source == "store"
    vectors = astore.open(run.dir / "vectors.duckdb") if stored else None
    with ended_by_sigterm("dictionary"):
        folder = run.dir / "dictionaries"
        fits = [
            DictionaryFit(planned, hook, folder / hook / planned.name)
            for hook in hooks
            for planned in settings.planned
        ]
        sources = VectorSources(run, vectors)
        failures = _fit_all(fits, sources, settings, progress)
        with astore.open(run.store_path, mode="a") as store:
            _judge(run, fits, sources, store, failures, progress)
            _store_latents(run, fits, store, progress)
        serious = [text for fit, text in failures.items() if fit.planned.control is None]
        if serious:
            raise DictionaryError("\n".join(dict.fromkeys(serious)))
    return {"n_dictionaries": len(fits) - len(failures), "n_failed": len(failures)}


def vectors_run(run: Run, *, progress: Progress = silent) -> dict[str, int]:
    """Capture the vectors of the split `train`, from which dictionaries learn; return the facts."""
    recipe, path = run.recipe, run.dir / "vectors.duckdb"
    hooks = match_hooks(on_best_device(run.model), recipe.dictionary.hooks)
    mode: Literal["a", "w"] = "a" if path.exists() else "w"
    with astore.open(path, mode) as store:
        section = recipe.dictionary
        rows = run.tokens("train").limit(section.max_tokens, seed=recipe.seed)
        skip = section.skip.model_dump()
        capture(run.model, rows, hooks=(), vectors=hooks, into=store, skip=skip, progress=progress)
        info = store.info()
        return {"n_tokens": info.n_tokens, "n_bytes": info.n_bytes}


@dataclass(frozen=True, slots=True)
class DictionaryFit:
    """One dictionary of a run."""

    planned: Planned
    """What it is."""
    hook: str
    """Hook whose vectors it is fitted on."""
    folder: Path
    """Where it goes."""

    @property
    def is_finished(self) -> bool:
        """Whether its folder holds it."""
        return (self.folder / "dictionary.json").exists()

    def new(self) -> Dictionary:
        """Return it before its fit."""
        entry = self.planned.entry
        decomposes = isinstance(entry, Decomposition)
        kind = SAE if self.planned.is_sae else Classical if decomposes else Control
        return kind(seed=self.planned.seed, **entry.settings)

    def load(self) -> Dictionary:
        """Return it as it lies in its folder."""
        return load_dictionary(self.folder)

    def has_latents(self, settings: Dictionaries) -> bool:
        """Say whether its latents go into the store."""
        planned = self.planned
        wanted = planned.entry_name == settings.latents and planned.control is None
        return wanted and planned.seed == settings.first_seed

    def is_in(self, folder: Path, digest: str) -> bool:
        """Say whether a folder holds this dictionary, fitted on the vectors of a digest."""
        try:
            about = read_about(folder)
        except DictionaryError:
            return False
        wanted = self.new()
        return (
            about.settings == wanted.settings.model_dump(mode="json")
            and about.seed == wanted.seed
            and about.facts.get("vectors") == digest
        )


class VectorSources:
    """Where the vectors of a run come from: its store of vectors, or its model."""

    def __init__(self, run: Run, store: astore.Store | None) -> None:
        self._run, self._store = run, store

    @cached_property
    def untrained(self) -> nn.Module:
        """The run's model before training."""
        return untrained(self._run.model, self._run.recipe.seed)

    def model(self, control: TrainedControl | None) -> nn.Module:
        """Return the model that vectors come from and dictionaries are judged on."""
        return self.untrained if control == "untrained" else self._run.model

    def passes(
        self, control: TrainedControl | None, hooks: Sequence[str]
    ) -> Iterator[tuple[str, ...]]:
        """Yield hooks that are best read together: all where a model runs, else one at a time."""
        live = self._store is None or control == "untrained"
        yield from [tuple(hooks)] if live else [(hook,) for hook in hooks]

    def vectors(self, control: TrainedControl | None, hooks: Sequence[str]) -> VectorSource:
        """Return the vectors of some hooks in the order of the run's seed."""
        recipe = self._run.recipe
        settings, seed = recipe.dictionary, recipe.seed
        if self._store is not None and control != "untrained":
            # checked, so that damage fits nothing: 0.04 s of processor time for 64 MB, where a topk
            # SAE of 2,048 latents takes 6 s for one pass over them
            stored = self._store.vectors(
                list(hooks), batch_tokens=settings.batch_tokens, seed=seed, checked=True
            )
            vectors = as_vectors(stored)
        else:
            rows = self._run.tokens("train").limit(settings.max_tokens, seed=seed)
            vectors = model_vectors(
                self.model(control),
                rows,
                list(hooks),
                batch_tokens=settings.batch_tokens,
                seed=seed,
                skip=left_out_tokens(settings.skip, rows),
            )
        return shuffled(vectors, seed) if control == "shuffled" else vectors


def _fit_all(
    fits: Sequence[DictionaryFit],
    sources: VectorSources,
    settings: Dictionaries,
    progress: Progress,
) -> dict[DictionaryFit, str]:
    """Fit what is not fitted; return what came to nothing, with its reason.

    Raises:
        TrainingStopped: SIGTERM arrived; everything is saved.
    """
    failures: dict[DictionaryFit, str] = {}
    kinds: tuple[TrainedControl | None, ...] = (None, *settings.controls)
    for control in kinds:
        group = [fit for fit in fits if fit.planned.control == control]
        hooks = list(dict.fromkeys(fit.hook for fit in group))
        for together in sources.passes(control, hooks):
            part = [fit for fit in group if fit.hook in together]
            failures |= _fit_pass(part, sources.vectors(control, together), settings, progress)
    for fit in fits:
        if not fit.planned.is_sae:
            failures |= _fit_alone(fit, sources.vectors(None, (fit.hook,)), progress)
    return failures


def _fit_pass(
    fits: Sequence[DictionaryFit], vectors: VectorSource, settings: Dictionaries, progress: Progress
) -> dict[DictionaryFit, str]:
    """Fit the SAEs among some dictionaries in one pass; return what came to nothing."""
    saes = {fit: fit.new() for fit in fits if fit.planned.is_sae}
    if not saes:
        return {}
    for fit in saes:
        _restore(fit, vectors.digest)
    root = next(iter(saes)).folder.parents[1]
    try:
        fit_together(
            {f"{fit.hook}/{fit.planned.name}": sae for fit, sae in saes.items()},
            vectors,
            hooks=[fit.hook for fit in saes],
            folder=root,
            checkpoint_every_steps=settings.checkpoint_every_steps,
            progress=progress,
        )
    except DictionaryError as error:  # the others are fitted all the same
        return {fit: str(error) for fit in saes if not fit.is_finished}
    return {}


def _fit_alone(
    fit: DictionaryFit, vectors: VectorSource, progress: Progress
) -> dict[DictionaryFit, str]:
    """Fit a dictionary that is no SAE, unless it is fitted; return its failure, if any."""
    _restore(fit, vectors.digest)
    if fit.is_finished:
        return {}
    try:
        fit.new().fit(vectors, progress=progress).save(fit.folder)
    except DictionaryError as error:
        return {fit: f"{fit.hook}/{fit.planned.name}: {error}"}
    return {}


def _restore(fit: DictionaryFit, digest: str) -> None:
    """Copy a dictionary back from what was set aside, where the same one was fitted before.

    Other settings of one entry set the folder of all aside; this brings back those that are the
    same.
    """
    run = fit.folder.parents[2]
    place = fit.folder.relative_to(run)
    if fit.folder.exists():
        return
    for old in sorted((run / "replaced").glob("*")):
        if fit.is_in(old / place, digest):
            fit.folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(fit.folder) as folder:
                shutil.copytree(old / place, folder, dirs_exist_ok=True)
            return


def _judge(
    run: Run,
    fits: Sequence[DictionaryFit],
    sources: VectorSources,
    store: astore.Store,
    failures: Mapping[DictionaryFit, str],
    progress: Progress,
) -> None:
    """Write what every fitted dictionary is worth, and which control came to nothing.

    Raises:
        DictionaryError: The store holds latents of another dictionary under the same name.
    """
    rows = store.sql("FROM dictionaries").to_arrow_table().to_pylist()
    stored: StoredRows = {(row["hook"], row["name"]): row for row in rows}
    finished = [fit for fit in fits if fit.is_finished]
    left: list[DictionaryFit] = []
    for fit in finished:
        row = stored.get((fit.hook, fit.planned.name), {})
        if row.get("l0") is None or row["digest"] != fit.load().digest:
            left.append(fit)
    together: dict[tuple[str, TrainedControl | None], list[DictionaryFit]] = {}
    for fit in left:
        together.setdefault((fit.hook, fit.planned.control), []).append(fit)
    for (_, control), part in together.items():
        _judge_together(part, sources.model(control), run, store, stored, progress)
    groups: dict[tuple[str, str], list[DictionaryFit]] = {}
    for fit in finished:
        if fit.planned.control is None:
            groups.setdefault((fit.hook, fit.planned.entry_name), []).append(fit)
    for group in groups.values():  # fits of one entry and hook: do other seeds find the same?
        if len(group) > 1 and any(fit in left for fit in group):
            planned = group[0].planned
            signed = planned.entry.arch not in SIGNED
            report = stability([fit.load() for fit in group], signed=signed, seed=run.recipe.seed)
            store.append("all_scores", report.rows(planned.entry_name))
    # a fit that came to nothing is a row too; the report of a later one replaces it
    store.append(
        "all_scores",
        [
            {
                "metric": "fvu",
                "metric_version": METRICS["fvu"].version,
                "hook": fit.hook,
                "dictionary": fit.planned.name,
                "control": fit.planned.control,
                "seed": run.recipe.seed,
                "split": "score",
                "n_failures": 1,
                "failure": "the fit came to nothing",
                "reason": reason,
            }
            for fit, reason in failures.items()
        ],
    )


def _judge_together(
    fits: Sequence[DictionaryFit],
    model: nn.Module,
    run: Run,
    store: astore.Store,
    stored: StoredRows,
    progress: Progress,
) -> None:
    """Judge dictionaries of one hook in one pass."""
    seed, codes = run.recipe.seed, [fit.load() for fit in fits]
    settings, planted = run.recipe.dictionary, run.recipe.data.corpus.kind == "planted"
    rows = run.tokens("score").limit(settings.eval_tokens, seed=seed)
    skip = left_out_tokens(settings.skip, rows)
    reports = evaluate(codes, model, rows, skip=skip, seed=seed, progress=progress)
    for n_done, (fit, code, report) in enumerate(zip(fits, codes, reports, strict=True), start=1):
        scores = report.rows(fit.planned.name)
        if planted and settings.recovery_tokens is not None:
            limit = settings.recovery_tokens
            recovered = recovery(code, (model, rows), max_tokens=limit, skip=skip, seed=seed)
            scores += recovered.rows(fit.planned.name)
            progress("recovery", n_done, len(fits))
        _save(fit, report, scores, store, stored)


def _save(
    fit: DictionaryFit,
    report: SAEReport,
    scores: Sequence[Mapping[str, Any]],
    store: astore.Store,
    stored: StoredRows,
) -> None:
    """Write a report; what the store says of other weights of the same name is replaced."""
    name = fit.planned.name
    path = os.path.relpath(fit.folder, store.path.parent)
    row, before = report.dictionary_row(name, path=path), stored.get((fit.hook, name), {})
    if before.get("digest") == row["digest"]:
        row["latents_hook"] = before["latents_hook"]
    elif before.get("latents_hook"):
        raise DictionaryError(
            f"{fit.hook}: the store holds latents of another dictionary {name}, as hook "
            f"{before['latents_hook']}; give this one another name in dictionary.learn"
        )
    control = fit.planned.control
    named = [{**score, "control": score.get("control") or control} for score in scores]
    # in one commit, so that a dictionary with measures has its scores
    store.append_all({"all_scores": named, "dictionaries": [row]})


def _store_latents(
    run: Run, fits: Sequence[DictionaryFit], store: astore.Store, progress: Progress
) -> None:
    """Capture the latents of the dictionaries that the recipe names, on the run's own tokens."""
    settings = run.recipe.dictionary
    chosen = [fit for fit in fits if fit.has_latents(settings) and fit.is_finished]
    if not chosen:
        return
    codes: Mapping[str, Dictionary] = {fit.hook: fit.load() for fit in chosen}
    captured = run.recipe.capture
    limits = [n for n in (captured.max_tokens, settings.latents_tokens) if n is not None]
    n_tokens = min(limits, default=None)
    parts = [run.tokens(split).limit(n_tokens, seed=run.recipe.seed) for split in captured.splits]
    # the same seed and no more tokens than the capture: all these rows are in the store
    kept = captured.model_dump(exclude={"hooks", "vectors", "splits", "max_tokens"})
    capture(
        run.model,
        parts,
        hooks=(),
        dictionaries=codes,
        into=store,
        seed=run.recipe.seed,
        progress=progress,
        **kept,
    )
