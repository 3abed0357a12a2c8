"""Hook points: where in a network a named tensor lives, and how to watch or replace it there.

A point attaches a function to a real module through PyTorch's own hooks, so a model without
attached points runs exactly as it would without this file. The function gets the tensor in
TransformerLens' shape and returns None to leave it, or a tensor to put in its place.
Names for whole models are in `families`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

Watch = Callable[[Tensor], Tensor | None]
"""What is attached to a point: looks at a tensor, returns its replacement or None."""


class Part(ABC):
    """Some of a tensor's last axis, which a point shows in place of the whole."""

    @abstractmethod
    def read(self, whole: Tensor) -> Tensor:
        """Return the part."""

    @abstractmethod
    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """Return a copy of `whole` with the part replaced."""


@dataclass(frozen=True, slots=True)
class Heads(Part):
    """All of the last axis as heads, or the queries, keys or values of a fused projection.

    A fused projection gives [group, slot, d_head], and the slots of a group are its queries, then
    keys, then values. GPT-2 and Phi-3 have one group (query, key, value), GPT-NeoX has a group
    per head, Falcon a group per key.
    """

    d_head: int
    part: int = 0
    """0 for queries, 1 for keys, 2 for values of a fused projection."""
    n_queries: int | None = None
    """Queries per group; None takes the whole axis."""
    n_groups: int = 1

    def read(self, whole: Tensor) -> Tensor:
        """Return the part as [batch, pos, head, d_head], a view where there is one."""
        slots = self._slots(whole)
        first, last = self._bounds(slots.shape[-2])
        return slots[..., first:last, :].flatten(-3, -2)

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """Return a copy of `whole` with the part replaced."""
        slots = self._slots(whole)
        first, last = self._bounds(slots.shape[-2])
        middle = new.unflatten(-2, (self.n_groups, -1))
        return torch.cat([slots[..., :first, :], middle, slots[..., last:, :]], -2).flatten(-3)

    def _slots(self, whole: Tensor) -> Tensor:
        return whole.unflatten(-1, (self.n_groups, -1, self.d_head))

    def _bounds(self, n_slots: int) -> tuple[int, int]:
        if self.n_queries is None:
            return 0, n_slots
        n_keys = (n_slots - self.n_queries) // 2
        edges = (0, self.n_queries, self.n_queries + n_keys, n_slots)
        return edges[self.part], edges[self.part + 1]


@dataclass(frozen=True, slots=True)
class Half(Part):
    """The first or second half of the last axis: a gate, or what it multiplies."""

    part: int

    def read(self, whole: Tensor) -> Tensor:
        """Return the half, a view."""
        return whole.chunk(2, -1)[self.part]

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """Return a copy of `whole` with the half replaced."""
        halves = list(whole.chunk(2, -1))
        halves[self.part] = new
        return torch.cat(halves, -1)


@dataclass(frozen=True, slots=True)
class Negative(Part):
    """How far each number is below 0: what rows above a threshold leave out of a signed neuron."""

    def read(self, whole: Tensor) -> Tensor:
        """Return max(-x, 0)."""
        return (-whole).clamp_min(0.0)

    def write(self, whole: Tensor, new: Tensor) -> Tensor:
        """Return max(x, 0) less the new negative half."""
        return whole.clamp_min(0.0) - new


