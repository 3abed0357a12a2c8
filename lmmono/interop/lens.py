"""A Hugging Face model with named hooks as a TransformerLens `HookedRootModule`.

The network itself runs; TransformerLens' hook points are attached to it only where somebody put a
hook on them. So `run_with_cache`, `run_with_hooks`, `ActivationCache` and sae-lens' evaluation
work on CRATE and GPT-2, and on every family that `families` lists. In CRATE there is no skip
around ISTA: every block replaces the stream, so its cache refuses to decompose it.
Importing this module does not import TransformerLens; `to_hooked` does, for some seconds.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lmmono.errors import ModelError
from lmmono.models.families import (
    Family,
    decoder_path,
    family_of,
    no_names,
    points,
    text_config,
)
from lmmono.models.hooks import attached, bare, token_inputs
from lmmono.models.points import NormPoint, RowsPoint

NO_LIMIT = 2**31 - 1
"""Context of a model that has none."""

ReturnType = Literal["logits", "loss", "both"]


def to_hooked(model: nn.Module, tokenizer: Any = None) -> Any:
    """Return the model as a TransformerLens `HookedRootModule`, sharing its weights.

    Args:
        model: CRATE, GPT-2 or another decoder of `families`; wrappers are taken off.
        tokenizer: Needed where text is given instead of token ids.

    Raises:
        ModelError: The model is of no known family.
    """
    network = bare(model)
    if not points(network):
        raise ModelError(f"{no_names(network)}; use lmmono.models.hooks with module paths")
    return _hooked_class()(network, tokenizer or getattr(network, "tokenizer", None))


@cache
def _hooked_class() -> type:
    from transformer_lens import HookedRootModule

    return type("HookedNetwork", (_Hooked, HookedRootModule), {"__doc__": _Hooked.__doc__})


class _Stop(Exception):
    """Carries the stream out of a forward pass that needs to go no further."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class _Hooked(nn.Module):
    """A network with TransformerLens' hook points, configuration and weight names."""

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        from transformer_lens.hook_points import HookPoint

        self.tokenizer = tokenizer
        self.cfg = _config(network, tokenizer)
        self.blocks = nn.ModuleList(_Block(network, i) for i in range(self.cfg.n_layers))
        self.ln_final = _Norm(network, "ln_final")
        for name in points(network):
            parent, _, leaf = name.rpartition(".")
            _made(self, parent).add_module(leaf, HookPoint())
        root: Any = self
        root.setup()
        # last, because setup() renames every module it finds, and the network is not ours
        self.network = network

    def forward(
        self,
        tokens: Int[Tensor, "*batch pos"] | str | Sequence[str],
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        stop_at_layer: int | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """Run, as `HookedTransformer.forward` does.

        Args:
            tokens: Token ids, or text where there is a tokenizer.
            return_type: "logits", "loss", "both" (a pair), or None.
            loss_per_token: Give the loss as [batch, pos - 1] instead of its mean.
            prepend_bos: As in `to_tokens`, for text.
            stop_at_layer: Return the stream before this block instead; negative counts from the
                end.
            attention_mask: 1 for tokens, 0 for padding, on either side: tokens get the logits that
                they have without it, and the loss is theirs alone (0 per token elsewhere).
        """
        ids = self.to_tokens(tokens, prepend_bos)
        is_token = None if attention_mask is None else attention_mask.to(ids.device).bool()
        inputs = token_inputs(self.network, ids, is_token)
        hooked: Any = self
        active = {
            name: _through(point) for name, point in hooked.hook_dict.items() if point.has_hooks()
        }
        if stop_at_layer is not None:
            return self._stream(inputs, stop_at_layer, active)
        with attached(self.network, active):
            logits = self.network(**inputs).logits
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        loss = token_losses(logits, ids)
        n_predicted = loss.numel()
        if is_token is not None:  # predicted at a token, and itself a token
            is_predicted = is_token[:, :-1] & is_token[:, 1:]
            loss, n_predicted = torch.where(is_predicted, loss, 0.0), int(is_predicted.sum())
        loss = loss if loss_per_token else loss.sum() / n_predicted
        return loss if return_type == "loss" else (logits, loss)

    def _stream(self, inputs: dict[str, Tensor], layer: int, active: Any) -> Tensor:
        n_layers = self.cfg.n_layers
        layer = layer + n_layers if layer < 0 else layer

        def stop(stream: Tensor) -> None:
            raise _Stop(stream)

        # before the hooks of the block that is not run, after those of the last one that is
        is_last = layer >= n_layers
        place = f"blocks.{n_layers - 1}.hook_resid_post" if is_last else ""
        first = {} if is_last else {f"blocks.{layer}.hook_resid_pre": stop}
        try:
            with (
                attached(self.network, first),
                attached(self.network, active),
                attached(self.network, {place: stop} if is_last else {}),
            ):
                self.network(**inputs)
        except _Stop as reached:
            return reached.stream
        raise AssertionError("the stream of a block was never reached")

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and return the output with TransformerLens' `ActivationCache`, or with a dict."""
        root: Any = super()
        out, acts = root.run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, acts
        return out, _cache_class()(acts, self, has_batch_dim=not remove_batch_dim)

    def to_tokens(
        self,
        text: Tensor | str | Sequence[str],
        prepend_bos: bool | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Return token ids [batch, pos] on the model's device.

        Args:
            text: Text, texts of one length, or token ids, which stay as they are.
            prepend_bos: True puts the tokenizer's BOS first and False leaves it out, with no other
                token added to the text; None does what the tokenizer does by itself, as Llama's
                adds one and those of lmmono's corpora do not.

        Raises:
            ModelError: Text without a tokenizer, texts of several lengths, or no BOS to put first.
        """
        if isinstance(text, Tensor):
            ids = text if text.ndim == 2 else text.unsqueeze(0)
            return ids.to(self.network.device)
        if self.tokenizer is None:
            raise ModelError("text needs a tokenizer: to_hooked(model, tokenizer)")
        bos: list[int] = []
        if prepend_bos:
            if getattr(self.tokenizer, "bos_token_id", None) is None:
                raise ModelError("prepend_bos=True: this tokenizer has no BOS; leave it out")
            bos = [self.tokenizer.bos_token_id]
        # other objects with `encode`, such as those of `tokenizers`, are taken to add nothing
        adds = isinstance(self.tokenizer, PreTrainedTokenizerBase) and prepend_bos is not None
        options: dict[str, Any] = {"add_special_tokens": False} if adds else {}
        texts = [text] if isinstance(text, str) else text
        rows = [bos + list(self.tokenizer.encode(one_text, **options)) for one_text in texts]
        if len({len(row) for row in rows}) > 1:
            raise ModelError("texts of several lengths: pass padded ids and an attention_mask")
        return torch.tensor(rows, dtype=torch.long, device=self.network.device)

    def to_single_token(self, text: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ModelError: It is not one token.
        """
        ids = self.to_tokens(text, prepend_bos=False)[0].tolist()
        if len(ids) != 1:
            raise ModelError(f"{text!r} is {len(ids)} tokens, want one")
        return ids[0]

    def tokens_to_residual_directions(
        self, tokens: int | str | Int[Tensor, "*pos"]
    ) -> Float[Tensor, "*pos d_model"]:
        """Return the unembedding direction of each token; a string must be one token."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[ids]

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding."""
        return self.network.get_input_embeddings().weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding."""
        return self.network.get_output_embeddings().weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Bias of the unembedding; zeros where there is none."""
        return _bias(self.network.get_output_embeddings())

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the output biases before a layer, as `HookedTransformer` does.

        Args:
            layer: Blocks before this one; n_layers takes all.
            mlp_input: Also the attention's of this block.
            include_mlp_biases: Off where MLP outputs, which hold theirs, are added whole.
        """
        total = self.W_U.new_zeros(self.cfg.d_model)
        blocks: Any = list(self.blocks)
        for block in blocks[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases:
                total = total + block.mlp.b_out
        return total + blocks[layer].attn.b_O if mlp_input else total


class _Norm(nn.Module):
    """Hook points of a norm, callable as the network's own."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        point = points(network)[f"{name}.hook_normalized"]
        point = point.point if isinstance(point, RowsPoint) else point
        assert isinstance(point, NormPoint)
        # in a tuple, so that the network's modules do not become ours
        self._source = (network.get_submodule(point.path),)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Norm any vector; no hook runs."""
        return self._source[0].forward(x)


def _made(root: nn.Module, path: str) -> nn.Module:
    """Return a submodule, which is put there where there is none."""
    module = root
    for name in filter(None, path.split(".")):
        if not isinstance(getattr(module, name, None), nn.Module):
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


class _Block(nn.Module):
    """Holds a block's hook points, and its weights in TransformerLens' shapes."""

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        names = points(network)
        for norm in ("ln1", "ln2", "ln1_post", "ln2_post"):
            name = f"blocks.{index}.{norm}"
            if f"{name}.hook_normalized" in names:
                self.add_module(norm, _Norm(network, name))
        if _family(network).attn:
            self.attn = _Attention(network, index)
            self.mlp = _Mlp(network, index)


class _Attention(nn.Module):
    """Hook points of attention, and its output weights."""

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        family = _family(network)
        # in a tuple, so that the network's modules do not become ours
        self._source = (_block_module(network, index, f"{family.attn}.{family.o_proj}"),)
        self._n_heads = text_config(network).num_attention_heads

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights per head."""
        return _weight(self._source[0]).unflatten(0, (self._n_heads, -1))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where there is none."""
        return _bias(self._source[0])


class _Mlp(nn.Module):
    """Hook points of the neurons, and their weights in TransformerLens' names.

    In CRATE `W_in` is the transposed dictionary and `W_out` the decoding one; of a gated MLP
    `W_gate` goes before the activation function and `W_in` is the linear half.
    """

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        family = _family(network)
        mlp = _block_module(network, index, family.mlp)
        self._ista = (mlp,) if hasattr(mlp, "dictionary") else None
        self._source: tuple[Any, ...] = ()
        # of experts there is a stack, which has no name in TransformerLens
        if self._ista or not family.mlp_in or not hasattr(mlp, family.mlp_in):
            return
        paths = (family.mlp_in, family.mlp_up or family.mlp_in, family.mlp_out or "")
        self._source = tuple(mlp.get_submodule(path) for path in paths)
        self._is_gated = family.mlp_up is not None
        self._is_joint = family.mlp_up == family.mlp_in

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights."""
        if self._ista:
            return self._ista[0].dictionary.T
        weight = _weight(self._dense()[1])
        return weight.chunk(2, 1)[1] if self._is_joint else weight

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """Gate weights of a gated MLP, else None."""
        if self._ista or not self._source or not self._is_gated:
            return None
        weight = _weight(self._source[0])
        return weight.chunk(2, 1)[0] if self._is_joint else weight

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights."""
        if not self._ista:
            return _weight(self._dense()[2])
        ista = self._ista[0]
        return ista.dictionary if ista.decoder is None else ista.decoder

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where there is none, as in CRATE."""
        if self._ista:
            bias = self._ista[0].b_out
            return self.W_out.new_zeros(self.W_out.shape[1]) if bias is None else bias
        return _bias(self._dense()[2])

    def _dense(self) -> tuple[Any, ...]:
        if not self._source:
            raise ModelError(
                "W_in, W_out, b_out: experts have a stack of weights each; read them from the "
                "network's own modules"
            )
        return self._source


def _family(network: Any) -> Family:
    family = family_of(network)
    assert family is not None, type(network)
    return family


def _block_module(network: Any, index: int, path: str) -> Any:
    parts = (f"{decoder_path(network)}{_family(network).blocks}.{index}", path)
    return network.get_submodule(".".join(filter(None, parts)))


def _weight(module: Any) -> Float[Tensor, "d_from d_to"]:
    """Return a projection's weight as [in, out]: GPT-2's Conv1D keeps it so, Linear turned."""
    return module.weight.T if isinstance(module, nn.Linear) else module.weight


def _bias(module: Any) -> Float[Tensor, " d_to"]:
    bias = getattr(module, "bias", None)
    return _weight(module).new_zeros(_weight(module).shape[1]) if bias is None else bias


@cache
def _cache_class() -> type:
    """Return TransformerLens' `ActivationCache`, refusing what would mean nothing of a network."""
    from transformer_lens import ActivationCache

    def refusing(name: str, reason: Callable[[Any], str | None]) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if text := reason(self.model.network):
                raise ModelError(f"{name}: {text}")
            return getattr(super(HookedCache, self), name)(*args, **kwargs)

        method.__doc__ = f"As `ActivationCache.{name}`; raises ModelError where it means nothing."
        return method

    class HookedCache(ActivationCache):
        """TransformerLens' cache of a run of the bridge."""

    for name in ("decompose_resid", "get_full_resid_decomposition", "logit_attrs"):
        setattr(HookedCache, name, refusing(name, _replaces_stream))
    for name in ("stack_neuron_results", "get_neuron_results"):
        setattr(HookedCache, name, refusing(name, _no_neuron_results))
    HookedCache.stack_head_results = refusing("stack_head_results", _norms_outputs)
    return HookedCache


def _replaces_stream(network: Any) -> str | None:
    """Say why parts of this network's stream do not add up to it, if they do not."""
    config = network.config
    if _family(network).mixer:
        return (
            f"{config.model_type} has neither attention nor MLPs; its stream is hook_embed and the "
            "hook_mixer_out of every block"
        )
    if config.model_type == "crate" and not config.ista_skip:
        return (
            "in CRATE without ista_skip every block replaces the stream, so embeddings, attention "
            "and earlier neurons are no parts of it and these numbers would mean nothing. Exact "
            "here: accumulated_resid (the stream at every layer), stack_head_results (the parts of "
            f"one block's attn_out), and get_neuron_results({config.num_hidden_layers - 1}), the "
            "parts of the last stream; for causes take hooks (run_with_hooks) or lm.Edit"
        )
    return None


def _norms_outputs(network: Any) -> str | None:
    """Say why heads and neurons are no parts of what goes to the stream, if they are not."""
    family, kind = _family(network), text_config(network).model_type
    if family.ln1_post or family.ln2_post:
        return (
            f"in {kind} a norm stands between attention or MLP and the stream, so heads and neurons"
            " do not add up to what is added to it; take hook_attn_out and hook_mlp_out, which "
            "decompose_resid stacks"
        )
    return _replaces_stream(network) if family.mixer else None


def _no_neuron_results(network: Any) -> str | None:
    if any(name.endswith("hook_expert_weights") for name in points(network)):
        return (
            f"in {text_config(network).model_type} each expert has weights of its own, so there is "
            "no W_out that neurons are parts by; take hook_mlp_out"
        )
    return _norms_outputs(network)


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_but_one"]:
    """Return the next-token cross-entropy in nats at every position but the last."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1)


def _through(point: Any) -> Any:
    """Return a watch that passes a tensor through a hook point and replaces it if changed."""

    def watch(tensor: Tensor) -> Tensor | None:
        new = point(tensor)
        return None if new is tensor else new

    return watch


def _config(network: Any, tokenizer: Any) -> Any:
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    ours = text_config(network)
    # a state space model has no heads, and some name the rest in their own way
    n_heads = getattr(ours, "num_attention_heads", 1)
    d_head = getattr(ours, "head_dim", None) or ours.hidden_size // n_heads
    d_mlp = _first(ours, "d_mlp", "n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
    act_fn = _first(ours, "activation_function", "hidden_act", "hidden_activation", "activation")
    bos = getattr(tokenizer, "bos_token_id", None)
    return HookedTransformerConfig(
        n_layers=ours.num_hidden_layers,
        d_model=ours.hidden_size,
        n_ctx=_first(ours, "max_position_embeddings", "seq_length") or NO_LIMIT,
        d_head=d_head,
        n_heads=n_heads,
        d_mlp=d_mlp or 4 * ours.hidden_size,
        d_vocab=ours.vocab_size,
        act_fn=act_fn or "relu",
        model_name=ours.model_type,
        original_architecture=type(network).__name__,
        normalization_type="RMS" if hasattr(ours, "rms_norm_eps") else "LN",
        device=str(network.device),
        tokenizer_name=getattr(tokenizer, "name_or_path", None),
        # whether it puts its BOS before every text by itself
        default_prepend_bos=bos is not None and list(tokenizer.encode("a"))[:1] == [bos],
    )


def _first(config: Any, *names: str) -> Any:
    """Return the first of several settings that there is, else None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)
