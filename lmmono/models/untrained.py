"""A model that knows nothing of language, for what architecture and tokens alone explain."""

import copy
from typing import Any, Literal

import torch
from torch import nn

from lmmono.errors import ModelError, nearest
from lmmono.models.crate import CrateIsta
from lmmono.models.hooks import bare

Untraining = Literal["initial", "shuffled_weights"]


def untrained(model: nn.Module, seed: int = 0, how: Untraining = "initial") -> nn.Module:
    """Return a model of the same configuration that knows nothing of language.

    The model that is given stays as it is, and so do the global random numbers. What a dictionary
    finds in the new model is due to architecture and tokens alone.

    Args:
        model: Any model of transformers, such as CRATE or GPT-2; wrappers are taken off.
        seed: Seed of the new weights.
        how: `initial` draws the weights anew, as before training. `shuffled_weights` permutes the
            trained numbers inside every tensor, so that their distribution stays: the stricter
            control. It works on any torch module.

    Raises:
        ModelError: `how` is unknown, or the model has no configuration to begin from.
    """
    network = bare(model)
    if how not in _UNTRAINED:
        raise ModelError(f"untrained: how: unknown {how!r}; {nearest(how, _UNTRAINED)}")
    with torch.no_grad():
        return _UNTRAINED[how](network, seed)


def _initial(network: nn.Module, seed: int) -> nn.Module:
    config: Any = getattr(network, "config", None)
    if config is None:
        raise ModelError(
            f"untrained: {type(network).__name__} has no config to draw weights by; build a new "
            "one yourself, or take how='shuffled_weights'"
        )
    fresh = copy.deepcopy(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(network)(copy.deepcopy(config)).state_dict()
    for name, weight in fresh.state_dict().items():
        weight.copy_(drawn[name])
    return fresh


def _shuffled_weights(network: nn.Module, seed: int) -> nn.Module:
    fresh = copy.deepcopy(network)
    random = torch.Generator().manual_seed(seed)
    for weight in fresh.parameters():  # tied ones come once
        order = torch.randperm(weight.numel(), generator=random).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    for module in fresh.modules():
        if isinstance(module, CrateIsta):  # its step size follows from the dictionary
            module.follow_dictionary(n_iterations=100)
    return fresh


_UNTRAINED = {"initial": _initial, "shuffled_weights": _shuffled_weights}
