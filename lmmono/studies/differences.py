"""Which of two models scores higher: the difference of their means, raw and at equal density.

Units of two models have no partners, but documents do: where both stores hold the same tokens, the
same documents are drawn for both, so that what a document does to both scores cancels. Two networks
differ by chance of training alone; only several training seeds of each tell architectures apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import t as student_t

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.explanations.protocols import variant
from lmmono.explanations.stored_explanations import (
    explained_units,
    match_stored_hooks,
    read_densities,
)
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorers import Scorer, find_scorer
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.simulation import scored_records, simulated
from lmmono.scores.summaries import ScoreKey
from lmmono.stats.agreement import AGREEMENTS
from lmmono.stats.estimate import LEVEL

NORMAL = 1.959964
"""97.5 % point of the normal distribution."""

N_DRAWS = 500
"""Draws of units and documents: an interval's ends move by 3 % of its width between seeds."""

N_BINS = 10
"""Bins of density, equally full of the units of both models."""

KINDS_OF: dict[str, tuple[str, ...]] = {
    "simulation_tar": ("top", "random"),
    "simulation_random": ("random",),
}
"""Scorers whose scores can be made anew from sums per record, and the records they use."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A difference of means with its interval."""

    a: float
    """Mean of the first model: over its hooks, of means over units."""
    b: float
    """Mean of the second model."""
    difference: float
    """a - b."""
    ci_low: float
    """Lower end of the 95 % interval; NaN where there is none."""
    ci_high: float
    """Upper end."""

    def __str__(self) -> str:
        interval = f"[{self.ci_low:+.4f}, {self.ci_high:+.4f}]"
        return f"{self.a:.4f} - {self.b:.4f} = {self.difference:+.4f} {interval}"


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ under one scorer."""

    scorer: str
    """Name of the scorer."""
    n_seeds: int
    """Pairs of training runs compared."""
    raw: Estimate
    """All units; a score that is not defined counts as 0."""
    defined: Estimate
    """Only units whose score is defined."""
    density_matched: Estimate
    """Units weighted so that both models have the same densities."""
    overlap: float
    """Share of the densities that both models have, 0 to 1."""
    undefined: tuple[float, float]
    """Share of units of each model whose score is not defined."""
    paired_documents: bool
    """The same documents were drawn for both."""
    ci_method: str
    """How the intervals were made."""
    pairs: tuple["Difference", ...] = ()
    """Each pair of training runs by itself, where there are several."""

    def __repr__(self) -> str:
        seeds = (
            "1 training seed a side: two networks differ, which says nothing of their kinds"
            if self.n_seeds == 1
            else f"{self.n_seeds} training seeds a side"
        )
        a, b = self.undefined
        return (
            f"Difference({self.scorer}; {seeds})\n"
            f"  raw              {self.raw}\n"
            f"  defined only     {self.defined}  ({a:.0%} and {b:.0%} are not)\n"
            f"  density-matched  {self.density_matched}  (overlap {self.overlap:.0%})\n"
            f"  {self.ci_method}"
        )


def compare(
    store_a: astore.Store | Sequence[astore.Store],
    store_b: astore.Store | Sequence[astore.Store],
    *,
    scorer: str = "simulation_tar",
    hooks: str = "blocks.*.mlp.hook_post",
    explainer: str = "token_lookup",
    preset: str | None = None,
    judge: str | None = None,
    seed: int | Sequence[int] = 0,
) -> Difference:
    """Return the difference between two models' mean scores, with its interval.

    Args:
        store_a: Store of the first model, or of several training seeds of it.
        store_b: Store of the second, in the same order of seeds.
        scorer: A scorer of units that both stores have rows of; the simulation scorers need the
            explanations only, and their documents are paired.
        hooks: Hooks that make up a model's mean, name or glob.
        explainer: Explainer as stored.
        preset: Preset as stored in the rows.
        judge: Judge as stored in the rows.
        seed: Seed of the rows, and of the draws; one for all, or one for each pair.

    Raises:
        ExplainError: Different numbers of stores or seeds, or a store without scores or
            explanations.
    """
    a = [store_a] if isinstance(store_a, astore.Store) else list(store_a)
    b = [store_b] if isinstance(store_b, astore.Store) else list(store_b)
    if len(a) != len(b) or not a:
        raise ExplainError(f"want as many stores of both models, got {len(a)} and {len(b)}")
    seeds = [seed] * len(a) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(a):
        raise ExplainError(f"want one seed or one for each of {len(a)} pairs, got {len(seeds)}")
    known = find_scorer(scorer)
    if known.per != "unit":
        raise ExplainError(f"{scorer} scores hooks, not units; there is nothing to draw again")
    needs_text = bool({"explanation", "program"} & set(known.needs))
    protocol = known.presets.get(preset or "", {}).get("protocol")
    named = variant(explainer, protocol, {}) if protocol and ":" not in explainer else explainer
    pairs: list[Difference] = []
    for first, second, one in zip(a, b, seeds, strict=True):
        stored = (named if needs_text else None, judge, one if known.seeded else None)
        key = ScoreKey(known.metrics, preset, *stored)
        pairs.append(_compare(known, first, second, hooks, key, one))
    return pairs[0] if len(pairs) == 1 else _over_seeds(pairs)


def _compare(
    scorer: Scorer, a: astore.Store, b: astore.Store, hooks: str, key: ScoreKey, seed: int
) -> Difference:
    paired = scorer.name in KINDS_OF and key.judge is None and _fingerprint(a) == _fingerprint(b)
    read = _read_sums if paired else _read_rows
    pair = _Pair(read(a, scorer, hooks, key), read(b, scorer, hooks, key))
    found = pair.means(None)
    rng = np.random.default_rng(seed)
    draws = np.array([pair.means(rng) for _ in range(N_DRAWS)])
    errors = (draws[:, :, 0] - draws[:, :, 1]).std(axis=0, ddof=1)
    estimates = [
        Estimate(x, y, x - y, x - y - NORMAL * error, x - y + NORMAL * error)
        for (x, y), error in zip(found.tolist(), errors.tolist(), strict=True)
    ]
    drawn = "documents, the same for both, and units" if paired else "units"
    return Difference(
        scorer.name,
        1,
        *estimates,
        overlap=pair.overlap,
        undefined=(pair.undefined_share(0), pair.undefined_share(1)),
        paired_documents=paired,
        ci_method=f"normal, standard error from {N_DRAWS} draws of {drawn}",
    )


def _over_seeds(pairs: list[Difference]) -> Difference:
    """Return the mean over pairs of training runs; Student's t over pairs."""
    n = len(pairs)
    factor = float(student_t.ppf((1 + LEVEL) / 2, n - 1)) / np.sqrt(n)
    estimates: list[Estimate] = []
    for name in ("raw", "defined", "density_matched"):
        each = [getattr(pair, name) for pair in pairs]
        differences = np.array([one.difference for one in each])
        mean, half = float(differences.mean()), float(factor * differences.std(ddof=1))
        sides = (float(np.mean([one.a for one in each])), float(np.mean([one.b for one in each])))
        estimates.append(Estimate(*sides, mean, mean - half, mean + half))
    return Difference(
        pairs[0].scorer,
        n,
        *estimates,
        overlap=float(np.mean([pair.overlap for pair in pairs])),
        undefined=(
            float(np.mean([pair.undefined[0] for pair in pairs])),
            float(np.mean([pair.undefined[1] for pair in pairs])),
        ),
        paired_documents=all(pair.paired_documents for pair in pairs),
        ci_method=f"Student t over {n} pairs of training runs",
        pairs=tuple(pairs),
    )


