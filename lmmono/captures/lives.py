"""The lives of units over a training: when each became what it is, and when it fell silent.

A unit at a kept step is compared with the unit of the same number at the last step, over the same
tokens. Documents are drawn again for intervals, all steps of a draw on the same ones, so that what
a document does to every step cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor, nn

from activation_store.write.recording import OutputRecorder, per_token
from lmmono.captures.capture import left_out_tokens
from lmmono.data.tokens import TokenRows
from lmmono.models.hooks import hook_width, run_until
from lmmono.recipe.sections import Capture
from lmmono.stats.bootstrap import DocumentDraws
from lmmono.stats.estimate import LEVEL
from lmmono.types import Progress, silent

BORN_ABOVE = 0.5
"""Correlation with its final self above which a unit is born."""

MAX_GROUPS = 200
"""Documents beyond this are dealt into as many groups, which are drawn instead: the sums of 2,000
documents of three layers at 12 steps would take 1.5 GB."""

N_DRAWS = 500
"""Draws of documents: an interval's ends move by 3 % of its width between seeds."""

MIN_DOCUMENTS = 20
"""Percentile intervals over fewer documents cover too little (0.76 at 3, 0.86 at 8)."""

Sums = Float[ndarray, "documents steps units"]


@dataclass(frozen=True, slots=True)
class UnitSums:
    """Sums over the tokens of each document, of one hook: x at a kept step, y at the last.

    The last step is among the steps: there x is y.
    """

    steps: tuple[int, ...]
    """Kept steps, ascending, the last one included."""
    n: Float[ndarray, " documents"]
    """Tokens."""
    active: Sums
    """Tokens with x above the threshold."""
    x: Sums
    xx: Sums
    xy: Sums
    xz: Sums
    """Sums of x times the last act of the next unit: what two units have in common anyway."""


