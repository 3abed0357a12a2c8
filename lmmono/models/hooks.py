"""Named activations of a model: list them, record them, replace them.

Names follow TransformerLens (`blocks.3.mlp.hook_post`); every Hugging Face decoder in `families`
has them, and any module path (`transformer.h.0.mlp.act`) is a name too. Works on the bare model
and on one wrapped by Accelerate, DDP or `torch.compile`; compiled code runs uncompiled while
something is attached, because a compiled graph does not look for new hooks.
- Neurons of gated MLPs are signed: `mlp.hook_post_neg` is max(-act, 0), which a store of rows above
  0 leaves out of `mlp.hook_post`. Their halves are `mlp.hook_pre` (gate) and `mlp.hook_pre_linear`.
- Neurons of experts are one axis, unit `expert x d_mlp + index`, 0 where a token is not routed to
  the expert; `mlp.hook_expert_weights` has the router's weight of each expert, 0 where not routed.
- In CRATE, `attn.hook_q`, `hook_k` and `hook_v` name one tensor, `attn.hook_u` (a separate query
  apart), and `hook_resid_post` is `hook_mlp_out` unless `ista_skip` is on.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from activation_store.errors import ContentError
from activation_store.write.recording import OutputRecorder, input_device, padded_inputs
from lmmono.errors import ModelError, nearest
from lmmono.files.docstrings import with_fields
from lmmono.models.families import no_names, points
from lmmono.models.points import OutputPoint, Point, Watch

ATTENTION = ("hook_attn_scores", "hook_pattern")

EDIT_KINDS = ("set", "scale", "ablate", "add")


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of `torch.compile`, DDP, Accelerate and peft.

    peft's LoRA and its kin live in the modules of the network, which therefore runs with them.

    Raises:
        ModelError: A peft adapter that adds tokens to the input: the network alone is without it.
    """
    if callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
        adapter: Any = model
        if adapter.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"{type(model).__name__}: its adapter adds tokens to every input, which have no "
                "place in a row; use a LoRA adapter, or the model without it"
            )
        return bare(adapter.get_base_model())
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
    matches: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [n for n in names if fnmatchcase(n, pattern)]
        hits = hits or [p for p in paths if fnmatchcase(p, pattern)]
        if not hits:
            raise ModelError(f"no hook {pattern!r} in {_kind(model)}: {_way_out(model, pattern)}")
        matches += hits
    order = {name: i for i, name in enumerate((*names, *paths))}
    return sorted(set(matches), key=order.__getitem__)


