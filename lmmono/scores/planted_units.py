"""Units whose meaning is known, with true and false explanations of them.

Planted units are exact functions of features of the planted language: as they are, with noise, in
superposition with another feature, or both. A trained model's neuron is taken to mean the feature
that it tells best, by mutual information and once more by AUROC, where that is much; what it fires
on besides stays in it. Not by Pearson: simulation, which is Pearson, would rank its own choice.

Explanations are look-up tables of words. The true one holds, for each word, how often it has the
unit's feature. A feature that the word alone does not decide has no complete look-up.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.stats import rankdata

import activation_store as astore
from lmmono.captures.capture import capture
from lmmono.data.planted import Language
from lmmono.data.tokens import TokenRows
from lmmono.data.truth import planted_language, row_truth
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.token_lookup import Lookup, lookup_text
from lmmono.records.seeds import stream
from lmmono.runs.folder import Run

LEVELS: dict[str, tuple[float, float]] = {
    "exact": (0.0, 0.0),
    "noise 0.3": (0.3, 0.0),
    "superposed 0.5": (0.0, 0.5),
    "noise 0.3, superposed 0.5": (0.3, 0.5),
}
"""Noise (share of firing lost, and as much falsely added) and weight of a second feature."""

RATES = (0.003, 0.2)
"""Features with a share of words in this range are looked at."""

CRITERIA: dict[str, tuple[str, float]] = {
    "mutual_information": ("trained, by mutual information", 0.3),
    "auroc": ("trained, by AUROC", 0.9),
}
"""How a trained neuron's meaning is chosen: the level that its units get, and the least value.
Mutual information is a share of the feature's entropy."""

N_LEVELS = 10
"""Levels of activation that mutual information tells apart, silence among them."""

N_CTX = 128

FALSE = ("random", "near_miss", "too_broad", "too_narrow")
"""False explanations. random: of another feature. near_miss: half of the firing is moved to other
words. too_broad: words are added that fire twice as often in all. too_narrow: words are left that
fire a quarter as often; a unit of one word has no such explanation and is left out there."""

Words = Float[ndarray, " words"]


@dataclass(frozen=True, slots=True)
class KnownUnit:
    """One unit of known meaning."""

    hook: str
    unit: int
    level: str
    """What it is: a level of planted noise, or `trained`."""
    feature: int
    """Row of the features."""
    kind: str
    """Kind of the feature."""
    criterion: str = ""
    """How its meaning was chosen; empty where it was planted."""


@dataclass(frozen=True, slots=True)
class KnownUnits:
    """Units of known meaning, and how often each word has each feature."""

    units: tuple[KnownUnit, ...]
    words: tuple[str, ...]
    """String of each token id."""
    counts: Float[ndarray, " words"]
    """Tokens of each word in the text."""
    hits: Float[ndarray, "features words"]
    """Those of them that have the feature."""


def write_planted(store: astore.Store, n_documents: int, seed: int) -> KnownUnits:
    """Write units that are functions of features, a hook per level, into an empty store."""
    language = Language(seed)
    number = {word: i for i, word in enumerate(language.vocabulary)}
    documents = [language.document(i) for i in range(n_documents)]
    ids = np.array([number[word] for document in documents for word in document.words], np.int64)
    docs = np.repeat(np.arange(n_documents), [len(document.words) for document in documents])
    whole = len(ids) // (2 * N_CTX) * 2 * N_CTX
    truth = np.concatenate([document.truth for document in documents])[:whole]
    kept = _frequent(truth)
    words = tuple(f" {word}" for word in language.vocabulary)
    store.add_vocabulary(words)
    _write(store, ids[:whole], docs[:whole], truth[:, kept], seed)
    kinds = [language.features[i].kind for i in kept]
    units = [
        KnownUnit(_hook(at), i, level, i, kind)
        for at, level in enumerate(LEVELS)
        for i, kind in enumerate(kinds)
    ]
    return _truth(tuple(units), words, ids[:whole], truth[:, kept])


