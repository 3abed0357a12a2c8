"""Networks on disk: a Hugging Face folder with safetensors, written whole or not at all."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

import lmmono.models.crate  # pyright: ignore[reportUnusedImport]  # noqa: F401  # Auto* classes
from lmmono.errors import ModelError
from lmmono.files.atomic import atomic_folder


def save_model(model: PreTrainedModel, path: Path | str) -> Path:
    """Write the model to a new folder, which exists only when everything is in it.

    Raises:
        ModelError: There is something at `path` already.
        RunError: The disk refuses to write.
    """
    folder = Path(path)
    if folder.exists():
        raise ModelError(f"{folder}: something is there already; choose another folder")
    with atomic_folder(folder) as partial, no_progress_bars():
        model.save_pretrained(partial)
    return folder


def load_model(
    path: Path | str,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Return the causal language model that `save_pretrained` wrote to a folder, in eval mode.

    Reads safetensors only, from this machine only, and only when every weight is there.

    Args:
        path: The folder.
        dtype: `auto` for the type that the weights are saved in, or the name of one.
        trust_remote_code: Run the Python files of the folder, where its configuration names some.
        device_map: How Accelerate spreads the model over devices; None puts all of it on the CPU.

    Raises:
        ModelError: The folder is missing or foreign, its weights are truncated or incomplete, or it
            needs code of its own and that is not allowed, or its weights are no numbers.
    """
    folder = Path(path)
    _require_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files and list(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: holds weights as pickles (.bin), which can run code, and lmmono reads"
            " safetensors only; where you trust them, load the model in transformers and"
            " save_pretrained it to a new folder"
        )
    for file in files:
        _check_whole(file)
    with _told_as_model_errors(folder), no_progress_bars():
        # never None, transformers' default, which asks on standard input and takes a "y"
        foreign = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(folder, **foreign)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            **foreign,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            device_map=device_map,
        )
    model, report = loaded
    _check_complete(folder, model, report)
    if odd := odd_weights(model):
        raise ModelError(
            f"{folder}: NaN or infinite numbers in {', '.join(odd[:3])}: damaged, or beyond the"
            ' type they are read in; copy the folder again, or read it with dtype="float32"'
        )
    model.loss_type = model.loss_type or "ForCausalLM"
    model.eval()
    if device_map is None and getattr(config, "quantization_config", None) is None:
        _try_out(folder, model)
    return model


def initial_model(folder: Path, *, seed: int, dtype: str = "auto") -> PreTrainedModel:
    """Return a model of a folder's configuration with new weights, in eval mode.

    The weights depend on `seed` alone; other random states stay put.

    Raises:
        ModelError: The folder holds no configuration of a causal language model.
    """
    _require_config(folder)
    with _told_as_model_errors(folder), torch.random.fork_rng(devices=[]):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        torch.manual_seed(seed)
        # drawn in float32 whatever the type, so that the same seed gives the same numbers
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        saved = config.dtype if dtype == "auto" else getattr(torch, dtype)
        model = model.to(saved or torch.float32)
    model.loss_type = model.loss_type or "ForCausalLM"
    return model.eval()


def spread(model: PreTrainedModel, device_map: str) -> PreTrainedModel:
    """Spread a model in memory over all GPUs and the memory of the machine; changes it in place."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: Any = model  # torch types what a module holds as tensors and modules
    kept: list[str] = list(whole._no_split_modules or ())  # classes whose parts stay on one device
    memory = None
    if device_map != "sequential":
        memory = get_balanced_memory(model, no_split_module_classes=kept)
    devices = infer_auto_device_map(model, memory, no_split_module_classes=kept)
    dispatched: Any = dispatch_model(whole, devices)
    return dispatched


def _require_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: no model here (want config.json and model.safetensors as save_pretrained"
            " writes them); `lmmono import crate-lm` makes a folder from a released checkpoint"
        )


@contextmanager
def _told_as_model_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except Exception as fault:  # a foreign configuration makes transformers raise anything
        raise ModelError(
            f"{folder}: not a model lmmono can read: {type(fault).__name__}: {fault}"
        ) from fault


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as fault:
        raise ModelError(
            f"{file}: got {file.stat().st_size:,} bytes that are no whole safetensors file"
            f" ({fault}); copy it again or train again"
        ) from fault


def _check_complete(folder: Path, model: PreTrainedModel, report: Any) -> None:
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name} is unknown" for name in sorted(report["unexpected_keys"])]
    if faults:
        raise ModelError(
            f"{folder}: the weights do not fit {type(model).__name__}: {'; '.join(faults[:5])};"
            " copy the folder again or train again"
        )


def _try_out(folder: Path, model: Any) -> None:
    """Run one token: transformers takes any text or number for most settings of a config.json.

    Weights of few bits may need a GPU, and those that are spread may have to come from the disk.
    """
    with _told_as_model_errors(folder), torch.no_grad():
        logits = model(input_ids=torch.zeros((1, 1), dtype=torch.long)).logits
    if bool(logits.isnan().any()):
        raise ModelError(
            f"{folder}: the logits of one token are NaN: a number in config.json or the weights is"
            " damaged; copy the folder again"
        )


def odd_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters in memory that hold NaN or infinite numbers."""
    return [
        name
        for name, weights in model.named_parameters()
        # those of 8 bits or fewer are integers, or have no `isfinite`; those on `meta` no numbers
        if weights.is_floating_point() and weights.itemsize > 1 and not weights.is_meta
        if not bool(torch.isfinite(weights.detach()).all())
    ]


@contextmanager
def no_progress_bars() -> Generator[None]:
    """Keep transformers from drawing its own bars: lmmono prints nothing unless asked."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
