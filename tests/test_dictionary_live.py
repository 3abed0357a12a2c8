"""Vectors straight from a model: what the store would give, in an order that can be entered."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import activation_store as astore
from lmmono.captures.capture import capture
from lmmono.data.tokens import TokenRows
from lmmono.dictionaries.classical import Classical
from lmmono.dictionaries.vector_source import model_vectors
from lmmono.errors import DataError, DictionaryError, ModelError
from lmmono.models.hooks import run_with_cache

STREAM, CODE, HEADS = "blocks.0.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.0.attn.hook_z"
N_CTX = 8


def rows(n: int, first: int = 0, split: str = "explain") -> TokenRows:
    ids = np.random.default_rng(first).integers(0, 40, (n, N_CTX)).astype(np.uint16)
    docs = np.repeat(np.arange(first, first + n, dtype=np.int32)[:, None], N_CTX, 1)
    return TokenRows(ids=ids, doc_ids=docs, first_seq_id=first, split=split)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_models.small()


def take(source: object, n: int, start: int = 0) -> list[dict[str, Tensor]]:
    return list(islice(source.batches(start), n))


def matched(got: Tensor, wanted: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of the best one-to-one match (first tokens repeat), and the match."""
    distance = torch.cdist(got, wanted, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    row, place = linear_sum_assignment(distance)
    return distance[row, place], place


def as_set(x: Tensor) -> Tensor:
    """Return the vectors in an order of their own."""
    return torch.from_numpy(x.numpy()[np.lexsort(x.numpy().round(2).T)])


def test_an_epoch_is_what_the_model_computes_each_token_once(model: nn.Module) -> None:
    part = rows(30)
    source = model_vectors(model, part, [STREAM, CODE, HEADS], batch_tokens=37, buffer_tokens=50)
    assert source.widths == {STREAM: 16, CODE: 64, HEADS: 16}
    batches = take(source, 7)
    assert [len(batch[CODE]) for batch in batches] == 6 * [37] + [18]
    _, acts = run_with_cache(
        model, torch.from_numpy(part.ids.astype(np.int64)), [STREAM, CODE, HEADS]
    )
    wanted = torch.cat([acts[h].flatten(2).flatten(0, 1) for h in source.widths], 1)
    got = torch.cat([torch.cat([batch[h] for h in source.widths], 1) for batch in batches])
    assert got.shape == wanted.shape
    distance, _ = matched(got, wanted)
    assert distance.max() < 1e-4  # and so the hooks' rows belong together


def test_the_store_gives_the_same_vectors(model: nn.Module, tmp_path: Path) -> None:
    parts = [rows(20), rows(12, 20, "score")]
    with astore.open(tmp_path / "store.duckdb", mode="w") as store:
        capture(model, parts, hooks=(), vectors=STREAM, into=store, max_tokens=128)
        stored = torch.cat(list(store.vectors(STREAM, batch_tokens=64, framework="torch")))
    live = torch.cat(
        [
            b[STREAM]
            for b in take(model_vectors(model, parts, STREAM, max_tokens=128, batch_tokens=64), 4)
        ]
    )
    assert stored.shape == live.shape
    distance, _ = matched(live, stored)
    assert (distance / live.norm(dim=1).numpy()).max() < 1e-3  # float16


@pytest.mark.parametrize("buffer_tokens", [None, 1, 24, 100])
def test_any_batch_can_be_the_first_also_of_later_epochs(
    model: nn.Module, buffer_tokens: int | None
) -> None:
    source = model_vectors(
        model, [rows(9), rows(4, 9)], [STREAM, CODE], batch_tokens=25, buffer_tokens=buffer_tokens
    )
    whole = take(source, 12)
    for start in (1, 3, 4, 5, 8, 11):
        for late, batch in zip(take(source, 12 - start, start), whole[start:], strict=True):
            assert all(torch.equal(late[hook], batch[hook]) for hook in batch)


def test_the_order_is_the_seeds_and_another_every_epoch(model: nn.Module) -> None:
    def epoch(seed: int, number: int) -> Tensor:
        return take(model_vectors(model, rows(16), STREAM, batch_tokens=128, seed=seed), 1, number)[
            0
        ][STREAM]

    assert torch.equal(epoch(0, 0), epoch(0, 0))
    for other in (epoch(0, 1), epoch(1, 0)):
        assert not torch.equal(other, epoch(0, 0))
        torch.testing.assert_close(as_set(other), as_set(epoch(0, 0)))


def test_tokens_of_a_buffer_are_mixed_not_only_its_rows(model: nn.Module) -> None:
    part = rows(64)
    _, acts = run_with_cache(model, torch.from_numpy(part.ids.astype(np.int64)), CODE)
    (batch,) = take(model_vectors(model, part, CODE, batch_tokens=512), 1)
    _, place = matched(batch[CODE], acts[CODE].flatten(0, 1))
    assert (np.diff(place) == 1).mean() < 0.03


def test_nothing_past_the_last_hook_is_computed(model: nn.Module) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
    ]
    source = model_vectors(model, rows(4), CODE, batch_tokens=32)
    ran.clear()
    take(source, 1)
    for handle in handles:
        handle.remove()
    assert "model.blocks.0.mlp.hook_post" in ran
    assert not any(name.startswith(("model.blocks.1", "lm_head")) for name in ran)


