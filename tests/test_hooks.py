"""Hook points of every family: complete, exact, replaceable, and without a trace when detached."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from small_models import FAMILIES, GATED, small, some_tokens, tiny
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Gemma3TextConfig, GPTNeoXConfig

from lmmono.errors import ModelError
from lmmono.models.hooks import (
    Edit,
    bare,
    editing,
    hook_names,
    hook_width,
    match_hooks,
    recording,
    run_until,
    run_with_cache,
    run_with_edit,
)


def flat(acts: Tensor, name: str) -> Tensor:
    """Return activations as [batch, pos, width], the way edits count units."""
    return (acts.transpose(1, 2) if name.endswith(("scores", "pattern")) else acts).flatten(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_is_recorded_in_transformer_lens_shape_and_changes_nothing(family):
    model, tokens = tiny(family), some_tokens(2, 6)
    logits, acts = run_with_cache(model, tokens)
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert list(acts) == hook_names(model)
    d_mlp = {"crate": 64, "gpt2": 64}.get(family.split()[0], 24)
    n_kv = 2 if family in GATED else 4
    shapes = {
        "hook_embed": (2, 6, 16),
        "hook_resid_pre": (2, 6, 16),
        "ln1.hook_scale": (2, 6, 1),
        "ln1.hook_normalized": (2, 6, 16),
        "attn.hook_q": (2, 6, 4, 4),
        "attn.hook_k": (2, 6, n_kv, 4),
        "attn.hook_v": (2, 6, n_kv, 4),
        "attn.hook_z": (2, 6, 4, 4),
        "attn.hook_attn_scores": (2, 4, 6, 6),
        "attn.hook_pattern": (2, 4, 6, 6),
        "hook_attn_out": (2, 6, 16),
        "ln2.hook_normalized": (2, 6, 16),
        "mlp.hook_pre": (2, 6, d_mlp),
        "mlp.hook_post": (2, 6, d_mlp),
        "hook_mlp_out": (2, 6, 16),
        "hook_resid_post": (2, 6, 16),
        "ln_final.hook_normalized": (2, 6, 16),
    }
    if family in ("crate", "gpt2"):
        shapes["hook_pos_embed"] = (2, 6, 16)
    if family != "gpt_neox":
        shapes["hook_resid_mid"] = (2, 6, 16)
    for suffix, shape in shapes.items():
        found = [name for name in acts if name.endswith(suffix)]
        assert found, suffix
        assert {tuple(acts[name].shape) for name in found} == {shape}, suffix


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_the_pattern_times_the_values_and_a_pattern_is_causal(family):
    _, acts = run_with_cache(tiny(family), some_tokens(2, 6))
    for i in range(2):
        values, pattern, z, scores = (
            acts[f"blocks.{i}.attn.hook_{part}"] for part in ("v", "pattern", "z", "attn_scores")
        )
        values = values.repeat_interleave(4 // values.shape[2], dim=2)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, values), z)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 6))
        assert not pattern.triu(1).any()
        torch.testing.assert_close(scores.softmax(-1), pattern)


@pytest.mark.parametrize("family", FAMILIES)
def test_normalized_is_the_stream_over_its_scale(family):
    _, acts = run_with_cache(tiny(family), some_tokens(2, 6), ["*resid_pre", "*ln1*"])
    stream = acts["blocks.1.hook_resid_pre"]
    if family not in GATED:
        stream = stream - stream.mean(-1, keepdim=True)
    expected = stream / acts["blocks.1.ln1.hook_scale"]
    torch.testing.assert_close(expected, acts["blocks.1.ln1.hook_normalized"])


@pytest.mark.parametrize("family", GATED)
def test_gated_neurons_are_the_activated_gate_times_the_linear_half(family):
    model = tiny(family)
    _, acts = run_with_cache(model, some_tokens(1, 5), "blocks.0.mlp.*")
    act = F.silu if family in ("llama", "mistral", "qwen2", "qwen3") else tanh_gelu
    gate, linear = acts["blocks.0.mlp.hook_pre"], acts["blocks.0.mlp.hook_pre_linear"]
    torch.testing.assert_close(acts["blocks.0.mlp.hook_post"], act(gate) * linear)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        *((family, "model.layers.1.mlp.down_proj") for family in GATED),
    ],
)
def test_neurons_are_what_the_last_projection_reads(family, module):
    model, tokens, seen = tiny(family), some_tokens(1, 5), []
    model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, acts = run_with_cache(model, tokens, "blocks.1.mlp.hook_post")
    assert acts["blocks.1.mlp.hook_post"] is seen[0]


def test_queries_and_keys_of_gpt2_make_its_scores():
    _, acts = run_with_cache(tiny("gpt2"), some_tokens(1, 5), "blocks.0.attn.*")
    q, k = acts["blocks.0.attn.hook_q"], acts["blocks.0.attn.hook_k"]
    scores = acts["blocks.0.attn.hook_attn_scores"]
    seen = ~scores.isneginf()
    torch.testing.assert_close(torch.einsum("bqhd,bkhd->bhqk", q, k)[seen] / 2, scores[seen])


def test_open_attention_respects_padding_and_a_cache():
    model, tokens = tiny("crate"), some_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = model(tokens, attention_mask=mask).logits
    with recording(model, "*hook_pattern") as record:
        logits = model(tokens, attention_mask=mask).logits
        assert not record["blocks.0.attn.hook_pattern"][0, :, :, :3].any()
        cache = DynamicCache(config=model.config)
        model(tokens[:, :4], past_key_values=cache)
        rest = model(tokens[:, 4:], past_key_values=cache).logits
        assert record["blocks.0.attn.hook_pattern"].shape == (2, 4, 2, 6)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()])
    assert logits.isfinite().all()
    torch.testing.assert_close(rest, model(tokens).logits[:, 4:])


def test_names_match_by_glob_in_the_order_they_run():
    model = tiny("crate")
    assert match_hooks(model, "blocks.*.mlp.hook_post") == [
        "blocks.0.mlp.hook_post",
        "blocks.1.mlp.hook_post",
    ]
    both = match_hooks(model, ["blocks.1.hook_resid_post", "*hook_embed", "hook_embed"])
    assert both == ["hook_embed", "blocks.1.hook_resid_post"]
    assert match_hooks(model, "model.blocks.*.ln2") == ["model.blocks.0.ln2", "model.blocks.1.ln2"]
    assert "blocks.0.mlp.hook_code_0" in hook_names(model)


def test_a_wrong_name_lists_the_nearest():
    with pytest.raises(
        ModelError, match="in CrateForCausalLM: did you mean blocks.1.mlp.hook_post"
    ):
        match_hooks(tiny("crate"), ["hook_embed", "blocks.1.mlp.hook_pots"])
    with pytest.raises(ModelError, match="no hook 'blocks.7.hook_resid_post'"):
        run_with_cache(tiny("gpt2"), some_tokens(1, 3), "blocks.7.hook_resid_post")


def test_widths_are_numbers_per_token():
    model = tiny("llama")
    widths = {"blocks.0.mlp.hook_post": 24, "hook_embed": 16, "blocks.1.attn.hook_k": 8}
    widths |= {"blocks.0.attn.hook_z": 16, "model.layers.0.mlp.act_fn": 24, "lm_head": 40}
    assert {name: hook_width(model, name) for name in widths} == widths
    with pytest.raises(ModelError, match="no width per token"):
        hook_width(model, "blocks.0.attn.hook_pattern")


class Recurrent(nn.Module):
    """A network of no family, with a module that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(10, 4), nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 10)
        self.unused = nn.Linear(1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


def test_any_module_is_a_hook_by_its_path():
    model, tokens = Recurrent(), torch.arange(6)[None]
    assert hook_names(model) == ["embed", "lstm", "head", "unused"]
    with recording(model, ["embed", "lst*"]) as record:
        before = model(tokens)
    torch.testing.assert_close(record["lstm"], model.lstm(model.embed(tokens))[0])
    with editing(model, Edit("lstm", "ablate")):
        torch.testing.assert_close(model(tokens), model.head.bias.expand(1, 6, 10))
    torch.testing.assert_close(model(tokens), before)


def test_a_module_path_of_a_known_family_is_a_hook_too():
    model, tokens = tiny("gpt2"), some_tokens(1, 5)
    _, acts = run_with_cache(model, tokens, ["transformer.h.0.mlp.act", "blocks.0.mlp.hook_post"])
    assert acts["transformer.h.0.mlp.act"] is acts["blocks.0.mlp.hook_post"]


def test_a_hook_that_never_ran_is_an_error_not_a_missing_key():
    model = tiny("gpt2")
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="spare took no part"):
        run_with_cache(model, some_tokens(1, 3), "spare")


