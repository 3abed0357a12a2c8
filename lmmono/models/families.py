"""Which modules of which Hugging Face decoder carry TransformerLens' hook points: one table.

Holds a row per family and the translation of a row into points. A decoder that is not in the
table still has its module paths as hook names.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lmmono.models.points import (
    AttentionPoint,
    ExpertsPoint,
    Half,
    Heads,
    InputPoint,
    MidPoint,
    Negative,
    NormPoint,
    OutputPoint,
    Point,
    PositionPoint,
    RouterPoint,
    RowsPoint,
    ScalePoint,
)

OPEN = "open"
"""A pattern that is read by having the model attend in the open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Module names of one kind of decoder, relative to its decoder or to a block.

    `a|b` is the first that there is; a name that a model does not have gives it no hook.
    """

    embed: str
    blocks: str
    ln_final: str
    pos_embed: str | None = None
    ln1: str | None = None
    ln2: str | None = None
    attn: str | None = None
    qkv: tuple[str, ...] = ()
    """In `attn`: one fused projection, or the projections of query, key and value."""
    shared: str | None = None
    """In `attn`: a projection that is key and value at once, `attn.hook_u`."""
    qkv_groups: Callable[[Any], int] = lambda _: 1
    """Groups of a fused projection, see `Heads`."""
    o_proj: str = "o_proj"
    """In `attn`; its input is `attn.hook_z`."""
    pattern: str | None = OPEN
    """In `attn`: the dropout whose output is the pattern, or `OPEN`; None where none is formed."""
    mlp: str = "mlp"
    mlp_in: str | None = None
    """Its output is `mlp.hook_pre` (a gated MLP's gate)."""
    mlp_up: str | None = None
    """A gated MLP's linear half, `mlp.hook_pre_linear`; `mlp_in` again where one makes both."""
    mlp_out: str | None = None
    """Its input is `mlp.hook_post`."""
    experts: str | None = None
    """A mixture's experts, whose neurons are `mlp.hook_post` in the blocks that have them."""
    is_flat: bool = False
    """The MLP and its norm see a batch as one row of tokens."""
    attn_added: str | None = None
    """What is added to the stream, where it is not what `attn` returns."""
    mlp_added: str | None = None
    """What is added to the stream, where it is not what `mlp` returns."""
    is_overwritten: bool = False
    """What the MLP returns is added to in place."""
    ln1_post: str | None = None
    """Norm between attention and the stream, where there is one."""
    ln2_post: str | None = None
    """Norm between MLP and the stream, where there is one."""
    gain_offset: float = 0.0
    """What the norms add to their weight."""
    parallel: bool | Callable[[Any], bool] = False
    """Attention and MLP read and are added to the stream at once, so that there is no middle."""
    mixer: str | None = None
    """A state space model's mixer, which stands for attention and MLP."""
    requires: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings of the configuration without which these names do not fit."""


def _per_head(config: Any) -> int:
    return config.num_attention_heads


def _falcon_groups(config: Any) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


def _is_falcon_parallel(config: Any) -> bool:
    return config.parallel_attn or config.new_decoder_architecture


_LLAMA = Family(
    embed="embed_tokens",
    blocks="layers",
    ln_final="norm",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    attn="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    mlp_in="gate_proj",
    mlp_up="up_proj",
    mlp_out="down_proj",
    experts="experts",
)
_GEMMA2 = replace(
    _LLAMA,
    ln2="pre_feedforward_layernorm",
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
    gain_offset=1.0,
)
_OLMO2 = replace(_GEMMA2, ln1=None, ln2=None, gain_offset=0.0)
_GPT2 = Family(
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
)
_NEOX = Family(
    embed="embed_in",
    blocks="layers",
    ln_final="final_layer_norm",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    attn="attention",
    qkv=("query_key_value",),
    qkv_groups=_per_head,
    o_proj="dense",
    mlp_in="dense_h_to_4h",
    mlp_out="dense_4h_to_h",
    parallel=lambda config: config.use_parallel_residual,
)
_MAMBA = Family(embed="embeddings", blocks="layers", ln_final="norm_f", ln1="norm", mixer="mixer")
FAMILIES: dict[str, Family] = {
    "bloom": replace(
        _NEOX,
        embed="word_embeddings_layernorm",
        blocks="h",
        ln_final="ln_f",
        attn="self_attention",
        pattern="attention_dropout",
        # what these modules return is the stream already
        attn_added="self_attention.dense",
        mlp_added="mlp.dense_4h_to_h",
        parallel=False,
        requires={"apply_residual_connection_post_layernorm": False},
    ),
    "crate": Family(
        embed="embed",
        pos_embed="pos_embed",
        blocks="blocks",
        ln_final="ln_final",
        ln1="ln1",
        ln2="ln2",
        attn="attn",
        qkv=("q_proj|u_proj", "u_proj", "u_proj"),
        shared="u_proj",
    ),
    "falcon": replace(
        _NEOX,
        embed="word_embeddings",
        blocks="h",
        ln_final="ln_f",
        ln1="input_layernorm|ln_attn",
        ln2="post_attention_layernorm|ln_mlp",
        attn="self_attention",
        qkv_groups=_falcon_groups,
        pattern=None,
        is_overwritten=True,
        parallel=_is_falcon_parallel,
    ),
    "falcon_mamba": _MAMBA,
    "gemma": replace(_LLAMA, gain_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        attn="attn.attention",
        qkv=("q_proj", "k_proj", "v_proj"),
        o_proj="out_proj",
        pattern="attn_dropout",
    ),
    "gpt_neox": _NEOX,
    "gpt_oss": _LLAMA,
    "gptj": replace(
        _GPT2,
        pos_embed=None,
        ln2=None,
        qkv=("q_proj", "k_proj", "v_proj"),
        o_proj="out_proj",
        pattern="attn_dropout",
        mlp_in="fc_in",
        mlp_out="fc_out",
        parallel=True,
    ),
    "llama": _LLAMA,
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": _LLAMA,
    "opt": Family(
        embed="embed_tokens",
        pos_embed="embed_positions",
        blocks="layers",
        ln_final="final_layer_norm",
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        attn="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"),
        o_proj="out_proj",
        mlp="",
        mlp_in="fc1",
        mlp_out="fc2",
        mlp_added="fc2",
        is_flat=True,
        requires={"do_layer_norm_before": True},
    ),
    "phi": replace(
        _LLAMA,
        ln_final="final_layernorm",
        ln2=None,
        o_proj="dense",
        mlp_in="fc1",
        mlp_up=None,
        mlp_out="fc2",
        parallel=True,
    ),
    "phi3": replace(_LLAMA, qkv=("qkv_proj",), mlp_in="gate_up_proj", mlp_up="gate_up_proj"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
}
"""Families by Hugging Face `model_type`."""


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the model's decoder of text, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def family_of(model: nn.Module) -> Family | None:
    """Return the model's row of the table, if it is in it and its settings fit."""
    config = text_config(model)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return None if family is None or unfit_settings(family, config) else family


def unfit_settings(family: Family, config: Any) -> list[str]:
    """Return the settings under which a family's blocks are no longer those of the table."""
    values = {name: getattr(config, name, want) for name, want in family.requires.items()}
    return [f"{name}={value}" for name, value in values.items() if value != family.requires[name]]


def no_names(model: nn.Module) -> str:
    """Say why a model has no TransformerLens names."""
    config = text_config(model)
    kind = getattr(config, "model_type", None)
    if kind in FAMILIES:
        unfit = ", ".join(unfit_settings(FAMILIES[kind], config))
        return f"blocks of {kind} with {unfit} do not fit TransformerLens names"
    families = ", ".join(sorted(FAMILIES))
    return f"{kind or type(model).__name__} is in no family with TransformerLens names ({families})"


def decoder_path(model: Any) -> str:
    """Return where in the model its decoder is, with a dot at the end where it is not the model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    path = next(name for name, module in model.named_modules() if module is decoder)
    return f"{path}." if path else ""


def points(model: nn.Module) -> dict[str, Point]:
    """Return the model's TransformerLens hook points by name, in the order they run.

    Empty for a model that is in no family.
    """
    family = family_of(model)
    if family is None:
        return {}
    config, root = text_config(model), decoder_path(model)
    by_name: dict[str, Point] = {"hook_embed": OutputPoint(root + family.embed)}
    if family.pos_embed is not None:
        by_name["hook_pos_embed"] = PositionPoint(root + family.embed, root + family.pos_embed)
    for i in range(config.num_hidden_layers):
        block = _BlockPoints(model, f"{root}{family.blocks}.{i}", family, config)
        by_name |= {f"blocks.{i}.{name}": point for name, point in block.points()}
    by_name |= dict(_norm("ln_final", root + family.ln_final, family))
    return by_name


def _norm(name: str, path: str, family: Family) -> Iterator[tuple[str, Point]]:
    yield f"{name}.hook_scale", ScalePoint(path, family.gain_offset)
    yield f"{name}.hook_normalized", NormPoint(path, family.gain_offset)


class _BlockPoints:
    """One block of a model, as the hook points that its family's row gives it."""

    def __init__(self, model: nn.Module, path: str, family: Family, config: Any) -> None:
        self.path, self.family, self.config = path, family, config
        self.module = model.get_submodule(path)

    def at(self, *names: str | None) -> str | None:
        """Return the path of a module, by the names on the way to it; None if it is not there."""
        for choice in [] if None in names else (names[-1] or "").split("|"):
            path = ".".join(filter(None, (*names[:-1], choice)))
            module: Any = self.module
            for name in path.split("."):
                module = getattr(module, name, None)
            if isinstance(module, nn.Module):
                return f"{self.path}.{path}"
        return None

    def points(self) -> Iterator[tuple[str, Point]]:
        """Yield names within the block, and points, in the order they run."""
        family = self.family
        yield "hook_resid_pre", InputPoint(self.path)
        yield from self._norm("ln1", family.ln1)
        if mixer := self.at(family.mixer):
            yield from self._mixer(mixer)
        if self.at(family.attn):
            yield from self._attention()
            yield from self._mlp()
        yield "hook_resid_post", OutputPoint(self.path)

    def _norm(self, name: str, module: str | None) -> Iterator[tuple[str, Point]]:
        if path := self.at(module):
            yield from _norm(name, path, self.family)

    def _mixer(self, mixer: str) -> Iterator[tuple[str, Point]]:
        for name in ("in_proj", "x_proj"):
            if path := self.at(self.family.mixer, name):
                yield f"mixer.hook_{name}", OutputPoint(path)
        yield "mixer.hook_post", InputPoint(f"{mixer}.out_proj")
        yield "hook_mixer_out", OutputPoint(mixer)

    def _attention(self) -> Iterator[tuple[str, Point]]:
        family, config = self.family, self.config
        n_heads = config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        attn = f"{self.path}.{family.attn}"
        if family.shared:
            yield "attn.hook_u", OutputPoint(f"{attn}.{family.shared}", Heads(d_head))
        is_fused, n_groups = len(family.qkv) == 1, family.qkv_groups(config)
        readers: list[str] = []
        for part, letter in enumerate("qkv"):
            path = self.at(family.attn, family.qkv[0 if is_fused else part])
            assert path is not None, (family.attn, letter)
            readers.append(path)
            fused = Heads(d_head, part, n_heads // n_groups, n_groups)
            yield f"attn.hook_{letter}", OutputPoint(path, fused if is_fused else Heads(d_head))
        if family.pattern == OPEN:
            yield "attn.hook_attn_scores", AttentionPoint(attn, "hook_attn_scores")
            yield "attn.hook_pattern", AttentionPoint(attn, "hook_pattern")
        elif family.pattern is not None:
            yield "attn.hook_pattern", OutputPoint(f"{attn}.{family.pattern}")
        yield "attn.hook_z", InputPoint(f"{attn}.{family.o_proj}", Heads(d_head))
        yield from self._norm("ln1_post", family.ln1_post)
        added = f"{self.path}.{family.ln1_post or family.attn_added or family.attn}"
        yield "hook_attn_out", OutputPoint(added)
        parallel = family.parallel
        if not (parallel if isinstance(parallel, bool) else parallel(config)):
            yield "hook_resid_mid", MidPoint(self.at(family.ln1) or readers[0], added)

    def _mlp(self) -> Iterator[tuple[str, Point]]:
        family = self.family
        inside = dict(self._norm("ln2", family.ln2))
        if experts := self.at(family.mlp, family.experts):
            inside["mlp.hook_expert_weights"] = self._rows(RouterPoint(experts))
            for probe in ("hook_pre", "hook_pre_linear", "hook_post"):
                inside[f"mlp.{probe}"] = self._rows(ExpertsPoint(experts, probe))
            negative = ExpertsPoint(experts, "hook_post", Negative())
            inside["mlp.hook_post_neg"] = self._rows(negative)
        else:
            inside |= dict(self._neurons())
        added = family.ln2_post or family.mlp_added or family.mlp
        inside |= dict(self._norm("ln2_post", family.ln2_post))
        inside["hook_mlp_out"] = OutputPoint(
            f"{self.path}.{added}", is_overwritten=family.is_overwritten
        )
        for name, point in inside.items():
            yield name, self._rows(point) if family.is_flat else point

    def _neurons(self) -> Iterator[tuple[str, Point]]:
        family = self.family
        into, up, out = (
            self.at(family.mlp, name) for name in (family.mlp_in, family.mlp_up, family.mlp_out)
        )
        if into is None or out is None:  # CRATE: modules that have the hooks' names
            mlp = f"{self.path}.{family.mlp}"
            for name, _ in self.module.get_submodule(family.mlp).named_children():
                yield f"mlp.{name}", OutputPoint(f"{mlp}.{name}")
            return
        is_joint = up == into
        yield "mlp.hook_pre", OutputPoint(into, Half(0) if is_joint else None)
        if up is not None:
            yield "mlp.hook_pre_linear", OutputPoint(up, Half(1) if is_joint else None)
        yield "mlp.hook_post", InputPoint(out)
        if up is not None:
            yield "mlp.hook_post_neg", InputPoint(out, Negative())

    def _rows(self, point: Point) -> Point:
        return RowsPoint(point, self.path)
