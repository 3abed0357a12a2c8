"""FLINT as a loss term of a classifier's training: its interpreter, its losses, its schedule.

The classifier learns the classes by the main loss; this term adds agreement, decoder, entropies and
L1, whose gradients reach the classifier's layers too unless `detach_inputs` is on. Trained alone on
a finished classifier it is the post-hoc form: the same term, and no weight of the model moves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lmmono.errors import RobustnessError
from lmmono.methods import flint_losses as losses
from lmmono.methods.flint_interpreter import (
    AttributeReading,
    Interpreter,
    counted_tokens,
    embedding_of,
)
from lmmono.methods.flint_words import ContentWords, content_words
from lmmono.models.hooks import bare, hook_names, match_hooks, run_until
from lmmono.probes.text_reader import TextReader
from lmmono.recipe.objective_settings import FlintSettings
from lmmono.registry.suites import Pooling
from lmmono.training.objectives import Loss, Objective, ObjectiveContext, Step

MANY_CLASSES = 200
"""Classes from which a linear head on a few attributes has no chance: J attributes of which about
two are active tell at most about J^2 / 2 classes apart."""

MANY_ATTRIBUTES = 64
"""Attributes above which entropy has no gradient to speak of before acts of log J."""


class FlintObjective(Objective):
    """The term of FLINT. arXiv 2010.09345, section 3, with attributes of tokens.

    L = beta L_of + gamma L_if + delta_c E1 - delta_d E2 + lambda mean|Phi|; L_of and the L1 term
    begin after `fidelity_from` of the steps, the entropies grow from `entropies_from` on.

    Attributes:
        interpreter: The network.
        warnings: What is likely to go wrong, in sentences.
    """

    columns = ("fidelity_loss", "decoder_loss", "conciseness", "diversity", "l1", "agreement")

    def __init__(self, settings: FlintSettings, context: ObjectiveContext) -> None:
        """Build the interpreter for a classifier.

        Raises:
            RobustnessError: This is no classifier, it has too many classes, a layer that it lacks
                is named, or its training texts have no content word.
        """
        super().__init__()
        if not context.is_classifier or context.n_classes is None:
            raise RobustnessError(
                "objective flint explains the classes of texts, and this model tells tokens apart; "
                "put it into robustness.fine_tuning.objectives, or restrict the head to some label "
                "tokens as a task of their own"
            )
        check_classes(context.n_classes, settings.n_attributes)
        network: Any = bare(context.model)
        self.settings = settings
        self.hooks = layer_hooks(network, settings.layers)
        self.interpreter = build_interpreter(
            settings,
            network,
            n_classes=context.n_classes,
            hooks=self.hooks,
            pooling=context.pooling,
            words=self._words(context),
        )
        self._diversity: losses.Diversity = cast(losses.Diversity, settings.decided("diversity"))
        self.mean_usage: Tensor
        self.register_buffer("mean_usage", torch.zeros(settings.n_attributes))
        self.lr, self.weight_decay = settings.lr, settings.weight_decay
        self.warnings = tuple(_doubts(settings, context.pooling))

    def _words(self, context: ObjectiveContext) -> ContentWords | None:
        if self.settings.decoder == "token":
            return None
        if not context.texts:
            raise RobustnessError(
                f"decoder {self.settings.decoder} counts the words of training texts, and there is "
                "none; take decoder: token"
            )
        reader = TextReader(bare(context.model), context.tokenizer)
        return content_words(
            reader.read(context.texts)[0],
            reader.tokenizer,
            n_words=self.settings.n_words,
            min_documents=self.settings.min_documents,
        )

    def read(
        self, acts: Mapping[str, Tensor], is_token: Bool[Tensor, "batch pos"]
    ) -> AttributeReading:
        """Return what the interpreter makes of activations of its hooks."""
        inputs = [acts[hook] for hook in self.hooks]
        if self.settings.detach_inputs:
            inputs = [x.detach() for x in inputs]
        return self.interpreter(inputs, counted_tokens(is_token))

    def attributes(
        self, acts: Mapping[str, Tensor], is_token: Tensor
    ) -> Float[Tensor, "batch n_attributes"]:
        """Return the attributes of texts, none below 0."""
        return self.read(acts, is_token).phi

    def relevance(self, attributes: Tensor, logits: Tensor) -> Float[Tensor, "batch n_attributes"]:
        """Return alpha / max |alpha| for the class that logits predict."""
        alpha = attributes * self.interpreter.weight.T[logits.argmax(-1)]
        return alpha / alpha.abs().amax(-1, keepdim=True).clamp_min(losses.TINY)

    def forward(self, step: Step) -> Loss:
        """Return the term of a step and its parts, each before its weight."""
        settings, logits = self.settings, step.outputs.logits
        reading = self.read(step.outputs.acts, step.batch.is_token)
        of = losses.output_fidelity
        if settings.fidelity == "paper":
            of = losses.paper_output_fidelity
        parts = {
            "fidelity_loss": of(reading.scores, logits),
            "decoder_loss": self.interpreter.input_loss(
                reading,
                step.batch.ids,
                counted_tokens(step.batch.is_token),
                embedding_of(step.network),
            ),
            "conciseness": losses.conciseness(reading.phi, scale=settings.entropy_scale),
            "diversity": losses.diversity(
                reading.phi, self._diversity, mean=self._mean_usage(reading.phi)
            ),
            "l1": losses.mean_l1(reading.phi),
        }
        weights = flint_weights(settings, step.fraction)
        value = sum((weights[name] * part for name, part in parts.items()), logits.new_zeros(()))
        same = reading.scores.argmax(-1) == logits.argmax(-1)
        return Loss(value, {**parts, "agreement": same.float().mean()})

    def _mean_usage(self, phi: losses.Phi) -> Float[Tensor, " attribute"]:
        now, memory = losses.usage(phi), self.settings.diversity_memory
        if not memory:
            return now
        is_first = not bool(self.mean_usage.any())
        mean = now if is_first else memory * self.mean_usage + (1 - memory) * now
        if self.training:
            self.mean_usage.copy_(mean.detach())
        return mean


def build_interpreter(
    settings: FlintSettings,
    network: Any,
    *,
    n_classes: int,
    hooks: Sequence[str],
    pooling: Pooling | None,
    words: ContentWords | None,
) -> Interpreter:
    """Return a new interpreter of some hooks of a model; `pooling` is the classifier's."""
    return Interpreter(
        _widths(network, hooks),
        settings.n_attributes,
        n_classes,
        d_hidden=settings.d_hidden,
        pooling=settings.pooling or pooling or "mean",
        head=cast(Any, settings.decided("head")),
        dropout=settings.dropout,
        decoder=settings.decoder,
        words=words,
        embedding=embedding_of(network),
    )


