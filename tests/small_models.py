"""Tiny models for tests: CRATE with every option, and a random decoder of every family."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmmono.models.crate import CrateConfig, CrateForCausalLM

EVERY_OPTION = {
    "n_ista_steps": 3,
    "step_size": "lipschitz",
    "sparsity": 0.05,
    "overcompleteness": 3,
    "ista_skip": True,
    "untied_decoder": True,
    "separate_query": True,
    "learned_threshold": True,
}
MLPS = [{"relu_mlp": True}, {"relu_mlp": True, "ista_skip": True}]
VARIANTS = [{}, *({name: value} for name, value in EVERY_OPTION.items()), *MLPS, EVERY_OPTION]


def small(seed: int = 0, **options: object) -> CrateForCausalLM:
    """Return a two-layer CRATE of 16 dimensions with weights far from zero."""
    sizes = {"vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    return CrateForCausalLM(CrateConfig(**sizes, **heads, **options, initializer_range=0.3)).eval()


def some_tokens(*shape: int) -> Tensor:
    """Return fixed token ids that every tiny model knows."""
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
FAMILIES = {
    "crate": {},
    "crate separate query": {"separate_query": True, "ista_skip": True, "n_ista_steps": 3},
    "gpt2": {"activation_function": "relu"},
    "gpt_neox": {},
    "gpt_neox sequential": {"use_parallel_residual": False},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 3},
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": {**GROUPED, "sliding_window": 3},
    "gemma3_text": {**GROUPED, "sliding_window": 3},
}
MIXTURE = {**GROUPED, "num_experts_per_tok": 2}
NEW_FAMILIES = {
    "bloom": {},
    "falcon": {},
    "falcon grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon alibi": {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    "falcon_mamba": {"state_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 3},
    "gpt_oss": {**MIXTURE, "num_local_experts": 4, "sliding_window": 3, "rope_parameters": PLAIN},
    "gptj": {"rotary_dim": 4, "n_inner": 24},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "mixtral": {**MIXTURE, "num_local_experts": 4},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 3},
    "olmoe": {**MIXTURE, "num_experts": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "qwen3_moe": {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 12, "mlp_only_layers": [0]},
    "smollm3": GROUPED,
}
"""Families whose hooks the contract alone tests."""

GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


def tiny(family: str, **settings: object) -> PreTrainedModel:
    """Return a random two-layer model of a family, norms and biases random too."""
    options = {**FAMILIES, **NEW_FAMILIES}.get(family, {}) | settings
    config = AutoConfig.for_model(family.split()[0], **{**SIZES, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return model