def negative_halves(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the hooks of the negative halves of signed neurons that `names` leave out."""
    other_names = set(hook_names(model)) - set(names)
    return [half for name in names if (half := f"{name}_neg") in other_names]


def hook_width(model: nn.Module, name: str) -> int:
    """Return how many numbers the hook has per token; found by running one token.

    Raises:
        ModelError: The name is unknown, or the hook has no fixed width (scores, patterns).
    """
    if name.endswith(ATTENTION):
        raise ModelError(f"{name} has one number per pair of tokens, so no width per token")
    network = bare(model)
    one_token = torch.zeros((1, 1), dtype=torch.long)
    _, cache = run_with_cache(network, one_token, name)
    return cache[name].numel()


def hook_widths(model: nn.Module) -> dict[str, int | None]:
    """Return how many numbers each hook has per token, by one pass over one token.

    None where a hook has one number per pair of tokens (scores, patterns), or takes no part.
    """
    names = hook_names(model)
    with recording(model, [n for n in names if not n.endswith(ATTENTION)]) as record:
        _logits(model, torch.zeros((1, 1), dtype=torch.long), None, None)
    return {name: record[name].numel() if name in record else None for name in names}


@contextmanager
def recording(model: nn.Module, names: str | Sequence[str]) -> Generator[dict[str, Tensor]]:
    """Yield a dict that every forward pass inside the block fills anew: hook name to tensor.

    Holds references to the tensors of the last pass, with their graph where gradients are on.
    Only what the model changes in place later (a residual addition, `ReLU(inplace=True)`) is
    copied: the first pass in which that shows runs twice. Patterns and scores make the whole model
    attend without a fused kernel.

    Raises:
        ModelError: A name or glob matches nothing; in a pass with a cache, a tensor was changed in
            place.
    """
    recorder = OutputRecorder()

    def run_again(network: nn.Module, args: Any, kwargs: dict[str, Any], _output: Any) -> Any:
        if not recorder.changed():
            return None
        if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
            raise ModelError(
                f"{_kind(network)} changes a recorded tensor in place, so this pass must run "
                "again, which a cache does not allow; run the whole row without a cache"
            )
        return network.forward(*args, **kwargs)

    watches = {name: _keeping(recorder, name) for name in match_hooks(model, names)}
    with attached(model, watches), ExitStack() as stack:
        handle = bare(model).register_forward_hook(run_again, with_kwargs=True)
        stack.callback(handle.remove)
        yield recorder.outputs


def run_with_cache(
    model: nn.Module,
    tokens: str | Tensor,
    hooks: str | Sequence[str] = "*",
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
    """Run without gradients, in eval mode, and return the logits and the activations by name.

    Args:
        model: Any causal language model.
        tokens: Text, or token ids [pos] or [batch, pos].
        hooks: Names or globs; all TransformerLens names where not given.
        tokenizer: Needed for text unless the model has one as `model.tokenizer`.
        attention_mask: 1 at tokens, 0 at padding, [batch, pos]; all are tokens where not given.

    Raises:
        ModelError: A hook matches nothing or never ran, there is text and no tokenizer, or the
            tokens do not fit the model.
    """
    names = match_hooks(model, hooks)
    with recording(model, names) as record:
        logits = _logits(model, tokens, tokenizer, attention_mask)
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
    recorder: OutputRecorder | None = None,
) -> dict[str, Tensor]:
    """Return the activations of hooks by exact name; what comes after the last is not computed.

    The head of a small model is a large part of its work: of GPT-2 small's weights that each token
    meets, 38.6 of 123.5 million. The model runs in the mode it is in; token ids are moved to it.
    One `recorder` for many passes remembers which tensors the model changes in place.

    Raises:
        ModelError: The tokens do not fit the model; see `token_inputs`.
    """
    recorder, inputs = recorder or OutputRecorder(), token_inputs(model, ids, is_token)
    seen: set[str] = set()

    def keep(name: str) -> Watch:
        def watch(tensor: Tensor) -> None:
            recorder.keep(name, tensor)
            seen.add(name)
            if len(seen) == len(watches):
                raise _Done

        return watch

    watches = {name: keep(name) for name in hooks}
    with attached(model, watches):
        for _ in range(2):  # again where a tensor was changed in place after it was recorded
            seen.clear()
            recorder.outputs.clear()
            with suppress(_Done):
                model(**inputs, use_cache=False)
            if not recorder.changed():
                break
    return dict(recorder.outputs)


def token_inputs(
    model: nn.Module,
    ids: Int[Tensor, "batch pos"],
    is_token: Bool[Tensor, "batch pos"] | None = None,
) -> dict[str, Tensor]:
    """Return the keyword inputs of a forward pass over rows, on the model's device.

    Every pass over tokens goes through here: ids and row lengths are checked, and padding gets an
    attention mask and positions that do not count it.

    Raises:
        ModelError: An id beyond the vocabulary, a row longer than the context, or padding that the
            model cannot be told of.
    """
    network: Any = bare(model)
    device = input_device(network)
    config = getattr(network, "config", None)
    d_vocab = getattr(config, "vocab_size", None)
    n_ctx = getattr(config, "max_position_embeddings", None)
    if n_ctx is not None and ids.shape[1] > n_ctx:
        raise ModelError(
            f"rows of {ids.shape[1]} tokens do not fit the {n_ctx} positions of {_kind(model)}; "
            "cut the rows"
        )
    if d_vocab is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < d_vocab:
        raise ModelError(
            f"token ids {int(ids.min())} to {int(ids.max())} do not fit the vocabulary of "
            f"{_kind(model)}, 0 to {d_vocab - 1}; use the model's own tokenizer"
        )
    inputs = {"input_ids": ids}
    if is_token is not None:
        try:
            inputs |= padded_inputs(network, is_token.cpu().numpy())
        except ContentError as error:
            raise ModelError(str(error)) from None
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@with_fields
@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A change of one activation; units and positions not named stay as they are.

    Units count along a token's numbers (heads flattened, so unit = head x d_head + index; for
    patterns head x n_keys + key), positions along the tokens of a forward pass; both may be
    negative.
    """

    hook: str
    """Hook name or glob."""
    kind: str
    """`set` to `value`, `scale` by it, `ablate` to zero or the mean `value`, `add` `direction`."""
    value: float | Tensor | None = None
    """A number, or one per unit; for `add` the factor of the direction, 1 where not given."""
    units: Sequence[int] | None = None
    """Units to change; all where not given."""
    positions: Sequence[int] | None = None
    """Positions to change; all where not given."""
    direction: Tensor | None = None
    """What `add` adds, one number per unit."""

    def __post_init__(self) -> None:
        if self.kind not in EDIT_KINDS:
            kinds = nearest(str(self.kind), EDIT_KINDS)
            raise ModelError(f"Edit({self.hook!r}, {self.kind!r}): no such kind; {kinds}")
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
        values = torch.as_tensor(value, dtype=flat.dtype, device=flat.device)
        if values.ndim == 1 and len(values) == len(units) != flat.shape[2]:
            return flat.new_zeros(flat.shape[2]).index_copy(0, units.to(flat.device), values)
        try:
            return values.expand(flat.shape)
        except RuntimeError as fault:
            raise ModelError(
                f"Edit({self.hook!r}, {self.kind!r}): got values of shape {list(values.shape)},"
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
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run without gradients, in eval mode, with activations replaced; return the logits.

    Raises:
        ModelError: A hook name, unit or position does not exist, there is no tokenizer, or the
            tokens do not fit the model.
    """
    with editing(model, edits):
        return _logits(model, tokens, tokenizer, attention_mask)


@contextmanager
def attached(model: nn.Module, watches: Mapping[str, Watch]) -> Generator[None]:
    """Attach functions to hooks by exact name; all are detached at the end, whatever happens."""
    network = bare(model)
    by_name = points(network)
    with ExitStack() as stack:
        if _is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, watch in watches.items():
            point: Point = by_name.get(name) or OutputPoint(name)
            stack.callback(point.attach(network, watch))
        yield


def _way_out(model: nn.Module, pattern: str) -> str:
    """Say what there is in place of a hook that there is not."""
    network = bare(model)
    by_name = points(network)
    if not by_name:
        paths = _module_paths(network)
        near = get_close_matches(pattern, paths, n=4, cutoff=0.0)
        return f"{no_names(network)}; a module path is a name too: {', '.join(near)}"
    near = get_close_matches(pattern, [*by_name, *_module_paths(network)], n=1, cutoff=0.8)
    inside = [name.removeprefix("blocks.0.") for name in by_name if name.startswith("blocks.0.")]
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{meant}its blocks have {', '.join(inside)}"


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


def _keeping(recorder: OutputRecorder, name: str) -> Watch:
    return lambda tensor: recorder.keep(name, tensor)


def _logits(
    model: nn.Module, tokens: str | Tensor, tokenizer: Any, attention_mask: Tensor | None
) -> Tensor:
    network = bare(model)
    is_token = None if attention_mask is None else attention_mask.bool()
    inputs = token_inputs(network, _token_ids(network, tokens, tokenizer), is_token)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            return network(**inputs).logits
    finally:
        network.train(was_training)


def _token_ids(network: nn.Module, tokens: object, tokenizer: Any) -> Tensor:
    if isinstance(tokens, Tensor):
        return tokens if tokens.ndim == 2 else tokens.unsqueeze(0)
    if not isinstance(tokens, str):
        raise ModelError(
            f"want one text or a tensor of token ids, got {type(tokens).__name__}; take one after "
            "the other, or several with lm.capture"
        )
    tokenizer = tokenizer or getattr(network, "tokenizer", None)
    if tokenizer is None:
        raise ModelError("text needs a tokenizer: pass tokenizer=, or pass token ids")
    ids = tokenizer.encode(tokens)
    if not ids:
        raise ModelError("the text is empty: its tokenizer makes no token of it")
    return torch.tensor([ids], dtype=torch.long)


def _module_paths(network: nn.Module) -> list[str]:
    return [path for path, _ in network.named_modules() if path]


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in bare(model).modules()
    )


def _kind(model: nn.Module) -> str:
    return type(bare(model)).__name__
