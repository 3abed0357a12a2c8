"""True and false explanations of units whose meaning is known, as look-up tables of words.

The true one holds, for each word, how often it has the unit's feature. A feature that the word
alone does not decide has no complete look-up.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.lookup import Lookup, lookup_text
from lmmono.scores.known_units import Truth

FALSE = ("random", "near_miss", "too_broad", "too_narrow")
"""False explanations. random: of another feature. near_miss: half of the firing is moved to other
words. too_broad: words are added that fire twice as often in all. too_narrow: words are left that
fire a quarter as often; a unit of one word has no such explanation and is left out there."""

Words = Float[ndarray, " words"]
Make = Callable[[Words, Words, np.random.Generator], Words]


def name_of(said: str) -> str:
    """Return the explainer that explanations of a kind are stored under; `true` for true ones."""
    return f"planted_{said}"


def add_explanations(store: astore.Store, truth: Truth, seed: int) -> Float[ndarray, "units said"]:
    """Add true and false explanations of every unit; return the F1 of each, NaN if not false."""
    counts, hits = truth.counts, truth.hits
    shares = hits / np.maximum(counts, 1)
    rng, rows = np.random.default_rng((seed, 2)), list[dict[str, Any]]()
    quality = np.zeros((len(truth.units), 1 + len(FALSE)))
    for i, unit in enumerate(truth.units):
        share, others = shares[unit.feature], np.delete(shares, unit.feature, axis=0)
        said = [share, others[rng.integers(len(others))]]
        said += [make(share, counts, rng) for make in (near_miss, broad, narrow)]
        quality[i] = [_f1(each, hits[unit.feature], counts) for each in said]
        quality[i, 1:][[bool((each == share).all()) for each in said[1:]]] = np.nan
        for name, each in zip(("true", *FALSE), said, strict=True):
            fired = np.flatnonzero(each)
            program = Lookup(fired, each[fired], 0.0)
            text = lookup_text(program, truth.words)
            found = Explanation(unit.hook, unit.unit, name_of(name), text, program, seed=seed)
            rows.append(found.row())
    store.append("explanations", rows)
    return quality


def near_miss(share: Words, counts: Words, rng: np.random.Generator) -> Words:
    """Move half of the firing to words that do not fire."""
    kept = _part(share, counts, 0.5, rng)
    lost = float(((share - kept) * counts).sum())
    return kept + _added(share, counts, lost, rng)


def broad(share: Words, counts: Words, rng: np.random.Generator) -> Words:
    """Add words that fire twice as often in all."""
    return share + _added(share, counts, 2 * float((share * counts).sum()), rng)


def narrow(share: Words, counts: Words, rng: np.random.Generator) -> Words:
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
