"""Dictionaries whose weights are plain tensors, kept as `weights.safetensors`."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.vector_source import Vectors
from lmmono.errors import DictionaryError
from lmmono.files.atomic import disk_faults
from lmmono.types import Progress

NAME = "weights.safetensors"


class PlainDictionary(Dictionary):
    """A dictionary that is some tensors by name; a kind says how they are found and used."""

    _weights: dict[str, Tensor]

    @abstractmethod
    def _learn(self, source: Vectors, progress: Progress) -> dict[str, Tensor]:
        """Return the weights; what is known of the fit goes into `facts`."""

    def _fit(self, source: Vectors, *, progress: Progress, **options: Any) -> None:
        if options:
            raise DictionaryError(
                f"fit: {type(self).__name__} takes vectors and progress, not {', '.join(options)}; "
                "to keep it, call save(folder)"
            )
        learned = self._learn(source, progress)
        self._weights = _own(learned)

    def _on(self, x: Tensor) -> dict[str, Tensor]:
        """Return the weights where `x` is."""
        return {name: weight.to(x.device) for name, weight in self._weights.items()}

    def _save(self, folder: Path) -> None:
        with disk_faults(folder / NAME):
            save_file(self._weights, folder / NAME)

    def _load(self, folder: Path) -> None:
        try:
            self._weights = _own(load_file(folder / NAME))
        except (OSError, SafetensorError) as error:
            raise DictionaryError(
                f"{folder / NAME}: no whole safetensors file ({error}); copy the folder again or "
                "fit the dictionary again"
            ) from error


def _own(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in memory of torch's own: products depend, in the last bit, on alignment."""
    return {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }
