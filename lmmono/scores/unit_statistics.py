"""Statistics of units that need no explanation, from the stored activations alone.

Each is measured on split `score`, the interval over documents. What has to be chosen, such as the
token a unit likes best, is chosen on split `explain`, so that few firings do not make a unit look
pure. Control `shuffled`: the same activations at the same positions of another row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from activation_store.compiled import compiled
from lmmono.records.corpus_excerpts import TokenGrid, left_out_cells, read_grid
from lmmono.records.unit_rows import UnitRows, read_unit_rows
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import StatisticsSettings
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.stats.formulas import entropies, kurtosis
from lmmono.stats.intervals import jackknife_interval, ratio_interval
from lmmono.types import Split

N_GROUPS = 10
"""Groups of documents that are left out in turn, fewer where there are fewer documents: nine tenths
of the firing predict the tenth, and a jackknife of ten has nine degrees of freedom."""

UNITS_AT_ONCE = 512
"""Units read together, as elsewhere: within the rows that `read_unit_rows` holds in memory."""

STRONG = 0.5
"""An activation is strong where it is this share of the unit's maximum on the explain split."""

METHOD = "jackknife over groups of documents"
RATIO_METHOD = "delta method over documents that fire, four more added (Agresti and Coull)"
SELECTIVITY_METHOD = (
    "delta method over documents that fire, two without selectivity added; upper end from the "
    "entropy of the sample, which is too low"
)

SHARES_OF_TEXT = (1.0, 0.7, 0.4, 0.2, 0.07, 0.02)
"""How much of a prediction comes from the frequencies of all text: 1 for units that fire anywhere,
0.02 still gives an unseen token a chance. Even steps in the logarithm; of each group, the share
that predicts the other groups best."""

Parts = Float[ndarray, "units parts"]
"""A value over all documents, then without each group of them."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The tokens of a split, their documents and groups of documents."""

    grid: TokenGrid
    documents: Int[ndarray, " cells"]
    """Rank of each cell's document, from 0; -1 where no token counts."""
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
        return int(self.documents.max()) + 1

    def moved(self, cells: Int[ndarray, " rows"]) -> Int[ndarray, " rows"]:
        """Return the cells at the same positions half of the rows further on."""
        half = len(self.grid.seq_ids) // 2 * self.grid.n_ctx
        return (cells + half) % len(self.grid.token_ids)

    def ngrams(self, n: int) -> Int[ndarray, " cells"]:
        """Return a number for each n-gram that ends at a cell; -1 where the document is shorter."""
        ids, docs = self.grid.token_ids.astype(np.int64), self.grid.doc_ids
        key, is_whole = ids.copy(), ids >= 0
        pos = np.arange(len(ids)) % self.grid.n_ctx
        for back in range(1, n):
            before = np.roll(ids, back)
            is_whole &= (pos >= back) & (np.roll(docs, back) == docs)
            key += before * (int(ids.max()) + 1) ** back
        return np.where(is_whole, key, -1)


def read_corpus(job: ScoreJob, split: Split | None) -> Corpus:
    """Read the tokens of a split, without those that the capture left out; None reads all splits.

    Raises:
        ExplainError: The store has none.
    """
    grid = read_grid(job.store, split)
    left_out = left_out_cells(job.store, job.hook, grid)
    doc_ids = grid.doc_ids if left_out is None else np.where(left_out, -1, grid.doc_ids)
    names, rank = np.unique(doc_ids, return_inverse=True)
    has_padding = int(names[0] < 0)
    documents = rank - has_padding
    n_groups = min(N_GROUPS, len(names) - has_padding)
    groups = np.where(documents >= 0, documents % n_groups, n_groups)
    n_tokens = np.bincount(groups, minlength=n_groups + 1)[:n_groups].astype(np.float64)
    return Corpus(grid, documents, groups, n_groups, n_tokens)


def with_each_left_out(sums: Float[ndarray, "units groups *rest"]) -> ndarray:
    """Return the sum over groups, then the sums without each group, along the second axis."""
    total = sums.sum(axis=1, keepdims=True)
    return np.concatenate([total, total - sums], axis=1)


# ---- moments, and shares of what a unit likes best ----


