"""Batches: an endless seeded order that can be entered anywhere."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmono.data.batches import train_batches
from lmmono.data.tokens import TokenRows
from lmmono.errors import DataError


def numbered_rows(n_rows: int, n_ctx: int = 4) -> TokenRows:
    """Rows whose every token is the row's own number."""
    ids = np.repeat(np.arange(n_rows, dtype=np.uint16)[:, None], n_ctx, axis=1)
    return TokenRows(ids=ids, doc_ids=ids.astype(np.int32), first_seq_id=0, split="train")


def order(
    n_rows: int, batch_rows: int, seed: int, n_batches: int, start: int = 0
) -> list[list[int]]:
    batches = train_batches(numbered_rows(n_rows), batch_rows, seed, start)
    return [batch[:, 0].tolist() for batch in islice(batches, n_batches)]


@given(
    n_rows=st.integers(3, 40),
    batch_rows=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_starting_at_batch_k_continues_exactly_as_if_never_stopped(
    n_rows: int, batch_rows: int, seed: int, start: int
) -> None:
    whole = order(n_rows, batch_rows, seed, start + 5)
    assert order(n_rows, batch_rows, seed, 5, start) == whole[start:]


@given(n_rows=st.integers(2, 40), batch_rows=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_epoch_sees_every_row_at_most_once_and_leaves_out_less_than_a_batch(
    n_rows: int, batch_rows: int, seed: int
) -> None:
    batch_rows = min(batch_rows, n_rows)
    epoch = sum(order(n_rows, batch_rows, seed, n_rows // batch_rows), [])
    assert len(set(epoch)) == len(epoch) > n_rows - batch_rows


def test_epochs_and_seeds_differ_in_order() -> None:
    first, second = order(32, 32, seed=0, n_batches=2)
    assert first != second and sorted(first) == sorted(second)
    assert order(32, 32, seed=1, n_batches=1) != [first]


def test_rows_left_out_of_one_epoch_are_seen_in_others() -> None:
    assert {row for batch in order(7, 4, seed=0, n_batches=20) for row in batch} == set(range(7))


def test_a_batch_is_int64_for_embedding_layers_and_whole_rows() -> None:
    batch = next(train_batches(numbered_rows(5), 2, seed=0))
    assert batch.dtype == np.int64 and batch.shape == (2, 4)
    assert (batch == batch[:, :1]).all()


def test_fewer_rows_than_a_batch_is_an_error_at_once_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"3 rows of 4 tokens, one batch takes 8.*batch_tokens"):
        train_batches(numbered_rows(3), 8, seed=0)
