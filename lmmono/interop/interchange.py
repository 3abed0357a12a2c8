"""Dictionaries from other tools and for them: SAELens, sparsify, dictionary_learning.

Every layout is read into one of sae-lens' architectures, which then is the only forward pass.
Sources: SAELens 6.54 `saes/`, sparsify 1.3.3 `sparse_coder.py`, dictionary_learning 0.1.0
`dictionary.py` and `trainers/`. Nothing is unpickled but tensors. SAELens folders are read by
sae-lens' own loader, after a check of what that takes silently: architectures that code no single
vectors, and normalisations that are not in the weights.
"""

import json
import math
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmmono.dictionaries.architectures import DAMAGE, read_inference, sae_lens
from lmmono.dictionaries.estimator import Dictionary, NetworkDictionary, load_dictionary
from lmmono.dictionaries.vector_source import VectorSource
from lmmono.errors import DictionaryError, nearest
from lmmono.files.atomic import disk_faults, write_atomic
from lmmono.files.json_files import read_json
from lmmono.recipe.section import Section
from lmmono.types import Progress

Layout = Literal["lmmono", "sae_lens", "sparsify", "dictionary_learning"]
"""How a folder is laid out: lmmono's own, or that of another tool."""

FILES: dict[Layout, tuple[str, ...]] = {
    "lmmono": ("dictionary.json",),
    "sae_lens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
}
"""Files by which a layout is known, in the order in which layouts are tried."""


ARCHITECTURES = ("standard", "gated", "topk", "jumprelu", "matching_pursuit", "abstopk")
"""sae-lens' architectures that code one vector at a time and decode the code alone."""

Weights = Mapping[str, Tensor]


class ImportedCode(Section):
    """What is known of a dictionary that another tool trained."""

    arch: Literal["standard", "gated", "topk", "jumprelu", "matching_pursuit", "abstopk"]
    """sae-lens' architecture that it is used as."""
    layout: Literal["sae_lens", "sparsify", "dictionary_learning"]
    """Where it came from."""


class Imported(NetworkDictionary):
    """A dictionary that another tool trained; made by `import_dictionary`, never fitted.

    Attributes:
        network: sae-lens' inference SAE.
    """

    kind: ClassVar[str] = "imported"
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(ImportedCode)

    def fit(self, vectors: Any, **options: Any) -> NoReturn:
        """Refuse: the weights are given.

        Raises:
            DictionaryError: Always.
        """
        del vectors, options
        raise DictionaryError(
            f"this {self.arch} dictionary was imported and stays as it is; fit an lm.SAE instead"
        )

    def _fit(self, source: VectorSource, *, progress: Progress, **options: Any) -> None:
        del source, progress, options
        raise AssertionError("fit refuses before this")

    def _save(self, folder: Path) -> None:
        write_sae_lens(self.network, self.hook, folder)

    def _load(self, folder: Path) -> None:
        self.network = read_sae_lens(folder)