def test_a_record_is_filled_anew_by_every_pass_and_holds_no_copies():
    model = tiny("crate")
    with recording(model, ["model.blocks.0.mlp.hook_post", "blocks.0.mlp.hook_post"]) as record:
        with torch.no_grad():
            model(some_tokens(1, 4))
            first = weakref.ref(record["blocks.0.mlp.hook_post"])
            tensors = list(record.values())
            assert tensors[0] is tensors[1]
            assert tensors[0].grad_fn is None
            del tensors
            model(some_tokens(2, 7))
        gc.collect()
        assert first() is None
        assert record["blocks.0.mlp.hook_post"].shape == (2, 7, 64)


def test_recorded_tensors_carry_gradients_where_gradients_are_on():
    model, tokens, hook = tiny("crate"), some_tokens(1, 5), "blocks.0.mlp.hook_post"
    with recording(model, hook) as record:
        loss = model(tokens, labels=tokens).loss
    (gradient,) = torch.autograd.grad(loss, record[hook])
    assert gradient.abs().max() > 0
    direction = torch.zeros(64, requires_grad=True)
    with editing(model, Edit(hook, "add", direction=direction)):
        model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(direction.grad, gradient.sum((0, 1)))


def attachments(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", ["crate", "gpt2", "gemma2"])
def test_nothing_stays_attached_after_the_block_or_after_a_fault(family):
    model = tiny(family)
    state, modules = list(model.state_dict()), len(list(model.modules()))
    attention = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), recording(model, "*"):
        assert attachments(model) > 0
        assert list(model.state_dict()) == state
        raise ZeroDivisionError
    assert attachments(model) == 0
    assert len(list(model.modules())) == modules
    assert model.config._attn_implementation == attention


def test_two_recordings_of_one_pattern_nest():
    model, tokens = tiny("crate"), some_tokens(1, 4)
    name = "blocks.0.attn.hook_pattern"
    with recording(model, name) as outer:
        with recording(model, name) as inner:
            model(tokens)
        assert outer[name] is inner[name]
        model(tokens)
        assert outer[name] is not inner[name]
    assert model.config._attn_implementation == "sdpa"


def test_wrapped_models_are_seen_through():
    model, tokens = tiny("gpt2"), some_tokens(1, 4)
    compiled = torch.compile(model, backend="eager")
    assert bare(nn.DataParallel(compiled)) is model
    expected = compiled(tokens).logits
    with recording(compiled, "blocks.0.mlp.hook_post") as record:
        torch.testing.assert_close(compiled(tokens).logits, expected)
    assert record["blocks.0.mlp.hook_post"].shape == (1, 4, 64)
    silent = run_with_edit(compiled, tokens, Edit("blocks.*.mlp.hook_post", "ablate"))
    assert (silent - expected).abs().max() > 1e-3
    torch.testing.assert_close(compiled(tokens).logits, expected)


def test_the_mode_of_the_model_is_put_back():
    model = tiny("crate").train()
    run_with_cache(model, some_tokens(1, 3), "hook_embed")
    assert model.training


class Letters:
    """A tokenizer of single letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


def test_text_needs_a_tokenizer_and_ids_may_be_one_row():
    model = tiny("crate")
    with pytest.raises(ModelError, match="text needs a tokenizer"):
        run_with_cache(model, "abc", "hook_embed")
    expected, _ = run_with_cache(model, torch.tensor([0, 1, 2]), "hook_embed")
    given, _ = run_with_cache(model, "abc", "hook_embed", tokenizer=Letters())
    assert torch.equal(given, expected)
    model.tokenizer = Letters()
    own, _ = run_with_cache(model, "abc", "hook_embed")
    assert torch.equal(own, expected)


def test_parallel_blocks_have_no_middle_and_say_so():
    assert isinstance(tiny("gpt_neox").config, GPTNeoXConfig)
    with pytest.raises(ModelError, match="no hook 'blocks.0.hook_resid_mid'"):
        match_hooks(tiny("gpt_neox"), "blocks.0.hook_resid_mid")
    assert isinstance(tiny("gemma3_text").config, Gemma3TextConfig)


class ChangesInPlace(torch.nn.Module):
    """A residual stream that is changed in place after `first` has returned it."""

    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.embed, self.first, self.last = torch.nn.Embedding(9, 4), Double(), torch.nn.Identity()
        self.change = change

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.first(self.embed(input_ids))
        self.change(x)
        return self.last(torch.relu_(x))


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1.0),
        lambda x: x[:, :, 1].mul_(3.0),
        lambda x: x.data.mul_(2.0),  # this and the next two are no changes for autograd
        lambda x: x.data[:, :, 1].fill_(5.0),
        lambda x: x.detach().numpy().fill(7.0),
        lambda x: setattr(x, "data", x.data + 1.0),
    ],
    ids=["add_", "a column", "data", "a column of data", "numpy", "other data"],
)
def test_what_is_recorded_is_what_the_module_returned_though_it_is_changed_in_place_later(change):
    model, ids = ChangesInPlace(change), torch.arange(8).view(2, 4)
    with torch.no_grad():
        wanted = 2 * model.embed(ids)
        with recording(model, "first") as acts:
            for _ in range(2):
                model(ids)
                assert acts["first"].equal(wanted)
    assert run_until(model, ids, ["first", "last"])["first"].equal(wanted)


@pytest.mark.parametrize("kind", FAMILIES)
def test_padding_on_the_left_changes_no_activation_of_a_token(kind):
    model = tiny(kind)
    ids, pad = some_tokens(2, 6), torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    hook = "blocks.1.mlp.hook_post"
    logits, acts = run_with_cache(model, ids, hook)
    padded, seen = run_with_cache(model, torch.cat([pad, ids], 1), hook, attention_mask=mask)
    assert torch.allclose(padded[:, 3:], logits, atol=1e-5)
    assert torch.allclose(seen[hook][:, 3:], acts[hook], atol=1e-5)
    found = run_until(model, torch.cat([pad, ids], 1), [hook], is_token=mask.bool())
    assert torch.allclose(found[hook][:, 3:], acts[hook], atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 40, dtype=torch.long), "rows of 40 tokens do not fit the 32 positions"),
        (torch.tensor([[3, 77]]), "token ids 3 to 77 do not fit the vocabulary of .*, 0 to 49"),
        (torch.tensor([[-1, 7]]), "token ids -1 to 7 do not fit"),
    ],
)
def test_tokens_that_do_not_fit_the_model_are_refused(ids, message):
    with pytest.raises(ModelError, match=message):
        run_with_cache(small(), ids)


@pytest.mark.parametrize("kind", ["Scale", "mean", "zero", ""])
def test_an_edit_of_no_known_kind_is_refused(kind):
    with pytest.raises(ModelError, match="no such kind; "):
        Edit("blocks.0.mlp.hook_post", kind, 2.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
def test_a_model_wrapped_by_peft_has_the_hooks_of_the_network_inside():
    peft = pytest.importorskip("peft")
    model, ids, hook = tiny("gpt2"), some_tokens(1, 6), "blocks.0.mlp.hook_post"
    before = run_with_cache(model, ids, hook)[1][hook]
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config).eval()
    assert hook_names(wrapped) == hook_names(tiny("gpt2"))
    assert torch.allclose(run_with_cache(wrapped, ids, hook)[1][hook], before, atol=1e-5)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert not torch.allclose(run_with_cache(wrapped, ids, hook)[1][hook], before, atol=1e-2)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match="adds tokens to every input"):
        hook_names(peft.get_peft_model(tiny("gpt2"), prompts))
