"""The settings of explaining and scoring; names and presets come from `lmmono.registry`."""

from typing import Annotated, Any, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from lmmono.errors import ExplainError, nearest
from lmmono.recipe.section import Count, OneOf, Section, clash, named_by
from lmmono.registry.explainers import EXPLAINERS, ProtocolName
from lmmono.registry.scorers import SCORERS

ExplainerName = Annotated[
    str, OneOf(name for name, explainer in EXPLAINERS.items() if not explainer.needs)
]
"""Explainers that need nothing but a store; the others ask a language model, from Python."""

RUNNABLE = {name: scorer for name, scorer in SCORERS.items() if scorer.argument is None}
"""Scorers that a recipe can name: they need no language model, no labels and no encoder."""


class Explain(Section):
    """Which units are explained, and by what."""

    hooks: tuple[str, ...] | None = None
    """Hook names or globs, of those stored as rows; null takes all, latents included."""
    units: Count | None = None
    """Units of every hook, drawn by the run's seed; null takes all."""
    explainers: tuple[ExplainerName, ...] = ()
    """Explainers, in the order they work; none by default."""
    presets: tuple[ProtocolName, ...] = ()
    """Explain also from the records of these papers, for scorers with the same preset."""
    window: Count = 64
    """Most tokens per excerpt; presets have their own."""

    @model_validator(mode="before")
    @classmethod
    def _name_what_is_there(cls, values: Any) -> Any:
        explainers: Any = values.get("explainers") if isinstance(values, dict) else None
        names: tuple[Any, ...] = tuple(explainers) if isinstance(explainers, tuple | list) else ()
        for i, name in enumerate(names):
            record = EXPLAINERS.get(name) if isinstance(name, str) else None
            if record is not None and record.needs:
                raise _from_python(name, record.needs[0], f"explainers.{i}", "explain", "explainer")
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


def _from_python(name: str, wanted: str, field: str, verb: str, kind: str) -> PydanticCustomError:
    way_out = f"lm.{verb}(store, {kind}={name!r}, {wanted}=...)"
    return clash(f"{name} wants {wanted}, which no recipe can give; in Python: {way_out}", field)


class Scoring(
    Section,
    json_schema_extra={
        "type": ["string", "object"],
        "if": {"type": "string"},
        "then": {"enum": list(RUNNABLE)},
    },
):
    """A scorer with its preset; one without is written as its name alone."""

    name: str = Field(json_schema_extra={"enum": list(RUNNABLE)})
    """The scorer; see `lmmono ls scorers`."""
    preset: str | None = None
    """Settings as in a paper; null takes the scorer's own."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Changed settings of the scorer; see the tables of scorers below."""

    @model_validator(mode="after")
    def _check_names(self) -> "Scoring":
        scorer = SCORERS.get(self.name)
        if scorer is None:
            raise clash(f"want a scorer, got {self.name!r}; {nearest(self.name, RUNNABLE)}", "name")
        if scorer.argument is not None:
            raise _from_python(self.name, scorer.argument, "name", "score", "scorer")
        if self.preset is not None and self.preset not in scorer.presets:
            way_out = nearest(self.preset, scorer.presets)
            raise clash(f"{self.name} has no preset {self.preset!r}; {way_out}", "preset")
        try:
            scorer.with_settings(self.preset, self.settings)
        except ExplainError as fault:
            raise clash(str(fault), "settings") from None
        return self

    @property
    def explained(self) -> bool:
        """Whether it scores explanations."""
        return SCORERS[self.name].reads_explanations


class Score(Section):
    """What is measured on the units, and on what was said of them."""

    scorers: tuple[Annotated[Scoring, named_by("name")], ...] = Field(
        default_factory=lambda: (Scoring(name="token_selectivity"),)
    )
    """Scorers, by name or with a preset."""
    controls: bool = True
    """Score the controls too; about four times the work for scorers of explanations."""
    step_rows: bool = True
    """Keep the activations of kept steps (`train.keep`) and of the untrained control once they are
    scored; false drops them, and their statistics, exemplars, explanations and scores stay."""

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
        if scoring.preset in get_args(ProtocolName) and scoring.preset not in explain.presets:
            message = f"preset {scoring.preset} wants {scoring.preset} in explain.presets too"
            return clash(message, f"score.scorers.{i}.preset", "explain.presets")
    return None
