"""A Hugging Face model with named hooks as a TransformerLens `HookedRootModule`.

The network itself runs; TransformerLens' hook points are attached to it only where somebody put a
hook on them. So `run_with_cache`, `run_with_hooks`, `ActivationCache` and sae-lens' evaluation
work on CRATE and GPT-2, and on every family that `families` lists. In CRATE there is no skip
around ISTA, so `ActivationCache`'s decompositions of the stream do not sum to it.
Importing this module does not import TransformerLens; `to_hooked` does, for some seconds.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lmmono.errors import ModelError
from lmmono.models.families import points
from lmmono.models.hooks import attached, bare
from lmmono.models.points import NormPoint

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
        raise ModelError(
            f"{type(network).__name__} is in no family with TransformerLens names; use"
            " lmmono.models.hooks with module paths"
        )
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
            self.get_submodule(parent).add_module(leaf, HookPoint())
        root: Any = self
        root.setup()
        # last, because setup() renames every module it finds, and the network is not ours
        self.network = network

    def forward(
        self,
        tokens: Int[Tensor, "*batch pos"] | str | Sequence[str],
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,  # noqa: ARG002  # the caller's tokens are taken as given
        stop_at_layer: int | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """Run, as `HookedTransformer.forward` does.

        Args:
            tokens: Token ids, or text where there is a tokenizer.
            return_type: "logits", "loss", "both" (a pair), or None.
            loss_per_token: Give the loss as [batch, pos - 1] instead of its mean.
            prepend_bos: Accepted and not used.
            stop_at_layer: Return the stream before this block instead; negative counts from the
                end.
            attention_mask: 1 for tokens, 0 for padding.
        """
        ids = self.to_tokens(tokens)
        hooked: Any = self
        active = {
            name: _through(point) for name, point in hooked.hook_dict.items() if point.has_hooks()
        }
        if stop_at_layer is not None:
            return self._stream(ids, stop_at_layer, active, attention_mask)
        with attached(self.network, active):
            logits = self.network(ids, attention_mask=attention_mask).logits
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        loss = token_losses(logits, ids)
        loss = loss if loss_per_token else loss.mean()
        return loss if return_type == "loss" else (logits, loss)

    def _stream(self, ids: Tensor, layer: int, active: Any, mask: Tensor | None) -> Tensor:
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
                self.network(ids, attention_mask=mask)
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
        from transformer_lens import ActivationCache

        root: Any = super()
        out, found = root.run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, found
        hooked: Any = self
        return out, ActivationCache(found, hooked, has_batch_dim=not remove_batch_dim)

    def to_tokens(
        self,
        text: Tensor | str | Sequence[str],
        prepend_bos: bool | None = None,  # noqa: ARG002  # no lmmono corpus starts with a BOS
    ) -> Int[Tensor, "batch pos"]:
        """Return token ids [batch, pos] on the model's device.

        Raises:
            ModelError: Text without a tokenizer, or texts of several lengths.
        """
        if isinstance(text, Tensor):
            ids = text if text.ndim == 2 else text.unsqueeze(0)
            return ids.to(self.network.device)
        if self.tokenizer is None:
            raise ModelError("text needs a tokenizer: to_hooked(model, tokenizer)")
        rows = [self.tokenizer.encode(t) for t in ([text] if isinstance(text, str) else text)]
        if len({len(row) for row in rows}) > 1:
            raise ModelError("texts of several lengths: pass padded ids and an attention_mask")
        return torch.tensor(rows, dtype=torch.long, device=self.network.device)

    def to_single_token(self, text: str) -> int:
        """Return the id of a text that is one token.

        Raises:
            ModelError: It is not one token.
        """
        ids = self.to_tokens(text)[0].tolist()
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
        """Bias of the unembedding: zero, none of the families has one."""
        return self.W_U.new_zeros(self.cfg.d_vocab)


class _Norm(nn.Module):
    """Hook points of a norm, callable as the network's own."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        point = points(network)[f"{name}.hook_normalized"]
        assert isinstance(point, NormPoint)
        # in a tuple, so that the network's modules do not become ours
        self._source = (network.get_submodule(point.path),)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Norm any vector; no hook runs."""
        return self._source[0].forward(x)


class _Block(nn.Module):
    """Holds a block's hook points, and its weights in TransformerLens' shapes."""

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        self.ln1 = _Norm(network, f"blocks.{index}.ln1")
        self.ln2 = _Norm(network, f"blocks.{index}.ln2")
        self.attn = _Attention(network, index)
        self.mlp = _Mlp(network, index)


class _Attention(nn.Module):
    """Hook points of attention, and its output weights."""

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        self._source = (network, index)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights per head; CRATE and GPT-2."""
        network, index = self._source
        if network.config.model_type == "gpt2":
            weight = network.transformer.h[index].attn.c_proj.weight
        else:
            weight = network.model.blocks[index].attn.o_proj.weight.T
        return weight.unflatten(0, (network.config.num_attention_heads, -1))


class _Mlp(nn.Module):
    """Hook points of the neurons, and their weights."""

    def __init__(self, network: Any, index: int) -> None:
        super().__init__()
        self._source = (network, index)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights; in CRATE the transposed dictionary."""
        network, index = self._source
        if network.config.model_type == "gpt2":
            return network.transformer.h[index].mlp.c_fc.weight
        return network.model.blocks[index].mlp.dictionary.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights; in CRATE the decoding dictionary."""
        network, index = self._source
        if network.config.model_type == "gpt2":
            return network.transformer.h[index].mlp.c_proj.weight
        ista = network.model.blocks[index].mlp
        return ista.dictionary if ista.decoder is None else ista.decoder


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

    ours = network.config
    d_head = getattr(ours, "head_dim", None) or ours.hidden_size // ours.num_attention_heads
    is_gpt2 = ours.model_type == "gpt2"
    d_mlp = (ours.n_inner or 4 * ours.hidden_size) if is_gpt2 else None
    return HookedTransformerConfig(
        n_layers=ours.num_hidden_layers,
        d_model=ours.hidden_size,
        n_ctx=ours.max_position_embeddings,
        d_head=d_head,
        n_heads=ours.num_attention_heads,
        d_mlp=d_mlp or getattr(ours, "d_mlp", None) or ours.intermediate_size,
        d_vocab=ours.vocab_size,
        act_fn=ours.activation_function if is_gpt2 else getattr(ours, "hidden_act", "relu"),
        model_name=ours.model_type,
        original_architecture=type(network).__name__,
        normalization_type="RMS" if hasattr(ours, "rms_norm_eps") else "LN",
        device=str(network.device),
        tokenizer_name=getattr(tokenizer, "name_or_path", None),
        default_prepend_bos=False,
    )
