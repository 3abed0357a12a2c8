"""Scoring the units of a store: the verb, and the handle on what was measured."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import activation_store as astore
from lmmono.clients.client import Client
from lmmono.errors import ExplainError, nearest
from lmmono.explanations.protocols import variant
from lmmono.explanations.stored_explanations import explained_units, match_stored_hooks
from lmmono.records.record_reader import RecordReader
from lmmono.records.units import Units, units_of
from lmmono.registry.scorers import Scorer, find_scorer
from lmmono.scores.scorer_registry import Job
from lmmono.scores.summaries import Origin, summary_rows
from lmmono.types import Progress, silent


@dataclass(frozen=True, slots=True)
class Scores:
    """What `score` measured and found: rows of table `scores` of a store."""

    store: astore.Store
    """The store that holds them."""
    scorers: tuple[str, ...]
    """Names of the scorers."""
    hooks: tuple[str, ...]
    """Hooks whose units are scored."""
    preset: str | None
    """Preset and changed settings, as stored."""
    explainer: str | None
    """Explainer, as stored; None where none is scored."""
    n_units: int
    """Units scored now, of all scorers and hooks together."""
    n_found: int
    """Units that had a score already."""
    summary: tuple[dict[str, Any], ...]
    """The headline rows of models and hooks, the score before its controls; where some units have
    no defined score, the mean of the others too."""
    seconds: float
    """Wall time."""

    def __repr__(self) -> str:
        lines = [
            f"Scores({self.store.path}, {', '.join(self.scorers)} of {self.explainer}: "
            f"{self.n_units:,} units scored, {self.n_found:,} were there; {self.seconds:.1f} s)"
        ]
        for row in self.summary:
            if row["value"] is not None:
                lines.append("  " + _told(row))
        return "\n".join(lines)


def _told(row: dict[str, Any]) -> str:
    what = row["metric"] + (f" [{row['control']}]" if row["control"] else "")
    low, high = row["ci_low"], row["ci_high"]
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    undefined = 0 if row["metric"].endswith("_defined") else row["nan_fraction"]
    tail = f", {undefined:.1%} not defined count as 0" if undefined else ""
    return f"{what:<42} {row['hook']}: {row['value']:.3f}{interval}, n {row['n']:,}{tail}"


def score(
    store: astore.Store,
    hooks: str | Sequence[str] | None = None,
    *,
    scorer: str | Sequence[str] = "simulation_tar",
    explainer: str = "token_lookup",
    units: Units = None,
    preset: str | None = None,
    controls: bool = True,
    seed: int = 0,
    client: Client | None = None,
    model: Any = None,
    labels: Any = None,
    overwrite: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Scores:
    """Score units, into table `scores`: a row per unit and measure, then means of hooks and models.

    Units that have a row already are left as they are, so a run that was cut off goes on where it
    was. The rows of a hook are added in one commit. Scorers named together share what they read.

    Args:
        store: A store opened with mode "a".
        hooks: Hooks stored as rows, or globs; None takes all that have explanations, where the
            scorer needs them, or else all.
        scorer: One or several; see `lmmono ls scorers`.
        explainer: Explainer whose explanations are scored, as named in `explain`; a preset's own
            records are added to the name.
        units: Units of every hook, a `sample`, or None for all that are explained.
        preset: Settings as in a paper.
        controls: Score the controls too; about four times the work.
        seed: Seed of what is drawn.
        client: Language model that judges.
        model: Model that the activations come from, for causal scorers.
        labels: What supervised scorers compare with.
        overwrite: Score anew what is there.
        progress: Told how many hooks are done.
        settings: Settings of the scorers.

    Raises:
        ExplainError: Unknown hook, unit, scorer, preset or setting, or something that the scorer
            needs is missing.
        StoreError: The store is not open for writing.
    """
    names = [scorer] if isinstance(scorer, str) else list(scorer)
    given = _Given(store, explainer, units, preset, controls, seed, client, model, labels, settings)
    plans = [_Plan(find_scorer(name), given) for name in names]
    started = time.perf_counter()
    found = match_stored_hooks(store, hooks)
    if hooks is None:
        found = [hook for hook in found if all(plan.can_score(hook) for plan in plans)] or found
    reader = RecordReader(store, seed=seed)
    n_units, n_found = _score_hooks(plans, found, reader, overwrite, progress)
    summary = tuple(row for plan in plans for row in plan.sum_up(found))
    chosen, seconds = (plans[0].preset, plans[0].explainer), time.perf_counter() - started
    return Scores(store, tuple(names), tuple(found), *chosen, n_units, n_found, summary, seconds)


def _score_hooks(
    plans: "Sequence[_Plan]",
    hooks: Sequence[str],
    reader: RecordReader,
    overwrite: bool,
    progress: Progress,
) -> tuple[int, int]:
    """Score hook by hook; return how many units were scored, and how many were already."""
    n_units, n_found = 0, 0
    for done, hook in enumerate(hooks, start=1):
        for plan in plans:
            n_new, n_old = plan.score(hook, reader, overwrite, progress)
            n_units, n_found = n_units + n_new, n_found + n_old
        progress(f"score {hook}", done, len(hooks))
    return n_units, n_found


@dataclass(frozen=True, slots=True)
class _Given:
    """What the caller of `score` gave."""

    store: astore.Store
    explainer: str
    units: Units
    preset: str | None
    controls: bool
    seed: int
    client: Client | None
    model: Any
    labels: Any
    settings: dict[str, Any]


class _Plan:
    """One scorer with its settings, ready to score hooks of a store."""

    def __init__(self, scorer: Scorer, given: _Given) -> None:
        self._scorer, self._given = scorer, given
        self._check()
        preset = {} if given.preset is None else scorer.presets[given.preset]
        self._settings = {**scorer.settings, **preset, **given.settings}
        changes = {k: v for k, v in given.settings.items() if scorer.settings[k] != v}
        self.preset = variant(None, given.preset, changes)
        self._explained = bool({"explanation", "program"} & set(scorer.needs))
        self.explainer = self._explainer_name()

    def _explainer_name(self) -> str | None:
        if not self._explained:
            return None
        protocol = self._settings.get("protocol")
        if protocol is None or ":" in self._given.explainer:
            return self._given.explainer
        return variant(self._given.explainer, protocol, {})

    def _check(self) -> None:
        scorer, given = self._scorer, self._given
        if given.preset is not None and given.preset not in scorer.presets:
            known = ", ".join(scorer.presets) or "none"
            raise ExplainError(f"{scorer.name}: no preset {given.preset!r}; it has: {known}")
        for name in given.settings:
            if name not in scorer.settings:
                way_out = nearest(name, scorer.settings) if scorer.settings else "it has none"
                raise ExplainError(f"{scorer.name}: no setting {name!r}; {way_out}")
        for need in ("client", "model", "labels"):
            if need in scorer.needs and getattr(given, need) is None:
                raise ExplainError(f"{scorer.name} needs {need}=; {scorer.about}")

    def can_score(self, hook: str) -> bool:
        """Return whether a hook has the explanations that the scorer needs."""
        if not self._explained:
            return True
        query = "SELECT 1 FROM explanations WHERE hook = $hook AND explainer = $name LIMIT 1"
        return bool(self._given.store.sql(query, hook=hook, name=self.explainer).fetchall())

    def score(
        self, hook: str, reader: RecordReader, overwrite: bool, progress: Progress
    ) -> tuple[int, int]:
        """Score a hook's units that have no row yet; return how many, and how many had one."""
        wanted, given = self._wanted(hook), self._given
        there = set[int]() if overwrite else self._there(hook)
        left = tuple(unit for unit in wanted if unit not in there)
        n_found = len(wanted) - len(left)
        if not left or (self._scorer.per == "hook" and -1 in there):
            return 0, n_found
        job = Job(
            given.store,
            hook,
            reader,
            units=left,
            settings=self._settings,
            preset=self.preset,
            explainer=self.explainer,
            controls=given.controls,
            seed=given.seed,
            client=given.client,
            model=given.model,
            labels=given.labels,
            progress=progress,
        )
        given.store.append("scores", self._scorer.load()(job))
        return len(left), n_found

    def _wanted(self, hook: str) -> list[int]:
        """Return the units asked for; those that are explained where the scorer needs that."""
        store, given = self._given.store, self._given
        wanted = units_of(store, hook, given.units)
        if not self._explained:
            return wanted
        assert self.explainer is not None
        explained = set(explained_units(store, hook, self.explainer, given.seed))
        missing = [unit for unit in wanted if unit not in explained]
        if missing and given.units is not None:
            raise ExplainError(
                f"{hook}: {len(missing)} of the {len(wanted)} units are not explained by "
                f"{self.explainer}, such as unit {missing[0]}; explain them first"
            )
        return [unit for unit in wanted if unit in explained]

    def _there(self, hook: str) -> set[int]:
        """Return the units that have a headline row under these settings; -1 for the hook."""
        origin = self._origin()
        query = """SELECT coalesce(unit, -1) FROM scores WHERE metric = $metric AND hook = $hook
            AND control IS NULL AND seed IS NOT DISTINCT FROM $seed
            AND preset IS NOT DISTINCT FROM $preset
            AND explainer IS NOT DISTINCT FROM $explainer AND judge IS NOT DISTINCT FROM $judge"""
        rows = self._given.store.sql(
            query,
            metric=origin.metrics[0],
            hook=hook,
            seed=origin.seed,
            preset=origin.preset,
            explainer=origin.explainer,
            judge=origin.judge,
        )
        return {int(unit) for (unit,) in rows.fetchall()}

    def _origin(self) -> Origin:
        given, client = self._given, self._given.client
        judge = None if client is None else client.name
        seed = given.seed if self._scorer.seeded else None
        return Origin(self._scorer.metrics, self.preset, self.explainer, judge, seed)

    def sum_up(self, hooks: list[str]) -> list[dict[str, Any]]:
        """Write the rows of hooks and models; return those of the headline."""
        if self._scorer.per == "hook":
            return []
        rows = summary_rows(self._given.store, hooks, self._origin())
        self._given.store.append("scores", rows)
        headline = self._scorer.metrics[0]
        empty = dict.fromkeys(("value", "ci_low", "ci_high", "nan_fraction", "control"))
        shown = [
            empty | row
            for row in rows
            if row["metric"] == headline
            or (row["metric"] == f"{headline}_defined" and row["nan_fraction"])
        ]
        # the score before its controls, models before their hooks
        return sorted(shown, key=lambda row: (row["control"] or "", row["hook"], row["metric"]))