class Point(ABC):
    """A place where a tensor can be watched or replaced."""

    @abstractmethod
    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` and return the function that detaches it."""


@dataclass(frozen=True, slots=True)
class OutputPoint(Point):
    """What a module returns (the first element, where it returns a tuple)."""

    path: str
    shown: Part | None = None
    is_overwritten: bool = False
    """The model changes it in place later, so it is given a copy and what was seen stays."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the module's output."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            new = _through(watch, whole, self.shown)
            if self.is_overwritten:
                new = (whole if new is None else new).clone()
            if new is None:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return model.get_submodule(self.path).register_forward_hook(hook).remove


@dataclass(frozen=True, slots=True)
class InputPoint(Point):
    """What a module is given as its first argument."""

    path: str
    shown: Part | None = None

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the module's input."""

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            new = _through(watch, args[0], self.shown)
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

        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            before = _normalized(module, args[0])
            new = watch(before)
            if new is None:
                return None
            # what is not changed keeps the module's own bits
            return torch.where(new == before, output, _affine(module, new, self.gain_offset))

        return model.get_submodule(self.path).register_forward_hook(hook).remove


@dataclass(frozen=True, slots=True)
class ScalePoint(Point):
    """What a norm divides by, [batch, pos, 1], as TransformerLens' `hook_scale`."""

    path: str
    gain_offset: float = 0.0

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the norm."""

        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            x: Tensor = args[0]
            centred = x - x.mean(-1, keepdim=True) if _is_centred(module) else x
            before = (centred.pow(2).mean(-1, keepdim=True) + _eps(module)).sqrt()
            new = watch(before)
            if new is None:
                return None
            changed = _affine(module, centred / new, self.gain_offset)
            return torch.where(new == before, output, changed)

        return model.get_submodule(self.path).register_forward_hook(hook).remove


@dataclass(frozen=True, slots=True)
class MidPoint(Point):
    """The stream between attention and MLP: the block's input plus what attention adds.

    No module returns it; a replacement is put in by changing what attention adds.
    """

    reader: str
    """The module that reads the stream first: what it is given, whatever was done to it before."""
    added: str
    """The module whose output is added to the stream."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the sum."""
        stream: list[Tensor] = []

        def remember(x: Tensor) -> None:
            stream[:] = [x]

        def add(attn_out: Tensor) -> Tensor | None:
            before = stream.pop()
            mid = before + attn_out
            new = watch(mid)
            # (a + b) - a is not b to the bit, so what is not changed stays
            return None if new is None else torch.where(new == mid, attn_out, new - before)

        with ExitStack() as handles:
            handles.callback(InputPoint(self.reader).attach(model, remember))
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
        return _attach_probe(model, self.path, self.probe, "_attn_implementation", watch)


@dataclass(frozen=True, slots=True)
class ExpertsPoint(Point):
    """Neurons of a mixture of experts, [batch x pos, n_experts x d_mlp], 0 where not routed.

    Unit `expert x d_mlp + index`. A replacement acts where the token is routed to the expert. Fused
    kernels keep only routed rows, in an order of their own, so while one is watched the whole model
    runs its experts through `_watched_experts`, one after the other.
    """

    path: str
    probe: str
    """`hook_pre`, `hook_pre_linear` or `hook_post`: a module put into the experts while watched."""
    shown: Part | None = None

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` and switch the model to open experts."""
        setting = "_experts_implementation"
        return _attach_probe(model, self.path, self.probe, setting, watch, self.shown)


@dataclass(frozen=True, slots=True)
class RouterPoint(Point):
    """Weights of the experts per token, [batch x pos, n_experts], 0 where not routed.

    A replacement is used as it is: an expert of weight 0 adds nothing, and one that had none before
    runs too.
    """

    path: str
    """The experts, called with tokens, indices and weights of those chosen for each."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to what the experts are given."""

        def hook(experts: Any, args: tuple[Any, ...]) -> Any:
            hidden, index, weights = args
            dense = weights.new_zeros(len(hidden), experts.num_experts)
            new = watch(dense.scatter(1, index, weights))
            if new is None:
                return None
            further = new.scatter(1, index, 0.0)
            n_further = int((further != 0).sum(1).max())
            if n_further:
                index = torch.cat([index, further.abs().topk(n_further).indices], 1)
            kept = new.gather(1, index[:, : weights.shape[1]])
            added = further.gather(1, index[:, weights.shape[1] :])
            return hidden, index, torch.cat([kept, added], 1)

        return model.get_submodule(self.path).register_forward_pre_hook(hook).remove


@dataclass(frozen=True, slots=True)
class RowsPoint(Point):
    """A point inside modules that see a batch as one row of tokens, as [batch, pos, d]."""

    point: Point
    block: str
    """The block around it: its input says how many rows there are."""

    def attach(self, model: nn.Module, watch: Watch) -> Callable[[], None]:
        """Attach `watch` to the point."""
        shape: list[torch.Size] = []

        def remember(stream: Tensor) -> None:
            shape[:] = [stream.shape[:2]]

        def reshaped(tokens: Tensor) -> Tensor | None:
            new = watch(tokens.unflatten(0, shape[0]))
            return None if new is None else new.flatten(0, 1)

        with ExitStack() as handles:
            handles.callback(InputPoint(self.block).attach(model, remember))
            handles.callback(self.point.attach(model, reshaped))
            return handles.pop_all().close


