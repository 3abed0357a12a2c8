"""The settings of objectives: loss terms with a weight and a schedule, by their `kind`.

Each kind is a record of `lmmono.registry.methods`, whose home computes the term.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmmono.recipe.section import Count, Fraction, OneOf, Section, clash, named_by
from lmmono.registry.suites import TEXT_CORRUPTIONS


class ObjectiveSettings(Section):
    """What every objective has: a name, a weight and a schedule."""

    kind: Any
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
    # no multiple of the model's: at 20 times 5e-4 every attribute died (docs/log.md)
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """Highest learning rate of its own weights, which begin at random, whatever the model's is."""
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


LogitMeasure = Literal[
    "symmetric_kl",
    "half_symmetric_kl",
    "kl",
    "js",
    "squared_logits",
    "squared_probabilities",
    "cosine",
]
"""How far two distributions are apart; see `lmmono.methods.distances`."""

EMBEDDING_NOISE = ("embedding_gaussian", "embedding_dropout")
"""Perturbations of token embeddings."""

AMOUNTS = {"embedding_gaussian": 0.2, "embedding_dropout": 0.1, "token_replace": 0.1}
"""What `amount` is where none is given."""

SEVERITY = 3
"""Severity of a noise of texts where none is given."""

PERTURBATIONS = (*TEXT_CORRUPTIONS, *AMOUNTS)


class Perturbation(Section, json_schema_extra={"type": ["string", "object"]}):
    """A change that leaves the meaning; one with its own settings is written as its name alone."""

    kind: Annotated[str, OneOf(PERTURBATIONS)]
    """A noise of texts (`docs/robustness.md`), or noise on token embeddings, or other tokens."""
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    """Strength of a noise of texts; null takes 3."""
    size: Annotated[float, Field(gt=0.0)] | None = None
    """`embedding_gaussian`: deviation over the embeddings' root mean square, 0.2 by default;
    `embedding_dropout`, `token_replace`: share of coordinates or tokens, 0.1."""

    @model_validator(mode="after")
    def _check_strength(self) -> "Perturbation":
        is_text = self.kind in TEXT_CORRUPTIONS
        if is_text and self.size is not None:
            raise clash(f"{self.kind} is a noise of texts; want a severity, 1 to 5", "size")
        if not is_text and self.severity is not None:
            raise clash(f"{self.kind} has no severity; want a size", "severity")
        if self.kind in ("embedding_dropout", "token_replace") and self.amount >= 1.0:
            raise clash(f"{self.kind} wants a share below 1", "size")
        return self

    @property
    def strength(self) -> int:
        """Severity of a noise of texts."""
        return self.severity or SEVERITY

    @property
    def amount(self) -> float:
        """Strength of what is no noise of texts."""
        return AMOUNTS.get(self.kind, 0.0) if self.size is None else self.size

    @property
    def title(self) -> str:
        """Name in columns: the kind with its strength."""
        if self.kind in TEXT_CORRUPTIONS:
            return f"{self.kind}_{self.strength}"
        return self.kind if self.size is None else f"{self.kind}_{self.size:g}"


class LogitDistance(Section):
    """Of what the model says."""

    on: Literal["logits"] = "logits"
    weight: float = 1.0
    """Share in the sum of distances."""
    measure: LogitMeasure = "symmetric_kl"
    """Which distance; the mean over texts, or over the tokens that were not changed."""


class HiddenDistance(Section):
    """Of streams: 1 - cosine after a layer norm, of texts pooled, of language models per token."""

    on: Literal["hidden"] = "hidden"
    weight: float = 1.0
    """Share in the sum of distances."""
    hooks: tuple[str, ...] | None = None
    """Hook names or globs; null takes the streams after 1/3, 2/3 and all of the blocks."""


class GradientDistance(Section):
    """Of gradients of the loss by token embeddings: 1 - cosine on the tokens that both texts have.

    Needs gradients of gradients, so two more passes: rather with `every_steps: 4`.
    """

    on: Literal["gradients"] = "gradients"
    weight: float = 1.0
    """Share in the sum of distances."""


class AttributeDistance(Section):
    """Of what an interpreter that is trained along, such as `flint`, reads off both."""

    on: Literal["attributes"] = "attributes"
    weight: float = 1.0
    """Share in the sum of distances."""
    of: Literal["attributes", "relevance"] = "attributes"
    """`attributes`: L1 over the sum of L1 norms. `relevance`: 1 - cosine."""


Distance = Annotated[
    LogitDistance | HiddenDistance | GradientDistance | AttributeDistance,
    Field(discriminator="on"),
]


