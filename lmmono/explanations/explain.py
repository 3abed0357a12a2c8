"""Explaining the units of a store: the verb, and the handle on what was made."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.errors import ExplainError, nearest
from lmmono.explanations.explainer_registry import Task
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.protocols import Protocol, find_protocol, variant
from lmmono.explanations.stored_explanations import (
    match_stored_hooks,
    read_explanations,
    read_vocabulary,
)
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import KINDS, Counts, Records
from lmmono.records.units import Units, units_of
from lmmono.registry.explainers import Explainer, find_explainer
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
    n_found: int
    """How many of all these were there already."""
    seconds: float
    """Wall time."""

    def __repr__(self) -> str:
        failed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.failures.items())) or "none"
        return (
            f"Explanations({self.store.path}, {self.explainer}: {self.n_explained:,} units of "
            f"{len(self.hooks)} hooks explained, failed: {failed}; {self.n_found:,} were there; "
            f"{self.seconds:.1f} s)"
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

    Units that have a row already are left as they are. The rows of a hook are added in one commit;
    a failure is a row too. Whatever differs from the explainer's defaults is part of the name in
    the table, such as `token_lookup:top=5`.

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
        overwrite: Explain anew what is there.
        progress: Told how many hooks are done.
        settings: Settings of the explainer.

    Raises:
        ExplainError: Unknown hook, unit, explainer or setting, no tokens of split `explain`, or a
            client is missing.
        StoreError: The store is not open for writing.
    """
    made = _Explaining(store, find_explainer(explainer), preset, window, counts, seed, settings)
    made.check(client)
    started, found = time.perf_counter(), match_stored_hooks(store, hooks)
    n_found = 0
    for done, hook in enumerate(found, start=1):
        n_found += made.hook(hook, units, client, overwrite, progress)
        progress(f"explain {made.name}", done, len(found))
    seconds = time.perf_counter() - started
    return _handle(store, made.name, seed, tuple(found), units, n_found, seconds)


class _Explaining:
    """One explainer with its settings, ready to explain hooks of a store."""

    def __init__(
        self,
        store: astore.Store,
        explainer: Explainer,
        preset: str | None,
        window: int,
        counts: Counts | None,
        seed: int,
        settings: dict[str, Any],
    ) -> None:
        self._store, self._explainer, self._seed = store, explainer, seed
        self._protocol = None if preset is None else find_protocol(preset)
        self._window = window
        self._counts = Counts(**explainer.shown) if counts is None else counts
        self._settings = {**explainer.settings, **settings}
        defaults = explainer.settings
        changes: dict[str, object] = {k: v for k, v in settings.items() if defaults.get(k) != v}
        if preset is None:
            changes |= {} if window == 64 else {"window": window}
            shown = {kind: getattr(self._counts, kind) for kind in KINDS}
            default = {kind: explainer.shown.get(kind, 0) for kind in KINDS}
            changes |= {kind: n for kind, n in shown.items() if n != default[kind]}
        elif counts is not None:
            raise ExplainError(f"preset {preset!r} says which records; leave counts= out")
        self.name = str(variant(explainer.name, preset, changes))
        self._reader = RecordReader(store, seed=seed)
        self._vocabulary = read_vocabulary(store)

    def check(self, client: Client | None) -> None:
        known = self._explainer.settings
        for name in self._settings:
            if name not in known:
                way_out = nearest(name, known) if known else "it has none"
                raise ExplainError(f"{self._explainer.name}: no setting {name!r}; {way_out}")
        if "client" in self._explainer.needs and client is None:
            raise ExplainError(f"{self._explainer.name} asks a language model; pass client=")

    def hook(
        self,
        hook: str,
        units: Units,
        client: Client | None,
        overwrite: bool,
        progress: Progress,
    ) -> int:
        """Explain the units of one hook and return how many were there already."""
        wanted = units_of(self._store, hook, units)
        query = """SELECT DISTINCT unit FROM explanations
            WHERE hook = $hook AND explainer = $name AND seed = $seed"""
        known = self._store.sql(query, hook=hook, name=self.name, seed=self._seed).fetchall()
        there = set() if overwrite else {unit for (unit,) in known} & set(wanted)
        left = [unit for unit in wanted if unit not in there]
        if left:
            started = time.perf_counter()
            records = self._records(hook, left, len(wanted) == len(left) and units is None)
            task = Task(
                records,
                self._vocabulary,
                self.name,
                self._seed,
                self._settings,
                self._store,
                client,
                progress,
            )
            rows = [each.row() for each in self._explainer.load()(task)]
            each_took = (time.perf_counter() - started) / len(left)
            rows = [row | {"seconds": row["seconds"] or each_took} for row in rows]
            self._store.append("explanations", rows)
        return len(there)

    def _records(self, hook: str, units: list[int], is_all: bool) -> Records:
        of = None if is_all else units
        protocol: Protocol | None = self._protocol
        if protocol is None:
            return self._reader.records(
                hook, "explain", self._counts, window=self._window, units=of
            )
        return self._reader.ranked(
            hook,
            protocol.explain_split,
            protocol.explain,
            window=protocol.window,
            units=of,
            token_centred=protocol.token_centred,
        )


def _handle(
    store: astore.Store,
    name: str,
    seed: int,
    hooks: tuple[str, ...],
    units: Units,
    n_found: int,
    seconds: float,
) -> Explanations:
    query = """SELECT failure, count(DISTINCT unit) FROM explanations WHERE hook = $hook
        AND explainer = $name AND seed = $seed AND unit IN (SELECT unnest($units))
        GROUP BY failure"""
    counts: dict[str | None, int] = {}
    for hook in hooks:
        wanted = units_of(store, hook, units)
        rows = store.sql(query, hook=hook, name=name, seed=seed, units=wanted).fetchall()
        for failure, n in rows:
            counts[failure] = counts.get(failure, 0) + n
    n_explained = counts.pop(None, 0)
    failures = {str(kind): n for kind, n in counts.items()}
    return Explanations(store, name, seed, hooks, n_explained, failures, n_found, seconds)
