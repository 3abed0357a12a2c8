"""Units with activations, explanations and scores as Neuronpedia's batches of JSON lines.

What its import takes: files of one record per line, the same columns in every line. Columns that
only a model could fill (promoted tokens, decoder alignment) are left to its defaults.
"""

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import activation_store as astore
from activation_store.read.excerpts import records
from activation_store.read.exporting import check_shards, layer_of, whole_folder
from lmmono.errors import ExplainError

BATCH_UNITS = 256
"""Units per file."""

N_BARS = 50
"""Bars of a unit's histogram, equally wide from 0 to its largest activation."""

_UNITS = "SELECT d, n_tokens FROM hooks WHERE hook = $hook AND kind = 'rows'"

_BARS = """SELECT a.unit, least(floor(a.act / u.max_act * $n), $n - 1)::INTEGER AS bar, count(*)
    FROM acts a JOIN unit_stats u ON u.hook = a.hook AND u.unit = a.unit
    WHERE a.hook = $hook AND a.act > 0 AND a.unit >= $first AND a.unit <= $last GROUP BY ALL"""

_SAID = """SELECT hook, unit, explainer, seed, rank, text, model, prompt_hash FROM explanations
    WHERE hook = $hook AND text IS NOT NULL AND coalesce(rank, 1) = 1
    ORDER BY unit, explainer, seed"""

_SCORED = """SELECT unit, explainer, seed, metric, metric_version, preset, value, ci_low, ci_high,
        ci_level, ci_method, n, n_records, n_documents, n_tokens, nan_fraction, n_failures, split,
        judge, prompt_hash, n_calls, n_prompt_tokens, n_completion_tokens, cost_usd, seconds
    FROM all_scores WHERE hook = $hook AND unit IS NOT NULL AND explainer IS NOT NULL
        AND value IS NOT NULL AND control IS NULL
    ORDER BY unit, explainer, seed, metric, preset, judge"""

_CONTROLS = """SELECT unit, explainer, seed, metric, preset, judge, control, value FROM all_scores
    WHERE hook = $hook AND unit IS NOT NULL AND explainer IS NOT NULL AND value IS NOT NULL
        AND control IS NOT NULL ORDER BY control"""