def _fingerprint(store: astore.Store) -> tuple[int, int]:
    """Return what tells the scored tokens of stores apart."""
    query = """SELECT count(*), bit_xor(hash(seq_id, pos, doc_id, token_id)) FROM token_ids
        WHERE split = 'score'"""
    (found,) = store.sql(query).fetchall()
    return found


@dataclass(frozen=True, slots=True)
class _HookUnits:
    """The scored units of one hook."""

    values: Float[ndarray, " units"]
    """0 where not defined."""
    defined: Bool[ndarray, " units"]
    densities: Float[ndarray, " units"]
    sums: Float[ndarray, "units records sums"] | None = None
    doc_ids: Int[ndarray, "units records"] | None = None

    def drawn(self, counts: Int[ndarray, " documents"] | None) -> tuple[ndarray, ndarray]:
        """Return values and which are defined, with each document counted so many times."""
        if counts is None or self.sums is None or self.doc_ids is None:
            return self.values, self.defined
        weights = counts[self.doc_ids].astype(np.float64)
        values = AGREEMENTS["pearson"].of(np.einsum("ur,urs->us", weights, self.sums))
        defined = self.defined & ~np.isnan(values)
        return np.where(defined, values, 0.0), defined


class _Pair:
    """The scored units of two models, and their means under draws of units and documents."""

    def __init__(self, a: list[_HookUnits], b: list[_HookUnits]) -> None:
        self._models = (a, b)
        docs = [hook.doc_ids for hook in (*a, *b) if hook.doc_ids is not None]
        self._n_documents = 1 + max((int(each.max()) for each in docs), default=-1)
        self._known = np.unique(np.concatenate([each.ravel() for each in docs])) if docs else None
        pooled = np.concatenate([hook.densities for hook in (*a, *b)])
        edges = np.quantile(pooled, np.arange(1, N_BINS) / N_BINS)
        self._bins = [[np.searchsorted(edges, h.densities) for h in model] for model in (a, b)]
        shares = [
            np.bincount(np.concatenate(bins), minlength=N_BINS) / sum(len(each) for each in bins)
            for bins in self._bins
        ]
        self._shared = np.minimum(*shares)

    @property
    def overlap(self) -> float:
        """Share of densities that both models have."""
        return float(self._shared.sum())

    def undefined_share(self, model: int) -> float:
        """Return the share of a model's units without a defined score."""
        return float(np.mean(np.concatenate([~hook.defined for hook in self._models[model]])))

    def means(self, rng: np.random.Generator | None) -> Float[ndarray, "3 2"]:
        """Return both models' means, raw, defined and density-matched; of one draw, with `rng`."""
        counts = None
        if rng is not None and self._known is not None:
            n = len(self._known)
            counts = np.zeros(self._n_documents, np.int64)
            counts[self._known] = rng.multinomial(n, np.full(n, 1 / n))
        sides = [
            self._side(model, bins, rng, counts)
            for model, bins in zip(self._models, self._bins, strict=True)
        ]
        (a, a_bins), (b, b_bins) = sides
        both = ~np.isnan(a_bins) & ~np.isnan(b_bins)
        share = np.where(both, self._shared, 0.0)
        total = max(float(share.sum()), 1e-12)
        matched = [
            float(np.nansum(np.where(both, x, 0.0) * share)) / total for x in (a_bins, b_bins)
        ]
        return np.array([*zip(a, b, strict=True), matched])

    def _side(
        self,
        model: list[_HookUnits],
        bins: list[ndarray],
        rng: np.random.Generator | None,
        counts: Int[ndarray, " documents"] | None,
    ) -> tuple[tuple[float, float], Float[ndarray, " bins"]]:
        """Return one model's mean of all and of defined units, and its mean in each bin."""
        raw, of_defined = list[float](), list[float]()
        sums, sizes = np.zeros(N_BINS), np.zeros(N_BINS)
        for hook, code in zip(model, bins, strict=True):
            values, defined = hook.drawn(counts)
            n = len(values)
            weight = np.ones(n) if rng is None else rng.multinomial(n, np.full(n, 1 / n))
            raw.append(float(weight @ values) / n)
            of_defined.append(
                float(weight @ (values * defined)) / max(float(weight @ defined), 1.0)
            )
            sums += np.bincount(code, weight * values, N_BINS)
            sizes += np.bincount(code, weight, N_BINS)
        means = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
        return (float(np.mean(raw)), float(np.mean(of_defined))), means


