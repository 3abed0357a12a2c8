"""The CRATE language model (arXiv 2410.16443) as a Hugging Face model, in one file.

Needs torch and transformers alone: `save_pretrained` lays a copy next to the weights, and the
folder loads with `trust_remote_code=True` where lmmono is not installed. Block l is
`Z' = Z + MSSA(LN1(Z)); Z = ISTA(LN2(Z'))`
with no skip around ISTA, so the stream after a block is what its code decodes to and nothing else:
`hook_resid_post` equals `hook_mlp_out`. A dictionary is stored as rows, W_D [d_mlp, d_model], the
transpose of the paper's D. Refuses flash-attention, which has not been tested here.
"""

import math
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

try:
    from jaxtyping import Float, Int
except ImportError:  # shapes are then words
    from typing import Annotated as Float
    from typing import Annotated as Int
try:
    from lmmono.errors import ModelError
except ImportError:
    ModelError = ValueError

_OUTPUT_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}

CACHE_ARGUMENT = "cache" if "cache" in _OUTPUT_FIELDS else "past_key_values"
"""Name of a cache among transformers' arguments and outputs: 5.24 renamed `past_key_values`."""

PASSED_THROUGH = frozenset(
    # read by transformers around `forward`: what is recorded, and how the loss is taken
    ("output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch")
    + ("shift_labels", "ignore_index", "cache_position")
)
"""Arguments beyond those named that a forward pass may be given; any other is refused."""


AUTO_MAP = {
    "AutoConfig": "crate.CrateConfig",
    "AutoModel": "crate.CrateBaseModel",
    "AutoModelForCausalLM": "crate.CrateForCausalLM",
}
"""What this file holds for whom, as a saved configuration says it."""


class CrateConfig(PreTrainedConfig):
    """Sizes and options of a CRATE model; the defaults are the released 12-layer model.

    Stored under Hugging Face's names; lmmono's (`d_model`, `n_layers`, ...) are aliases.
    """

    model_type = "crate"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "d_vocab": "vocab_size",
        "n_ctx": "max_position_embeddings",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
    }

    vocab_size: int = 50304
    max_position_embeddings: int = 1024
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    overcompleteness: int = 4
    """Dictionary size over `hidden_size`: d_mlp = this x `hidden_size`."""
    n_ista_steps: int = 2
    """Proximal gradient steps from the zero code."""
    step_size: float | str = 0.1
    """Step (eta): a number, or "lipschitz" for 1/sigma_max(W_D)^2 by power iteration."""
    sparsity: float = 0.1
    """Weight of the L1 penalty (lambda)."""
    ista_skip: bool = False
    """Add the stream before LN2 to ISTA's output."""
    untied_decoder: bool = False
    """Decode with a second dictionary, which starts equal to the first."""
    separate_query: bool = False
    """Give attention its own query projection; keys and values stay one tensor."""
    learned_threshold: bool = False
    """Learn a threshold per neuron, starting at step_size x sparsity."""
    relu_mlp: bool = False
    """Put a ReLU MLP in ISTA's place, as an ablation: no iteration, encoder and decoder apart, with
    biases; the encoder starts as the dictionary does, and the decoder equal to it."""
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = False
    """Make a cache in every forward pass; `generate` makes one all the same."""
    __no_type_check__ = True  # transformers wraps __init__ to take more than the fields

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.auto_map = AUTO_MAP.copy()
        if self.hidden_size % self.num_attention_heads:
            sizes = f"d_model {self.hidden_size}, n_heads {self.num_attention_heads}"
            raise ModelError(f"{sizes}: choose n_heads that divides d_model")
        if isinstance(self.step_size, str) and self.step_size != "lipschitz":
            raise ModelError(f"step_size: want a number or 'lipschitz', got {self.step_size!r}")
        if self.n_ista_steps < 1:
            raise ModelError(f"n_ista_steps: want an integer >= 1, got {self.n_ista_steps}")

    @property
    def d_mlp(self) -> int:
        """Number of neurons per layer, the size of its dictionary."""
        return self.overcompleteness * self.hidden_size


class StreamLinear(nn.Linear):
    """A linear layer that adds to the stream, so it starts smaller the more layers there are."""