def write_trained(store: astore.Store, run: Run, max_tokens: int, seed: int) -> KnownUnits:
    """Write the neurons of a run on the planted language; those that follow a feature are known.

    Which feature that is, split `explain` decides.

    Raises:
        DataError: The run's corpus is not a planted one.
        ModelError: The model has no neurons.
    """
    language = planted_language(run.corpus)
    parts = [run.tokens(split).limit(max_tokens) for split in ("explain", "score")]
    settings: dict[str, Any] = {"max_density": 1.0, "top_k": 1, "random_k": 1, "quantile_k": 1}
    capture(run.model, parts, hooks="blocks.*.mlp.hook_post", into=store, seed=seed, **settings)
    ids = parts[0].ids.reshape(-1).astype(np.int64)
    truth = row_truth(run.corpus, parts[0]).reshape(len(ids), -1)
    kept = _frequent(truth)
    truth, units = truth[:, kept], list[KnownUnit]()
    widths = store.sql("SELECT hook, d FROM hooks WHERE kind = 'rows' ORDER BY hook").fetchall()
    for hook, d in widths:
        acts = _dense(store, hook, d, parts[0])
        for criterion, measure in (
            ("mutual_information", information_shares),
            ("auroc", feature_areas),
        ):
            level, least = CRITERIA[criterion]
            alike = measure(acts, truth)
            best = alike.argmax(axis=1)
            for unit in np.flatnonzero(alike.max(axis=1) >= least).tolist():
                feature = int(best[unit])
                kind = language.features[kept[feature]].kind
                units.append(KnownUnit(hook, unit, level, feature, kind, criterion))
    words = store.sql("SELECT token FROM vocabulary ORDER BY token_id").fetchall()
    return _truth(tuple(units), tuple(str(word) for (word,) in words), ids, truth)


def _frequent(truth: Bool[ndarray, "tokens features"]) -> Int[ndarray, " kept"]:
    rates = truth.mean(axis=0)
    return np.flatnonzero((rates >= RATES[0]) & (rates <= RATES[1]))


def _truth(
    units: tuple[KnownUnit, ...],
    words: tuple[str, ...],
    ids: Int[ndarray, " tokens"],
    truth: Bool[ndarray, "tokens features"],
) -> KnownUnits:
    counts = np.bincount(ids, minlength=len(words)).astype(float)
    hits = [np.bincount(ids, of_feature, len(words)) for of_feature in truth.T.astype(float)]
    return KnownUnits(units, words, counts, np.stack(hits))


def _hook(level: int) -> str:
    return f"blocks.{level}.mlp.hook_post"


def _write(
    store: astore.Store,
    ids: Int[ndarray, " tokens"],
    docs: Int[ndarray, " tokens"],
    truth: Bool[ndarray, "tokens features"],
    seed: int,
) -> None:
    """Write a hook per level, half of the rows for each split."""
    d = truth.shape[1]
    hooks = [_hook(level) for level in range(len(LEVELS))]
    rng = stream("known units", seed)
    other = rng.permutation(d)
    acts = [_fire(truth, other, *level, rng) for level in LEVELS.values()]
    rows = [astore.Rows(hook, d, max_density=1.0) for hook in hooks]
    ids, docs = ids.reshape(-1, N_CTX), docs.reshape(-1, N_CTX).copy()
    middle = len(ids) // 2
    docs[middle:] += docs.max() + 1  # a document cut in two is two documents
    with store.writer(rows=rows, n_ctx=N_CTX, seed=seed) as writer:
        for split, part in (("explain", slice(0, middle)), ("score", slice(middle, None))):
            by_hook = {h: a.reshape(*ids.shape, d)[part] for h, a in zip(hooks, acts, strict=True)}
            writer.add(np.arange(len(ids))[part], ids[part], docs[part], split, by_hook)


def _fire(
    truth: Bool[ndarray, "tokens features"],
    other: Int[ndarray, " features"],
    noise: float,
    weight: float,
    rng: np.random.Generator,
) -> Float[ndarray, "tokens features"]:
    """Return activations: 1 on the feature, `weight` on another, with firing lost and added."""
    acts = np.maximum(truth, weight * truth[:, other]).astype(np.float32)
    if noise:
        draws = rng.random(acts.shape, np.float32)
        lost, added = draws < noise, draws < noise * truth.mean(axis=0)
        size = rng.lognormal(0.0, noise, acts.shape).astype(np.float32)
        acts = np.where(acts > 0, np.where(lost, 0, acts * size), np.where(added, size, 0))
    return acts.astype(np.float32)


def _dense(
    store: astore.Store, hook: str, d: int, rows: TokenRows
) -> Float[ndarray, "tokens units"]:
    """Return the activations of a hook on rows of tokens, 0 where none is stored."""
    query = """SELECT seq_id, pos, unit, act FROM acts
        WHERE hook = $hook AND seq_id BETWEEN $first AND $last"""
    seq_ids, n_ctx = rows.seq_ids, rows.n_ctx
    limits = {"first": int(seq_ids[0]), "last": int(seq_ids[-1])}
    columns = store.sql(query, hook=hook, **limits).fetchnumpy()
    seq, pos, unit, act = (np.asarray(columns[name]) for name in ("seq_id", "pos", "unit", "act"))
    dense = np.zeros((rows.ids.size, d), np.float32)
    wanted = np.isin(seq, seq_ids)  # the store may hold further rows
    dense[np.searchsorted(seq_ids, seq[wanted]) * n_ctx + pos[wanted], unit[wanted]] = act[wanted]
    return dense


