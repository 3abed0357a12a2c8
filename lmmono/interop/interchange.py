"""Dictionaries from other tools and for them: SAELens, sparsify, dictionary_learning."""

from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, get_args

from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from lmmono.dictionaries.estimator import Dictionary, load_dictionary
from lmmono.dictionaries.vector_source import VectorSource
from lmmono.errors import DictionaryError, nearest
from lmmono.interop.layouts import (
    network_of,
    read_dictionary_learning,
    read_sae_lens,
    read_sparsify,
    write_sae_lens,
    write_sparsify,
)
from lmmono.recipe.sections import Section
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

_READERS = {
    "sae_lens": read_sae_lens,
    "sparsify": read_sparsify,
    "dictionary_learning": read_dictionary_learning,
}


class ImportedCode(Section):
    """What is known of a dictionary that another tool trained."""

    arch: Literal["standard", "gated", "topk", "jumprelu", "matching_pursuit", "abstopk"]
    """sae-lens' architecture that it is used as."""
    layout: Literal["sae_lens", "sparsify", "dictionary_learning"]
    """Where it came from."""


class Imported(Dictionary):
    """A dictionary that another tool trained; made by `import_dictionary`, never fitted.

    Attributes:
        network: sae-lens' inference SAE.
    """

    kind: ClassVar[str] = "imported"
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(ImportedCode)
    network: Any = None

    def fit(self, vectors: Any, **options: Any) -> NoReturn:
        """Refuse: the weights are given.

        Raises:
            DictionaryError: Always.
        """
        del vectors, options
        raise DictionaryError(
            f"this {self.arch} dictionary was imported and stays as it is; fit an lm.SAE instead"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, as the SAELens folder has them."""
        self._check_fitted("tensors")
        return dict(self.network.state_dict())

    def _fit(self, source: VectorSource, *, progress: Progress, **options: Any) -> None:
        del source, progress, options
        raise AssertionError("fit refuses before this")

    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self.network.encode(x)

    def _decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return self.network.decode(acts)

    def _save(self, folder: Path) -> None:
        write_sae_lens(self.network, self.hook, folder)

    def _load(self, folder: Path) -> None:
        self.network = read_sae_lens(folder)


def export_dictionary(
    dictionary: Dictionary,
    folder: str | Path,
    to: Literal["sae_lens", "sparsify"] = "sae_lens",
) -> Path:
    """Write a dictionary as another tool reads it.

    `sae_lens` takes every SAE, what was imported, and the dense control: `SAE.load_from_disk` reads
    the folder, and its codes are those of the dictionary. `sparsify` takes topk SAEs. An input
    scale and decoder norms are folded into the weights, so nothing is lost.

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
    if to not in ("sae_lens", "sparsify"):
        raise DictionaryError(
            f"export_dictionary: to: {nearest(str(to), ['sae_lens', 'sparsify'])}"
        )
    network = _network(dictionary, to)
    if folder.exists() and any(folder.iterdir()):
        raise DictionaryError(f"{folder}: holds something already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    if to == "sae_lens":
        write_sae_lens(network, dictionary.hook, folder)
    else:
        write_sparsify(network, folder)
    return folder


def import_dictionary(
    path: str | Path, *, format: Layout | None = None, hook: str | None = None
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

    Raises:
        DictionaryError: The folder is of no known layout, damaged, or holds what is no dictionary
            of one hook.
    """
    given = Path(path)
    folder = given.parent if given.is_file() else given
    layout = _guess(folder) if format is None else _known(folder, format)
    if layout == "lmmono":
        dictionary = load_dictionary(folder)
    else:
        network = _READERS[layout](folder)
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


def _guess(folder: Path) -> Layout:
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


def _known(folder: Path, layout: str) -> Layout:
    """Return the layout asked for, if its files are there."""
    for name in get_args(Layout):
        if name == layout:
            missing = [file for file in FILES[name] if not (folder / file).is_file()]
            if missing:
                raise DictionaryError(f"{folder}: as {name} it wants {', '.join(missing)}")
            return name
    raise DictionaryError(f"import_dictionary: format: {nearest(layout, get_args(Layout))}")