def score_statistics(job: ScoreJob) -> list[Row]:
    """Score units by all statistics in two passes over the store, one of each split."""
    units = checked_units(job.store, job.hook, job.units)
    corpus = read_corpus(job, "score")
    favourites = _Favourites.learn(job, units)
    whole = _WholeStatistics.read(job)
    rows: list[Row] = []
    for chunk in read_unit_rows(
        job.store, job.hook, units, corpus.grid, units_at_once=UNITS_AT_ONCE
    ):
        is_zero = np.array([whole.is_zero_where_not_stored(int(unit)) for unit in chunk.units])
        for metric, parts in _moments(chunk, corpus, is_zero).items():
            low, high = jackknife_interval(parts[:, 0], parts[:, 1:])
            ends = np.clip(low, *_BOUNDS[metric]), np.clip(high, *_BOUNDS[metric])
            for i in range(len(chunk.units)):
                columns = columns_of(parts[i, 0], ends[0][i], ends[1][i], METHOD)
                columns = whole.columns(metric, int(chunk.units[i])) or columns
                rows.append(_row(job, metric, chunk, i, corpus, columns))
        for (metric, control), shares in favourites.shares(chunk, corpus).items():
            for i, (value, low, high) in enumerate(shares):
                columns = columns_of(value, low, high, RATIO_METHOD) | {"control": control}
                rows.append(_row(job, metric, chunk, i, corpus, columns))
    return [row for row in rows if job.controls or row["control"] is None]


def _row(job: ScoreJob, metric: str, chunk: UnitRows, i: int, corpus: Corpus, columns: Row) -> Row:
    counts: Row = {
        "n": int(chunk.starts[i + 1] - chunk.starts[i]),
        "n_tokens": int(corpus.n_tokens.sum()),
        "n_documents": corpus.n_documents,
        "control": None,
        "seed": None,  # nothing is drawn
    }
    columns = {"split": corpus.grid.split} | columns
    return job.row(metric, int(chunk.units[i]), **counts | columns)


@dataclass(frozen=True, slots=True)
class _WholeStatistics:
    """What table `unit_stats` says of units: every token counts there, whatever is stored as acts.

    Acts are left out below the hook's threshold, negative ones where it is 0, below the unit's cut
    and, under `top_p`, all but the largest of a token. Moments of what is stored are then not
    those of the unit.
    """

    is_cut: bool
    """Whether not all acts above the threshold are stored."""
    threshold: float
    by_unit: dict[int, tuple[float | None, float | None, float | None]]
    """Density, kurtosis and least activation."""

    @classmethod
    def read(cls, job: ScoreJob) -> "_WholeStatistics":
        query = """SELECT any_value(top_p) IS NOT NULL OR EXISTS (
                FROM unit_stats u WHERE u.hook = $hook AND u.stored_from IS NOT NULL
            ), coalesce(any_value(threshold), 0.0)
            FROM hooks WHERE hook = $hook AND kind = 'rows'"""
        ((is_cut, threshold),) = job.store.sql(query, hook=job.hook).fetchall()
        query = "SELECT unit, density, kurtosis, min_act FROM unit_stats WHERE hook = $hook"
        rows = job.store.sql(query, hook=job.hook).fetchall()
        return cls(is_cut, threshold, {row[0]: row[1:] for row in rows})

    def is_zero_where_not_stored(self, unit: int) -> bool:
        """Return whether what is not stored of a unit is 0, so that moments follow from what is."""
        least = self.by_unit.get(unit, (None, None, None))[2]
        is_stored = unit in self.by_unit and not self.is_cut and self.threshold == 0
        return is_stored and (least or 0.0) >= 0

    def columns(self, metric: str, unit: int) -> Row | None:
        """Return the columns of a metric that does not follow from what is stored; or None."""
        density, kurtosis_of_all, _ = self.by_unit.get(unit, (None, None, None))
        if metric == "unit_density":
            follows, value = not self.is_cut and self.threshold >= 0, density
        else:
            follows, value = self.is_zero_where_not_stored(unit), kurtosis_of_all
        if follows or not density:
            return None
        if metric == "monosemanticity_scale" or value is None:
            return {"value": None, "n_failures": 1, "failure": "not_all_stored"}
        source = {"source": "unit_stats: all tokens of all splits"}
        return {"value": value, "split": None, "n_failures": 0, "n": None, "details": source}


def _moments(rows: UnitRows, corpus: Corpus, is_zero: ndarray) -> dict[str, Parts]:
    """Return density, kurtosis and monosemanticity scale."""
    shape = (len(rows.units), corpus.n_groups)
    slots = np.repeat(np.arange(len(rows.units)), np.diff(rows.starts))
    key = slots * corpus.n_groups + corpus.groups[rows.cells]
    acts = rows.acts.astype(np.float64)
    powers = [
        with_each_left_out(np.bincount(key, acts**p, shape[0] * shape[1]).reshape(shape))
        for p in range(5)
    ]
    n = corpus.n()
    means = np.stack([power / n for power in powers[1:]])
    sharp = kurtosis(1.0, means.reshape(4, -1)).reshape(means.shape[1:])
    scale = _scales(rows, corpus, means[0], means[1] - means[0] ** 2)
    return {
        "unit_density": powers[0] / n,
        "unit_kurtosis": np.where(is_zero[:, None], sharp, np.nan),
        "monosemanticity_scale": np.where(is_zero[:, None], scale, np.nan),
    }


