"""The pass over a block: entries, odd values and cuts, against numpy on the whole array."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import StoreError
from activation_store.hooks import Rows
from activation_store.write.accumulator import new_seen, tiles_of
from activation_store.write.kernel import STRIP, Entries, Seen, gather, scan, top_p_cuts

FLOAT32_MAX = np.float32(np.finfo(np.float32).max)


def new_entries(n_rows: int, n_units: int) -> Entries:
    return Entries(
        np.empty(n_rows * n_units, np.uint16),
        np.empty(n_rows * n_units, np.float32),
        np.empty((n_rows, n_units), np.uint8),
        np.empty(n_rows, np.int32),
        np.empty((n_rows, -(-n_units // STRIP)), np.int64),
        np.zeros(2, np.int64),
    )


def take(
    x: np.ndarray,
    seen: Seen,
    entries: Entries,
    *,
    first_seq: int = 0,
    docs: np.ndarray | None = None,
    threshold: float = 0.0,
    largest: np.float32 = FLOAT32_MAX,
    cut: np.ndarray | None = None,
) -> None:
    n, n_ctx, d = x.shape
    seq = np.arange(first_seq, first_seq + n, dtype=np.int32)
    if docs is None:
        docs = np.repeat(seq[:, None], n_ctx, 1)
    tiles = tiles_of(seq, docs.astype(np.int32), docs.astype(np.int32))
    if cut is not None:
        tiles = tiles._replace(cut=cut)
    flat = np.ascontiguousarray(x.reshape(-1, d), np.float32)
    scan(flat, tiles, 0, d, np.float32(threshold), largest, seen, entries)


def rows_of(entries: Entries, n_units: int) -> tuple[np.ndarray, ...]:
    n = int(entries.used[0])
    tiles = int(entries.used[1])
    order = np.argsort(entries.seq[:tiles], kind="stable")
    seq, pos = np.empty(n, np.int32), np.empty(n, np.int32)
    act = np.empty(n, np.float32)
    cursor = np.zeros(tiles, np.int64)
    gather(entries, order, cursor, 0, n_units, seq, pos, act)
    unit = np.repeat(np.arange(n_units), entries.per_unit[:tiles].sum(axis=0, dtype=np.int64))
    return unit, seq, pos, act


def sparse(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.maximum(rng.standard_normal(shape) - 1, 0).astype(np.float32)


@given(
    n=st.integers(1, 4),
    n_ctx=st.integers(1, 300),
    d=st.integers(1, 140),
    threshold=st.sampled_from([0.0, 0.5, -0.7]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_entries_are_the_values_above_the_threshold_by_unit_sequence_and_position(
    n: int, n_ctx: int, d: int, threshold: float, seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((n, n_ctx, d)).astype(np.float32)
    entries = new_entries(n * n_ctx, d)
    take(x, new_seen(Rows("h", d), 0), entries, first_seq=7, threshold=threshold)
    unit, seq, pos = np.nonzero(x.transpose(2, 0, 1) > threshold)
    got = rows_of(entries, d)
    np.testing.assert_array_equal(got[0], unit)
    np.testing.assert_array_equal(got[1], seq + 7)
    np.testing.assert_array_equal(got[2], pos)
    np.testing.assert_array_equal(got[3], x[seq, pos, unit])


def test_sequences_given_out_of_order_come_out_in_order() -> None:
    x = sparse(np.random.default_rng(0), 4, 20, 3)
    entries = new_entries(80, 3)
    seen = new_seen(Rows("h", 3), 0)
    take(x[2:], seen, entries, first_seq=2)
    take(x[:2], seen, entries, first_seq=0)
    unit, seq, pos, act = rows_of(entries, 3)
    expected = np.nonzero(x.transpose(2, 0, 1))
    np.testing.assert_array_equal(np.stack([unit, seq, pos]), np.stack(expected))
    np.testing.assert_array_equal(act, x.transpose(2, 0, 1)[expected])


def test_odd_values_are_counted_per_unit_and_never_become_entries() -> None:
    x = sparse(np.random.default_rng(1), 2, 40, 5)
    x[0, 3, 1] = np.nan
    x[0, 4, 1] = np.inf
    x[1, 5, 1] = -np.inf
    x[1, 6, 2] = 70000.0
    entries = new_entries(80, 5)
    seen = new_seen(Rows("h", 5, dtype="float16"), 0)
    take(x, seen, entries, largest=np.float32(65504))
    expected = np.zeros((5, 3), int)
    expected[1] = [1, 2, 0]
    expected[2] = [0, 0, 1]
    np.testing.assert_array_equal(seen.odd, expected)
    act = rows_of(entries, 5)[3]
    assert len(act) == int(((x > 0) & (x <= 65504)).sum())
    assert np.isfinite(act).all()
    assert seen.moments.n.tolist() == [80, 77, 80, 80, 80]
    assert seen.moments.high[2] == 70000.0, "statistics use the value before rounding"
    assert np.isfinite(seen.moments.m4).all()


def test_padding_at_the_ends_is_left_out_of_everything() -> None:
    x = np.ones((2, 6, 2), np.float32)
    docs = np.array([[-1, -1, 4, 4, 4, -1], [-1] * 6])
    entries = new_entries(12, 2)
    seen = new_seen(Rows("h", 2), 0)
    take(x, seen, entries, docs=docs)
    assert rows_of(entries, 2)[2].tolist() == [2, 3, 4, 2, 3, 4]
    assert seen.moments.n.tolist() == [3, 3]


def test_top_p_keeps_the_smallest_set_that_holds_the_share() -> None:
    x = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    # 4 + 3 = 7 of 10 is the first to reach 0.7; ties stay together; nothing active, nothing kept
    cut = top_p_cuts(x, np.float32(0), 0.7)
    assert cut.tolist() == [3.0, 1.0, np.inf]
    entries = new_entries(3, 4)
    take(x[None], new_seen(Rows("h", 4), 0), entries, cut=cut)
    unit, _, pos, act = rows_of(entries, 4)
    assert list(zip(pos, unit, act, strict=True)) == [
        (0, 0, 4.0),
        (1, 0, 1.0),
        (0, 1, 3.0),
        (1, 1, 1.0),
    ]


def test_a_threshold_between_two_float32_keeps_exactly_the_values_above_it() -> None:
    near = np.float32(0.1)
    x = np.array([np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(1))])
    cutoff = Rows("h", 1, threshold=0.1).cutoff
    assert (x > cutoff).tolist() == (x.astype(np.float64) > 0.1).tolist()


def test_a_user_who_can_write_no_cache_compiles_without_one(monkeypatch) -> None:
    """As in containers: neither the package's folder nor a home can be written."""
    from numba.core.caching import CacheImpl

    from activation_store.compiled import compiled

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"d": 0}, "d: want an integer >= 1, got 0"),
        ({"max_density": 1.5}, r"max_density: want in \(0, 1\], got 1.5"),
        ({"units": (3, 2)}, "units: want ascending units between 0 and 7"),
        ({"units": (8,)}, "units: want ascending units between 0 and 7"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_hook_and_range(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(StoreError, match=f"h: {said}"):
        Rows(**{"hook": "h", "d": 8, **settings})  # type: ignore[arg-type]
