"""Layouts of other tools: their weights as sae-lens' inference networks, and back.

Every layout is read into one of sae-lens' architectures, which then is the only forward pass.
Sources: SAELens 6.54 `saes/`, sparsify 1.3.3 `sparse_coder.py`, dictionary_learning 0.1.0
`dictionary.py` and `trainers/`. Nothing is unpickled but tensors.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmmono.dictionaries.architectures import read_inference, sae_lens
from lmmono.errors import DictionaryError, nearest
from lmmono.files.atomic import disk_faults, write_atomic
from lmmono.files.json_files import read_json

ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "matching_pursuit", "abstopk")
"""sae-lens' architectures that code one vector at a time and decode the code alone."""

Weights = Mapping[str, Tensor]


def network_of(architecture: str, weights: Weights, where: str, **config: Any) -> Any:
    """Return a sae-lens inference SAE with these weights, in float32.

    Raises:
        DictionaryError: The shapes do not fit each other.
    """
    d_sae, d_in = weights["W_dec"].shape
    cls, settings = sae_lens().registry.get_sae_class(architecture)
    network = cls(settings(d_in=d_in, d_sae=d_sae, **config))
    try:
        network.load_state_dict({k: v.float().contiguous() for k, v in weights.items()})
    except RuntimeError as error:
        raise DictionaryError(f"{where}: the weights do not fit each other: {error}") from error
    return network.requires_grad_(False).eval()


def read_sae_lens(folder: Path) -> Any:
    """Return the SAE of a SAELens folder, in float32, for vectors whose heads are flattened.

    Raises:
        DictionaryError: The folder is damaged, or its architecture is no code of single vectors.
    """
    config = _config(folder / "cfg.json")
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise DictionaryError(
            f"{folder / 'cfg.json'}: architecture {architecture!r} is no dictionary of single "
            f"vectors; {nearest(str(architecture), ARCHITECTURES)}. A training checkpoint is "
            "brought to one of them by sae-lens' save_inference_model"
        )
    normalization = config.get("normalize_activations")
    if normalization in ("layer_norm", "constant_norm_rescale"):
        raise DictionaryError(
            f"{folder / 'cfg.json'}: normalize_activations {normalization!r} rescales every vector "
            "by its own size, so a code cannot be decoded alone; use it through sae-lens itself"
        )
    network = read_inference(folder).to(dtype=torch.float32)
    network.turn_off_forward_pass_hook_z_reshaping()
    return network


def write_sae_lens(network: Any, hook: str | None, folder: Path) -> None:
    """Write a SAELens folder; `cfg.json` comes last."""
    with disk_faults(folder):
        network.save_model(folder)
    config = _config(folder / "cfg.json")
    config["device"] = "cpu"
    if config["metadata"].get("hook_name") is None and hook:
        config["metadata"]["hook_name"] = hook
    write_atomic(folder / "cfg.json", json.dumps(config))


def read_sparsify(folder: Path) -> Any:
    """Return the sparse coder of a sparsify folder as a topk SAE.

    Raises:
        DictionaryError: The folder is damaged, or holds a transcoder or another activation.
    """
    config, where = _config(folder / "cfg.json"), str(folder / "sae.safetensors")
    for name, wanted in _SPARSIFY_WANTS.items():
        if config.get(name, wanted) != wanted:
            raise DictionaryError(
                f"{folder / 'cfg.json'}: {name} = {config[name]!r}; only sparse coders with "
                f"{name} = {wanted!r} are dictionaries of one hook"
            )
    if not isinstance(config.get("k"), int):
        raise DictionaryError(f"{folder / 'cfg.json'}: want k, a number, got {config.get('k')!r}")
    found = _exactly(_safetensors(Path(where)), _SPARSIFY_TENSORS, where)
    weights = {
        "W_enc": found["encoder.weight"].T,
        "b_enc": found["encoder.bias"],
        "W_dec": found["W_dec"],
        "b_dec": found["b_dec"],
    }
    return network_of("topk", weights, where, k=config["k"])


_SPARSIFY_TENSORS = ("W_dec", "b_dec", "encoder.bias", "encoder.weight")
_SPARSIFY_WANTS = {
    "activation": "topk",
    "transcode": False,
    "skip_connection": False,
    "signed": False,
}


def write_sparsify(network: Any, folder: Path) -> None:
    """Write a topk SAE as a sparsify folder; `cfg.json` comes last.

    Raises:
        DictionaryError: Its activation is another, which the layout cannot say.
    """
    architecture = network.cfg.architecture()
    if architecture != "topk":
        raise DictionaryError(
            f"sparsify keeps the k largest latents of each vector and has no place for what a "
            f"{architecture} SAE needs (thresholds, gates or none at all); export it to sae_lens"
        )
    w = {name: weight.detach().cpu() for name, weight in network.state_dict().items()}
    if network.cfg.rescale_acts_by_decoder_norm:
        norms = w["W_dec"].norm(dim=1).clamp_min(1e-8)
        w["W_enc"], w["b_enc"] = w["W_enc"] * norms, w["b_enc"] * norms
        w["W_dec"] = w["W_dec"] / norms[:, None]
    if not network.cfg.apply_b_dec_to_input:
        w["b_enc"] = w["b_enc"] + w["b_dec"] @ w["W_enc"]
    tensors = {
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
    }
    d_sae, d_in = w["W_dec"].shape
    norms = w["W_dec"].norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, d_sae // d_in),
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms))),
        "num_latents": d_sae,
        "k": network.cfg.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d_in,
    }
    with disk_faults(folder):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae.safetensors")
    write_atomic(folder / "cfg.json", json.dumps(config))


