"""CRATE against the released code's outputs, a slow reference, and what its equations promise."""

import math
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from small_models import VARIANTS, small, some_tokens
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from lmmono.errors import ModelError
from lmmono.models.build import build_model
from lmmono.models.crate import CrateConfig, CrateIsta
from lmmono.models.gpt2 import from_released as gpt2_from_released
from lmmono.models.hooks import Edit, run_with_cache, run_with_edit
from lmmono.models.released import crate_from_released
from lmmono.models.storage import load_model, save_model
from lmmono.recipe.sections import CrateModel, Gpt2Model


def fixture(shared: Path, name: str) -> tuple[dict[str, Tensor], int]:
    with safe_open(shared / "fixtures" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, int(file.metadata()["n_heads"])


REFERENCES = [
    ("crate_reference_2l", crate_from_released),
    ("gpt2_relu_reference_2l", gpt2_from_released),
]


@pytest.mark.parametrize(("name", "build"), REFERENCES)
def test_released_logits_loss_codes_and_stream_are_reproduced(shared, name, build):
    tensors, n_heads = fixture(shared, name)
    weights = {k[len("weight/") :]: v for k, v in tensors.items() if k.startswith("weight/")}
    model = build(weights, n_heads=n_heads)

    hooks = ["blocks.*.mlp.hook_post", "blocks.*.hook_resid_post"]
    logits, acts = run_with_cache(model, tensors["input_ids"], hooks)
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten())

    torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, tensors["loss"].squeeze(), atol=1e-5, rtol=0)
    for layer in range(2):
        code, stream = tensors[f"code.{layer}"], tensors[f"resid_post.{layer}"]
        assert (acts[f"blocks.{layer}.mlp.hook_post"] - code).abs().max() < 1e-5
        assert (acts[f"blocks.{layer}.hook_resid_post"] - stream).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "build"), REFERENCES)
def test_released_gradients_of_every_weight_are_reproduced(shared, name, build):
    tensors, n_heads = fixture(shared, name)
    weights = {k[len("weight/") :]: v for k, v in tensors.items() if k.startswith("weight/")}
    gradients = {k[len("grad/") :]: v for k, v in tensors.items() if k.startswith("grad/")}
    model = build(weights, n_heads=n_heads)

    targets = tensors["targets"]
    model(tensors["input_ids"], labels=targets, shift_labels=targets).loss.backward()

    # the same renaming that puts weights in place puts the reference gradients in place
    reference = build(gradients, n_heads=n_heads)
    wanted = dict(reference.named_parameters())
    assert len(gradients) == len(wanted)
    for key, parameter in model.named_parameters():
        assert (parameter.grad - wanted[key]).abs().max() < 1e-5, key


def test_labels_are_shifted_inside_and_ignored_at_minus_100():
    model, tokens = small(), some_tokens(2, 9)
    logits = model(tokens).logits
    labels = tokens.clone()
    labels[0, 4] = -100

    expected = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    kept = torch.ones_like(expected, dtype=torch.bool)
    kept[0, 3] = False
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected.mean())
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected[kept].mean())


@pytest.mark.parametrize("options", VARIANTS)
def test_a_future_token_never_changes_an_earlier_logit(options):
    model, tokens = small(**options), some_tokens(1, 12)
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def reference_code(x: Tensor, dictionary: Tensor, n_steps: int, step: float, lam: Tensor) -> Tensor:
    """Proximal gradient by autograd on 1/2 |x - a D|^2, token by token, in float64."""
    d = dictionary.double()
    codes = []
    for token in x.double().reshape(-1, x.shape[-1]):
        code = torch.zeros(len(d), dtype=torch.float64)
        for _ in range(n_steps):
            a = code.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(0.5 * (token - a @ d).square().sum(), a)
            code = (code - step * gradient - lam).clamp(min=0)
        codes.append(code)
    return torch.stack(codes).view(*x.shape[:-1], len(d))


@pytest.mark.parametrize("n_steps", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"step_size": "lipschitz"}, {"learned_threshold": True}])
def test_the_code_equals_slow_proximal_gradient_steps_from_zero(n_steps, options):
    ista: CrateIsta = small(n_ista_steps=n_steps, **options).model.blocks[0].mlp
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    step, threshold = float(ista.step_size), ista.thresholds().detach().double()
    expected = reference_code(x, ista.dictionary.detach(), n_steps, step, threshold)
    assert (ista.encode(x).detach() - expected).abs().max() < 1e-5
    assert expected.count_nonzero() > 10