def _attach_probe(
    model: nn.Module,
    path: str,
    probe: str,
    setting: str,
    watch: Watch,
    shown: Part | None = None,
) -> Callable[[], None]:
    """Put a module into another, watch it, and have the model compute there in the open."""
    owner: Any = model.get_submodule(path)
    before = getattr(owner.config, setting)
    setattr(owner.config, setting, _WATCHED)
    had = getattr(owner, probe, None)
    owner.add_module(probe, had or nn.Identity())

    def detach() -> None:
        remove()
        setattr(owner.config, setting, before)
        if had is None:
            delattr(owner, probe)

    remove = OutputPoint(f"{path}.{probe}", shown).attach(model, watch)
    return detach


def _through(watch: Watch, whole: Tensor, part: Part | None) -> Tensor | None:
    if part is None:
        new = watch(whole)
    else:
        new = watch(part.read(whole))
        new = None if new is None else part.write(whole, new)
    # some models take a `view` of it
    return None if new is None else new.contiguous()


def _normalized(module: Any, x: Tensor) -> Tensor:
    if _is_centred(module):
        return F.layer_norm(x, module.normalized_shape, None, None, _eps(module))
    return F.rms_norm(x, x.shape[-1:], None, _eps(module))


def _is_centred(module: Any) -> bool:
    """Say whether a norm takes the mean off; OLMo's is a LayerNorm of a class of its own."""
    return hasattr(module, "normalized_shape") and not isinstance(module, nn.RMSNorm)


def _eps(module: Any) -> float:
    own = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    return 1e-5 if own is None else own  # OLMo's norm has it in its forward


def _affine(module: Any, normalized: Tensor, gain_offset: float) -> Tensor:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    scaled = normalized if weight is None else normalized * (weight + gain_offset)
    return scaled if bias is None else scaled + bias


_WATCHED = "lmmono_watched"


def _watched_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend in the open, through the probes of the modules that have them (no dropout).

    `s_aux` are gpt-oss' sinks: a score per head that takes a share of the pattern and adds nothing.
    """
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
    if s_aux is not None:
        sinks = s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    pattern = scores.float().softmax(-1)[..., : key.shape[2]]
    pattern = pattern.masked_fill(blind, 0.0).to(query.dtype)
    pattern = getattr(module, "hook_pattern", _same)(pattern)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _watched_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _watched_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run the experts one after the other, through the probes of the modules that have them."""
    places = [torch.where(index == expert) for expert in range(module.num_experts)]
    tokens = [token for token, _ in places]

    def probed(probe: str, rows: Sequence[Tensor]) -> list[Tensor]:
        if not hasattr(module, probe):
            return list(rows)
        dense = rows[0].new_zeros(len(hidden), module.num_experts, rows[0].shape[-1])
        for expert, (token, values) in enumerate(zip(tokens, rows, strict=True)):
            dense[token, expert] = values
        dense = getattr(module, probe)(dense.flatten(1)).view_as(dense)
        return [dense[token, expert] for expert, token in enumerate(tokens)]

    def project(x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(module, name)[expert]
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        return F.linear(x, weight.T if module.is_transposed else weight, bias)

    into = "gate_up_proj" if module.has_gate else "up_proj"
    pre = [project(hidden[token], into, expert) for expert, token in enumerate(tokens)]
    if module.has_gate:
        gates, ups = zip(*(_halves(module, tensor) for tensor in pre), strict=True)
        gates, ups = probed("hook_pre", gates), probed("hook_pre_linear", ups)
        pre = [_joined(module, *halves) for halves in zip(gates, ups, strict=True)]
        acts = [module._apply_gate(tensor) for tensor in pre]
    else:
        acts = [module.act_fn(tensor) for tensor in probed("hook_pre", pre)]
    out = torch.zeros_like(hidden)
    for expert, x in enumerate(probed("hook_post", acts)):
        token, slot = places[expert]
        added = project(x, "down_proj", expert)
        if module.has_post_expert_norm:
            added = module.post_expert_norm(added)
        out.index_add_(0, token, (added * weights[token, slot, None]).to(out.dtype))
    return out


def _halves(module: Any, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and linear half, which lie one after the other, or number by number."""
    if module.is_concatenated:
        gate, up = pre.chunk(2, -1)
        return gate, up
    return pre[..., ::2], pre[..., 1::2]


def _joined(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    return (
        torch.cat([gate, up], -1)
        if module.is_concatenated
        else torch.stack([gate, up], -1).flatten(-2)
    )


AttentionInterface.register(_WATCHED, _watched_attention)
AttentionMaskInterface.register(_WATCHED, _watched_mask)
ALL_EXPERTS_FUNCTIONS.register(_WATCHED, _watched_experts)