class CrateMssa(nn.Module):
    """Causal multi-head subspace self-attention: one projection U is query, key and value.

    With w = U x per head, attention is softmax(w w^T / sqrt(d_head)) w, then a free output
    projection. Because keys equal values, the cache holds one tensor per layer.
    """

    is_causal = True

    def __init__(self, config: CrateConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        d_model = config.hidden_size
        self.d_head = d_model // config.num_attention_heads
        self.u_proj = nn.Linear(d_model, d_model, bias=False)
        self.q_proj = nn.Linear(d_model, d_model, bias=False) if config.separate_query else None
        self.o_proj = StreamLinear(d_model, d_model)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """Return the attention output, and the pattern where the implementation is `eager`."""
        heads = (*x.shape[:-1], -1, self.d_head)
        u = self.u_proj(x).view(heads).transpose(1, 2)
        q = u if self.q_proj is None else self.q_proj(x).view(heads).transpose(1, 2)
        k = v = u
        if cache is not None and _holds_values(cache, self.layer_idx):
            k, v = cache.update(u, u, self.layer_idx)  # a prefix was put there, keys and values
        elif cache is not None:
            # values of width 0: any cache class then stores the one shared tensor and no more
            k, _ = cache.update(u, u[..., :0], self.layer_idx)
            v = k
        kind = cast(str, self.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
        attend = AttentionInterface().get_interface(kind, eager_attention_forward)
        z, pattern = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.d_head**-0.5)
        return self.o_proj(z.flatten(-2)), pattern


def _holds_values(cache: Cache, layer_idx: int) -> bool:
    """Say whether a layer was filled from outside, as by prefix tuning, with values of a width."""
    layers = getattr(cache, "layers", ())
    values = getattr(layers[layer_idx], "values", None) if layer_idx < len(layers) else None
    return values is not None and values.shape[-1] > 0


class CrateIsta(nn.Module):
    """Sparse coding by a few proximal gradient steps, then decoding: the layer's neurons.

    From A = 0, each step is A <- ReLU(A + step_size (x - A W_D) W_D^T - threshold), which descends
    1/2 |x - A W_D|^2 + sparsity |A|_1 over A >= 0 where step_size < 1/sigma_max(W_D)^2. Output is
    A W_D. Two steps cost four dictionary products; the released code's fifth repeats x W_D^T.
    """

    power: Tensor | None

    def __init__(self, config: CrateConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.d_mlp, config.hidden_size)
        self.dictionary = nn.Parameter(torch.empty(shape))
        has_decoder = config.untied_decoder or config.relu_mlp
        self.decoder = nn.Parameter(torch.empty(shape)) if has_decoder else None
        self.threshold = nn.Parameter(torch.empty(shape[0])) if config.learned_threshold else None
        self.b_in = nn.Parameter(torch.empty(shape[0])) if config.relu_mlp else None
        self.b_out = nn.Parameter(torch.empty(shape[1])) if config.relu_mlp else None
        # W_D^T W_D v of a power iteration; its length is sigma_max^2, and it is saved
        power = torch.empty(config.hidden_size) if config.step_size == "lipschitz" else None
        self.register_buffer("power", power)
        for step in range(0 if config.relu_mlp else config.n_ista_steps - 1):
            self.add_module(f"hook_code_{step}", nn.Identity())
        self.hook_pre, self.hook_post = nn.Identity(), nn.Identity()

    @property
    def step_size(self) -> float | Tensor:
        """Step (eta): the configured number, or 1/sigma_max(W_D)^2, a constant to the gradient."""
        if self.power is None:
            return float(self.config.step_size)
        return torch.linalg.vector_norm(self.power).reciprocal()

    @torch.no_grad()
    def follow_dictionary(self, n_iterations: int = 1) -> None:
        """Advance the power iteration, which uses no random numbers; nothing for a fixed step."""
        if self.power is None:
            return
        with torch.autocast(self.power.device.type, enabled=False):
            rows, power = self.dictionary.float(), self.power.float()
            for _ in range(n_iterations):
                power = rows.T @ (rows @ F.normalize(power, dim=0))
        self.power.copy_(power)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Encode and decode."""
        return self.decode(self.encode(x))

    def encode(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_mlp"]:
        """Return the non-negative code after the last step."""
        if self.b_in is not None:
            return self.hook_post(F.relu(self.hook_pre(F.linear(x, self.dictionary, self.b_in))))
        # the step scales the narrow side of each product, the threshold is the product's bias
        step_size, bias = self.step_size, -self.thresholds()
        target = x * step_size
        pre = F.linear(target, self.dictionary, bias)
        for step in range(self.config.n_ista_steps - 1):
            code = self.get_submodule(f"hook_code_{step}")(F.relu(pre))
            residual = target - (code @ self.dictionary) * step_size
            pre = F.linear(residual, self.dictionary, bias) + code
        return self.hook_post(F.relu(self.hook_pre(pre)))

    def decode(self, code: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the sum of dictionary rows weighted by the code."""
        decoded = code @ (self.dictionary if self.decoder is None else self.decoder)
        return decoded if self.b_out is None else decoded + self.b_out

    def thresholds(self) -> Float[Tensor, " d_mlp"]:
        """Return what each neuron's input must exceed: learned, or step_size x sparsity."""
        if self.threshold is not None:
            return self.threshold
        fixed = torch.as_tensor(self.step_size).to(self.dictionary) * self.config.sparsity
        return fixed.expand(self.config.d_mlp)


class CrateBlock(GradientCheckpointingLayer):
    """One MSSA with a residual, one ISTA without (unless `ista_skip`)."""

    def __init__(self, config: CrateConfig, layer_idx: int) -> None:
        super().__init__()
        self.ista_skip = config.ista_skip
        self.ln1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = CrateMssa(config, layer_idx)
        self.ln2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CrateIsta(config)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream after the block."""
        attn_out, _ = self.attn(self.ln1(x), attention_mask, cache)
        x = x + attn_out
        mlp_out = self.mlp(self.ln2(x))
        return x + mlp_out if self.ista_skip else mlp_out


class CratePreTrainedModel(PreTrainedModel):
    """What every CRATE head shares: the configuration class, the initialisation, the abilities."""

    config: CrateConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrateBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": CrateBlock,
        "attentions": OutputRecorder(CrateMssa, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as released: N(0, 0.02^2), MSSA's output smaller, W_D Kaiming-uniform."""
        super()._init_weights(module)
        if isinstance(module, StreamLinear):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
        elif isinstance(module, CrateIsta):
            self._init_ista(module)

    def _init_ista(self, ista: CrateIsta) -> None:
        init.kaiming_uniform_(ista.dictionary)
        if ista.decoder is not None:
            init.copy_(ista.decoder, ista.dictionary)
        if ista.power is not None and not getattr(ista.power, "_is_hf_initialized", False):
            ista.power.fill_(1.0)
            ista.follow_dictionary(n_iterations=100)
        for bias in (ista.b_in, ista.b_out):
            if bias is not None:
                init.zeros_(bias)
        if ista.threshold is not None:
            init.constant_(ista.threshold, float(ista.step_size) * self.config.sparsity)


class CrateBaseModel(CratePreTrainedModel):
    """Embeddings, blocks and the final norm; the stream without a head."""

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        blocks = (CrateBlock(config, i) for i in range(config.num_hidden_layers))
        self.blocks: Any = nn.ModuleList(blocks)
        self.ln_final = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch_or_one pos"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normed stream; without `position_ids`, padding takes no positions.

        A cache is made only when asked for, here or in the configuration (`generate` asks), so
        training never pays for it. It is taken under both its names, `cache` and `past_key_values`
        (before transformers 5.24).

        Raises:
            ModelError: Not exactly one kind of input, two caches, an argument that has no meaning
                here, or a row longer than the positional table.
        """
        # nothing is swallowed: a cache under a new name once gave wrong tokens and no error
        for name in sorted(kwargs.keys() - PASSED_THROUGH):
            if kwargs[name] is not None:
                raise ModelError(f"{type(self).__name__} takes no argument {name!r}; leave it out")
        if cache is not None and past_key_values is not None:
            raise ModelError("got cache and past_key_values, two names of one thing; pass one")
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("want exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training and any(block.gradient_checkpointing for block in self.blocks):
            cache = None  # a checkpointed block runs twice and would add its tokens twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        x = x + self.pos_embed(self._positions(x, attention_mask, cache, position_ids))
        if self.training:
            # before the blocks: a checkpointed block runs twice and must see one step size
            for block in self.blocks:
                block.mlp.follow_dictionary()
        for block in self.blocks:
            x = block(x, mask, cache)
        return BaseModelOutputWithPast(self.ln_final(x), cache if use_cache else None)

    def _positions(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        past: Cache | None,
        position_ids: Int[Tensor, "batch_or_one pos"] | None,
    ) -> Int[Tensor, "batch_or_one pos"]:
        n_pos, n_ctx = x.shape[1], self.config.max_position_embeddings
        n_past: Any = 0 if past is None else past.get_seq_length()  # a tensor in a static cache
        is_long = not isinstance(n_past, Tensor) and n_past + n_pos > n_ctx
        if is_long and position_ids is not None and not torch.compiler.is_compiling():
            is_long = int(position_ids.max()) >= n_ctx  # a long row may be packed or padded
        if is_long:
            raise ModelError(
                f"{n_past + n_pos} tokens do not fit the model's {n_ctx} positions; cut the text"
            )
        if position_ids is not None:
            return position_ids
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n_pos:]
        return (torch.arange(n_pos, device=x.device) + n_past).unsqueeze(0)


class CrateForCausalLM(CratePreTrainedModel, GenerationMixin):
    """CRATE with a language-modelling head tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.model = CrateBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.use_cache = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch_or_one pos"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [batch, pos, d_vocab], and the mean next-token loss in nats with `labels`.

        `labels` are shifted here, -100 is ignored; `shift_labels` are targets shifted already.
        """
        rest = (attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache)
        out = self.model(input_ids, *rest, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            compute: Any = self.loss_function
            loss = compute(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        extras = {name: out[name] for name in out if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **extras)

    def dictionaries(self) -> list[Float[Tensor, "d_mlp d_model"]]:
        """Return each layer's encoding dictionary W_D, the parameter itself."""
        return [block.mlp.dictionary for block in self.model.blocks]

    def step_sizes(self) -> list[float]:
        """Return each layer's ISTA step (eta)."""
        return [float(block.mlp.step_size) for block in self.model.blocks]


# what is saved brings this file along; `lmmono.models` adds the classes to the `Auto*` tables
CrateConfig.register_for_auto_class()
CrateBaseModel.register_for_auto_class()
CrateForCausalLM.register_for_auto_class("AutoModelForCausalLM")
