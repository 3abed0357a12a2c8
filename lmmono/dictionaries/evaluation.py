"""What a dictionary is worth on held-out text: one report of many measures, each with its interval.

How a code reconstructs vectors, and what a model loses when it runs on the reconstructions:

    first pass    clean, zeros at each hook, each dictionary's reconstruction at its hook
    second pass   the mean at each hook, which is known only now

Sums are float64 and kept per document, so that a measure can be made again of any draw of them. A
ratio here is a ratio of sums, never a mean of ratios. The formulas stand in `METRICS`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

import activation_store as astore
from activation_store.write.recording import input_device
from lmmono.data.tokens import TokenRows
from lmmono.dictionaries.coding import on_host
from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.splicing import coded, hook_of, replaced
from lmmono.dictionaries.vector_source import LeftOut, counted_tokens
from lmmono.errors import DictionaryError
from lmmono.models.hooks import bare, hook_width, recording, token_inputs
from lmmono.registry.metrics import METRICS
from lmmono.stats.bootstrap import DocumentDraws, ratio
from lmmono.stats.estimate import Estimate
from lmmono.stats.intervals import jackknife_interval
from lmmono.types import Progress, silent

FLAT = 1e-12
"""Vectors whose variance is at most this share of their energy do not vary: it is rounding."""

DENSITY_EDGES = np.linspace(-7.0, 0.0, 29)
"""Edges of the density histogram in log10; a latent rarer than the first is in the first bin."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SAEReport:
    """Measures of one dictionary at one hook on rows of one split; formulas in `METRICS`.

    Every number is an `Estimate`: `float(report.fvu)`, `report.fvu.low`, `report.fvu.high`.
    """

    hook: str
    """Where the dictionary was put in."""
    split: str
    """Split of the rows."""
    n_tokens: int
    """Tokens that count; every claim here, that a latent is dead above all, is about these."""
    n_documents: int
    """Documents that they come from."""
    seed: int
    """Seed of the intervals."""
    about: Mapping[str, Any]
    """The dictionary: arch, d_in, d_sae, seed, settings, digest, n_tokens and seconds of its fit,
    and the hook of its fit."""
    l0: Estimate
    """Non-zero latents per token; a negative act counts too."""
    fvu: Estimate
    """sum|x - xhat|^2 / sum|x - mean(x)|^2, mean and sums over the whole set."""
    cosine: Estimate
    """Mean over tokens of cos(x, xhat), 0 where xhat is zero; tokens where x is zero have none."""
    shrinkage: Estimate
    """sum|xhat|^2 / sum<x, xhat>: 1 is none, 0.9 says reconstructions are 10 % short. Rajamanoharan
    et al. 2024 (arXiv 2404.16014), equation 10; sae-lens' `relative_reconstruction_bias`."""
    dead_fraction: Estimate
    """Share of latents that were zero on all these tokens."""
    density: Estimate
    """Share of (token, latent) pairs that are not zero: l0 / d_sae."""
    n_active: Int[ndarray, " d_sae"]
    """Tokens on which each latent is not zero."""
    density_edges: Float[ndarray, " edges"]
    """Edges of the histogram, in log10 of density."""
    density_counts: Int[ndarray, " bins"]
    """Latents per bin; the first bin holds all rarer ones too, dead ones are in none."""
    loss_clean: Estimate
    """Loss of the model as it is, nats per token."""
    loss_spliced: Estimate
    """Loss with reconstructions in place."""
    loss_zero: Estimate
    """Loss with zeros in place."""
    loss_mean: Estimate
    """Loss with the mean vector of these rows in place."""
    ce_loss_recovered_zero: Estimate
    """(loss_zero - loss_spliced) / (loss_zero - loss_clean). Where a block has no skip (CRATE's
    ISTA), an ablated output leaves nothing of the stream; zeros and the mean then cost unlike
    amounts, and either may cost more. Compare models by one of them, or by the losses."""
    ce_loss_recovered_mean: Estimate
    """(loss_mean - loss_spliced) / (loss_mean - loss_clean)."""
    kl: Estimate
    """Mean over positions of KL(clean || spliced), nats."""

    def __repr__(self) -> str:
        about = self.about
        lines = [
            f"SAEReport({about['arch']} {about['d_in']} -> {about['d_sae']} at {self.hook}, "
            f"{self.n_tokens:,} tokens of {self.n_documents:,} {self.split} documents)"
        ]
        for metric, preset, estimate, _ in self._measures():
            name = metric if preset is None else f"{metric} ({preset})"
            lines.append(f"  {name:<28}{estimate!r}")
        return "\n".join(lines)

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return rows of table `all_scores`, with `name` as the dictionary's.

        `preset` says what a metric was taken of: the ablation of `ce_loss_recovered`, what was in
        place for `loss`; `nonzero` counts acts other than zero as active.
        """
        return [
            {
                "metric": metric,
                "metric_version": METRICS[metric].version,
                "preset": preset,
                "hook": self.hook,
                "dictionary": name,
                "seed": self.seed,
                "split": self.split,
                "details": details or None,
                **estimate.row(),
            }
            for metric, preset, estimate, details in self._measures()
        ]

    def dictionary_row(self, name: str, *, path: str | None = None) -> dict[str, Any]:
        """Return the row of table `dictionaries`; `path` is where it was saved, from the store."""
        measures = {"l0": self.l0, "fvu": self.fvu, "dead_fraction": self.dead_fraction}
        numbers = {measure: estimate.row()["value"] for measure, estimate in measures.items()}
        return {"name": name, **self.about, **numbers, "path": path}

    def save_to(self, store: astore.Store, name: str, *, path: str | None = None) -> None:
        """Write the scores and the dictionary they are about into a store, in one commit.

        Written again, rows replace themselves; what the dictionary's row says beside stays.

        Raises:
            DictionaryError: The store has a dictionary of this name with other weights.
            StoreError: The store is open for reading, or the disk refuses.
        """
        row = self.dictionary_row(name, path=path)
        query = "SELECT * FROM dictionaries WHERE hook = $hook AND name = $name"
        stored = store.sql(query, hook=row["hook"], name=name).to_arrow_table().to_pylist()
        before = stored[0] if stored else {}
        if before.get("digest") not in (None, row["digest"]):
            raise DictionaryError(
                f"{row['hook']}: the store has a dictionary {name!r} with other weights; "
                "give another name"
            )
        filled = {key: value for key, value in row.items() if value is not None}
        store.append_all({"all_scores": self.rows(name), "dictionaries": [{**before, **filled}]})

    def _measures(self) -> list[tuple[str, str | None, Estimate, dict[str, Any]]]:
        """Return metric, preset, number and details of every row."""
        histogram = {
            "log10_edges": self.density_edges.round(6).tolist(),
            "n_latents": self.density_counts.tolist(),
            "n_dead": int((self.n_active == 0).sum()),
        }
        losses = {"clean": self.loss_clean, "spliced": self.loss_spliced}
        losses |= {"zero": self.loss_zero, "mean": self.loss_mean}
        values = {f"loss_{kind}": losses[kind].value for kind in losses}
        return [
            ("l0", None, self.l0, {}),
            ("fvu", None, self.fvu, {}),
            ("cosine", None, self.cosine, {}),
            ("shrinkage", None, self.shrinkage, {}),
            ("dead_fraction", "nonzero", self.dead_fraction, {}),
            ("density", "nonzero", self.density, histogram),
            *(("loss", kind, losses[kind], {}) for kind in losses),
            ("ce_loss_recovered", "zero", self.ce_loss_recovered_zero, values),
            ("ce_loss_recovered", "mean", self.ce_loss_recovered_mean, values),
            ("kl", None, self.kl, {}),
        ]


@overload
def evaluate(
    dictionary: Dictionary,
    model: nn.Module,
    rows: TokenRows,
    *,
    hook: str | None = None,
    max_tokens: int | None = None,
    skip: LeftOut | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
    progress: Progress = silent,
) -> SAEReport: ...
@overload
def evaluate(
    dictionary: Sequence[Dictionary],
    model: nn.Module,
    rows: TokenRows,
    *,
    hook: str | None = None,
    max_tokens: int | None = None,
    skip: LeftOut | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
    progress: Progress = silent,
) -> list[SAEReport]: ...
def evaluate(
    dictionary: Dictionary | Sequence[Dictionary],
    model: nn.Module,
    rows: TokenRows,
    *,
    hook: str | None = None,
    max_tokens: int | None = None,
    skip: LeftOut | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
    progress: Progress = silent,
) -> SAEReport | list[SAEReport]:
    """Measure a dictionary, or several from one clean pass, on rows of tokens.

    All tokens count, end-of-text too, but for padding (documents below 0) and what `skip` names. A
    loss belongs to the document of the predicted token, and counts where the token that it is
    predicted at does. What does not count keeps its activation in every pass, as in sae-lens'
    evaluation with `exclude_special_tokens`. Intervals draw documents again; dictionaries measured
    with one seed on the same rows have the same draws, so their differences can be read off
    pairwise.

    Args:
        dictionary: Any fitted dictionary, or a list of them.
        model: The model; it is run in eval mode, once for the clean pass, twice for each hook and
            once for each dictionary.
        rows: Held-out rows, such as `run.tokens("val")`.
        hook: Where the dictionaries go in; that of each one's fit where not given.
        max_tokens: Use whole rows with at most so many tokens, drawn by the seed.
        skip: Which tokens do not count: `astore.Skip(token_ids, first)`, a mask of the rows
            [n_rows, n_ctx], or a function that gives one; None counts all.
        batch_tokens: Tokens per pass, whole rows; sets the memory, not the result.
        seed: Seed of the intervals and of the rows.
        n_resamples: Redraws of the documents.
        level: Coverage that the intervals aim at.
        progress: Called with tokens done, of two passes.

    Returns:
        A report for a dictionary, a list of them for a list.

    Raises:
        DictionaryError: One is not fitted, has no hook or another width, or the hook's activations
            are not finite.
        ModelError: A hook does not exist.
        DataError: `max_tokens` holds no row.
    """
    several = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    named = [(hook_of(model, single, hook), single) for single in several]
    text = DocumentRows(rows.limit(max_tokens, seed=seed), model, batch_tokens, skip)
    sites = {name: HookSums(model, name, text) for name, _ in named}
    codes = [CodeSums(single, sites[name], text) for name, single in named]
    loss_clean = _run_passes(model, text, list(sites.values()), codes, progress)
    draws = DocumentDraws(text.n_documents, text.n_tokens, n_resamples, seed, level)
    reports = [_report(text, code, loss_clean, draws) for code in codes]
    return reports[0] if isinstance(dictionary, Dictionary) else reports


class DocumentRows:
    """Rows of tokens with their documents numbered from 0, in batches where the model is.

    Attributes:
        rows: The rows.
        documents: Document of every token; 0 for padding, which `counted` leaves out.
        is_token: False for padding, whose document is below 0.
        counted: Tokens that measures are taken of: neither padding nor skipped.
        n_documents: Documents of the tokens.
        n_tokens: Tokens that count.
    """

    def __init__(
        self, rows: TokenRows, model: nn.Module, batch_tokens: int, skip: LeftOut | None = None
    ) -> None:
        self.rows = rows
        self.is_token: Bool[ndarray, "n_rows n_ctx"] = np.asarray(rows.doc_ids) >= 0
        names = np.unique(rows.doc_ids[self.is_token])
        numbers = np.searchsorted(names, rows.doc_ids)
        self.documents: Int[ndarray, "n_rows n_ctx"] = np.where(self.is_token, numbers, 0)
        self.counted = counted_tokens(rows, skip)
        self.n_documents, self.n_tokens = len(names), int(self.counted.sum())
        if self.n_tokens == 0:
            raise DictionaryError(
                "rows: no token counts: all are padding or skipped; give other rows or another skip"
            )
        self.device = input_device(model)
        self._batch_rows = max(1, batch_tokens // rows.n_ctx)

    @property
    def predicted(self) -> Float[ndarray, " documents"]:
        """Losses that count per document: those of tokens that are predicted at one that counts."""
        is_predicted = self.counted[:, :-1] & self.is_token[:, 1:]
        numbers = self.documents[:, 1:][is_predicted]
        return np.bincount(numbers, minlength=self.n_documents).astype(np.float64)

    def batches(self) -> Iterator["TokenBatch"]:
        """Yield the rows in batches."""
        for first in range(0, len(self.rows), self._batch_rows):
            part = slice(first, first + self._batch_rows)
            arrays = (
                self.rows.ids[part].astype(np.int64),
                self.documents[part].astype(np.int64),
                self.is_token[part],
                self.counted[part],
            )
            ids, *others = (torch.from_numpy(array).to(self.device) for array in arrays)
            yield TokenBatch(ids, *others, n_tokens=int(self.counted[part].sum()))

    def zeros(self) -> Float[Tensor, " documents"]:
        """Return zeros, one per document."""
        return torch.zeros(self.n_documents, dtype=torch.float64, device=self.device)


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Some rows where the model is."""

    ids: Int[Tensor, "batch pos"]
    documents: Int[Tensor, "batch pos"]
    is_token: Bool[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    n_tokens: int
    """Tokens that count."""

    @property
    def where(self) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens count; None where all do, for nothing has to be chosen then."""
        return None if self.n_tokens == self.ids.numel() else self.counted

    def run(self, model: nn.Module) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the model's logits."""
        return model(**token_inputs(model, self.ids, self.is_token), use_cache=False).logits.float()

    def add_losses(
        self, sums: Float[Tensor, " documents"], logits: Float[Tensor, "batch pos d_vocab"]
    ) -> None:
        """Add -ln p of every predicted token to its own document."""
        losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten(), reduction="none"
        )
        is_predicted = (self.counted[:, :-1] & self.is_token[:, 1:]).flatten()
        # zeros instead of a selection, so that the sums have one order with or without padding
        losses = torch.where(is_predicted, losses.double(), 0.0)
        sums.index_add_(0, self.documents[:, 1:].flatten(), losses)


