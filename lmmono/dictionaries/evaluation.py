"""What a dictionary is worth on held-out text: one report of many measures, each with its interval.

How a code reconstructs vectors, and what a model loses when it runs on the reconstructions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from jaxtyping import Float, Int
from numpy import ndarray
from torch import nn

import activation_store as astore
from lmmono.data.tokens import TokenRows
from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.measures import DENSITY_EDGES, code_measures, on_host, recovered
from lmmono.dictionaries.passes import Passage, Passes, Subject
from lmmono.dictionaries.splicing import hook_of
from lmmono.errors import DictionaryError
from lmmono.registry.metrics import METRICS
from lmmono.stats.bootstrap import DocumentDraws
from lmmono.stats.estimate import Estimate
from lmmono.types import Progress, silent


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
    """Tokens of the rows; every claim here, that a latent is dead above all, is about these."""
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
        """Return rows of table `scores`, with `name` as the dictionary's.

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
        numbers = {each: estimate.row()["value"] for each, estimate in measures.items()}
        return {"name": name, **self.about, **numbers, "path": path}

    def save_to(self, store: astore.Store, name: str, *, path: str | None = None) -> None:
        """Write the rows into a store: first the scores, then the dictionary they are about.

        Each table is one commit, so a dictionary that has its measures has its scores. Written
        again, rows replace themselves; what the dictionary's row says beside stays.

        Raises:
            DictionaryError: The store has a dictionary of this name with other weights.
            StoreError: The store is open for reading, or the disk refuses.
        """
        row = self.dictionary_row(name, path=path)
        query = "SELECT * FROM dictionaries WHERE hook = $hook AND name = $name"
        found = store.sql(query, hook=row["hook"], name=name).to_arrow_table().to_pylist()
        before = found[0] if found else {}
        if before.get("digest") not in (None, row["digest"]):
            raise DictionaryError(
                f"{row['hook']}: the store has a dictionary {name!r} with other weights; "
                "give another name"
            )
        store.append("scores", self.rows(name))
        known = {key: value for key, value in row.items() if value is not None}
        store.append("dictionaries", [{**before, **known}])

    def _measures(self) -> list[tuple[str, str | None, Estimate, dict[str, Any]]]:
        """Return metric, preset, number and details of every row."""
        histogram = {
            "log10_edges": self.density_edges.round(6).tolist(),
            "n_latents": self.density_counts.tolist(),
            "n_dead": int((self.n_active == 0).sum()),
        }
        losses = {"clean": self.loss_clean, "spliced": self.loss_spliced}
        losses |= {"zero": self.loss_zero, "mean": self.loss_mean}
        values = {f"loss_{each}": losses[each].value for each in losses}
        return [
            ("l0", None, self.l0, {}),
            ("fvu", None, self.fvu, {}),
            ("cosine", None, self.cosine, {}),
            ("shrinkage", None, self.shrinkage, {}),
            ("dead_fraction", "nonzero", self.dead_fraction, {}),
            ("density", "nonzero", self.density, histogram),
            *(("loss", each, losses[each], {}) for each in losses),
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
    batch_tokens: int = 2048,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
    progress: Progress = silent,
) -> SAEReport | list[SAEReport]:
    """Measure a dictionary, or several from one clean pass, on rows of tokens.

    All tokens count, end-of-text too. A loss belongs to the document of the predicted token, which
    is every token but a row's first. Intervals draw documents again; dictionaries measured with one
    seed on the same rows have the same draws, so their differences can be read off pairwise.

    Args:
        dictionary: Any fitted dictionary, or a list of them.
        model: The model; it is run in eval mode, once for the clean pass, twice for each hook and
            once for each dictionary.
        rows: Held-out rows, such as `run.tokens("val")`.
        hook: Where the dictionaries go in; that of each one's fit where not given.
        max_tokens: Use the first whole rows with at most so many tokens.
        batch_tokens: Tokens per pass, whole rows; sets the memory, not the result.
        seed: Seed of the intervals.
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
    given = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    named = [(hook_of(model, each, hook), each) for each in given]
    passage = Passage(rows.limit(max_tokens), model, batch_tokens)
    passes = Passes.run(named, model, passage, progress)
    draws = DocumentDraws(passage.n_documents, passage.n_tokens, n_resamples, seed, level)
    reports = [_report(passes, subject, draws) for subject in passes.subjects]
    return reports[0] if isinstance(dictionary, Dictionary) else reports


def _report(passes: Passes, subject: Subject, draws: DocumentDraws) -> SAEReport:
    """Turn sums over documents into numbers with intervals."""
    site, measures = subject.site, code_measures(draws, subject.site.vectors, subject.codes)
    predicted = draws.totals(passes.passage.predicted)
    n = int(predicted[0])
    sums = {
        "clean": passes.loss_clean,
        "spliced": subject.loss,
        "zero": site.loss_zero,
        "mean": site.loss_mean,
    }
    losses = {each: draws.totals(on_host(sums[each])) / predicted for each in sums}
    clean, spliced = losses["clean"], losses["spliced"]
    kl = draws.totals(on_host(subject.kl)) / draws.totals(on_host(site.vectors.tokens))
    return SAEReport(
        hook=site.hook,
        split=passes.passage.rows.split,
        n_tokens=draws.n_tokens,
        n_documents=draws.n_documents,
        seed=draws.seed,
        about=_about(subject.dictionary, site.hook),
        l0=measures.l0,
        fvu=measures.fvu,
        cosine=measures.cosine,
        shrinkage=measures.shrinkage,
        dead_fraction=measures.dead_fraction,
        density=measures.density,
        n_active=measures.n_active,
        density_edges=DENSITY_EDGES,
        density_counts=measures.density_counts,
        **{f"loss_{each}": draws.estimate(losses[each], n=n) for each in losses},
        ce_loss_recovered_zero=recovered(draws, clean, spliced, losses["zero"], n),
        ce_loss_recovered_mean=recovered(draws, clean, spliced, losses["mean"], n),
        kl=draws.estimate(kl),
    )


def _about(dictionary: Dictionary, hook: str) -> dict[str, Any]:
    """Return what table `dictionaries` says of a dictionary whatever it is measured on."""
    return {
        "hook": dictionary.hook or hook,
        "arch": dictionary.arch,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "seed": dictionary.seed,
        "n_tokens": dictionary.facts.get("n_tokens"),
        "settings": dictionary.settings.model_dump(mode="json"),
        "digest": dictionary.digest,
        "seconds": dictionary.facts.get("seconds"),
    }
