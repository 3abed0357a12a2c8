"""The TransformerLens bridge against TransformerLens' own GPT-2, and sae-lens on CRATE."""

import pytest
import torch
from torch import Tensor

from lmmono.errors import ModelError
from lmmono.interop.lens import to_hooked
from lmmono.models.build import build_model
from lmmono.models.hooks import hook_names, run_with_cache
from lmmono.recipe.sections import CrateModel, Gpt2Model

# TransformerLens announces its own 4.0 whenever one of its models is built
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def spread(model):
    """Return the model with every weight, norms and biases too, away from its start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def gpt2(activation: str = "relu"):
    section = Gpt2Model(arch="gpt2", n_layers=2, d_model=32, n_heads=4, activation=activation)
    return spread(build_model(section, d_vocab=60, n_ctx=24, seed=0))


def crate():
    section = CrateModel(arch="crate", n_layers=2, d_model=32, n_heads=4)
    return spread(build_model(section, d_vocab=60, n_ctx=24, seed=0))


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(60, shape, generator=torch.Generator().manual_seed(1))


def transformer_lens_gpt2(model, activation: str):
    """Return TransformerLens' own GPT-2 with the same weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=32,
        n_ctx=24,
        d_head=8,
        n_heads=4,
        d_mlp=128,
        d_vocab=60,
        act_fn=activation,
        normalization_type="LN",
    )
    theirs = HookedTransformer(config)
    weights = convert_gpt2_weights(model, config)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("mask" in name or "IGNORE" in name or name == "unembed.b_U" for name in missing)
    return theirs.eval()


@pytest.fixture(params=["relu", "gelu_new"])
def both(request):
    model = gpt2(request.param)
    return to_hooked(model), transformer_lens_gpt2(model, request.param)


def assert_near(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=what or None)


@torch.no_grad()
def test_logits_and_every_shared_hook_equal_transformer_lens_own(both):
    ours, theirs = both
    tokens = some_tokens(3, 10)
    (logits, acts), (their_logits, their_acts) = (m.run_with_cache(tokens) for m in both)
    assert_near(logits, their_logits)
    only_theirs = set(their_acts.keys()) - set(acts.keys())
    assert only_theirs == {"unembed.hook_in", "unembed.hook_out"}
    assert set(acts.keys()) <= set(their_acts.keys())
    for name, value in acts.items():
        assert value.shape == their_acts[name].shape, name
        assert_near(value, their_acts[name], name)
    assert sum(name.endswith("mlp.hook_post") for name in acts) == 2


@torch.no_grad()
def test_losses_stops_and_stacks_equal_transformer_lens_own(both):
    ours, theirs = both
    tokens = some_tokens(2, 8)
    for options in (
        {"return_type": "loss"},
        {"return_type": "loss", "loss_per_token": True},
        {"stop_at_layer": 0},
        {"stop_at_layer": 1},
        {"stop_at_layer": 2},
        {"stop_at_layer": -1},
    ):
        assert_near(ours(tokens, **options), theirs(tokens, **options), str(options))
    logits, loss = ours(tokens, return_type="both", loss_per_token=True)
    assert loss.shape == (2, 7)
    assert ours(tokens, return_type=None) is None
    _, acts = ours.run_with_cache(tokens)
    _, their_acts = theirs.run_with_cache(tokens)
    for options in ({}, {"apply_ln": True}):
        assert_near(acts.accumulated_resid(**options), their_acts.accumulated_resid(**options))
    assert_near(acts.stack_head_results(), their_acts.stack_head_results())
    stream = acts["blocks.1.hook_resid_post"]
    theirs_attrs = their_acts.logit_attrs(stream[None], tokens=tokens[0, 0])
    assert_near(acts.logit_attrs(stream[None], tokens=tokens[0, 0]), theirs_attrs)
    for name in ("W_E", "W_U", "b_U"):
        assert_near(getattr(ours, name), getattr(theirs, name))
    for name in ("W_in", "W_out"):
        assert_near(getattr(ours.blocks[1].mlp, name), getattr(theirs.blocks[1].mlp, name))


@torch.no_grad()
@pytest.mark.parametrize(
    "hook",
    [
        "hook_embed",
        "hook_pos_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.ln2.hook_scale",
        "blocks.0.attn.hook_q",
        "blocks.0.attn.hook_k",
        "blocks.0.attn.hook_v",
        "blocks.0.attn.hook_attn_scores",
        "blocks.0.attn.hook_pattern",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_attn_out",
        "blocks.1.mlp.hook_pre",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
        "ln_final.hook_normalized",
    ],
)
def test_interventions_do_what_they_do_in_transformer_lens(both, hook):
    def change(acts: Tensor, hook: object) -> Tensor:
        return acts.flip(-1) * 0.5 if acts.shape[-1] > 1 else acts * 2

    tokens = some_tokens(2, 8)
    ours, theirs = (m.run_with_hooks(tokens, fwd_hooks=[(hook, change)]) for m in both)
    assert_near(ours, theirs)
    assert (ours - both[0](tokens)).abs().max() > 1e-3


