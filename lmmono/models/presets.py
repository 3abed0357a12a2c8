"""The paper's model sizes (arXiv 2410.16443, Table 1) under the names crate_1l ... gpt2_12l."""

from transformers.configuration_utils import PreTrainedConfig

from lmmono.errors import ModelError, nearest
from lmmono.models.build import model_config
from lmmono.recipe.sections import CrateModel, Gpt2Model

SIZES = {"1l": (1, 128, 4), "2l": (2, 128, 4), "3l": (3, 128, 4), "6l": (6, 768, 12)}
SIZES["12l"] = (12, 768, 12)
"""n_layers, d_model and n_heads by size."""

PRESETS: dict[str, CrateModel | Gpt2Model] = {
    f"crate_{size}": CrateModel(arch="crate", n_layers=layers, d_model=d_model, n_heads=heads)
    for size, (layers, d_model, heads) in SIZES.items()
} | {
    f"gpt2_{size}": Gpt2Model(arch="gpt2", n_layers=layers, d_model=d_model, n_heads=heads)
    for size, (layers, d_model, heads) in SIZES.items()
}
"""Model sections by preset name."""


def preset(name: str, *, d_vocab: int = 50304, n_ctx: int = 1024) -> PreTrainedConfig:
    """Return the configuration of a preset; the default vocabulary is GPT-2's padded one.

    Raises:
        ModelError: The name is unknown.
    """
    if name not in PRESETS:
        raise ModelError(f"no preset {name!r}: {nearest(name, PRESETS)}")
    return model_config(PRESETS[name], d_vocab=d_vocab, n_ctx=n_ctx)
