"""From a model and tokens to a store: one pass over held-out rows, and nothing stays in memory.

`capture` streams the activations of chosen hooks into an open store; `capture_run` does it for a
run folder as its recipe says, and takes up an interrupted capture where its last commit ended.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor, nn

import activation_store as astore
from activation_store.write.recorder import digest as weights_digest
from lmmono.captures.latents import Code, Latents, claim_all, latent_rows
from lmmono.data.tokens import TokenRows
from lmmono.errors import RunError
from lmmono.files.processes import Processes, this_process
from lmmono.models.hooks import hook_width, match_hooks, recording
from lmmono.recipe.sections import Capture
from lmmono.runs.folder import Run
from lmmono.types import Progress, silent

ALONE = Processes(0, 1)
"""A capture that shares its rows with nobody."""


def capture(
    model: nn.Module,
    tokens: TokenRows | Sequence[TokenRows],
    *,
    hooks: str | Sequence[str] = "blocks.*.mlp.hook_post",
    vectors: str | Sequence[str] = (),
    dictionaries: Sequence[Code] | Mapping[str, Code] = (),
    halves: bool = False,
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
        dictionaries: Fitted dictionaries, as a list or by hook, whose latents are stored as sparse
            rows; the names of their hooks are told in `lmmono.captures.latents`.
        halves: Store signed codes as two halves; see `lmmono.store_latents`.
        max_tokens: Tokens per split, whole rows; None takes all.
        into: A store opened with mode "w" or "a".
        seed: Seed of the random exemplars.
        progress: Called with tokens done.
        **settings: Further fields of the recipe's section `capture`, such as threshold or top_k.

    Raises:
        ModelError: a hook name matches nothing.
        RunError: a setting is unknown or out of range.
        DictionaryError: a dictionary does not fit, or its code is negative without `halves`.
        StoreError: the store is read-only, full, of another model, or refuses a dense hook.
    """
    given = {"hooks": _names(hooks), "vectors": _names(vectors), "max_tokens": max_tokens}
    try:
        chosen = Capture.model_validate({**given, **settings})
    except ValidationError as error:
        raise RunError(f"capture: {error}") from None
    parts = [tokens] if isinstance(tokens, TokenRows) else list(tokens)
    latents = claim_all(into, dictionaries, halves, lambda hook: hook_width(model, hook))
    limited = [part.limit(max_tokens) for part in parts]
    _add_words(into, limited)
    _stream(model, limited, chosen, into, seed, progress, latents)
    return into


