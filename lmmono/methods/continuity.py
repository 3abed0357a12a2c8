"""Semantic continuity (2011.09789) on text: the constraint as an objective.

Only the abstract of the paper, its first paragraphs and the form of its loss could be read: L =
task + alpha * D(x, x'). Which distance, which perturbations and which alpha the paper has is not
known, so all of them are settings here, and none is "the paper's".
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lmmono.errors import TrainError
from lmmono.methods.distances import (
    LOGIT_DISTANCES,
    aligned,
    attribute_distance,
    cosine_distance,
    gradient_distance,
    normed_cosine,
)
from lmmono.methods.perturbations import Perturbed, Perturbing
from lmmono.models.hooks import hook_names
from lmmono.recipe.objective_settings import (
    AttributeDistance,
    Continuity,
    Distance,
    GradientDistance,
    HiddenDistance,
    LogitDistance,
)
from lmmono.training.objectives import (
    AttributeMap,
    Loss,
    Objective,
    ObjectiveContext,
    Outputs,
    Step,
    TrainingBatch,
)

GUARD = ("confidence", "feature_variance")
"""Columns that show a collapse: the mean of the largest probability, and the mean variance over a
batch of what the head reads. A constraint that lowers either a lot makes the model say less."""


def guard(step: Step) -> dict[str, Tensor]:
    """Return the columns `GUARD` of the main pass."""
    outputs = step.outputs
    logits = counted(outputs.logits, step.batch.is_token).detach().float()
    features = logits if outputs.features is None else outputs.features.detach().float()
    variance = features.var(dim=0, correction=0).mean()
    return {"confidence": logits.softmax(dim=-1).amax(dim=-1).mean(), "feature_variance": variance}


def counted(
    logits: Float[Tensor, "batch *shape"], chosen: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "n c"]:
    """Return logits as rows: one per text, or of language models one per chosen token."""
    return logits if logits.ndim == 2 else logits[chosen]


def unchanged(batch: TrainingBatch, other: TrainingBatch) -> Bool[Tensor, "batch pos"]:
    """Return the tokens that a length-preserving perturbation left as they were."""
    return batch.is_token & (batch.ids == other.ids)


class ContinuityTerm(Objective):
    """Distances between what a model makes of an input and of the same input perturbed."""

    def __init__(self, settings: Continuity, context: ObjectiveContext) -> None:
        """Take what is perturbed and what is compared.

        Raises:
            TrainError: A perturbation or a distance does not fit what is trained.
            ModelError: A hook matches nothing.
            DataError: There are no synonyms.
        """
        super().__init__()
        self.settings = settings
        self._perturbing = [
            Perturbing(perturbation, context, settings.synonyms)
            for perturbation in settings.perturbations
        ]
        self._distances: list[tuple[Distance, tuple[str, ...]]] = []
        for distance in settings.distances:
            needs_texts = isinstance(distance, AttributeDistance | GradientDistance)
            if needs_texts and not context.is_classifier:
                raise TrainError(
                    f"continuity: distances on {distance.on} are of texts with classes; for "
                    "language models take logits or hidden"
                )
            if isinstance(distance, GradientDistance):
                context.require_embeddings("continuity on gradients")
            hooks = ()
            if isinstance(distance, HiddenDistance):
                wanted = distance.hooks or _streams(context)
                hooks = context.hooks(wanted)
            self._distances.append((distance, hooks))
        self.hooks = tuple(dict.fromkeys(name for _, hooks in self._distances for name in hooks))
        self.replaces_main = settings.augmentation > 0
        self._names = [f"{distance.on}" for distance in settings.distances]
        if len(set(self._names)) < len(self._names):
            self._names = [f"{name}_{i}" for i, name in enumerate(self._names)]
        self.columns = (
            *GUARD,
            "flip_rate",
            *self._names,
            *(f"d_{perturbing.name}" for perturbing in self._perturbing),
        )

    def forward(self, step: Step) -> Loss:
        """Draw a perturbation and return the weighted sum of distances."""
        perturbing = self._perturbing[int(torch.randint(len(self._perturbing), ()))]
        attributes = self._attribute_map(step)
        hooks = (*self.hooks, *(() if attributes is None else attributes.hooks))
        perturbed = perturbing.run(step, hooks=tuple(dict.fromkeys(hooks)))
        outputs = perturbed.outputs
        values = [
            self._distance(distance, hooks, step, perturbed, attributes).mean()
            for distance, hooks in self._distances
        ]
        weights = [distance.weight for distance, _ in self._distances]
        total = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum()
        same = unchanged(step.batch, perturbed.batch) if not step.is_classifier else None
        clean, other = (
            logits if same is None else logits[same]
            for logits in (step.outputs.logits, outputs.logits)
        )
        flips = (clean.argmax(dim=-1) != other.argmax(dim=-1)).float().mean()
        columns = {
            **guard(step),
            "flip_rate": flips,
            **{n: v.detach() for n, v in zip(self._names, values, strict=True)},
            f"d_{perturbing.name}": total.detach(),
        }
        main = None
        if self.settings.augmentation:
            share = self.settings.augmentation
            main = (1 - share) * step.outputs.loss + share * outputs.loss
        return Loss(total, columns, main)

    def _distance(
        self,
        distance: Distance,
        hooks: tuple[str, ...],
        step: Step,
        perturbed: Perturbed,
        attributes: AttributeMap | None,
    ) -> Float[Tensor, "n"]:
        """Return one distance, row by row."""
        batch, other = step.batch, perturbed.batch
        clean, changed = step.outputs, perturbed.outputs
        is_fixed = self.settings.hold_clean
        if isinstance(distance, LogitDistance):
            chosen = batch.is_token if step.is_classifier else unchanged(batch, other)
            p, q = counted(clean.logits, chosen), counted(changed.logits, chosen)
            measure = LOGIT_DISTANCES[distance.measure]
            return measure(p.detach().float() if is_fixed else p.float(), q.float())
        if isinstance(distance, HiddenDistance):
            same = None if step.is_classifier else unchanged(batch, other)
            rows = [
                _rows(acts[name], which if same is None else same, pooled=same is None)
                for name in hooks
                for acts, which in ((clean.acts, batch.is_token), (changed.acts, other.is_token))
            ]
            pairs = zip(rows[::2], rows[1::2], strict=True)
            return torch.cat([normed_cosine(h.detach() if is_fixed else h, k) for h, k in pairs])
        if isinstance(distance, GradientDistance):
            return self._gradients(step, perturbed)
        assert attributes is not None
        return _of_attributes(distance, attributes, clean, changed, batch, other, is_fixed)

    def _gradients(self, step: Step, perturbed: Perturbed) -> Float[Tensor, "n"]:
        """Return the distances of the loss' gradients by embeddings; two more passes."""
        sides: list[Tensor] = []
        changed = step.embed(perturbed.batch.ids) if perturbed.embeds is None else perturbed.embeds
        for batch, embeds in (
            (step.batch, step.embed(step.batch.ids)),
            (perturbed.batch, changed),
        ):
            leaf = embeds if embeds.requires_grad else embeds.detach().requires_grad_()
            loss = step.again(batch, embeds=leaf, twice=True).loss
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            sides.append(gradient)
        first, second = sides
        rows = zip(
            step.batch.ids,
            step.batch.is_token,
            perturbed.batch.ids,
            perturbed.batch.is_token,
            strict=True,
        )
        places = [aligned(*row) for row in rows]
        is_fixed = self.settings.hold_clean
        return gradient_distance(first.detach() if is_fixed else first, second, places)

    def _attribute_map(self, step: Step) -> AttributeMap | None:
        """Return the interpreter that is trained along, where a distance is of its attributes.

        Raises:
            TrainError: There is none.
        """
        if not any(isinstance(distance, AttributeDistance) for distance, _ in self._distances):
            return None
        for objective in step.objectives.values():
            if isinstance(objective, AttributeMap):
                return objective
        raise TrainError(
            "continuity on attributes: no objective of this training has attributes; add {kind: "
            "flint}, or take logits or hidden"
        )


