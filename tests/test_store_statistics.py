"""Moments and quantiles over all tokens, against scipy and numpy on the whole array."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from activation_store.hooks import Rows
from activation_store.write.accumulator import new_seen, tiles_of
from activation_store.write.kernel import Entries, Seen, scan
from activation_store.write.moments import RELATIVE_ERROR, SMALLEST, quantiles, shape_of
from activation_store.write.state import (
    arrays_to_seen,
    from_bytes,
    merge_seen,
    seen_to_arrays,
    to_bytes,
)

AT = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


def see(x: np.ndarray, first_seq: int = 0, threshold: float = 0.0, seed: int = 0) -> Seen:
    """Return what one pass over x [sequences, n_ctx, d] sees."""
    seen = new_seen(Rows("h", x.shape[2], threshold=threshold), seed)
    add(seen, x, first_seq, threshold)
    return seen


def add(seen: Seen, x: np.ndarray, first_seq: int, threshold: float = 0.0) -> None:
    n, n_ctx, d = x.shape
    seq = np.arange(first_seq, first_seq + n, dtype=np.int32)
    docs = np.repeat(seq[:, None] // 3, n_ctx, 1).astype(np.int32)
    none = Entries(
        np.empty(0, np.uint16),
        np.empty(0, np.float32),
        np.empty((0, d), np.uint8),
        np.empty(0, np.int32),
        np.empty((0, 0), np.int64),
        np.zeros(2, np.int64),
    )
    flat = np.ascontiguousarray(x.reshape(-1, d), np.float32)
    largest = np.float32(np.finfo(np.float32).max)
    scan(flat, tiles_of(seq, docs, docs), 0, d, np.float32(threshold), largest, seen, none)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_moments_equal_scipy_over_all_tokens(scale: float, offset: float) -> None:
    rng = np.random.default_rng(0)
    x = ((rng.standard_exponential((9, 200, 70)) + offset) * scale).astype(np.float32)
    seen = see(x)
    flat = x.reshape(-1, 70).astype(np.float64)
    variance, skewness, kurtosis = shape_of(seen.moments)
    # float64 has 1e-16; the deviation from a mean 1000 times as large costs three digits
    close = {"rtol": 1e-12 * max(1.0, offset)}
    np.testing.assert_allclose(seen.moments.mean, flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(variance, flat.var(0), **close)
    np.testing.assert_allclose(skewness, stats.skew(flat), **close)
    np.testing.assert_allclose(kurtosis, stats.kurtosis(flat, fisher=False), **close)
    np.testing.assert_array_equal(seen.moments.low, x.reshape(-1, 70).min(0))
    np.testing.assert_array_equal(seen.moments.high, x.reshape(-1, 70).max(0))


@pytest.mark.parametrize("below", [0.0, -0.0, -1e-3])
def test_moments_of_what_is_mostly_zero_equal_scipy_beside_units_that_are_not(below: float) -> None:
    rng = np.random.default_rng(4)
    x = np.maximum(rng.standard_normal((9, 200, 140)) - 1, 0).astype(np.float32)
    # a ReLU's zeros are not looked at one by one, unless a unit of the strip has something else
    x[4, 7, 3] = below
    seen = see(x)
    flat = x.reshape(-1, 140).astype(np.float64)
    variance, skewness, kurtosis = shape_of(seen.moments)
    np.testing.assert_allclose(seen.moments.mean, flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(variance, flat.var(0), rtol=1e-12)
    np.testing.assert_allclose(skewness, stats.skew(flat), rtol=1e-12)
    np.testing.assert_allclose(kurtosis, stats.kurtosis(flat, fisher=False), rtol=1e-12)
    np.testing.assert_array_equal(seen.moments.active, (flat > 0).sum(0))
    np.testing.assert_array_equal(seen.moments.low, x.reshape(-1, 140).min(0))
    np.testing.assert_array_equal(seen.moments.high, x.reshape(-1, 140).max(0))
    np.testing.assert_array_equal(seen.sketch.sum(axis=1), len(flat))


def test_a_unit_that_never_varies_has_no_skewness_and_one_never_seen_has_nothing() -> None:
    x = np.full((1, 300, 3), 0.1, np.float32)
    x[..., 1] = np.nan
    x[..., 2] = 0.0
    seen = see(x)
    variance, skewness, kurtosis = shape_of(seen.moments)
    assert seen.moments.n.tolist() == [300, 0, 300]
    assert variance[[0, 2]].tolist() == [0.0, 0.0]
    assert np.isnan(variance[1])
    assert np.isnan(skewness).all()
    assert np.isnan(kurtosis).all()


def test_active_counts_values_above_the_threshold() -> None:
    x = np.random.default_rng(3).standard_normal((2, 150, 5)).astype(np.float32)
    seen = see(x, threshold=0.25)
    np.testing.assert_array_equal(seen.moments.active, (x > 0.25).sum((0, 1)))


@given(
    cuts=st.lists(st.integers(0, 12), max_size=4),
    n_ctx=st.sampled_from([1, 7, 130]),
    kind=st.sampled_from(["relu", "dense", "constant"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20)
def test_merging_equals_a_single_pass(cuts: list[int], n_ctx: int, kind: str, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((12, n_ctx, 9)).astype(np.float32)
    x = {"relu": np.maximum(x, 0), "dense": x, "constant": np.full_like(x, 0.3)}[kind]
    whole = see(x, seed=5)
    parts = [0, *sorted(cuts), 12]
    merged = new_seen(Rows("h", 9), 5)
    for first, stop in zip(parts[:-1], parts[1:], strict=True):
        merge_seen(merged, see(x[first:stop], first_seq=first, seed=5))
    for name in ("n", "active", "low", "high"):
        np.testing.assert_array_equal(getattr(merged.moments, name), getattr(whole.moments, name))
    size = np.abs(x).max() + 1e-30
    np.testing.assert_allclose(merged.moments.mean, whole.moments.mean, rtol=1e-12, atol=1e-15)
    for power, name in ((2, "m2"), (3, "m3"), (4, "m4")):
        np.testing.assert_allclose(
            getattr(merged.moments, name),
            getattr(whole.moments, name),
            rtol=1e-12,
            atol=1e-13 * x.shape[0] * n_ctx * size**power,
        )
    np.testing.assert_array_equal(merged.sketch, whole.sketch)
    np.testing.assert_array_equal(merged.odd, whole.odd)


def test_blocks_of_any_size_give_the_same_bits() -> None:
    x = np.maximum(np.random.default_rng(8).standard_normal((11, 40, 66)), 0).astype(np.float32)
    whole = seen_to_arrays(see(x, seed=1))
    pieces = new_seen(Rows("h", 66), 1)
    for first, stop in ((0, 1), (1, 8), (8, 11)):
        add(pieces, x[first:stop], first)
    for name, array in seen_to_arrays(pieces).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


@pytest.mark.parametrize("kind", ["relu", "dense", "heavy", "tiny", "two values"])
def test_quantiles_are_within_the_stated_error_of_numpy(kind: str) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((10, 128, 6))
    x = {
        "relu": np.maximum(x - 1, 0),
        "dense": x,
        "heavy": np.sign(x) * np.abs(x) ** 9,
        "tiny": x * 1e-7,
        "two values": np.where(x > 1, 2.5, -0.3),
    }[kind].astype(np.float32)
    seen = see(x)
    got = quantiles(seen.sketch, seen.moments.low, seen.moments.high, AT)
    exact = np.quantile(x.reshape(-1, 6).astype(np.float64), AT, axis=0, method="inverted_cdf").T
    bound = np.maximum(np.abs(exact) * RELATIVE_ERROR, SMALLEST)
    assert (np.abs(got - exact) <= bound * (1 + 1e-12)).all()
    assert (np.diff(got, axis=1) >= 0).all()


def test_a_state_survives_being_stored() -> None:
    x = np.maximum(np.random.default_rng(9).standard_normal((5, 64, 12)), 0).astype(np.float32)
    seen = see(x, seed=2)
    arrays = seen_to_arrays(seen)
    back = new_seen(Rows("h", 12), 2)
    arrays_to_seen(from_bytes(to_bytes(arrays)), back)
    for name, array in seen_to_arrays(back).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    assert to_bytes(arrays) == to_bytes(seen_to_arrays(back))
