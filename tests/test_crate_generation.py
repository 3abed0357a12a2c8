"""CRATE's cache of one tensor per layer, and padded rows: the same text as without either."""

import pytest
import torch
from small_models import VARIANTS, small, some_tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lmmono.errors import ModelError
from lmmono.models.build import build_model
from lmmono.models.crate import CACHE_ARGUMENT, CrateForCausalLM
from lmmono.recipe.sections import Gpt2Model


def greedy(model: CrateForCausalLM, tokens: Tensor, n_new: int) -> Tensor:
    """Return greedy continuations by running the whole row again for every token."""
    for _ in range(n_new):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_a_cache_equals_running_every_row_whole(options, cache):
    model, tokens = small(**options), some_tokens(2, 5)
    expected = greedy(model, tokens, 8)
    new = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=8,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
    )
    assert new.equal(expected)


@pytest.mark.parametrize("options", [{}, {"separate_query": True}])
def test_the_cache_holds_one_tensor_per_layer_half_of_gpt2s(options):
    def cached(model, cache):
        model(some_tokens(2, 7), **{CACHE_ARGUMENT: cache}, use_cache=True)
        tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
        return sum(t.untyped_storage().nbytes() for t in tensors)

    crate = small(**options)
    section = Gpt2Model(arch="gpt2", n_layers=2, d_model=16, n_heads=2)
    gpt2 = build_model(section, d_vocab=50, n_ctx=32, seed=0)
    assert cached(crate, DynamicCache(config=crate.config)) == 2 * (2 * 7 * 16 * 4)
    assert cached(gpt2, DynamicCache(config=gpt2.config)) == 2 * cached(crate, DynamicCache())
    static = StaticCache(config=crate.config, max_cache_len=10)
    assert cached(crate, static) == 2 * (2 * 10 * 16 * 4)


def test_beams_and_a_cut_cache_continue_as_if_nothing_was_cached():
    model, tokens = small(), some_tokens(1, 6)
    ones = torch.ones_like(tokens)
    plain = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "attention_mask": ones}
    with_cache = model.generate(tokens, use_cache=True, **plain)
    assert with_cache.equal(model.generate(tokens, use_cache=False, **plain))
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True)
    cache.crop(-2)
    rest = model(tokens[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(tokens).logits[:, 4:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_give_the_logits_of_the_rows_alone(side, attention):
    model = small(separate_query=True, attn_implementation=attention)
    rows = [some_tokens(n)[:n] for n in (3, 7, 5)]
    tokens, mask = padded(rows, side)
    logits = model(tokens, attention_mask=mask).logits
    for row, out, kept in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(out[kept], model(row[None]).logits[0])
    assert logits.isfinite().all()


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    tokens, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


def test_generating_from_left_padded_rows_equals_generating_from_each():
    model, rows = small(), [some_tokens(n) for n in (3, 6)]
    tokens, mask = padded(rows, "left")
    new = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, out in zip(rows, new, strict=True):
        assert out[6:].equal(greedy(model, row[None], 6)[0, len(row) :])


def test_packed_rows_with_their_own_positions_do_not_see_each_other():
    model, first, second = small(), some_tokens(1, 4), some_tokens(1, 5)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    both = model(torch.cat([first, second], dim=1), position_ids=positions).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_both_its_names(name):
    model, tokens = small(), some_tokens(2, 8)
    whole = model(tokens).logits
    cache = DynamicCache(config=model.config)
    model(tokens[:, :5], **{name: cache}, use_cache=True)
    rest = model(tokens[:, 5:], **{name: cache}, use_cache=True)
    assert torch.allclose(rest.logits, whole[:, 5:], atol=1e-5)
    assert rest[CACHE_ARGUMENT] is cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_store": 1}, "CrateBaseModel takes no argument 'kv_store'; leave it out"),
        ({"token_type_ids": torch.zeros(1, 4)}, "takes no argument 'token_type_ids'"),
        ({"cache": DynamicCache(), "past_key_values": DynamicCache()}, "two names of one thing"),
    ],
)
def test_no_argument_is_swallowed(arguments, message):
    with pytest.raises(ModelError, match=message):
        small()(some_tokens(1, 4), **arguments)
