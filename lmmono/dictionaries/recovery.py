"""Whether a code holds the features that are truly there: on the planted language they are known.

`recovery` asks it of a dictionary at a hook, `recovery_of` of any array of codes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, Num
from numpy import ndarray
from torch import nn

from lmmono.data.tokens import TokenRows
from lmmono.data.truth import planted_language, row_truth
from lmmono.dictionaries.coding import keep_largest, random_directions
from lmmono.dictionaries.detection import Choice, Detection, choose, measure, scan
from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.measures import on_host
from lmmono.dictionaries.passes import Passage
from lmmono.dictionaries.splicing import coded, hook_of
from lmmono.errors import DictionaryError
from lmmono.models.hooks import run_with_cache
from lmmono.registry.metrics import METRICS
from lmmono.runs.folder import Run
from lmmono.stats.bootstrap import DocumentDraws
from lmmono.stats.estimate import Estimate
from lmmono.types import Split


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
        for name, each in {"the code": self.code, **self.controls}.items():
            lines.append(
                f"  {name}: mcc {each.mcc!r}, AUROC {each.feature_auroc!r}, F1 {each.feature_f1!r}"
            )
        return "\n".join(lines)

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return rows of table `scores`, with `name` as the dictionary's."""
        return [
            {
                "metric": metric,
                "metric_version": METRICS[metric].version,
                "control": control,
                "hook": self.hook,
                "dictionary": name,
                "seed": self.seed,
                "split": self.split,
                **getattr(found, metric).row(),
            }
            for control, found in {None: self.code, **self.controls}.items()
            for metric in ("mcc", "feature_auroc", "feature_f1")
        ]


