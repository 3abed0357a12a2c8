"""One way to use every learned code: settings in the constructor, data in `fit`.

Holds what all dictionaries share: shapes, checks, the folder they are saved in. A kind of
dictionary says how it is fitted, encodes and decodes. `PlainDictionary` is the base of those whose
weights are plain tensors; an SAE is a network of sae-lens instead.

    folder/dictionary.json       settings, seed, hook, widths, what the fit says of itself
           weights.safetensors   a PlainDictionary's tensors
           cfg.json, sae_weights.safetensors   an SAE's, as SAELens reads them
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmmono.dictionaries.vector_source import VectorSource, as_vectors
from lmmono.errors import DictionaryError
from lmmono.files import provenance
from lmmono.files.atomic import disk_faults, write_atomic
from lmmono.files.digests import damaged_files, file_digest
from lmmono.files.json_files import read_json, settings_faults
from lmmono.registry.lookup import load
from lmmono.types import Progress, silent

FORMAT = 1
"""Version of `dictionary.json`; a folder of a newer one is refused."""

WEIGHTS = "weights.safetensors"
"""File of a plain dictionary's tensors."""

WEIGHT_FILES = (WEIGHTS, "cfg.json", "sae_weights.safetensors")
"""Files whose digests stand in `dictionary.json`; training curves may be left behind."""


DICTIONARY_KINDS = {
    "sae": "lmmono.dictionaries.sae:SAE",
    "classical": "lmmono.dictionaries.classical:Classical",
    "control": "lmmono.dictionaries.controls:Control",
    "imported": "lmmono.interop.interchange:Imported",
}
"""`module:class` by the kind that `dictionary.json` names; the architectures of each kind are the
tags of their settings: `lmmono.recipe.dictionary_settings`."""

T = TypeVar("T", bound="Dictionary")  # not Self: beartype checks methods, not this class


