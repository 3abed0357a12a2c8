"""Capture of any torch module: what reaches the store equals what forward hooks see."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import activation_store as astore
from activation_store import StoreError
from activation_store.write.recorder import Batch, digest, match_modules


class Block(nn.Module):
    """A residual block that returns a tuple, as the blocks of transformers do."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up = nn.Linear(d, 4 * d)
        self.act = nn.ReLU(inplace=True)
        self.down = nn.Linear(4 * d, d)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.dropout(self.down(self.act(self.up(x)))), None


class Tiny(nn.Module):
    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)[0]
        return x


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, 40, (5, 6, 32), generator=torch.Generator().manual_seed(1)))


def seen(model: Tiny, batches: list[torch.Tensor], path: str) -> np.ndarray:
    found: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *a: found.append(a[2]))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    outputs = [x[0] if isinstance(x, tuple) else x for x in found]
    return torch.cat(outputs).numpy()


def test_rows_vectors_and_tokens_equal_what_hooks_see(
    model: Tiny, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    model.train()
    with astore.open(tmp_path, mode="w") as store:
        n = astore.capture(
            model, batches, hooks="blocks.*.act", vectors="blocks.1", into=store, threshold=0.1
        )
        assert n == 30
        assert model.training
        assert model.blocks[0].dropout.training
        for hook in ("blocks.0.act", "blocks.1.act"):
            x = seen(model, batches, hook)
            unit, seq, pos = np.nonzero(x.transpose(2, 0, 1) > 0.1)
            rows = store.sql(
                "SELECT unit, seq_id, pos, act, doc_id, token_id FROM activations "
                "WHERE hook = $hook ORDER BY unit, seq_id, pos",
                hook=hook,
            ).fetchnumpy()
            np.testing.assert_array_equal(rows["unit"], unit)
            np.testing.assert_array_equal(rows["seq_id"], seq)
            np.testing.assert_array_equal(rows["pos"], pos)
            np.testing.assert_array_equal(rows["act"], x[seq, pos, unit])
            np.testing.assert_array_equal(rows["doc_id"], seq)
            np.testing.assert_array_equal(rows["token_id"], torch.cat(batches).numpy()[seq, pos])
        vectors = store.sql("SELECT vector FROM vectors ORDER BY seq_id, pos").fetchall()
        expected = seen(model, batches, "blocks.1").astype(np.float16).reshape(-1, 16)
        np.testing.assert_array_equal(np.array([v for (v,) in vectors]), expected)


def test_a_stopped_capture_goes_on_without_repeating_forward_passes(
    model: Tiny, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    settings = {"hooks": "blocks.*.act", "commit_tokens": 1024}
    calls: list[int] = []
    model.register_forward_hook(lambda *a: calls.append(1))

    many = batches * 10
    with astore.open(tmp_path / "a", mode="w") as store:
        astore.capture(model, many, into=store, **settings)
        whole = store.sql("SELECT * FROM unit_stats ORDER BY ALL").fetchall()
    with astore.open(tmp_path / "b", mode="w") as store:
        with pytest.raises(KeyboardInterrupt):
            astore.capture(model, _until(many, 35), into=store, **settings)
        calls.clear()
        assert astore.capture(model, many, into=store, **settings) == 300
        assert len(calls) < 30
        assert store.sql("SELECT * FROM unit_stats ORDER BY ALL").fetchall() == whole


def _until(batches: list[torch.Tensor], n: int) -> Iterator[torch.Tensor]:
    yield from batches[:n]
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_that_the_next_module_changes_in_place_is_stored_as_it_was(
    model: Tiny, batches: list[torch.Tensor], tmp_path: Path, mode: Any
) -> None:
    """The ReLU of a block works in place on the output of its linear layer."""
    with astore.open(tmp_path, mode="w") as store, mode():
        astore.capture(model, batches, vectors="blocks.0.up", into=store)
        got = store.sql("SELECT vector FROM vectors ORDER BY seq_id, pos").fetchall()
    block = model.blocks[0]
    with torch.no_grad():
        x = block.up(model.embed(torch.cat(batches)))
    assert (x < 0).any()
    np.testing.assert_array_equal(
        np.array([v for (v,) in got]), x.numpy().astype(np.float16).reshape(-1, 64)
    )


def test_documents_padding_and_split_of_a_batch_are_kept(model: Tiny, tmp_path: Path) -> None:
    ids = np.arange(8).reshape(2, 4)
    docs = np.array([[3, 3, 4, 4], [5, 5, -1, -1]])
    with astore.open(tmp_path, mode="w") as store:
        astore.capture(model, [Batch(ids, docs, "score")], vectors="embed", into=store)
        rows = store.sql("SELECT doc_id, split, token_id FROM tokens ORDER BY token_id").fetchall()
    assert rows == [(doc, "score", i) for i, doc in enumerate([3, 3, 4, 4, 5, 5])]


class Attending(nn.Module):
    """One attention layer with learned positions, as far as padding matters to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 8), nn.Embedding(16, 8)
        self.out = nn.Identity()

    def forward(self, ids, attention_mask=None, position_ids=None):
        n_ctx = ids.shape[1]
        places = torch.arange(n_ctx) if position_ids is None else position_ids
        x = self.words(ids) + self.places(places)
        hidden = torch.triu(torch.ones(n_ctx, n_ctx, dtype=torch.bool), 1)
        if attention_mask is not None:
            hidden = hidden | ~attention_mask[:, None, :].bool()
        weights = (x @ x.mT).masked_fill(hidden, -1e9).softmax(-1)
        return self.out(weights @ x)


def vectors_of(store: astore.Store) -> dict[tuple[int, int], np.ndarray]:
    rows = store.sql("SELECT seq_id, pos, vector FROM vectors").fetchall()
    return {(seq, pos): np.array(vector) for seq, pos, vector in rows}


@pytest.mark.parametrize("given", [False, True])
def test_padding_on_the_left_changes_no_activation(tmp_path: Path, given: bool) -> None:
    torch.manual_seed(0)
    model = Attending()
    ids, docs = torch.randint(1, 40, (3, 6)), np.arange(3)[:, None] + np.zeros((3, 6), int)
    padded, n_pad = torch.zeros((3, 10), dtype=torch.int64), 4
    padded[:, n_pad:], padded_docs = ids, np.pad(docs, ((0, 0), (n_pad, 0)), constant_values=-1)
    mask = torch.as_tensor(padded_docs >= 0)
    keywords = {"attention_mask": mask, "position_ids": mask.cumsum(1).sub(1).clip(0)}
    batch = Batch(padded, padded_docs, keywords=keywords if given else {})
    settings = {"vectors": "out", "vector_dtype": "float32"}
    with astore.open(tmp_path / "a", "w") as store:
        astore.capture(model, [Batch(ids, docs)], into=store, **settings)
        whole = vectors_of(store)
    with astore.open(tmp_path / "b", "w") as store:
        astore.capture(model, [batch], into=store, **settings)
        shifted = {(seq, pos - n_pad): x for (seq, pos), x in vectors_of(store).items()}
    assert whole.keys() == shifted.keys()
    for place, vector in whole.items():
        np.testing.assert_allclose(shifted[place], vector, atol=1e-6)


def test_a_second_capture_adds_sequences_with_numbers_of_their_own(
    model: Tiny, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    settings = {"hooks": "blocks.0.act", "max_density": 1.0}
    with astore.open(tmp_path, "w") as store:
        astore.capture(model, batches[:1], into=store, **settings)
        with pytest.raises(StoreError, match="sequence 0: its tokens or documents differ"):
            astore.capture(model, batches[1:3], into=store, **settings)
        more = [Batch(batches[1], seq_ids=np.arange(6, 12)), batches[2]]
        assert astore.capture(model, [batches[0], *more], into=store, **settings) == 18
        (n,) = store.sql("SELECT count(DISTINCT seq_id) FROM tokens").fetchone() or ()
        acts = store.sql("SELECT count(*) FROM acts").fetchone()
    assert n == 18
    assert acts == (int((seen(model, batches[:3], "blocks.0.act") > 0).sum()),)


def test_values_beyond_float16_are_kept_as_float32_or_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 3))
    with torch.no_grad():
        model[0].weight[2, 1] = 1e5
    ids = np.array([[0, 1, 2, 3]])
    with astore.open(tmp_path / "a", "w") as store:
        message = r"1 of 4 tokens have no vector: 0 \(float16\) has .*, 1 beyond 65,504"
        with pytest.warns(astore.DroppedWarning, match=message):
            astore.capture(model, [ids], vectors="0", into=store)
    with astore.open(tmp_path / "b", "w") as store:
        astore.capture(model, [ids], vectors="0", vector_dtype="float32", into=store)
        assert vectors_of(store)[0, 2][1] == 1e5


class Odd(nn.Module):
    """Outputs that are not one vector per token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.part = nn.Embedding(40, 8), nn.Identity()

    def forward(self, ids, kind="flat"):
        x = self.words(ids)
        shapes = {"flat": x.flatten(0, 1), "one": x[:, 0], "heads": x.unflatten(2, (2, 4))}
        return self.part({**shapes, "mapping": {"hidden": x}, "number": 3}[kind])


def test_outputs_per_token_of_any_shape_are_taken_and_others_named(tmp_path: Path) -> None:
    model, ids = Odd(), torch.arange(12).reshape(2, 6)
    expected = model.words(ids).detach().numpy().reshape(-1, 8)
    for kind in ("flat", "heads", "mapping"):
        with astore.open(tmp_path / kind, "w") as store:
            batch = Batch(ids, keywords={"kind": kind})
            astore.capture(model, [batch], vectors="part", vector_dtype="float32", into=store)
            np.testing.assert_array_equal(np.array([*vectors_of(store).values()]), expected)
    wrong = [
        ({"kind": "one"}, ids, r"part: gives a tensor of shape \[2, 8\], want \[batch, n_ctx, d\]"),
        ({"kind": "number"}, ids, "part: gives int, want a tensor"),
        ({}, ids + 40, "token ids 40 to 51 and 6 positions; give ids of its vocabulary"),
    ]
    for keywords, tokens, message in wrong:
        with (
            astore.open(tmp_path / "wrong", "w", overwrite=True) as store,
            pytest.raises(StoreError, match=message),
        ):
            astore.capture(model, [Batch(tokens, keywords=keywords)], vectors="part", into=store)


def test_wrong_paths_stores_and_models_are_refused(
    model: Tiny, batches: list[torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"blocks.0.akt: names no submodule of Tiny; it has embed"):
        match_modules(model, "blocks.0.akt")
    with pytest.raises(StoreError, match="it has blocks.0.act, blocks.1.act"):
        match_modules(model, "layers.*.act")
    with astore.open(tmp_path, mode="w") as store:
        with pytest.raises(StoreError, match="no batch"):
            astore.capture(model, [], hooks="blocks.0.act", into=store)
        astore.capture(model, batches, hooks="blocks.0.act", into=store)
    with (
        astore.open(tmp_path) as store,
        pytest.raises(StoreError, match="open for reading"),
    ):
        astore.capture(model, batches, hooks="blocks.1.act", into=store)
    other = Tiny()
    assert digest(other) != digest(model)
    with (
        astore.open(tmp_path, mode="a") as store,
        pytest.raises(StoreError, match="model_digest: the store holds"),
    ):
        astore.capture(other, batches, hooks="blocks.1.act", into=store)
