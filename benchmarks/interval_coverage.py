"""How often 95 % intervals of unit scores cover the truth.

    python benchmarks/interval_coverage.py [--repeats 1000] [--only shares]

A simulation score, by number of records and method:

A planted unit: each of its top records holds the concept, 15 in 100 random ones do. The simulator
hears the concept in 70 of 100 records and imagines it in 15 of 100 without. The truth is the score
of very many records in the same proportion. Methods: tokens as if independent (Fisher's z), the
percentile bootstrap over records within kinds (1,000 resamples), and the jackknife of
`lmmono.stats.intervals`. Prints coverage and median width.

`shares`: token selectivity of units that fire at random, half of the time on one token, or on one
token alone, 6 to 1,000 times in 60 documents of unequal length; and shares of three items a
document (`lmmono.stats.intervals`), alike within a document or not.
"""

import argparse

import numpy as np

from lmmono.records.corpus_excerpts import TokenGrid
from lmmono.scores.unit_statistics import Corpus, selectivity_columns
from lmmono.stats.agreement import AGREEMENTS, Agreement, record_sums
from lmmono.stats.formulas import entropies
from lmmono.stats.intervals import ratio_interval, unit_intervals

PEARSON = AGREEMENTS["pearson"]
AT_ONCE = 50


def planted(rng: np.random.Generator, n: int, n_top: int, n_random: int) -> np.ndarray:
    """Return sums [n, records, sums] of n planted units."""
    present = np.ones((n, n_top + n_random), bool)
    present[:, n_top:] = rng.random((n, n_random)) < 0.15
    spots = rng.random((*present.shape, 64)) < 0.08
    truth = spots * present[..., None] * rng.gamma(3, 1, spots.shape)
    heard = (rng.random(present.shape) < 0.7)[..., None]
    predicted = np.where(heard, truth * rng.gamma(4, 0.25, spots.shape), 0)
    false_alarm = (~present & (rng.random(present.shape) < 0.15))[..., None]
    predicted += false_alarm * (rng.random(spots.shape) < 0.08) * rng.gamma(3, 1, spots.shape)
    return record_sums(truth, predicted, np.ones(truth.shape, bool))


def by_tokens(sums: np.ndarray, _: np.ndarray, measure: Agreement) -> tuple[np.ndarray, ...]:
    total = sums.sum(axis=1)
    centre = measure.straight(np.nan_to_num(measure.of(total)))
    half = 1.96 / np.sqrt(total[:, 0] - 3)
    return measure.back(centre - half), measure.back(centre + half)


def by_bootstrap(sums: np.ndarray, kinds: np.ndarray, measure: Agreement) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    sizes = np.bincount(kinds)
    counts = [rng.multinomial(n, np.full(n, 1 / n), 1000) for n in sizes if n]
    weights = np.concatenate(counts, axis=1).astype(float)
    values = measure.of(np.einsum("br,urs->ubs", weights, sums))
    return tuple(np.percentile(np.nan_to_num(values), [2.5, 97.5], axis=1))


def by_jackknife(sums: np.ndarray, kinds: np.ndarray, measure: Agreement) -> tuple[np.ndarray, ...]:
    return unit_intervals(sums, np.ones(sums.shape[:2], bool), kinds, measure)


METHODS = {"tokens": by_tokens, "bootstrap": by_bootstrap, "jackknife": by_jackknife}


def study(name: str, n_top: int, n_random: int, repeats: int) -> None:
    """Print a row for each method."""
    rng, measure = np.random.default_rng(0), AGREEMENTS[name]
    size = 2000
    many = [planted(rng, 1, size if n_top else 0, size).sum(axis=1) for _ in range(20)]
    truth = float(np.mean([measure.of(sums)[0] for sums in many]))
    kinds = np.repeat([0, 1], [n_top, n_random])
    found: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    values: list[np.ndarray] = []
    for _ in range(0, repeats, AT_ONCE):
        sums = planted(rng, AT_ONCE, n_top, n_random)
        values.append(np.nan_to_num(measure.of(sums.sum(axis=1))))
        for method, interval in METHODS.items():
            found[method].append(np.stack(interval(sums, kinds, measure)))
    spread = np.concatenate(values).std()
    print(f"{name}, {n_top} top + {n_random} random: truth {truth:.3f}, sd {spread:.3f}")
    for method, parts in found.items():
        low, high = np.concatenate(parts, axis=1)
        defined = ~np.isnan(low)
        covered = ((low <= truth) & (truth <= high))[defined].mean()
        width = np.median((high - low)[defined])
        print(
            f"  {method:10} coverage {covered:.3f}, width {width:.3f}, "
            f"{defined.mean():.0%} have one"
        )


def selectivity(n_firing: int, on_one: float, repeats: int) -> None:
    """Print mean, coverage and width for a unit with a share of its firing on one token."""
    rng, d_vocab = np.random.default_rng(0), 2000
    text = 1 / np.arange(1, d_vocab + 1)
    text /= text.sum()
    unit = (1 - on_one) * text
    unit[300] += on_one
    truth = float(1 - entropies(unit) / entropies(text))
    rows: list[tuple[float, float, float]] = []
    for _ in range(repeats):
        tokens = rng.choice(d_vocab, n_firing, p=unit).astype(np.int32)
        length = rng.lognormal(0, 1, 60)
        document = rng.choice(60, n_firing, p=length / length.sum())
        grid = TokenGrid("score", np.zeros(1, np.int64), n_firing, tokens, document)
        corpus = Corpus(grid, document, document % 10, 10, np.ones(10))
        acts = rng.gamma(2, 1, n_firing).astype(np.float32)
        row = selectivity_columns(np.arange(n_firing), acts, corpus, text)
        if row["value"] is not None:
            rows.append((row["value"], row["ci_low"], row["ci_high"]))
    value, low, high = np.array(rows).T
    covered = ((low <= truth) & (truth <= high)).mean()
    print(
        f"selectivity, {n_firing} firings, {on_one:.0%} on one token: truth {truth:.3f}, mean "
        f"{value.mean():.3f}, coverage {covered:.3f}, width {np.median(high - low):.3f}"
    )


def shares(n_documents: int, share: float, alike: float, repeats: int) -> None:
    """Print coverage and width of a share; `alike`: correlation of a document's items."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(repeats):
        n = np.maximum(rng.poisson(3, n_documents), 1)
        own = np.full(n_documents, share)
        if alike:
            size = 1 / alike - 1
            own = rng.beta(share * size, (1 - share) * size, n_documents)
        low, high = ratio_interval(rng.binomial(n, own).astype(float), n.astype(float))
        covered += low <= share <= high
        widths.append(min(high, 1) - max(low, 0))
    print(
        f"share {share}, {n_documents} documents, alike {alike}: coverage "
        f"{covered / repeats:.3f}, width {np.median(widths):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--only", choices=["shares"])
    arguments = parser.parse_args()
    repeats = arguments.repeats
    for on_one in (0.0, 0.5, 1.0):
        for n_firing in (6, 10, 80, 1000):
            selectivity(n_firing, on_one, repeats)
    for n_documents in (3, 10, 30, 100):
        for share in (0.02, 0.5, 0.98):
            for alike in (0.0, 0.3):
                shares(n_documents, share, alike, repeats)
    if arguments.only:
        return
    for n_top, n_random in ((5, 5), (10, 10), (20, 20), (100, 100), (0, 20), (0, 100)):
        study("pearson", n_top, n_random, repeats)
    study("spearman", 20, 20, repeats)
    study("r2", 20, 20, repeats)


if __name__ == "__main__":
    main()
