"""What a module gives while it runs: its outputs as they were returned, and its inputs for padding.

Imports torch only when it is used, and nothing of the store: models can record with it too.
"""

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from activation_store.errors import ContentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class OutputRecorder:
    """Keeps tensors by name at every forward pass, as they were when they were recorded.

    A later module may change a tensor in place: a residual addition, `ReLU(inplace=True)`. Copying
    every tensor would cost memory and time, so a copy is made only where that happened before:

        model(x)
        if recorder.changed():  # from now on those are copied
            model(x)
        recorder.outputs
    """

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._samples: dict[str, Tensor] = {}
        self._copied: set[str] = set()

    def keep(self, name: str, tensor: "Tensor") -> None:
        """Record one tensor of the forward pass that runs."""
        if tensor.is_inference():
            self._copied.add(name)  # a tensor of inference mode does not count its changes
        is_copied = name in self._copied
        self.outputs[name] = tensor.clone() if is_copied else tensor
        self._versions[name] = 0 if is_copied else tensor._version
        if not is_copied:
            self._samples[name] = _sample(tensor)

    def changed(self) -> bool:
        """Tell whether a tensor was changed in place after it was recorded.

        Such tensors are copied from the next forward pass on.
        """
        late = {
            name
            for name, output in self.outputs.items()
            if name not in self._copied
            and (
                output._version != self._versions[name]
                # what goes through `.data` or NumPy counts as no change of the tensor
                or not _sample(output).equal(self._samples[name])
            )
        }
        self._copied |= late
        return bool(late)


def input_device(module: "nn.Module") -> "torch.device":
    """Return the device that a module's inputs go to: that of its first weights in memory.

    Accelerate can spread a model over devices and keep parts of it on the disk (`device_map`);
    weights that are not in memory then have the device `meta`, which computes nothing, and it
    moves the inputs of each part by itself.
    """
    import torch

    devices = (weight.device for weight in module.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _sample(tensor: "Tensor") -> "Tensor":
    """Return a copy of about a thousand numbers of a tensor, spread over all of its columns."""
    import torch

    tensor, step = tensor.detach(), tensor.numel() // 1000 | 1  # odd, as widths are mostly even
    if tensor.is_contiguous():
        return tensor.view(-1)[::step].clone()
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def first_tensor(name: str, output: Any) -> "Tensor":
    """Return what a module's output holds first: itself, or the first of a tuple or mapping.

    Raises:
        ContentError: it holds no tensor; names the module.
    """
    import torch

    value = output
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    elif isinstance(value, (tuple, list)):
        value = value[0] if value else None
    if not isinstance(value, torch.Tensor):
        raise ContentError(
            f"{name}: gives {type(output).__name__}, want a tensor or a tuple of them."
        )
    return value


def per_token(name: str, output: "Tensor", n: int, n_ctx: int) -> "Tensor":
    """Return an output of a batch [n, n_ctx] as [n, n_ctx, d]; heads are flattened.

    Raises:
        ContentError: it is not one vector per token; names the module and the shape.
    """
    shape = tuple(output.shape)
    if len(shape) >= 2 and shape[0] == n * n_ctx:  # routers of experts see a batch as one row
        return output.reshape(n, n_ctx, -1)
    if len(shape) >= 3 and shape[:2] == (n, n_ctx):
        return output.flatten(2)
    raise ContentError(
        f"{name}: gives a tensor of shape {list(shape)}, want [batch, n_ctx, d] with batch = {n} "
        f"and n_ctx = {n_ctx}; its output is not one vector per token."
    )


def padded_inputs(
    module: "nn.Module", is_token: Bool[np.ndarray, "batch n_ctx"]
) -> "dict[str, Tensor]":
    """Return the keyword inputs that tell a module of padding; none where there is none.

    As generation does it: `attention_mask` is 1 at tokens, `position_ids` count tokens only, each
    where `forward` has a parameter of that name.

    Raises:
        ContentError: tokens follow padding, and `forward` takes no attention mask.
    """
    import torch

    if is_token.all():
        return {}
    names = inspect.signature(module.forward).parameters
    if "attention_mask" not in names:
        if (is_token[:, 1:] & ~is_token[:, :-1]).any():
            raise ContentError(
                f"{type(module).__name__}: tokens follow padding (doc_id < 0), and its forward "
                "takes no attention_mask, so they would see the padding; pad at the end, or give "
                "each batch its `inputs`."
            )
        return {}  # padding at the end, which tokens before it do not see in a causal model
    inputs = {"attention_mask": torch.from_numpy(is_token.astype(np.int64))}
    if "position_ids" in names:
        positions = np.cumsum(is_token, axis=1) - 1
        inputs["position_ids"] = torch.from_numpy(np.maximum(positions, 0))
    return inputs