def recovery(
    dictionary: Dictionary,
    source: Run | tuple[nn.Module, TokenRows],
    hook: str | None = None,
    *,
    split: Split = "val",
    max_tokens: int | None = 20_000,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> RecoveryReport:
    """Say how well a dictionary's latents tell the features of the planted language.

    Codes of all tokens are held in memory, 4 bytes per token and latent.

    Args:
        dictionary: Any fitted dictionary.
        source: A run on the planted language, or a model and rows of a planted corpus.
        hook: Hook of the vectors; that of the fit where not given.
        split: Rows of a run to take.
        max_tokens: Use the first whole rows with at most so many tokens.
        seed: Seed of the halves, the random directions and the intervals.
        n_resamples: Redraws of the documents.
        level: Coverage that the intervals aim at.

    Raises:
        DictionaryError: It is not fitted, has no hook or another width, or there is one document.
        DataError: The corpus is not a planted one, or `max_tokens` holds no row.
        ModelError: The model has no such hook.
    """
    model, rows = (source.model, source.tokens(split)) if isinstance(source, Run) else source
    rows, hook = rows.limit(max_tokens), hook_of(model, dictionary, hook)
    if rows.corpus is None:
        raise DictionaryError("recovery: these rows know no corpus; take them of TokenCorpus")
    features = [feature.name for feature in planted_language(rows.corpus).features]
    truth = row_truth(rows.corpus, rows).reshape(rows.ids.size, -1)
    passage = Passage(rows, model, 2048)
    vectors, codes = _codes(dictionary, model, hook, passage)
    n_active = round(float(np.count_nonzero(codes)) / len(codes))
    random = _random_code(vectors, dictionary.d_sae, max(1, n_active), seed)
    return recovery_of(
        codes,
        truth,
        passage.documents.ravel(),
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
    both = _found(codes, [truth, shuffled], halves)
    found = {None: both[0], "shuffled_truth": both[1]}
    found |= {name: _found(each, [truth], halves)[0] for name, each in (controls or {}).items()}
    n_positive = truth[halves.second].sum(axis=0)
    tables = [_table(names, control, n_positive, *each, halves) for control, each in found.items()]
    means = {control: _means(each[1], halves.draws) for control, each in found.items()}
    return RecoveryReport(
        hook=hook,
        split=split,
        seed=seed,
        code=means[None],
        controls={name: each for name, each in means.items() if name is not None},
        table=pa.concat_tables(tables),
    )


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
        known = np.unique(documents)
        order = np.random.default_rng(seed).permutation(known)
        second = np.isin(documents, order[: len(order) // 2])
        there, numbers = np.unique(documents[second], return_inverse=True)
        return cls(
            ~second, second, numbers, DocumentDraws(len(there), int(second.sum()), n, seed, level)
        )


def _check(codes: Num[ndarray, "n units"], documents: Int[ndarray, " n"]) -> None:
    if len(np.unique(documents)) < 2:
        raise DictionaryError(
            "recovery: want two documents or more, one to choose units on and one to measure them; "
            "use more tokens"
        )
    if not np.isfinite(codes).all():
        raise DictionaryError("recovery: some acts are NaN or infinite; look at the vectors")


def _codes(
    dictionary: Dictionary, model: nn.Module, hook: str, passage: Passage
) -> tuple[Float[ndarray, "n d_in"], Float[ndarray, "n d_sae"]]:
    """Return the vectors of all tokens, and their codes."""
    found = []
    for ids, _ in passage.batches():
        _, acts = run_with_cache(model, ids, hook)
        vectors, codes, _ = coded(dictionary, acts[hook])
        found.append((on_host(vectors), on_host(codes)))
    vectors, codes = (np.concatenate(each) for each in zip(*found, strict=True))
    return vectors, codes


def _random_code(
    vectors: Float[ndarray, "n d_in"], d_sae: int, k: int, seed: int
) -> Float[ndarray, "n d_sae"]:
    """Return the k largest projections of vectors, less their mean, on random unit directions."""
    directions = random_directions(d_sae, vectors.shape[1], seed)
    centred = torch.from_numpy(vectors - vectors.mean(axis=0))
    return on_host(keep_largest(centred @ directions.T, min(k, d_sae)))


def _found(
    codes: Num[ndarray, "n units"], truths: list[Bool[ndarray, "n features"]], halves: _Halves
) -> list[tuple[Choice, Detection]]:
    """Choose on the first half and measure on the second, for each truth."""
    first, second = codes[halves.first], codes[halves.second]
    correlation, auroc = scan(first, np.concatenate([each[halves.first] for each in truths], 1))
    found: list[tuple[Choice, Detection]] = []
    for i, truth in enumerate(truths):
        part = slice(i * truth.shape[1], (i + 1) * truth.shape[1])
        choice = choose(first, truth[halves.first], correlation[part], auroc[part])
        measured = measure(second, truth[halves.second], halves.documents, choice, halves.draws)
        found.append((choice, measured))
    return found


def _means(found: Detection, draws: DocumentDraws) -> Recovered:
    """Return means over the features that are defined on all documents of the half.

    A redraw that lacks a rare feature keeps its number: without it the mean would be of other,
    more common features.
    """

    def mean(values: Float[ndarray, "draws features"]) -> Estimate:
        known = values[:, ~np.isnan(values[0])]
        n, n_features = known.shape[1], values.shape[1]
        if n == 0:
            return draws.estimate(np.full(1, np.nan), n=0, nan_fraction=1.0)
        means = np.where(np.isnan(known), known[0], known).mean(axis=1)
        return draws.estimate(means, n=n, nan_fraction=1 - n / n_features)

    return Recovered(mean(found.correlation), mean(found.auroc), mean(found.f1))


def _table(
    names: list[str],
    control: str | None,
    n_positive: Int[ndarray, " features"],
    choice: Choice,
    found: Detection,
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
        values: Float[ndarray, "draws features"] = getattr(found, measure_name)
        defined = ~np.isnan(values[0])
        estimates = [halves.draws.estimate(each) for each in values.T]
        columns[f"{measure_name}_unit"] = pa.array(unit, mask=~defined | (unit < 0))
        for end in ("value", "low", "high"):
            name = measure_name if end == "value" else f"{measure_name}_{end}"
            columns[name] = pa.array([getattr(e, end) for e in estimates], from_pandas=True)
    columns["auroc_sign"], columns["f1_sign"] = choice.ranked_sign, choice.split_sign
    columns["f1_threshold"] = choice.threshold
    return pa.table(columns)
