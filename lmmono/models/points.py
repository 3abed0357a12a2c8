"""Hook points: where in a network a named tensor lives, and how to watch or replace it there.

A point attaches a function to a real module through PyTorch's own hooks, so a model without
attached points runs exactly as it would without this file. The function gets the tensor in
TransformerLens' shape and returns None to leave it, or a tensor to put in its place.
Names for whole models are in `families`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

Watch = Callable[[Tensor], Tensor | None]
"""What is attached to a point: looks at a tensor, returns its replacement or None."""


@dataclass(frozen=True, slots=True)
class Heads:
    """How heads lie in a tensor's last axis: part `part` of `n_parts`, then per head, or inside.

    `by_head` is GPT-NeoX' order [head, part, d_head]; otherwise [part, head, d_head] as GPT-2's.
    """

    d_head: int
    part: int = 0
    n_parts: int = 1
    by_head: bool = False

    def read(self, whole: Tensor) -> Tensor:
        """Return the part as [batch, pos, head, d_head], a view."""
        parts = self._split(whole)
        return parts[..., self.part, :] if self.by_head else parts[..., self.part, :, :]

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """Return a copy of `whole` with the part replaced."""
        parts = list(self._split(whole).unbind(-2 if self.by_head else -3))
        parts[self.part] = new
        return torch.stack(parts, -2 if self.by_head else -3).flatten(-3)

    def _split(self, whole: Tensor) -> Tensor:
        sizes = (-1, self.n_parts) if self.by_head else (self.n_parts, -1)
        return whole.unflatten(-1, (*sizes, self.d_head))


class Point(ABC):
    """A place where a tensor can be watched or replaced."""

    @abstractmethod
    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` and return the function that detaches it."""


@dataclass(frozen=True, slots=True)
class OutputPoint(Point):
    """What a module returns (the first element, where it returns a tuple)."""

    path: str
    heads: Heads | None = None

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the module's output."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            new = _through(watch, whole, self.heads)
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return model.get_submodule(self.path).register_forward_hook(hook).remove


@dataclass(frozen=True, slots=True)
class InputPoint(Point):
    """What a module is given as its first argument."""

    path: str
    heads: Heads | None = None

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the module's input."""

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            new = _through(watch, args[0], self.heads)
            return None if new is None else (new, *args[1:])

        return model.get_submodule(self.path).register_forward_pre_hook(hook).remove


@dataclass(frozen=True, slots=True)
class NormPoint(Point):
    """A norm's result before its weight and bias, as TransformerLens' `hook_normalized`.

    Computed again from the norm's input, and only while watched.
    """

    path: str
    gain_offset: float = 0.0
    """What the module adds to its weight (Gemma multiplies by 1 + weight)."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the norm."""

        def hook(module: Any, args: tuple[Any, ...], _output: Any) -> Any:
            new = watch(_normalized(module, args[0]))
            return None if new is None else _affine(module, new, self.gain_offset)

        return model.get_submodule(self.path).register_forward_hook(hook).remove


@dataclass(frozen=True, slots=True)
class ScalePoint(Point):
    """What a norm divides by, [batch, pos, 1], as TransformerLens' `hook_scale`."""

    path: str
    gain_offset: float = 0.0

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the norm."""

        def hook(module: Any, args: tuple[Any, ...], _output: Any) -> Any:
            x: Tensor = args[0]
            centred = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
            new = watch((centred.pow(2).mean(-1, keepdim=True) + _eps(module)).sqrt())
            return None if new is None else _affine(module, centred / new, self.gain_offset)

        return model.get_submodule(self.path).register_forward_hook(hook).remove


@dataclass(frozen=True, slots=True)
class MidPoint(Point):
    """The stream between attention and MLP: the block's input plus what attention adds.

    No module returns it; a replacement is put in by changing what attention adds.
    """

    ln1: str
    """The block's first norm: its input is the stream, whatever was done to it before."""
    added: str
    """The module whose output is added to the stream."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the sum."""
        stream: list[Tensor] = []

        def remember(x: Tensor) -> None:
            stream[:] = [x]

        def add(attn_out: Tensor) -> Tensor | None:
            before = stream.pop()
            new = watch(before + attn_out)
            return None if new is None else new - before

        with ExitStack() as handles:
            handles.callback(InputPoint(self.ln1).attach(model, remember))
            handles.callback(OutputPoint(self.added).attach(model, add))
            return handles.pop_all().close


@dataclass(frozen=True, slots=True)
class PositionPoint(Point):
    """Positional embeddings as [batch, pos, d_model], though models compute one row for all."""

    embed: str
    pos_embed: str

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the positional embedding."""
        shape: list[torch.Size] = []

        def remember(tokens: Tensor) -> None:
            shape[:] = [tokens.shape]

        def expand(positions: Tensor) -> Tensor | None:
            return watch(positions.expand(shape[0]) if shape else positions)

        with ExitStack() as handles:
            handles.callback(OutputPoint(self.embed).attach(model, remember))
            handles.callback(OutputPoint(self.pos_embed).attach(model, expand))
            return handles.pop_all().close


@dataclass(frozen=True, slots=True)
class AttentionPoint(Point):
    """Masked attention scores or the pattern, [batch, head, query_pos, key_pos].

    Fused attention never forms them, so while one is watched the whole model attends through
    `_watched_attention`, which computes the same in the open.
    """

    path: str
    probe: str
    """`hook_attn_scores` or `hook_pattern`: a module put into the attention while watched."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` and switch the model to open attention."""
        attention: Any = model.get_submodule(self.path)
        before = attention.config._attn_implementation
        attention.config._attn_implementation = _WATCHED
        had = getattr(attention, self.probe, None)
        attention.add_module(self.probe, had or nn.Identity())

        def detach() -> None:
            remove()
            attention.config._attn_implementation = before
            if had is None:
                delattr(attention, self.probe)

        remove = OutputPoint(f"{self.path}.{self.probe}").attach(model, watch)
        return detach


def _through(watch: Watch, whole: Tensor, heads: Heads | None) -> Tensor | None:
    if heads is None:
        return watch(whole)
    new = watch(heads.read(whole))
    return None if new is None else heads.write(whole, new)


def _normalized(module: Any, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
    return F.rms_norm(x, x.shape[-1:], None, _eps(module))


def _eps(module: Any) -> float:
    return getattr(module, "variance_epsilon", None) or module.eps


def _affine(module: Any, normalized: Tensor, gain_offset: float) -> Tensor:
    scaled = normalized * (module.weight + gain_offset)
    return scaled if getattr(module, "bias", None) is None else scaled + module.bias


_WATCHED = "lmmono_watched"


def _watched_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend in the open, through the probes of the modules that have them (no dropout)."""
    n_repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(n_repeats, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    scores = getattr(module, "hook_attn_scores", _same)(scores)
    # a padded query may see no key at all: an even pattern would leak, so it attends to nothing
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    pattern = scores.float().softmax(-1).masked_fill(blind, 0.0).to(query.dtype)
    pattern = getattr(module, "hook_pattern", _same)(pattern)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _watched_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(_WATCHED, _watched_attention)
AttentionMaskInterface.register(_WATCHED, _watched_mask)
