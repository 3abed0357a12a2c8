"""A model that runs with a dictionary's reconstruction in place of an activation."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lmmono.dictionaries.estimator import Dictionary
from lmmono.errors import DictionaryError
from lmmono.models.hooks import attached, match_hooks, run_with_edit
from lmmono.models.points import Watch


def run_with_sae(
    model: nn.Module,
    sae: Dictionary | Mapping[str, Dictionary],
    tokens: str | Tensor,
    *,
    hook: str | None = None,
    error_term: bool = False,
    tokenizer: Any = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run without gradients, in eval mode, with reconstructions in place; return the logits.

    Args:
        model: Any causal language model.
        sae: Any fitted dictionary, or several by hook; each sees what those before it left.
        tokens: Text, or token ids [pos] or [batch, pos].
        hook: Where it goes in; that of its fit where not given.
        error_term: Add back what each reconstruction leaves out, so that the logits are the clean
            ones up to rounding.
        tokenizer: Needed for text unless the model has one as `model.tokenizer`.

    Raises:
        DictionaryError: A dictionary is not fitted, is of another width, or has no hook.
        ModelError: A hook does not exist, or there is text and no tokenizer.
    """
    with spliced(model, sae, hook=hook, error_term=error_term):
        return run_with_edit(model, tokens, (), tokenizer=tokenizer)


@contextmanager
def spliced(
    model: nn.Module,
    sae: Dictionary | Mapping[str, Dictionary],
    *,
    hook: str | None = None,
    error_term: bool = False,
) -> Generator[None]:
    """Put reconstructions in place in every forward pass inside the block (`generate` too).

    Raises:
        DictionaryError: A dictionary is not fitted, is of another width, or has no hook.
        ModelError: A hook does not exist.
    """
    if isinstance(sae, Dictionary):
        named = {hook_of(model, sae, hook): sae}
    elif hook is None:
        named = {hook_of(model, dictionary, name): dictionary for name, dictionary in sae.items()}
    else:
        raise DictionaryError("several dictionaries are given by hook; leave hook= out")

    def splice(dictionary: Dictionary) -> Watch:
        def watch(acts: Tensor) -> Tensor:
            vectors, _, reconstructed = coded(dictionary, acts)
            if error_term:
                reconstructed = reconstructed + (vectors - reconstructed)
            return reconstructed.to(acts).view_as(acts)

        return watch

    with attached(model, {name: splice(dictionary) for name, dictionary in named.items()}):
        yield


def hook_of(model: nn.Module, dictionary: Dictionary, hook: str | None) -> str:
    """Return the one hook of the model that a dictionary goes to.

    Raises:
        DictionaryError: Neither the caller nor the dictionary names one, or it is not fitted.
        ModelError: The model has no such hook.
    """
    if not dictionary.d_in:
        raise DictionaryError(f"this {dictionary.arch} dictionary is not fitted; fit it first")
    wanted = hook or dictionary.hook
    if not wanted:
        raise DictionaryError(
            f"this {dictionary.arch} dictionary was fitted on an array and knows no hook; "
            "say where it goes: hook='blocks.0.mlp.hook_post'"
        )
    names = match_hooks(model, wanted)
    if len(names) > 1:
        raise DictionaryError(
            f"hook: want one hook, {wanted!r} is {len(names)} of them ({', '.join(names[:3])}, "
            "...); give dictionaries by hook: {hook: dictionary}"
        )
    return names[0]


def coded(
    dictionary: Dictionary, acts: Float[Tensor, "batch pos *width"]
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_sae"], Float[Tensor, "n d_in"]]:
    """Return an activation's vectors, their codes and reconstructions, where the weights are.

    Heads are flattened: a token's vector is all its numbers.
    """
    device = dictionary.tensors()["W_dec"].device
    vectors = acts.flatten(2).flatten(0, 1).to(device, torch.float32)
    codes = dictionary.encode(vectors)
    return vectors, codes, dictionary.decode(codes)


@contextmanager
def replaced(
    model: nn.Module,
    hooks: Mapping[str, Tensor | None],
    where: Bool[Tensor, "batch pos"] | None = None,
) -> Generator[None]:
    """Put tensors in place of activations, zeros for None; [d_in] goes to every token.

    With `where` the tokens that it leaves out keep their activation.
    """

    def replace(tensor: Tensor | None) -> Watch:
        def watch(acts: Tensor) -> Tensor:
            if tensor is None:
                new = torch.zeros_like(acts)
            elif tensor.ndim == 1:
                new = tensor.to(acts).view(acts.shape[2:]).expand_as(acts)
            else:
                new = tensor.to(acts).view_as(acts)
            if where is None:
                return new
            return torch.where(where.view(*where.shape, *[1] * (acts.ndim - 2)), new, acts)

        return watch

    with attached(model, {hook: replace(tensor) for hook, tensor in hooks.items()}):
        yield
