"""Integrated gradients of a class or an attribute over a text's tokens, by captum.

Sundararajan et al. 2017: the path runs from the mean token embedding to the text's own. An
attribute's acts say where it speaks, its integrated gradients what it has read; that the two agree
is checked, not supposed.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from lmmono.errors import RobustnessError
from lmmono.methods.flint import Flint, Interpretation
from lmmono.methods.flint_interpreter import counted_tokens
from lmmono.models.hooks import bare, recording

N_STEPS = 20
"""Points of the path: Gauss-Legendre, as captum has it."""


def integrated_gradients(
    flint: Flint,
    ids: Int64[ndarray, " pos"],
    *,
    label: int | None = None,
    attribute: int | None = None,
    n_steps: int = N_STEPS,
) -> Float[ndarray, " pos"]:
    """Return what each token adds to a logit of the classifier, or to an attribute.

    The sum over tokens is the difference between the text and the mean embedding at every place,
    up to the error of the integral.

    Args:
        flint: Fitted.
        ids: One text as `Interpretation.ids` has it.
        label: Class whose logit is explained.
        attribute: Attribute that is explained, in place of a class.
        n_steps: Points of the path.

    Raises:
        RobustnessError: captum is not installed, or not one of the two is asked for.
    """
    if (label is None) == (attribute is None):
        raise RobustnessError("integrated_gradients: want a label or an attribute")
    try:
        from captum.attr import IntegratedGradients
    except ImportError as fault:
        raise RobustnessError(
            "integrated gradients need one package more: pip install 'lmmono[methods]'"
        ) from fault
    network, interpreter = flint.classifier.network.eval(), flint.interpreter
    body: Any = bare(network.body)
    table = body.get_input_embeddings()
    block = flint.classifier.reader.block([ids]).to(table.weight.device)

    def value(embeds: Tensor) -> Tensor:
        rows = block.expand(len(embeds), -1)
        lengths = torch.full((len(embeds),), len(ids))
        handle = table.register_forward_hook(giving(embeds))
        try:
            with recording(network.body, flint.hooks) as acts:
                logits = network(rows, lengths)
        finally:
            handle.remove()
        if label is not None:
            return logits[:, label]
        used = counted_tokens(torch.ones_like(rows, dtype=torch.bool))
        return interpreter([acts[hook] for hook in flint.hooks], used).phi[:, attribute]

    embeds = table(block).detach()
    baseline = table.weight.detach().mean(0).expand_as(embeds)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings(
            "ignore", message="Input Tensor 0 did not already require gradients"
        )
        gradients = IntegratedGradients(value).attribute(
            embeds, baselines=baseline, n_steps=n_steps
        )
    return gradients[0].sum(-1).detach().cpu().numpy()


def giving(embeds: Tensor) -> Callable[..., Tensor]:
    """Return a forward hook that puts embeddings in the place of what a module gives."""

    def replace(*_: Any) -> Tensor:
        return embeds

    return replace


def class_gradients(
    flint: Flint, read: Interpretation, texts: Sequence[int], *, n_steps: int = N_STEPS
) -> list[Float[ndarray, " pos"]]:
    """Return the integrated gradients of the classifier's own class, of some texts by number."""
    labels = read.log_p.argmax(axis=1)
    return [
        integrated_gradients(flint, read.ids[i], label=int(labels[i]), n_steps=n_steps)
        for i in texts
    ]


def gradient_agreement(
    flint: Flint, read: Interpretation, texts: Sequence[int], *, n_steps: int = N_STEPS
) -> tuple[float, int]:
    """Return the mean Spearman of acts with integrated gradients of texts' top attributes.

    Over the tokens of each text but the first; texts whose acts do not vary are left out, and the
    number of the others comes second.
    """
    from scipy.stats import spearmanr  # heavy, and wanted here alone

    values: list[float] = []
    for i in texts:
        top = int(read.relevance[i].argmax())
        acts = read.acts[i][1:, top]
        if len(acts) < 3 or acts.std() == 0:
            continue
        gradients = integrated_gradients(flint, read.ids[i], attribute=top, n_steps=n_steps)[1:]
        if gradients.std() > 0:
            ranked: Any = spearmanr(acts, gradients)
            values.append(float(ranked.statistic))
    return (float(np.mean(values)), len(values)) if values else (float("nan"), 0)