def sum_units(
    models: Mapping[int, nn.Module],
    parts: Sequence[TokenRows],
    hooks: Sequence[str],
    settings: Capture,
    progress: Progress = silent,
) -> dict[str, UnitSums]:
    """Run the models of all steps side by side over rows, and sum their activations by document.

    Args:
        models: By step; the largest step is the one that the others are compared with.
        parts: Rows of tokens, as they are captured.
        hooks: Hooks by exact name.
        settings: Of the capture: its threshold, skipped tokens and batch.
        progress: Told how many tokens are done.
    """
    steps = tuple(sorted(models))
    documents = np.unique(np.concatenate([part.doc_ids.ravel() for part in parts]))
    documents = documents[documents >= 0]
    n_groups = min(len(documents), MAX_GROUPS)
    widths = {hook: hook_width(models[steps[-1]], hook) for hook in hooks}
    sums = {
        hook: torch.zeros(5, len(steps), n_groups, width, dtype=torch.float64)
        for hook, width in widths.items()
    }
    n = np.zeros(n_groups)
    batch_rows = max(1, settings.batch_tokens // parts[0].n_ctx)
    skip = left_out_tokens(settings.skip, parts[0])
    recorders = {step: OutputRecorder() for step in steps}
    n_done, n_all = 0, sum(part.ids.size for part in parts)
    with torch.no_grad():
        for part in parts:
            for first in range(0, len(part), batch_rows):
                batch = part[first : first + batch_rows]
                ids = torch.from_numpy(batch.ids.astype(np.int64))
                counts = (batch.doc_ids >= 0) & ~skip.mask(batch.ids, batch.doc_ids)
                group = np.searchsorted(documents, batch.doc_ids[counts]) % n_groups
                n += np.bincount(group, minlength=n_groups)
                acts = {
                    step: _flat(model, ids, batch.doc_ids, hooks, recorders[step], counts)
                    for step, model in models.items()
                }
                index = torch.from_numpy(group)
                for hook in hooks:
                    y = acts[steps[-1]][hook].double()
                    for i, step in enumerate(steps):
                        x = acts[step][hook].double()
                        terms = (x > settings.threshold, x, x * x, x * y, x * y.roll(-1, 1))
                        for total, term in zip(sums[hook][:, i], terms, strict=True):
                            total.index_add_(0, index, term.double())
                n_done += batch.ids.size
                progress("lives of units", n_done, n_all)
    return {
        hook: UnitSums(steps, n, *(moment.numpy().transpose(1, 0, 2) for moment in total))
        for hook, total in sums.items()
    }


def _flat(
    model: nn.Module,
    ids: Tensor,
    doc_ids: ndarray,
    hooks: Sequence[str],
    recorder: OutputRecorder,
    counts: Bool[ndarray, "rows n_ctx"],
) -> dict[str, Tensor]:
    """Return the activations of the tokens that count, by hook, on the CPU."""
    is_token = torch.from_numpy(doc_ids >= 0)
    chosen = torch.from_numpy(counts.reshape(-1))
    acts = run_until(model.eval(), ids, hooks, is_token, recorder)
    return {
        hook: per_token(hook, tensor, *ids.shape).reshape(ids.numel(), -1).float().cpu()[chosen]
        for hook, tensor in acts.items()
    }


@dataclass(frozen=True, slots=True)
class Lives:
    """The lives of the units of one hook, each as value, lower and upper end of its interval."""

    steps: tuple[int, ...]
    density: Float[ndarray, "steps units"]
    correlation: Float[ndarray, "3 steps units"]
    """NaN where an act is constant."""
    other_unit: Float[ndarray, "steps units"]
    birth: Float[ndarray, "3 units"]
    """A step; infinite where the unit is not born, NaN where there is no interval."""
    death: Float[ndarray, "3 units"]
    """A step; infinite where the unit lives at the end."""
    n_documents: int
    """Documents, or groups of them, that are drawn again."""
    ci_method: str


def live(sums: UnitSums, *, n_documents: int | None = None, seed: int = 0) -> Lives:
    """Return births and deaths of units from sums over documents, with intervals over documents.

    Args:
        sums: As `sum_units` makes them.
        n_documents: Documents that were dealt into the groups of the sums.
        seed: Seed of the draws.
    """
    n_groups, n_steps, n_units = sums.x.shape
    n_draws = N_DRAWS if n_groups >= MIN_DOCUMENTS else 0
    draws = DocumentDraws(n_groups, int(sums.n.sum()), n_draws, seed, LEVEL)
    n = draws.totals(sums.n[:, None])
    y, yy = (draws.totals(moment[:, -1]) for moment in (sums.x, sums.xx))
    correlation = np.full((3, n_steps, n_units), np.nan)
    other = np.full((n_steps, n_units), np.nan)
    born = np.zeros((1 + n_draws, n_steps, n_units), bool)
    alive = np.zeros_like(born)
    tail = (1 - LEVEL) / 2
    for i in range(n_steps):
        of_step = (moment[:, i] for moment in (sums.active, sums.x, sums.xx, sums.xy, sums.xz))
        active, x, xx, xy, xz = (draws.totals(moment) for moment in of_step)
        r = _pearson(n, x, y, xx, yy, xy)
        correlation[0, i] = r[0]
        if n_draws:
            defined = np.isfinite(r).all(axis=0)
            ends = np.quantile(r[1:, defined], [tail, 1 - tail], axis=0)
            correlation[1:, i, defined] = ends
        rolled = (np.roll(moment[:1], -1, axis=1) for moment in (y, yy))
        other[i] = _pearson(n[:1], x[:1], next(rolled), xx[:1], next(rolled), xz[:1])[0]
        born[:, i], alive[:, i] = np.nan_to_num(r) > BORN_ABOVE, active > 0
    # silent from a step to the end: no later step, itself included, has an active token
    silent_from = ~np.flip(np.logical_or.accumulate(np.flip(alive, 1), axis=1), 1)
    groups = f" of {n_documents} documents" if n_documents and n_documents > n_groups else ""
    unit = f"groups{groups}" if groups else "documents"
    return Lives(
        sums.steps,
        sums.active.sum(axis=0) / max(float(sums.n.sum()), 1.0),
        correlation,
        other,
        _ends(_first(born, sums.steps)),
        _ends(_first(silent_from, sums.steps)),
        n_groups,
        f"percentile bootstrap over {unit}, {n_draws} resamples"
        if n_draws
        else f"none: {n_groups} documents, want {MIN_DOCUMENTS}",
    )


def _pearson(n: ndarray, x: ndarray, y: ndarray, xx: ndarray, yy: ndarray, xy: ndarray) -> ndarray:
    """Return correlations from sums; NaN where one side does not vary."""
    vx, vy = xx - x * x / n, yy - y * y / n
    # what is left of a constant by rounding is no variance
    varies = (vx > 1e-9 * np.maximum(xx, 1e-300)) & (vy > 1e-9 * np.maximum(yy, 1e-300))
    scale = np.sqrt(np.where(varies, vx * vy, 1.0))
    return np.where(varies, (xy - x * y / n) / scale, np.nan)


def _first(holds: Bool[ndarray, "draws steps units"], steps: Sequence[int]) -> ndarray:
    """Return the first step at which something holds, infinite where it never does."""
    return np.where(holds.any(axis=1), np.asarray(steps, float)[holds.argmax(axis=1)], np.inf)


def _ends(drawn: Float[ndarray, "draws units"]) -> Float[ndarray, "3 units"]:
    """Return the value and the ends of its percentile interval, which are kept steps too."""
    ends = np.full((3, drawn.shape[1]), np.nan)
    ends[0] = drawn[0]
    if len(drawn) > 1:
        tail = (1 - LEVEL) / 2
        ends[1:] = np.quantile(drawn[1:], [tail, 1 - tail], axis=0, method="inverted_cdf")
    return ends


def life_rows(
    hook: str, lives: Lives, n_tokens: int, digests: Mapping[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of tables `unit_steps` and `unit_lives`; what is undefined is left empty."""
    shared = {
        "hook": hook,
        "ci_level": LEVEL,
        "ci_method": lives.ci_method,
        "n_documents": lives.n_documents,
    }
    history: list[dict[str, Any]] = []
    for i, step in enumerate(lives.steps):
        columns = zip(lives.density[i], *lives.correlation[:, i], lives.other_unit[i], strict=True)
        names = ("density", "correlation", "ci_low", "ci_high", "other_unit")
        history += [
            shared
            | {"unit": unit, "step": step, "n_tokens": n_tokens, "model_digest": digests[step]}
            | {name: _number(value) for name, value in zip(names, values, strict=True)}
            for unit, values in enumerate(columns)
        ]
    names = [f"{name}{end}" for name in ("birth", "death") for end in ("", "_low", "_high")]
    units = [
        shared
        | {"unit": unit}
        | {name: _step(value) for name, value in zip(names, values, strict=True)}
        for unit, values in enumerate(zip(*lives.birth, *lives.death, strict=True))
    ]
    return {"unit_steps": history, "unit_lives": units}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _step(value: float) -> int | None:
    return int(value) if np.isfinite(value) else None
