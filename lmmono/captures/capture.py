"""From a model and tokens to a store: one pass over held-out rows, and nothing stays in memory.

`capture` streams the activations of chosen hooks into an open store; `capture_run` does it for a
run folder as its recipe says, and resumes an interrupted capture after its last commit.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

import activation_store as astore
from activation_store.write.recorder import digest as weights_digest
from activation_store.write.recording import OutputRecorder, per_token
from lmmono.captures.latents import Code, Latents, claim_all, rows_settings
from lmmono.data.sources import tokenize
from lmmono.data.tokens import TokenCorpus, TokenRows
from lmmono.errors import RunError
from lmmono.files.json_files import settings_faults
from lmmono.files.processes import Processes, this_process
from lmmono.models.hooks import hook_width, match_hooks, negative_halves, run_until
from lmmono.models.pretrained import on_best_device
from lmmono.recipe.sections import Capture, SkippedTokens
from lmmono.runs.folder import Run
from lmmono.types import SPLITS, Progress, silent

ALONE = Processes(0, 1)
"""A capture that shares its rows with nobody."""
CUT_TOKENS = 8_192
"""Tokens that cuts are measured on: at 64 of 8,192 units a unit's cut is its 64th largest, so what
it stores of further tokens is known within about an eighth."""


def capture(
    model: nn.Module,
    texts: Any,
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
    """Run a model over texts and write the activations of its hooks into a store.

    What is committed stays: called again with the same arguments on a store opened with mode "a",
    the capture resumes after its last commit and ends with the same bytes. Called with further
    rows, it adds those; a sequence id that the store holds with other tokens is refused. In other
    batches (further rows, another `batch_tokens`) a row's activations may differ in their last
    bits.

    Args:
        model: Any model of `lmmono.models.hooks`; run in evaluation mode without gradients.
        texts: A text; a path, folder or glob of files; several of either; a dataset of `datasets`;
            a corpus of `lmmono.tokenize`, which says what is read as what; or rows of tokens of one
            split, or of several.
        hooks: Names or globs stored as sparse rows with statistics and exemplars.
        vectors: Names or globs stored as dense vectors.
        dictionaries: Fitted dictionaries, as a list or by hook, whose latents are stored as sparse
            rows; the names of their hooks are told in `lmmono.captures.latents`.
        halves: Store signed codes as two halves; see `lmmono.store_latents`.
        max_tokens: Tokens per split, whole rows; None takes all. Texts are half of split `explain`
            and half of `score`.
        into: A store opened with mode "w" or "a".
        seed: Seed of the random exemplars.
        progress: Called with tokens done.
        **settings: Further fields of the recipe's section `capture`, such as threshold, top_k,
            units, top_p, acts_per_token, dtype, vectors_dtype or
            skip={"special": True, "first": 1}; for texts also those of `lmmono.tokenize`, such as
            n_ctx, rows, bos, text_column or tokenizer.

    Raises:
        ModelError: a hook name matches nothing.
        RunError: a setting is unknown or out of range.
        DataError: texts cannot be read, or are none.
        DictionaryError: a dictionary does not fit, or its code is negative without `halves`.
        StoreError: the store is read-only, full, of another model, or refuses a dense hook.

    Warns:
        DroppedWarning: Rows of gated neurons leave out their negative half; `signed=True` keeps it.
    """
    of_text = {key: settings.pop(key) for key in _TEXT_SETTINGS if key in settings}
    arguments = {"hooks": _names(hooks), "vectors": _names(vectors), "max_tokens": max_tokens}
    try:
        chosen = Capture.model_validate({**arguments, **settings})
    except ValidationError as error:
        raise RunError(settings_faults("capture", error)) from None
    if left_out := _left_out(model, chosen):
        warnings.warn(left_out, astore.DroppedWarning, stacklevel=2)
    parts = _token_rows(model, texts, of_text, progress)
    latents = claim_all(into, dictionaries, halves, lambda hook: hook_width(model, hook))
    limited = [part.limit(max_tokens, seed=seed) for part in parts]
    into.append_all(_words(limited))
    stream(model, limited, chosen, into, seed, progress, latents)
    return into


_TEXT_SETTINGS = tuple(
    name
    for name, parameter in inspect.signature(tokenize).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "progress"
)


def _token_rows(
    model: nn.Module, texts: Any, settings: dict[str, Any], progress: Progress
) -> list[TokenRows]:
    """Return rows of tokens as they are given, or those of each split of texts.

    Raises:
        RunError: Rows of tokens are given with settings of texts, or there is none.
        DataError: As `tokenize`.
    """
    several = list(texts) if isinstance(texts, list | tuple) else [texts]
    is_rows = bool(several) and all(isinstance(part, TokenRows) for part in several)
    if settings and (is_rows or isinstance(texts, TokenCorpus)):
        raise RunError(f"capture: {', '.join(settings)}: settings of texts; tokens are given")
    if is_rows:
        return several
    if not isinstance(texts, TokenCorpus):
        texts = tokenize(model, texts, **settings, progress=progress)
    corpus: TokenCorpus = texts
    return [corpus.tokens(split) for split in SPLITS if corpus.facts[split]["n_rows"]]


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
        model = on_best_device(run.model)
        stream(model, parts, settings, store, recipe.seed, progress, here=here)
        here.wait()
        if not here.is_main:
            return {}
        info = store.info()
        facts: dict[str, Any] = {
            "n_tokens": info.n_tokens,
            "n_acts": info.n_acts,
            "n_bytes": info.n_bytes,
        }
        if left_out := _left_out(run.model, settings):
            facts["warnings"] = [left_out]
        return facts


def _left_out(model: nn.Module, settings: Capture) -> str | None:
    """Say what rows of gated neurons leave out; None where they leave out nothing."""
    halves = negative_halves(model, _row_hooks(model, settings))
    if not halves:
        return None
    return (
        f"gated neurons have both signs, and rows hold what is above {settings.threshold:g}; "
        f"capture.signed=true (in Python signed=True) stores the rest as {halves[0]} and so on"
    )


def _row_hooks(model: nn.Module, settings: Capture) -> list[str]:
    """Return the hooks that are stored as rows, negative halves after the others if asked for."""
    names = match_hooks(model, settings.hooks) if settings.hooks else []
    return [*names, *negative_halves(model, names)] if settings.signed else names


def _opened(run: Run, parts: Sequence[TokenRows], here: Processes) -> astore.Store:
    """Open a run's store to add to it; the main process makes it and says what it is of."""
    mode: Literal["a", "w"] = "a" if run.store_path.exists() else "w"
    store = astore.open(run.store_path, mode)
    if here.is_main:
        store.append_all({"runs": [_run_row(run)], **_words(parts)})
    return store