def export_dictionary(
    dictionary: Dictionary,
    folder: str | Path,
    to: Literal["sae_lens", "sparsify", "dictionary_learning"] = "sae_lens",
) -> Path:
    """Write a dictionary as another tool reads it.

    `sae_lens` takes every SAE, what was imported, and the dense control: `SAE.load_from_disk` reads
    the folder, and its codes are those of the dictionary. `sparsify` takes topk SAEs.
    `dictionary_learning` takes standard, topk, jumprelu (batchtopk and Matryoshka among them) and
    gated ones; its `load_dictionary` reads the folder. An input scale, decoder norms and a bias
    taken off the input are folded into the weights, so nothing is lost.

    Args:
        dictionary: A fitted dictionary.
        folder: Empty or not there yet.
        to: The layout.

    Returns:
        The folder.

    Raises:
        DictionaryError: The layout cannot carry the dictionary, or the folder holds something.
        RunError: The disk refuses.
    """
    folder = Path(folder)
    if to not in WRITERS:
        raise DictionaryError(f"export_dictionary: to: {nearest(str(to), WRITERS)}")
    network = _network(dictionary, to)
    if folder.exists() and any(folder.iterdir()):
        raise DictionaryError(f"{folder}: holds something already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[to](network, dictionary.hook, folder)
    return folder


def import_dictionary(
    path: str | Path,
    *,
    format: Layout | None = None,
    hook: str | None = None,
    scale: float | None = None,
) -> Dictionary:
    """Return the dictionary in a folder that lmmono or another tool wrote.

    What is read of each tool: SAELens' inference folders (batchtopk and Matryoshka are jumprelu
    there); sparsify's topk sparse coders; of dictionary_learning AutoEncoder, AutoEncoderNew,
    AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder and GatedAutoEncoder,
    whose `ae.pt` is read weights-only. Weights come as float32.

    Args:
        path: The folder, or one of its files.
        format: The layout; None looks at the files.
        hook: Hook whose vectors it codes; by default what the folder says, in TransformerLens
            grammar.
        scale: What the input of a SAELens SAE was multiplied by in training, where the folder says
            that there was such a number and does not hold it; it is folded into the weights.

    Raises:
        DictionaryError: The folder is of no known layout, damaged, or holds what is no dictionary
            of one hook.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    layout = _layout_of(folder) if format is None else _checked_layout(folder, format)
    if scale is not None and layout != "sae_lens":
        raise DictionaryError(f"scale: only SAELens folders take one, {folder} is {layout}")
    if layout == "lmmono":
        dictionary = load_dictionary(folder)
    else:
        match layout:
            case "sae_lens":
                network = read_sae_lens(folder, scale)
            case "sparsify":
                network = read_sparsify(folder)
            case _:
                network = read_dictionary_learning(folder)
        dictionary = Imported(network.cfg.architecture(), layout=layout)
        dictionary.network = network
        dictionary.d_in, dictionary.d_sae = network.cfg.d_in, network.cfg.d_sae
        dictionary.hook = network.cfg.metadata.hook_name
        dictionary.facts = {"imported_from": layout}
    if hook is not None:
        dictionary.hook = hook
    return dictionary


def _network(dictionary: Dictionary, to: str) -> Any:
    """Return the sae-lens network that a dictionary is, or can be written as."""
    weights = dictionary.tensors()
    if (network := getattr(dictionary, "network", None)) is not None:
        return network
    if dictionary.arch == "dense":
        return network_of("standard", weights, "dense", apply_b_dec_to_input=False)
    raise DictionaryError(
        f"{to} has no architecture for a {dictionary.arch} dictionary; keep it with save(folder), "
        "which lmmono reads"
    )


def _layout_of(folder: Path) -> Layout:
    """Return the layout of a folder by its files."""
    for layout, files in FILES.items():
        if all((folder / name).is_file() for name in files):
            return layout
    if not folder.is_dir():
        raise DictionaryError(f"{folder}: no such folder")
    inside = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    wanted = "; ".join(f"{layout}: {' and '.join(files)}" for layout, files in FILES.items())
    raise DictionaryError(
        f"{folder}: no layout that is known; it has {', '.join(inside[:8]) or 'no files'}, "
        f"want {wanted}"
    )


def _checked_layout(folder: Path, layout: str) -> Layout:
    """Return the layout asked for, if its files are there."""
    for name in get_args(Layout):
        if name == layout:
            missing = [file for file in FILES[name] if not (folder / file).is_file()]
            if missing:
                raise DictionaryError(f"{folder}: as {name} it wants {', '.join(missing)}")
            return name
    raise DictionaryError(f"import_dictionary: format: {nearest(layout, get_args(Layout))}")


def network_of(architecture: str, weights: Weights, where: str, **config: Any) -> Any:
    """Return a sae-lens inference SAE with these weights, in float32.

    Raises:
        DictionaryError: The shapes do not fit each other.
    """
    cls, settings = sae_lens().registry.get_sae_class(architecture)
    try:
        d_sae, d_in = weights["W_dec"].shape
        network = cls(settings(d_in=d_in, d_sae=d_sae, **config))
        network.load_state_dict({k: v.float().contiguous() for k, v in weights.items()})
    except (RuntimeError, ValueError, TypeError) as error:
        raise DictionaryError(f"{where}: the weights do not fit each other: {error}") from error
    return network.requires_grad_(False).eval()


def read_sae_lens(folder: Path, scale: float | None = None) -> Any:
    """Return the SAE of a SAELens folder, in float32, for vectors whose heads are flattened.

    Args:
        folder: The folder.
        scale: What its input was multiplied by in training, to be folded into the weights; 1.0 says
            that this was done. Needed where `cfg.json` says that there was such a number and the
            folder does not hold it.

    Raises:
        DictionaryError: The folder is damaged, its architecture is no code of single vectors, or
            its input scale is not known.
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
    is_scaled = normalization == "expected_average_only_in"  # sae-lens sets "none" when it folds
    if is_scaled and scale is None:
        raise DictionaryError(
            f"{folder / 'cfg.json'}: normalize_activations is 'expected_average_only_in': it was "
            "trained on vectors multiplied by one number (sqrt(d_in) over their mean norm), which "
            "was not folded into the weights and is not in the folder. Give it: "
            "import_dictionary(path, scale=...), with 1.0 if it was folded by other means"
        )
    if not is_scaled and scale is not None:
        raise DictionaryError(
            f"{folder / 'cfg.json'}: scale: want none, got {scale:g}: its normalize_activations "
            f"is {normalization!r}, so its weights take vectors in the hook's own units"
        )
    network = read_inference(folder).to(dtype=torch.float32)
    network.turn_off_forward_pass_hook_z_reshaping()
    if scale is not None:
        if not scale > 0 or math.isinf(scale):
            raise DictionaryError(f"scale: want a positive number, got {scale}")
        network.fold_activation_norm_scaling_factor(scale)
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
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise DictionaryError(f"{folder / 'cfg.json'}: want k, a number >= 1, got {k!r}")
    tensors = _exactly(_safetensors(Path(where)), _SPARSIFY_TENSORS, where)
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return network_of("topk", weights, where, k=k)


_SPARSIFY_TENSORS = ("W_dec", "b_dec", "encoder.bias", "encoder.weight")
_SPARSIFY_WANTS = {
    "activation": "topk",
    "transcode": False,
    "skip_connection": False,
    "signed": False,
}


def write_sparsify(network: Any, hook: str | None, folder: Path) -> None:
    """Write a topk SAE as a sparsify folder, which holds no hook; `cfg.json` comes last.

    Raises:
        DictionaryError: Its activation is another, which the layout cannot say.
    """
    architecture = network.cfg.architecture()
    if architecture != "topk":
        raise DictionaryError(
            f"sparsify keeps the k largest latents of each vector and has no place for what a "
            f"{architecture} SAE needs (thresholds, gates or none at all); export it to sae_lens"
        )
    del hook
    w = _folded(network, is_centred=True)
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


def _folded(network: Any, *, is_centred: bool) -> dict[str, Tensor]:
    """Return weights on the CPU with decoder norms folded in, and b_dec taken off inputs or not."""
    w = {name: weight.detach().cpu() for name, weight in network.state_dict().items()}
    if getattr(network.cfg, "rescale_acts_by_decoder_norm", False):
        norms = w["W_dec"].norm(dim=1).clamp_min(1e-8)
        w["W_enc"], w["b_enc"] = w["W_enc"] * norms, w["b_enc"] * norms
        w["W_dec"] = w["W_dec"] / norms[:, None]
    shift = w["b_dec"] @ w["W_enc"] * (int(is_centred) - int(network.cfg.apply_b_dec_to_input))
    for name in ("b_enc", "b_gate"):
        if name in w:
            w[name] = w[name] + shift
    if "b_mag" in w:
        w["b_mag"] = w["b_mag"] + w["r_mag"].exp() * shift
    return w


def write_dictionary_learning(network: Any, hook: str | None, folder: Path) -> None:
    """Write an SAE as a dictionary_learning folder; `config.json` comes last.

    Raises:
        DictionaryError: None of its classes is this architecture.
    """
    architecture = network.cfg.architecture()
    if architecture not in _CLASS_OF:
        raise DictionaryError(
            f"dictionary_learning has no class for a {architecture} SAE, only for "
            f"{', '.join(_CLASS_OF)}; export it to sae_lens"
        )
    name, is_centred = _CLASS_OF[architecture]
    w = _folded(network, is_centred=is_centred)
    linear = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    k = getattr(network.cfg, "k", None)
    match name:
        case "AutoEncoderNew":
            tensors = linear | {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
        case "AutoEncoderTopK":
            # -1 is what it has before training has found a threshold
            buffers = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            tensors = linear | {"encoder.bias": w["b_enc"], "b_dec": w["b_dec"]} | buffers
        case "JumpReluAutoEncoder":
            tensors = {key: w[key] for key in _PLAIN}
        case _:
            gates = {"r_mag": w["r_mag"], "gate_bias": w["b_gate"], "mag_bias": w["b_mag"]}
            tensors = linear | gates | {"decoder_bias": w["b_dec"]}
    d_sae, d_in = w["W_dec"].shape
    trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": d_sae}
    trainer |= {"k": k} if k is not None else {}
    with disk_faults(folder):
        torch.save({key: t.contiguous() for key, t in tensors.items()}, folder / "ae.pt")
    config = {"trainer": trainer | {"submodule_name": hook}, "buffer": {}}
    write_atomic(folder / "config.json", json.dumps(config))


WRITERS: dict[str, Callable[[Any, str | None, Path], None]] = {
    "sae_lens": write_sae_lens,
    "sparsify": write_sparsify,
    "dictionary_learning": write_dictionary_learning,
}
"""How each tool's folder is written: a network, its hook and an empty folder."""


def read_dictionary_learning(folder: Path) -> Any:
    """Return the dictionary of an `ae.pt` with its `config.json`.

    Only tensors are read from the pickle. As in that package, decoder rows of `AutoEncoder` are
    brought to unit norm.

    Raises:
        DictionaryError: The pickle holds more than tensors or is damaged, or its class is unknown.
    """
    section = _config(folder / "config.json").get("trainer")
    trainer: dict[str, Any] = section if isinstance(section, dict) else {}
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise DictionaryError(
            f"{folder / 'config.json'}: trainer.dict_class {name!r} is not known; "
            + nearest(str(name), _CLASSES)
        )
    where, (names, convert) = str(folder / "ae.pt"), _CLASSES[name]
    # versions differ in buffers that do not change the code, such as the topk class's threshold
    tensors = {k: v for k, v in _tensors_only(Path(where)).items() if k in names or k not in _SPARE}
    if name == "AutoEncoderTopK" and "k" not in tensors and isinstance(trainer.get("k"), int):
        tensors["k"] = torch.tensor(trainer["k"])  # older ones kept it in the settings alone
    try:
        architecture, weights, config = convert(_exactly(tensors, names, where))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise DictionaryError(f"{where}: the weights do not fit each other: {error}") from error
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


def _batch_top_k(t: Weights) -> Converted:
    weights = _linear(t, "b_dec")
    return "jumprelu", {**weights, "threshold": t["threshold"].expand_as(weights["b_enc"])}, {}


def _matryoshka(t: Weights) -> Converted:
    weights = {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return "jumprelu", {**weights, "threshold": t["threshold"].expand_as(t["b_enc"])}, {}


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


_SPARE = ("k", "threshold", "group_sizes", "active_groups")
"""Buffers that a class may have and the code of a single vector need not."""
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_CLASSES: dict[str, tuple[tuple[str, ...], Callable[[Weights], Converted]]] = {
    "AutoEncoder": ((*_LINEAR, "bias"), _auto_encoder),
    "AutoEncoderNew": (
        (*_LINEAR, "decoder.bias"),
        lambda t: ("standard", _linear(t, "decoder.bias"), {"apply_b_dec_to_input": False}),
    ),
    "AutoEncoderTopK": (
        (*_LINEAR, "b_dec", "k"),
        lambda t: ("topk", _linear(t, "b_dec"), {"k": int(t["k"])}),
    ),
    "BatchTopKSAE": ((*_LINEAR, "b_dec", "threshold"), _batch_top_k),
    "MatryoshkaBatchTopKSAE": (_PLAIN, _matryoshka),
    "JumpReluAutoEncoder": (
        _PLAIN,
        lambda t: ("jumprelu", dict(t), {"apply_b_dec_to_input": False}),
    ),
    "GatedAutoEncoder": (
        ("decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"),
        _gated,
    ),
}
"""Tensors of each class, and how they become an architecture of sae-lens."""
_CLASS_OF = {
    "standard": ("AutoEncoderNew", False),
    "topk": ("AutoEncoderTopK", True),
    "jumprelu": ("JumpReluAutoEncoder", False),
    "gated": ("GatedAutoEncoder", True),
}
"""Class that an architecture of sae-lens is written as, and whether it takes b_dec off inputs."""


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
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"Unsupported [^\n]*?(?= was not|\n|$)", str(error))
        raise DictionaryError(
            f"{path}: this pickle holds more than tensors, and to unpickle it would run the code "
            f"that it names ({reason[0] if reason else error}); save its state dict alone"
        ) from error
    except (*DAMAGE, EOFError, IndexError, struct.error, MemoryError, OverflowError) as error:
        raise DictionaryError(f"{path}: cannot be read, or truncated ({error!r})") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise DictionaryError(f"{path}: want a state dict of tensors, got {type(content).__name__}")
    return dict(content)


def _exactly(tensors: Weights, names: tuple[str, ...], where: str) -> Weights:
    """Return the tensors if they are those that the class has, no more and no fewer."""
    if set(tensors) != set(names):
        got, wanted = (", ".join(sorted(map(str, keys))) for keys in (tensors, names))
        raise DictionaryError(f"{where}: got tensors {got}; want {wanted}")
    return tensors


def _config(path: Path) -> dict[str, Any]:
    return read_json(path, dict, DictionaryError, way_out="copy the folder again")
