"""Neuron analysis of language models; see README.md.

The public names, each imported when it is first used: `import lmmono` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmono.captures.capture import capture
    from lmmono.captures.latents import store_latents
    from lmmono.clients.local import LocalClient
    from lmmono.clients.replayed import ReplayClient
    from lmmono.clients.server import Limits, Price, ServerClient
    from lmmono.data.tokens import TokenCorpus, TokenRows
    from lmmono.dictionaries.classical import Classical
    from lmmono.dictionaries.controls import Control
    from lmmono.dictionaries.estimator import Dictionary, load_dictionary
    from lmmono.dictionaries.evaluation import SAEReport, evaluate
    from lmmono.dictionaries.recovery import recovery
    from lmmono.dictionaries.sae import SAE, fit_together
    from lmmono.dictionaries.splicing import run_with_sae
    from lmmono.dictionaries.stability import stability
    from lmmono.dictionaries.vector_source import model_vectors, shuffled
    from lmmono.errors import LmmonoError
    from lmmono.explanations.explain import Explanations, explain
    from lmmono.explanations.llm_ranking import Ranking
    from lmmono.interop.dictionary_hub import load_from_hub, push_dictionary
    from lmmono.interop.interchange import export_dictionary, import_dictionary
    from lmmono.interop.neuronpedia import export_neuronpedia
    from lmmono.interop.openai_results import export_simulations
    from lmmono.models.build import build_model
    from lmmono.models.crate import CrateConfig, CrateForCausalLM
    from lmmono.models.generation import generate
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
    from lmmono.models.untrained import untrained
    from lmmono.pipeline.loop import run_stages, train
    from lmmono.recipe import Recipe
    from lmmono.records.sampler import Counts
    from lmmono.records.units import Sample, sample
    from lmmono.reports.figures import pareto
    from lmmono.reports.tables import comparison
    from lmmono.runs.folder import Run, open_run
    from lmmono.scores.audit import Audit, audit_scorer
    from lmmono.scores.score import Scores, score
    from lmmono.studies.differences import Difference, compare
    from lmmono.studies.outcomes import Outcomes
    from lmmono.suites.study import robustness

__all__ = [
    "Audit",
    "Classical",
    "Control",
    "Counts",
    "CrateConfig",
    "CrateForCausalLM",
    "Dictionary",
    "Difference",
    "Edit",
    "Explanations",
    "Limits",
    "LmmonoError",
    "LocalClient",
    "Outcomes",
    "Price",
    "Ranking",
    "Recipe",
    "ReplayClient",
    "Run",
    "SAE",
    "SAEReport",
    "Sample",
    "Scores",
    "ServerClient",
    "TokenCorpus",
    "TokenRows",
    "audit_scorer",
    "build_model",
    "capture",
    "compare",
    "comparison",
    "evaluate",
    "explain",
    "export_dictionary",
    "export_neuronpedia",
    "export_simulations",
    "fit_together",
    "generate",
    "hook_names",
    "import_dictionary",
    "load_dictionary",
    "load_from_hub",
    "load_model",
    "match_hooks",
    "model_vectors",
    "open_run",
    "pareto",
    "preset",
    "push_dictionary",
    "recording",
    "recovery",
    "robustness",
    "run_stages",
    "run_with_cache",
    "run_with_edit",
    "run_with_sae",
    "sample",
    "score",
    "shuffled",
    "stability",
    "store_latents",
    "train",
    "untrained",
]

_HOMES = {
    "lmmono.captures.capture": ("capture",),
    "lmmono.captures.latents": ("store_latents",),
    "lmmono.clients.local": ("LocalClient",),
    "lmmono.clients.replayed": ("ReplayClient",),
    "lmmono.clients.server": (
        "Limits",
        "Price",
        "ServerClient",
    ),
    "lmmono.data.tokens": (
        "TokenCorpus",
        "TokenRows",
    ),
    "lmmono.dictionaries.classical": ("Classical",),
    "lmmono.dictionaries.controls": ("Control",),
    "lmmono.dictionaries.estimator": (
        "Dictionary",
        "load_dictionary",
    ),
    "lmmono.dictionaries.evaluation": (
        "SAEReport",
        "evaluate",
    ),
    "lmmono.dictionaries.recovery": ("recovery",),
    "lmmono.dictionaries.sae": (
        "SAE",
        "fit_together",
    ),
    "lmmono.dictionaries.splicing": ("run_with_sae",),
    "lmmono.dictionaries.stability": ("stability",),
    "lmmono.dictionaries.vector_source": (
        "model_vectors",
        "shuffled",
    ),
    "lmmono.errors": ("LmmonoError",),
    "lmmono.explanations.explain": (
        "Explanations",
        "explain",
    ),
    "lmmono.explanations.llm_ranking": ("Ranking",),
    "lmmono.interop.dictionary_hub": (
        "load_from_hub",
        "push_dictionary",
    ),
    "lmmono.interop.interchange": (
        "export_dictionary",
        "import_dictionary",
    ),
    "lmmono.interop.neuronpedia": ("export_neuronpedia",),
    "lmmono.interop.openai_results": ("export_simulations",),
    "lmmono.models.build": ("build_model",),
    "lmmono.models.crate": (
        "CrateConfig",
        "CrateForCausalLM",
    ),
    "lmmono.models.generation": ("generate",),
    "lmmono.models.hooks": (
        "Edit",
        "hook_names",
        "match_hooks",
        "recording",
        "run_with_cache",
        "run_with_edit",
    ),
    "lmmono.models.presets": ("preset",),
    "lmmono.models.storage": ("load_model",),
    "lmmono.models.untrained": ("untrained",),
    "lmmono.pipeline.loop": (
        "run_stages",
        "train",
    ),
    "lmmono.recipe": ("Recipe",),
    "lmmono.records.sampler": ("Counts",),
    "lmmono.records.units": (
        "Sample",
        "sample",
    ),
    "lmmono.reports.figures": ("pareto",),
    "lmmono.reports.tables": ("comparison",),
    "lmmono.runs.folder": (
        "Run",
        "open_run",
    ),
    "lmmono.scores.audit": (
        "Audit",
        "audit_scorer",
    ),
    "lmmono.scores.score": (
        "Scores",
        "score",
    ),
    "lmmono.studies.differences": (
        "Difference",
        "compare",
    ),
    "lmmono.studies.outcomes": ("Outcomes",),
    "lmmono.suites.study": ("robustness",),
}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'lmmono' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