class HookSums:
    """Sums over documents of a hook's vectors, and of what is lost without it.

    Attributes:
        hook: The hook.
        tokens: Tokens per document.
        energy: Squared norms.
        vectors: The vectors themselves.
        loss_zero: Losses with zeros in place.
        loss_mean: Losses with the mean vector in place.
    """

    def __init__(self, model: nn.Module, hook: str, text: DocumentRows) -> None:
        d_in = hook_width(model, hook)
        self.hook, self.tokens, self.energy = hook, text.zeros(), text.zeros()
        self.loss_zero, self.loss_mean = text.zeros(), text.zeros()
        self.vectors = torch.zeros(text.n_documents, d_in, dtype=torch.float64, device=text.device)

    def add(self, batch: TokenBatch, acts: Float[Tensor, "batch pos *width"]) -> None:
        """Add the vectors of a batch.

        Raises:
            DictionaryError: Some are NaN or infinite.
        """
        wide = acts.flatten(2)[batch.counted].double()
        if not torch.isfinite(wide).all():
            raise DictionaryError(
                f"{self.hook}: the model's activations are NaN or infinite on some of these "
                "tokens; run it in float32, or evaluate on other rows"
            )
        documents = batch.documents[batch.counted]
        self.tokens.index_add_(0, documents, torch.ones_like(wide[:, 0]))
        self.energy.index_add_(0, documents, wide.square().sum(1))
        self.vectors.index_add_(0, documents, wide)

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean vector of all tokens so far."""
        return self.vectors.sum(0) / self.tokens.sum()


class CodeSums:
    """Sums over documents of what a dictionary makes of a hook's vectors.

    Attributes:
        dictionary: The dictionary.
        at: The hook that it is measured at.
        sums: Per document, the columns of `columns`.
        n_active: Tokens on which each latent is not zero.
        fired: Whether each latent fired in each document.
        loss: Losses with its reconstructions in place.
        kl: KL(clean || spliced).
    """

    columns = ("active", "error", "along", "energy_hat", "cosine", "directed")

    def __init__(self, dictionary: Dictionary, at: HookSums, text: DocumentRows) -> None:
        self.dictionary, self.at = dictionary, at
        self.loss, self.kl = text.zeros(), text.zeros()
        device, n, d_sae = dictionary.tensors()["W_dec"].device, text.n_documents, dictionary.d_sae
        self.sums = torch.zeros(n, len(self.columns), dtype=torch.float64, device=device)
        self.n_active = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.fired = torch.zeros(n, d_sae, dtype=torch.bool, device=device)

    def add(
        self,
        documents: Int[Tensor, " n"],
        x: Float[Tensor, "n d_in"],
        acts: Float[Tensor, "n d_sae"],
        reconstructed: Float[Tensor, "n d_in"],
    ) -> None:
        """Add some tokens: their vectors, codes and reconstructions."""
        wide, hat = x.double(), reconstructed.double()
        along, norms = (wide * hat).sum(1), wide.norm(dim=1)
        norms_hat = hat.norm(dim=1)
        cosine = along / (norms * norms_hat).clamp_min(torch.finfo(torch.float64).tiny)
        active = acts != 0
        columns = (
            active.sum(1).double(),
            (wide - hat).square().sum(1),
            along,
            norms_hat.square(),
            cosine,  # 0 where the reconstruction is zero: a code that gives up gets no credit
            (norms > 0).double(),
        )
        self.sums.index_add_(0, documents, torch.stack(columns, 1))
        self.n_active += active.sum(0)
        token, latent = active.nonzero(as_tuple=True)
        self.fired[documents[token], latent] = True


def _run_passes(
    model: nn.Module,
    text: DocumentRows,
    sites: Sequence[HookSums],
    codes: Sequence[CodeSums],
    progress: Progress,
) -> Float[Tensor, " documents"]:
    """Add up both passes over the rows in eval mode; return the clean losses.

    Raises:
        DictionaryError: A hook has NaN or infinite activations, or another width.
    """
    loss_clean, done = text.zeros(), 0
    network = bare(model)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            for batch in text.batches():
                with recording(model, [site.hook for site in sites]) as acts:
                    clean = batch.run(model).log_softmax(-1)
                batch.add_losses(loss_clean, clean)
                for site in sites:
                    site.add(batch, acts[site.hook])
                    with replaced(model, {site.hook: None}, batch.where):
                        batch.add_losses(site.loss_zero, batch.run(model))
                for code in codes:
                    vectors, latents, reconstructed = coded(code.dictionary, acts[code.at.hook])
                    where = batch.counted.flatten().to(vectors.device)
                    documents = batch.documents.flatten().to(vectors.device)[where]
                    code.add(documents, vectors[where], latents[where], reconstructed[where])
                    with replaced(model, {code.at.hook: reconstructed}, batch.where):
                        logits = batch.run(model)
                    batch.add_losses(code.loss, logits)
                    kl = divergences(clean, logits)
                    code.kl.index_add_(0, batch.documents[batch.counted], kl[batch.counted])
                done += batch.n_tokens
                progress("evaluate", done, 2 * text.n_tokens)
            for batch in text.batches():
                for site in sites:
                    with replaced(model, {site.hook: site.mean.float()}, batch.where):
                        batch.add_losses(site.loss_mean, batch.run(model))
                done += batch.n_tokens
                progress("evaluate", done, 2 * text.n_tokens)
    finally:
        network.train(was_training)
    return loss_clean


def divergences(
    clean: Float[Tensor, "batch pos d_vocab"], logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch pos"]:
    """Return KL(clean || spliced) in nats at every position.

    Args:
        clean: Log-probabilities of the clean pass.
        logits: Logits of the other.
    """
    other = logits.log_softmax(-1)
    return functional.kl_div(other, clean, reduction="none", log_target=True).sum(-1).double()


def _report(
    text: DocumentRows,
    codes: CodeSums,
    loss_clean: Float[Tensor, " documents"],
    draws: DocumentDraws,
) -> SAEReport:
    """Turn sums over documents into numbers with intervals."""
    site, dictionary = codes.at, codes.dictionary
    sums = dict(zip(codes.columns, draws.totals(on_host(codes.sums)).T, strict=True))
    tokens = draws.totals(on_host(site.tokens))
    energy = draws.totals(on_host(site.energy))
    centre = np.square(draws.totals(on_host(site.vectors))).sum(1) / tokens
    spread = np.where(energy - centre > FLAT * energy, energy - centre, 0.0)
    n_active = on_host(codes.n_active)
    n_latents, n_directed = len(n_active), int(sums["directed"][0])
    predicted = draws.totals(text.predicted)
    n_losses = int(predicted[0])
    summed = {
        "clean": loss_clean,
        "spliced": codes.loss,
        "zero": site.loss_zero,
        "mean": site.loss_mean,
    }
    losses = {name: draws.totals(on_host(sums)) / predicted for name, sums in summed.items()}
    clean, spliced = losses["clean"], losses["spliced"]
    return SAEReport(
        hook=site.hook,
        split=text.rows.split,
        n_tokens=draws.n_tokens,
        n_documents=draws.n_documents,
        seed=draws.seed,
        about={
            "hook": dictionary.hook or site.hook,
            "arch": dictionary.arch,
            "d_in": dictionary.d_in,
            "d_sae": dictionary.d_sae,
            "seed": dictionary.seed,
            "n_tokens": dictionary.facts.get("n_tokens"),
            "settings": dictionary.settings.model_dump(mode="json"),
            "digest": dictionary.digest,
            "seconds": dictionary.facts.get("seconds"),
        },
        l0=draws.estimate(sums["active"] / tokens),
        fvu=draws.estimate(
            ratio(sums["error"], spread), failure=None if spread[0] > 0 else "vectors do not vary"
        ),
        cosine=draws.estimate(
            ratio(sums["cosine"], sums["directed"]),
            n=n_directed,
            nan_fraction=1 - n_directed / draws.n_tokens,
            failure=None if n_directed else "all vectors are zero",
        ),
        shrinkage=draws.estimate(
            ratio(sums["energy_hat"], sums["along"]),
            failure=None if sums["along"][0] > 0 else "reconstructions do not point along vectors",
        ),
        dead_fraction=dead_fraction(draws, on_host(codes.fired)),
        density=draws.estimate(sums["active"] / tokens / n_latents, n=n_latents),
        n_active=n_active,
        density_edges=DENSITY_EDGES,
        density_counts=density_counts(n_active, draws.n_tokens),
        **{f"loss_{name}": draws.estimate(loss, n=n_losses) for name, loss in losses.items()},
        ce_loss_recovered_zero=recovered(draws, clean, spliced, losses["zero"], n_losses),
        ce_loss_recovered_mean=recovered(draws, clean, spliced, losses["mean"], n_losses),
        kl=draws.estimate(draws.totals(on_host(codes.kl)) / tokens),
    )


def dead_fraction(draws: DocumentDraws, fired: Shaped[ndarray, "documents d_sae"]) -> Estimate:
    """Return the share of latents that fired in no document, with its jackknife interval.

    A redraw holds 63 % of the documents, so every redraw has more dead latents than the documents
    have, and percentiles of redraws would miss the number itself. Leaving one document out adds
    the latents that fired in it alone.
    """
    in_documents = fired.sum(axis=0)
    dead = float((in_documents == 0).mean())
    low = high = float("nan")
    if draws.n_documents > 1:
        only_there = fired[:, in_documents == 1].sum(axis=1)
        without = dead + only_there / fired.shape[1]
        low, high = jackknife_interval(dead, without, draws.level)
        low, high = max(float(low), 0.0), min(float(high), 1.0)
    sizes = (fired.shape[1], draws.n_tokens, draws.n_documents)
    return Estimate(dead, low, high, draws.level, "jackknife over documents", *sizes)


def density_counts(n_active: Int[ndarray, " d_sae"], n_tokens: int) -> Int[ndarray, " bins"]:
    """Return how many latents have log10(density) in each bin of `DENSITY_EDGES`.

    Latents that never fired are in none.

    >>> density_counts(np.array([0, 1, 10, 10]), 10)[[24, 27]]
    array([1, 2])
    """
    density = np.log10(n_active[n_active > 0] / n_tokens)
    return np.histogram(np.maximum(density, DENSITY_EDGES[0]), DENSITY_EDGES)[0]


def recovered(
    draws: DocumentDraws,
    clean: Float[ndarray, " one_plus_resamples"],
    spliced: Float[ndarray, " one_plus_resamples"],
    ablated: Float[ndarray, " one_plus_resamples"],
    n: int,
) -> Estimate:
    """Return (ablated - spliced) / (ablated - clean) of losses, made of equal draws.

    Not defined unless the ablation hurts on every redraw: what is not lost cannot be recovered.
    """
    lost = ablated - clean
    clear = bool((lost > 0).all())
    values = ratio(ablated - spliced, lost)
    return draws.estimate(values, n=n, failure=None if clear else "ablation does no clear harm")
