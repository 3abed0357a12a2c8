"""Which of two models scores higher: the difference of their means, raw and at equal density.

Units of two models have no partners, but documents do: where both stores hold the same tokens, the
same documents are drawn for both, so that what a document does to both scores cancels. Two networks
differ by chance of training alone; only several training seeds of each tell architectures apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

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
from lmmono.stats.intervals import Z, student_interval

N_DRAWS = 500
"""Draws of units and documents: an interval's ends move by 3 % of its width between seeds."""

N_BINS = 10
"""Bins of density, equally full of the units of both models."""

MIN_DEFINED = 10
"""A mean over fewer defined units has no interval: drawing so few again covers too little."""

MIN_OVERLAP = 0.2
"""Least share of densities in common for a density-matched difference. On simulated units the bias
is 0.002 at 0.7 and 0.01 at 0.3, but up to 0.03 at 0.07, where the interval covers 0.8 to 0.9."""

KINDS_OF: dict[str, tuple[str, ...]] = {
    "simulation_tar": ("top", "random"),
    "simulation_random": ("random",),
}
"""Scorers whose scores can be made anew from sums per record, and the records they use."""


@dataclass(frozen=True, slots=True)
class MeanDifference:
    """A difference of means with its interval."""

    a: float
    """Mean of the first model; NaN where it has none."""
    b: float
    """Mean of the second model."""
    difference: float
    """a - b."""
    ci_low: float
    """Lower end of the 95 % interval; NaN where there is none."""
    ci_high: float
    """Upper end."""
    failure: str | None = None
    """Why there is no difference or no interval."""

    def __str__(self) -> str:
        why = f" ({self.failure})" if self.failure else ""
        if np.isnan(self.difference):
            return f"{self.a:.4f} - {self.b:.4f}: no difference{why}"
        if np.isnan(self.ci_low):
            return f"{self.a:.4f} - {self.b:.4f} = {self.difference:+.4f}, no interval{why}"
        interval = f"[{self.ci_low:+.4f}, {self.ci_high:+.4f}]"
        return f"{self.a:.4f} - {self.b:.4f} = {self.difference:+.4f} {interval}{why}"


