"""Our settings as sae-lens' own classes: which class trains an `arch`, and with which numbers.

Holds the one translation between the two vocabularies, and the folder that sae-lens reads. What
the classes compute is sae-lens' (6.54); nothing of it is written again here.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lmmono.errors import DictionaryError

THRESHOLD_SHARE = 0.01
"""Share of a step's smallest act in the running threshold of batchtopk: sae-lens' default."""

DAMAGE = (
    OSError,
    SafetensorError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,  # of torch where shapes do not fit, and Python's RecursionError
)
"""What sae-lens, torch and safetensors raise of files that are damaged or say odd things."""

_LENS_NAMES = {"dense": "standard"}
"""sae-lens' name of an `arch`, where it is another."""


@cache
def sae_lens() -> Any:
    """Return the package sae_lens; the first call imports it, for some seconds."""
    with warnings.catch_warnings():
        # it imports names that TransformerLens has deprecated; our user can do nothing about it
        warnings.simplefilter("ignore", DeprecationWarning)
        import sae_lens as package
    return package


def training_sae(settings: Any, d_in: int, d_sae: int, seed: int, about: dict[str, Any]) -> Any:
    """Return a fresh sae-lens `TrainingSAE`, the same for the same seed.

    The global random numbers are left as they were.

    Args:
        settings: One of `lmmono.recipe.dictionary_settings.Sae`, or `DenseAutoencoder`.
        d_in: Width of the input.
        d_sae: Number of latents.
        seed: Seed of the initial weights.
        about: Metadata of the SAELens folder, such as hook_name and model_name.

    Raises:
        DictionaryError: The settings do not fit the widths.
    """
    _check_widths(settings, d_sae)
    cls, config = sae_lens().registry.get_sae_training_class(
        _LENS_NAMES.get(settings.arch, settings.arch)
    )
    metadata = sae_lens().saes.sae.SAEMetadata(**{k: v for k, v in about.items() if v is not None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config(d_in=d_in, d_sae=d_sae, metadata=metadata, **_numbers(settings, d_sae)))


def trainer(settings: Any, sae: Any, batch_tokens: int) -> Any:
    """Return sae-lens' `SAETrainer` for an SAE, with Adam and the schedules of the settings."""
    decay = min(
        round(settings.decay_fraction * settings.steps), settings.steps - settings.warmup_steps
    )
    config = sae_lens().config.SAETrainerConfig(
        total_training_samples=settings.steps * batch_tokens,
        train_batch_size_samples=batch_tokens,
        lr=settings.lr,
        lr_end=settings.lr,
        lr_warm_up_steps=settings.warmup_steps,
        lr_decay_steps=decay,
        dead_feature_window=settings.dead_window_steps,
        device=str(sae.device),
    )
    return sae_lens().SAETrainer(config, sae, data_provider=iter(()))


def write_inference(sae: Any, folder: Path) -> None:
    """Write a trained SAE as the SAELens folder of its inference class."""
    sae.save_inference_model(folder)


def read_inference(folder: Path) -> Any:
    """Return the sae-lens `SAE` of a SAELens folder.

    Raises:
        DictionaryError: The folder holds no SAE that sae-lens can read.
    """
    from lmmono.models.storage import odd_weights  # it imports transformers, as sae-lens does

    try:
        sae = sae_lens().SAE.load_from_disk(folder)
    except DAMAGE as error:
        raise DictionaryError(
            f"{folder}: no SAELens folder that can be read ({error}); want cfg.json and "
            "sae_weights.safetensors as they were written"
        ) from error
    if odd := odd_weights(sae):
        raise DictionaryError(
            f"{folder}: NaN or infinite numbers in {', '.join(odd)}: the fit diverged, or the "
            "file is damaged; copy the folder again"
        )
    for parameter in sae.parameters():  # else they are views of the file, which may be replaced
        parameter.data = parameter.data.clone()
    return sae.requires_grad_(False).eval()


def _numbers(settings: Any, d_sae: int) -> dict[str, Any]:
    """Return the fields of sae-lens' training config that the settings decide."""
    match settings.arch:
        case "topk":
            return {"k": settings.k, "aux_loss_coefficient": settings.aux_coefficient}
        case "batchtopk" | "matryoshka_batchtopk":
            # at sae-lens' share a fit of a few hundred steps ends before the threshold has settled
            share = min(1.0, max(THRESHOLD_SHARE, 5.0 / settings.steps))
            numbers = {
                "k": float(settings.k),
                "aux_loss_coefficient": settings.aux_coefficient,
                "topk_threshold_lr": share,
            }
            if settings.arch == "batchtopk":
                return numbers
            return {**numbers, "matryoshka_widths": [*settings.widths, d_sae]}
        case "matching_pursuit":
            return {
                "max_iterations": settings.k,  # one latent per iteration
                "residual_threshold": settings.residual_threshold,
                "decoder_init_norm": 1.0,
            }
        case "standard" | "gated":
            return {
                "l1_coefficient": settings.coefficient,
                "l1_warm_up_steps": settings.coefficient_warmup_steps,
            }
        case "dense":
            return {"l1_coefficient": 0.0}
        case _:
            return {
                "l0_coefficient": settings.coefficient,
                "l0_warm_up_steps": settings.coefficient_warmup_steps,
                "jumprelu_init_threshold": settings.initial_threshold,
                "jumprelu_bandwidth": settings.bandwidth,
                "jumprelu_sparsity_loss_mode": (
                    "step" if settings.target_l0 is None else "quadratic"
                ),
                "target_l0": settings.target_l0,
            }


def _check_widths(settings: Any, d_sae: int) -> None:
    """Check what depends on the number of latents.

    Raises:
        DictionaryError: More active latents are asked for than there are, or nested widths do not
            grow towards d_sae.
    """
    for name in ("k", "target_l0"):
        wanted = getattr(settings, name, None)
        if wanted is not None and wanted > d_sae:
            raise DictionaryError(f"{name}: want at most d_sae = {d_sae}, got {wanted}")
    widths = (*getattr(settings, "widths", ()), d_sae)
    if any(a >= b for a, b in zip(widths, widths[1:], strict=False)):
        raise DictionaryError(
            f"widths: want growing widths below d_sae = {d_sae}, got {list(widths[:-1])}"
        )
