"""A recipe's model section made into a network, and a saved network read back."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lmmono.errors import ModelError
from lmmono.models.crate import CrateConfig
from lmmono.models.gpt2 import gpt2_config
from lmmono.recipe.sections import CrateModel, Gpt2Model


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
        return AutoModelForCausalLM.from_config(config)


def load_model(path: Path | str) -> PreTrainedModel:
    """Return the causal language model that `save_pretrained` wrote to a folder, in eval mode.

    Reads safetensors only, from this machine only.

    Raises:
        ModelError: The folder is missing or foreign, or its weights are cut short or incomplete.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no model here (want config.json and model.safetensors as save_pretrained"
            " writes them); a released .pt checkpoint is made one by `lmmono import crate-lm`"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as fault:
        raise ModelError(
            f"{folder}: the model cannot be read ({fault}); copy or train it again"
        ) from fault
    gone = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if gone:
        raise ModelError(
            f"{folder}: got weights without {', '.join(gone[:5])}, want all of"
            f" {type(model).__name__}; copy or train it again"
        )
    return model.eval()
