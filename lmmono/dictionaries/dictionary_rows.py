"""What the dictionaries of a run are worth, as rows of its store: tables `dictionaries`, `scores`.

Each dictionary is judged on documents of the split `score`, at the model that its vectors came
from. Those of one hook are judged in one pass, so their intervals are of the same redraws.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import activation_store as astore
from lmmono.dictionaries.evaluation import SAEReport, evaluate
from lmmono.dictionaries.fitting import Fit, Sources
from lmmono.dictionaries.recovery import recovery
from lmmono.dictionaries.stability import stability
from lmmono.errors import DictionaryError
from lmmono.recipe.dictionary_settings import SIGNED, TrainedControl
from lmmono.registry.metrics import METRICS
from lmmono.runs.folder import Run
from lmmono.types import Progress

Known = dict[tuple[str, str], dict[str, Any]]
"""Rows of table `dictionaries` by hook and name."""


def judge(
    run: Run,
    fits: Sequence[Fit],
    sources: Sources,
    store: astore.Store,
    failures: Mapping[Fit, str],
    progress: Progress,
) -> None:
    """Write what every fitted dictionary is worth, and which control came to nothing.

    Raises:
        DictionaryError: The store holds latents of another dictionary under the same name.
    """
    known = _known(store)
    finished = [fit for fit in fits if fit.is_finished]
    left = [fit for fit in finished if not _is_judged(fit, known)]
    together: dict[tuple[str, TrainedControl | None], list[Fit]] = {}
    for fit in left:
        together.setdefault((fit.hook, fit.planned.control), []).append(fit)
    for (_, control), part in together.items():
        _judge_together(part, sources.model(control), run, store, known, progress)
    for alike in _with_other_seeds(finished):
        if any(fit in left for fit in alike):
            store.append("scores", _stability(alike, run.recipe.seed))
    store.append("scores", [_failed(fit, text, run.recipe.seed) for fit, text in failures.items()])


def _judge_together(
    fits: Sequence[Fit],
    model: nn.Module,
    run: Run,
    store: astore.Store,
    known: Known,
    progress: Progress,
) -> None:
    """Judge dictionaries of one hook in one pass."""
    seed, codes = run.recipe.seed, [fit.load() for fit in fits]
    settings, planted = run.recipe.dictionary, run.recipe.data.corpus.kind == "planted"
    rows = run.tokens("score").limit(settings.eval_tokens)
    reports = evaluate(codes, model, rows, seed=seed, progress=progress)
    for n_done, (fit, code, report) in enumerate(zip(fits, codes, reports, strict=True), start=1):
        scores = report.rows(fit.planned.name)
        if planted and settings.recovery_tokens is not None:
            found = recovery(code, (model, rows), max_tokens=settings.recovery_tokens, seed=seed)
            scores += found.rows(fit.planned.name)
            progress("recovery", n_done, len(fits))
        _save(fit, report, scores, store, known)


def _known(store: astore.Store) -> Known:
    rows = store.sql("FROM dictionaries").to_arrow_table().to_pylist()
    return {(row["hook"], row["name"]): row for row in rows}


def _is_judged(fit: Fit, known: Known) -> bool:
    row = known.get((fit.hook, fit.planned.name), {})
    return row.get("l0") is not None and row["digest"] == fit.load().digest


def _save(
    fit: Fit,
    report: SAEReport,
    scores: Sequence[Mapping[str, Any]],
    store: astore.Store,
    known: Known,
) -> None:
    """Write a report; what the store says of other weights of the same name is replaced."""
    name = fit.planned.name
    path = os.path.relpath(fit.folder, store.path.parent)
    row, before = report.dictionary_row(name, path=path), known.get((fit.hook, name), {})
    if before.get("digest") == row["digest"]:
        row["latents_hook"] = before["latents_hook"]
    elif before.get("latents_hook"):
        raise DictionaryError(
            f"{fit.hook}: the store holds latents of another dictionary {name}, as hook "
            f"{before['latents_hook']}; give this one another name in dictionary.learn"
        )
    control = fit.planned.control
    named = [{**each, "control": each.get("control") or control} for each in scores]
    store.append("scores", named)  # first: what has its measures has its scores
    store.append("dictionaries", [row])


def _with_other_seeds(fits: Sequence[Fit]) -> list[list[Fit]]:
    """Return fits of one entry and hook together, where there are several seeds."""
    groups: dict[tuple[str, str], list[Fit]] = {}
    for fit in fits:
        if fit.planned.control is None:
            groups.setdefault((fit.hook, fit.planned.entry_name), []).append(fit)
    return [group for group in groups.values() if len(group) > 1]


def _stability(fits: Sequence[Fit], seed: int) -> list[dict[str, Any]]:
    """Return the rows that say whether fits of other seeds find the same directions."""
    planned = fits[0].planned
    signed = planned.entry.arch not in SIGNED
    found = stability([fit.load() for fit in fits], signed=signed, seed=seed)
    return found.rows(planned.entry_name)


def _failed(fit: Fit, text: str, seed: int) -> dict[str, Any]:
    """Return the row of table `scores` of a fit that came to nothing; a report replaces it."""
    return {
        "metric": "fvu",
        "metric_version": METRICS["fvu"].version,
        "hook": fit.hook,
        "dictionary": fit.planned.name,
        "control": fit.planned.control,
        "seed": seed,
        "split": "score",
        "n_failures": 1,
        "failure": "the fit came to nothing",
        "details": {"reason": text},
    }
