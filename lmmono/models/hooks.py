"""Named activations of a model: list them, record them, replace them.

Names follow TransformerLens (`blocks.3.mlp.hook_post`); every Hugging Face decoder in `families`
has them, and any module path (`transformer.h.0.mlp.act`) is a name too. Works on the bare model
and on one wrapped by Accelerate, DDP or `torch.compile`; compiled code runs uncompiled while
something is attached, because a compiled graph does not look for new hooks.
In CRATE, `attn.hook_q`, `hook_k` and `hook_v` name one tensor, `attn.hook_u` (a separate query
apart), and `hook_resid_post` is `hook_mlp_out` unless `ista_skip` is on.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmmono.errors import ModelError, nearest
from lmmono.models.families import points
from lmmono.models.points import OutputPoint, Point, Watch

ATTENTION = ("hook_attn_scores", "hook_pattern")


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of `torch.compile`, DDP and Accelerate."""
    for wrapper in ("_orig_mod", "module"):
        inner = getattr(model, wrapper, None)
        if isinstance(inner, nn.Module):
            return bare(inner)
    return model


def hook_names(model: nn.Module) -> list[str]:
    """Return the model's hook names in the order they run; module paths for unknown families."""
    return list(points(bare(model))) or _module_paths(bare(model))


def match_hooks(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Return the names that match any of the names or globs, in the order they run.

    A pattern that matches no hook name is tried on module paths.

    Raises:
        ModelError: A pattern matches nothing; says the nearest names.
    """
    names, paths = hook_names(model), _module_paths(bare(model))
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [n for n in names if fnmatchcase(n, pattern)]
        hits = hits or [p for p in paths if fnmatchcase(p, pattern)]
        if not hits:
            way_out = nearest(pattern, dict.fromkeys([*names, *paths]))
            raise ModelError(f"no hook {pattern!r} in {_kind(model)}: {way_out}")
        found += hits
    order = {name: i for i, name in enumerate((*names, *paths))}
    return sorted(set(found), key=order.__getitem__)


def hook_width(model: nn.Module, name: str) -> int:
    """Return how many numbers the hook has per token; found by running one token.

    Raises:
        ModelError: The name is unknown, or the hook has no fixed width (scores, patterns).
    """
    if name.endswith(ATTENTION):
        raise ModelError(f"{name} has one number per pair of tokens, so no width per token")
    network = bare(model)
    one_token = torch.zeros((1, 1), dtype=torch.long, device=next(network.parameters()).device)
    _, cache = run_with_cache(network, one_token, name)
    return cache[name].numel()


@contextmanager
def recording(model: nn.Module, names: str | Sequence[str]) -> Generator[dict[str, Tensor]]:
    """Yield a dict that every forward pass inside the block fills anew: hook name to tensor.

    Holds references to the tensors of the last pass, with their graph where gradients are on;
    copies nothing. Patterns and scores make the whole model attend without a fused kernel.

    Raises:
        ModelError: A name or glob matches nothing.
    """
    record: dict[str, Tensor] = {}

    def keep(name: str) -> Watch:
        return lambda tensor: record.__setitem__(name, tensor)

    with attached(model, {name: keep(name) for name in match_hooks(model, names)}):
        yield record


def run_with_cache(
    model: nn.Module,
    tokens: str | Tensor,
    hooks: str | Sequence[str] = "*",
    *,
    tokenizer: Any = None,
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
    """Run without gradients, in eval mode, and return the logits and the activations by name.

    Args:
        model: Any causal language model.
        tokens: Text, or token ids [pos] or [batch, pos].
        hooks: Names or globs; all TransformerLens names where not given.
        tokenizer: Needed for text unless the model has one as `model.tokenizer`.

    Raises:
        ModelError: A hook matches nothing or never ran, or there is text and no tokenizer.
    """
    names = match_hooks(model, hooks)
    with recording(model, names) as record:
        logits = _logits(model, tokens, tokenizer)
    silent = [name for name in names if name not in record]
    if silent:
        raise ModelError(f"{silent[0]} took no part in this forward pass; choose another hook")
    return logits, {name: record[name] for name in names}


class _Done(Exception):
    """All hooks were seen; ends a forward pass that needs to go no further."""


@torch.no_grad()
def run_until(
    model: nn.Module,
    ids: Int[Tensor, "batch pos"],
    hooks: Sequence[str],
    is_token: Bool[Tensor, "batch pos"] | None = None,
) -> dict[str, Tensor]:
    """Return the activations of hooks by exact name; what comes after the last is not computed.

    The model runs in the mode it is in; token ids are moved to it. Where `is_token` says that some
    are padding, the others get the activations that they have without it.
    """
    record: dict[str, Tensor] = {}

    def keep(name: str) -> Watch:
        def watch(tensor: Tensor) -> None:
            record[name] = tensor
            if len(record) == len(hooks):
                raise _Done

        return watch

    inputs = model_inputs(model, ids, is_token)
    with attached(model, {name: keep(name) for name in hooks}), suppress(_Done):
        model(**inputs, use_cache=False)
    return record


def model_inputs(
    model: nn.Module,
    ids: Int[Tensor, "batch pos"],
    is_token: Bool[Tensor, "batch pos"] | None,
) -> dict[str, Tensor]:
    """Return what a forward pass over rows takes, where the model is.

    Where some of a row is padding, a mask hides it, and the row counts its positions from its first
    token, as it would alone: on the left, padding would else move GPT-2's absolute positions.
    """
    from activation_store.write.recording import padded_inputs

    padding = {} if is_token is None else padded_inputs(bare(model), is_token.cpu().numpy())
    device = next(model.parameters()).device
    return {name: x.to(device) for name, x in {"input_ids": ids, **padding}.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A change of one activation; units and positions not named stay as they are.

    Units count along a token's numbers (heads flattened, so unit = head x d_head + index; for
    patterns head x n_keys + key), positions along the tokens of a forward pass; both may be
    negative.
    """

    hook: str
    """Hook name or glob."""
    kind: Literal["set", "scale", "ablate", "add"]
    """Set to `value`, multiply by `value`, set to zero or the mean `value`, or add `direction`."""
    value: float | Tensor | None = None
    """A number, or one per unit; for `add` the factor of the direction, 1 where not given."""
    units: Sequence[int] | None = None
    """Units to change; all where not given."""
    positions: Sequence[int] | None = None
    """Positions to change; all where not given."""
    direction: Tensor | None = None
    """What `add` adds, one number per unit."""

    def __post_init__(self) -> None:
        if self.kind in ("set", "scale") and self.value is None:
            raise ModelError(f"Edit({self.hook!r}, {self.kind!r}): want a value, got none")
        if (self.kind == "add") != (self.direction is not None):
            raise ModelError(
                f"Edit({self.hook!r}, {self.kind!r}): want a direction with 'add', and only there"
            )

    def apply(self, acts: Float[Tensor, "batch pos *width"]) -> Float[Tensor, "batch pos *width"]:
        """Return the changed activations; gradients flow through and the argument stays.

        Raises:
            ModelError: A unit or position is outside, or a value has another width.
        """
        flat = acts.flatten(2)
        units = _indices(self, "units", self.units, flat.shape[2])
        positions = _indices(self, "positions", self.positions, flat.shape[1])
        if self.kind == "scale":
            changed = flat * self._wide(self.value, units, flat)
        elif self.kind == "add":
            factor = 1.0 if self.value is None else self.value
            changed = flat + self._wide(self.direction, units, flat) * factor
        else:
            changed = self._wide(0.0 if self.value is None else self.value, units, flat)
        chosen = torch.zeros(flat.shape[1:], dtype=torch.bool)
        chosen[positions[:, None], units] = True
        return torch.where(chosen.to(flat.device), changed, flat).view_as(acts)

    def _wide(self, value: float | Tensor | None, units: Tensor, flat: Tensor) -> Tensor:
        """Return the value for every unit, though it may be given for the chosen ones only."""
        given = torch.as_tensor(value, dtype=flat.dtype, device=flat.device)
        if given.ndim == 1 and len(given) == len(units) != flat.shape[2]:
            return flat.new_zeros(flat.shape[2]).index_copy(0, units.to(flat.device), given)
        try:
            return given.expand(flat.shape)
        except RuntimeError as fault:
            raise ModelError(
                f"Edit({self.hook!r}, {self.kind!r}): got values of shape {list(given.shape)},"
                f" want a number or {len(units)} of them, one per unit"
            ) from fault


@contextmanager
def editing(model: nn.Module, edits: Edit | Sequence[Edit]) -> Generator[None]:
    """Apply the edits, in order, in every forward pass inside the block (`generate` too).

    Raises:
        ModelError: A name matches nothing; in the pass, a unit or position that is outside.
    """
    watches: dict[str, Watch] = {}
    for edit in [edits] if isinstance(edits, Edit) else edits:
        for name in match_hooks(model, edit.hook):
            watches[name] = _then(watches.get(name), edit, name.endswith(ATTENTION))
    with attached(model, watches):
        yield


def run_with_edit(
    model: nn.Module,
    tokens: str | Tensor,
    edits: Edit | Sequence[Edit],
    *,
    tokenizer: Any = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run without gradients, in eval mode, with activations replaced; return the logits.

    Raises:
        ModelError: A hook name, unit or position does not exist, or there is no tokenizer.
    """
    with editing(model, edits):
        return _logits(model, tokens, tokenizer)


@contextmanager
def attached(model: nn.Module, watches: Mapping[str, Watch]) -> Generator[None]:
    """Attach functions to hooks by exact name; all are detached at the end, whatever happens."""
    network = bare(model)
    known = points(network)
    with ExitStack() as stack:
        if _is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, watch in watches.items():
            point: Point = known.get(name) or OutputPoint(name)
            stack.callback(point.attach(network, watch))
        yield


def _then(first: Watch | None, edit: Edit, is_attention: bool) -> Watch:
    def watch(acts: Tensor) -> Tensor:
        before = acts if first is None else first(acts)
        assert before is not None
        if is_attention:  # [batch, head, query, key]: positions are the queries
            return edit.apply(before.transpose(1, 2)).transpose(1, 2)
        return edit.apply(before)

    return watch


def _indices(edit: Edit, what: str, chosen: Sequence[int] | None, size: int) -> Tensor:
    if chosen is None:
        return torch.arange(size)
    wrong = [i for i in chosen if not -size <= i < size]
    if wrong:
        raise ModelError(f"Edit({edit.hook!r}): {what} {wrong[:5]} outside 0..{size - 1}")
    return torch.tensor([i % size for i in chosen], dtype=torch.long)


def _logits(model: nn.Module, tokens: str | Tensor, tokenizer: Any) -> Tensor:
    network = bare(model)
    ids = _token_ids(network, tokens, tokenizer)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return network(ids.to(next(network.parameters()).device)).logits
    finally:
        network.train(was_training)


def _token_ids(network: nn.Module, tokens: str | Tensor, tokenizer: Any) -> Tensor:
    if isinstance(tokens, Tensor):
        return tokens if tokens.ndim == 2 else tokens.unsqueeze(0)
    tokenizer = tokenizer or getattr(network, "tokenizer", None)
    if tokenizer is None:
        raise ModelError("text needs a tokenizer: pass tokenizer=, or pass token ids")
    return torch.tensor([tokenizer.encode(tokens)], dtype=torch.long)


def _module_paths(network: nn.Module) -> list[str]:
    return [path for path, _ in network.named_modules() if path]


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in bare(model).modules()
    )


def _kind(model: nn.Module) -> str:
    return type(bare(model)).__name__
