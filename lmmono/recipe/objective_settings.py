"""The settings of objectives: loss terms with a weight and a schedule, by their `kind`.

Each kind is a record of `lmmono.registry.methods`, whose home computes the term.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmmono.recipe.base import Count, Fraction, Section, clash


class ObjectiveSettings(Section):
    """What every objective has: a name, a weight and a schedule."""

    kind: str
    """Which objective."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """Name of its column; null takes the kind. Two of one kind need different names."""
    weight: float = 1.0
    """What the term is multiplied by; 0 only measures it, a negative weight turns it round."""
    start_fraction: Fraction = 0.0
    """Share of the steps before it begins."""
    warmup_fraction: Fraction = 0.0
    """Share of the steps over which its weight then grows to the full one, in a line."""
    every_steps: Count = 1
    """It is part of every so-many-th step; its weight stays as it is."""

    @property
    def title(self) -> str:
        """Name of its column."""
        return self.name or self.kind


class OnHooks(ObjectiveSettings):
    """An objective that reads activations."""

    hooks: tuple[str, ...] = Field(default=("blocks.*.mlp.hook_post",), min_length=1)
    """Hook names or globs; the term is the mean over them."""


class Decorrelation(OnHooks):
    """Correlated units of a hook are pushed apart, which raises monosemanticity (DecPO's idea)."""

    kind: Literal["decorrelation"] = "decorrelation"
    form: Literal["features", "samples"] = "features"
    """`features`: squared correlations of pairs of units over tokens. `samples`: squared cosines of
    pairs of tokens over units, the form nearest to the released code of DecPO."""
    max_tokens: Count = 1024
    """Tokens of a step that are compared with each other in form `samples`, drawn at random."""


class SparsePenalty(OnHooks):
    """Few active units per token: the L1 norm, or Hoyer's scale-free measure."""

    kind: Literal["sparsity"] = "sparsity"
    measure: Literal["l1", "hoyer"] = "l1"
    """`l1`: mean |a|. `hoyer`: 1 minus Hoyer's sparseness of a token's activations."""


class MonoScore(OnHooks):
    """Units that fire on tokens of near embeddings: 1 minus the mean MonoScore."""

    kind: Literal["mono_score"] = "mono_score"
    embedding: str = "hook_embed"
    """Hook whose activation, held, stands for a token; the paper has a frozen encoder of images."""


class ReversedDeactivation(OnHooks):
    """The most monosemantic activations are put to their mean in training passes (MEmeL)."""

    kind: Literal["reversed_deactivation"] = "reversed_deactivation"
    variant: Literal["reversed", "naive"] = "reversed"
    """`reversed`: with the gradient turned round. `naive`: without a gradient."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Share of a token's neurons; one at least."""
    memory: Fraction = 0.99
    """Share of the running means and variances that a step leaves."""

    @model_validator(mode="after")
    def _check_weight(self) -> "ReversedDeactivation":
        if self.weight != 1.0:
            message = "it changes the pass and has no term to weigh; change share, or leave it out"
            raise clash(message, "weight")
        return self


AnyObjective = Annotated[
    Decorrelation | MonoScore | ReversedDeactivation | SparsePenalty,
    Field(discriminator="kind"),
]
"""Settings of an objective, by its kind. A new kind is a class here and a record in
`lmmono.registry.methods`."""


def raise_equal_names(objectives: Sequence[ObjectiveSettings], field: str = "objectives") -> None:
    """Check that every objective of a training has a column of its own.

    Raises:
        PydanticCustomError: Two have one name.
    """
    titles = [objective.title for objective in objectives]
    for i, title in enumerate(titles):
        if title in titles[:i]:
            message = f"two objectives are called {title}; give one a name"
            raise clash(message, f"{field}.{i}.name", f"{field}.{i}.kind")