def test_gradients_reach_backward_hooks_as_in_transformer_lens(both):
    tokens, hook = some_tokens(2, 6), "blocks.0.mlp.hook_post"
    found = []
    for model in both:
        with model.hooks(bwd_hooks=[(hook, lambda grad, hook: found.append(grad))]):
            model(tokens, return_type="loss").backward()
    assert_near(found[0], found[1])
    assert found[0].abs().max() > 0


@torch.no_grad()
def test_crate_runs_as_a_hooked_module_with_its_own_names():
    model = crate()
    hooked, tokens = to_hooked(model), some_tokens(2, 8)
    logits, acts = hooked.run_with_cache(tokens)
    expected, ours = run_with_cache(model, tokens)
    assert_near(logits, expected)
    assert list(acts.keys()) == hook_names(model) == list(ours)
    for name in ours:
        torch.testing.assert_close(acts[name], ours[name], msg=name)
    ablated = hooked.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.mlp.hook_post", lambda acts, hook: acts * 0)]
    )
    assert (ablated - ablated[:, :1]).abs().max() == 0
    assert torch.equal(hooked(tokens), model(tokens).logits)
    some = hooked.run_with_cache(
        tokens, names_filter=lambda name: name.endswith("hook_code_0"), return_cache_object=False
    )[1]
    assert list(some) == ["blocks.0.mlp.hook_code_0", "blocks.1.mlp.hook_code_0"]
    assert hooked.cfg.d_mlp == 128
    neurons = acts.get_neuron_results(1)
    assert_near(neurons.sum(-2), acts["blocks.1.hook_mlp_out"])


def test_stopping_early_runs_no_later_block():
    model, ran = crate(), []
    model.model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    hooked = to_hooked(model)
    _, acts = hooked.run_with_cache(some_tokens(1, 5), stop_at_layer=1)
    assert not ran
    assert [name for name in acts.keys() if name.startswith("blocks.1")] == []  # noqa: SIM118
    assert "blocks.0.hook_resid_post" in acts.keys()  # noqa: SIM118


def test_the_wrapped_model_stays_as_it_was():
    model = crate()
    names = [name for name, _ in model.named_modules()]
    hooked = to_hooked(model)
    hooked.run_with_cache(some_tokens(1, 4))
    assert [name for name, _ in model.named_modules()] == names
    assert not any("name" in vars(module) for module in model.modules())
    assert {id(p) for p in hooked.parameters()} == {id(p) for p in model.parameters()}


class Letters:
    """A tokenizer of single letters."""

    name_or_path = "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


def test_text_goes_through_the_tokenizer():
    hooked = to_hooked(crate(), Letters())
    assert torch.equal(hooked("abc"), hooked(torch.tensor([0, 1, 2])))
    assert hooked.to_tokens(["ab", "cd"]).tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ModelError, match="has no BOS"):
        hooked.to_tokens("ab", prepend_bos=True)
    assert hooked.to_single_token("b") == 1
    assert torch.equal(hooked.tokens_to_residual_directions("b"), hooked.W_U[:, 1])
    with pytest.raises(ModelError, match="is 2 tokens, want one"):
        hooked.to_single_token("ab")
    with pytest.raises(ModelError, match="several lengths"):
        hooked(["a", "ab"])
    with pytest.raises(ModelError, match="text needs a tokenizer"):
        to_hooked(crate())("abc")


def test_a_network_of_no_family_is_refused():
    with pytest.raises(ModelError, match="Linear is in no family"):
        to_hooked(torch.nn.Linear(2, 2))


class Batches:
    """What sae-lens' evaluation asks of an activation store."""

    store_batch_size_prompts = 2
    context_size = 12

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def get_batch_tokens(self, n: int) -> Tensor:
        return torch.randint(60, (n, 12), generator=self.generator)

    def reset_input_dataset(self) -> None:
        self.generator.manual_seed(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [crate, gpt2])
def test_sae_lens_evaluates_a_dictionary_on_the_hooked_model(build):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    hooked, hook = to_hooked(build()), "blocks.0.mlp.hook_post"
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=128, d_sae=256, k=8))
    sae.cfg.metadata.hook_name = hook
    metrics, _ = run_evals(
        sae,
        Batches(),
        hooked,
        ActivationScaler(),
        get_eval_everything_config(
            batch_size_prompts=2,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
        ),
        exclude_special_tokens=False,
    )
    performance = metrics["model_performance_preservation"]

    # the same by hand, without TransformerLens or sae-lens' evaluation
    batches = Batches()
    losses = [hooked(batches.get_batch_tokens(2), return_type="loss") for _ in range(2)]
    expected = float(torch.stack(losses).mean().detach())
    assert performance["ce_loss_without_sae"] == pytest.approx(expected, abs=1e-4)
    assert performance["ce_loss_with_ablation"] != pytest.approx(expected, abs=1e-4)
    assert metrics["sparsity"]["l0"] == pytest.approx(8, abs=1)