def test_a_relu_mlp_in_istas_place_is_one_with_and_without_skip():
    for skip in (False, True):
        model = small(relu_mlp=True, ista_skip=skip)
        mlp: CrateIsta = model.model.blocks[0].mlp
        assert mlp.decoder is not None and mlp.b_in is not None and mlp.b_out is not None
        assert torch.equal(mlp.decoder, mlp.dictionary)  # the start of an untied decoder
        assert not mlp.b_in.any() and not mlp.b_out.any()
        with torch.no_grad():
            for parameter in (mlp.decoder, mlp.b_in, mlp.b_out):
                parameter.normal_()
        _, acts = run_with_cache(model, some_tokens(1, 5), ["blocks.0.*", "model.blocks.0.ln2"])
        x = acts["model.blocks.0.ln2"]
        code = (x @ mlp.dictionary.T + mlp.b_in).clamp(min=0)
        torch.testing.assert_close(acts["blocks.0.mlp.hook_post"], code)
        out = code @ mlp.decoder + mlp.b_out
        before = acts["blocks.0.hook_resid_mid"] if skip else torch.zeros_like(out)
        torch.testing.assert_close(acts["blocks.0.hook_resid_post"], before + out)
    with pytest.raises(ValidationError, match="relu_mlp puts an MLP in its place"):
        CrateModel(arch="crate", relu_mlp=True, n_ista_steps=3)


def test_the_first_iterate_is_a_hook_and_every_further_one_too():
    model = small(n_ista_steps=3)
    ista: CrateIsta = model.model.blocks[1].mlp
    _, acts = run_with_cache(model, some_tokens(1, 5), ["blocks.1.*", "model.blocks.1.ln2"])
    x, dictionary = acts["model.blocks.1.ln2"], ista.dictionary.detach()
    lam = torch.tensor(0.01, dtype=torch.float64)
    for hook, n_steps in {"hook_code_0": 1, "hook_code_1": 2, "hook_post": 3}.items():
        expected = reference_code(x, dictionary, n_steps, 0.1, lam)
        assert (acts[f"blocks.1.mlp.{hook}"] - expected).abs().max() < 1e-5


def test_the_objective_falls_at_every_step_when_the_step_is_lipschitz():
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    objectives = []
    for n_steps in (1, 2, 4, 8, 16, 32, 64):
        ista: CrateIsta = small(n_ista_steps=n_steps, step_size="lipschitz").model.blocks[0].mlp
        code = ista.encode(x)
        fit = 0.5 * (x - code @ ista.dictionary).square().sum()
        objectives.append((fit + 0.1 * code.sum()).item())
    assert all(after < before for before, after in zip(objectives, objectives[1:], strict=False))


def test_the_lipschitz_step_is_one_over_the_largest_singular_value_squared():
    model = small(step_size="lipschitz")
    for step, dictionary in zip(model.step_sizes(), model.dictionaries(), strict=True):
        sigma = torch.linalg.matrix_norm(dictionary.detach(), ord=2)
        assert step == pytest.approx(1 / float(sigma) ** 2, rel=1e-3)


def test_the_lipschitz_step_follows_a_dictionary_in_training_and_rests_in_evaluation():
    model = small(step_size="lipschitz")
    with torch.no_grad():
        model.dictionaries()[0].mul_(2)
    before = model.step_sizes()[0]
    model(some_tokens(1, 4))
    assert model.step_sizes()[0] == before
    model.train()(some_tokens(1, 4))
    assert model.step_sizes()[0] == pytest.approx(before / 4, rel=1e-3)


def test_a_threshold_that_is_learned_starts_at_step_size_times_sparsity_and_learns():
    fixed, learned = small(), small(learned_threshold=True)
    tokens = some_tokens(2, 8)
    torch.testing.assert_close(fixed(tokens).logits, learned(tokens).logits)
    learned(tokens, labels=tokens).loss.backward()
    assert learned.model.blocks[0].mlp.threshold.grad.abs().max() > 0


def test_an_untied_decoder_starts_as_the_tied_model_and_parts_from_it():
    tied, untied = small(), small(untied_decoder=True)
    tokens = some_tokens(2, 8)
    torch.testing.assert_close(tied(tokens).logits, untied(tokens).logits)
    untied(tokens, labels=tokens).loss.backward()
    ista = untied.model.blocks[0].mlp
    assert not torch.allclose(ista.decoder.grad, ista.dictionary.grad)


