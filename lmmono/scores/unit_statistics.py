"""Statistics of units that need no explanation, from the stored activations alone.

Each is measured on split `score` with a jackknife over groups of documents. What has to be chosen,
such as the token a unit likes best, is chosen on split `explain`, so that few firings do not make
a unit look pure. Control `shuffled`: the same activations at the same positions of another row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.stats import t as student_t

from lmmono.records.corpus_excerpts import PADDING, TokenGrid, read_grid
from lmmono.records.unit_rows import UnitRows, read_unit_rows
from lmmono.records.units import checked_units
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.stats.formulas import entropies, kurtosis
from lmmono.types import Split

N_GROUPS = 10
"""Groups of documents that are left out in turn, fewer where there are fewer documents."""

MASS_CELLS = 16_000_000
"""Sums per unit, group and token held together: 0.13 GB."""

STRONG = 0.5
"""An activation is strong where it is this share of the unit's maximum on the explain split."""

METHOD = "jackknife over groups of documents"

Parts = Float[ndarray, "units parts"]
"""A value over all documents, then without each group of them."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The tokens of a split, their groups of documents, and what stands before them."""

    grid: TokenGrid
    groups: Int[ndarray, " cells"]
    """Group of each cell; `n_groups` where there is no token."""
    n_groups: int
    n_tokens: Float[ndarray, " groups"]

    def n(self) -> Float[ndarray, " parts"]:
        """Return the number of tokens, of all and without each group."""
        return np.append(self.n_tokens.sum(), self.n_tokens.sum() - self.n_tokens)

    @property
    def n_documents(self) -> int:
        """Documents of the split."""
        return len(np.unique(self.grid.doc_ids[self.grid.doc_ids >= 0]))

    def moved(self, cells: Int[ndarray, " rows"]) -> Int[ndarray, " rows"]:
        """Return the cells at the same positions half of the rows further on."""
        half = len(self.grid.seq_ids) // 2 * self.grid.n_ctx
        return (cells + half) % len(self.grid.token_ids)

    def ngrams(self, n: int) -> Int[ndarray, " cells"]:
        """Return a number for each n-gram that ends at a cell; -1 where the document is shorter."""
        ids, docs = self.grid.token_ids.astype(np.int64), self.grid.doc_ids
        key, whole = ids.copy(), ids >= 0
        pos = np.arange(len(ids)) % self.grid.n_ctx
        for back in range(1, n):
            before = np.roll(ids, back)
            whole &= (pos >= back) & (np.roll(docs, back) == docs)
            key += before * (int(ids.max()) + 1) ** back
        return np.where(whole, key, -1)


def read_corpus(job: ScoreJob, split: Split) -> Corpus:
    """Read the tokens of a split.

    Raises:
        ExplainError: The store has none.
    """
    grid = read_grid(job.store, split)
    known, rank = np.unique(grid.doc_ids, return_inverse=True)
    first = int(known[0] < 0)
    n_groups = min(N_GROUPS, len(known) - first)
    groups = np.where(grid.doc_ids >= 0, (rank - first) % n_groups, n_groups)
    n_tokens = np.bincount(groups, minlength=n_groups + 1)[:n_groups].astype(np.float64)
    return Corpus(grid, groups, n_groups, n_tokens)


