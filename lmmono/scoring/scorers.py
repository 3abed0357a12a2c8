"""The scorers that there are; adding one is adding an entry."""

from typing import Any

from lmmono.scoring.registry import SCORERS, Scorer

_SIMULATION: dict[str, Any] = {
    "top": 20,
    "random": 20,
    "window": 64,
    "protocol": None,
    "simulator": "program",
}

_PAPERS: dict[str, dict[str, Any]] = {
    "openai": {"protocol": "openai"},
    "openai_crate": {"protocol": "openai_crate"},
}

_MEASURES = ("", "_spearman", "_r2", "_uncentred_r2", "_deviation")

for scorer in (
    Scorer(
        "token_selectivity",
        ("token_selectivity",),
        "statistics:token_selectivity",
        needs=(),
        chance=None,
        citation="own; a normalised conditional entropy",
        about="how few kinds of token carry a unit's activation",
        seeded=False,
    ),
    Scorer(
        "simulation_tar",
        tuple(f"simulation_tar{name}" for name in _MEASURES),
        "simulation:score_top_and_random",
        needs=("explanation",),
        chance=0.0,
        citation="Bills et al. 2023, Language models can explain neurons in language models",
        about="agreement of simulated and true activations on top and random records together",
        settings=_SIMULATION,
        presets=_PAPERS,
    ),
    Scorer(
        "simulation_random",
        tuple(f"simulation_random{name}" for name in _MEASURES),
        "simulation:score_random",
        needs=("explanation",),
        chance=0.0,
        citation="Bills et al. 2023, Language models can explain neurons in language models",
        about="agreement of simulated and true activations on random records, firing or not",
        settings=_SIMULATION,
        presets=_PAPERS,
    ),
):
    SCORERS[scorer.name] = scorer
