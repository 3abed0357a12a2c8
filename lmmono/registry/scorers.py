"""The scorers: what each measures, needs and cites. Adding one is adding a record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmmono.errors import ExplainError
from lmmono.registry.least_densities import COURT
from lmmono.registry.lookup import find, load
from lmmono.registry.scorer_settings import (
    AskedTrialSettings,
    ClassificationSettings,
    DecorrelationSettings,
    EmbeddingSettings,
    FmsSettings,
    FuzzSettings,
    IntervalSettings,
    LabelledItemSettings,
    LabelledSettings,
    PopulationSettings,
    ScorerSettings,
    SimulationSettings,
    StatisticsSettings,
    SteeringSettings,
    SurprisalSettings,
    TrialSettings,
    changed,
)

Need = Literal["explanation", "program", "client", "model", "labels", "encoder"]
"""What a scorer wants besides a store."""

UNGIVEN: tuple[Need, ...] = ("client", "encoder", "labels")
"""What no recipe can give: scorers that need one of these are called from Python."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """One scorer."""

    name: str
    """Name in tables, recipes and on the command line."""
    metrics: tuple[str, ...]
    """Names in `lmmono.registry.metrics.METRICS` that it writes; the first is the headline."""
    home: str
    """`module:function`; takes a `lmmono.scores` job, returns rows of table `all_scores`."""
    needs: tuple[Need, ...]
    """What must be there."""
    chance: float | None
    """Value that guessing gets; None where it depends on the data, see the controls."""
    citation: str
    """Where the algorithm comes from."""
    about: str
    """What it measures, in a sentence."""
    settings: ScorerSettings = field(default_factory=ScorerSettings)
    """Every setting with its default; a preset or a caller may change these and no others."""
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changed settings by name, such as `openai`."""
    seeded: bool = True
    """Whether it draws; the rows of one that does not have no seed."""
    per: Literal["unit", "hook"] = "unit"
    """Whether it writes rows of units, which are summed up, or only rows of hooks."""
    no_sides: str | None = None
    """Why two-sided records have no meaning for it, where it draws records of an explanation."""

    @property
    def reads_explanations(self) -> bool:
        """Whether it scores what is said of a unit, rather than the unit by itself."""
        return bool({"explanation", "program"} & set(self.needs))

    @property
    def argument(self) -> Need | None:
        """The argument that it wants in Python and no recipe can give; None for the others."""
        return next((need for need in UNGIVEN if need in self.needs), None)

    @property
    def least_density(self) -> float | None:
        """Least density of units that it holds for; None where that was never measured.

        Infinite where it passes at no density.
        """
        return least_density(self.metrics[0])

    def load(self) -> Callable[[Any], Any]:
        """Import and return the function that scores."""
        return load(self.home)

    def with_settings(
        self, preset: str | None = None, changes: Mapping[str, Any] | None = None
    ) -> ScorerSettings:
        """Return the settings of a preset, with some changed.

        Raises:
            ExplainError: No such preset or setting, or a value that does not fit.
        """
        if preset is not None and preset not in self.presets:
            presets = ", ".join(self.presets) or "none"
            raise ExplainError(f"{self.name}: no preset {preset!r}; it has: {presets}")
        if self.no_sides is not None and "sides" in (changes or {}):
            raise ExplainError(f"{self.name}: no setting 'sides'; {self.no_sides}")
        of_preset = {} if preset is None else self.presets[preset]
        return changed(self.settings, self.name, {**of_preset, **(changes or {})})


_PAPERS: dict[str, dict[str, Any]] = {
    "openai": {"protocol": "openai"},
    "openai_crate": {"protocol": "openai_crate"},
}

_RANKED: dict[str, dict[str, Any]] = {"ranked": {"ranked": True}}

_RATES = ("", "_auroc", "_average_precision")

_SIDED = ("_recall", "_precision", "_f1", "_weighted")
"""Written where setting `sides` names some."""

_MEASURES = ("", "_spearman", "_r2", "_uncentred_r2", "_deviation")

