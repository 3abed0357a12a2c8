"""Explaining the units of a store: the verb, the handle on what it did, and the stage of a run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.errors import ExplainError, nearest
from lmmono.explanations.explain_task import ExplainTask
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.protocols import Protocol, find_protocol, variant
from lmmono.explanations.stored_explanations import (
    answered_units,
    count_failures,
    count_outdated,
    match_stored_hooks,
    read_explanations,
    read_vocabulary,
    stored_explainer,
)
from lmmono.records.corpus_excerpts import PADDING
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import KINDS, Counts, Records
from lmmono.records.units import Units, sample, units_of
from lmmono.registry.explainers import Explainer, find_explainer
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent


@dataclass(frozen=True, slots=True)
class Explanations:
    """What `explain` made and found: rows of table `explanations` of a store."""

    store: astore.Store
    """The store that holds them."""
    explainer: str
    """Name under which they are stored."""
    seed: int
    """Seed they were made with."""
    hooks: tuple[str, ...]
    """Hooks whose units are explained."""
    n_explained: int
    """Units with an explanation."""
    failures: dict[str, int]
    """Units without one, by type of failure."""
    reasons: dict[str, str]
    """What went wrong in words, by type of failure: the first unit's; all stand in the table."""
    n_found: int
    """How many of all these were stored already."""
    n_outdated: int
    """How many of those were made when the split held other tokens; `overwrite=True` makes them
    anew."""
    seconds: float
    """Wall time."""

    def __repr__(self) -> str:
        failed = [
            f"{n:,} {kind}" + (f" ({self.reasons[kind]})" if kind in self.reasons else "")
            for kind, n in sorted(self.failures.items())
        ]
        outdated = f", {self.n_outdated:,} from other documents than now" if self.n_outdated else ""
        return (
            f"Explanations({self.store.path}, {self.explainer}: {self.n_explained:,} units of "
            f"{len(self.hooks)} hooks explained, failed: {', '.join(failed) or 'none'}; "
            f"{self.n_found:,} were stored already{outdated}; {self.seconds:.1f} s)"
        )

    def of(self, hook: str) -> dict[int, Explanation]:
        """Return the explanation of each unit of a hook."""
        return read_explanations(self.store, hook, self.explainer, self.seed)