_KEY = ("unit", "explainer", "seed", "metric", "preset", "judge")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Names under which the site knows a hook."""

    model: str
    source: str
    source_set: str
    creator: str
    creator_id: str
    salt: str

    def unit(self, unit: int) -> Row:
        """Return the columns that name a unit."""
        return {"modelId": self.model, "layer": self.source, "index": str(unit)}

    def id(self, *parts: object) -> str:
        """Return an id of 25 characters that is the same in every export of the same thing."""
        text = json.dumps([self.salt, self.source, *parts])
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:24]


def export_neuronpedia(
    store: astore.Store,
    out: str | os.PathLike[str],
    hook: str,
    *,
    model: str | None = None,
    source_set: str = "lmmono",
    creator: str = "lmmono",
    creator_id: str = "lmmono",
    layer: int | None = None,
    before: int = 32,
    after: int = 31,
) -> Path:
    """Write a hook's units for Neuronpedia's import, and return the folder.

        <model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
        <model>/<source>/features/batch-N.jsonl.gz       statistics and histograms
        <model>/<source>/activations/batch-N.jsonl.gz    exemplars, their kind as `dataSource`
        <model>/<source>/explanations/batch-N.jsonl.gz   of every explainer, the best candidate
        <model>/<source>/scores/batch-N.jsonl.gz         of explanations; `jsonDetails` holds metric
                                                         version, interval, cost and controls
        config/*.jsonl                                   the types that these name: five
                                                         files that the site reads, empty or not

    The source is `<layer>-<source_set>`. Failures have no place there and are left out; a score
    that is not defined is the 0 or chance of the store, with its `nan_fraction`. The same store
    gives the same bytes.

    Args:
        store: An open store.
        out: Folder to write.
        hook: A hook stored as rows.
        model: Name of the model there; by default that of the run that the store is of.
        source_set: Name of the set of hooks.
        creator: Who is named as the author.
        creator_id: Id of a user of the site that imports.
        layer: Number of the layer; by default the N in `blocks.N.`.
        before: Most tokens before an exemplar's own.
        after: Most tokens after it.

    Raises:
        ExplainError: The hook is not stored as rows.
        StoreError: `out` holds something already, the hook's name has no layer, or a shard is
            damaged.
    """
    number = layer_of(hook) if layer is None else layer
    run = _run(store)
    name = re.sub(r"[^a-z0-9_-]+", "-", (model or run.get("run") or "model").lower())
    place = _Place(
        name, f"{number}-{source_set}", source_set, creator, creator_id, store.info().store_id
    )
    sizes = store.sql(_UNITS, hook=hook).fetchall()
    if not sizes:
        raise ExplainError(f"{store.path}: no hook {hook!r} stored as rows")
    check_shards(store, [hook])
    with whole_folder(out) as folder:
        for file, row in _about(place, run, *sizes[0]).items():
            _write(folder / name / place.source / f"{file}.jsonl", [row])
        _write_all(store, hook, place, folder, before, after)
    return Path(out)


def _write_all(
    store: astore.Store, hook: str, place: _Place, folder: Path, before: int, after: int
) -> None:
    """Write units, explanations and scores in batches, and the types that they name."""
    at = folder / place.model / place.source
    n_batches = _write_units(store, hook, place, at, before, after)
    explanations = list(_explanations(store, hook, place))
    ids = {explanation["_key"]: explanation["id"] for explanation in explanations}
    scores = list(_scores(store, hook, place, ids))
    for batch in range(n_batches):
        for kind, rows in (("explanations", explanations), ("scores", scores)):
            units = range(batch * BATCH_UNITS, (batch + 1) * BATCH_UNITS)
            of_batch = [row for row in rows if row["_unit"] in units]
            _write(at / kind / f"batch-{batch}.jsonl.gz", of_batch)
    for kind, rows in _types(place, explanations, scores).items():
        _write(folder / "config" / f"{kind}.jsonl", rows, if_empty=True)


def _run(store: astore.Store) -> Row:
    rows = store.sql("FROM runs ORDER BY created_at LIMIT 1").to_arrow_table().to_pylist()
    return rows[0] if rows else {}


def _about(place: _Place, run: Row, d: int, n_tokens: int) -> dict[str, Row]:
    """Return release, model, set and source: one row each."""
    owned = {"creatorId": place.creator_id, "visibility": "PUBLIC"}
    shown = {"creatorName": place.creator, "urls": list[str]()}
    n_ctx = run.get("n_ctx")
    return {
        "release": {"name": place.source_set, "description": place.source_set, **shown, **owned},
        "model": {
            "id": place.model,
            "displayName": place.model,
            "displayNameShort": place.model,
            "instruct": False,
            "inferenceEnabled": False,
            "layers": run.get("n_layers") or 0,
            "neuronsPerLayer": d,
            "dimension": run.get("d_model"),
            "owner": place.creator,
            **owned,
        },
        "sourceset": {
            "modelId": place.model,
            "name": place.source_set,
            "description": place.source_set,
            "releaseName": place.source_set,
            "hasDashboards": True,
            **shown,
            **owned,
        },
        "source": {
            "id": place.source,
            "modelId": place.model,
            "setName": place.source_set,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "num_prompts": n_tokens // n_ctx if n_ctx else None,
            "num_tokens_in_prompt": n_ctx,
            **owned,
        },
    }


def _write_units(
    store: astore.Store, hook: str, place: _Place, at: Path, before: int, after: int
) -> int:
    """Write features and activations batch by batch; return how many batches there are."""
    batches: dict[int, tuple[list[Row], list[Row]]] = {}

    def flush() -> None:
        for batch, (features, activations) in batches.items():
            bars = _bars(store, hook, [int(row["index"]) for row in features])
            features = [row | bars(int(row["index"]), row["maxActApprox"]) for row in features]
            _write(at / "features" / f"batch-{batch}.jsonl.gz", features)
            _write(at / "activations" / f"batch-{batch}.jsonl.gz", activations)
        batches.clear()

    n_batches = 0
    for stats, exemplars in records(store, hook, before, after):
        batch = stats["unit"] // BATCH_UNITS
        if batch not in batches:
            flush()
            batches[batch], n_batches = ([], []), batch + 1
        features, activations = batches[batch]
        features.append(_feature(place, hook, stats))
        activations += _activations(place, stats["unit"], exemplars)
    flush()
    return n_batches


def _feature(place: _Place, hook: str, stats: Row) -> Row:
    return {
        **place.unit(stats["unit"]),
        "creatorId": place.creator_id,
        "sourceSetName": place.source_set,
        "hookName": hook,
        "hasVector": False,
        "maxActApprox": stats["max_act"] or 0.0,
        "frac_nonzero": stats["density"] or 0.0,
    }


def _bars(store: astore.Store, hook: str, units: list[int]) -> Any:
    """Return a function that gives a unit's histogram of activations above 0."""
    heights = np.zeros((max(units) - min(units) + 1, N_BARS), np.int64)
    span = {"first": min(units), "last": max(units)}
    for unit, bar, n in store.sql(_BARS, hook=hook, n=N_BARS, **span).fetchall():
        heights[unit - min(units), bar] = n

    def of(unit: int, largest: float) -> Row:
        bars = heights[unit - min(units)] if largest > 0 else np.zeros(0, np.int64)
        centres = (np.arange(len(bars)) + 0.5) * largest / N_BARS
        return {
            "freq_hist_data_bar_heights": bars.astype(float).tolist(),
            "freq_hist_data_bar_values": centres.tolist(),
        }

    return of


def _activations(place: _Place, unit: int, exemplars: dict[str, list[Row]]) -> Iterator[Row]:
    """Yield the exemplars; those of a tenth of the activations with its share and its ends."""
    ends: dict[int, list[float]] = {}
    for row in exemplars["quantile"]:
        ends.setdefault(row["bin"], []).append(row["act"])
    for kind, rows in exemplars.items():
        for row in rows:
            acts, tenth = row["acts"], ends.get(row["bin"] if kind == "quantile" else -1)
            yield {
                "id": place.id("activation", unit, kind, row["rank"]),
                **place.unit(unit),
                "creatorId": place.creator_id,
                "tokens": row["tokens"],
                "values": acts,
                "maxValue": max(acts),
                "maxValueTokenIndex": acts.index(max(acts)),
                "minValue": min(acts),
                "dataSource": kind,
                "dataIndex": str(row["rank"]),
                "binMin": min(tenth) if tenth else None,
                "binMax": max(tenth) if tenth else None,
                "binContains": 0.1 if tenth else None,
                "qualifyingTokenIndex": row["own"],
            }


def _explanations(store: astore.Store, hook: str, place: _Place) -> Iterator[Row]:
    """Yield explanations; `_unit` and `_key` are for this module alone."""
    for row in store.sql(_SAID, hook=hook).to_arrow_table().to_pylist():
        key = (row["unit"], row["explainer"], row["seed"])
        yield {
            "id": place.id("explanation", *key),
            **place.unit(row["unit"]),
            "description": row["text"],
            "authorId": place.creator_id,
            "typeName": row["explainer"],
            "explanationModelName": row["model"],
            "notes": json.dumps({"seed": row["seed"], "prompt_hash": row["prompt_hash"]}),
            "_unit": row["unit"],
            "_key": key,
        }


def _scores(
    store: astore.Store, hook: str, place: _Place, ids: dict[tuple[Any, ...], str]
) -> Iterator[Row]:
    """Yield the scores of the explanations that are there, each with its controls."""
    seeds: dict[tuple[Any, ...], list[Any]] = {}
    for unit, explainer, seed in ids:
        seeds.setdefault((unit, explainer), []).append(seed)
    controls: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in store.sql(_CONTROLS, hook=hook).to_arrow_table().to_pylist():
        controls.setdefault(tuple(row[k] for k in _KEY), {})[row["control"]] = row["value"]
    for row in store.sql(_SCORED, hook=hook).to_arrow_table().to_pylist():
        key, explained = tuple(row[k] for k in _KEY), seeds.get((row["unit"], row["explainer"]), [])
        seed = row["seed"] if row["seed"] in explained or len(explained) != 1 else explained[0]
        explanation = ids.get((row["unit"], row["explainer"], seed))
        if explanation is None:
            continue
        details = {k: v for k, v in row.items() if k not in ("unit", "explainer", "value")}
        yield {
            "id": place.id("score", *key, row["metric_version"], row["prompt_hash"]),
            "initiatedByUserId": place.creator_id,
            "explanationId": explanation,
            "value": row["value"],
            "explanationScoreTypeName": ":".join(filter(None, (row["metric"], row["preset"]))),
            "explanationScoreModelName": row["judge"] or "program",
            "jsonDetails": json.dumps(details | {"controls": controls.get(key, {})}),
            "_unit": row["unit"],
        }


def _types(place: _Place, explanations: list[Row], scores: list[Row]) -> dict[str, list[Row]]:
    """Return the types that explanations and scores name, as the site's configuration has them."""

    def named(rows: list[Row], column: str, **more: str) -> list[Row]:
        names = sorted({row[column] for row in rows if row[column] is not None})
        author = {"creatorName": place.creator, **more}
        return [{"name": n, "displayName": n, "description": n, **author} for n in names]

    owner = {"creatorId": place.creator_id}
    return {
        "explanation_type": named(explanations, "typeName", **owner),
        "explanation_model_type": named(explanations, "explanationModelName"),
        "explanation_score_type": named(scores, "explanationScoreTypeName", **owner),
        "explanation_score_model": named(scores, "explanationScoreModelName"),
        "eval_type": [],
    }


def _write(path: Path, rows: Iterable[Row], *, if_empty: bool = False) -> None:
    """Write a line per row; a file that has none is not made unless asked for."""
    shown = ({k: v for k, v in row.items() if not k.startswith("_")} for row in rows)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in shown)
    if text or if_empty:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