_ALL = (
    Scorer(
        "token_selectivity",
        ("token_selectivity",),
        "lmmono.scores.unit_statistics:score_token_selectivity",
        needs=(),
        chance=None,
        citation="own; a normalised conditional entropy",
        about="how few kinds of token carry a unit's activation",
        seeded=False,
    ),
    Scorer(
        "simulation_tar",
        tuple(f"simulation_tar{name}" for name in (*_MEASURES, *_SIDED)),
        "lmmono.scores.simulation:score_top_and_random",
        needs=("explanation",),
        chance=0.0,
        citation="Bills et al. 2023, Language models can explain neurons in language models",
        about="agreement of simulated and true activations on top and random records together",
        settings=SimulationSettings(),
        presets=_PAPERS,
    ),
    Scorer(
        "simulation_random",
        tuple(f"simulation_random{name}" for name in (*_MEASURES, *_SIDED)),
        "lmmono.scores.simulation:score_random",
        needs=("explanation",),
        chance=0.0,
        citation="Bills et al. 2023, Language models can explain neurons in language models",
        about="agreement of simulated and true activations on random records, firing or not",
        settings=SimulationSettings(),
        presets=_PAPERS,
    ),
    Scorer(
        "population",
        (
            "population_f1",
            "population_precision",
            "population_recall",
            "population_iou",
            "population_auprc",
            "population_cosine",
            "population_pearson",
        ),
        "lmmono.scores.population:score_population",
        needs=("program",),
        chance=0.0,
        citation="NeuronEval (arXiv 2506.05774): the measures that hold for rare units",
        about="agreement of predicted and true activations on every stored token",
        settings=PopulationSettings(),
        no_sides="it draws no records but reads every stored token",
    ),
    Scorer(
        "detection",
        (
            *(f"{name}{end}" for name in ("detection", "detection_near_miss") for end in _RATES),
            *(f"detection{name}" for name in _SIDED),
        ),
        "lmmono.scores.classification:detect",
        needs=("explanation",),
        chance=0.5,
        citation="Paulo et al. 2024 (arXiv 2410.13928); near misses: own",
        about="telling records in which the unit fires from silent ones by its explanation",
        settings=ClassificationSettings(),
        presets=_RANKED,
    ),
    Scorer(
        "fuzz",
        (
            *(f"{name}{end}" for name in ("fuzz", "fuzz_active") for end in _RATES),
            *(f"fuzz{name}" for name in _SIDED[:3]),
        ),
        "lmmono.scores.classification:fuzz",
        needs=("explanation",),
        chance=0.5,
        citation="Paulo et al. 2024 (arXiv 2410.13928)",
        about="telling by the explanation whether marked tokens are those on which the unit fires",
        settings=FuzzSettings(),
        presets=_RANKED,
    ),
    Scorer(
        "unit_statistics",
        (
            "unit_kurtosis",
            "unit_density",
            "monosemanticity_scale",
            "token_purity",
            "ngram_consistency",
        ),
        "lmmono.scores.unit_statistics:score_statistics",
        needs=(),
        chance=None,
        citation="moments: textbook; scale: arXiv 2312.11560; tokens and n-grams: own",
        about="how rarely a unit fires, how far it stands out, and on how few tokens and n-grams",
        settings=StatisticsSettings(),
        seeded=False,
    ),
    Scorer(
        "feature_decorrelation",
        ("feature_decorrelation", "unit_correlation"),
        "lmmono.scores.decorrelation:score_decorrelation",
        needs=(),
        chance=None,
        citation="Yan et al. 2024 (arXiv 2406.17969); units: Zbontar et al. 2021, Barlow Twins",
        about="how little the activations of different tokens, and different units, are alike",
        settings=DecorrelationSettings(),
        per="hook",
    ),
    Scorer(
        "labelled",
        (
            "semantic_consistency",
            "semantic_consistency_raw",
            "semantic_consistency_top",
            "semantic_consistency_top_raw",
            "class_selectivity",
        ),
        "lmmono.scores.labelled:score_labelled",
        needs=("labels",),
        chance=0.0,
        citation="arXiv 2410.21331; chance correction: own; Morcos et al. 2018 (arXiv 1803.06959)",
        about="how well a unit keeps to one concept of given labels, raw and beyond chance",
        settings=LabelledSettings(),
    ),
    Scorer(
        "sparse_probing",
        ("sparse_probing_auc_1", "sparse_probing_auc_2", "sparse_probing_auc_5"),
        "lmmono.scores.unit_probing:score_probes",
        needs=("labels",),
        chance=0.5,
        citation="Gurnee et al. 2023 (arXiv 2305.01610)",
        about="how much of a concept the best 1, 2 or 5 units of a hook hold",
        settings=LabelledItemSettings(),
        per="hook",
    ),
    Scorer(
        "fms",
        ("fms", "fms_corrected"),
        "lmmono.scores.unit_probing:score_fms",
        needs=("labels",),
        chance=None,
        citation="Härle et al. 2025 (arXiv 2506.19382)",
        about="whether one unit holds a concept, and nothing but that unit does",
        settings=FmsSettings(),
        per="hook",
    ),
    Scorer(
        "intruder",
        ("intruder",),
        "lmmono.scores.intruder:score_by_client",
        needs=("client",),
        chance=0.2,
        citation="Paulo et al. 2024 (arXiv 2410.13928)",
        about="whether a language model finds the one record of five that has no true marks",
        settings=AskedTrialSettings(),
        presets=_RANKED,
        no_sides="it reads no explanation, so that nothing is predicted",
    ),
    Scorer(
        "intruder_program",
        ("intruder_program",),
        "lmmono.scores.intruder:score_by_programs",
        needs=("program",),
        chance=0.2,
        citation="Paulo et al. 2024 (arXiv 2410.13928), with a program for the judge",
        about="whether an explanation's program predicts least for the one record of five",
        settings=TrialSettings(),
        presets=_RANKED,
        no_sides="a trial says which record is weakest, not whether the unit fires in one",
    ),
    Scorer(
        "anthropic_intervals",
        tuple(f"anthropic_intervals{name}" for name in ("", *_SIDED)),
        "lmmono.scores.anthropic_intervals:score_intervals",
        needs=("explanation",),
        chance=0.0,
        citation="Bricken et al. 2023, Towards Monosemanticity",
        about="rank agreement of predicted and true activations on examples of all levels",
        settings=IntervalSettings(),
    ),
    Scorer(
        "effect",
        ("ablation_kl", "steering_kl", "steering_strength"),
        "lmmono.scores.intervention:score_effects",
        needs=("model",),
        chance=None,
        citation="Paulo et al. 2024 (arXiv 2410.13928); strength by matched KL",
        about="how much a unit changes the next token, and which tokens it promotes",
        settings=SteeringSettings(),
    ),
    Scorer(
        "intervention",
        ("intervention", "intervention_own"),
        "lmmono.scores.intervention:score_interventions",
        needs=("program", "model"),
        chance=0.0,
        citation="after Paulo et al. 2024 (arXiv 2410.13928), with a program for the reader",
        about="whether steering a unit promotes the tokens that its explanation predicts",
        settings=SteeringSettings(),
    ),
    Scorer(
        "embedding",
        ("embedding", "embedding_near_miss", *(f"embedding{name}" for name in _SIDED)),
        "lmmono.scores.embedding:score_embedding",
        needs=("explanation", "encoder"),
        chance=0.5,
        citation="Paulo et al. 2024 (arXiv 2410.13928)",
        about="whether the explanation lies nearer to texts in which the unit fires",
        settings=EmbeddingSettings(),
        presets=_RANKED,
    ),
    Scorer(
        "surprisal",
        ("surprisal", "surprisal_near_miss", *(f"surprisal{name}" for name in _SIDED)),
        "lmmono.scores.surprisal:score_surprisal",
        needs=("explanation", "client"),
        chance=0.5,
        citation="Paulo et al. 2024 (arXiv 2410.13928)",
        about="whether the explanation makes a model expect texts in which the unit fires",
        settings=SurprisalSettings(),
        presets=_RANKED,
    ),
)