def capture_run(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Capture what a run's recipe asks for into its store; return the facts.

    Works alone and under `accelerate launch`: each process takes a share of the rows, and one that
    is killed costs what it had not committed.

    Raises:
        StoreError: as `capture` does.
    """
    recipe, settings, here = run.recipe, run.recipe.capture, this_process()
    with here.main_first():
        parts = [
            run.tokens(split).limit(settings.max_tokens, seed=recipe.seed)
            for split in settings.splits
        ]
        store = _opened(run, parts, here)
    with store:
        model = _on_device(run.model)
        _stream(model, parts, settings, store, recipe.seed, progress, here=here)
        here.wait()
        if not here.is_main:
            return {}
        info = store.info()
        return {"n_tokens": info.n_tokens, "n_acts": info.n_acts, "n_bytes": info.n_bytes}


def _opened(run: Run, parts: Sequence[TokenRows], here: Processes) -> astore.Store:
    """Open a run's store to add to it; the main process makes it and says what it is of."""
    mode: Literal["a", "w"] = "a" if run.store_path.exists() else "w"
    store = astore.open(run.store_path, mode)
    if here.is_main:
        store.add_run(_run_row(run))
        _add_words(store, parts)
    return store


def _run_row(run: Run) -> dict[str, Any]:
    """Return what table `runs` says of a run."""
    config, recipe = run.model.config, run.recipe
    return {
        "run": run.name,
        "arch": recipe.model.arch,
        "model_digest": weights_digest(run.model),
        "corpus_digest": run.corpus.digest,
        "n_parameters": sum(p.numel() for p in run.model.parameters()),
        "n_layers": recipe.model.n_layers,
        "d_model": recipe.model.d_model,
        "d_vocab": config.vocab_size,
        "n_ctx": recipe.data.n_ctx,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "git_commit": run.manifest.stages["train"].commit,
        "versions": run.manifest.versions,
    }


def _stream(
    model: nn.Module,
    parts: Sequence[TokenRows],
    settings: Capture,
    store: astore.Store,
    seed: int,
    progress: Progress,
    latents: Sequence[Latents] = (),
    here: Processes = ALONE,
) -> None:
    """Run the model over this process' share of all parts, batch by batch, into the store."""
    parts = [_share(part, here) for part in parts]
    names = match_hooks(model, settings.hooks) if settings.hooks else []
    dense = match_hooks(model, settings.vectors) if settings.vectors else []
    n_ctx, total = parts[0].n_ctx, sum(part.ids.size for part in parts)
    batch_rows = max(1, settings.batch_tokens // n_ctx)
    was_training = model.training
    model.eval()
    with (
        store.writer(
            rows=[_rows(model, name, settings) for name in names]
            + [latent_rows(each, settings) for each in latents],
            vectors=[_vectors(model, name, settings) for name in dense],
            n_ctx=n_ctx,
            seed=seed,
            model_digest=weights_digest(model),
            rank=here.rank,
            world_size=here.n,
        ) as writer,
        recording(model, [*names, *dense, *(each.source for each in latents)]) as acts,
        torch.inference_mode(),
    ):
        n_done = writer.next_seq
        for part, first, last in _plan(parts, batch_rows, n_done):
            ids = part.ids[first:last]
            model(input_ids=_tensor(ids, model), use_cache=False)
            docs = part.doc_ids[first:last]
            flat = _flat(acts)
            coded = {each.hook: each.encode(flat[each.source]) for each in latents}
            writer.add(part.seq_ids[first:last], ids, docs, part.split, flat | coded)
            n_done += last - first
            progress("capture", n_done * n_ctx, total)
    model.train(was_training)


def _on_device(model: nn.Module) -> nn.Module:
    """Move a model to the GPU, where there is one; under a launcher to that of this process."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return model.to(gpu if torch.cuda.is_available() else "cpu")


def _share(part: TokenRows, here: Processes) -> TokenRows:
    """Return the rows that this process captures: as many as the others', one after the other."""
    first, last = (len(part) * rank // here.n for rank in (here.rank, here.rank + 1))
    return part[first:last]


def _add_words(store: astore.Store, parts: Sequence[TokenRows]) -> None:
    """Add the documents and the vocabulary of the rows' corpus, where they come from one."""
    corpus = parts[0].corpus
    if corpus is not None:
        store.add_documents(corpus.documents)
        store.add_vocabulary(corpus.vocabulary())


def _rows(model: nn.Module, name: str, settings: Capture) -> astore.Rows:
    """Return the store's settings for one hook kept as sparse rows."""
    return astore.Rows(
        hook=name,
        d=hook_width(model, name),
        threshold=settings.threshold,
        max_density=settings.max_density,
        top_k=settings.top_k,
        random_k=settings.random_k,
        quantile_k=settings.quantile_k,
        dtype=settings.dtype,
        units=settings.units,
        top_p=settings.top_p,
    )


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


def _flat(acts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return activations as [batch, pos, d]; heads are flattened."""
    return {name: tensor.flatten(2) for name, tensor in acts.items()}


def _names(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several names as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _vectors(model: nn.Module, name: str, settings: Capture) -> astore.Vectors:
    """Return the store's settings for one hook kept as dense vectors."""
    return astore.Vectors(hook=name, d=hook_width(model, name), dtype=settings.vectors_dtype)
