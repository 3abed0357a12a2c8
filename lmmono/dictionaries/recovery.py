"""Whether a code holds the features that are truly there: on the planted language they are known.

`recovery` asks it of a dictionary at a hook, `recovery_of` of any array of codes. Choosing the best
of thousands of units and the best threshold flatters on the tokens of the choice, so a unit is
chosen on one half of the documents (`scan`, `choose`) and measured on the other (`measure`). A unit
may tell a feature by high or by low acts; that too is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, Num
from numpy import ndarray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import nn

from lmmono.data.tokens import TokenRows
from lmmono.data.truth import planted_language, row_truth
from lmmono.dictionaries.coding import keep_largest, on_host, random_directions
from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.evaluation import DocumentRows
from lmmono.dictionaries.splicing import coded, hook_of
from lmmono.dictionaries.vector_source import LeftOut
from lmmono.errors import DictionaryError
from lmmono.models.hooks import run_with_cache
from lmmono.registry.metrics import METRICS
from lmmono.runs.folder import Run
from lmmono.stats.bootstrap import DocumentDraws, ratio
from lmmono.stats.estimate import Estimate
from lmmono.types import Split

UNITS_AT_ONCE = 256
"""Units whose acts are held in float64 together."""
CANDIDATES = 16
"""Units tried for the best F1: so many by correlation, and so many by AUROC. Trying all
would sort every unit's acts."""

RUN_TOKENS = 2048
"""Tokens per pass through the model; sets the memory, not the result."""

Codes = Num[ndarray, "n units"]
Truth = Bool[ndarray, "n features"]
Drawn = Float[ndarray, "one_plus_resamples features"]


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much of the truth one code holds; means over features, measured on the second half."""

    mcc: Estimate
    """Mean correlation of features with units matched one-to-one; 0 for features beyond the
    number of units. Hyvarinen and Morioka 2016, with match and sign from the first half."""
    feature_auroc: Estimate
    """Mean AUROC of each feature's best unit."""
    feature_f1: Estimate
    """Mean F1 of each feature's best unit at its best threshold. A unit that tells nothing has more
    than 0: a feature on a share p of the tokens has F1 2p / (1 + p) if it is always said."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RecoveryReport:
    """True features in a code, beside what other codes and another truth would give.

    Units, signs and thresholds are chosen on half of the documents; every number is measured on the
    other half, with intervals over its documents, given the choice.
    """

    hook: str | None
    """Hook of the codes; None for bare arrays."""
    split: str | None
    """Split of the rows; None for bare arrays."""
    seed: int
    """Seed of the halves, the random directions and the intervals."""
    code: Recovered
    """The code itself."""
    controls: Mapping[str, Recovered]
    """By name: `shuffled_truth` is this code against the features of other tokens,
    `random_directions` as many random directions with as many active, `raw` the hook's own
    coordinates."""
    table: pa.Table
    """One row per feature and control (null: the code itself): n_positive, and unit, value and
    interval by each measure; null where a feature is on no token of a half, or on all."""

    def __repr__(self) -> str:
        lines = [f"RecoveryReport({self.hook or 'codes'}, {self.code.mcc.n} features)"]
        for name, recovered in {"the code": self.code, **self.controls}.items():
            lines.append(
                f"  {name}: mcc {recovered.mcc!r}, AUROC {recovered.feature_auroc!r}, "
                f"F1 {recovered.feature_f1!r}"
            )
        return "\n".join(lines)

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return rows of table `all_scores`, with `name` as the dictionary's."""
        return [
            {
                "metric": metric,
                "metric_version": METRICS[metric].version,
                "control": control,
                "hook": self.hook,
                "dictionary": name,
                "seed": self.seed,
                "split": self.split,
                **getattr(recovered, metric).row(),
            }
            for control, recovered in {None: self.code, **self.controls}.items()
            for metric in ("mcc", "feature_auroc", "feature_f1")
        ]