def explain(
    store: astore.Store,
    hooks: str | Sequence[str] | None = None,
    *,
    units: Units = None,
    explainer: str = "token_lookup",
    preset: Literal["openai", "openai_crate"] | None = None,
    window: int = 64,
    counts: Counts | None = None,
    seed: int = 0,
    client: Client | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Explanations:
    """Explain units from the records of split `explain`, into table `explanations`.

    Resumable: units that have a row are skipped. The rows of a hook are added in one commit. A
    failure is a row too; units that a language model was asked about in vain (no answer came, or a
    limit was reached) are asked about again by the next call. Whatever decides the answer is part
    of the name in the table: settings other than the explainer's defaults, as in
    `token_lookup:top=5`, and the language model, as in `llm_max_act:model=judge@host`. Documents
    are not: an explanation stands when the store gets more of them, since asking again may cost
    money. Column `n_tokens` says of how many tokens each is, and the handle how many are outdated.

    Args:
        store: A store opened with mode "a".
        hooks: Hooks stored as rows, or globs; None takes all.
        units: Units of every hook, a `sample`, or None for all.
        explainer: Name of the explainer; see `lmmono ls explainers`.
        preset: Records as in a paper; see `protocols`.
        window: Most tokens per excerpt; a preset has its own.
        counts: Records shown; None takes the explainer's own.
        seed: Seed of what is drawn.
        client: Language model, for explainers that ask one.
        overwrite: Explain anew what is stored.
        progress: Told how many hooks are done.
        settings: Settings of the explainer.

    Raises:
        ExplainError: Unknown hook, unit, explainer or setting, no tokens of split `explain`, or a
            client is missing.
        StoreError: The store is not open for writing.
    """
    started = time.perf_counter()
    plan = _ExplainPlan(
        store, find_explainer(explainer), preset, window, counts, seed, client, settings
    )
    matching = match_stored_hooks(store, hooks)
    wanted = {hook: units_of(store, hook, units) for hook in matching}
    n_found = n_outdated = 0
    for done, hook in enumerate(matching, start=1):
        stored = set[int]() if overwrite else answered_units(store, hook, plan.name, seed)
        left = [unit for unit in wanted[hook] if unit not in stored]
        n_found += len(wanted[hook]) - len(left)
        explained = sorted(stored.intersection(wanted[hook]))
        n_outdated += count_outdated(store, hook, plan.name, seed, explained) if explained else 0
        if left:
            whole_hook = units is None and len(left) == len(wanted[hook])
            plan.explain(hook, None if whole_hook else left, progress)
        progress(f"explain {plan.name}", done, len(matching))
    failures, reasons = count_failures(store, plan.name, seed, wanted)
    n_explained, seconds = failures.pop("", 0), time.perf_counter() - started
    return Explanations(
        store,
        plan.name,
        seed,
        tuple(matching),
        n_explained,
        failures,
        reasons,
        n_found,
        n_outdated,
        seconds,
    )


class _ExplainPlan:
    """One explainer with its settings, ready to explain hooks of a store."""

    def __init__(
        self,
        store: astore.Store,
        explainer: Explainer,
        preset: str | None,
        window: int,
        counts: Counts | None,
        seed: int,
        client: Client | None,
        settings: dict[str, Any],
    ) -> None:
        asks = "client" in explainer.needs
        for name in settings:
            if name not in explainer.settings:
                way_out = nearest(name, explainer.settings)
                raise ExplainError(f"{explainer.name}: no setting {name!r}; {way_out}")
        if asks and client is None:
            raise ExplainError(f"{explainer.name} asks a language model; pass client=")
        if preset is not None and counts is not None:
            raise ExplainError(f"preset {preset!r} says which records; leave counts= out")
        self._store, self._explainer, self._seed = store, explainer, seed
        self._client = client if asks else None
        self._protocol = None if preset is None else find_protocol(preset)
        self._window = window
        self._counts = Counts(**explainer.shown) if counts is None else counts
        self._settings = {**explainer.settings, **settings}
        if "of" in self._settings:  # whose explanations are taken: by which model is part of it
            self._settings["of"] = stored_explainer(store, self._settings["of"])
        self.name = self._name(preset)
        self._reader = RecordReader(store, seed=seed)
        self._vocabulary = read_vocabulary(store)

    def _name(self, preset: str | None) -> str:
        """Return the name that tells apart whatever decides the answer."""
        defaults, changes = self._explainer.settings, dict[str, object]()
        for name, value in self._settings.items():
            changes |= {} if defaults[name] == value else {name: value}
        if preset is None:
            changes |= {} if self._window == 64 else {"window": self._window}
            for kind in KINDS:
                n = getattr(self._counts, kind)
                changes |= {} if n == self._explainer.shown.get(kind, 0) else {kind: n}
        if self._client is not None:
            changes["model"] = self._client.name
        return str(variant(self._explainer.name, preset, changes))

    def explain(self, hook: str, units: list[int] | None, progress: Progress) -> None:
        """Explain units of one hook, None for all, and store what is said of them."""
        started = time.perf_counter()
        task = ExplainTask(
            self._records(hook, units),
            self._vocabulary,
            self.name,
            self._seed,
            self._settings,
            self._store,
            self._client,
            progress,
        )
        explanations = self._explainer.load()(task)
        per_unit = (time.perf_counter() - started) / max(len(task.records.units), 1)
        rows = [explanation.row() for explanation in explanations]
        n_tokens = int((task.records.excerpts.grid.token_ids != PADDING).sum())
        rows = [row | {"seconds": row["seconds"] or per_unit, "n_tokens": n_tokens} for row in rows]
        self._store.append("explanations", rows)

    def _records(self, hook: str, units: list[int] | None) -> Records:
        protocol: Protocol | None = self._protocol
        if protocol is None:
            return self._reader.records(
                hook, "explain", self._counts, window=self._window, units=units
            )
        return self._reader.ranked(
            hook,
            protocol.explain_split,
            protocol.explain,
            window=protocol.window,
            units=units,
            token_centred=protocol.token_centred,
        )


def explain_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Explain the units that a captured run's recipe names; return the facts.

    Resumable: units that have a row already are skipped.

    Raises:
        ExplainError: A hook is not stored as rows, or split `explain` was not captured.
        StoreError: The store cannot be read or written.
    """
    settings, seed = run.recipe.explain, run.recipe.seed
    units = None if settings.units is None else sample(settings.units, seed=seed)
    n_explained = dict[str, int]()
    with astore.open(run.store_path, mode="a") as store:
        for explainer in settings.explainers:
            for preset in (None, *settings.presets):
                explanations = explain(
                    store,
                    settings.hooks,
                    units=units,
                    explainer=explainer,
                    preset=preset,
                    window=settings.window,
                    seed=seed,
                    progress=progress,
                )
                n_explained[explanations.explainer] = explanations.n_explained
    return {"n_explained": n_explained}
