"""Low-rank adapters: LoRA, its relatives in peft, and those with a non-negative map inside.

Every adapter adds (alpha / rank) Delta(x) to what a linear layer makes of x. With the code A x:

    lora, rslora, dora            B A x          peft's own; their updates merge into the weights
    monolora relu_out     (M1)    ReLU(B A x)
    monolora relu_both    (M2)    ReLU(B ReLU(A x))
    monolora relu_code    (M3)    B ReLU(A x)
    monolora topk_code    (M4)    B TopK_k(ReLU(A x))
    two_branch                    ReLU(B1 ReLU(A1 x)) - ReLU(B2 ReLU(A2 x))
    topk_lora                     B (g * ReLU(A x)), g the k largest, straight through

MonoLoRA (arXiv 2410.21331) is "LoRA with non-negative transformations (ReLU) that force the output
of the LoRA layers to be more sparse"; the equation could not be read, and no code of it is public.
So M1 to M3 are candidates, none of them "the paper's", and M4 is ours. What follows from the
algebra:

- At B = 0, where LoRA begins, ReLU passes no gradient: M1, M2 and the two branches would never
  learn. Their B begins as noise of `start_std`, at the price of a small update from the start.
- M1 and M2 can raise an output and never lower it. Two branches of half the rank, as many weights
  in all, can do both: the control for that.
- No product of matrices equals a map with a kink, so none of them merges into the weights.

topk_lora is the adapter of marek357/lora_interp: forward the k largest codes, backward also through
k softmax(z / temperature). In CRATE the projection U is query, key and value at once; it is adapted
as one matrix, so that the three stay equal. Its dictionary encodes and decodes with one parameter,
which only an update of the weights themselves would keep tied: no adapter touches it.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lmmono.errors import ModelError
from lmmono.probes.finetuning import FineTuning

FORMULAS = {
    "relu_out": "ReLU(B A x)",
    "relu_both": "ReLU(B ReLU(A x))",
    "relu_code": "B ReLU(A x)",
    "topk_code": "B TopK(ReLU(A x))",
    "two_branch": "ReLU(B1 ReLU(A1 x)) - ReLU(B2 ReLU(A2 x))",
    "topk_lora": "B (g * ReLU(A x))",
}
"""What an update is, by the name of its map."""

NOISY_STARTS = ("relu_out", "relu_both", "two_branch")
"""Maps with a ReLU after B: at B = 0 they have no gradient."""

COOLEST = 0.1
"""Last temperature of topk_lora's soft gate over its first, as in lora_interp."""


def map_of(how: FineTuning) -> str | None:
    """Return which map of `FORMULAS` stands in the update; None for peft's own adapters."""
    name = how.variant if how.method == "monolora" else how.method
    return name if name in FORMULAS else None


def adapted(model: nn.Module, how: FineTuning) -> PeftModel:
    """Return a model with adapters in its linear layers, the head of a language model left out.

    The model is changed in place, as peft does it; its own weights are frozen.

    Raises:
        ModelError: The settings do not fit the map.
    """
    name = map_of(how)
    _check(name, how)
    options: dict[str, Any] = {
        "r": how.rank,
        "lora_alpha": how.alpha,
        "lora_dropout": how.dropout,
        "target_modules": "all-linear",
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
        "use_rslora": how.method == "rslora",
        "use_dora": how.method == "dora",
    }
    if name is None:
        config = LoraConfig(**options)
    else:
        config = MappedConfig(**options, map_name=name, how=how)
        config._register_custom_module({nn.Linear: MappedLinear, Conv1D: MappedLinear})  # pyright: ignore[reportPrivateUsage]
    with warnings.catch_warnings():  # peft asks transformers 5 for a name it will drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def _check(name: str | None, how: FineTuning) -> None:
    if name in ("topk_code", "topk_lora") and not 1 <= how.k <= how.rank:
        raise ModelError(f"{name}: k: want 1 to the rank, {how.rank}, got {how.k}")
    if name == "two_branch" and how.rank % 2:
        raise ModelError(f"two_branch: rank: want an even number, half for each branch: {how.rank}")
    if name in NOISY_STARTS and how.start_std <= 0:
        raise ModelError(
            f"{name}: start_std: want a number above 0, got {how.start_std}: at B = 0 "
            f"{FORMULAS[name]} has no gradient and would stay 0 for ever"
        )


@dataclass
class MappedConfig(LoraConfig):
    """peft's configuration, with the map and its settings."""

    map_name: str = "relu_both"
    how: FineTuning = field(default_factory=FineTuning)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Refuse: peft would read the folder as plain LoRA and compute something else."""
        del kwargs
        raise ModelError(
            f"{save_directory}: peft's folders cannot say that an update is {self.map_name}, and "
            "would be read as plain LoRA; save the classifier of `finetune`, or the state_dict"
        )


class MappedLinear(Linear):
    """peft's LoRA layer around a linear layer or GPT-2's Conv1D, with a map in its update."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        kwargs["is_target_conv_1d_layer"] = isinstance(base_layer, Conv1D)
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
        """Return the one variant that this layer has."""
        del config, kwargs
        return MappedUpdate()


