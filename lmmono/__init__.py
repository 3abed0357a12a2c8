"""Neuron analysis of language models; see README.md.

The public names, each imported when it is first used: `import lmmono` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmmono.capturing import capture, capture_run
    from lmmono.data.tokens import TokenCorpus, TokenRows
    from lmmono.dictionary.classical import Classical
    from lmmono.dictionary.controls import Control, shuffled
    from lmmono.dictionary.estimator import Dictionary, load_dictionary
    from lmmono.dictionary.evaluation import SAEReport, evaluate
    from lmmono.dictionary.hub import load_from_hub, push_dictionary
    from lmmono.dictionary.interchange import export_dictionary, import_dictionary
    from lmmono.dictionary.live import model_vectors
    from lmmono.dictionary.recovery import recovery
    from lmmono.dictionary.runs import dictionary_run
    from lmmono.dictionary.sae import SAE, fit_together
    from lmmono.dictionary.splicing import run_with_sae
    from lmmono.dictionary.stability import stability
    from lmmono.errors import LmmonoError
    from lmmono.explaining.explanations import Explanations, explain
    from lmmono.explaining.llm_ranking import Ranking
    from lmmono.explaining.local import LocalClient
    from lmmono.explaining.records import Counts
    from lmmono.explaining.replay import ReplayClient
    from lmmono.explaining.runs import explain_run
    from lmmono.explaining.sampling import Sample, sample
    from lmmono.explaining.server import ServerClient
    from lmmono.explaining.server_limits import Limits, Price
    from lmmono.generation import generate
    from lmmono.latents import store_latents
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
    from lmmono.models.untrained import untrained
    from lmmono.recipe import Recipe
    from lmmono.reporting.figures import pareto
    from lmmono.reporting.tables import comparison
    from lmmono.robust.outcomes import Outcomes
    from lmmono.robust.runs import robustness_run
    from lmmono.robust.study import robustness
    from lmmono.run import Run, open_run
    from lmmono.scoring.audit import Audit, audit_scorer
    from lmmono.scoring.differences import Difference, compare
    from lmmono.scoring.neuronpedia import export_neuronpedia
    from lmmono.scoring.openai_results import export_simulations
    from lmmono.scoring.runs import score_run
    from lmmono.scoring.scores import Scores, score
    from lmmono.training import train

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
    "capture_run",
    "compare",
    "comparison",
    "dictionary_run",
    "evaluate",
    "explain",
    "explain_run",
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
    "robustness_run",
    "run_with_cache",
    "run_with_edit",
    "run_with_sae",
    "sample",
    "score",
    "score_run",
    "shuffled",
    "stability",
    "store_latents",
    "train",
    "untrained",
]

_HOMES = {
    "capturing": ("capture", "capture_run"),
    "data.tokens": ("TokenCorpus", "TokenRows"),
    "dictionary.classical": ("Classical",),
    "dictionary.controls": ("Control", "shuffled"),
    "dictionary.estimator": ("Dictionary", "load_dictionary"),
    "dictionary.evaluation": ("SAEReport", "evaluate"),
    "dictionary.hub": ("load_from_hub", "push_dictionary"),
    "dictionary.interchange": ("export_dictionary", "import_dictionary"),
    "dictionary.live": ("model_vectors",),
    "dictionary.recovery": ("recovery",),
    "dictionary.runs": ("dictionary_run",),
    "dictionary.sae": ("SAE", "fit_together"),
    "dictionary.splicing": ("run_with_sae",),
    "dictionary.stability": ("stability",),
    "errors": ("LmmonoError",),
    "explaining.explanations": ("Explanations", "explain"),
    "explaining.llm_ranking": ("Ranking",),
    "explaining.local": ("LocalClient",),
    "explaining.records": ("Counts",),
    "explaining.replay": ("ReplayClient",),
    "explaining.runs": ("explain_run",),
    "explaining.sampling": ("Sample", "sample"),
    "explaining.server": ("ServerClient",),
    "explaining.server_limits": ("Limits", "Price"),
    "generation": ("generate",),
    "latents": ("store_latents",),
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
    "models.untrained": ("untrained",),
    "recipe": ("Recipe",),
    "reporting.figures": ("pareto",),
    "reporting.tables": ("comparison",),
    "robust.outcomes": ("Outcomes",),
    "robust.runs": ("robustness_run",),
    "robust.study": ("robustness",),
    "run": ("Run", "open_run"),
    "scoring.audit": ("Audit", "audit_scorer"),
    "scoring.runs": ("score_run",),
    "scoring.differences": ("Difference", "compare"),
    "scoring.neuronpedia": ("export_neuronpedia",),
    "scoring.openai_results": ("export_simulations",),
    "scoring.scores": ("Scores", "score"),
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
