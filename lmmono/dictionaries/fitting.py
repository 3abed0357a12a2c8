"""Every dictionary of a run, and the passes over the vectors that fit them."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

import activation_store as astore
from lmmono.dictionaries.classical import Classical
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.estimator import Dictionary, load_dictionary
from lmmono.dictionaries.sae import SAE, fit_together
from lmmono.dictionaries.vector_source import VectorSource, as_vectors, model_vectors, shuffled
from lmmono.errors import DictionaryError
from lmmono.files.atomic import disk_faults
from lmmono.models.untrained import untrained
from lmmono.recipe.dictionary_settings import (
    Decomposition,
    Dictionaries,
    Planned,
    TrainedControl,
)
from lmmono.runs.folder import Run
from lmmono.types import Progress


@dataclass(frozen=True, slots=True)
class Fit:
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
        path = folder / "dictionary.json"
        if not path.exists():
            return False
        found, wanted = json.loads(path.read_text(encoding="utf-8")), self.new()
        return (
            found["settings"] == wanted.settings.model_dump(mode="json")
            and found["seed"] == wanted.seed
            and found["facts"].get("vectors") == digest
        )


def fits_of(run: Run, hooks: Sequence[str]) -> list[Fit]:
    """Return every dictionary of a run, hook by hook."""
    planned = run.recipe.dictionary.planned
    folder = run.dir / "dictionaries"
    return [Fit(each, hook, folder / hook / each.name) for hook in hooks for each in planned]


class Sources:
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
            order = {"batch_tokens": settings.batch_tokens, "seed": seed}
            found = as_vectors(self._store.vectors(list(hooks), **order))
        else:
            found = model_vectors(
                self.model(control),
                self._run.tokens("train"),
                list(hooks),
                batch_tokens=settings.batch_tokens,
                seed=seed,
                max_tokens=settings.max_tokens,
            )
        return shuffled(found, seed) if control == "shuffled" else found


def fit_all(
    fits: Sequence[Fit], sources: Sources, settings: Dictionaries, progress: Progress
) -> dict[Fit, str]:
    """Fit what is not fitted; return what came to nothing, with its reason.

    Raises:
        TrainingStopped: SIGTERM arrived; everything is saved.
    """
    failures: dict[Fit, str] = {}
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
    fits: Sequence[Fit], vectors: VectorSource, settings: Dictionaries, progress: Progress
) -> dict[Fit, str]:
    """Fit the SAEs among some dictionaries in one pass; return what came to nothing."""
    saes = {fit: fit.new() for fit in fits if fit.planned.is_sae}
    if not saes:
        return {}
    for fit in saes:
        _take_up(fit, vectors.digest)
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


def _fit_alone(fit: Fit, vectors: VectorSource, progress: Progress) -> dict[Fit, str]:
    """Fit a dictionary that is no SAE, unless it is fitted; return its failure."""
    _take_up(fit, vectors.digest)
    if fit.is_finished:
        return {}
    try:
        fit.new().fit(vectors, progress=progress).save(fit.folder)
    except DictionaryError as error:
        return {fit: f"{fit.hook}/{fit.planned.name}: {error}"}
    return {}


def _take_up(fit: Fit, digest: str) -> None:
    """Copy the dictionary from what was set aside, where the same one was fitted before.

    Other settings of one entry set the folder of all aside; this brings back the entries that are
    the same.
    """
    run, place = fit.folder.parents[2], fit.folder.relative_to(fit.folder.parents[2])
    if fit.folder.exists():
        return
    for old in _set_aside(run):
        if fit.is_in(old / place, digest):
            fresh = fit.folder.with_name(fit.folder.name + ".tmp")
            with disk_faults(fit.folder):
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(old / place, fresh)
                fresh.rename(fit.folder)
            return


def _set_aside(run: Path) -> Iterable[Path]:
    return sorted((run / "replaced").glob("*"))
