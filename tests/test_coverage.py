"""Every kind of interval covers the truth as often as it says, over 8, 40 and 170 documents.

Documents have effects of their own: a factor of log standard deviation 0.5, or a share of their
own. The truth is known, or is the value of a sample a thousand times as large. 300 draws each, so
that a share of 0.95 has a standard error of 0.013.
"""

import numpy as np
import pytest

from lmmono.records.corpus_excerpts import TokenGrid
from lmmono.scores.population import Levels, StoredTokens, auprc_interval, count
from lmmono.scores.population import cosine as population_cosine
from lmmono.stats.agreement import AGREEMENTS, record_sums
from lmmono.stats.bootstrap import DocumentDraws
from lmmono.stats.intervals import (
    cluster_error,
    jackknife_interval,
    ratio_interval,
    student_interval,
    student_quantile,
    unit_intervals,
)

N_DRAWS, N_DOCUMENTS = 300, (8, 40, 170)
LEAST = {8: 0.88, 40: 0.90, 170: 0.91}
"""Coverage that is asked for: 95 % less three standard errors, and what few documents cost."""


def covered(truth, low, high):
    return float(np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high))))


def units(rng, n_units, n_documents, n_records=20, window=16):
    """Return sums of records, and the documents that they are of; each draw is a unit."""
    documents = np.stack([rng.integers(n_documents, size=n_records) for _ in range(n_units)])
    factor = rng.lognormal(0.0, 0.5, (n_units, n_documents))
    level = np.take_along_axis(factor, documents, axis=1)[..., None]
    predicted = rng.random((n_units, n_records, window)) < 0.3
    truth = predicted * level + rng.normal(0, 0.7, predicted.shape) * level
    there = np.ones(predicted.shape, bool)
    return record_sums(truth, predicted.astype(float), there), documents


@pytest.mark.parametrize("n_documents", N_DOCUMENTS)
def test_the_interval_of_a_unit_covers_with_document_effects(n_documents):
    rng = np.random.default_rng(n_documents)
    pearson = AGREEMENTS["pearson"]
    sums, _ = units(rng, 20_000, 20)
    truth = float(pearson.of(sums.sum(axis=(0, 1))))
    sums, documents = units(rng, N_DRAWS, n_documents)
    present, kinds = np.ones(documents.shape, bool), np.repeat([0, 1], 10)
    low, high = unit_intervals(sums, present, kinds, pearson, documents)
    alone = unit_intervals(sums, present, kinds, pearson)
    share = covered(truth, low, high)
    assert share >= LEAST[n_documents]
    if n_documents == 8:  # records taken as independent cover less
        assert covered(truth, *alone) < share


def test_a_unit_interval_of_records_of_different_documents_is_that_of_records():
    rng = np.random.default_rng(0)
    sums, _ = units(rng, 5, 20)
    present, kinds = np.ones((5, 20), bool), np.zeros(20, int)
    documents = np.tile(np.arange(20), (5, 1))
    pearson = AGREEMENTS["pearson"]
    low, high = unit_intervals(sums, present, kinds, pearson, documents)
    plain = unit_intervals(sums, present, kinds, pearson)
    ratio = (np.arctanh(high) - np.arctanh(low)) / (np.arctanh(plain[1]) - np.arctanh(plain[0]))
    assert ratio == pytest.approx(np.sqrt(20 / 19))
    one = np.zeros((5, 20), int)  # a single document says nothing of how documents differ
    assert np.isnan(unit_intervals(sums, present, kinds, pearson, one)[0]).all()


@pytest.mark.parametrize("n_documents", N_DOCUMENTS)
def test_ratios_means_and_clusters_cover_with_document_effects(n_documents):
    rng = np.random.default_rng(n_documents)
    below = rng.integers(1, 20, (N_DRAWS, n_documents)).astype(float)
    shares = rng.beta(2.0, 3.0, below.shape)  # of mean 0.4
    above = rng.binomial(below.astype(int), shares).astype(float)
    ends = np.array([ratio_interval(a, b) for a, b in zip(above, below, strict=True)])
    assert covered(0.4, *ends.T) >= LEAST[n_documents]
    value = above.sum(axis=1) / below.sum(axis=1)
    left = (above.sum(axis=1, keepdims=True) - above) / (below.sum(axis=1, keepdims=True) - below)
    assert covered(0.4, *jackknife_interval(value, left)) >= LEAST[n_documents]
    means = [student_interval([row]) for row in shares]
    assert covered(0.4, *np.array(means).T[1:]) >= LEAST[n_documents]
    clusters = np.repeat(np.arange(n_documents), 5)
    hits = rng.binomial(1, np.repeat(shares, 5, axis=1)).astype(float)
    halves = np.array([cluster_error(row, clusters) for row in hits])
    halves *= float(student_quantile(n_documents - 1))
    middle = hits.mean(axis=1)
    assert covered(0.4, middle - halves, middle + halves) >= LEAST[n_documents]


def test_the_percentile_bootstrap_covers_from_forty_documents_on_and_less_below():
    rng, share = np.random.default_rng(0), {}
    for n_documents in N_DOCUMENTS:
        below = rng.integers(1, 20, (N_DRAWS, n_documents)).astype(float)
        above = rng.binomial(below.astype(int), rng.beta(2.0, 3.0, below.shape)).astype(float)
        draws = DocumentDraws(n_documents, n_documents, 400, 0, 0.95)
        totals = draws.totals(np.stack([above, below], axis=2).swapaxes(0, 1))
        found = draws.intervals(totals[..., 0] / totals[..., 1])
        share[n_documents] = covered(0.4, found[:, 1], found[:, 2])
    assert share[8] < 0.92 and share[40] > 0.88 and share[170] > 0.91


@pytest.mark.parametrize("n_documents", N_DOCUMENTS)
def test_average_precision_and_cosine_on_every_token_cover_with_document_effects(n_documents):
    rng, per = np.random.default_rng(n_documents), 40

    def counted(n_documents):
        """Levels 0 to 3; a token of a level fires as often as its document's factor says."""
        n = n_documents * per
        documents = np.repeat(np.arange(n_documents), per).astype(np.int32)
        level = rng.choice(4, n, p=[0.6, 0.2, 0.1, 0.1]).astype(np.int32)
        factor = rng.lognormal(0.0, 0.5, n_documents)[documents]
        rate = np.minimum(np.array([0.02, 0.1, 0.3, 0.6])[level] * factor, 1.0)
        firing = np.flatnonzero(rng.random(n) < rate)
        acts = np.ones(len(firing), np.float32)
        grid = TokenGrid("score", np.arange(n_documents), per, level, documents.astype(np.int64))
        tokens = StoredTokens(grid, per)
        n_tokens = np.bincount(level, minlength=4).astype(float)
        levels = Levels(np.arange(4.0), level, n_tokens)
        return count(tokens, levels, 1.5, firing, acts)

    whole = counted(20_000)
    truth = float(population_cosine(whole.sums.sum(axis=0)))
    found = [counted(n_documents) for _ in range(N_DRAWS)]
    ends = np.array([auprc_interval(each) for each in found])
    assert covered(whole.auprc, *ends.T) >= LEAST[n_documents]
    values, without = [], []
    for each in found:
        total = each.sums.sum(axis=0)
        values.append(np.arctanh(population_cosine(total)))
        without.append(np.arctanh(population_cosine(total - each.sums)))
    low, high = jackknife_interval(np.array(values), np.array(without))
    assert covered(np.arctanh(truth), low, high) >= LEAST[n_documents]