def _read_sums(store: astore.Store, scorer: Scorer, hooks: str, key: ScoreKey) -> list[_HookUnits]:
    """Score a store's explained units again, keeping the sums of their records."""
    assert key.explainer is not None and key.seed is not None
    reader, found = RecordReader(store, seed=key.seed), list[_HookUnits]()
    preset = {} if key.preset is None else scorer.presets[key.preset]
    for hook in match_stored_hooks(store, hooks):
        units = tuple(explained_units(store, hook, key.explainer, key.seed))
        job = ScoreJob(
            store,
            hook,
            reader,
            units=units,
            settings={**scorer.settings, **preset},
            explainer=key.explainer,
            controls=False,
            seed=key.seed,
        )
        records = scored_records(job, KINDS_OF[scorer.name])
        parts = list(simulated(job, records))
        sums = np.concatenate([part.sums for part in parts])
        values = AGREEMENTS["pearson"].of(sums.sum(axis=1))
        answered = [not isinstance(each, str) for part in parts for each in part.answers]
        defined = ~np.isnan(values) & np.array(answered)
        density = read_densities(store, hook)
        densities = np.array([density[unit] for unit in units])
        doc_ids = records.excerpts.doc_ids[records.index]
        found.append(_HookUnits(np.where(defined, values, 0.0), defined, densities, sums, doc_ids))
    return found


def _read_rows(store: astore.Store, scorer: Scorer, hooks: str, key: ScoreKey) -> list[_HookUnits]:
    """Read the scores of a store's units; those that failed are left out."""
    query = """SELECT s.value, s.nan_fraction, u.density FROM scores s
        JOIN unit_stats u ON u.hook = s.hook AND u.unit = s.unit
        WHERE s.metric = $metric AND s.hook = $hook AND s.control IS NULL AND s.value IS NOT NULL
            AND s.seed IS NOT DISTINCT FROM $seed AND s.preset IS NOT DISTINCT FROM $preset
            AND s.explainer IS NOT DISTINCT FROM $explainer
            AND s.judge IS NOT DISTINCT FROM $judge
        ORDER BY s.unit"""
    found: list[_HookUnits] = []
    for hook in match_stored_hooks(store, hooks):
        table = store.sql(
            query,
            metric=scorer.metrics[0],
            hook=hook,
            seed=key.seed,
            preset=key.preset,
            explainer=key.explainer,
            judge=key.judge,
        ).to_arrow_table()
        if not table.num_rows:
            raise ExplainError(
                f"{store.path}: no rows of {scorer.name} for {hook} (explainer {key.explainer}, "
                f"preset {key.preset}, seed {key.seed}); make them with lm.score"
            )
        value, undefined, density = (table[i].to_numpy().astype(np.float64) for i in range(3))
        found.append(_HookUnits(value, ~(undefined > 0), density))
    return found
