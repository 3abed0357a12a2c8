"""The settings of explaining and scoring, and the names that they may hold.

Holds names alone, so that `lmmono check` knows them without what they stand for; a test compares
them with the registries.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from lmmono.errors import nearest
from lmmono.recipe.sections import Count, Section, clash

ExplainerName = Literal[
    "token_lookup", "context_rules", "context_boosted", "random_explanation", "constant"
]
"""Explainers that need nothing but a store; the others ask a language model, from Python."""

Protocol = Literal["openai", "openai_crate"]
"""Records as in a paper."""

PRESETS: dict[str, tuple[str, ...]] = {
    "token_selectivity": (),
    "simulation_tar": get_args(Protocol),
    "simulation_random": get_args(Protocol),
    "detection": ("ranked",),
    "fuzz": ("ranked",),
    "unit_statistics": (),
    "feature_decorrelation": (),
    "intruder_program": ("ranked",),
    "anthropic_intervals": (),
    "effect": (),
    "intervention": (),
}
"""Scorers that need no language model and no labels, with their presets."""

UNEXPLAINED = frozenset({"token_selectivity", "unit_statistics", "feature_decorrelation", "effect"})
"""Scorers that score a unit by itself, without what is said of it."""

ELSEWHERE = {
    "intruder": "client",
    "surprisal": "client",
    "embedding": "encoder",
    "labelled": "labels",
    "sparse_probing": "labels",
    "fms": "labels",
    "llm_token_act_pair": "client",
    "llm_max_act": "client",
    "llm_contrastive": "client",
}
"""Explainers and scorers that no recipe can name, with the argument that they want in Python."""


class Explain(Section):
    """Which units are explained, and by what."""

    hooks: tuple[str, ...] | None = None
    """Hook names or globs, of those stored as rows; null takes all, latents included."""
    units: Count | None = None
    """Units of every hook, drawn by the run's seed; null takes all."""
    explainers: tuple[ExplainerName, ...] = ()
    """Explainers, in the order they work; none by default."""
    presets: tuple[Protocol, ...] = ()
    """Explain also from the records of these papers, for scorers with the same preset."""
    window: Count = 64
    """Most tokens per excerpt; presets have their own."""

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_there(cls, values: Any) -> Any:
        given = values.get("explainers", ()) if isinstance(values, dict) else ()
        for i, name in enumerate(given if isinstance(given, tuple | list) else ()):
            if name in ELSEWHERE:
                raise _elsewhere(name, f"explainers.{i}", "explain", "explainer")
        return values

    @model_validator(mode="after")
    def _check_order(self) -> "Explain":
        for i, name in enumerate(self.explainers):
            if name in self.explainers[:i]:
                raise clash("want every explainer once", f"explainers.{i}", "explainers")
            if name == "random_explanation" and "token_lookup" not in self.explainers[:i]:
                message = "random_explanation deals out those of token_lookup; name that before it"
                raise clash(message, f"explainers.{i}", "explainers")
        if "random_explanation" in self.explainers and self.window != 64:
            raise clash("random_explanation wants the window of 64", "window", "explainers")
        return self


def _elsewhere(name: str, field: str, verb: str, kind: str) -> PydanticCustomError:
    wanted = ELSEWHERE[name]
    way_out = f"lm.{verb}(store, {kind}={name!r}, {wanted}=...)"
    return clash(f"{name} wants {wanted}, which no recipe can give; in Python: {way_out}", field)


class Scoring(
    Section,
    json_schema_extra={
        "type": ["string", "object"],
        "if": {"type": "string"},
        "then": {"enum": list(PRESETS)},
    },
):
    """A scorer with its preset; one without is written as its name alone."""

    name: str = Field(json_schema_extra={"enum": list(PRESETS)})
    """The scorer; see `lmmono ls scorers`."""
    preset: str | None = None
    """Settings as in a paper; null takes the scorer's own."""

    @model_validator(mode="after")
    def _check_names(self) -> "Scoring":
        if self.name in ELSEWHERE:
            raise _elsewhere(self.name, "name", "score", "scorer")
        if self.name not in PRESETS:
            raise clash(f"want a scorer, got {self.name!r}; {nearest(self.name, PRESETS)}", "name")
        known = PRESETS[self.name]
        if self.preset is not None and self.preset not in known:
            way_out = nearest(self.preset, known) if known else "it has none"
            raise clash(f"{self.name} has no preset {self.preset!r}; {way_out}", "preset")
        return self

    @property
    def explained(self) -> bool:
        """Whether it scores explanations."""
        return self.name not in UNEXPLAINED


def _named(entry: Any) -> Any:
    return entry if isinstance(entry, dict | Scoring) else {"name": entry}


class Score(Section):
    """What is measured on the units, and on what was said of them."""

    scorers: tuple[Annotated[Scoring, BeforeValidator(_named)], ...] = (
        Scoring(name="token_selectivity"),
    )
    """Scorers, by name or with a preset."""
    controls: bool = True
    """Score the controls too; about four times the work for scorers of explanations."""

    @model_validator(mode="after")
    def _check_once(self) -> "Score":
        for i, scoring in enumerate(self.scorers):
            if scoring in self.scorers[:i]:
                raise clash("want every scorer and preset once", f"scorers.{i}", "scorers")
        return self


def unexplained_clash(explain: Explain, score: Score) -> PydanticCustomError | None:
    """Return the fault of a scorer of explanations where none are made, if there is one."""
    for i, scoring in enumerate(score.scorers):
        if scoring.explained and not explain.explainers:
            message = f"{scoring.name} scores explanations, and explain.explainers names none"
            return clash(message, f"score.scorers.{i}", "score.scorers")
        if scoring.preset in get_args(Protocol) and scoring.preset not in explain.presets:
            message = f"preset {scoring.preset} wants {scoring.preset} in explain.presets too"
            return clash(message, f"score.scorers.{i}.preset", "explain.presets")
    return None