def information_shares(
    acts: Float[ndarray, "tokens units"], truth: Bool[ndarray, "tokens features"]
) -> Float[ndarray, "units features"]:
    """Return the mutual information of every unit and feature, as a share of the feature's entropy.

    Activations count as silence or one of equally full levels.
    """
    n, present = len(acts), truth.astype(np.float64)
    joint = np.zeros((N_LEVELS, acts.shape[1], truth.shape[1]))
    sizes = np.zeros((N_LEVELS, acts.shape[1]))
    inner = np.linspace(0, 1, N_LEVELS)[1:-1]
    levels = np.zeros(acts.shape, np.int64)
    for unit in range(acts.shape[1]):
        fires = acts[:, unit] > 0
        if fires.any():
            edges = np.quantile(acts[fires, unit], inner)
            levels[fires, unit] = 1 + np.searchsorted(edges, acts[fires, unit], side="right")
    for level in range(N_LEVELS):
        is_here = (levels == level).astype(np.float64)
        joint[level], sizes[level] = is_here.T @ present, is_here.sum(axis=0)
    rate = present.mean(axis=0)
    information = np.zeros(joint.shape[1:])
    for count, of_truth in ((joint, rate), (sizes[..., None] - joint, 1 - rate)):
        share = count / n
        independent = sizes[..., None] / n * of_truth
        is_any = count > 0
        ratio = np.where(is_any, share, 1.0) / np.where(is_any, independent, 1.0)
        information += (share * np.log(ratio)).sum(axis=0)
    entropy = -(rate * np.log(np.maximum(rate, 1e-300)))
    entropy -= (1 - rate) * np.log(np.maximum(1 - rate, 1e-300))
    return information / np.maximum(entropy, 1e-12)


def feature_areas(
    acts: Float[ndarray, "tokens units"], truth: Bool[ndarray, "tokens features"]
) -> Float[ndarray, "units features"]:
    """Return P(act with the feature > act without it), ties by half; 0.5 if it is never there."""
    ranks = rankdata(acts, axis=0)
    n_true = truth.sum(axis=0)
    pairs = n_true * (len(truth) - n_true)
    above = ranks.T @ truth.astype(np.float64) - n_true * (n_true + 1) / 2
    return np.where(pairs > 0, above / np.maximum(pairs, 1), 0.5)


def explainer_of(kind: str, criterion: str = "") -> str:
    """Return the explainer that explanations of a kind are stored under; `true` for true ones."""
    return f"planted_{kind}_{criterion}" if criterion else f"planted_{kind}"


def add_explanations(
    store: astore.Store, truth: KnownUnits, seed: int
) -> Float[ndarray, "units kinds"]:
    """Add true and false explanations of every unit; return the F1 of each, NaN if not false."""
    counts, hits = truth.counts, truth.hits
    shares = hits / np.maximum(counts, 1)
    rng, rows = stream("false explanations", seed), list[dict[str, Any]]()
    quality = np.zeros((len(truth.units), 1 + len(FALSE)))
    for i, unit in enumerate(truth.units):
        share, others = shares[unit.feature], np.delete(shares, unit.feature, axis=0)
        tables = [share, others[rng.integers(len(others))]]
        tables += [make(share, counts, rng) for make in (near_miss, broad, narrow)]
        quality[i] = [_f1(table, hits[unit.feature], counts) for table in tables]
        is_true = [bool((table == share).all()) for table in tables[1:]]
        quality[i, 1:][is_true] = np.nan
        for kind, table in zip(("true", *FALSE), tables, strict=True):
            fired = np.flatnonzero(table)
            program = Lookup(fired, table[fired], 0.0)
            text = lookup_text(program, truth.words)
            named = (unit.hook, unit.unit, explainer_of(kind, unit.criterion))
            rows.append(Explanation(*named, text, program, seed=seed).row())
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


def _f1(table: Words, hits: Words, counts: Words) -> float:
    """Return the F1 of the words that an explanation names by more than half, token by token."""
    named = table > 0.5 * table.max()
    return float(2 * hits[named].sum() / (counts[named].sum() + hits.sum()))