def jackknife(values: Parts) -> tuple[Float[ndarray, " units"], Float[ndarray, " units"]]:
    """Return the 95 % interval from delete-a-group values, Student's t; NaN with one group."""
    left_out = values[:, 1:]
    n = left_out.shape[1]
    if n < 2:
        nothing = np.full(len(values), np.nan)
        return nothing, nothing
    spread = left_out - left_out.mean(axis=1, keepdims=True)
    error = np.sqrt((n - 1) / n * np.square(spread).sum(axis=1))
    half = float(student_t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return values[:, 0] - half, values[:, 0] + half


def with_each_left_out(sums: Float[ndarray, "units groups *rest"]) -> ndarray:
    """Return the sum over groups, then the sums without each group, along the second axis."""
    total = sums.sum(axis=1, keepdims=True)
    return np.concatenate([total, total - sums], axis=1)


def score_statistics(job: ScoreJob) -> list[Row]:
    """Score units by all statistics in two passes over the store, one of each split."""
    units = checked_units(job.store, job.hook, job.units)
    corpus = read_corpus(job, "score")
    learned = _Favourites.learn(job, units)
    query = "SELECT unit, kurtosis, min_act FROM unit_stats WHERE hook = $hook"
    stats = {row[0]: row[1:] for row in job.store.sql(query, hook=job.hook).fetchall()}
    (threshold,) = job.store.sql(
        "SELECT coalesce(any_value(threshold), 0.0) FROM hooks WHERE hook = $hook", hook=job.hook
    ).fetchall()[0]
    rows: list[Row] = []
    for chunk in _read(job, units, corpus):
        whole = [_is_whole(stats.get(int(unit)), threshold) for unit in chunk.units]
        values = _moments(chunk, corpus, np.array(whole))
        values["token_entropy", None], values["token_entropy", "shuffled"] = _entropy(chunk, corpus)
        values |= learned.shares(chunk, corpus)
        rows += _rows(job, chunk, corpus, values)
    for row in rows:
        found = stats.get(row["unit"])
        if row["metric"] == "unit_kurtosis" and row["value"] is None and found and found[0]:
            row |= {"value": found[0], "split": None, "failure": None, "n_failures": 0}
            row |= {"n": None, "details": {"source": "unit_stats: all splits, negative acts too"}}
    return [row for row in rows if job.controls or row["control"] is None]


def _is_whole(stats: tuple[float | None, float | None] | None, threshold: float | None) -> bool:
    """Return whether what is not stored is 0, so that moments follow from what is."""
    return stats is not None and (stats[1] or 0.0) >= 0 and not threshold


def _read(job: ScoreJob, units: ndarray, corpus: Corpus) -> Iterator[UnitRows]:
    d_vocab = int(corpus.grid.token_ids.max()) + 1
    at_once = max(1, MASS_CELLS // (d_vocab * corpus.n_groups))
    return read_unit_rows(job.store, job.hook, units, corpus.grid, units_at_once=min(at_once, 512))


def _slots(rows: UnitRows) -> Int[ndarray, " rows"]:
    return np.repeat(np.arange(len(rows.units)), np.diff(rows.starts))


def _moments(rows: UnitRows, corpus: Corpus, whole: ndarray) -> dict[tuple[str, str | None], Parts]:
    """Return density, kurtosis and monosemanticity scale."""
    shape = (len(rows.units), corpus.n_groups)
    key = _slots(rows) * corpus.n_groups + corpus.groups[rows.cells]
    acts = rows.acts.astype(np.float64)
    powers = [
        with_each_left_out(np.bincount(key, acts**p, shape[0] * shape[1]).reshape(shape))
        for p in range(5)
    ]
    n = corpus.n()
    fourth = np.stack([each / n for each in powers[1:]])
    sharp = kurtosis(1.0, fourth.reshape(4, -1)).reshape(fourth.shape[1:])
    scale = _scales(rows, corpus, fourth[0], fourth[1] - fourth[0] ** 2)
    not_whole = ~whole[:, None]
    return {
        ("unit_density", None): powers[0] / n,
        ("unit_kurtosis", None): np.where(not_whole, np.nan, sharp),
        ("monosemanticity_scale", None): np.where(not_whole, np.nan, scale),
    }


def _scales(rows: UnitRows, corpus: Corpus, means: Parts, variances: Parts) -> Parts:
    """Return the mean of (z - mean)^2 / variance over the 1 % of tokens with the largest z."""
    found = np.full(means.shape, np.nan)
    wanted = np.ceil(0.01 * corpus.n()).astype(int)
    for i in range(len(rows.units)):
        cells, acts = rows.of(i)
        order = np.argsort(-acts)
        acts, groups = acts[order].astype(np.float64), corpus.groups[cells][order]
        for part, k in enumerate(wanted):
            top = (acts if part == 0 else acts[groups != part - 1])[:k]
            mean, variance = means[i, part], variances[i, part]
            if variance > 0:
                total = np.square(top - mean).sum() + (k - len(top)) * mean**2
                found[i, part] = total / k / variance
    return found


def _entropy(rows: UnitRows, corpus: Corpus) -> tuple[Parts, Parts]:
    """Return the entropy of the token under each unit's activation mass, true and shuffled."""
    d_vocab = int(corpus.grid.token_ids.max()) + 1
    shape = (len(rows.units), corpus.n_groups, d_vocab)
    start = (_slots(rows) * corpus.n_groups + corpus.groups[rows.cells]) * d_vocab
    found: list[Parts] = []
    for cells in (rows.cells, corpus.moved(rows.cells)):
        tokens = corpus.grid.token_ids[cells]
        there = tokens != PADDING
        key, weight = start[there] + tokens[there], rows.acts[there]
        mass = np.bincount(key, weight, int(np.prod(shape))).reshape(shape)
        total = mass.sum(axis=1)
        parts = [entropies(total)]
        parts += [entropies(np.maximum(total - mass[:, g], 0)) for g in range(corpus.n_groups)]
        found.append(np.stack(parts, axis=1))
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class _Favourites:
    """What each unit likes best, chosen on the explain split."""

    least: dict[int, float]
    """Least strong activation of each unit; missing where it is silent."""
    liked: dict[tuple[str, str | None], dict[int, int]]
    """N-gram that most strong activations end, by metric and control."""
    lengths: dict[str, int]

    @classmethod
    def learn(cls, job: ScoreJob, units: ndarray) -> "_Favourites":
        lengths = {"token_purity": 1, "ngram_consistency": int(job.settings["ngram"])}
        corpus = read_corpus(job, "explain")
        known = _named_ngrams(corpus, lengths)
        least: dict[int, float] = {}
        liked: dict[tuple[str, str | None], dict[int, int]] = {key: {} for key in known}
        for rows in read_unit_rows(job.store, job.hook, units, corpus.grid):
            for i, unit in enumerate(rows.units.tolist()):
                cells, acts = rows.of(i)
                if len(acts):
                    least[unit] = STRONG * float(acts.max())
                    strong = cells[acts >= least[unit]]
                    for key, ngrams in known.items():
                        found, n = np.unique(ngrams(strong), return_counts=True)
                        n[found < 0] = 0
                        liked[key][unit] = int(found[n.argmax()])
        return cls(least, liked, lengths)

    def shares(self, rows: UnitRows, corpus: Corpus) -> dict[tuple[str, str | None], Parts]:
        """Return the share of strong activations that end what the unit likes best."""
        known = _named_ngrams(corpus, self.lengths)
        found = {key: np.full((len(rows.units), corpus.n_groups + 1), np.nan) for key in known}
        for i, unit in enumerate(rows.units.tolist()):
            cells, acts = rows.of(i)
            if unit in self.least:
                strong = cells[acts >= self.least[unit]]
                groups = corpus.groups[strong]
                n = _counted(groups, corpus)
                for key, ngrams in known.items():
                    hits = _counted(groups[ngrams(strong) == self.liked[key][unit]], corpus)
                    found[key][i] = np.divide(hits, n, out=np.full_like(n, np.nan), where=n > 0)
        return found


def _named_ngrams(
    corpus: Corpus, lengths: dict[str, int]
) -> dict[tuple[str, str | None], Callable[[ndarray], ndarray]]:
    """Return, by metric and control, what gives the n-grams that end at cells."""
    known: dict[tuple[str, str | None], Callable[[ndarray], ndarray]] = {}
    for metric, n in lengths.items():
        ngrams = corpus.ngrams(n)
        known[metric, None] = ngrams.__getitem__
        known[metric, "shuffled"] = lambda cells, ngrams=ngrams: ngrams[corpus.moved(cells)]
    return known


def _counted(groups: ndarray, corpus: Corpus) -> Float[ndarray, " parts"]:
    counts = np.bincount(groups, minlength=corpus.n_groups)[: corpus.n_groups].astype(np.float64)
    return with_each_left_out(counts[None])[0]


_BOUNDS = {
    "unit_density": (0.0, 1.0),
    "unit_kurtosis": (1.0, np.inf),
    "monosemanticity_scale": (0.0, np.inf),
    "token_entropy": (0.0, np.inf),
    "token_purity": (0.0, 1.0),
    "ngram_consistency": (0.0, 1.0),
}


def _rows(
    job: ScoreJob, rows: UnitRows, corpus: Corpus, values: dict[tuple[str, str | None], Parts]
) -> list[Row]:
    n_active = np.diff(rows.starts)
    found: list[Row] = []
    for (metric, control), parts in values.items():
        ends = [np.clip(end, *_BOUNDS[metric]) for end in jackknife(parts)]
        for i, unit in enumerate(rows.units.tolist()):
            columns = columns_of(parts[i, 0], ends[0][i], ends[1][i], METHOD)
            counts: Row = {"n": int(n_active[i]), "n_tokens": int(corpus.n_tokens.sum())}
            counts |= {"n_documents": corpus.n_documents, "control": control, "seed": None}
            found.append(job.row(metric, unit, **columns, **counts))
    return found


def columns_of(value: float, low: float, high: float, method: str) -> Row:
    """Return the columns of a value and its interval; a value that is NaN is a failure, silent."""
    if np.isnan(value):
        return {"value": None, "n_failures": 1, "failure": "silent"}
    known = {"value": float(value), "n_failures": 0, "failure": None}
    if np.isnan(low) or np.isnan(high):
        return known
    return known | {"ci_low": float(low), "ci_high": float(high), "ci_method": method}
