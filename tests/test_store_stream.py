"""Vectors for training: every token once, mixed, the same order always, resumable to the bit."""

import json
import os
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import HOOK, small_store

import activation_store as astore
from activation_store import Rows, Vectors
from activation_store.read.gather import Buffers, gather
from activation_store.read.selection import Mixing
from activation_store.shards.pages import VectorFile

A, B = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
N, CTX, D = 48, 32, 8
N_TOKENS = N * CTX


def activations(n: int, offset: int, d: int) -> np.ndarray:
    """Vectors that name their token: the first two numbers are its sequence and position."""
    seq, pos = np.mgrid[0:n, 0:CTX]
    x = np.random.default_rng(offset).normal(size=(n, CTX, d)).astype(np.float32)
    x[..., 0], x[..., 1] = seq + offset, pos
    return x


def fill(store: astore.Store, hooks: list[Vectors], n: int = N, offset: int = 0) -> None:
    """Write sequences in two commits, so that there are several shards."""
    docs = np.arange(n * CTX).reshape(n, CTX) // 20
    with store.writer(vectors=hooks, n_ctx=CTX, commit_tokens=N_TOKENS // 2) as writer:
        for first in range(0, n, 8):
            part = slice(first, first + 8)
            ids = np.arange(first, first + 8) + offset
            split = "train" if first < n // 2 else "val"
            acts = {hook.hook: activations(n, offset, hook.d)[part] for hook in hooks}
            writer.add(ids, np.zeros((8, CTX), np.int64), docs[part], split, acts)
    rows = [{"doc_id": i, "split": "s", "name": f"d{i}"} for i in range(docs.max() + 1)]
    store.add_documents(rows)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with astore.open(tmp_path_factory.mktemp("stream") / "run", "w") as made:
        fill(made, [Vectors(A, D), Vectors(B, 2 * D, "float32")])
        yield made


def names(batches) -> np.ndarray:
    """Which token each row is."""
    found = np.concatenate([np.asarray(batch) for batch in batches])
    return (found[:, 0] * CTX + found[:, 1]).astype(np.int64)


SMALL = {"batch_tokens": 100, "buffer_tokens": 400}


def test_every_token_comes_once_per_epoch(store):
    stream = store.vectors(A, epochs=2, **SMALL)
    assert (stream.d, stream.n_tokens, stream.n_batches) == (D, N_TOKENS, 16)
    batches = list(stream)
    sizes = [len(batch) for batch in batches]
    assert sizes == ([100] * 15 + [36]) * 2
    for epoch in (batches[:16], batches[16:]):
        np.testing.assert_array_equal(np.sort(names(epoch)), np.arange(N_TOKENS))
    assert not np.array_equal(names(batches[:16]), names(batches[16:]))


def test_the_values_are_those_stored(store):
    want = activations(N, 0, D).astype(np.float16).astype(np.float32).reshape(-1, D)
    batches = list(store.vectors(A, **SMALL))
    np.testing.assert_array_equal(np.concatenate(batches), want[names(batches)])
    assert batches[0].dtype == np.float32
    half = list(store.vectors(A, dtype="float16", **SMALL))
    assert half[0].dtype == np.float16
    np.testing.assert_array_equal(np.concatenate(half), np.concatenate(batches))


def test_the_order_is_that_of_the_seed_on_any_number_of_threads(store):
    want = list(store.vectors(A, epochs=2, **SMALL))
    for prefetch in (1, 2, 5):
        got = list(store.vectors(A, epochs=2, prefetch=prefetch, **SMALL))
        assert [x.tobytes() for x in got] == [x.tobytes() for x in want]
    other = list(store.vectors(A, seed=1, epochs=2, **SMALL))
    assert not np.array_equal(names(want), names(other))


def test_the_order_is_the_same_for_good():
    epoch = Mixing(n_tokens=20, block_tokens=3, pool_tokens=9, seed=7, shuffle=True).epoch(2)
    pools = [epoch.pool(i) for i in range(epoch.n_pools)]
    order = [pool.tokens[pool.order].tolist() for pool in pools]
    assert order == [
        [11, 9, 18, 19, 10],
        [8, 5, 7, 3, 4, 6],
        [17, 12, 14, 16, 2, 13, 0, 15, 1],
    ]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_stream_goes_on_at_a_cursor_to_the_bit(store, prefetch):
    whole = list(store.vectors(A, epochs=3, **SMALL))
    for stop in (0, 1, 15, 16, 17, 40):
        stream = store.vectors(A, epochs=3, prefetch=prefetch, **SMALL)
        taken = list(islice(stream, stop))
        assert len(taken) == stop
        cursor = json.dumps(stream.cursor)
        assert len(cursor) < 500
        rest = list(store.vectors(A, epochs=3, prefetch=prefetch, cursor=cursor, **SMALL))
        assert [x.tobytes() for x in taken + rest] == [x.tobytes() for x in whole]


def test_a_stream_begins_anew_with_every_loop(store):
    stream = store.vectors(A, **SMALL)
    assert next(iter(stream)).tobytes() == next(iter(stream)).tobytes()
    assert [x.tobytes() for x in stream] == [x.tobytes() for x in stream]


def test_without_end_when_asked(store):
    batches = iter(store.vectors(A, epochs=None, batch_tokens=N_TOKENS, prefetch=1))
    assert len({next(batches).tobytes() for _ in range(5)}) == 5


def test_rows_of_several_hooks_are_the_same_tokens(store):
    for batch in store.vectors([B, A], prefetch=2, **SMALL):
        assert list(batch) == [B, A]
        assert batch[B].shape == (len(batch[A]), 2 * D)
        np.testing.assert_array_equal(batch[A][:, :2], batch[B][:, :2])
    assert store.vectors([A, B], **SMALL).widths == {A: D, B: 2 * D}


def test_hooks_of_different_captures_are_aligned_too(tmp_path):
    with astore.open(tmp_path / "run", "w") as store:
        fill(store, [Vectors(A, D)])
        order = np.random.default_rng(0).permutation(N)[: N - 8]
        dropped = pytest.warns(astore.DroppedWarning, match="1 of .* tokens have no vector")
        with dropped, store.writer(vectors=[Vectors(B, D)], n_ctx=CTX) as writer:
            docs = np.arange(N_TOKENS).reshape(N, CTX) // 20
            x = activations(N, 0, D)
            x[order[3], 5] = np.nan  # not stored, so neither hook gives this token
            zeros = np.zeros((len(order), CTX), np.int64)
            for split, ids in (("train", order[order < N // 2]), ("val", order[order >= N // 2])):
                writer.add(ids, zeros[: len(ids)], docs[ids], split, {B: x[ids]})
        stream = store.vectors([A, B], **SMALL)
        assert stream.n_tokens == len(order) * CTX - 1
        found = list(stream)
        for batch in found:
            np.testing.assert_array_equal(batch[A], batch[B])
        want = (order[:, None] * CTX + np.arange(CTX)).reshape(-1)
        want = want[want != order[3] * CTX + 5]
        np.testing.assert_array_equal(np.sort(names([b[A] for b in found])), np.sort(want))


def test_splits_and_documents_are_chosen_by_sql(store):
    val = store.vectors(A, split="val", **SMALL)
    np.testing.assert_array_equal(np.sort(names(val)), np.arange(N_TOKENS // 2, N_TOKENS))
    chosen = store.vectors(A, where="doc_id % 3 = 1 AND name LIKE 'd%' -- a comment", **SMALL)
    want = [t for t in range(N_TOKENS) if t // 20 % 3 == 1]
    assert np.sort(names(chosen)).tolist() == want
    both = store.vectors([A, B], split="train", where="doc_id % 3 = 1", **SMALL)
    assert np.sort(names(b[A] for b in both)).tolist() == [t for t in want if t < N_TOKENS // 2]


def test_plain_reading_gives_the_order_of_capture(store):
    stream = store.vectors(A, shuffle=False, **SMALL)
    np.testing.assert_array_equal(names(stream), np.arange(N_TOKENS))


def test_neighbours_are_as_far_apart_as_in_a_permutation_of_everything(store):
    """One pool: distances and serial correlation against what chance gives, over 20 seeds."""
    orders = [names(store.vectors(A, seed=seed, batch_tokens=64)) for seed in range(20)]
    n_pairs = len(orders) * (N_TOKENS - 1)
    distances = np.concatenate([np.abs(np.diff(np.argsort(order))) for order in orders])
    for bound in (1, 8, 64, 512):
        chance = (2 * bound * N_TOKENS - bound * (bound + 1)) / (N_TOKENS * (N_TOKENS - 1))
        spread = np.sqrt(chance * (1 - chance) / n_pairs)
        assert abs(np.mean(distances <= bound) - chance) < 5 * spread
    lag = np.mean([np.corrcoef(order[:-1], order[1:])[0, 1] for order in orders])
    assert abs(lag) < 4 / np.sqrt(n_pairs)


def test_neighbours_are_spread_over_a_small_buffer_too(store):
    """Several pools: two neighbours fall into one batch as rarely as chance in one pool has it."""
    batch, pool = 64, 512
    together: list[float] = []
    for seed in range(20):
        order = names(store.vectors(A, seed=seed, batch_tokens=batch, buffer_tokens=pool))
        of_batch = np.argsort(order) // batch
        together.append(float(np.mean(of_batch[1:] == of_batch[:-1])))
    assert np.mean(together) < 1.1 * batch / pool


@given(
    n=st.integers(1, 300),
    block=st.integers(1, 40),
    pool=st.integers(1, 200),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=60)
def test_any_sizes_give_a_permutation(n, block, pool, seed):
    epoch = Mixing(n, block, pool, seed, True).epoch(0)
    pools = [epoch.pool(i) for i in range(epoch.n_pools)]
    order = np.concatenate([p.tokens[p.order] for p in pools])
    assert sorted(order.tolist()) == list(range(n))
    sizes = [len(p.tokens) for p in pools]
    assert np.diff(epoch.starts).tolist() == sizes
    assert max(sizes) < pool + 2 * block


@given(data=st.data())
@settings(max_examples=25)
def test_any_settings_give_every_token_once_and_resume(store, data):
    batch = data.draw(st.integers(50, N_TOKENS))
    chosen = {
        "batch_tokens": batch,
        "buffer_tokens": data.draw(st.integers(30, 2000)),
        "seed": data.draw(st.integers(0, 9)),
        "prefetch": data.draw(st.integers(0, 3)),
        "shuffle": data.draw(st.booleans()),
    }
    stream = store.vectors(A, **chosen)
    stop = data.draw(st.integers(0, stream.n_batches))
    taken = list(islice(stream, stop))
    rest = list(store.vectors(A, cursor=stream.cursor, **chosen))
    assert sorted(names(taken + rest).tolist()) == list(range(N_TOKENS))


def test_float16_widens_exactly():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, -1)
    out = np.empty(halves.shape, np.float32)
    gather(np.array([halves.ctypes.data]), halves.dtype, out)
    np.testing.assert_array_equal(out, halves.astype(np.float32))


def test_batches_that_are_kept_or_changed_stay_as_they_are(store):
    want = [batch.copy() for batch in store.vectors(A, epochs=4, **SMALL)]
    for prefetch in (0, 2):
        kept = []
        for i, batch in enumerate(store.vectors(A, epochs=4, prefetch=prefetch, **SMALL)):
            if i % 3:
                batch[:] = np.nan  # a learner may work in place
            else:
                kept.append((i, batch))
        for i, batch in kept:
            np.testing.assert_array_equal(batch, want[i])


def test_memory_is_used_again_and_never_while_somebody_holds_it():
    buffers = Buffers(10, [(3, "float32")], kept=3)
    (first,) = buffers.take(10)
    part, place = first[2:4], first.ctypes.data
    del first
    (second,) = buffers.take(9)
    assert second.ctypes.data != place
    del part
    (third,) = buffers.take(10)
    assert third.ctypes.data == place
    assert not np.shares_memory(second, third)


def test_torch_tensors_on_request(store):
    torch = pytest.importorskip("torch")
    batch = next(iter(store.vectors(A, framework="torch", **SMALL)))
    assert batch.dtype == torch.float32
    assert batch.shape == (100, D)
    np.testing.assert_array_equal(batch.numpy(), next(iter(store.vectors(A, **SMALL))))


def test_shards_in_other_encodings_are_read_by_arrow(tmp_path):
    small = small_store(tmp_path / "run")
    with astore.open(small.path) as store:
        got = np.concatenate(list(store.vectors("resid", batch_tokens=50, shuffle=False)))
    want = small.vectors.astype(np.float16).astype(np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("hook", "chosen", "message"),
    [
        ("blocks.0.hook_resid_pos", {}, "Did you mean 'blocks.0.hook_resid_post'"),
        ([A, A], {}, "different hooks"),
        ([], {}, "one or several"),
        (A, {"batch_tokens": N_TOKENS + 1}, "batch_tokens: 1537 rows of the 1536 there are"),
        (A, {"batch_tokens": 0}, "batch_tokens: want an integer >= 1, got 0"),
        (A, {"prefetch": -1}, "prefetch"),
        (A, {"epochs": 0}, "epochs"),
        (A, {"buffer_tokens": 0}, "buffer_tokens"),
        (A, {"split": "test"}, "no split 'test'; splits: train, val"),
        (A, {"where": "nam = 'd1'"}, "where=\"nam = 'd1'\": want an SQL condition"),
        (A, {"where": "doc_id = -5"}, "no vectors of .* with split=None, where='doc_id = -5'"),
        (A, {"where": "doc_id IN (SELECT 1 FROM read_csv('/etc/passwd'))"}, "not allowed here"),
        (A, {"where": "true); DROP TABLE shards; SELECT (1"}, "want one statement, got 3"),
        (B, {"dtype": "float16"}, "stored as float32"),
        (A, {"cursor": "{"}, "cursor: want"),
        (A, {"cursor": {"epoch": 0}}, "another stream"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(store, hook, chosen, message):
    with pytest.raises(astore.StoreError, match=message):
        store.vectors(hook, **{"batch_tokens": 10, **chosen})


def test_a_hook_without_vectors_says_that_it_has_rows(tmp_path):
    small = small_store(tmp_path / "run")
    with (
        astore.open(small.path) as store,
        pytest.raises(astore.ContentError, match="captured as rows only.*vectors: resid"),
    ):
        store.vectors(HOOK)


def test_a_cursor_of_other_settings_or_another_store_is_refused(store, tmp_path):
    cursor = store.vectors(A, **SMALL).cursor
    with pytest.raises(astore.ContentError, match="seed: cursor 0, stream 1"):
        store.vectors(A, seed=1, cursor=cursor, **SMALL)
    with pytest.raises(astore.ContentError, match="batch_tokens: cursor 100, stream 50"):
        store.vectors(A, batch_tokens=50, buffer_tokens=400, cursor=cursor)
    with pytest.raises(astore.ContentError, match="no end of a batch"):
        store.vectors(A, cursor={**cursor, "token": 7}, **SMALL)
    with astore.open(tmp_path / "run", "w") as other:
        fill(other, [Vectors(A, D), Vectors(B, 2 * D, "float32")], offset=1000)
        with pytest.raises(astore.ContentError, match="data: cursor"):
            other.vectors(A, cursor=cursor, **SMALL)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_lost_or_shortened_shard_is_named(tmp_path, prefetch):
    with astore.open(tmp_path / "run", "w") as store:
        fill(store, [Vectors(A, D)])
        stream = store.vectors(A, prefetch=prefetch, **SMALL)
        shard = min((tmp_path / "run" / "store").glob("vectors*"))
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(astore.ShardError, match=f"{shard.name}.*verify --repair"):
            list(stream)
        shard.unlink()
        with pytest.raises(astore.ShardError, match=f"{shard.name}.*verify --repair"):
            list(stream)


def test_a_changed_vector_is_named_where_reading_is_checked(tmp_path):
    with astore.open(tmp_path / "run", "w") as store:
        fill(store, [Vectors(A, D)])
        shard = max((tmp_path / "run" / "store").glob("vectors-*"))
        whole = list(store.vectors(A, checked=True, prefetch=2, epochs=2, **SMALL))
        data = bytearray(shard.read_bytes())
        value = activations(N, 0, D)[-1, -1].astype(np.float16).tobytes()
        data[data.rindex(value) + 5] ^= 1
        shard.write_bytes(data)
        unchecked = list(store.vectors(A, epochs=2, **SMALL))
        assert sum(not np.array_equal(*pair) for pair in zip(whole, unchecked, strict=True)) == 2
        for prefetch in (0, 2):
            with pytest.raises(astore.ShardError, match=f"{shard.name}: .*page 0.*verify --repair"):
                list(store.vectors(A, checked=True, prefetch=prefetch, **SMALL))


def test_a_shard_that_is_shortened_between_pools_is_named(tmp_path):
    with astore.open(tmp_path / "run", "w") as store:
        fill(store, [Vectors(A, D)])
        ((path, n_rows), *_) = store.sql("SELECT file, n_rows FROM vector_shards").fetchall()
    file = VectorFile(tmp_path / "run" / "store" / path, n_rows, D, "float16")
    file.place(np.array([[0, 10]]))
    file.path.write_bytes(file.path.read_bytes()[:5000])
    with pytest.raises(astore.ShardError, match="has 5000 bytes, had.*verify --repair"):
        file.place(np.array([[0, 10]]))


@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed in /proc")
def test_mapped_shards_are_not_held_open(store):
    stream = store.vectors(A, **SMALL)
    list(stream)
    shards = {file.path for file in stream._selection.sources[0].files}
    assert len(shards) > 1
    assert not shards & {Path(os.path.realpath(path)) for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("last_of_size", [0x00, 0x7F])
def test_a_shard_whose_page_header_lies_is_named(tmp_path, last_of_size):
    with astore.open(tmp_path / "run", "w") as store:
        fill(store, [Vectors(A, D)])
        ((name, n_rows), *_) = store.sql("SELECT file, n_rows FROM vector_shards").fetchall()
    path = tmp_path / "run" / "store" / name
    at = pq.read_metadata(path).row_group(0).column(3).data_page_offset
    data = bytearray(path.read_bytes())
    # kind, size, and size once more, of three bytes each as a varint (parquet.thrift, PageHeader)
    assert data[at : at + 3] == b"\x15\x00\x15"
    assert data[at + 6] == 0x15
    data[at + 9] = last_of_size
    path.write_bytes(data)
    file = VectorFile(path, n_rows, D, "float16")
    with pytest.raises(astore.ShardError, match=f"{name}.*not where its header says"):
        file.place(np.array([[0, n_rows]]))


def test_a_shard_that_is_removed_while_it_is_read_is_read_to_its_end(tmp_path):
    with astore.open(tmp_path / "run", "w") as store:
        fill(store, [Vectors(A, D)])
        batches = iter(store.vectors(A, **SMALL))
        found = [next(batches)]
        for shard in (tmp_path / "run" / "store").glob("vectors*"):
            shard.unlink()
        assert sorted(names(found + list(batches))) == list(range(N_TOKENS))


def test_a_store_of_rows_alone_has_no_vectors(tmp_path):
    with astore.open(tmp_path / "run", "w") as store:
        with store.writer(rows=[Rows(A, D, max_density=1.0)], n_ctx=CTX) as writer:
            zeros = np.zeros((1, CTX), np.int64)
            writer.add(np.arange(1), zeros, zeros, "train", {A: activations(1, 0, D)})
        with pytest.raises(astore.ContentError, match="Hooks with vectors: none"):
            store.vectors(A)