def _scales(rows: UnitRows, corpus: Corpus, means: Parts, variances: Parts) -> Parts:
    """Return the mean of (z - mean)^2 / variance over the 1 % of tokens with the largest z."""
    scales = np.full(means.shape, np.nan)
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
                scales[i, part] = total / k / variance
    return scales


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
        lengths = {
            "token_purity": 1,
            "ngram_consistency": job.settings_as(StatisticsSettings).ngram,
        }
        corpus = read_corpus(job, "explain")
        readers = _ngram_readers(corpus, lengths)
        least: dict[int, float] = {}
        liked: dict[tuple[str, str | None], dict[int, int]] = {key: {} for key in readers}
        for rows in read_unit_rows(job.store, job.hook, units, corpus.grid):
            for i, unit in enumerate(rows.units.tolist()):
                cells, acts = rows.of(i)
                if len(acts):
                    least[unit] = STRONG * float(acts.max())
                    strong = cells[acts >= least[unit]]
                    for key, ngrams_at in readers.items():
                        ngrams, n = np.unique(ngrams_at(strong), return_counts=True)
                        n[ngrams < 0] = 0
                        liked[key][unit] = int(ngrams[n.argmax()])
        return cls(least, liked, lengths)

    def shares(
        self, rows: UnitRows, corpus: Corpus
    ) -> dict[tuple[str, str | None], Float[ndarray, "units three"]]:
        """Return the share of strong activations that end what the unit likes best, with ends."""
        readers = _ngram_readers(corpus, self.lengths)
        shares = {key: np.full((len(rows.units), 3), np.nan) for key in readers}
        for i, unit in enumerate(rows.units.tolist()):
            cells, acts = rows.of(i)
            strong = cells[acts >= self.least.get(unit, np.inf)]
            if not len(strong):
                continue
            _, document = np.unique(corpus.documents[strong], return_inverse=True)
            n = np.bincount(document).astype(np.float64)
            for key, ngrams_at in readers.items():
                is_liked = ngrams_at(strong) == self.liked[key][unit]
                hits = np.bincount(document, is_liked, len(n))
                low, high = ratio_interval(hits, n)
                share = hits.sum() / n.sum()
                shares[key][i] = share, min(max(low, 0.0), share), max(min(high, 1.0), share)
        return shares


def _ngram_readers(
    corpus: Corpus, lengths: dict[str, int]
) -> dict[tuple[str, str | None], Callable[[ndarray], ndarray]]:
    """Return, by metric and control, what gives the n-grams that end at cells."""
    readers: dict[tuple[str, str | None], Callable[[ndarray], ndarray]] = {}
    for metric, n in lengths.items():
        ngrams = corpus.ngrams(n)
        readers[metric, None] = ngrams.__getitem__
        readers[metric, "shuffled"] = lambda cells, ngrams=ngrams: ngrams[corpus.moved(cells)]
    return readers


_BOUNDS = {
    "unit_density": (0.0, 1.0),
    "unit_kurtosis": (1.0, np.inf),
    "monosemanticity_scale": (0.0, np.inf),
}


def columns_of(value: float, low: float, high: float, method: str) -> Row:
    """Return the columns of a value and its interval; a value that is NaN is a failure, silent."""
    if np.isnan(value):
        return {"value": None, "n_failures": 1, "failure": "silent"}
    columns = {"value": float(value), "n_failures": 0, "failure": None}
    if np.isnan(low) or np.isnan(high):
        return columns
    return columns | {"ci_low": float(low), "ci_high": float(high), "ci_method": method}


# ---- how much a unit's activation says about the token it is on ----


