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


def test_a_prefix_that_somebody_else_put_into_a_cache_is_used_with_its_values():
    model, tokens = small(), some_tokens(1, 8)
    own = DynamicCache(config=model.config)
    model(tokens[:, :3], past_key_values=own, use_cache=True)
    # prefix tuning gives keys and values of one width; here they are those of three real tokens
    theirs = DynamicCache(config=model.config)
    for i, layer in enumerate(own.layers):
        theirs.update(layer.keys, layer.keys, i)
    out = model(tokens[:, 3:6], past_key_values=theirs, use_cache=True)
    rest = model(tokens[:, 6:], past_key_values=theirs, use_cache=True)
    both = torch.cat([out.logits, rest.logits], 1)
    torch.testing.assert_close(both, model(tokens).logits[:, 3:])
    assert theirs.layers[1].values.equal(theirs.layers[1].keys)
    assert theirs.layers[1].keys.shape[2] == 8


def test_a_cache_is_made_where_the_configuration_asks():
    model, tokens = small(use_cache=True), some_tokens(1, 4)
    assert model(tokens)[CACHE_ARGUMENT].get_seq_length() == 4
    assert small()(tokens).get(CACHE_ARGUMENT) is None
    assert model(tokens, use_cache=False).get(CACHE_ARGUMENT) is None


def test_generation_beyond_the_context_is_refused_and_padding_does_not_count():
    model = small()
    with pytest.raises(ModelError, match="33 tokens do not fit the model's 32 positions"):
        model.generate(some_tokens(1, 30), max_new_tokens=9, min_new_tokens=9)
    tokens, mask = padded([some_tokens(30), some_tokens(28)], "left")
    rows = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), mask], 1)
    options = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    new = model.generate(rows, **options)
    assert new.shape == (2, 36) and new[0, 34:].equal(greedy(model, tokens[:1], 2)[0, 30:])


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
