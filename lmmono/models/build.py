"""A recipe's model section, or one of the paper's sizes, made into a network."""

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lmmono.errors import ModelError, nearest
from lmmono.models.crate import CrateConfig
from lmmono.models.gpt2 import build_gpt2, gpt2_config
from lmmono.recipe.sections import CrateModel, Gpt2Model

SIZES = {
    "1l": (1, 128, 4),
    "2l": (2, 128, 4),
    "3l": (3, 128, 4),
    "6l": (6, 768, 12),
    "12l": (12, 768, 12),
}
"""n_layers, d_model and n_heads of the paper's models (arXiv 2410.16443, Table 1)."""


PRESETS: dict[str, CrateModel | Gpt2Model] = {
    f"crate_{size}": CrateModel(arch="crate", n_layers=layers, d_model=d_model, n_heads=heads)
    for size, (layers, d_model, heads) in SIZES.items()
} | {
    f"gpt2_{size}": Gpt2Model(arch="gpt2", n_layers=layers, d_model=d_model, n_heads=heads)
    for size, (layers, d_model, heads) in SIZES.items()
}
"""Model sections by preset name: crate_1l ... gpt2_12l."""


def model_config(
    section: CrateModel | Gpt2Model, *, d_vocab: int, n_ctx: int, eos_token_id: int | None = None
) -> PreTrainedConfig:
    """Return the Hugging Face configuration that a recipe's model section describes."""
    if isinstance(section, Gpt2Model):
        return gpt2_config(
            d_vocab=d_vocab,
            n_ctx=n_ctx,
            d_model=section.d_model,
            n_layers=section.n_layers,
            n_heads=section.n_heads,
            activation=section.activation,
            eos_token_id=eos_token_id,
        )
    return CrateConfig(
        vocab_size=d_vocab,
        max_position_embeddings=n_ctx,
        hidden_size=section.d_model,
        num_hidden_layers=section.n_layers,
        num_attention_heads=section.n_heads,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        **section.model_dump(exclude={"arch", "d_model", "n_layers", "n_heads"}),
    )


def build_model(
    section: CrateModel | Gpt2Model,
    *,
    d_vocab: int,
    n_ctx: int,
    seed: int,
    eos_token_id: int | None = None,
) -> PreTrainedModel:
    """Return a new model whose weights depend on `seed` alone; other random states stay put."""
    config = model_config(section, d_vocab=d_vocab, n_ctx=n_ctx, eos_token_id=eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(section, Gpt2Model):
            return build_gpt2(config)
        return AutoModelForCausalLM.from_config(config)


def preset(name: str, *, d_vocab: int = 50304, n_ctx: int = 1024) -> PreTrainedConfig:
    """Return the configuration of a preset; the default vocabulary is GPT-2's padded one.

    Raises:
        ModelError: The name is unknown.
    """
    if name not in PRESETS:
        raise ModelError(f"no preset {name!r}: {nearest(name, PRESETS)}")
    return model_config(PRESETS[name], d_vocab=d_vocab, n_ctx=n_ctx)
