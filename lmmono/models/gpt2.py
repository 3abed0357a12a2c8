"""The GPT-2 baseline: transformers' own model with ReLU neurons and no dropout.

Holds the builder and the mapping from released (nanoGPT-style) weights.
"""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from lmmono.models.weights import count_blocks, fill, shape_of

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Linear weights [out, in] of nanoGPT that GPT-2's Conv1D holds as [in, out]."""


def gpt2_config(
    *,
    d_vocab: int,
    n_ctx: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    activation: Literal["relu", "gelu_new"] = "relu",
    eos_token_id: int | None = None,
) -> GPT2Config:
    """Return the configuration of the baseline: no dropout, and no cache unless asked for."""
    return GPT2Config(
        vocab_size=d_vocab,
        n_positions=n_ctx,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )


def build_gpt2(config: PreTrainedConfig) -> GPT2LMHeadModel:
    """Return a new model whose plain forward makes no cache while `generate` still uses one."""
    model = GPT2LMHeadModel(cast(GPT2Config, config))
    assert model.generation_config is not None
    model.generation_config.use_cache = True
    # transformers finds no loss for this class name and would say so on every first forward
    model.loss_type = "ForCausalLM"
    return model


def from_released(state_dict: Mapping[str, Tensor], *, n_heads: int) -> GPT2LMHeadModel:
    """Build the ReLU baseline from weights under the released code's (nanoGPT's) names.

    Checkpoints without biases (nanoGPT's `bias=False`) get zero ones. `n_heads` cannot be read off
    the weights.

    Raises:
        ModelError: A weight is missing, unknown or of another shape.
    """
    d_vocab, d_model = shape_of(state_dict, "transformer.wte.weight")
    config = gpt2_config(
        d_vocab=d_vocab,
        n_ctx=shape_of(state_dict, "transformer.wpe.weight")[0],
        d_model=d_model,
        n_layers=count_blocks(state_dict, "transformer.h."),
        n_heads=n_heads,
    )
    model = build_gpt2(config)
    weights = {k: v.T if k.endswith(TRANSPOSED) else v for k, v in state_dict.items()}
    absent = [k for k in model.state_dict() if k.endswith(".bias") and k not in weights]
    if not any(k.endswith("c_attn.bias") for k in weights):
        weights |= {k: torch.zeros_like(model.state_dict()[k]) for k in absent}
    return fill(model, weights, {})
