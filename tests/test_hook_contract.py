"""What hook points of every family promise: exact, causal, and parts that add up."""

import pytest
import torch
from small_models import FAMILIES, NEW_FAMILIES, some_tokens, tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lmmono.errors import ModelError
from lmmono.interop.lens import to_hooked
from lmmono.models import families
from lmmono.models.hooks import (
    Edit,
    editing,
    hook_names,
    hook_width,
    hook_widths,
    match_hooks,
    run_with_cache,
    run_with_edit,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*falling back to its reference")

ALL = [*FAMILIES, *NEW_FAMILIES]
MIXTURES = ["gpt_oss", "mixtral", "olmoe", "qwen3_moe"]
NO_MIDDLE = ["falcon", "falcon grouped", "gpt_neox", "gptj", "phi"]


def flat(acts: Tensor, name: str) -> Tensor:
    """Return activations as [batch, pos, width], the way edits count units."""
    return (acts.transpose(1, 2) if name.endswith(("scores", "pattern")) else acts).flatten(2)


def is_open(name: str, family: str) -> bool:
    """Say whether a hook has the model compute in the open, in other bits than plainly."""
    in_experts = family in MIXTURES and name.startswith("blocks.1.mlp.hook_p")
    return name.endswith(("scores", "pattern")) or in_experts


def test_every_family_of_the_table_is_tested():
    assert set(families.FAMILIES) == {family.split()[0] for family in ALL}


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_the_contract(family: str):
    model, tokens = tiny(family), some_tokens(2, 5)
    plain = model(tokens).logits
    closed = [name for name in hook_names(model) if not is_open(name, family)]
    logits, acts = run_with_cache(model, tokens, closed)
    assert torch.equal(logits, plain), "reading changes no bit"
    _, everything = run_with_cache(model, tokens)
    pairs = ("scores", "pattern")
    widths = {
        n: None if n.endswith(pairs) else x.flatten(2).shape[2] for n, x in everything.items()
    }
    assert hook_widths(model) == widths

    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 40
    _, later = run_with_cache(model, other)
    for name, value in everything.items():
        moved = (flat(value, name) - flat(later[name], name)).nan_to_num().abs().amax((0, 2))
        assert moved[:3].max() < 2e-5, f"{name} sees a later token"

    # the last block stands for all; the first has the experts' dense neighbour
    names = [name for name in everything if not name.startswith("blocks.0")]
    if families.family_of(model) is families.FAMILIES["llama"] and family != "llama":
        # families of one record: each has another third of the points outside its MLP
        rest = [name for name in names if ".mlp." not in name][ALL.index(family) % 3 :: 3]
        names = [name for name in names if ".mlp." in name or name in rest]
    for name in names:
        value, want = acts.get(name), plain
        if value is None:
            want, alone = run_with_cache(model, tokens, name)
            torch.testing.assert_close(want, plain, atol=1e-4, rtol=1e-4)
            value = alone[name]
        new = flat(value, name).clone()
        if family in MIXTURES:  # bits of a row of experts depend on how many tokens they run
            again = run_with_edit(model, tokens, Edit(name, "set", new))
            assert torch.equal(again, want), f"{name} written back"
        # in the second row turned round at a position, since norms undo a mere shift or scale
        new[1, 3] = new[1, 3].nan_to_num(neginf=0.0).flip(-1) * 0.5 + 0.1
        edited = run_with_edit(model, tokens, Edit(name, "set", new))
        if family not in MIXTURES:
            assert torch.equal(edited[0], want[0]), f"{name} written back"
        change = (edited - want)[1].abs().amax(-1)
        assert change[:3].max() < 2e-5, f"{name} acts before its position"
        assert change[3:].max() > 1e-4, f"{name} acts nowhere"

    for i in range(2):
        parts = {name: everything.get(f"blocks.{i}.{name}") for name in PARTS}
        pre, post = (everything[f"blocks.{i}.hook_resid_{end}"] for end in ("pre", "post"))
        if family == "crate":
            torch.testing.assert_close(post, parts["hook_mlp_out"])
        else:
            added = sum(part for part in parts.values() if part is not None)
            torch.testing.assert_close(post, pre + added, atol=1e-5, rtol=1e-5)
        middle = everything.get(f"blocks.{i}.hook_resid_mid")
        assert (middle is None) == (family in NO_MIDDLE or parts["hook_attn_out"] is None)
        if middle is not None:
            torch.testing.assert_close(middle, pre + parts["hook_attn_out"])
    start = everything["hook_embed"] + everything.get("hook_pos_embed", 0.0)
    if family != "gpt_oss":
        torch.testing.assert_close(everything["blocks.0.hook_resid_pre"], start)


PARTS = ("hook_attn_out", "hook_mlp_out", "hook_mixer_out")


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_neurons_of_experts_are_one_axis_and_zero_where_a_token_is_not_routed(family: str):
    model, tokens = tiny(family), some_tokens(2, 5)
    _, acts = run_with_cache(model, tokens, "blocks.1.*")
    weights = acts["blocks.1.mlp.hook_expert_weights"]
    neurons = acts["blocks.1.mlp.hook_post"].unflatten(-1, (4, -1))
    assert weights.shape == (2, 5, 4) and neurons.shape[:3] == (2, 5, 4)
    assert ((weights != 0).sum(-1) == 2).all()
    assert torch.equal((neurons != 0).any(-1), weights != 0)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    down = experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2)
    written = torch.einsum("bped,edm->bpem", neurons, down)
    if experts.has_bias:
        written = written + experts.down_proj_bias
    by_hand = (written * weights[..., None]).sum(2)
    torch.testing.assert_close(by_hand, acts["blocks.1.hook_mlp_out"], atol=1e-5, rtol=1e-5)
    width = hook_width(model, "blocks.1.mlp.hook_post")
    assert width == neurons[0, 0].numel()
    # an expert that no token was routed to, and no other
    only = torch.tensor([0.0, 0.0, 0.0, 1.0])
    edit = Edit("blocks.1.mlp.hook_expert_weights", "set", only)
    hooks = ["blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"]
    with editing(model, edit):
        _, routed = run_with_cache(model, tokens, hooks)
    last = routed["blocks.1.mlp.hook_post"].unflatten(-1, (4, -1))[:, :, 3]
    assert (last != 0).any(-1).all()
    alone = last @ down[3] + (experts.down_proj_bias[3] if experts.has_bias else 0.0)
    torch.testing.assert_close(routed["blocks.1.hook_mlp_out"], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "llama"])
