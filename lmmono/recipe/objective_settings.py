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


AttributePooling = Literal["mean", "max", "last", "lse", "attn"]
FlintHead = Literal["nonneg", "signed"]
FlintDecoder = Literal["bow", "embed", "token"]
Weight = Annotated[float, Field(ge=0.0)]

FLINT_VARIANTS: dict[str, dict[str, object]] = {
    "text": {"head": "nonneg", "diversity": "norm", "diversity_weight": 0.05},
    "paper": {"head": "signed", "diversity": "paper", "diversity_weight": 0.2},
}
"""What a variant decides unless it is set. `paper` is the authors' setting for MNIST."""


class FlintSettings(ObjectiveSettings):
    """Attributes of a classifier's layers, from which a linear model gives the same classes.

    FLINT, arXiv 2010.09345, for text.
    """

    kind: Literal["flint"] = "flint"
    variant: Literal["text", "paper"] = "text"
    """What unset fields come to. `paper`: a signed head, the paper's diversity at weight 0.2, as
    for MNIST. `text`: a head without negative weights, diversity `norm` at weight 0.05."""
    layers: tuple[int | str, ...] | None = Field(default=None, min_length=1)
    """Blocks whose output is read, from 0, or names of hooks; null takes the one at two thirds of
    the blocks and the last but one."""
    n_attributes: Count = 24
    """Attributes. Above 64 the entropies have next to no gradient; it is said, not refused."""
    pooling: AttributePooling | None = None
    """How acts on tokens become the attribute of a text; null takes the classifier's pooling, and
    another one costs agreement."""
    head: FlintHead | None = None
    """`nonneg`: no negative weight, so that attributes speak for classes only; `signed`: any."""
    decoder: FlintDecoder = "bow"
    """What attributes must tell of the text: `bow` its content words, `embed` their mean embedding,
    `token` each act its token."""
    n_words: Annotated[int, Field(ge=1, le=10_000)] = 2000
    """Most content words of decoders `bow` and `embed`."""
    min_documents: Count = 3
    """Training texts that a content word must be in."""
    fidelity: Literal["teacher", "paper"] = "teacher"
    """`teacher`: the interpreter learns from the classifier, as the authors' code has it; `paper`:
    the target is the interpreter, as the paper writes it."""
    diversity: Literal["norm", "paper", "mi"] | None = None
    """How even use is measured; see `docs/methods.md`."""
    fidelity_weight: Weight = 0.5
    """Weight of agreement with the classifier."""
    decoder_weight: Weight | None = None
    """Weight of the decoder's loss; null takes 1 for `embed` and 0.1 for the others, whose loss is
    in nats."""
    conciseness_weight: Weight = 0.2
    """Weight of the entropy of a text's attributes."""
    diversity_weight: Weight | None = None
    """Weight of the evenness of use."""
    l1_weight: Weight = 0.1
    """Weight of the mean attribute; never of their sum, which kills all of them."""
    entropy_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """What attributes are multiplied by before the softmax of the entropy; log n_attributes gives
    it a gradient at small acts."""
    diversity_memory: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the running mean in what diversity is measured on; for batches of fewer texts than
    attributes."""
    fidelity_from: Fraction = 0.15
    """Share of the steps before agreement and the mean attribute count."""
    entropies_from: Fraction = 0.25
    """Share of the steps before the entropies begin."""
    entropies_full: Fraction = 0.4
    """Share of the steps from which they have their whole weight."""
    d_hidden: Count = 256
    """Width between the layers and the attributes."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Dropout of attributes before the head."""
    lr_scale: Annotated[float, Field(gt=0.0)] = 20.0
    """Learning rate of its own weights, which begin at random, over that of the model's."""
    weight_decay: Weight = 0.1
    """Weight decay of its own weights: without it the decoder of a small set learns it by heart."""
    detach_inputs: bool = False
    """Keep its losses from the model's weights, which then learn the classes alone."""

    @model_validator(mode="after")
    def _check_schedule(self) -> "FlintSettings":
        if self.entropies_full < self.entropies_from:
            raise clash(
                f"want entropies_from ({self.entropies_from}) or more, got {self.entropies_full}",
                "entropies_full",
                "entropies_from",
            )
        return self

    def decided(self, name: str) -> object:
        """Return a field, or what the variant makes of it where it is not set."""
        value = getattr(self, name)
        return FLINT_VARIANTS[self.variant][name] if value is None else value


AnyObjective = Annotated[
    Decorrelation | FlintSettings | MonoScore | ReversedDeactivation | SparsePenalty,
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