def test_the_model_keeps_its_mode_its_graph_and_its_weights(model: nn.Module) -> None:
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (batch,) = take(model_vectors(model, rows(4), STREAM, batch_tokens=32), 1)
    assert model.training
    assert not batch[STREAM].requires_grad
    assert not batch[STREAM].is_inference()  # such a tensor could not be trained on
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.eval()


def test_the_digest_is_of_weights_rows_and_settings(model: nn.Module) -> None:
    def digest(**changed: object) -> str:
        settings = {"model": model, "rows": rows(6), "hooks": STREAM, "batch_tokens": 16}
        source = model_vectors(**settings | changed)  # type: ignore[arg-type]
        assert source.facts["n_ctx"] == N_CTX
        assert len(source.facts["model_digest"]) == 64
        return source.digest

    changes = [{}, {"seed": 1}, {"batch_tokens": 8}, {"hooks": CODE}, {"max_tokens": 16}]
    changes += [{"rows": rows(6, 6)}, {"model": small_models.small(1)}, {"buffer_tokens": 9}]
    assert digest() == digest()
    assert len({digest(**change) for change in changes}) == len(changes)


def test_a_dictionary_is_fitted_straight_from_a_model(model: nn.Module) -> None:
    pca = Classical("pca", d_sae=4).fit(model_vectors(model, rows(30), STREAM))
    assert pca.hook == STREAM
    assert pca.facts["n_tokens"] == 240
    assert pca.facts["n_ctx"] == N_CTX


def test_wrong_names_and_numbers_say_what_to_change(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="did you mean"):
        model_vectors(model, rows(4), "blocks.0.mlp.hook_pots")
    with pytest.raises(ModelError, match="no width per token"):
        model_vectors(model, rows(4), "blocks.0.attn.hook_pattern")
    with pytest.raises(DataError, match="holds no row"):
        model_vectors(model, rows(4), STREAM, max_tokens=7)
    with pytest.raises(DictionaryError, match="batch_tokens: want an integer >= 1"):
        model_vectors(model, rows(4), STREAM, batch_tokens=0)
    with pytest.raises(DictionaryError, match="several hooks|want one hook"):
        Classical("pca", d_sae=4).fit(model_vectors(model, rows(4), [STREAM, CODE]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["gpt2", "crate", "llama"])
def test_padding_and_skipped_tokens_have_no_vector(arch: str, side: str) -> None:
    """Rows of 5 tokens in rows of 8; two ids and each row's first token are left out as well."""
    model, short = small_models.tiny(arch), rows(12).ids[:, :5]
    ids, docs = np.zeros((12, N_CTX), np.uint16), np.full((12, N_CTX), -1, np.int32)
    here = slice(3, 8) if side == "left" else slice(0, 5)
    ids[:, here], docs[:, here] = short, np.arange(12)[:, None]
    part = TokenRows(ids=ids, doc_ids=docs, first_seq_id=0, split="explain")
    _, acts = run_with_cache(model, torch.from_numpy(short.astype(np.int64)), CODE)
    source = model_vectors(model, part, CODE, batch_tokens=7, buffer_tokens=20)
    assert source.n_tokens == 60
    epoch = torch.cat([batch[CODE] for batch in take(source, 9)])
    assert len(epoch) == 60
    assert matched(epoch, acts[CODE].flatten(0, 1))[0].max() < 1e-4
    entered = torch.cat([batch[CODE] for batch in take(source, 5, start=4)])
    assert torch.equal(entered, epoch[28:])
    skip = astore.Skip(token_ids=(int(short[0, 2]), int(short[3, 4])), first=1)
    kept = ~np.isin(short, skip.token_ids) & (np.arange(5) > 0)
    fewer = model_vectors(model, part, CODE, batch_tokens=100, buffer_tokens=20, skip=skip)
    (batch,) = take(fewer, 1)
    assert fewer.n_tokens == len(batch[CODE]) == kept.sum() < 48
    assert matched(batch[CODE], acts[CODE][torch.from_numpy(kept)])[0].max() < 1e-4
    assert fewer.digest != source.digest
    with pytest.raises(DictionaryError, match=r"skip: want a mask of bools \[12, 8\]"):
        model_vectors(model, part, CODE, skip=kept)
    with pytest.raises(DictionaryError, match="no token is left"):
        model_vectors(model, part, CODE, skip=np.ones((12, N_CTX), bool))
