"""Reconstructions in place of activations."""

import pytest
import torch
from small_dictionaries import Given
from small_models import small, some_tokens, tiny

import lmmono as lm
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.splicing import spliced
from lmmono.errors import DictionaryError, ModelError
from lmmono.models.hooks import Edit, run_with_cache, run_with_edit

POST, RESID = "blocks.0.mlp.hook_post", "blocks.1.hook_resid_post"


@pytest.mark.parametrize("hook", [POST, RESID, "blocks.1.attn.hook_z", "blocks.0.hook_resid_mid"])
@pytest.mark.parametrize("family", ["crate", "gpt2"])
def test_the_logits_are_those_of_an_edit_that_sets_the_reconstruction(family, hook):
    model, tokens = tiny(family), some_tokens(3, 8)
    _, acts = run_with_cache(model, tokens, hook)
    vectors = acts[hook].flatten(2)
    given = Given(vectors.shape[2], 30, hook=hook)
    by_hand = run_with_edit(model, tokens, Edit(hook, "set", given.reconstruct(vectors)))
    found = lm.run_with_sae(model, given, tokens)
    torch.testing.assert_close(found, by_hand)
    assert (found - run_with_cache(model, tokens, hook)[0]).abs().max() > 0.01


def test_with_the_error_term_the_logits_are_the_clean_ones():
    model, tokens = small(), some_tokens(2, 9)
    clean, acts = run_with_cache(model, tokens, [POST, RESID])
    saes = {name: Given(each.shape[2], 20, hook=name) for name, each in acts.items()}
    found = lm.run_with_sae(model, saes, tokens, error_term=True)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-5)
    assert (lm.run_with_sae(model, saes, tokens) - clean).abs().max() > 0.01


def test_of_several_dictionaries_each_sees_what_those_before_it_left():
    model, tokens = small(), some_tokens(2, 9)
    _, acts = run_with_cache(model, tokens, [POST, RESID])
    first, second = (Given(acts[name].shape[2], 20, hook=name) for name in (POST, RESID))
    with spliced(model, first):
        _, changed = run_with_cache(model, tokens, RESID)
    by_hand = run_with_edit(model, tokens, Edit(RESID, "set", second.reconstruct(changed[RESID])))
    both = lm.run_with_sae(model, {RESID: second, POST: first}, tokens)
    torch.testing.assert_close(both, by_hand)


def test_an_identity_dictionary_changes_nothing():
    model, tokens = small(), some_tokens(2, 9)
    clean, acts = run_with_cache(model, tokens, POST)
    identity = Control("raw").fit(acts[POST].flatten(0, 1))
    assert torch.equal(lm.run_with_sae(model, identity, tokens, hook=POST), clean)


def test_after_the_call_the_model_is_as_before():
    model, tokens = small(), some_tokens(2, 9)
    model.train()
    clean = model(tokens).logits
    lm.run_with_sae(model, Given(64, 20, hook=POST), tokens)
    assert model.training
    assert torch.equal(model(tokens).logits, clean)


def test_text_goes_through_the_tokenizer():
    class Letters:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) - ord("a") for letter in text]

    model, given = small(), Given(64, 20, hook=POST)
    by_ids = lm.run_with_sae(model, given, torch.tensor([2, 0, 19]))
    assert torch.equal(lm.run_with_sae(model, given, "cat", tokenizer=Letters()), by_ids)


def test_what_does_not_fit_is_refused_with_a_way_out():
    model, tokens = small(), some_tokens(1, 4)
    with pytest.raises(DictionaryError, match="knows no hook; say where it goes"):
        lm.run_with_sae(model, Given(64, 20), tokens)
    with pytest.raises(ModelError, match="did you mean blocks.0.mlp.hook_post"):
        lm.run_with_sae(model, Given(64, 20), tokens, hook="blocks.0.mlp.hook_pots")
    with pytest.raises(DictionaryError, match="want one hook, 'blocks.*' is"):
        lm.run_with_sae(model, Given(64, 20), tokens, hook="blocks.*")
    with pytest.raises(DictionaryError, match="width d_in = 20, got 64"):
        lm.run_with_sae(model, Given(20, 20), tokens, hook=POST)
    with pytest.raises(DictionaryError, match="not fitted"):
        lm.run_with_sae(model, Control("raw"), tokens, hook=POST)
    with pytest.raises(DictionaryError, match="leave hook= out"):
        lm.run_with_sae(model, {POST: Given(64, 20)}, tokens, hook=POST)
