"""From a model and tokens to a store: one pass over held-out rows, and nothing stays in memory.

`capture` streams the activations of chosen hooks into an open store; `capture_run` does it for a
run folder as its recipe says, and takes up an interrupted capture where its last commit ended.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

import activation_store as astore
from lmmono.data.tokens import TokenRows
from lmmono.models.hooks import hook_width, match_hooks, recording
from lmmono.recipe.sections import Capture
from lmmono.run import Run
from lmmono.types import Progress, silent

SECTIONS = ("data", "model", "train", "capture")


def capture(
    model: nn.Module,
    tokens: TokenRows | Sequence[TokenRows],
    *,
    hooks: str | Sequence[str] = "blocks.*.mlp.hook_post",
    vectors: str | Sequence[str] = (),
    max_tokens: int | None = None,
    into: astore.Store,
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> astore.Store:
    """Run a model over rows of tokens and write the activations of its hooks into a store.

    What is committed stays: called again with the same arguments on a store opened with mode "a",
    the capture goes on after its last commit and ends with the same bytes.

    Args:
        model: Any model of `lmmono.models.hooks`; run in evaluation mode without gradients.
        tokens: Rows of one split, or of several.
        hooks: Names or globs stored as sparse rows with statistics and exemplars.
        vectors: Names or globs stored as dense vectors.
        max_tokens: Tokens per split, whole rows; None takes all.
        into: A store opened with mode "w" or "a".
        seed: Seed of the random exemplars.
        progress: Called with tokens done.
        **settings: Further fields of the recipe section `capture` (threshold, max_density, top_k,
            random_k, quantile_k, batch_tokens).

    Raises:
        ModelError: a hook name matches nothing.
        StoreError: the store is read-only, full, of another model, or refuses a dense hook.
    """
    chosen = Capture.model_validate(
        {"hooks": _names(hooks), "vectors": _names(vectors), "max_tokens": max_tokens, **settings}
    )
    several = [tokens] if isinstance(tokens, TokenRows) else list(tokens)
    parts = [rows.limit(max_tokens) for rows in several]
    _stream(model, parts, chosen, into, seed, progress)
    return into


def capture_run(run: Run, *, progress: Progress = silent) -> Run:
    """Capture what a run's recipe asks for into its store, unless that is done already."""
    recipe = run.recipe
    digest = recipe.digest(*SECTIONS)
    if run.is_finished("capture", digest):
        return run
    with run.stage("capture", digest) as stage, _open_store(run, digest) as store:
        parts = [
            run.tokens(split).limit(recipe.capture.max_tokens) for split in recipe.capture.splits
        ]
        run.model.to("cuda" if torch.cuda.is_available() else "cpu")
        _stream(run.model, parts, recipe.capture, store, recipe.seed, progress)
        stage.facts.update(n_tokens=sum(rows.ids.size for rows in parts), store=str(store.path))
    return run


def _open_store(run: Run, digest: str) -> astore.Store:
    """Open the run's store to go on with the same capture, or to start over with another."""
    path = run.store_path
    if path.exists():
        store = astore.open(path, mode="a")
        if store.capture_digest == digest:
            return store
        store.close()
    return astore.open(path, mode="w", overwrite=True)


def _stream(
    model: nn.Module,
    parts: Sequence[TokenRows],
    settings: Capture,
    store: astore.Store,
    seed: int,
    progress: Progress,
) -> None:
    """Run the model over all parts and hand every batch to the store's writer."""
    names = match_hooks(model, settings.hooks)
    dense = match_hooks(model, settings.vectors) if settings.vectors else []
    rows = [
        astore.Rows(
            hook=name,
            d=hook_width(model, name),
            threshold=settings.threshold,
            max_density=settings.max_density,
            top_k=settings.top_k,
            random_k=settings.random_k,
            quantile_k=settings.quantile_k,
        )
        for name in names
    ]
    kept = [astore.Vectors(hook=name, d=hook_width(model, name)) for name in dense]
    total = sum(part.ids.size for part in parts)
    n_ctx = parts[0].n_ctx
    model.eval()
    with (
        store.writer(rows=rows, vectors=kept, n_ctx=n_ctx, seed=seed) as writer,
        recording(model, [*names, *dense]) as acts,
        torch.inference_mode(),
    ):
        skip = writer.next_seq
        batch_rows = max(1, settings.batch_tokens // n_ctx)
        for part, first, last in _plan(parts, batch_rows, skip):
            ids = _tensor(part.ids[first:last], model)
            model(input_ids=ids, use_cache=False)
            writer.add(
                part.seq_ids[first:last],
                part.ids[first:last],
                part.doc_ids[first:last],
                part.split,
                dict(acts),
            )
            progress("capture", writer.n_tokens, total)


def _plan(
    parts: Sequence[TokenRows], batch_rows: int, skip: int
) -> Iterator[tuple[TokenRows, int, int]]:
    """Yield (rows, first, last) batch by batch, without the first `skip` rows of all parts."""
    for part in parts:
        for first in range(min(skip, len(part)), len(part), batch_rows):
            yield part, first, min(first + batch_rows, len(part))
        skip = max(0, skip - len(part))


def _tensor(ids: np.ndarray, model: nn.Module) -> Int[Tensor, "batch pos"]:
    """Return rows of token ids as a tensor where the model is."""
    device = next(model.parameters()).device
    return torch.from_numpy(ids.astype(np.int64)).to(device)


def _names(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several names as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
