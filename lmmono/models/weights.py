"""Weights that come under other names: renaming them, and filling a model with every one of them.

A model is filled completely or not at all: a missing, unknown or misshapen weight is an error.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from lmmono.errors import ModelError, nearest

AnyModule = TypeVar("AnyModule", bound=nn.Module)

RELEASED_CRATE = {
    "transformer.wte.": "model.embed.",
    "transformer.wpe.": "model.pos_embed.",
    "transformer.ln_f.": "model.ln_final.",
    "transformer.h.": "model.blocks.",
    ".prenorm_": ".ln",
    ".attn.c_attn.": ".attn.u_proj.",
    ".attn.c_proj.": ".attn.o_proj.",
    ".ista.weight": ".mlp.dictionary",
}
"""Parts of the released CRATE code's weight names, and ours."""

NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
"""Endings of names that old checkpoints hold beside the weights: causal masks and the tied head."""


def count_blocks(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many blocks the names `prefix + index + ...` speak of.

    >>> count_blocks({"h.0.w": Tensor(), "h.1.w": Tensor(), "h.1.b": Tensor(), "e": Tensor()}, "h.")
    2
    """
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Return the shape of a weight.

    Raises:
        ModelError: There is no such weight.
    """
    if name not in weights:
        raise ModelError(f"no weight {name!r} here: {nearest(name, weights)}")
    return tuple(weights[name].shape)


def rename(name: str, parts: Mapping[str, str]) -> str:
    """Return `name` with each known part replaced, in the order given.

    >>> rename("transformer.h.0.prenorm_1.bias", {"transformer.h.": "blocks.", "prenorm_": "ln"})
    'blocks.0.ln1.bias'
    """
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def fill(model: AnyModule, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> AnyModule:
    """Copy `weights` into `model` under our names, and return the model.

    Raises:
        ModelError: A weight is missing, unknown or of another shape; the model is then unchanged.
    """
    ours = {rename(k, names): v for k, v in weights.items() if not k.endswith(NO_WEIGHTS)}
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith(NO_WEIGHTS)}
    faults = [f"missing {name}" for name in sorted(wanted.keys() - ours.keys())]
    faults += [f"unknown {name}" for name in sorted(ours.keys() - wanted.keys())]
    faults += [
        f"{name} has shape {list(ours[name].shape)}, want {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & ours.keys())
        if ours[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            f"these weights do not fit {type(model).__name__}: {'; '.join(faults[:5])}{more};"
            " was the checkpoint made by another model?"
        )
    model.load_state_dict(ours, strict=False)
    return model
