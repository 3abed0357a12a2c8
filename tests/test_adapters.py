"""Adapters: updates by hand, LoRA's own where the map is the identity, starts, merging."""

import copy
from dataclasses import replace

import lookup_model
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from small_models import small, some_tokens, tiny
from test_finetuning import TEST, TRAIN, VAL

from lmmono.errors import ModelError
from lmmono.methods import adapters
from lmmono.methods.adapters import FORMULAS, NOISY_STARTS, adapted, code_and_update
from lmmono.methods.nonneg import NonNegativeHead
from lmmono.probes.finetuning import FineTuning, finetune, load_classifier
from lmmono.recipe.objective_settings import SparsePenalty

MERGED = ("lora", "rslora", "dora")
HOWS = {
    name: FineTuning("monolora", variant=name, rank=6, k=2, dropout=0.0)
    if name not in ("two_branch", "topk_lora")
    else FineTuning(name, rank=6, k=2, dropout=0.0)
    for name in FORMULAS
}
IDS = some_tokens(2, 7)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def moved(name, family="gpt2"):
    """A model with adapters whose B is far from its start."""
    torch.manual_seed(3)
    model = adapted(tiny(family).base_model, HOWS[name]).eval()
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["default"].weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", FORMULAS)
def test_an_update_is_its_formula(name):
    model = moved(name)
    layer = layers(model)[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    z = x @ a.T
    kept = z.clamp_min(0) * (z >= z.sort(dim=-1, descending=True).values[..., 1:2])
    want = {
        "relu_out": (z @ b.T).clamp_min(0),
        "relu_both": (z.clamp_min(0) @ b.T).clamp_min(0),
        "relu_code": z.clamp_min(0) @ b.T,
        "topk_code": kept @ b.T,
        "topk_lora": kept @ b.T,
        "two_branch": (z[..., :3].clamp_min(0) @ b[:, :3].T).clamp_min(0)
        - (z[..., 3:].clamp_min(0) @ b[:, 3:].T).clamp_min(0),
    }[name]
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 16 / 6 * want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "crate", "llama"])
def test_without_a_map_it_is_pefts_lora(family, monkeypatch):
    ours = adapted(tiny(family).base_model, HOWS["relu_out"]).eval()
    config = LoraConfig(r=6, lora_alpha=16, target_modules="all-linear", fan_in_fan_out=False)
    config.fan_in_fan_out = family == "gpt2"
    theirs = get_peft_model(tiny(family).base_model, config).eval()
    state = {name: torch.randn_like(w) for name, w in ours.state_dict().items() if "lora_" in name}
    for model in (ours, theirs):
        assert not model.load_state_dict(state, strict=False).unexpected_keys
    different = ours(input_ids=IDS).last_hidden_state
    monkeypatch.setattr(adapters.torch, "relu", lambda x: x)
    same = ours(input_ids=IDS).last_hidden_state
    want = theirs(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(same, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(different, want, atol=1e-2)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("family", ["gpt2", "crate", "llama"])
def test_the_first_step_has_a_gradient_in_every_layer(name, family):
    torch.manual_seed(0)
    model = adapted(tiny(family).base_model, HOWS[name])
    before = tiny(family).base_model(input_ids=IDS).last_hidden_state
    after = model(input_ids=IDS).last_hidden_state
    assert torch.allclose(before, after, atol=0.3 if name in NOISY_STARTS else 1e-6)
    after.square().sum().backward()
    for layer in layers(model):
        gradient = layer.lora_B["default"].weight.grad
        assert gradient is not None and gradient.abs().sum() > 0
        assert layer.base_layer.weight.grad is None, "the model's own weights stay"
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert (
        names
        == {
            "gpt2": {"c_attn", "c_proj", "c_fc"},
            "crate": {"u_proj", "o_proj"},
            "llama": {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")},
        }[family]
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_not_linear_does_not_merge(name, tmp_path):
    model = moved(name)
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ModelError, match=f"no weight matrix equals {name}"):
            merge()
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())
    with pytest.raises(ModelError, match="would be read as plain LoRA"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not linear in x"):
        finetune(model, TRAIN, VAL, n_classes=2, seed=0, tokenizer=lookup_model.tokenizer())
    plain = model.unload()
    want = tiny("gpt2").base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(plain(input_ids=IDS).last_hidden_state, want)


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("family", ["gpt2", "crate", "llama"])
def test_what_is_linear_merges(method, family):
    torch.manual_seed(0)
    model = adapted(tiny(family).base_model, FineTuning(method, rank=4)).eval()
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_B["default"].weight.normal_(std=0.3)
    want = model(input_ids=IDS).last_hidden_state
    assert not torch.allclose(want, tiny(family).base_model(input_ids=IDS).last_hidden_state)
    got = model.merge_and_unload()(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_crates_query_key_and_value_stay_one():
    torch.manual_seed(0)
    model = small()
    adapted(model.base_model, HOWS["relu_both"])
    layer = model.base_model.blocks[0].attn.u_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.3)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    attention = model.base_model.blocks[0].attn.eval()
    u = layer.base_layer(x) + code_and_update(layer, "default", x)[1]
    heads = u.view(1, 6, 2, 8).transpose(1, 2)
    mask = torch.full((6, 6), -torch.inf).triu(1)
    pattern = (heads @ heads.mT / 8**0.5 + mask).softmax(-1)
    want = attention.o_proj((pattern @ heads).transpose(1, 2).flatten(-2))
    got = attention(x, attention_mask=mask[None, None])[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    ids = some_tokens(1, 5)
    for use_cache in (True, False):
        made = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        if use_cache:
            first = made
    assert torch.equal(first, made), "one cached tensor is keys and values"


def test_a_tuned_adapter_is_saved_to_the_same_bits(tmp_path):
    for name in ("two_branch", "topk_lora"):
        how = replace(HOWS[name], steps=3, loss="nonneg_ce", anneal_steps=2)
        words = lookup_model.tokenizer()
        made = finetune(
            tiny("gpt2"), TRAIN, VAL, n_classes=2, seed=0, settings=how, tokenizer=words
        )
        made.save(tmp_path / name)
        again = load_classifier(tmp_path / name, tiny("gpt2"), words)
        assert np.array_equal(again.predict(TEST.texts), made.predict(TEST.texts))
        assert isinstance(again.network.head, NonNegativeHead) and again.settings == how
    counts = [int(layer.n_passes) for layer in layers(again.network)]
    assert counts == [3] * len(counts)


def test_a_loss_term_on_codes_makes_lora_sparse_ones_and_kills_no_other():
    words, made = lookup_model.tokenizer(), []
    for weight in (0.0, 50.0):
        term = SparsePenalty(kind="sparsity", hooks=("*lora_A.default",), weight=weight)
        how = replace(HOWS["relu_out"], method="lora", steps=12, lr=2e-2, objectives=(term,))
        made.append(
            finetune(tiny("gpt2"), TRAIN, VAL, n_classes=2, seed=0, settings=how, tokenizer=words)
        )
    norms = [
        sum(layer.lora_A["default"].weight.detach().norm().item() for layer in layers(each.network))
        for each in made
    ]
    assert norms[1] < 0.8 * norms[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_every_adapter_learns_with_as_many_weights_as_lora(name):
    how = replace(HOWS[name], epochs=4, lr=2e-2, pooling="last")
    args = {"n_classes": 2, "seed": 0, "tokenizer": lookup_model.tokenizer()}
    one, again = (finetune(tiny("gpt2"), TRAIN, VAL, settings=how, **args) for _ in range(2))
    plain = finetune(
        tiny("gpt2"), TRAIN, VAL, settings=replace(how, method="lora", epochs=1), **args
    )
    assert one.n_trained == plain.n_trained
    assert one.accuracy(TEST) > 0.6, "sixteen steps; chance is 0.5"
    assert np.array_equal(one.predict(TEST.texts), again.predict(TEST.texts))


def test_the_soft_gate_has_the_gradient_of_its_formula_and_cools():
    how = FineTuning("topk_lora", rank=4, k=1, anneal_steps=10)
    torch.manual_seed(0)
    layer = layers(adapted(tiny("gpt2").base_model, how))[0].train()
    z = torch.tensor([[0.5, 2.0, 1.0, 0.0]], requires_grad=True)
    for step in range(1, 13):
        temperature = 1 - 0.9 * min(step / 10, 1)
        out = adapters._gated(layer, z, how)
        assert torch.equal(out.detach(), torch.tensor([[0.0, 2.0, 0.0, 0.0]]))
        (got,) = torch.autograd.grad(out.sum(), z)
        soft = torch.softmax(z / temperature, -1)
        (of_soft,) = torch.autograd.grad((z.detach() * soft).sum(), z)
        hard = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        torch.testing.assert_close(got, hard + of_soft, atol=1e-6, rtol=1e-5)
    assert int(layer.n_passes) == 12 and "n_passes" in dict(layer.named_buffers())


def test_sparsity_is_counted_by_layer_and_token():
    model = moved("relu_both")
    with adapters.counted_sparsity(model) as counts:
        model(input_ids=IDS)
    assert counts.code_size == 2 * 7 * 6 * len(layers(model))
    assert 0.3 < counts.code < 0.7 and 0.3 < counts.update < 0.8
    with adapters.counted_sparsity(model.unload()) as counts:
        model(input_ids=IDS)
    assert counts.code_size == 0 and counts.update == 0.0


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        (FineTuning("monolora", variant="topk_code", rank=4, k=5), "k: want 1 to the rank, 4"),
        (FineTuning("two_branch", rank=3), "want an even number"),
        (FineTuning("monolora", start_std=0.0), "at B = 0 .* has no gradient"),
    ],
)
def test_settings_that_do_not_fit_are_told(how, fault):
    with pytest.raises(ModelError, match=fault):
        adapted(tiny("gpt2").base_model, how)
