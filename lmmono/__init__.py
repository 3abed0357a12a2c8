"""Neuron analysis of language models; see README.md.

The public names, each imported when it is first used: `import lmmono` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmono.capturing import capture, capture_run
    from lmmono.data.tokens import TokenCorpus, TokenRows
    from lmmono.errors import LmmonoError
    from lmmono.generation import generate
    from lmmono.models.build import build_model
    from lmmono.models.crate import CrateConfig, CrateForCausalLM
    from lmmono.models.hooks import (
        Edit,
        hook_names,
        match_hooks,
        recording,
        run_with_cache,
        run_with_edit,
    )
    from lmmono.models.presets import preset
    from lmmono.models.storage import load_model
    from lmmono.recipe import Recipe
    from lmmono.reporting.tables import comparison
    from lmmono.run import Run, open_run
    from lmmono.training import train

__all__ = [
    "CrateConfig",
    "CrateForCausalLM",
    "Edit",
    "LmmonoError",
    "Recipe",
    "Run",
    "TokenCorpus",
    "TokenRows",
    "build_model",
    "capture",
    "capture_run",
    "comparison",
    "generate",
    "hook_names",
    "load_model",
    "match_hooks",
    "open_run",
    "preset",
    "recording",
    "run_with_cache",
    "run_with_edit",
    "train",
]

_HOMES = {
    "capturing": ("capture", "capture_run"),
    "data.tokens": ("TokenCorpus", "TokenRows"),
    "errors": ("LmmonoError",),
    "generation": ("generate",),
    "models.build": ("build_model",),
    "models.crate": ("CrateConfig", "CrateForCausalLM"),
    "models.hooks": (
        "Edit",
        "hook_names",
        "match_hooks",
        "recording",
        "run_with_cache",
        "run_with_edit",
    ),
    "models.presets": ("preset",),
    "models.storage": ("load_model",),
    "recipe": ("Recipe",),
    "reporting.tables": ("comparison",),
    "run": ("Run", "open_run"),
    "training": ("train",),
}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lmmono.{module}"), name)
    raise AttributeError(f"module 'lmmono' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
