"""Scoring the units of a store: the verb, and the handle on what was measured."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import activation_store as astore
from activation_store.write.recorder import digest as weights_digest
from lmmono.clients.client import UNANSWERED, Client
from lmmono.errors import ExplainError
from lmmono.explanations.protocols import variant
from lmmono.explanations.stored_explanations import (
    explained_units,
    match_stored_hooks,
    read_densities,
    stored_explainer,
)
from lmmono.records.record_reader import RecordReader
from lmmono.records.units import Units, units_of
from lmmono.registry.scorers import (
    OWN_CONTROLS,
    SCORERS,
    Scorer,
    find_scorer,
    least_density,
)
from lmmono.scores.labelled_items import labels_digest
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.scores.summaries import ScoreKey, summary_rows
from lmmono.types import Progress, silent

Controls = bool | Mapping[str, astore.Store]
"""Whether controls are scored too; a mapping adds stores of control runs, by the control's name."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What `score` measured: rows of table `all_scores` of a store."""

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
            # with one hook the row of the model says the same as the row of the hook
            if row["value"] is not None and (len(self.hooks) > 1 or row["hook"] in self.hooks):
                lines.append("  " + _summary_line(row))
        return "\n".join(lines)


def _summary_line(row: Row) -> str:
    label = row["metric"] + (f" [{row['control']}]" if row["control"] else "")
    low, high = row["ci_low"], row["ci_high"]
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    undefined = 0 if row["metric"].endswith("_defined") else row["nan_fraction"]
    tail = f", {undefined:.1%} not defined count as {_chance(row['metric']):g}" if undefined else ""
    documents = f", {row['n_documents']:,} documents" if row["n_documents"] else ""
    share = (row.get("details") or {}).get("below_fraction")
    left_out = f", {share:.1%} too rare for it left out" if share else ""
    number = f"{row['value']:.3f}{interval}, n {row['n']:,}{documents}{tail}{left_out}"
    return f"{label:<46} {row['hook']}: {number}"


def _chance(metric: str) -> float:
    scorer = next(scorer for scorer in SCORERS.values() if metric in scorer.metrics)
    return scorer.chance or 0.0