class Dictionary(ABC):
    """A code of a hook's vectors, fitted or to be fitted.

    Attributes:
        settings: The checked settings, a frozen class of `lmmono.recipe.dictionary_settings`.
        seed: Seed of everything random in the fit.
        hook: Hook whose vectors it was fitted on; None for bare arrays.
        d_in: Width of the vectors; 0 before `fit`.
        d_sae: Number of latents; 0 before `fit`.
        facts: What the fit says of itself: n_tokens, seconds, input_scale, digests.
    """

    kind: ClassVar[str]
    """Name in `dictionary.json`: sae, classical or control."""
    adapter: ClassVar[TypeAdapter[Any]]
    """Checks the settings of this kind."""

    def __init__(self, arch: str, *, seed: int = 0, **settings: Any) -> None:
        """Check the settings; nothing is computed before `fit`.

        Raises:
            DictionaryError: A setting is unknown, missing or out of range; names all of them.
        """
        if "name" in settings:  # a field of the same classes, for the entries of a recipe
            raise DictionaryError(f"{type(self).__name__}({arch!r}): name: unknown setting")
        try:
            self.settings = self.adapter.validate_python({"arch": arch, **settings})
        except ValidationError as error:
            what = f"{type(self).__name__}({arch!r})"
            raise DictionaryError(settings_faults(what, error)) from None
        self.seed, self.hook = seed, None
        self.d_in = self.d_sae = 0
        self.facts: dict[str, Any] = {}

    @property
    def arch(self) -> str:
        """The kind of code, such as topk or pca."""
        return str(self.settings.arch)

    def fit(self: T, vectors: Any, *, progress: Progress = silent, **options: Any) -> T:
        """Learn the code of some vectors.

        Args:
            vectors: `store.vectors(...)`, `lm.model_vectors(...)`, an array or tensor [n, d_in],
                or any other `VectorSource` of one hook.
            progress: Called with steps done, and what is known of the loss.
            **options: What the kind's own `_fit` takes, such as the folder of an `SAE`.

        Returns:
            This dictionary, fitted.

        Raises:
            DictionaryError: The vectors are NaN or infinite, too few, or of the wrong width; or
                the fit came to nothing. The dictionary stays unfitted.
        """
        source = as_vectors(vectors)
        began = time.monotonic()
        try:
            self.begin(source)
            self._fit(source, progress=progress, **options)
        except BaseException:
            self.clear()
            raise
        self.facts.setdefault("seconds", round(time.monotonic() - began, 3))
        return self

    def begin(self, source: VectorSource, hook: str | None = None) -> None:
        """Take widths and hook from the vectors; what `fit` does first."""
        self.hook = source.only_hook() if hook is None else hook
        self.d_in = source.widths[self.hook]
        width = getattr(self.settings, "width", None)
        self.d_sae = self.d_in if width is None else width(self.d_in)
        self.facts = {"vectors": source.digest, **source.facts}

    def clear(self) -> None:
        """Make this an unfitted dictionary again; what a failed `fit` does."""
        self.hook, self.d_in, self.d_sae, self.facts = None, 0, 0, {}

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of vectors in the hook's own units; any leading shape.

        Raises:
            DictionaryError: The dictionary is not fitted, or the width is another.
        """
        self._check_width(x, self.d_in, "encode", "d_in")
        return self._encode(x.reshape(-1, self.d_in).float()).reshape(*x.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the vectors that codes stand for, in the hook's own units.

        Raises:
            DictionaryError: The dictionary is not fitted, or the width is another.
        """
        self._check_width(acts, self.d_sae, "decode", "d_sae")
        return self._decode(acts.reshape(-1, self.d_sae).float()).reshape(*acts.shape[:-1], -1)

    def reconstruct(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Return what the code keeps of vectors: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            whole.update(name.encode())
            whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write the dictionary into a folder; `dictionary.json` comes last.

        Raises:
            DictionaryError: It is not fitted, or the folder holds something else.
            RunError: The disk refuses.
        """
        folder = Path(folder)
        self._check_fitted("save")
        if folder.exists() and any(folder.iterdir()) and not (folder / "dictionary.json").exists():
            raise DictionaryError(
                f"{folder}: holds something that is no dictionary; choose another"
            )
        return self.write(folder)

    def write(self, folder: Path) -> Path:
        """Write the dictionary into a folder whatever it holds; `dictionary.json` comes last."""
        with disk_faults(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "dictionary.json").unlink(missing_ok=True)
            self._save(folder)
            digests = {
                name: file_digest(folder / name)
                for name in WEIGHT_FILES
                if (folder / name).is_file()
            }
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "settings": self.settings.model_dump(mode="json"),
            "seed": self.seed,
            "hook": self.hook,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "facts": self.facts,
            "sha256": digests,
            "versions": provenance.versions(),
        }
        write_atomic(folder / "dictionary.json", json.dumps(about, indent=2) + "\n")
        return folder

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, `W_dec` [d_sae, d_in] among them: the latents' directions."""

    @abstractmethod
    def _fit(self, source: VectorSource, *, progress: Progress, **options: Any) -> None: ...

    @abstractmethod
    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]: ...

    @abstractmethod
    def _decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]: ...

    @abstractmethod
    def _save(self, folder: Path) -> None: ...

    @abstractmethod
    def _load(self, folder: Path) -> None: ...

    def __repr__(self) -> str:
        shape = f"{self.d_in} -> {self.d_sae}, {self.hook}" if self.d_in else "not fitted"
        return f"{type(self).__name__}({self.arch}: {shape}, seed {self.seed})"

    def _check_fitted(self, what: str) -> None:
        if not self.d_in:
            raise DictionaryError(
                f"{what}: this {self.arch} dictionary is not fitted; fit it first"
            )

    def _check_width(self, x: Tensor, width: int, what: str, name: str) -> None:
        self._check_fitted(what)
        if x.shape[-1] != width:
            raise DictionaryError(
                f"{what}: want vectors of width {name} = {width}, got {x.shape[-1]}"
                + (f"; this dictionary was fitted on {self.hook}" if self.hook else "")
            )