def test_both_halves_of_a_gated_neuron_and_both_its_signs(family: str):
    model, tokens = tiny(family), some_tokens(1, 5)
    _, acts = run_with_cache(model, tokens, "blocks.1.mlp.*")
    gate, linear, post, negative = (
        acts[f"blocks.1.mlp.hook_{name}"] for name in ("pre", "pre_linear", "post", "post_neg")
    )
    if family == "gpt_oss":  # of tokens that are routed to an expert
        routed = post != 0
        want = (
            (linear.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7))
        )
        torch.testing.assert_close(post[routed], want[routed])
    else:
        torch.testing.assert_close(post, F.silu(gate) * linear)
    assert torch.equal(negative, (-post).clamp_min(0.0)) and (negative > 0).any()
    silenced = run_with_edit(model, tokens, Edit("blocks.1.mlp.hook_post_neg", "ablate"))
    kept = run_with_edit(model, tokens, Edit("blocks.1.mlp.hook_post", "set", post.clamp_min(0.0)))
    torch.testing.assert_close(silenced, kept)


@torch.no_grad()
def test_the_text_part_of_a_model_of_text_and_images_has_the_names():
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    image = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    image |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=image)
    model = AutoModelForCausalLM.from_config(config).eval()
    _, acts = run_with_cache(model, some_tokens(1, 4), "blocks.*.mlp.hook_post")
    assert [tuple(value.shape) for value in acts.values()] == [(1, 4, 24)] * 2


@pytest.mark.parametrize(
    ("family", "options", "hook", "says"),
    [
        (
            "falcon",
            {},
            "blocks.0.attn.hook_pattern",
            r"its blocks have hook_resid_pre.*attn.hook_z",
        ),
        (
            "mamba",
            {},
            "blocks.*.mlp.hook_post",
            r"its blocks have .*mixer.hook_post",
        ),
        ("phi", {}, "blocks.0.mlp.hook_pots", r"did you mean blocks.0.mlp.hook_post\?"),
        (
            "opt",
            {"do_layer_norm_before": False},
            "blocks.0.mlp.hook_post",
            r"blocks of opt with do_layer_norm_before=False do not fit.*model.decoder.layers.0",
        ),
        ("cohere", {"num_key_value_heads": 2}, "blocks.0.mlp.hook_post", r"cohere is in no family"),
    ],
)
def test_what_a_family_lacks_is_refused_and_says_what_there_is(family, options, hook, says):
    model = tiny(family, **options)
    with pytest.raises(ModelError, match=says):
        match_hooks(model, hook)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("family", ["bloom", "falcon", "mamba", "mixtral", "olmo2", "opt", "phi3"])
def test_other_families_are_a_hooked_module_of_transformer_lens(family: str):
    model, tokens = tiny(family), some_tokens(1, 4)
    hooked = to_hooked(model)
    logits, acts = hooked.run_with_cache(tokens)
    assert list(acts.keys()) == hook_names(model)
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
    last = acts["blocks.1.hook_resid_post"]
    if family.endswith(("mamba", "mamba2")):
        with pytest.raises(ModelError, match="neither attention nor MLPs"):
            acts.decompose_resid()
        return
    torch.testing.assert_close(acts.decompose_resid().sum(0), last, atol=1e-4, rtol=1e-4)
    if family in MIXTURES:
        with pytest.raises(ModelError, match="each expert has weights of its own"):
            acts.get_neuron_results(1)
    elif family != "olmo2":
        parts = acts.get_neuron_results(1).sum(-2) + hooked.blocks[1].mlp.b_out
        torch.testing.assert_close(parts, acts["blocks.1.hook_mlp_out"], atol=1e-4, rtol=1e-4)
        heads = acts.stack_head_results(layer=1).sum(0) + hooked.blocks[0].attn.b_O
        torch.testing.assert_close(heads, acts["blocks.0.hook_attn_out"], atol=1e-4, rtol=1e-4)