def score(
    store: astore.Store,
    hooks: str | Sequence[str] | None = None,
    *,
    scorer: str | Sequence[str] = "simulation_tar",
    explainer: str = "token_lookup",
    units: Units = None,
    preset: str | None = None,
    controls: Controls = True,
    seed: int = 0,
    client: Client | None = None,
    model: Any = None,
    labels: Any = None,
    overwrite: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Scores:
    """Score units, into table `all_scores`: a row per unit and measure, then means of hooks.

    Resumable: units that have a row are skipped. The rows of a hook are added in one commit.
    Scorers named together share what they read.

    Args:
        store: A store opened with mode "a".
        hooks: Hooks stored as rows, or globs; None takes all that have explanations, where the
            scorer needs them, or else all.
        scorer: One or several; see `lmmono ls scorers`.
        explainer: Explainer whose explanations are scored, as named in `explain`; a preset's own
            records are added to the name.
        units: Units of every hook, a `sample`, or None for all that are explained.
        preset: Settings as in a paper.
        controls: Score the controls too; about four times the work. Units that were scored
            without them are scored again. A mapping also adds control
            runs, such as `{"untrained_model": other}`: stores that were scored by the same scorers
            under the same settings, whose scores become rows of the control.
        seed: Seed of what is drawn.
        client: Language model that judges.
        model: Model that the activations come from, for causal scorers; another one than the
            store was captured from is named in column `preset`, by its digest.
        labels: What supervised scorers compare with.
        overwrite: Replace the rows of units that have one.
        progress: Called with how many hooks are done.
        settings: Settings of the scorers.

    Raises:
        ExplainError: Unknown hook, unit, scorer, preset or setting, something that the scorer
            needs is missing, or a control store has no such scores.
        StoreError: The store is not open for writing.
    """
    started = time.perf_counter()
    names = [scorer] if isinstance(scorer, str) else list(scorer)
    request = _Request(
        store,
        explainer,
        units,
        preset,
        controls is not False,
        seed,
        client,
        model,
        labels,
        settings,
    )
    plans = [_ScorerPlan(find_scorer(name), request) for name in names]
    matches = match_stored_hooks(store, hooks)
    if hooks is None:
        scorable = [hook for hook in matches if all(plan.can_score(hook) for plan in plans)]
        matches = scorable or matches
    reader = RecordReader(store, seed=seed)
    n_units, n_found = 0, 0
    for done, hook in enumerate(matches, start=1):
        for plan in plans:
            n_new, n_old = plan.score(hook, reader, overwrite, progress)
            n_units, n_found = n_units + n_new, n_found + n_old
        progress(f"score {hook}", done, len(matches))
    for name, other in controls.items() if isinstance(controls, Mapping) else ():
        for plan in plans:
            plan.add_control(name, other, matches)
    summary = tuple(row for plan in plans for row in plan.sum_up(matches))
    return Scores(
        store,
        tuple(names),
        tuple(matches),
        plans[0].preset,
        plans[0].explainer,
        n_units,
        n_found,
        summary,
        time.perf_counter() - started,
    )


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of `score` that all its scorers share."""

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


def _other_model(store: astore.Store, model: Any) -> dict[str, str]:
    """Return what names a model in a key: nothing for the one that the store was captured from."""
    of_model = weights_digest(model)
    rows = store.sql("SELECT value FROM meta WHERE key = 'model_digest'").fetchall()
    return {} if rows == [(of_model,)] else {"model": of_model[:12]}


def _shown(value: object) -> object:
    """Return a setting as column `preset` says it: the sides of records as `active+predicted`."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else value


def _flagged(rows: list[Row], densities: dict[int, float]) -> list[Row]:
    """Return rows that say whether their unit fires too rarely for their metric.

    A silent unit does not: its score is not defined, which means tell by themselves. A metric that
    passes at no density flags nothing: then no mean would be left to compare.
    """
    limits = {name: least_density(name) for name in {row["metric"] for row in rows}}
    for row in rows:
        limit = limits[row["metric"]]
        if limit is not None and row["unit"] is not None:
            is_limited = math.isfinite(limit)
            row["is_below"] = is_limited and 0 < densities.get(row["unit"], 0.0) < limit
    return rows


class _ScorerPlan:
    """One scorer with its settings, ready to score hooks of a store."""

    def __init__(self, scorer: Scorer, request: _Request) -> None:
        self._scorer, self._request = scorer, request
        self._check()
        self._settings = scorer.with_settings(request.preset, request.settings)
        own = scorer.settings
        changes: dict[str, object] = {
            name: _shown(value)
            for name in request.settings
            if (value := getattr(self._settings, name)) != getattr(own, name)
        }
        if "labels" in scorer.needs:
            changes["labels"] = labels_digest(request.labels)
        if "model" in scorer.needs:
            changes |= _other_model(request.store, request.model)
        self.preset = variant(None, request.preset, changes)
        self.explainer: str | None = None
        if scorer.reads_explanations:
            protocol = getattr(self._settings, "protocol", None)
            is_whole = protocol is None or ":" in request.explainer
            name = request.explainer if is_whole else variant(request.explainer, protocol, {})
            # with the language model that wrote them, which decides what is scored
            self.explainer = stored_explainer(request.store, str(name))
        judge = None if request.client is None else request.client.name
        seed = request.seed if scorer.seeded else None
        self._key = ScoreKey(scorer.metrics, self.preset, self.explainer, judge, seed)

    def _check(self) -> None:
        scorer, request = self._scorer, self._request
        for need in ("client", "model", "labels"):
            if need in scorer.needs and getattr(request, need) is None:
                raise ExplainError(f"{scorer.name} needs {need}=; {scorer.about}")

    def can_score(self, hook: str) -> bool:
        """Return whether a hook has the activations and the explanations that the scorer needs."""
        if self._top_p(hook) is not None:
            return False
        if self.explainer is None:
            return True
        query = "SELECT 1 FROM explanations WHERE hook = $hook AND explainer = $name LIMIT 1"
        return bool(self._request.store.sql(query, hook=hook, name=self.explainer).fetchall())

    def score(
        self, hook: str, reader: RecordReader, overwrite: bool, progress: Progress
    ) -> tuple[int, int]:
        """Score a hook's units that have no row yet; return how many, and how many had one."""
        if (top_p := self._top_p(hook)) is not None:
            raise ExplainError(
                f"{hook}: stored with top_p={top_p:g}, so weak activations are missing and would "
                f"count as silence; {self._scorer.name} wants all of them: capture the hook "
                f"without top_p (unit_statistics works as it is)"
            )
        wanted, request = self._wanted(hook), self._request
        scored = set[int]() if overwrite else self._scored(hook)
        left = tuple(unit for unit in wanted if unit not in scored)
        n_found = len(wanted) - len(left)
        if not left or (self._scorer.per == "hook" and -1 in scored):
            return 0, n_found
        job = ScoreJob(
            request.store,
            hook,
            reader,
            units=left,
            settings=self._settings,
            preset=self.preset,
            explainer=self.explainer,
            controls=request.controls,
            seed=request.seed,
            client=request.client,
            model=request.model,
            labels=request.labels,
            progress=progress,
        )
        rows = self._scorer.load()(job)
        if self._scorer.per == "unit":
            rows = _flagged(rows, read_densities(request.store, hook))
        request.store.append("all_scores", rows)
        return len(left), n_found

    def _top_p(self, hook: str) -> float | None:
        """Return the share of mass that a hook keeps, where that keeps the scorer from working."""
        if self._scorer.name == "unit_statistics":  # it reads what needs all from `unit_stats`
            return None
        query = "SELECT any_value(top_p) FROM hooks WHERE hook = $hook AND kind = 'rows'"
        return self._request.store.sql(query, hook=hook).fetchall()[0][0]

    def _wanted(self, hook: str) -> list[int]:
        """Return the units asked for; those that are explained where the scorer needs that."""
        store, request = self._request.store, self._request
        wanted = units_of(store, hook, request.units)
        if self.explainer is None:
            return wanted
        explained = set(explained_units(store, hook, self.explainer, request.seed))
        missing = [unit for unit in wanted if unit not in explained]
        if missing and request.units is not None:
            raise ExplainError(
                f"{hook}: {len(missing)} of the {len(wanted)} units are not explained by "
                f"{self.explainer}, such as unit {missing[0]}; explain them first"
            )
        return [unit for unit in wanted if unit in explained]

    def _scored(self, hook: str) -> set[int]:
        """Return the units whose score is done; -1 for the hook.

        A unit is not done where the judge was out of reach, for a control too, nor where controls
        are wanted and it was scored without, nor where its explanation was made anew since.
        """
        query = f"""WITH latest AS (FROM {ScoreKey.LATEST} WHERE hook = $hook),
            controls AS (FROM latest WHERE list_contains($own, control))
            SELECT coalesce(s.unit, -1) FROM latest s
            WHERE s.metric = $headline AND s.control IS NULL
                AND NOT EXISTS (FROM latest r WHERE r.unit IS NOT DISTINCT FROM s.unit
                    AND (r.control IS NULL OR list_contains($own, r.control))
                    AND list_contains($unanswered, coalesce(r.failure, '')))
                AND (NOT $wants_controls OR s.value IS NULL OR coalesce(s.nan_fraction, 0) > 0
                    OR EXISTS (FROM controls c WHERE c.unit IS NOT DISTINCT FROM s.unit))
                AND NOT EXISTS (FROM explanations e WHERE e.hook = s.hook AND e.unit = s.unit
                    AND e.explainer = s.explainer AND e.created_at > s.created_at)"""
        rows = self._request.store.sql(
            query,
            headline=self._key.metrics[0],
            hook=hook,
            unanswered=list(UNANSWERED),
            own=list(OWN_CONTROLS),
            wants_controls=self._request.controls,
            **self._key.parameters(),
        )
        return {int(unit) for (unit,) in rows.fetchall()}

    def add_control(self, name: str, other: astore.Store, hooks: Sequence[str]) -> None:
        """Copy the scores of a control run, as rows of the control of that name.

        Units of two models have no partners; the rows are there to be compared as means. Hooks
        that the control run does not have are left out, such as those of dictionaries.

        Raises:
            ExplainError: The store has no scores by this scorer under these settings.
        """
        level = "unit IS NULL" if self._scorer.per == "hook" else "unit IS NOT NULL"
        query = f"""FROM {ScoreKey.LATEST} WHERE control IS NULL AND {level}
            AND list_contains($hooks, hook)"""
        rows = other.sql(query, hooks=list(hooks), **self._key.parameters())
        rows = rows.to_arrow_table().to_pylist()
        if not rows:
            raise ExplainError(
                f"{other.path}: control {name!r} has no rows of {self._scorer.name} "
                f"({self._key}); score it first: lm.score(control_store, "
                f"scorer={self._scorer.name!r}, controls=False)"
            )
        self._request.store.append("all_scores", [row | {"control": name} for row in rows])

    def sum_up(self, hooks: list[str]) -> list[Row]:
        """Write the rows of hooks and models; return those of the headline."""
        if self._scorer.per == "hook":
            return []
        rows = summary_rows(self._request.store, hooks, self._key)
        self._request.store.append("all_scores", rows)
        headline = self._scorer.metrics[0]
        shown = ("value", "ci_low", "ci_high", "nan_fraction", "control", "n_documents")
        empty = dict.fromkeys(shown)
        headlines = [
            row
            for row in (empty | row for row in rows)
            if row["metric"] == headline
            or (row["metric"] == f"{headline}_defined" and row["nan_fraction"])
        ]
        # the score before its controls, models before their hooks
        return sorted(headlines, key=lambda row: (row["control"] or "", row["hook"], row["metric"]))
