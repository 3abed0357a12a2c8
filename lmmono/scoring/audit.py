"""Does a scorer know a true explanation when it sees one? Asked where the truth is planted.

Units are exact functions of known features of the planted language: as they are, with noise, in
superposition with another feature, or both. Explanations are look-up tables: the true one holds,
for each word, how often it has the feature; the false ones are of another feature, near misses, too
broad or too narrow. A feature that the word alone does not decide has no complete look-up; its
kinds are told apart in the rows.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import spearmanr

import activation_store as astore
from lmmono.data.planted import Language
from lmmono.errors import ExplainError, nearest
from lmmono.explaining.explanation import Explanation
from lmmono.explaining.lookup import Lookup, lookup_text
from lmmono.scoring.intervals import mean_interval
from lmmono.scoring.registry import find_scorer
from lmmono.scoring.scores import score
from lmmono.types import Progress, silent

LEVELS: dict[str, tuple[float, float]] = {
    "exact": (0.0, 0.0),
    "noise 0.3": (0.3, 0.0),
    "superposed 0.5": (0.0, 0.5),
    "noise 0.3, superposed 0.5": (0.3, 0.5),
}
"""Noise (share of firing lost, and as much falsely added) and weight of a second feature."""

FALSE = ("random", "near_miss", "too_broad", "too_narrow")
"""False explanations. random: of another feature. near_miss: half of the firing is moved to other
words. too_broad: words are added that fire twice as often in all. too_narrow: words are left that
fire a quarter as often; a unit of one word has no such explanation and is left out there."""

RATES = (0.003, 0.2)
"""Features with a share of words in this range are planted."""

N_CTX = 128


@dataclass(frozen=True, slots=True)
class Audit:
    """What a scorer made of true and false explanations."""

    scorer: str
    """Name of the scorer."""
    metric: str
    """Its headline, which is what ranks."""
    rows: tuple[dict[str, Any], ...]
    """`level`, `kind` of feature ("all" for all) and `false` explanation; `ranking`, the share of
    units whose true explanation scores above the false one, ties by half, with `ci_low` and
    `ci_high` (95 %, over units); for `false` "all" also `calibration`, the mean over units of
    Spearman's correlation of the scores with the F1 of the explanations against the planted
    feature; `n` units."""


@dataclass(frozen=True, slots=True)
class _Text:
    """Planted documents with their truth, word by word."""

    language: Language
    ids: Int[ndarray, " words"]
    docs: Int[ndarray, " words"]
    truth: Bool[ndarray, "words features"]
    kinds: tuple[str, ...]


def audit_scorer(
    name: str, *, n_documents: int = 600, seed: int = 0, progress: Progress = silent
) -> Audit:
    """Score true and false explanations of planted units, in a store that is thrown away.

    Args:
        name: A scorer of explanations that needs neither a language model nor labels.
        n_documents: Documents of the planted language, half of them for scores.
        seed: Seed of the language, the noise and the false explanations.
        progress: Told how far the work is.

    Raises:
        ExplainError: No such scorer, or it scores no explanations, or needs more than a store.
    """
    scorer = find_scorer(name)
    if not set(scorer.needs) <= {"explanation", "program"} or not scorer.needs:
        from lmmono.scoring.scorers import SCORERS

        able = [n for n, each in SCORERS.items() if each.needs in (("explanation",), ("program",))]
        raise ExplainError(f"{name} scores no explanations by themselves; {nearest(name, able)}")
    text = _tell(n_documents, seed)
    folder = tempfile.TemporaryDirectory()
    with folder as place, astore.open(Path(place) / "audit", mode="w") as store:
        _write(store, text, seed)
        quality = _explain(store, text, seed)
        values = _scores(store, name, scorer.metrics[0], len(text.kinds), progress)
    return Audit(name, scorer.metrics[0], tuple(_rows(text.kinds, values, quality)))


def _tell(n_documents: int, seed: int) -> _Text:
    language = Language(seed)
    number = {word: i for i, word in enumerate(language.vocabulary)}
    told = [language.document(i) for i in range(n_documents)]
    ids = np.array([number[word] for each in told for word in each.words], np.int64)
    docs = np.repeat(np.arange(n_documents), [len(each.words) for each in told])
    whole = len(ids) // (2 * N_CTX) * 2 * N_CTX
    truth = np.concatenate([each.truth for each in told])[:whole]
    rates = truth.mean(axis=0)
    kept = np.flatnonzero((rates >= RATES[0]) & (rates <= RATES[1]))
    kinds = tuple(language.features[i].kind for i in kept)
    return _Text(language, ids[:whole], docs[:whole], truth[:, kept], kinds)


def _write(store: astore.Store, text: _Text, seed: int) -> None:
    """Write a hook per level, half of the rows for each split."""
    store.add_vocabulary(_words(text))
    d = len(text.kinds)
    hooks = [_hook(level) for level in range(len(LEVELS))]
    rng = np.random.default_rng((seed, 1))
    other = rng.permutation(d)
    acts = [_fire(text.truth, other, *level, rng) for level in LEVELS.values()]
    rows = [astore.Rows(hook, d, max_density=1.0) for hook in hooks]
    shaped = (-1, N_CTX)
    ids, docs = text.ids.reshape(shaped), text.docs.reshape(shaped)
    middle = len(ids) // 2
    docs[middle:] += text.docs.max() + 1  # a document cut in two is two documents
    with store.writer(rows=rows, n_ctx=N_CTX, seed=seed) as writer:
        for split, part in (("explain", slice(0, middle)), ("score", slice(middle, None))):
            here = {h: a.reshape(*ids.shape, d)[part] for h, a in zip(hooks, acts, strict=True)}
            writer.add(np.arange(len(ids))[part], ids[part], docs[part], split, here)


def _hook(level: int) -> str:
    return f"blocks.{level}.mlp.hook_post"


def _fire(
    truth: Bool[ndarray, "words features"],
    other: Int[ndarray, " features"],
    noise: float,
    weight: float,
    rng: np.random.Generator,
) -> Float[ndarray, "words features"]:
    """Return activations: 1 on the feature, `weight` on another, with firing lost and added."""
    acts = np.maximum(truth, weight * truth[:, other]).astype(np.float32)
    if noise:
        draws = rng.random(acts.shape, np.float32)
        lost, added = draws < noise, draws < noise * truth.mean(axis=0)
        size = rng.lognormal(0.0, noise, acts.shape).astype(np.float32)
        acts = np.where(acts > 0, np.where(lost, 0, acts * size), np.where(added, size, 0))
    return acts.astype(np.float32)


def _explain(store: astore.Store, text: _Text, seed: int) -> Float[ndarray, "features said"]:
    """Add true and false explanations of every unit; return the F1 of each, NaN if not false."""
    n_words = len(text.language.vocabulary)
    counts = np.bincount(text.ids, minlength=n_words).astype(float)
    hits = np.stack([np.bincount(text.ids, w, n_words) for w in text.truth.T.astype(float)])
    shares = hits / np.maximum(counts, 1)
    rng, rows, words = np.random.default_rng((seed, 2)), list[dict[str, Any]](), _words(text)
    quality = np.zeros((len(shares), 1 + len(FALSE)))
    for unit, share in enumerate(shares):
        others = np.delete(shares, unit, axis=0)
        said = [share, others[rng.integers(len(others))]]
        said += [make(share, counts, rng) for make in (_near_miss, _broad, _narrow)]
        quality[unit] = [_f1(each, hits[unit], counts) for each in said]
        quality[unit, 1:][[bool((each == share).all()) for each in said[1:]]] = np.nan
        for name, each in zip(("true", *FALSE), said, strict=True):
            rows += _explanations(unit, name, each, words, seed)
    store.append("explanations", rows)
    return quality


def _words(text: _Text) -> tuple[str, ...]:
    """Return the words as the store has them."""
    return tuple(f" {word}" for word in text.language.vocabulary)


def _explanations(
    unit: int, name: str, share: ndarray, words: tuple[str, ...], seed: int
) -> list[dict[str, Any]]:
    fired = np.flatnonzero(share)
    program = Lookup(fired, share[fired], 0.0)
    said = lookup_text(program, words)
    return [
        Explanation(_hook(level), unit, f"planted_{name}", said, program, seed=seed).row()
        for level in range(len(LEVELS))
    ]


Words = Float[ndarray, " words"]
Make = Callable[[Words, Words, np.random.Generator], Words]


def _near_miss(share: Words, counts: Words, rng: np.random.Generator) -> Words:
    """Move half of the firing to words that do not fire."""
    kept = _part(share, counts, 0.5, rng)
    lost = float(((share - kept) * counts).sum())
    return kept + _added(share, counts, lost, rng)


def _broad(share: Words, counts: Words, rng: np.random.Generator) -> Words:
    """Add words that fire twice as often in all."""
    return share + _added(share, counts, 2 * float((share * counts).sum()), rng)


def _narrow(share: Words, counts: Words, rng: np.random.Generator) -> Words:
    """Keep words that carry a quarter of the firing, at least one; a single word stays."""
    return _part(share, counts, 0.25, rng)


def _part(share: Words, counts: Words, of: float, rng: np.random.Generator) -> Words:
    order = rng.permutation(np.flatnonzero(share))
    mass = np.cumsum((share * counts)[order])
    kept = order[mass <= of * mass[-1]]
    kept = kept if len(kept) else order[np.argsort((share * counts)[order])[:1]]
    return np.where(np.isin(np.arange(len(share)), kept), share, 0.0)


def _added(share: Words, counts: Words, mass: float, rng: np.random.Generator) -> Words:
    """Return silent words, drawn until they occur so often in all, each with activation 1."""
    silent_words = rng.permutation(np.flatnonzero((share == 0) & (counts > 0)))
    n = int(np.searchsorted(np.cumsum(counts[silent_words]), mass)) + 1
    return np.isin(np.arange(len(share)), silent_words[:n]).astype(float)


def _f1(said: Words, hits: Words, counts: Words) -> float:
    """Return the F1 of the words that an explanation names by more than half, token by token."""
    named = said > 0.5 * said.max()
    return float(2 * hits[named].sum() / (counts[named].sum() + hits.sum()))


def _scores(
    store: astore.Store, name: str, metric: str, d: int, progress: Progress
) -> Float[ndarray, "levels features said"]:
    """Return the headline of every unit and explanation; 0 where it is not defined."""
    values = np.zeros((len(LEVELS), d, 1 + len(FALSE)))
    query = """SELECT hook, unit, coalesce(value, 0) FROM scores WHERE metric = $metric
        AND explainer = $explainer AND control IS NULL AND unit IS NOT NULL"""
    levels = {_hook(level): level for level in range(len(LEVELS))}
    for i, each in enumerate(("true", *FALSE)):
        explainer = f"planted_{each}"
        score(store, scorer=name, explainer=explainer, controls=False)
        for hook, unit, value in store.sql(query, metric=metric, explainer=explainer).fetchall():
            values[levels[hook], unit, i] = value
        progress(f"audit {name}", i + 1, 1 + len(FALSE))
    return values


def _rows(kinds: tuple[str, ...], values: ndarray, quality: ndarray) -> Iterator[dict[str, Any]]:
    """Yield a row per level, kind of feature and false explanation, those of all together first."""
    above = (values[:, :, :1] > values[:, :, 1:]) + 0.5 * (values[:, :, :1] == values[:, :, 1:])
    above = np.where(np.isnan(quality[:, 1:]), np.nan, above)
    for at, level in enumerate(LEVELS):
        agreement = np.array([_alike(v, q) for v, q in zip(values[at], quality, strict=True)])
        for kind in ("all", *dict.fromkeys(kinds)):
            mine = np.array([kind in ("all", each) for each in kinds])
            where = {"level": level, "kind": kind}
            calibration = float(agreement[mine].mean())
            whole = _ranking(np.nanmean(above[at][mine], axis=1))
            yield {**where, "false": "all", **whole, "calibration": calibration}
            for i, false in enumerate(FALSE):
                yield {**where, "false": false, **_ranking(above[at][mine, i]), "calibration": None}


def _alike(values: ndarray, quality: ndarray) -> float:
    """Return Spearman's correlation of scores and F1; 0 where either is constant."""
    there = ~np.isnan(quality)
    values, quality = values[there], quality[there]
    constant = np.ptp(values) == 0 or np.ptp(quality) == 0
    return 0.0 if constant else float(spearmanr(values, quality)[0])  # pyright: ignore[reportArgumentType]


def _ranking(wins: Float[ndarray, " units"]) -> dict[str, float | None]:
    """Return the share of wins with its interval, among the units that have both explanations."""
    wins = wins[~np.isnan(wins)]
    if not len(wins):
        return {"ranking": None, "ci_low": None, "ci_high": None, "n": 0}
    value, low, high = mean_interval([wins])
    ends = (None, None) if np.isnan(low) else (max(low, 0.0), min(high, 1.0))
    return {"ranking": value, "ci_low": ends[0], "ci_high": ends[1], "n": len(wins)}