def test_query_key_and_value_are_one_projection_with_symmetric_scores():
    model = small()
    names = {name for name, _ in model.named_parameters() if ".attn." in name and ".0." in name}
    assert names == {
        f"model.blocks.0.attn.{w}" for w in ("u_proj.weight", "o_proj.weight", "o_proj.bias")
    }
    _, acts = run_with_cache(model, some_tokens(1, 6), "blocks.0.attn.*")
    u, scores = acts["blocks.0.attn.hook_u"], acts["blocks.0.attn.hook_attn_scores"]
    for letter in "qkv":
        assert acts[f"blocks.0.attn.hook_{letter}"].data_ptr() == u.data_ptr()
    whole = torch.einsum("bqhd,bkhd->bhqk", u, u) / math.sqrt(8)
    seen = ~scores.isneginf()
    torch.testing.assert_close(scores[seen], whole[seen])
    torch.testing.assert_close(whole, whole.transpose(-1, -2))
    assert seen.equal(torch.ones(6, 6).tril().bool().expand(1, 2, 6, 6))


def test_zeroing_the_last_code_leaves_crate_nothing_to_say_but_not_gpt2():
    tokens = some_tokens(1, 8)
    silence = Edit("blocks.1.mlp.hook_post", "ablate")
    crate = run_with_edit(small(), tokens, silence)
    assert (crate - crate[:, :1]).abs().max() == 0
    gpt2 = build_model(Gpt2Model(arch="gpt2", d_model=16), d_vocab=50, n_ctx=32, seed=0)
    logits = run_with_edit(gpt2, tokens, silence)
    assert (logits - logits[:, :1]).abs().max() > 1e-3
    skip = run_with_edit(small(ista_skip=True), tokens, silence)
    assert (skip - skip[:, :1]).abs().max() > 1e-3


def test_the_stream_after_a_block_is_what_its_code_decodes_to():
    _, acts = run_with_cache(small(), some_tokens(1, 8))
    assert acts["blocks.0.hook_resid_post"] is acts["blocks.0.hook_mlp_out"]


def test_initial_weights_have_the_released_spread_density_and_step_norm():
    section = CrateModel(arch="crate", n_layers=2, d_model=128, n_heads=4)
    model = build_model(section, d_vocab=300, n_ctx=64, seed=0).requires_grad_(False)
    block = model.model.blocks[0]
    assert block.attn.u_proj.weight.std() == pytest.approx(0.02, rel=0.03)
    assert model.model.embed.weight.std() == pytest.approx(0.02, rel=0.03)
    assert block.attn.o_proj.weight.std() == pytest.approx(0.02 / 2, rel=0.03)
    assert block.attn.o_proj.bias.abs().max() == 0
    assert model.lm_head.weight is model.model.embed.weight
    dictionary = block.mlp.dictionary
    assert dictionary.abs().max() <= math.sqrt(6 / 128)
    assert dictionary.std() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert dictionary.norm(dim=1).mean() == pytest.approx(math.sqrt(2), rel=0.02)
    assert 1.6 < 0.1 * float(torch.linalg.matrix_norm(dictionary, ord=2)) ** 2 < 1.9
    code = block.mlp.encode(F.layer_norm(torch.randn(1, 256, 128), (128,)))
    assert 0.45 < float((code > 0).float().mean()) < 0.55