def recovery(
    dictionary: Dictionary,
    source: Run | tuple[nn.Module, TokenRows],
    hook: str | None = None,
    *,
    split: Split = "val",
    max_tokens: int | None = 20_000,
    skip: LeftOut | None = None,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> RecoveryReport:
    """Say how well a dictionary's latents tell the features of the planted language.

    Padding does not count, nor what `skip` names; the model reads both as it always does.

    Codes of all tokens are held in memory, 4 bytes per token and latent.

    Args:
        dictionary: Any fitted dictionary.
        source: A run on the planted language, or a model and rows of a planted corpus.
        hook: Hook of the vectors; that of the fit where not given.
        split: Rows of a run to take.
        max_tokens: Use whole rows with at most so many tokens, drawn by the seed.
        skip: Which tokens do not count: `astore.Skip(token_ids, first)`, a mask of the rows in
            use, or a function that gives one.
        seed: Seed of the rows, the halves, the random directions and the intervals.
        n_resamples: Redraws of the documents.
        level: Coverage that the intervals aim at.

    Raises:
        DictionaryError: It is not fitted, has no hook or another width, or there is one document.
        DataError: The corpus is not a planted one, or `max_tokens` holds no row.
        ModelError: The model has no such hook.
    """
    model, rows = (source.model, source.tokens(split)) if isinstance(source, Run) else source
    rows, hook = rows.limit(max_tokens, seed=seed), hook_of(model, dictionary, hook)
    if rows.corpus is None:
        raise DictionaryError("recovery: these rows know no corpus; take them of TokenCorpus")
    features = [feature.name for feature in planted_language(rows.corpus).features]
    truth = row_truth(rows.corpus, rows).reshape(rows.ids.size, -1)
    text = DocumentRows(rows, model, RUN_TOKENS, skip)
    parts: list[tuple[ndarray, ndarray]] = []
    for batch in text.batches():
        mask = None if bool(batch.is_token.all()) else batch.is_token.long()
        _, acts = run_with_cache(model, batch.ids, hook, attention_mask=mask)
        vectors, latents, _ = coded(dictionary, acts[hook])
        parts.append((on_host(vectors), on_host(latents)))
    counted = text.counted.ravel()
    vectors, codes = (np.concatenate(arrays)[counted] for arrays in zip(*parts, strict=True))
    n_active = round(float(np.count_nonzero(codes)) / len(codes))
    directions = random_directions(dictionary.d_sae, vectors.shape[1], seed)
    centred = torch.from_numpy(vectors - vectors.mean(axis=0))
    k = min(max(1, n_active), dictionary.d_sae)
    random = on_host(keep_largest(centred @ directions.T, k))
    return recovery_of(
        codes,
        truth[counted],
        text.documents.ravel()[counted],
        features=features,
        controls={"random_directions": random, "raw": vectors},
        hook=hook,
        split=rows.split,
        seed=seed,
        n_resamples=n_resamples,
        level=level,
    )


def recovery_of(
    codes: Num[ndarray, "n units"],
    truth: Bool[ndarray, "n features"],
    documents: Int[ndarray, " n"],
    *,
    features: Sequence[str] | None = None,
    controls: Mapping[str, Num[ndarray, "n _"]] | None = None,
    hook: str | None = None,
    split: str | None = None,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> RecoveryReport:
    """Say how well the columns of an array tell true features.

    Args:
        codes: Acts of every unit on every token.
        truth: Which features every token has.
        documents: Document of every token: halves and intervals keep a document whole.
        features: Names; f0, f1, ... where not given.
        controls: Further codes of the same tokens, by name.
        hook: Goes into the rows.
        split: Goes into the rows.
        seed: Seed of the halves and the intervals.
        n_resamples: Redraws of the documents.
        level: Coverage that the intervals aim at.

    Raises:
        DictionaryError: There are fewer than two documents, or acts are not finite.
    """
    names = list(features or (f"f{i}" for i in range(truth.shape[1])))
    _check(codes, documents)
    halves = _Halves.drawn(documents, n_resamples, seed, level)
    shuffled = np.roll(truth, len(truth) // 2, axis=0)
    both = _measured(codes, [truth, shuffled], halves)
    measured = {None: both[0], "shuffled_truth": both[1]}
    measured |= {
        name: _measured(code, [truth], halves)[0] for name, code in (controls or {}).items()
    }
    n_positive = truth[halves.second].sum(axis=0)
    tables = [
        _table(names, control, n_positive, *parts, halves) for control, parts in measured.items()
    ]
    means = {control: _means(parts[1], halves.draws) for control, parts in measured.items()}
    return RecoveryReport(
        hook=hook,
        split=split,
        seed=seed,
        code=means[None],
        controls={name: mean for name, mean in means.items() if name is not None},
        table=pa.concat_tables(tables),
    )


@dataclass(frozen=True, slots=True, eq=False)
class UnitChoice:
    """The units chosen for each feature; -1 where none is left."""

    known: Bool[ndarray, " features"]
    """Whether some of the tokens had the feature, and some had not; else nothing is chosen."""
    matched: Int[ndarray, " features"]
    """Unit of the one-to-one match with the largest sum of correlations, in size."""
    matched_sign: Float[ndarray, " features"]
    """1 where its acts rise with the feature, -1 where they fall."""
    ranked: Int[ndarray, " features"]
    """Unit of the best AUROC."""
    ranked_sign: Float[ndarray, " features"]
    """1 where high acts tell the feature, -1 where low ones do."""
    split: Int[ndarray, " features"]
    """Unit of the best F1."""
    split_sign: Float[ndarray, " features"]
    """As `ranked_sign`."""
    threshold: Float[ndarray, " features"]
    """The feature is said to be there where sign x act is above."""


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """Measures per feature on all documents, then on each redraw; NaN where not defined."""

    correlation: Drawn
    """Correlation of the matched unit with the feature, its sign chosen before."""
    auroc: Drawn
    """Chance that the unit's act is higher on a token with the feature than on one without."""
    f1: Drawn
    """2 TP / (2 TP + FP + FN) at the threshold."""


@dataclass(frozen=True, slots=True, eq=False)
class _Halves:
    """Documents to choose on, and documents to measure on."""

    first: Bool[ndarray, " n"]
    second: Bool[ndarray, " n"]
    documents: Int[ndarray, " n_second"]
    """Documents of the second half's tokens, numbered from 0."""
    draws: DocumentDraws

    @classmethod
    def drawn(cls, documents: Int[ndarray, " n"], n: int, seed: int, level: float) -> "_Halves":
        order = np.random.default_rng(seed).permutation(np.unique(documents))
        second = np.isin(documents, order[: len(order) // 2])
        names, numbers = np.unique(documents[second], return_inverse=True)
        return cls(
            ~second, second, numbers, DocumentDraws(len(names), int(second.sum()), n, seed, level)
        )


def _check(codes: Num[ndarray, "n units"], documents: Int[ndarray, " n"]) -> None:
    if len(np.unique(documents)) < 2:
        raise DictionaryError(
            "recovery: want two documents or more, one to choose units on and one to measure them; "
            "use more tokens"
        )
    if not np.isfinite(codes).all():
        raise DictionaryError("recovery: some acts are NaN or infinite; look at the vectors")


def _measured(
    codes: Num[ndarray, "n units"], truths: list[Bool[ndarray, "n features"]], halves: _Halves
) -> list[tuple[UnitChoice, Detection]]:
    """Choose on the first half and measure on the second, for each truth."""
    first, second = codes[halves.first], codes[halves.second]
    correlation, auroc = scan(first, np.concatenate([truth[halves.first] for truth in truths], 1))
    measured: list[tuple[UnitChoice, Detection]] = []
    for i, truth in enumerate(truths):
        part = slice(i * truth.shape[1], (i + 1) * truth.shape[1])
        choice = choose(first, truth[halves.first], correlation[part], auroc[part])
        detection = measure(second, truth[halves.second], halves.documents, choice, halves.draws)
        measured.append((choice, detection))
    return measured


def _means(detection: Detection, draws: DocumentDraws) -> Recovered:
    """Return means over the features that are defined on all documents of the half.

    A redraw that lacks a rare feature keeps its number: without it the mean would be of other,
    more common features.
    """

    def mean(values: Float[ndarray, "draws features"]) -> Estimate:
        defined = values[:, ~np.isnan(values[0])]
        n, n_features = defined.shape[1], values.shape[1]
        if n == 0:
            return draws.estimate(np.full(1, np.nan), n=0, nan_fraction=1.0)
        means = np.where(np.isnan(defined), defined[0], defined).mean(axis=1)
        return draws.estimate(means, n=n, nan_fraction=1 - n / n_features)

    return Recovered(mean(detection.correlation), mean(detection.auroc), mean(detection.f1))


def _table(
    names: list[str],
    control: str | None,
    n_positive: Int[ndarray, " features"],
    choice: UnitChoice,
    detection: Detection,
    halves: _Halves,
) -> pa.Table:
    """Return one row per feature."""
    columns: dict[str, Any] = {
        "feature": names,
        "control": pa.array([control] * len(names), pa.string()),
        "n_positive": n_positive,
    }
    units = {"correlation": choice.matched, "auroc": choice.ranked, "f1": choice.split}
    for measure_name, unit in units.items():
        values: Float[ndarray, "draws features"] = getattr(detection, measure_name)
        defined = ~np.isnan(values[0])
        columns[f"{measure_name}_unit"] = pa.array(unit, mask=~defined | (unit < 0))
        ends = ("", "_low", "_high")
        for end, numbers in zip(ends, halves.draws.intervals(values).T, strict=True):
            columns[measure_name + end] = pa.array(numbers, from_pandas=True)
    columns["auroc_sign"], columns["f1_sign"] = choice.ranked_sign, choice.split_sign
    columns["f1_threshold"] = choice.threshold
    return pa.table(columns)


def scan(
    codes: Codes, truth: Truth
) -> tuple[Float[ndarray, "features units"], Float[ndarray, "features units"]]:
    """Return the correlation and the AUROC of every unit with every feature.

    A constant unit has correlation 0 and AUROC 0.5, a feature of all tokens or of none has NaN.
    """
    n, n_units = codes.shape
    present = truth.astype(np.float64)
    n_present = present.sum(axis=0)[:, None]
    centred = present - present.mean(axis=0)
    size = np.sqrt(np.square(centred).sum(axis=0))[:, None]
    correlation = np.empty((truth.shape[1], n_units))
    auroc = np.empty_like(correlation)
    for first in range(0, n_units, UNITS_AT_ONCE):
        part = slice(first, first + UNITS_AT_ONCE)
        acts = codes[:, part].astype(np.float64)
        acts -= acts.mean(axis=0)
        sizes = np.sqrt(np.square(acts).sum(axis=0))
        correlation[:, part] = centred.T @ acts / np.where(sizes > 0, sizes, np.inf)
        ranks = rankdata(codes[:, part], axis=0)
        above = present.T @ ranks - n_present * (n_present + 1) / 2  # Mann and Whitney's U
        auroc[:, part] = above / np.maximum(n_present * (n - n_present), 1.0)
    defined = size > 0
    correlation = correlation / np.where(defined, size, 1.0)
    return np.where(defined, correlation, np.nan), np.where(defined, auroc, np.nan)


def choose(
    codes: Codes,
    truth: Truth,
    correlation: Float[ndarray, "features units"],
    auroc: Float[ndarray, "features units"],
) -> UnitChoice:
    """Choose a unit per feature, by each measure; what `scan` found of the same tokens is given."""
    n_features = truth.shape[1]
    size, lean = np.abs(np.nan_to_num(correlation)), np.abs(np.nan_to_num(auroc - 0.5))
    matched = np.full(n_features, -1)
    features, units = linear_sum_assignment(size, maximize=True)
    matched[features] = units
    ranked = lean.argmax(axis=1)
    every = np.arange(n_features)
    n_tried = min(CANDIDATES, size.shape[1])
    tried = [
        np.argpartition(-measure, n_tried - 1, axis=1)[:, :n_tried] for measure in (size, lean)
    ]
    trials = np.zeros(size.shape, bool)
    trials[every[:, None], np.concatenate(tried, axis=1)] = True
    split, split_sign, threshold = _best_splits(codes, truth, trials)
    return UnitChoice(
        known=~np.isnan(correlation[:, 0]),
        matched=matched,
        matched_sign=_sign(correlation[every, matched]),
        ranked=ranked,
        ranked_sign=_sign(auroc[every, ranked] - 0.5),
        split=split,
        split_sign=split_sign,
        threshold=threshold,
    )


def best_thresholds(
    acts: Num[ndarray, " n"], truth: Truth
) -> tuple[Float[ndarray, " features"], Float[ndarray, " features"]]:
    """Return the largest F1 of `act > threshold` for each feature, and a threshold that gives it.

    The threshold lies midway between two acts; without any act below it is -inf.

    >>> best_thresholds(np.array([0.0, 0.0, 1.0, 3.0]), np.array([[False, False, True, True]]).T)
    (array([1.]), array([0.5]))
    """
    order = np.argsort(-acts, kind="stable")
    acts = acts[order].astype(np.float64)
    below = np.append(acts[1:], -np.inf)
    ends = np.flatnonzero(below < acts)  # equal acts are on one side of every threshold
    hits = np.cumsum(truth[order], axis=0)[ends]
    f1 = 2 * hits / (ends[:, None] + 1 + truth.sum(axis=0))
    best = f1.argmax(axis=0)
    return f1[best, np.arange(truth.shape[1])], (acts + below)[ends[best]] / 2


def measure(
    codes: Codes,
    truth: Truth,
    documents: Int[ndarray, " n"],
    choice: UnitChoice,
    draws: DocumentDraws,
) -> Detection:
    """Measure chosen units on other documents, numbered from 0.

    A feature of no token, or of all, is NaN.
    """
    n_present = truth.sum(axis=0)
    defined = choice.known & (n_present > 0) & (n_present < len(truth))

    def acts_of(units: ndarray, signs: ndarray) -> Float[ndarray, "n features"]:
        return np.where(units >= 0, codes[:, units].astype(np.float64) * signs, 0.0)

    def by_document(columns: list[ndarray]) -> Float[ndarray, "documents features columns"]:
        sums = np.zeros((draws.n_documents, truth.shape[1], len(columns)))
        np.add.at(sums, documents, np.stack(columns, axis=2))
        return sums

    correlation = _correlation(
        draws.totals(by_document(_moments(acts_of(choice.matched, choice.matched_sign), truth)))
    )
    placed = draws.totals(
        by_document(_placements(acts_of(choice.ranked, choice.ranked_sign), truth))
    )
    is_told = acts_of(choice.split, choice.split_sign) > choice.threshold
    outcomes = [is_told & truth, is_told & ~truth, ~is_told & truth]
    hits, alarms, misses = np.moveaxis(
        draws.totals(by_document([outcome.astype(np.float64) for outcome in outcomes])), 2, 0
    )
    f1 = np.where(hits + misses > 0, ratio(2 * hits, 2 * hits + alarms + misses), np.nan)
    return Detection(
        *(np.where(defined, measure, np.nan) for measure in (correlation, _auroc(placed), f1))
    )


def _best_splits(
    codes: Codes, truth: Truth, tried: Bool[ndarray, "features units"]
) -> tuple[Int[ndarray, " features"], Float[ndarray, " features"], Float[ndarray, " features"]]:
    """Return the unit, sign and threshold of each feature's largest F1 among the units it tries."""
    n_features = truth.shape[1]
    f1, units, signs = np.full(n_features, -1.0), np.zeros(n_features, int), np.ones(n_features)
    thresholds = np.full(n_features, -np.inf)
    for unit in np.flatnonzero(tried.any(axis=0)).tolist():
        features = np.flatnonzero(tried[:, unit])
        for sign in (1.0, -1.0):
            scores, cuts = best_thresholds(sign * codes[:, unit], truth[:, features])
            better = scores > f1[features]
            at = features[better]
            f1[at], units[at], signs[at], thresholds[at] = scores[better], unit, sign, cuts[better]
    return units, signs, thresholds


def _sign(values: Float[ndarray, " features"]) -> Float[ndarray, " features"]:
    return np.where(values < 0, -1.0, 1.0)


def _moments(acts: Float[ndarray, "n features"], truth: Truth) -> list[ndarray]:
    """Return what a correlation is made of, per token; acts are centred against cancellation."""
    acts = acts - acts.mean(axis=0)
    present = truth.astype(np.float64)
    return [np.ones_like(acts), present, acts, acts * acts, present * acts]


def _correlation(sums: Float[ndarray, "draws features 5"]) -> Drawn:
    n, present, act, squares, both = np.moveaxis(sums, 2, 0)
    spread = np.maximum(n * squares - act * act, 0.0)
    # relative: what is left of a unit that does not vary is rounding
    silent = spread <= 1e-12 * np.maximum(n * squares, np.finfo(np.float64).tiny)
    size = np.sqrt(np.maximum(n * present - present * present, 0.0) * spread)
    correlation = ratio(n * both - present * act, size)
    return np.where(silent, 0.0, correlation)  # a unit that is constant tells nothing


def _placements(acts: Float[ndarray, "n features"], truth: Truth) -> list[ndarray]:
    """Return per token: where its act lies among those of the other kind, and its kind.

    Sums of placements over documents give the interval of an AUROC whose tokens hang together
    (Obuchowski 1997), as a ratio of sums each.
    """
    above, below = np.zeros_like(acts), np.zeros_like(acts)
    for feature, present in enumerate(truth.T):
        if present.any() and not present.all():
            for kind, column in ((present, above), (~present, below)):
                others, own = np.sort(acts[~kind, feature]), acts[kind, feature]
                # one that is equal counts half
                twice = np.searchsorted(others, own) + np.searchsorted(others, own, "right")
                column[kind, feature] = twice / (2 * len(others))
    present = truth.astype(np.float64)
    return [above, present, np.where(truth, 0.0, 1.0 - below), 1.0 - present]


def _auroc(sums: Float[ndarray, "draws features 4"]) -> Drawn:
    above, n_present, below, n_other = np.moveaxis(sums, 2, 0)
    of_present, of_other = ratio(above, n_present), ratio(below, n_other)
    return of_present + of_other - of_present[:1]