def _run_row(run: Run) -> dict[str, Any]:
    """Return what table `runs` says of a run."""
    recipe, config = run.recipe, run.model.config
    config = config.get_text_config() if recipe.is_pretrained else config
    return {
        "run": run.name,
        "arch": config.model_type if recipe.is_pretrained else recipe.model.arch,
        "model_digest": weights_digest(run.model),
        "corpus_digest": run.corpus.digest,
        "n_parameters": sum(p.numel() for p in run.model.parameters()),
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_vocab": config.vocab_size,
        "n_ctx": recipe.data.n_ctx,
        "seed": recipe.seed,
        "step": None if recipe.is_pretrained else recipe.train.last_step,
        "recipe": recipe.model_dump(mode="json"),
        "git_commit": run.manifest.stages[run.model_stage].commit,
        "versions": run.manifest.versions,
    }


def stream(
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
    names = _row_hooks(model, settings)
    cuts = _stored_cuts(store, names) or measure_cuts(model, parts, names, settings)
    parts = [_share(part, here) for part in parts]
    dense = match_hooks(model, settings.vectors) if settings.vectors else []
    n_ctx, total = parts[0].n_ctx, sum(part.ids.size for part in parts)
    batch_rows = max(1, settings.batch_tokens // n_ctx)
    sources = [*names, *dense, *(latent.source for latent in latents)]
    was_training, recorder = model.training, OutputRecorder()
    model.eval()
    n_done = 0
    with (
        store.writer(
            rows=[
                rows_settings(n, hook_width(model, n), settings, settings.units, cuts.get(n))
                for n in names
            ]
            + [rows_settings(latent.hook, latent.n_units, settings) for latent in latents],
            vectors=[
                astore.Vectors(hook=name, d=hook_width(model, name), dtype=settings.vectors_dtype)
                for name in dense
            ],
            n_ctx=n_ctx,
            seed=seed,
            model_digest=weights_digest(model),
            rank=here.rank,
            world_size=here.n,
            skip=left_out_tokens(settings.skip, parts[0]),
        ) as writer,
        torch.no_grad(),
    ):
        for part in parts:
            for first in range(0, len(part), batch_rows):
                batch = part[first : first + batch_rows]
                n_done += batch.ids.size
                # by sequence, not by count: a second capture adds the rows that are new
                is_new = writer.pending(batch.seq_ids, batch.ids, batch.doc_ids, part.split)
                if is_new.any():
                    # the batch runs whole, though a commit may have cut it: the last bits of a
                    # matrix product depend on how many rows it has
                    inputs = torch.from_numpy(batch.ids.astype(np.int64))
                    is_token = torch.from_numpy(batch.doc_ids >= 0)  # padding has no document
                    acts = run_until(model, inputs, sources, is_token, recorder)
                    flat = {
                        name: per_token(name, tensor, *inputs.shape)
                        for name, tensor in acts.items()
                    }
                    flat |= {latent.hook: latent.encode(flat[latent.source]) for latent in latents}
                    if not is_new.all():
                        keep = torch.from_numpy(is_new)
                        flat = {name: x[keep.to(x.device)] for name, x in flat.items()}
                    writer.add(
                        batch.seq_ids[is_new],
                        batch.ids[is_new],
                        batch.doc_ids[is_new],
                        part.split,
                        flat,
                    )
                    # before the next pass makes as much again
                    acts.clear()
                    flat.clear()
                progress("capture", n_done, total)
    model.train(was_training)


def measure_cuts(
    model: nn.Module, parts: Sequence[TokenRows], hooks: Sequence[str], settings: Capture
) -> dict[str, tuple[float, ...]]:
    """Return the cut of each unit of the hooks that would store more than `acts_per_token`.

    A unit's cut is its own quantile over `CUT_TOKENS` tokens spread over all rows, so that every
    unit stores the same share of its tokens and a unit of small scale is not lost. The same rows
    give the same cuts, in every process of a capture.
    """
    if settings.acts_per_token is None or not hooks:
        return {}
    batch_rows = max(1, settings.batch_tokens // parts[0].n_ctx)
    batches = _spread(parts, CUT_TOKENS)
    skip = left_out_tokens(settings.skip, parts[0])
    counted = [(rows.doc_ids >= 0) & ~skip.mask(rows.ids, rows.doc_ids) for rows in batches]
    n_tokens = sum(int(mask.sum()) for mask in counted)
    strongest: dict[str, torch.Tensor] = {}
    n_active = dict.fromkeys(hooks, 0)
    units = slice(None) if settings.units is None else list(settings.units)
    was_training, recorder = model.training, OutputRecorder()
    model.eval()
    with torch.no_grad():
        for rows, mask in zip(batches, counted, strict=True):
            for first in range(0, len(rows), batch_rows):
                batch = rows[first : first + batch_rows]
                is_token = torch.from_numpy(batch.doc_ids >= 0)
                counts = torch.from_numpy(mask[first : first + batch_rows]).reshape(-1)
                ids = torch.from_numpy(batch.ids.astype(np.int64))
                acts = run_until(model, ids, hooks, is_token, recorder)
                for hook, tensor in acts.items():
                    flat = per_token(hook, tensor, *ids.shape).reshape(counts.numel(), -1)
                    flat = flat[counts.to(flat.device)][:, units].float()
                    flat = torch.where(flat.isfinite(), flat, -torch.inf)
                    n_active[hook] += int((flat > settings.threshold).sum())
                    n_kept = max(1, round(settings.acts_per_token / flat.shape[1] * n_tokens))
                    strongest_so_far = strongest.get(hook, flat[:0])
                    both = torch.cat([strongest_so_far, flat])
                    strongest[hook] = both.topk(min(n_kept, len(both)), dim=0).values
                acts.clear()  # before the next pass makes as much again
    model.train(was_training)
    return {
        hook: tuple(values[-1].clamp(min=settings.threshold).tolist())
        for hook, values in strongest.items()
        if n_active[hook] > settings.acts_per_token * n_tokens
    }


def _spread(parts: Sequence[TokenRows], n_tokens: int) -> list[TokenRows]:
    """Return rows of all parts, evenly spaced, that hold about so many tokens together."""
    n_rows = sum(len(part) for part in parts)
    step = max(1, n_rows * parts[0].n_ctx // n_tokens)
    return [part[::step] for part in parts if len(part)]


def _stored_cuts(store: astore.Store, hooks: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the cuts that an earlier capture into the store used, which a further one keeps."""
    query = """SELECT hook, list(stored_from ORDER BY unit) FROM unit_stats
        WHERE stored_from IS NOT NULL GROUP BY hook"""
    return {hook: tuple(cuts) for hook, cuts in store.sql(query).fetchall() if hook in hooks}


def left_out_tokens(section: SkippedTokens, rows: TokenRows) -> astore.Skip:
    """Return which tokens of some rows do not count, special ones by the ids of their tokenizer.

    Raises:
        RunError: Special tokens are named, and the rows are of no corpus with a tokenizer.
    """
    token_ids = set(section.token_ids)
    if section.special:
        if rows.corpus is None:
            raise RunError("skip.special: these rows have no tokenizer; give skip.token_ids")
        token_ids |= set(rows.corpus.tokenizer.all_special_ids)
    return astore.Skip(tuple(sorted(token_ids)), section.first)


def _share(part: TokenRows, here: Processes) -> TokenRows:
    """Return the rows that this process captures: as many as the others', one after the other."""
    first, last = (len(part) * rank // here.n for rank in (here.rank, here.rank + 1))
    return part[first:last]


def _words(parts: Sequence[TokenRows]) -> dict[str, Any]:
    """Return the rows of the documents and the vocabulary of a corpus, where it is known."""
    corpus = parts[0].corpus
    if corpus is None:
        return {}
    tokens = [{"token_id": i, "token": token} for i, token in enumerate(corpus.vocabulary())]
    return {"documents": corpus.documents, "vocabulary": tokens}


def _names(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several names as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)