def _streams(context: ObjectiveContext) -> tuple[str, ...]:
    """Return the streams after a third, two thirds and all of the blocks.

    Raises:
        TrainError: The model has no streams by name.
    """
    streams = [name for name in hook_names(context.model) if name.endswith(".hook_resid_post")]
    if not streams:
        raise TrainError("continuity on hidden streams: name the model's modules as its hooks")
    n = len(streams)
    places = sorted({max(0, round(n * share) - 1) for share in (1 / 3, 2 / 3, 1)})
    return tuple(streams[i] for i in places)


def _rows(
    acts: Float[Tensor, "batch pos *width"], used: Bool[Tensor, "batch pos"], *, pooled: bool
) -> Float[Tensor, "n d"]:
    """Return what is compared of a hook: the mean of each text's tokens, or each token."""
    flat = acts.flatten(2)
    if not pooled:
        return flat[used]
    weight = used.to(flat.dtype)[..., None]
    return (flat * weight).sum(dim=1) / weight.sum(dim=1)


def _of_attributes(
    distance: AttributeDistance,
    interpreter: AttributeMap,
    clean: Outputs,
    changed: Outputs,
    batch: TrainingBatch,
    other: TrainingBatch,
    is_fixed: bool,
) -> Float[Tensor, "n"]:
    sides: list[Any] = []
    for outputs, read in ((clean, batch), (changed, other)):
        phi = interpreter.attributes(outputs.acts, read.is_token)
        relevance = distance.of == "relevance"
        sides.append(interpreter.relevance(phi, outputs.logits) if relevance else phi)
    first, second = sides
    measure = cosine_distance if distance.of == "relevance" else attribute_distance
    return measure(first.detach() if is_fixed else first, second)