def llama(kind: str = "llama"):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [crate, gpt2, llama])
def test_padding_changes_neither_logits_nor_acts_nor_the_loss(build, side):
    hooked, tokens = to_hooked(build()), some_tokens(1, 6)
    pad, real = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    order = (pad, tokens) if side == "left" else (tokens, pad)
    mask = torch.cat([pad, real] if side == "left" else [real, pad], 1)
    padded, here = torch.cat(order, 1), mask[0].bool()
    logits, acts = hooked.run_with_cache(padded, attention_mask=mask)
    want, alone = hooked.run_with_cache(tokens)
    assert_near(logits[:, here], want)
    for name in ("blocks.1.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.0.attn.hook_z"):
        assert_near(acts[name][:, here], alone[name], name)
    loss = hooked(padded, return_type="loss", attention_mask=mask)
    assert_near(loss, hooked(tokens, return_type="loss"))
    each = hooked(padded, return_type="loss", loss_per_token=True, attention_mask=mask)
    assert each.shape == (1, 8) and int((each != 0).sum()) == 5
    stopped = hooked(padded, stop_at_layer=1, attention_mask=mask)
    assert_near(stopped[:, here], hooked(tokens, stop_at_layer=1))


@torch.no_grad()
def test_a_crate_refuses_to_decompose_what_its_blocks_replace():
    tokens = some_tokens(1, 5)
    _, acts = to_hooked(crate()).run_with_cache(tokens)
    for call in (
        lambda: acts.decompose_resid(),
        lambda: acts.get_full_resid_decomposition(),
        lambda: acts.logit_attrs(acts.accumulated_resid(), tokens=3),
    ):
        with pytest.raises(ModelError, match=r"every block replaces the stream.*accumulated_resid"):
            call()
    last = acts["blocks.1.hook_resid_post"]
    assert_near(acts.accumulated_resid()[-1], last)
    assert_near(acts.get_neuron_results(1).sum(-2), last)  # as the message says
    heads = acts.stack_head_results(layer=1).sum(0)
    assert_near(heads, acts["blocks.0.hook_attn_out"] - to_hooked(crate()).blocks[0].attn.b_O)


@torch.no_grad()
@pytest.mark.parametrize("build", ["skip", "gpt2", "llama", "qwen3", "mistral"])
def test_where_blocks_add_to_the_stream_all_parts_add_up_to_it(build):
    if build == "skip":
        section = CrateModel(arch="crate", n_layers=2, d_model=32, n_heads=4, ista_skip=True)
        model = spread(build_model(section, d_vocab=60, n_ctx=24, seed=0))
    else:
        model = gpt2() if build == "gpt2" else llama(build)
    hooked = to_hooked(model)
    _, acts = hooked.run_with_cache(some_tokens(2, 6))
    last = acts["blocks.1.hook_resid_post"]
    assert_near(acts.decompose_resid().sum(0), last)
    for expand in (True, False):
        parts = acts.get_full_resid_decomposition(expand_neurons=expand)
        assert_near(parts.sum(0), last, f"{build}, {expand}")
    assert hooked.blocks[0].attn.W_O.shape == (4, 8, 32)
    mlp = hooked.blocks[1].mlp
    assert_near(
        acts["blocks.1.mlp.hook_post"] @ mlp.W_out + mlp.b_out, acts["blocks.1.hook_mlp_out"]
    )


@torch.no_grad()
def test_heads_behind_a_norm_are_no_parts_and_are_refused():
    _, acts = to_hooked(llama("gemma2")).run_with_cache(some_tokens(1, 4))
    with pytest.raises(ModelError, match=r"stack_head_results: in gemma2 a norm stands between"):
        acts.stack_head_results()
    assert_near(acts.decompose_resid().sum(0), acts["blocks.1.hook_resid_post"])


@pytest.mark.parametrize("adds", [True, False])
def test_a_bos_is_where_it_is_asked_for(adds):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "the", "cat"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    hooked = to_hooked(crate(), tokenizer)
    assert hooked.to_tokens("the cat", prepend_bos=True).tolist() == [[1, 3, 4]]
    assert hooked.to_tokens("the cat", prepend_bos=False).tolist() == [[3, 4]]
    own = [[1, 3, 4, 2]] if adds else [[3, 4]]
    assert hooked.to_tokens("the cat").tolist() == own and hooked.cfg.default_prepend_bos is adds
    assert hooked.to_single_token("cat") == 4
    assert torch.equal(hooked.tokens_to_residual_directions("cat"), hooked.W_U[:, 4])
    alone = hooked(torch.tensor([[3, 4]]))
    assert torch.equal(hooked("the cat", prepend_bos=False), alone)