def read_dictionary_learning(folder: Path) -> Any:
    """Return the dictionary of an `ae.pt` with its `config.json`.

    Only tensors are read from the pickle. As in that package, decoder rows of `AutoEncoder` are
    brought to unit norm.

    Raises:
        DictionaryError: The pickle holds more than tensors or is damaged, or its class is unknown.
    """
    trainer = _config(folder / "config.json").get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if name not in _CLASSES:
        raise DictionaryError(
            f"{folder / 'config.json'}: trainer.dict_class {name!r} is not known; "
            + nearest(str(name), _CLASSES)
        )
    where, (names, convert) = str(folder / "ae.pt"), _CLASSES[name]
    architecture, weights, config = convert(_exactly(_tensors_only(Path(where)), names, where))
    return network_of(architecture, weights, where, **config)


Converted = tuple[str, dict[str, Tensor], dict[str, Any]]


def _auto_encoder(t: Weights) -> Converted:
    norms = t["decoder.weight"].norm(dim=0).clamp_min(1e-8)
    weights = {
        "W_enc": t["encoder.weight"].T * norms,
        "b_enc": t["encoder.bias"] * norms,
        "W_dec": t["decoder.weight"].T / norms[:, None],
        "b_dec": t["bias"],
    }
    return "standard", weights, {}


def _auto_encoder_new(t: Weights) -> Converted:
    return "standard", _linear(t, "decoder.bias"), {"apply_b_dec_to_input": False}


def _top_k(t: Weights) -> Converted:
    return "topk", _linear(t, "b_dec"), {"k": int(t["k"])}


def _batch_top_k(t: Weights) -> Converted:
    weights = _linear(t, "b_dec")
    return "jumprelu", {**weights, "threshold": t["threshold"].expand_as(weights["b_enc"])}, {}


def _matryoshka(t: Weights) -> Converted:
    weights = {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return "jumprelu", {**weights, "threshold": t["threshold"].expand_as(t["b_enc"])}, {}


def _jump_relu(t: Weights) -> Converted:
    return "jumprelu", dict(t), {"apply_b_dec_to_input": False}


def _gated(t: Weights) -> Converted:
    weights = {
        "W_enc": t["encoder.weight"].T,
        "W_dec": t["decoder.weight"].T,
        "b_dec": t["decoder_bias"],
        "b_gate": t["gate_bias"],
        "b_mag": t["mag_bias"],
        "r_mag": t["r_mag"],
    }
    return "gated", weights, {}


def _linear(t: Weights, b_dec: str) -> dict[str, Tensor]:
    """Return the weights of two `nn.Linear`, named as sae-lens does."""
    return {
        "W_enc": t["encoder.weight"].T,
        "b_enc": t["encoder.bias"],
        "W_dec": t["decoder.weight"].T,
        "b_dec": t[b_dec],
    }


_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_CLASSES: dict[str, tuple[tuple[str, ...], Callable[[Weights], Converted]]] = {
    "AutoEncoder": ((*_LINEAR, "bias"), _auto_encoder),
    "AutoEncoderNew": ((*_LINEAR, "decoder.bias"), _auto_encoder_new),
    "AutoEncoderTopK": ((*_LINEAR, "b_dec", "k", "threshold"), _top_k),
    "BatchTopKSAE": ((*_LINEAR, "b_dec", "k", "threshold"), _batch_top_k),
    "MatryoshkaBatchTopKSAE": ((*_PLAIN, "k", "group_sizes"), _matryoshka),
    "JumpReluAutoEncoder": (_PLAIN, _jump_relu),
    "GatedAutoEncoder": (
        ("decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"),
        _gated,
    ),
}
"""Tensors of each class, and how they become an architecture of sae-lens."""


def _config(path: Path) -> dict[str, Any]:
    return read_json(path, dict, DictionaryError, way_out="copy the folder again")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DictionaryError(f"{path}: no whole safetensors file ({error})") from error


def _tensors_only(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch pickle, and refuse one with anything else in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it warns of, it refuses next
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported [^\n]*?(?= was not|\n|$)", str(error))
        raise DictionaryError(
            f"{path}: this pickle holds more than tensors, and to unpickle it would run the code "
            f"that it names ({reason[0] if reason else error}); save its state dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise DictionaryError(f"{path}: cannot be read, or cut short ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise DictionaryError(f"{path}: want a state dict of tensors, got {type(found).__name__}")
    return found


def _exactly(found: Weights, names: tuple[str, ...], where: str) -> Weights:
    """Return the tensors if they are those that the class has, no more and no fewer."""
    if set(found) != set(names):
        raise DictionaryError(
            f"{where}: got tensors {', '.join(sorted(found))}; want {', '.join(sorted(names))}"
        )
    return found