def score_token_selectivity(job: ScoreJob) -> list[Row]:
    """Score units by how few kinds of token carry their activation, on all tokens of the store.

    The value estimates 1 - H(token | act) / H(token): the entropy of the token under the unit's
    activation mass, against that of all captured tokens. 0 says the token does not matter, 1 says
    one token carries all; below 0 the unit fires on rarer tokens than text has.

    The entropy of a sample is too low, and the more so the fewer firings there are: a unit that
    fires ten times at random would seem to be at 0.5. So H(token | act) is a cross-entropy: each
    group of documents is predicted from the other nine,
        p(token) = (1 - s) mass of the token in the other groups + s frequency in all text,
    with the s of `SHARES_OF_TEXT` that predicts the others best (deleted interpolation, Jelinek and
    Mercer 1980). A cross-entropy is at least the entropy, so the value is too low if anything: for
    a unit on 50 tokens by 0.23 at 80 firings and by 0.01 at 1,000; nothing at both extremes. The
    upper end of the interval therefore starts from the entropy of the sample. Coverage at 6 to
    1,000 firings, random, half or all on one token: 0.935 to 1 (benchmarks/interval_coverage.py).

    A unit that fires in one document alone cannot be predicted: `too_few_records`.
    """
    corpus = read_corpus(job, None)
    units = checked_units(job.store, job.hook, job.units)
    counts = np.bincount(corpus.grid.token_ids[corpus.documents >= 0])
    frequencies = counts / counts.sum()
    rows: list[Row] = []
    for chunk in read_unit_rows(job.store, job.hook, units, corpus.grid):
        for i in range(len(chunk.units)):
            cells, acts = chunk.of(i)
            sides: list[tuple[str | None, ndarray]] = [(None, cells)]
            if job.controls:
                sides.append(("shuffled", corpus.moved(cells)))
            for control, of_side in sides:
                columns = selectivity_columns(of_side, acts, corpus, frequencies)
                rows.append(_row(job, "token_selectivity", chunk, i, corpus, columns))
                rows[-1]["control"] = control
    return rows


def selectivity_columns(
    cells: Int[ndarray, " firing"],
    acts: Float[ndarray, " firing"],
    corpus: Corpus,
    frequencies: Float[ndarray, " d_vocab"],
) -> Row:
    """Return the columns of a unit with these activations on these cells."""
    n_groups, d_vocab = corpus.n_groups, len(frequencies)
    mass, of_document = np.zeros((n_groups, d_vocab)), np.zeros((2, corpus.n_documents))
    # one compiled pass over what the unit fires on, here and below: with a dense unit that is half
    # of the text, and NumPy would copy it ten times
    _add_by_token(cells, acts, corpus.documents, n_groups, corpus.grid.token_ids, mass)
    if not mass.any():
        return {"value": None, "n_failures": 1, "failure": "silent"}
    tokens = np.flatnonzero(mass.any(axis=0))
    mass = mass[:, tokens]
    total = mass.sum(axis=0)

    # predictions of each group's tokens from the other groups, for every share of the text
    others = np.maximum(total - mass, 0.0)
    n_others = others.sum(axis=1, keepdims=True)
    from_others = np.divide(others, n_others, out=np.zeros_like(others), where=n_others > 0)
    shares = np.array(SHARES_OF_TEXT)[:, None, None]
    nats = -np.log((1 - shares) * from_others + shares * frequencies[tokens])
    costs = (mass * nats).sum(axis=2)
    best = (costs.sum(axis=1, keepdims=True) - costs).argmin(axis=0)  # on the other groups
    chosen = np.zeros((n_groups, d_vocab))
    base = float(entropies(frequencies))
    chosen[:, tokens] = 1 - nats[best, np.arange(n_groups)] / base
    _add_by_document(cells, acts, corpus.documents, corpus.grid.token_ids, chosen, of_document)
    selected, fired = of_document[:, of_document[1] > 0]
    if len(fired) < 2:
        return {"value": None, "n_failures": 1, "failure": "too_few_records"}
    value = float(selected.sum() / fired.sum())
    low, high = ratio_interval(selected, fired, added=(0.0, 0.0))
    optimistic = max(value, 1 - float(entropies(total)) / base) + (high - low) / 2
    least = 1 - np.log(len(frequencies)) / base  # that of a unit on all tokens alike
    low = min(max(low, float(least)), value)
    return columns_of(value, low, min(optimistic, 1.0), SELECTIVITY_METHOD)


@compiled
@no_type_check
def _add_by_token(cells, acts, documents, n_groups, token_ids, mass):
    """Add each activation to the mass of its document's group and its token, padding left out."""
    for i in range(len(cells)):
        document = documents[cells[i]]
        if document >= 0:
            mass[document % n_groups, token_ids[cells[i]]] += acts[i]


@compiled
@no_type_check
def _add_by_document(cells, acts, documents, token_ids, worth, of_document):
    """Add each activation to its document, times its token's worth there, and by itself."""
    for i in range(len(cells)):
        document = documents[cells[i]]
        if document >= 0:
            group = document % len(worth)
            of_document[0, document] += acts[i] * worth[group, token_ids[cells[i]]]
            of_document[1, document] += acts[i]