class Continuity(ObjectiveSettings):
    """Small changes that leave the meaning shall change the output little (semantic continuity).

    (1 - augmentation) CE(x) + augmentation CE(x') + weight * sum of distances between x and x'.
    """

    kind: Literal["continuity"] = "continuity"
    perturbations: tuple[Annotated[Perturbation, named_by("kind")], ...] = ()
    """What is done to an input; each step draws one. Others are held out for the battery."""
    distances: tuple[Distance, ...] = Field(
        default_factory=lambda: (LogitDistance(),), min_length=1
    )
    """How far the outputs are apart; the paper's own distance could not be read."""
    augmentation: Fraction = 0.0
    """Share of the main loss that is taken on perturbed inputs; 0.5 with weight 0 is the key
    control: the same augmentation without the constraint."""
    hold_clean: bool = False
    """Let no gradient into the clean side of the distances, as unsupervised augmentation does."""
    warmup_fraction: Fraction = 0.1
    """Share of the steps over which its weight then grows to the full one, in a line."""
    synonyms: str | None = None
    """File of synonyms or word vectors; `planted` for those of the planted language; null takes
    WordNet."""

    @model_validator(mode="after")
    def _check_perturbations(self) -> "Continuity":
        if not self.perturbations:
            message = (
                f"want at least one perturbation, such as typos or embedding_gaussian; there are "
                f"{', '.join(PERTURBATIONS)}"
            )
            raise clash(message, "perturbations")
        titles = [perturbation.title for perturbation in self.perturbations]
        if len(set(titles)) < len(titles):
            raise clash("want each perturbation once", "perturbations")
        return self


class RDrop(ObjectiveSettings):
    """Two passes with dropout shall agree: main loss of both, half their symmetric KL (R-Drop)."""

    kind: Literal["r_drop"] = "r_drop"
    dropout: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Dropout of token embeddings in both passes; null takes the model's own dropout."""


class AdversarialSettings(ObjectiveSettings):
    """What moves token embeddings against the model."""

    ascent_steps: Count = 1
    """Steps uphill before the term is taken; each costs a pass."""


class VirtualAdversarial(AdversarialSettings):
    """KL from the clean output to that at the worst small change of embeddings (VAT)."""

    kind: Literal["vat"] = "vat"
    radius: Annotated[float, Field(gt=0.0)] = 0.15
    """Norm of the change of a text over that of its embeddings."""
    probe: Annotated[float, Field(gt=0.0)] = 0.01
    """The same of the change at which the worst direction is looked for."""


class SmoothAdversarial(AdversarialSettings):
    """Symmetric KL at a changed embedding, each token's change of one largest norm (SMART).

    As in the released code: no Bregman proximal term.
    """

    kind: Literal["smart"] = "smart"
    noise: Annotated[float, Field(gt=0.0)] = 1e-5
    """Standard deviation of the first change."""
    step_size: Annotated[float, Field(gt=0.0)] = 1e-3
    """Length of a step uphill, in the largest norm of a token."""
    radius: Annotated[float, Field(gt=0.0)] | None = None
    """Largest change of a coordinate; null sets no bound, as the released code in effect."""


class FreeLargeBatch(AdversarialSettings):
    """The main loss at changed embeddings, mean over the steps uphill (FreeLB)."""

    kind: Literal["freelb"] = "freelb"
    ascent_steps: Count = 2
    """Passes at changed embeddings, each one a step further uphill."""
    step_size: Annotated[float, Field(gt=0.0)] = 0.1
    """Length of a step uphill, Frobenius norm of a text."""
    start: Annotated[float, Field(ge=0.0)] = 0.6
    """The first change is uniform within this over the square root of its number of coordinates."""
    radius: Annotated[float, Field(gt=0.0)] | None = 0.6
    """Largest Frobenius norm of a text's change; null sets no bound."""


class SmoothedLabels(ObjectiveSettings):
    """The main loss with smoothed labels; Szegedy et al. 2016."""

    kind: Literal["label_smoothing"] = "label_smoothing"
    share: Fraction = 0.1
    """Probability that is spread over all classes."""


class JacobianPenalty(ObjectiveSettings):
    """Squared norm of the Jacobian of logits by token embeddings, by random projections."""

    kind: Literal["jacobian"] = "jacobian"
    projections: Count = 1
    """Random directions of the logits per step; the mean over them is unbiased."""


AnyObjective = Annotated[
    Continuity
    | Decorrelation
    | FlintSettings
    | FreeLargeBatch
    | JacobianPenalty
    | MonoScore
    | RDrop
    | ReversedDeactivation
    | SmoothAdversarial
    | SmoothedLabels
    | SparsePenalty
    | VirtualAdversarial,
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
