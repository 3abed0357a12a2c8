"""Checkpoints of the released crate-lm code, read without running anything in them.

A checkpoint is nanoGPT's dict (`model`, `model_args`, ...) or a plain state dict. Vocabularies
padded for speed keep their rows, since the padded logits are part of the trained softmax; the
number of tokens that a tokenizer really has is recorded as `n_tokens` in the configuration, and
`generate` never picks a padded one.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lmmono.errors import ModelError
from lmmono.models import gpt2
from lmmono.models.crate import CrateConfig, CrateForCausalLM
from lmmono.models.storage import save_model
from lmmono.models.weights import RELEASED_CRATE, count_blocks, fill, rename, shape_of

N_TOKENS = {50304: 50257}
"""Tokens of the tokenizer by padded vocabulary: GPT-2's BPE is padded to a multiple of 64."""

END_OF_TEXT = 50256
"""GPT-2's end-of-text token."""


STARTS = (b"PK\x03\x04", b"\x80")
"""First bytes of the two formats that PyTorch has: a zip archive, a pickle."""


def import_released(ckpt: Path | str, out: Path | str, *, n_heads: int | None = None) -> Path:
    """Convert a released checkpoint to a folder that `load_model` reads, whole or not at all.

    Args:
        ckpt: A `.pt` file of the released CRATE or of its GPT-2 (ReLU) baseline.
        out: The folder to make.
        n_heads: Attention heads; read from the checkpoint's `model_args` where it has them.

    Returns:
        The folder.

    Raises:
        ModelError: The file is missing, cut short, holds code, or fits no released model; or
            `out` exists.
    """
    path = Path(ckpt)
    saved = _read(path)
    args: Any = saved.get("model_args") or {}
    weights = _weights(path, saved)
    n_heads = n_heads or args.get("n_head")
    if n_heads is None:
        raise ModelError(
            f"{path}: says nothing about attention heads; pass n_heads (released models have 4"
            " where d_model is 128, 12 where it is 768)"
        )
    model = _build(path, weights, n_heads)
    d_vocab = shape_of(weights, "transformer.wte.weight")[0]
    model.config.n_tokens = N_TOKENS.get(d_vocab, d_vocab)
    if model.config.n_tokens == END_OF_TEXT + 1:
        for settings in (model.config, model.generation_config):
            settings.bos_token_id = settings.eos_token_id = END_OF_TEXT
        # rows that no text has: never generated
        model.generation_config.suppress_tokens = list(range(END_OF_TEXT + 1, d_vocab)) or None
    return save_model(model, out)


def crate_from_released(state_dict: Mapping[str, Tensor], *, n_heads: int) -> CrateForCausalLM:
    """Build the model whose weights carry the released code's names (crate-lm, `ista.weight`).

    `n_heads` cannot be read off the weights. Step size and sparsity are the released constants.

    Raises:
        ModelError: A weight is missing, unknown or of another shape.
    """
    d_mlp, d_model = shape_of(state_dict, "transformer.h.0.ista.weight")
    config = CrateConfig(
        vocab_size=shape_of(state_dict, "transformer.wte.weight")[0],
        max_position_embeddings=shape_of(state_dict, "transformer.wpe.weight")[0],
        hidden_size=d_model,
        num_hidden_layers=count_blocks(state_dict, "transformer.h."),
        num_attention_heads=n_heads,
        overcompleteness=d_mlp // d_model,
    )
    return fill(CrateForCausalLM(config), state_dict, RELEASED_CRATE)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        if not file.read(4).startswith(STARTS):
            raise ModelError(f"{path}: no PyTorch checkpoint, by its first bytes")
    is_zip = zipfile.is_zipfile(path)  # only these can be mapped instead of read whole
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as fault:
        raise ModelError(
            f"{path}: holds more than tensors and numbers, and lmmono runs no code from a file;"
            " where you trust it, save only its weights: torch.save(ckpt['model'], 'weights.pt')"
        ) from fault
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as fault:
        raise ModelError(
            f"{path}: {path.stat().st_size:,} bytes that are no whole PyTorch checkpoint"
            f" ({(str(fault) or type(fault).__name__).splitlines()[0]}); copy it again"
        ) from fault
    if not isinstance(saved, Mapping):
        raise ModelError(f"{path}: holds a {type(saved).__name__}, want a dict of weights")
    return dict(cast(Mapping[str, Any], saved))


def _weights(path: Path, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights without the prefixes that compiling and DDP put before their names."""
    state: Any = saved.get("model", saved)
    if not isinstance(state, Mapping):
        raise ModelError(f"{path}: 'model' holds a {type(state).__name__}, want a dict of weights")
    weights = cast(Mapping[str, Any], state)
    prefixes = {"_orig_mod.": "", "module.": ""}
    return {rename(k, prefixes): v for k, v in weights.items() if isinstance(v, Tensor)}


def _build(path: Path, weights: Mapping[str, Tensor], n_heads: int) -> Any:
    if "transformer.h.0.ista.weight" in weights:
        d_mlp, d_model = shape_of(weights, "transformer.h.0.ista.weight")
        if d_mlp == d_model:
            raise ModelError(
                f"{path}: a CRATE with complete dictionaries ({d_mlp} x {d_model}, arXiv"
                " 2311.13110), another model than the overcomplete one that lmmono has"
            )
        return crate_from_released(weights, n_heads=n_heads)
    if "transformer.h.0.mlp.c_fc.weight" in weights:
        return gpt2.from_released(weights, n_heads=n_heads)
    names = ", ".join(sorted(weights)[:3]) or "no tensors"
    raise ModelError(
        f"{path}: neither a released CRATE (transformer.h.0.ista.weight) nor its GPT-2 baseline"
        f" (transformer.h.0.mlp.c_fc.weight); it holds {names}"
    )
