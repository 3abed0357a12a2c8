"""The paper's sizes: parameter counts recounted by hand, tied head once, positions left out."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmmono.errors import ModelError
from lmmono.models.build import PRESETS, preset

D_VOCAB = 50304
SIZES = {"1l": (1, 128), "2l": (2, 128), "3l": (3, 128), "6l": (6, 768), "12l": (12, 768)}
CRATE_MILLIONS = {"1l": 6.54, "2l": 6.64, "3l": 6.74, "6l": 59.89, "12l": 81.15}
GPT2_MILLIONS = {"1l": 6.64, "2l": 6.83, "3l": 7.03, "6l": 81.1, "12l": 123.6}


def count(name: str, *, without: tuple[str, ...]) -> int:
    """Return the number of parameters whose names do not end so; the tied head counts once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset(name))
    weights = {id(p): p.numel() for n, p in model.named_parameters() if not n.endswith(without)}
    return sum(weights.values())


@pytest.mark.parametrize("size", SIZES)
def test_crate_has_the_parameters_of_the_recount(size):
    n_layers, d = SIZES[size]
    n_parameters = count(f"crate_{size}", without=("pos_embed.weight",))
    # per layer: U and the output matrix with its bias, the dictionary, two norms
    assert n_parameters == D_VOCAB * d + n_layers * (6 * d * d + 5 * d) + 2 * d
    assert n_parameters / 1e6 == pytest.approx(CRATE_MILLIONS[size], abs=0.005)


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_has_the_parameters_of_the_recount(size):
    n_layers, d = SIZES[size]
    # the paper's baseline has no biases, transformers' GPT-2 has
    n_parameters = count(f"gpt2_{size}", without=("wpe.weight", ".bias"))
    assert n_parameters == D_VOCAB * d + n_layers * (12 * d * d + 2 * d) + d
    decimals = 0.05 if d == 768 else 0.005
    assert n_parameters / 1e6 == pytest.approx(GPT2_MILLIONS[size], abs=decimals)
    with_biases = count(f"gpt2_{size}", without=("wpe.weight",))
    assert with_biases == n_parameters + n_layers * 11 * d + d


def test_every_preset_is_a_model_of_its_kind():
    assert set(PRESETS) == {f"{arch}_{size}" for arch in ("crate", "gpt2") for size in SIZES}
    for name in PRESETS:
        config = preset(name, d_vocab=1000, n_ctx=64)
        assert config.model_type == name.split("_")[0]
        assert (config.vocab_size, config.max_position_embeddings) == (1000, 64)
        assert config.num_attention_heads == (4 if config.hidden_size == 128 else 12)
        assert config.hidden_size == SIZES[name.split("_")[1]][1]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ModelError, match="did you mean crate_12l"):
        preset("crate_12")