def flint_weights(settings: FlintSettings, fraction: float) -> dict[str, float]:
    """Return the weight of each part after a share of the steps; diversity's is negative.

    >>> flint_weights(FlintSettings(), 0.2)["fidelity_loss"]
    0.5
    """
    gamma = settings.decoder_weight
    if gamma is None:
        gamma = 1.0 if settings.decoder == "embed" else 0.1
    early = losses.ramp(fraction, settings.fidelity_from)
    late = losses.ramp(fraction, settings.entropies_from, settings.entropies_full)
    return {
        "fidelity_loss": settings.fidelity_weight * early,
        "decoder_loss": gamma,
        "conciseness": settings.conciseness_weight * late,
        "diversity": -cast(float, settings.decided("diversity_weight")) * late,
        "l1": settings.l1_weight * early,
    }


def check_classes(n_classes: int, n_attributes: int) -> None:
    """Refuse a head that a few attributes cannot feed.

    Raises:
        RobustnessError: There are too many classes.
    """
    if n_classes > MANY_CLASSES:
        raise RobustnessError(
            f"flint: {n_classes} classes on {n_attributes} attributes: a linear head of so few "
            f"cannot tell more than {MANY_CLASSES} apart. Take a task of fewer classes; of a "
            "language model, label tokens of a prompt or the likeliest continuations as classes"
        )


def layer_hooks(network: Any, layers: Sequence[int | str] | None) -> tuple[str, ...]:
    """Return the hooks that layers name: blocks by number, or hooks by name.

    Raises:
        RobustnessError: The model has no block of that number, or no blocks by number.
        ModelError: A name matches nothing.
    """
    n_blocks = sum(name.endswith(".hook_resid_post") for name in hook_names(network))
    if layers is None:
        if not n_blocks:
            raise RobustnessError(
                "flint: this model's blocks have no TransformerLens names; give layers by module "
                "path, such as layers=['transformer.h.3']"
            )
        last = max(0, n_blocks - 2)  # what the last block gives is nearly the logits
        layers = sorted({min(last, math.ceil(2 * n_blocks / 3) - 1), last})
    wrong = [layer for layer in layers if isinstance(layer, int) and not 0 <= layer < n_blocks]
    if wrong:
        raise RobustnessError(
            f"flint: layers {', '.join(map(str, wrong))}: the model has blocks 0 to "
            f"{n_blocks - 1}; take some of these, or hooks by name"
        )
    named = [f"blocks.{x}.hook_resid_post" if isinstance(x, int) else x for x in layers]
    return tuple(match_hooks(network, named))


def _widths(network: Any, hooks: Sequence[str]) -> list[int]:
    """Return the numbers per token of hooks; unlike `hook_width`, of a body without a head too."""
    was_training = network.training
    network.eval()  # a pass with dropout would draw from the seed of the training
    try:
        acts = run_until(network, torch.zeros((1, 1), dtype=torch.long), hooks)
    finally:
        network.train(was_training)
    return [acts[hook].numel() for hook in hooks]


def _doubts(settings: FlintSettings, pooling: Pooling | None) -> list[str]:
    doubts: list[str] = []
    if settings.n_attributes > MANY_ATTRIBUTES:
        doubts.append(
            f"{settings.n_attributes} attributes: above {MANY_ATTRIBUTES} the entropies are flat "
            f"until acts reach {np.log(settings.n_attributes):.1f}; take fewer, or entropy_scale "
            f"{np.log(settings.n_attributes):.1f}"
        )
    if settings.pooling is not None and pooling is not None and settings.pooling != pooling:
        doubts.append(
            f"attributes are pooled by {settings.pooling} and the classifier by {pooling}: "
            "agreement suffers"
        )
    if settings.decided("diversity") == "mi":
        doubts.append("diversity mi alone leaves two or three attributes in use; take norm")
    return doubts
