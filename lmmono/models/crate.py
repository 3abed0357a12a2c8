"""The CRATE language model (arXiv 2410.16443) as a Hugging Face model, in one file.

Holds the configuration, the network and the mapping from released weights. Block l is

    Z' = Z + MSSA(LN1(Z));  Z = ISTA(LN2(Z'))

with no skip around ISTA, so the stream after a block is what its code decodes to and nothing else:
`hook_resid_post` equals `hook_mlp_out`. Shapes are [batch, pos, d_model]; a dictionary is stored
as rows, W_D [d_mlp, d_model], the transpose of the paper's D. Refuses flash-attention, which has
not been tested here.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    PreTrainedModel,
    slice_logits_to_keep,
)
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from lmmono.errors import ModelError
from lmmono.models.weights import count_blocks, fill

RELEASED_NAMES = {
    "transformer.wte.": "model.embed.",
    "transformer.wpe.": "model.pos_embed.",
    "transformer.ln_f.": "model.ln_final.",
    "transformer.h.": "model.blocks.",
    ".prenorm_": ".ln",
    ".attn.c_attn.": ".attn.u_proj.",
    ".attn.c_proj.": ".attn.o_proj.",
    ".ista.weight": ".mlp.dictionary",
}
"""Parts of the released code's weight names, and ours."""