def test_weights_depend_on_the_seed_alone_and_no_other_random_state_moves():
    section = CrateModel(arch="crate", d_model=16, n_heads=2)
    before = torch.random.get_rng_state()
    a, b, c = (build_model(section, d_vocab=50, n_ctx=8, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.random.get_rng_state().equal(before)
    assert all(a[k].equal(b[k]) for k in a)
    assert not a["model.embed.weight"].equal(c["model.embed.weight"])


@pytest.mark.parametrize("options", VARIANTS)
def test_a_saved_model_is_the_same_model_again(tmp_path, options):
    model, tokens = small(**options), some_tokens(2, 8)
    folder = save_model(model, tmp_path / "model")
    again = load_model(folder)
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(AutoConfig.from_pretrained(folder), CrateConfig)
    assert torch.equal(model(tokens).logits, auto(tokens).logits)
    stream = AutoModel.from_pretrained(folder)(tokens).last_hidden_state
    assert torch.equal(stream, model.model(tokens).last_hidden_state)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "crate.py",
        "generation_config.json",
        "model.safetensors",
    ]


ALONE = """
import sys, torch
sys.modules["lmmono"] = sys.modules["jaxtyping"] = None
from transformers import AutoModel, AutoModelForCausalLM
folder, tokens = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
mask = torch.ones_like(tokens)
new = model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
model.save_pretrained(sys.argv[3])
stream = AutoModel.from_pretrained(sys.argv[3], trust_remote_code=True)(tokens).last_hidden_state
try:
    model.generate(tokens, max_new_tokens=40, min_new_tokens=40)
except ValueError as error:
    print(error)
torch.save((model(tokens).logits, new, stream), sys.argv[2])
del sys.modules["lmmono"], sys.modules["jaxtyping"]
import lmmono  # late is early enough
print(type(AutoModelForCausalLM.from_pretrained(folder)).__module__)
"""


def test_a_saved_model_loads_by_its_folder_alone_where_there_is_no_lmmono(tmp_path):
    model, tokens = small(**VARIANTS[-1]), some_tokens(2, 8)
    save_model(model, tmp_path / "model")
    torch.save(tokens, tmp_path / "tensors")
    places = [str(tmp_path / name) for name in ("model", "tensors", "again")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *places], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    refused = "33 tokens do not fit the model's 32 positions; cut the text"
    assert done.stdout.splitlines() == [refused, "lmmono.models.crate"]
    logits, new, stream = torch.load(tmp_path / "tensors")
    assert torch.equal(logits, model(tokens).logits)
    assert torch.equal(stream, model.model(tokens).last_hidden_state)
    ones = torch.ones_like(tokens)
    assert new.equal(model.generate(tokens, attention_mask=ones, max_new_tokens=4, do_sample=False))


def test_importing_lmmono_is_enough_for_the_auto_classes_and_models_import_no_lens(tmp_path):
    save_model(small(), tmp_path / "model")
    script = """
import lmmono, sys
assert "lmmono.models" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
import lmmono.interop.lens, lmmono.models.build, lmmono.models.hooks
print([name for name in ("transformer_lens", "sae_lens") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["lmmono.models.crate", "[]"], done.stderr


def test_embeddings_can_be_given_instead_of_tokens_but_not_beside_them():
    model, tokens = small(), some_tokens(1, 5)
    embeds = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(tokens).logits)
    with pytest.raises(ModelError, match="exactly one"):
        model(tokens, inputs_embeds=embeds)
    with pytest.raises(ModelError, match="exactly one"):
        model()


def test_a_row_longer_than_the_positions_is_refused_with_the_numbers():
    model = small()
    with pytest.raises(ModelError, match="33 tokens do not fit the model's 32 positions"):
        model(some_tokens(1, 33))
    cache = DynamicCache(config=model.config)
    model(some_tokens(1, 30), past_key_values=cache)
    with pytest.raises(ModelError, match="34 tokens"):
        model(some_tokens(1, 4), past_key_values=cache)


def test_settings_that_make_no_model_are_refused():
    with pytest.raises(ModelError, match="n_heads that divides d_model"):
        CrateConfig(hidden_size=10, num_attention_heads=4)
    with pytest.raises(ModelError, match="want a number or 'lipschitz', got 'big'"):
        CrateConfig(step_size="big")
    with pytest.raises(ModelError, match="n_ista_steps"):
        CrateConfig(n_ista_steps=0)


@pytest.mark.parametrize("options", [{}, {"step_size": "lipschitz"}])
def test_gradient_checkpointing_changes_no_gradient(options):
    tokens, gradients = some_tokens(2, 8), []
    for checkpointed in (False, True):
        model = small(**options).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("options", VARIANTS)
def test_half_precision_and_autocast_stay_near_full_precision(options):
    model, tokens = small(**options), some_tokens(2, 8)
    full = model(tokens, labels=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens, labels=tokens)
    mixed.loss.backward()
    half = small(**options).to(torch.bfloat16)(tokens, labels=tokens)
    assert mixed.loss.item() == pytest.approx(full.loss.item(), rel=0.03)
    assert half.logits.dtype == torch.bfloat16
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.05)


def test_hidden_states_and_attentions_are_returned_when_asked():
    model, tokens = small(attn_implementation="eager"), some_tokens(1, 6)
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    _, acts = run_with_cache(model, tokens, ["*hook_resid_pre", "*hook_pattern"])
    for layer in range(2):
        stream, pattern = out.hidden_states[layer], out.attentions[layer]
        torch.testing.assert_close(stream, acts[f"blocks.{layer}.hook_resid_pre"])
        torch.testing.assert_close(pattern, acts[f"blocks.{layer}.attn.hook_pattern"])


COMPILED = """
import torch
from pydantic import ValidationError
from lmmono.models.crate import CrateConfig, CrateForCausalLM
for options in ({}, {"step_size": "lipschitz", "learned_threshold": True}):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = CrateForCausalLM(CrateConfig(**sizes, max_position_embeddings=32, **options)).train()
    tokens = torch.randint(50, (2, 8))
    expected = model(tokens, labels=tokens).loss
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
print("compiled whole")
"""


def test_the_forward_pass_compiles_as_one_graph():
    # in its own process: the type checks that tests switch on are no part of the graph
    assert forks.run("-c", COMPILED) == "compiled whole\n"


def test_resizing_the_vocabulary_keeps_head_and_embedding_one_tensor():
    model = small()
    model.resize_token_embeddings(60)
    assert model.lm_head.weight is model.model.embed.weight
    assert model(some_tokens(1, 3)).logits.shape == (1, 3, 60)
