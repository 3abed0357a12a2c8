"""Which modules of which Hugging Face decoder carry TransformerLens' hook points: one table.

Holds a row per family and the translation of a row into points. A decoder that is not in the
table still has its module paths as hook names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from lmmono.models.points import (
    AttentionPoint,
    Heads,
    InputPoint,
    MidPoint,
    NormPoint,
    OutputPoint,
    Point,
    PositionPoint,
    ScalePoint,
)


@dataclass(frozen=True, slots=True)
class Family:
    """Module names of one kind of decoder, relative to its base model or to a block."""

    embed: str
    blocks: str
    ln_final: str
    ln1: str
    ln2: str
    attn: str
    qkv: tuple[str, ...]
    """One fused projection, or the projections of query, key and value."""
    o_proj: str
    """Its input is `attn.hook_z`."""
    mlp_in: str | None
    """Its output is `mlp.hook_pre` (a gated MLP's gate)."""
    mlp_out: str | None
    """Its input is `mlp.hook_post`."""
    pos_embed: str | None = None
    fused: Literal["by_part", "by_head"] = "by_part"
    """Order of a fused projection's output."""
    mlp_up: str | None = None
    """A gated MLP's linear half, `mlp.hook_pre_linear`."""
    attn_norm: str | None = None
    """Norm between attention and the stream, where there is one."""
    mlp_norm: str | None = None
    """Norm between MLP and the stream, where there is one."""
    gain_offset: float = 0.0
    """What the norms add to their weight."""


_LLAMA = Family(
    embed="embed_tokens",
    blocks="layers",
    ln_final="norm",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    attn="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    o_proj="o_proj",
    mlp_in="gate_proj",
    mlp_up="up_proj",
    mlp_out="down_proj",
)
_GEMMA2 = replace(
    _LLAMA,
    ln2="pre_feedforward_layernorm",
    attn_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
    gain_offset=1.0,
)
FAMILIES: dict[str, Family] = {
    "crate": Family(
        embed="embed",
        pos_embed="pos_embed",
        blocks="blocks",
        ln_final="ln_final",
        ln1="ln1",
        ln2="ln2",
        attn="attn",
        qkv=(),
        o_proj="o_proj",
        mlp_in=None,
        mlp_out=None,
    ),
    "gpt2": Family(
        embed="wte",
        pos_embed="wpe",
        blocks="h",
        ln_final="ln_f",
        ln1="ln_1",
        ln2="ln_2",
        attn="attn",
        qkv=("c_attn",),
        o_proj="c_proj",
        mlp_in="c_fc",
        mlp_out="c_proj",
    ),
    "gpt_neox": Family(
        embed="embed_in",
        blocks="layers",
        ln_final="final_layer_norm",
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        attn="attention",
        qkv=("query_key_value",),
        fused="by_head",
        o_proj="dense",
        mlp_in="dense_h_to_4h",
        mlp_out="dense_4h_to_h",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": replace(_LLAMA, gain_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}
"""Families by Hugging Face `model_type`."""


def points(model: nn.Module) -> dict[str, Point]:
    """Return the model's TransformerLens hook points by name, in the order they run.

    Empty for a model whose `config.model_type` is not in the table.
    """
    config: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        return {}
    base = getattr(model, "base_model_prefix", "")
    root = f"{base}." if base and hasattr(model, base) else ""
    by_name: dict[str, Point] = {"hook_embed": OutputPoint(root + family.embed)}
    if family.pos_embed is not None:
        by_name["hook_pos_embed"] = PositionPoint(root + family.embed, root + family.pos_embed)
    for i in range(config.num_hidden_layers):
        block = f"{root}{family.blocks}.{i}"
        by_name |= {f"blocks.{i}.{name}": point for name, point in _block(family, block, config)}
    by_name |= dict(_norm("ln_final", root + family.ln_final, family))
    return by_name


def _block(family: Family, block: str, config: Any) -> Iterator[tuple[str, Point]]:
    attn = f"{block}.{family.attn}"
    attn_out = f"{block}.{family.attn_norm}" if family.attn_norm else attn
    mlp_out = f"{block}.{family.mlp_norm}" if family.mlp_norm else f"{block}.mlp"
    yield "hook_resid_pre", InputPoint(block)
    yield from _norm("ln1", f"{block}.{family.ln1}", family)
    yield from _attention(family, attn, config)
    yield "hook_attn_out", OutputPoint(attn_out)
    # GPT-NeoX may add attention and MLP to the stream at once: then there is no middle
    if not getattr(config, "use_parallel_residual", False):
        yield "hook_resid_mid", MidPoint(f"{block}.{family.ln1}", attn_out)
    yield from _norm("ln2", f"{block}.{family.ln2}", family)
    yield from _mlp(family, f"{block}.mlp", config)
    yield "hook_mlp_out", OutputPoint(mlp_out)
    yield "hook_resid_post", OutputPoint(block)


def _norm(name: str, path: str, family: Family) -> Iterator[tuple[str, Point]]:
    yield f"{name}.hook_scale", ScalePoint(path, family.gain_offset)
    yield f"{name}.hook_normalized", NormPoint(path, family.gain_offset)


def _attention(family: Family, attn: str, config: Any) -> Iterator[tuple[str, Point]]:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "crate":
        yield from _mssa(attn, d_head, config)
    for i, letter in enumerate("qkv"):
        if len(family.qkv) == 1:
            heads = Heads(d_head, part=i, n_parts=3, by_head=family.fused == "by_head")
            yield f"attn.hook_{letter}", OutputPoint(f"{attn}.{family.qkv[0]}", heads)
        elif family.qkv:
            yield f"attn.hook_{letter}", OutputPoint(f"{attn}.{family.qkv[i]}", Heads(d_head))
    yield "attn.hook_attn_scores", AttentionPoint(attn, "hook_attn_scores")
    yield "attn.hook_pattern", AttentionPoint(attn, "hook_pattern")
    yield "attn.hook_z", InputPoint(f"{attn}.{family.o_proj}", Heads(d_head))


def _mssa(attn: str, d_head: int, config: Any) -> Iterator[tuple[str, Point]]:
    shared = OutputPoint(f"{attn}.u_proj", Heads(d_head))
    query = OutputPoint(f"{attn}.q_proj", Heads(d_head)) if config.separate_query else shared
    yield "attn.hook_u", shared
    yield "attn.hook_q", query
    yield "attn.hook_k", shared
    yield "attn.hook_v", shared


def _mlp(family: Family, mlp: str, config: Any) -> Iterator[tuple[str, Point]]:
    if config.model_type == "crate":
        for name in (*(f"hook_code_{t}" for t in range(config.n_ista_steps - 1)), "hook_pre"):
            yield f"mlp.{name}", OutputPoint(f"{mlp}.{name}")
        yield "mlp.hook_post", OutputPoint(f"{mlp}.hook_post")
        return
    yield "mlp.hook_pre", OutputPoint(f"{mlp}.{family.mlp_in}")
    if family.mlp_up is not None:
        yield "mlp.hook_pre_linear", OutputPoint(f"{mlp}.{family.mlp_up}")
    yield "mlp.hook_post", InputPoint(f"{mlp}.{family.mlp_out}")
