"""A recipe's model section made into a network; `load_model` and `save_model` keep it."""

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lmmono.errors import ModelError
from lmmono.models.crate import CrateConfig
from lmmono.models.gpt2 import build_gpt2, gpt2_config
from lmmono.models.storage import load_model, save_model
from lmmono.recipe.sections import CrateModel, Gpt2Model

__all__ = ["build_model", "load_model", "model_config", "save_model"]


def model_config(
    section: CrateModel | Gpt2Model, *, d_vocab: int, n_ctx: int, eos_token_id: int | None = None
) -> PreTrainedConfig:
    """Return the Hugging Face configuration that a recipe's model section describes.

    Raises:
        ModelError: The sizes do not fit each other.
    """
    if section.d_model % section.n_heads:
        raise ModelError(
            f"model.d_model {section.d_model} cannot be split over {section.n_heads} heads;"
            " choose model.n_heads that divides it"
        )
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
    """Return a new model; its weights depend on `seed` alone, and no other random state is touched.

    Raises:
        ModelError: The sizes do not fit each other.
    """
    config = model_config(section, d_vocab=d_vocab, n_ctx=n_ctx, eos_token_id=eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(section, Gpt2Model):
            return build_gpt2(config)
        return AutoModelForCausalLM.from_config(config)