class CrateConfig(PreTrainedConfig):
    """Sizes and options of a CRATE model; the defaults are the released 12-layer model.

    Stored under Hugging Face's names; lmmono's (`d_model`, `n_layers`, ...) are aliases.
    """

    model_type = "crate"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
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
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"d_model {self.hidden_size} cannot be split over {self.num_attention_heads} heads;"
                " choose n_heads that divides d_model"
            )
        if isinstance(self.step_size, str) and self.step_size != "lipschitz":
            raise ModelError(f"step_size: want a number or 'lipschitz', got {self.step_size!r}")
        if self.n_ista_steps < 1:
            raise ModelError(f"n_ista_steps: want an integer >= 1, got {self.n_ista_steps}")

    @property
    def d_mlp(self) -> int:
        """Number of neurons per layer, the size of its dictionary."""
        return self.overcompleteness * self.hidden_size


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
        self.d_head = config.hidden_size // config.num_attention_heads
        self.scaling = self.d_head**-0.5
        self.u_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            if config.separate_query
            else None
        )
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """Return the attention output, and the pattern where the implementation is `eager`."""
        heads = (*x.shape[:-1], -1, self.d_head)
        u = self.u_proj(x).view(heads).transpose(1, 2)
        q = u if self.q_proj is None else self.q_proj(x).view(heads).transpose(1, 2)
        if past_key_values is not None:
            # values of width 0: any cache class then stores the one shared tensor and no more
            u, _ = past_key_values.update(u, u[..., :0], self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        z, pattern = attend(self, q, u, u, attention_mask, dropout=0.0, scaling=self.scaling)
        return self.o_proj(z.flatten(-2)), pattern


class CrateIsta(nn.Module):
    """Sparse coding by a few proximal gradient steps, then decoding: the layer's neurons.

    From A = 0, each step is A <- ReLU(A + step_size (x - A W_D) W_D^T - threshold), which descends
    1/2 |x - A W_D|^2 + sparsity |A|_1 over A >= 0 where step_size < 1/sigma_max(W_D)^2. Output is
    A W_D. Two steps cost four dictionary products; the released code's fifth repeats x W_D^T.
    """

    def __init__(self, config: CrateConfig) -> None:
        super().__init__()
        d_mlp, d_model = config.d_mlp, config.hidden_size
        self.n_steps = config.n_ista_steps
        self.sparsity = config.sparsity
        self.dictionary = nn.Parameter(torch.empty(d_mlp, d_model))
        self.decoder = nn.Parameter(torch.empty(d_mlp, d_model)) if config.untied_decoder else None
        self.threshold = nn.Parameter(torch.empty(d_mlp)) if config.learned_threshold else None
        self.step_size: float | Tensor
        self.lipschitz = isinstance(config.step_size, str)
        if isinstance(config.step_size, str):
            self.register_buffer("step_size", torch.empty(()))
            self.register_buffer("top_direction", torch.empty(d_model))
        else:
            self.step_size = config.step_size
        for step in range(self.n_steps - 1):
            self.add_module(f"hook_code_{step}", nn.Identity())
        self.hook_pre = nn.Identity()
        self.hook_post = nn.Identity()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Encode and decode."""
        return self.decode(self.encode(x))

    def encode(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_mlp"]:
        """Return the non-negative code after the last step."""
        # the step is folded into the narrow side of each product, the threshold into its bias
        target, bias = x * self.step_size, -self._threshold()
        pre = F.linear(target, self.dictionary, bias)
        for step in range(self.n_steps - 1):
            code = self.get_submodule(f"hook_code_{step}")(F.relu(pre))
            residual = target - (code @ self.dictionary) * self.step_size
            pre = F.linear(residual, self.dictionary, bias) + code
        return self.hook_post(F.relu(self.hook_pre(pre)))

    def decode(self, code: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the sum of dictionary rows weighted by the code."""
        return code @ (self.dictionary if self.decoder is None else self.decoder)

    def _threshold(self) -> Float[Tensor, " d_mlp"]:
        if self.threshold is not None:
            return self.threshold
        fixed = self.step_size * self.sparsity
        if isinstance(fixed, Tensor):
            return fixed.to(self.dictionary.dtype).expand(self.dictionary.shape[0])
        return self.dictionary.new_full((self.dictionary.shape[0],), fixed)

    @torch.no_grad()
    def refresh_step_size(self, n_iterations: int = 1) -> None:
        """Advance the power iteration and set step_size to 1/sigma_max(W_D)^2; no random numbers.

        One iteration per training step follows a slowly moving dictionary. The step is a constant
        to the gradient, and both buffers are saved with the weights.
        """
        assert isinstance(self.step_size, Tensor)
        direction = self.top_direction.float()
        with torch.autocast(direction.device.type, enabled=False):
            dictionary = self.dictionary.float()
            for _ in range(n_iterations):
                image = dictionary.T @ (dictionary @ direction)
                sigma_squared = torch.linalg.vector_norm(image)
                direction = image / sigma_squared
        self.top_direction.copy_(direction)
        self.step_size.copy_(1.0 / sigma_squared)


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
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream after the block."""
        attn_out, _ = self.attn(self.ln1(x), attention_mask, past_key_values)
        x = x + attn_out
        mlp_out = self.mlp(self.ln2(x))
        return x + mlp_out if self.ista_skip else mlp_out


class CratePreTrainedModel(PreTrainedModel):
    """What every CRATE head shares: the configuration class, the initialisation, the abilities."""

    config: CrateConfig
    config_class = CrateConfig
    base_model_prefix = "model"
    _input_embed_layer = "embed"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["CrateBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": CrateBlock,
        "attentions": OutputRecorder(CrateMssa, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as released: N(0, 0.02^2), MSSA's output smaller, W_D Kaiming-uniform."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CrateMssa):
            n_residuals = 2 * self.config.num_hidden_layers
            init.normal_(module.o_proj.weight, std=std / math.sqrt(n_residuals))
        elif isinstance(module, CrateIsta):
            self._init_ista(module)

    def _init_ista(self, ista: CrateIsta) -> None:
        init.kaiming_uniform_(ista.dictionary)
        if ista.decoder is not None:
            init.copy_(ista.decoder, ista.dictionary)
        if isinstance(ista.step_size, Tensor) and not getattr(
            ista.step_size, "_is_hf_initialized", False
        ):
            init.constant_(ista.top_direction, ista.top_direction.numel() ** -0.5)
            ista.refresh_step_size(n_iterations=100)
        if ista.threshold is not None:
            init.constant_(ista.threshold, float(ista.step_size) * ista.sparsity)


class CrateModel(CratePreTrainedModel):
    """Embeddings, blocks and the final norm; the stream without a head."""

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(CrateBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_final = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
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
        **kwargs: Any,  # noqa: ARG002  # flags that `capture_outputs` reads
    ) -> BaseModelOutputWithPast:
        """Return the normed stream; without `position_ids`, padding takes no positions.

        The cache is made only when asked (`generate` asks), so training never pays for it.

        Raises:
            ModelError: Neither or both of `input_ids` and `inputs_embeds`, or a row longer than
                the positional table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("want exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self._positions(x, attention_mask, past_key_values)
        x = x + self.pos_embed(position_ids)
        self._refresh_step_sizes()
        for block in self.blocks:
            x = block(x, mask, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_final(x),
            past_key_values=past_key_values if use_cache else None,
        )

    def _positions(
        self, x: Tensor, attention_mask: Tensor | None, past: Cache | None
    ) -> Int[Tensor, "batch_or_one pos"]:
        n_pos, n_ctx = x.shape[1], self.config.max_position_embeddings
        n_past = 0 if past is None else past.get_seq_length()
        if isinstance(n_past, int) and n_past + n_pos > n_ctx:
            raise ModelError(
                f"{n_past + n_pos} tokens do not fit the model's {n_ctx} positions; cut the text "
                "or train with a larger data.n_ctx"
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n_pos:]
        return (torch.arange(n_pos, device=x.device) + n_past).unsqueeze(0)

    def _refresh_step_sizes(self) -> None:
        # here and not in the block: a checkpointed block runs twice and must see one step size
        if self.training and self.config.step_size == "lipschitz":
            for block in self.blocks:
                block.mlp.refresh_step_size()


class CrateForCausalLM(CratePreTrainedModel, GenerationMixin):
    """CRATE with a language-modelling head tied to the token embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed.weight"}

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.model = CrateModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [batch, pos, d_vocab], and the mean next-token loss in nats with `labels`.

        `labels` are shifted here (pass `input_ids`), -100 is ignored; `shift_labels` takes targets
        that are shifted already.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def dictionaries(self) -> list[Float[Tensor, "d_mlp d_model"]]:
        """Return each layer's encoding dictionary W_D, the parameter itself."""
        return [block.mlp.dictionary for block in self.model.blocks]

    def step_sizes(self) -> list[float]:
        """Return each layer's ISTA step (eta)."""
        return [float(block.mlp.step_size) for block in self.model.blocks]


def from_released(state_dict: Mapping[str, Tensor], *, n_heads: int) -> CrateForCausalLM:
    """Build the model whose weights carry the released code's names (crate-lm, `ista.weight`).

    `n_heads` cannot be read off the weights. Step size and sparsity are the released constants.

    Raises:
        ModelError: A weight is missing, unknown or of another shape.
    """
    d_vocab, d_model = state_dict["transformer.wte.weight"].shape
    config = CrateConfig(
        vocab_size=d_vocab,
        max_position_embeddings=state_dict["transformer.wpe.weight"].shape[0],
        hidden_size=d_model,
        num_hidden_layers=count_blocks(state_dict, "transformer.h."),
        num_attention_heads=n_heads,
        overcompleteness=state_dict["transformer.h.0.ista.weight"].shape[0] // d_model,
    )
    model = CrateForCausalLM(config)
    return fill(model, state_dict, RELEASED_NAMES)


AutoConfig.register(CrateConfig.model_type, CrateConfig, exist_ok=True)
AutoModel.register(CrateConfig, CrateModel, exist_ok=True)
AutoModelForCausalLM.register(CrateConfig, CrateForCausalLM, exist_ok=True)
