"""Exemplars against the definition applied to the whole array, and the fairness of the draws."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from activation_store.hooks import Rows
from activation_store.write.accumulator import new_seen, tiles_of
from activation_store.write.exemplars import (
    QUANTILE_BINS,
    ChosenTokens,
    new_top,
    offer_top,
    quantile_exemplars,
    random_exemplars,
    top_exemplars,
)
from activation_store.write.kernel import Entries, Seen, scan
from activation_store.write.state import merge_seen


def see(
    x: np.ndarray,
    docs: np.ndarray,
    rows: Rows,
    seed: int = 0,
    first_seq: int = 0,
    tokens: np.ndarray | None = None,
) -> Seen:
    seen = new_seen(rows, seed)
    n, _, d = x.shape
    none = Entries(
        np.empty(0, np.uint16),
        np.empty(0, np.float32),
        np.empty((0, d), np.uint8),
        np.empty(0, np.int32),
        np.empty((0, 0), np.int64),
        np.zeros(2, np.int64),
    )
    seq = np.arange(first_seq, first_seq + n, dtype=np.int32)
    if tokens is None:  # no two alike
        tokens = seq[:, None] * docs.shape[1] + np.arange(docs.shape[1])
    tiles = tiles_of(seq, docs.astype(np.int32), tokens.astype(np.int32))
    flat = np.ascontiguousarray(x.reshape(-1, d), np.float32)
    largest = np.float32(np.finfo(np.float32).max)
    scan(flat, tiles, 0, d, rows.cutoff, largest, seen, none)
    return seen


def as_tuples(chosen: ChosenTokens, unit: int) -> list[tuple[int, int, int, float]]:
    at = chosen.place == unit
    columns = (chosen.seq[at], chosen.pos[at], chosen.doc[at], chosen.act[at])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def best_per_document(x: np.ndarray, docs: np.ndarray, unit: int, k: int) -> list[tuple]:
    """The definition: sort all active tokens, keep the first of each document, keep k."""
    tokens = [
        (-float(x[s, p, unit]), s, p, int(docs[s, p]))
        for s, p in np.ndindex(x.shape[:2])
        if x[s, p, unit] > 0
    ]
    seen: set[int] = set()
    best = []
    for act, s, p, doc in sorted(tokens):
        if doc not in seen:
            seen.add(doc)
            best.append((s, p, doc, -act))
    return best[:k]


def test_top_by_hand() -> None:
    top = new_top(1, 2)
    offers = [
        (1.0, 0, 0, 7),
        (3.0, 0, 1, 7),
        (2.0, 1, 0, 8),
        (2.0, 0, 5, 9),
        (3.0, 2, 0, 8),
        (2.5, 3, 3, 9),
    ]
    for act, seq, pos, doc in offers:
        numbers = np.float32(act), np.int32(seq), pos, np.int32(doc), np.uint64(doc)
        offer_top(top, 0, *numbers)  # typed as the kernel does, which is compiled by then
    # document 7 is best at (0, 1) with 3.0; document 8 reaches 3.0 later; 9 has 2.5 and is third
    assert as_tuples(top_exemplars(top, 2), 0) == [(0, 1, 7, 3.0), (2, 0, 8, 3.0)]


@given(
    n=st.integers(1, 6),
    n_ctx=st.integers(1, 150),
    n_docs=st.integers(1, 9),
    k=st.integers(0, 5),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_top_is_the_best_of_each_document_whatever_ties_and_cuts(
    n: int, n_ctx: int, n_docs: int, k: int, levels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = np.floor(np.maximum(rng.standard_normal((n, n_ctx, 3)), 0) * levels).astype(np.float32)
    docs = np.sort(rng.integers(0, n_docs, n * n_ctx)).reshape(n, n_ctx)
    rows = Rows("h", 3, top_k=k)
    whole = see(x, docs, rows)
    half = n // 2
    merged = see(x[half:], docs[half:], rows, first_seq=half)
    merge_seen(merged, see(x[:half], docs[:half], rows))
    for unit in range(3):
        expected = best_per_document(x, docs, unit, k)
        assert as_tuples(top_exemplars(whole.top, k), unit) == expected
        assert as_tuples(top_exemplars(merged.top, k), unit) == expected


@pytest.mark.parametrize("change", [0, 20])
def test_of_copies_of_a_text_one_is_an_exemplar_also_where_they_differ_further_away(change) -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 1000, (40, 30))
    tokens[5:30] = tokens[5]
    tokens[6:30, :change] = rng.integers(0, 1000, (24, change))
    x = np.zeros((40, 30, 1), np.float32)
    x[:, 29, 0] = np.where(np.arange(40) < 30, 2.0, 1.0 + np.arange(40) / 100)
    docs = np.repeat(np.arange(40)[:, None], 30, 1)
    rows = Rows("h", 1, top_k=20)
    whole = see(x, docs, rows, tokens=tokens)
    merged = see(x[17:], docs[17:], rows, first_seq=17, tokens=tokens[17:])
    merge_seen(merged, see(x[:17], docs[:17], rows, tokens=tokens[:17]))
    expected = [0, 1, 2, 3, 4, 5, *range(39, 29, -1)]  # document 5 stands for its copies
    for seen in (whole, merged):
        chosen = top_exemplars(seen.top, 20)
        assert chosen.doc.tolist() == expected
        assert chosen.rank.tolist() == list(range(1, 17))


def test_draws_do_not_depend_on_how_tokens_are_grouped() -> None:
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((9, 200, 5)), 0).astype(np.float32)
    docs = np.repeat(np.arange(9)[:, None], 200, 1)
    rows = Rows("h", 5)
    whole = see(x, docs, rows, seed=3)
    merged = see(x[4:], docs[4:], rows, seed=3, first_seq=4)
    merge_seen(merged, see(x[:4], docs[:4], rows, seed=3))
    for unit in range(5):
        for choose, part in ((random_exemplars, "random"), (quantile_exemplars, "firing")):
            one, other = choose(getattr(whole, part)), choose(getattr(merged, part))
            assert as_tuples(one, unit) == as_tuples(other, unit)
    other_seed = see(x, docs, rows, seed=4)
    assert as_tuples(random_exemplars(other_seed.random), 0) != as_tuples(
        random_exemplars(whole.random), 0
    )


def test_random_exemplars_are_uniform_over_all_tokens_and_units_draw_independently() -> None:
    n, n_ctx, d = 3, 130, 4000
    x = np.zeros((n, n_ctx, d), np.float32)  # no unit ever fires
    docs = np.zeros((n, n_ctx), int)
    seen = see(x, docs, Rows("h", d, random_k=5), seed=11)
    chosen = random_exemplars(seen.random)
    counts = np.zeros(n * n_ctx)
    np.add.at(counts, chosen.seq * n_ctx + chosen.pos, 1)
    assert counts.sum() == 5 * d
    # drawn without replacement: 5 different tokens per unit, so slightly less varied than chance
    assert stats.chisquare(counts).pvalue > 1e-4
    firsts = chosen.seq[chosen.rank == 1] * n_ctx + chosen.pos[chosen.rank == 1]
    assert stats.chisquare(np.bincount(firsts, minlength=n * n_ctx)).pvalue > 1e-4
    pairs = Counter(
        zip(chosen.place.tolist(), (chosen.seq * n_ctx + chosen.pos).tolist(), strict=True)
    )
    assert max(pairs.values()) == 1


def test_the_order_of_random_exemplars_is_the_order_of_exponential_priorities() -> None:
    x = np.zeros((20, 128, 500), np.float32)
    seen = see(x, np.zeros((20, 128), int), Rows("h", 500, random_k=4), seed=1)
    # the smallest of 2,560 exponentials is one of mean 1 / 2560
    assert stats.kstest(seen.random.key.min(axis=1) * 2560, "expon").pvalue > 1e-4


def test_quantile_exemplars_are_uniform_over_firing_tokens_in_equal_bins() -> None:
    rng = np.random.default_rng(2)
    d, k = 300, 3
    x = np.maximum(rng.standard_normal((20, 128, d)), 0).astype(np.float32)
    docs = np.repeat(np.arange(20)[:, None], 128, 1)
    seen = see(x, docs, Rows("h", d, quantile_k=k), seed=6)
    chosen = quantile_exemplars(seen.firing)
    assert chosen.bin is not None
    assert (chosen.act > 0).all()
    np.testing.assert_array_equal(chosen.act, x[chosen.seq, chosen.pos, chosen.place])
    for unit in (0, 7):
        at = chosen.place == unit
        assert np.bincount(chosen.bin[at]).tolist() == [k] * QUANTILE_BINS
        assert (np.diff(chosen.act[at]) >= 0).all()
    # a unit fires on half of 2,560 tokens; those are what its priorities are of
    counts = (x > 0).sum(axis=(0, 1))
    assert stats.kstest(seen.firing.key.min(axis=1) * counts, "expon").pvalue > 1e-4
    # among a unit's firing tokens, the share below a drawn one is uniform
    flat = x.reshape(-1, d)
    share = [
        stats.percentileofscore(flat[flat[:, u] > 0, u], a) / 100
        for u, a in zip(chosen.place, chosen.act, strict=True)
    ]
    assert stats.kstest(share, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("fires", [0, 1, 4])
def test_a_unit_that_hardly_fires_has_fewer_exemplars_and_none_made_up(fires: int) -> None:
    x = np.zeros((1, 50, 1), np.float32)
    x[0, :fires, 0] = np.arange(1, fires + 1)
    seen = see(x, np.zeros((1, 50), int), Rows("h", 1, top_k=3, random_k=60))
    assert len(top_exemplars(seen.top, 3).rank) == min(fires, 1)
    assert len(quantile_exemplars(seen.firing).rank) == fires
    assert len(random_exemplars(seen.random).rank) == 50


def test_odd_values_are_never_exemplars() -> None:
    x = np.ones((1, 40, 2), np.float32)
    x[0, ::2, 0] = np.nan
    x[0, 1::4, 0] = np.inf
    seen = see(x, np.zeros((1, 40), int), Rows("h", 2, random_k=40))
    assert sorted(as_tuples(random_exemplars(seen.random), 0)) == [
        (0, pos, 0, 1.0) for pos in range(3, 40, 4)
    ]
    assert np.isfinite(quantile_exemplars(seen.firing).act).all()