class MappedUpdate(LoraVariant):
    """The update of a `MappedLinear`, in the form in which peft asks for it."""

    def supports_lora_conversion(self) -> bool:
        """Say no: no matrices A and B give the same update without the map."""
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Give B its start, and topk_lora the count of training passes that cools its gate."""
        config: MappedConfig = kwargs["config"]
        if not hasattr(module, "maps"):
            module.maps = {}  # pyright: ignore[reportAttributeAccessIssue]
        module.maps[adapter_name] = (config.map_name, config.how)  # pyright: ignore[reportAttributeAccessIssue]
        weight: Any = module.lora_B[adapter_name].weight
        if config.map_name in NOISY_STARTS:
            nn.init.normal_(weight, std=config.how.start_std)
        if config.map_name == "topk_lora":
            count = torch.zeros((), dtype=torch.long, device=weight.device)
            module.register_buffer("n_passes", count)  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return what the layer gives with its update."""
        del kwargs
        x = module.lora_dropout[active_adapter](x)
        return result + code_and_update(module, active_adapter, x)[1]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refuse."""
        del orig_weight
        raise _unmergeable(module, active_adapter)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Refuse."""
        del orig_weight
        raise _unmergeable(module, active_adapter)


def _unmergeable(module: LoraLayer, adapter: str) -> ModelError:
    name = module.maps[adapter][0]  # pyright: ignore[reportAttributeAccessIssue]
    return ModelError(
        f"merge: {FORMULAS[name]} is not linear in x, so no weight matrix equals {name}; keep the "
        "adapter where it is, take it off with unload(), or tune with lora, rslora or dora"
    )


def code_and_update(
    layer: LoraLayer, adapter: str, x: Float[Tensor, "*batch d_in"]
) -> tuple[Float[Tensor, "*batch rank"], Float[Tensor, "*batch d_out"]]:
    """Return the code and the scaled update of a layer's input; dropout is for the caller."""
    a: Tensor = layer.lora_A[adapter].weight  # pyright: ignore[reportAssignmentType]
    b: Tensor = layer.lora_B[adapter].weight  # pyright: ignore[reportAssignmentType]
    name, how = getattr(layer, "maps", {}).get(adapter, (None, None))
    code = linear(x, a)
    match name:
        case None | "relu_out":
            pass
        case "topk_code":
            code = _largest(torch.relu(code), how.k)
        case "topk_lora":
            code = _gated(layer, torch.relu(code), how)
        case _:
            code = torch.relu(code)
    match name:
        case "relu_out" | "relu_both":
            update = torch.relu(linear(code, b))
        case "two_branch":
            up, down = (linear(z, w) for z, w in zip(code.chunk(2, -1), b.chunk(2, 1), strict=True))
            update = torch.relu(up) - torch.relu(down)
        case _:
            update = linear(code, b)
    return code, update * layer.scaling[adapter]


def _largest(code: Tensor, k: int) -> Tensor:
    top = code.topk(k, dim=-1)
    return torch.zeros_like(code).scatter(-1, top.indices, top.values)


def _gated(layer: Any, code: Tensor, how: FineTuning) -> Tensor:
    """Return the k largest codes; the gradient takes a soft gate of mass k in place of the hard."""
    if not layer.training:
        return _largest(code, how.k)
    done = 0.0
    if how.anneal_steps:
        layer.n_passes += 1
        done = min(float(layer.n_passes) / how.anneal_steps, 1.0)
    soft = how.k * (code / (1 + (COOLEST - 1) * done)).softmax(dim=-1)
    hard = torch.zeros_like(code).scatter(-1, code.topk(how.k, dim=-1).indices, 1.0)
    return code * (hard + (soft - soft.detach()))  # in this order the difference is 0 exactly


@dataclass(slots=True)
class Sparsity:
    """How sparse codes and updates were, over all layers, tokens and coordinates."""

    code_zeros: int = 0
    code_size: int = 0
    update_zeros: int = 0
    update_size: int = 0

    @property
    def code(self) -> float:
        """Share of coordinates of the codes that are 0."""
        return self.code_zeros / max(1, self.code_size)

    @property
    def update(self) -> float:
        """Share of coordinates of the updates that are 0, which the paper reports."""
        return self.update_zeros / max(1, self.update_size)


@contextmanager
def counted_sparsity(model: nn.Module) -> Generator[Sparsity]:
    """Count zeros of codes and updates in the forward passes inside the block, padding included."""
    counts, handles = Sparsity(), list[Any]()

    def count(layer: Any, args: tuple[Tensor, ...]) -> None:
        for adapter in layer.active_adapters:
            with torch.no_grad():
                code, update = code_and_update(layer, adapter, args[0])
            counts.code_zeros += int((code == 0).sum())
            counts.code_size += code.numel()
            counts.update_zeros += int((update == 0).sum())
            counts.update_size += update.numel()

    for module in model.modules():
        if isinstance(module, LoraLayer):
            handles.append(module.register_forward_pre_hook(count))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