@dataclass(frozen=True, slots=True)
class Difference:
    """How two models differ under one scorer."""

    scorer: str
    """Name of the scorer."""
    n_seeds: int
    """Pairs of training runs compared."""
    raw: MeanDifference
    """Mean over hooks of means over all units; a score that is not defined counts as chance. There
    is none where a scorer has no chance level and some units have no score."""
    defined: MeanDifference
    """Mean over the units whose score is defined, of all hooks together: a hook with few of them
    counts for as many, one without any for nothing."""
    density_matched: MeanDifference
    """Units weighted so that both models have the same densities; the units of `raw`, or those of
    `defined` where there is no raw one."""
    overlap: float
    """Share of the densities that both models have, 0 to 1."""
    undefined: tuple[float, float]
    """Share of units of each model whose score is not defined, those without any value included."""
    below: tuple[float, float]
    """Share of units of each model that are left out, since they fire more rarely than
    `least_density`."""
    least_density: float
    """Least density of the units that count; 0 counts all."""
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
        left_out = ""
        if self.least_density:
            left_out = (
                f"  left out: {self.below[0]:.0%} and {self.below[1]:.0%} of the units, which fire "
                f"on less than {self.least_density:g} of the tokens\n"
            )
        return (
            f"Difference({self.scorer}; {seeds})\n"
            f"  raw              {self.raw}\n"
            f"  defined only     {self.defined}  ({a:.0%} and {b:.0%} are not)\n"
            f"  density-matched  {self.density_matched}  (overlap {self.overlap:.0%})\n"
            f"{left_out}"
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
    rare: bool = False,
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
        rare: Count units too that fire more rarely than the least density of the scorer, at which
            it still ranks true explanations first.

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
    record = find_scorer(scorer)
    if record.per != "unit":
        raise ExplainError(f"{scorer} scores hooks, not units; there is nothing to draw again")
    keys = [score_key(record, explainer, preset, judge, one) for one in seeds]
    pairs = [
        _compare(record, first, second, hooks, key, one, rare)
        for first, second, key, one in zip(a, b, keys, seeds, strict=True)
    ]
    return pairs[0] if len(pairs) == 1 else _over_seeds(pairs)


def score_key(
    scorer: Scorer, explainer: str, preset: str | None, judge: str | None, seed: int
) -> ScoreKey:
    """Return what the rows of a scorer of an explainer are stored under."""
    protocol = scorer.presets.get(preset or "", {}).get("protocol")
    named = variant(explainer, protocol, {}) if protocol and ":" not in explainer else explainer
    stored = (named if scorer.reads_explanations else None, judge)
    return ScoreKey(scorer.metrics, preset, *stored, seed if scorer.seeded else None)


def _compare(
    scorer: Scorer,
    a: astore.Store,
    b: astore.Store,
    hooks: str,
    key: ScoreKey,
    seed: int,
    rare: bool,
) -> Difference:
    paired = scorer.name in KINDS_OF and key.judge is None and _fingerprint(a) == _fingerprint(b)
    read = _read_sums if paired else read_units
    least = 0.0 if rare or scorer.least_density is None else scorer.least_density
    least = least if math.isfinite(least) else 0.0  # else nothing would be left
    sides = read(a, scorer, hooks, key), read(b, scorer, hooks, key)
    below = tuple(
        float(np.mean(np.concatenate([hook.is_rarer(least) for hook in side]))) for side in sides
    )
    sides = tuple([hook.from_density(least) for hook in side] for side in sides)
    drawn_again = "documents, the same for both, and units" if paired else "units"
    method = f"normal, standard error from {N_DRAWS} draws of {drawn_again}"
    overlap, undefined = math.nan, (math.nan, math.nan)
    if all(sum(len(hook.values) for hook in side) for side in sides):
        filled = [[hook for hook in side if len(hook.values)] for side in sides]
        has_chance = scorer.chance is not None or all(
            hook.defined.all() for side in filled for hook in side
        )
        pair = UnitPair(filled[0], filled[1], has_chance)
        estimates = pair.differences(seed)
        overlap, undefined = pair.overlap, (pair.undefined_share(0), pair.undefined_share(1))
    else:
        nan, why = math.nan, f"no unit fires on {least:g} of the tokens"
        estimates, method = [MeanDifference(nan, nan, nan, nan, nan, why)] * 3, "none"
    return Difference(
        scorer.name,
        1,
        *estimates,
        overlap=overlap,
        undefined=undefined,
        below=(below[0], below[1]),
        least_density=least,
        paired_documents=paired,
        ci_method=method,
    )


def _over_seeds(pairs: list[Difference]) -> Difference:
    """Return the mean over pairs of training runs; Student's t over pairs."""
    estimates: list[MeanDifference] = []
    for name in ("raw", "defined", "density_matched"):
        of_pairs: list[MeanDifference] = [getattr(pair, name) for pair in pairs]
        # a pair without a difference leaves none: a mean of the others would be of other runs
        mean, low, high = student_interval([np.array([of_pair.difference for of_pair in of_pairs])])
        a, b = (float(np.mean([getattr(of_pair, side) for of_pair in of_pairs])) for side in "ab")
        lacks = [of_pair.failure for of_pair in of_pairs if np.isnan(of_pair.difference)]
        failure = f"{len(lacks)} of {len(pairs)} pairs: {lacks[0]}" if lacks else None
        estimates.append(MeanDifference(a, b, mean, low, high, failure))
    return Difference(
        pairs[0].scorer,
        len(pairs),
        *estimates,
        overlap=float(np.mean([pair.overlap for pair in pairs])),
        undefined=(
            float(np.mean([pair.undefined[0] for pair in pairs])),
            float(np.mean([pair.undefined[1] for pair in pairs])),
        ),
        below=(
            float(np.mean([pair.below[0] for pair in pairs])),
            float(np.mean([pair.below[1] for pair in pairs])),
        ),
        least_density=pairs[0].least_density,
        paired_documents=all(pair.paired_documents for pair in pairs),
        ci_method=f"Student t over {len(pairs)} pairs of training runs",
        pairs=tuple(pairs),
    )


def _fingerprint(store: astore.Store) -> tuple[int, int]:
    """Return what tells the scored tokens of stores apart."""
    query = """SELECT count(*), bit_xor(hash(seq_id, pos, doc_id, token_id)) FROM token_ids
        WHERE split = 'score'"""
    (fingerprint,) = store.sql(query).fetchall()
    return fingerprint


@dataclass(frozen=True, slots=True)
class HookUnits:
    """The scored units of one hook."""

    values: Float[ndarray, " units"]
    """Chance where not defined; 0 where the scorer has no chance level, and then not used."""
    defined: Bool[ndarray, " units"]
    densities: Float[ndarray, " units"]
    sums: Float[ndarray, "units records sums"] | None = None
    doc_ids: Int[ndarray, "units records"] | None = None

    def is_rarer(self, least: float) -> Bool[ndarray, " units"]:
        """Return which units fire, but on a smaller share of the tokens."""
        return (self.densities > 0) & (self.densities < least)

    def from_density(self, least: float) -> "HookUnits":
        """Return the units that fire at least so often, and those that never do: undefined."""
        kept = ~self.is_rarer(least)
        parts = (self.values, self.defined, self.densities, self.sums, self.doc_ids)
        return HookUnits(*(None if part is None else part[kept] for part in parts))  # pyright: ignore[reportArgumentType]

    def drawn(self, counts: Int[ndarray, " documents"] | None) -> tuple[ndarray, ndarray]:
        """Return values and which are defined, with each document counted so many times."""
        if counts is None or self.sums is None or self.doc_ids is None:
            return self.values, self.defined
        weights = counts[self.doc_ids].astype(np.float64)
        values = AGREEMENTS["pearson"].of(np.einsum("ur,urs->us", weights, self.sums))
        defined = self.defined & ~np.isnan(values)
        return np.where(defined, values, 0.0), defined


class UnitPair:
    """The scored units of two models, and their means under draws of units and documents.

    Args:
        a: Hooks of the first model.
        b: Hooks of the second.
        has_chance: A unit without a defined score counts as chance; without, only those with one
            count, and there is no raw mean.
    """

    def __init__(self, a: list[HookUnits], b: list[HookUnits], has_chance: bool = True) -> None:
        self._models, self._has_chance = (a, b), has_chance
        docs = [hook.doc_ids for hook in (*a, *b) if hook.doc_ids is not None]
        self._n_documents = 1 + max((int(ids.max()) for ids in docs), default=-1)
        self._documents = np.unique(np.concatenate([ids.ravel() for ids in docs])) if docs else None
        pooled = np.concatenate([hook.densities for hook in (*a, *b)])
        edges = np.quantile(pooled, np.arange(1, N_BINS) / N_BINS)
        self._bins = [[np.searchsorted(edges, h.densities) for h in model] for model in (a, b)]
        shares: list[Float[ndarray, " bins"]] = []
        for model, bins in zip(self._models, self._bins, strict=True):
            pairs = zip(model, bins, strict=True)
            counted = [code[self._counted(hook.defined)] for hook, code in pairs]
            n = np.bincount(np.concatenate(counted), minlength=N_BINS)
            shares.append(n / max(int(n.sum()), 1))
        self._shared = np.minimum(*shares)

    def _counted(self, defined: Bool[ndarray, " units"]) -> Bool[ndarray, " units"]:
        return np.ones(len(defined), bool) if self._has_chance else defined

    @property
    def overlap(self) -> float:
        """Share of densities that both models have."""
        return float(self._shared.sum())

    def undefined_share(self, model: int) -> float:
        """Return the share of a model's units without a defined score."""
        return float(np.mean(np.concatenate([~hook.defined for hook in self._models[model]])))

    def failures(self) -> tuple[str | None, str | None, str | None]:
        """Return why the raw, defined and density-matched differences cannot be trusted."""
        raw = None if self._has_chance else "no chance level to stand for units without a score"
        n_defined = [sum(int(hook.defined.sum()) for hook in model) for model in self._models]
        few = None
        if min(n_defined) < MIN_DEFINED:
            few = f"{n_defined[0]} and {n_defined[1]} defined units; want {MIN_DEFINED} or more"
        matched = None if self._has_chance else few
        if self.overlap < MIN_OVERLAP:
            matched = f"want an overlap of {MIN_OVERLAP:.0%} or more"
        return raw, few, matched

    def means(self, rng: np.random.Generator | None) -> Float[ndarray, "3 2"]:
        """Return both models' means, raw, defined and density-matched; of one draw, with `rng`."""
        counts = None
        if rng is not None and self._documents is not None:
            n = len(self._documents)
            counts = np.zeros(self._n_documents, np.int64)
            counts[self._documents] = rng.multinomial(n, np.full(n, 1 / n))
        (a, a_bins), (b, b_bins) = (
            self._side(model, bins, rng, counts)
            for model, bins in zip(self._models, self._bins, strict=True)
        )
        both = ~np.isnan(a_bins) & ~np.isnan(b_bins)
        share = np.where(both, self._shared, 0.0)
        matched = [np.nan, np.nan]
        if self.overlap >= MIN_OVERLAP and share.sum() > 0:
            bins = np.where(both, a_bins, 0.0), np.where(both, b_bins, 0.0)
            matched = [float(side @ share / share.sum()) for side in bins]
        return np.array([*zip(a, b, strict=True), matched])

    def differences(self, seed: int) -> list[MeanDifference]:
        """Return the raw, defined and density-matched differences, with a spread over draws."""
        rng = np.random.default_rng(seed)
        means = self.means(None)
        draws = np.array([self.means(rng) for _ in range(N_DRAWS)])
        estimates: list[MeanDifference] = []
        for i, ((x, y), failure) in enumerate(zip(means.tolist(), self.failures(), strict=True)):
            drawn = draws[:, i, 0] - draws[:, i, 1]
            drawn = drawn[~np.isnan(drawn)]
            half = Z * float(drawn.std(ddof=1)) if failure is None and len(drawn) > 1 else np.nan
            estimates.append(MeanDifference(x, y, x - y, x - y - half, x - y + half, failure))
        return estimates

    def _side(
        self,
        model: list[HookUnits],
        bins: list[ndarray],
        rng: np.random.Generator | None,
        counts: Int[ndarray, " documents"] | None,
    ) -> tuple[tuple[float, float], Float[ndarray, " bins"]]:
        """Return one model's mean of all and of defined units, and its mean in each bin."""
        raw: list[float] = []
        total, n_defined = 0.0, 0.0
        sums, sizes = np.zeros(N_BINS), np.zeros(N_BINS)
        for hook, code in zip(model, bins, strict=True):
            values, defined = hook.drawn(counts)
            n = len(values)
            weight = np.ones(n) if rng is None else rng.multinomial(n, np.full(n, 1 / n))
            raw.append(float(weight @ values) / n)
            total += float(weight @ (values * defined))
            n_defined += float(weight @ defined)
            weight = weight * self._counted(defined)
            sums += np.bincount(code, weight * values, N_BINS)
            sizes += np.bincount(code, weight, N_BINS)
        means = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
        mean = float(np.mean(raw)) if self._has_chance else np.nan
        return (mean, total / n_defined if n_defined else np.nan), means


def _read_sums(store: astore.Store, scorer: Scorer, hooks: str, key: ScoreKey) -> list[HookUnits]:
    """Score a store's explained units again, keeping the sums of their records."""
    assert key.explainer is not None and key.seed is not None
    reader, of_hooks = RecordReader(store, seed=key.seed), list[HookUnits]()
    for hook in match_stored_hooks(store, hooks):
        units = tuple(explained_units(store, hook, key.explainer, key.seed))
        job = ScoreJob(
            store,
            hook,
            reader,
            units=units,
            settings=scorer.with_settings(key.preset),
            explainer=key.explainer,
            controls=False,
            seed=key.seed,
        )
        records = scored_records(job, KINDS_OF[scorer.name])
        parts = list(simulated(job, records))
        sums = np.concatenate([part.sums for part in parts])
        values = AGREEMENTS["pearson"].of(sums.sum(axis=1))
        answered = [not isinstance(answer, str) for part in parts for answer in part.answers]
        defined = ~np.isnan(values) & np.array(answered)
        density = read_densities(store, hook)
        densities = np.array([density[unit] for unit in units])
        doc_ids = records.excerpts.doc_ids[records.index]
        values = np.where(defined, values, 0.0)
        of_hooks.append(HookUnits(values, defined, densities, sums, doc_ids))
    return of_hooks


def read_units(store: astore.Store, scorer: Scorer, hooks: str, key: ScoreKey) -> list[HookUnits]:
    """Read the scores of a store's units; one without a value is not defined."""
    query = f"""SELECT coalesce(s.value, $chance), s.value IS NULL OR s.nan_fraction > 0, u.density
        FROM {ScoreKey.LATEST} s JOIN unit_stats u ON u.hook = s.hook AND u.unit = s.unit
        WHERE s.metric = $headline AND s.hook = $hook AND s.control IS NULL ORDER BY s.unit"""
    of_hooks: list[HookUnits] = []
    for hook in match_stored_hooks(store, hooks):
        rows = store.sql(
            query,
            headline=scorer.metrics[0],
            chance=scorer.chance or 0.0,
            hook=hook,
            **key.parameters(),
        ).fetchall()
        if not rows:
            raise ExplainError(
                f"{store.path}: no rows of {scorer.name} for {hook} ({key}); make them with "
                f"lm.score"
            )
        value, undefined, density = np.array(rows, np.float64).T
        of_hooks.append(HookUnits(value, undefined != 1, density))
    return of_hooks