OWN_CONTROLS = (
    "matched_density",
    "random_direction",
    "random_explanation",
    "shuffled",
    "shuffled_labels",
    "shuffled_pairing",
)
"""Controls that scorers make of a unit by themselves; every scorer makes one of them at least. The
names of control runs are free."""

SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _ALL}
"""Scorers by name; adding one is adding a record."""


def least_density(metric: str) -> float | None:
    """Return the least density at which a metric ranks true explanations of exact units first.

    None where it never came before the court (`benchmarks/court.py`), infinite where it passes at
    no density. Other measures of a scorer, such as `simulation_tar_r2`, hold as its headline does.
    """
    name = metric.removesuffix("_defined")
    if name.endswith(_SIDED):  # both simulations draw the same records of each side
        name = name.replace("simulation_random_", "simulation_tar_")
    if name not in COURT:
        of = [scorer.metrics[0] for scorer in SCORERS.values() if name in scorer.metrics]
        name = of[0] if of else name
    least = COURT.get(name)
    if least is None:
        return None
    return float("inf") if least["exact"] is None else least["exact"]


def find_scorer(name: str) -> Scorer:
    """Return the scorer of a name.

    Raises:
        ExplainError: There is none; says which are near.
    """
    return find("scorer", name, SCORERS, ExplainError)