class NetworkDictionary(Dictionary):
    """A dictionary whose code is that of one of sae-lens' networks, which `network` holds."""

    network: Any = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, as the SAELens folder has them."""
        self._check_fitted("tensors")
        return dict(self.network.state_dict())

    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self.network.encode(x)

    def _decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return self.network.decode(acts)


class PlainDictionary(Dictionary):
    """A dictionary that is some tensors by name; a kind says how they are learned and used."""

    _weights: dict[str, Tensor]

    @abstractmethod
    def _learn(self, source: VectorSource, progress: Progress) -> dict[str, Tensor]:
        """Return the weights; what is known of the fit goes into `facts`."""

    def _fit(self, source: VectorSource, *, progress: Progress, **options: Any) -> None:
        if options:
            raise DictionaryError(
                f"fit: {type(self).__name__} takes vectors and progress, not {', '.join(options)}; "
                "to keep it, call save(folder)"
            )
        self._weights = _own(self._learn(source, progress))

    def _on(self, x: Tensor) -> dict[str, Tensor]:
        """Return the weights where `x` is."""
        return {name: weight.to(x.device) for name, weight in self._weights.items()}

    def _save(self, folder: Path) -> None:
        with disk_faults(folder / WEIGHTS):
            save_file(self._weights, folder / WEIGHTS)

    def _load(self, folder: Path) -> None:
        try:
            self._weights = _own(load_file(folder / WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise DictionaryError(
                f"{folder / WEIGHTS}: no whole safetensors file ({error}); {_WAY_OUT}"
            ) from error


class DictionaryFile(BaseModel):
    """What `dictionary.json` holds."""

    model_config = ConfigDict(frozen=True, strict=True)

    kind: Literal["sae", "classical", "control", "imported"]
    settings: dict[str, JsonValue]
    seed: int = Field(ge=0)
    hook: str | None
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=1)
    facts: dict[str, JsonValue]
    sha256: dict[str, str]
    """Digest of each file of weights by its name."""


def read_about(folder: Path) -> DictionaryFile:
    """Return what a dictionary's folder says of it, without its weights.

    Raises:
        DictionaryError: The folder holds none, one of a newer lmmono, or a damaged one.
    """
    path = folder / "dictionary.json"
    if not path.exists():
        raise DictionaryError(f"{folder}: no dictionary (it has no dictionary.json)")
    values = read_json(path, dict, DictionaryError, way_out=_WAY_OUT)
    version = values.get("format", 0)
    if isinstance(version, int) and version > FORMAT:
        raise DictionaryError(f"{path}: written by a newer lmmono; update lmmono")
    if "sha256" not in values:
        is_sae_lens = all(
            (folder / name).is_file() for name in ("cfg.json", "sae_weights.safetensors")
        )
        as_is = f"lm.import_dictionary({str(folder)!r}, format='sae_lens')"
        raise DictionaryError(
            f"{path}: holds no sha256 of its weights, as lmmono wrote it before dictionaries had "
            "digests, so damage could not be told; fit it again"
            + (f", or take its weights as they are: {as_is}" if is_sae_lens else "")
        )
    return read_json(path, DictionaryFile, DictionaryError, way_out=_WAY_OUT)


def load_dictionary(folder: str | Path) -> Dictionary:
    """Return the dictionary that `Dictionary.save` wrote into a folder, its weights checked.

    Raises:
        DictionaryError: The folder holds none, one of a newer lmmono, or a damaged one.
    """
    folder = Path(folder)
    about = read_about(folder)
    path = folder / "dictionary.json"
    if faults := damaged_files(folder, about.sha256):
        raise DictionaryError("\n".join(f"{fault}; {_WAY_OUT}" for fault in faults))
    settings: dict[str, Any] = about.settings
    try:
        dictionary: Dictionary = load(DICTIONARY_KINDS[about.kind])(seed=about.seed, **settings)
    except TypeError as error:  # no arch, or a name that the constructor has itself
        raise DictionaryError(f"{folder}: settings of dictionary.json: {error}") from None
    dictionary.hook, dictionary.facts = about.hook, dict(about.facts)
    dictionary.d_in, dictionary.d_sae = about.d_in, about.d_sae
    try:
        dictionary._load(folder)  # pyright: ignore[reportPrivateUsage]
        shape = tuple(dictionary.tensors()["W_dec"].shape)
    except KeyError as error:
        raise DictionaryError(f"{path}: its weights lack {error}; {_WAY_OUT}") from error
    if shape != (about.d_sae, about.d_in):
        raise DictionaryError(
            f"{path}: says {about.d_sae} latents of width {about.d_in}, its weights are "
            f"{list(shape)}; {_WAY_OUT}"
        )
    return dictionary


def verify_dictionary(folder: Path) -> list[str]:
    """Return what is wrong with the files of a dictionary: one text per fault, none if it is whole.

    Reads the weights' bytes and nothing heavy.
    """
    try:
        return damaged_files(folder, read_about(folder).sha256)
    except DictionaryError as error:
        return [str(error)]


_WAY_OUT = "copy the folder again, or remove it and fit the dictionary again"


def _own(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in memory of torch's own: products depend, in the last bit, on alignment."""
    return {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }
