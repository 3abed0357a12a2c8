"""What continuity is compared with: R-Drop, VAT, SMART, FreeLB, smoothed labels, Jacobian penalty.

    passes of a step beside the main one     main loss
    r_drop            1 (2 with dropout of its own)   mean of both passes
    vat, smart        ascent_steps + 1                as it is
    freelb            ascent_steps                    mean over changed embeddings
    label_smoothing   0                               of smoothed labels
    jacobian          1                               as it is

Changes are per text (row of tokens), padding and the first token left out.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmmono.errors import TrainError
from lmmono.methods.continuity import GUARD, counted, guard
from lmmono.methods.distances import half_symmetric_kl, kl
from lmmono.methods.perturbations import dropped
from lmmono.models.hooks import bare
from lmmono.recipe.objective_settings import (
    FreeLargeBatch,
    JacobianPenalty,
    ObjectiveSettings,
    RDrop,
    SmoothAdversarial,
    SmoothedLabels,
    VirtualAdversarial,
)
from lmmono.training.objectives import Loss, Objective, ObjectiveContext, Step

Change = Float[Tensor, "batch pos d"]


class RDropTerm(Objective):
    """R-Drop, 2106.14448: (CE1 + CE2) / 2 + weight * (KL(1 | 2) + KL(2 | 1)) / 2, batch means.

    The released code sums over the batch instead, so that its weight depends on the batch.
    """

    columns = GUARD
    replaces_main = True

    def __init__(self, settings: RDrop, context: ObjectiveContext) -> None:
        """Take whose dropout.

        Raises:
            TrainError: The model has no dropout and none is set: both passes would be one.
        """
        super().__init__()
        self.settings = settings
        if settings.dropout is not None:
            context.require_embeddings("r_drop with dropout")
        elif not has_dropout(context.model):
            raise TrainError(
                f"r_drop: {type(bare(context.model)).__name__} has no dropout, so two passes are "
                "the same; set dropout: 0.1, which drops coordinates of token embeddings"
            )

    def forward(self, step: Step) -> Loss:
        """Return half the symmetric KL of two passes."""
        share, first = self.settings.dropout, step.outputs
        if share is None:
            second = step.again()
        else:
            embeds, is_token = step.embed(step.batch.ids), step.batch.is_token
            first = step.again(embeds=dropped(embeds, is_token, share))
            second = step.again(embeds=dropped(embeds, is_token, share))
        p, q = (counted(output.logits, step.batch.is_token).float() for output in (first, second))
        return Loss(half_symmetric_kl(p, q).mean(), guard(step), (first.loss + second.loss) / 2)


def has_dropout(model: nn.Module) -> bool:
    """Say whether two passes of a model in training differ."""
    modules = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    config = getattr(bare(model), "config", None)
    rates = ("attn_pdrop", "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout")
    return bool(modules) or any((getattr(config, rate, 0) or 0) > 0 for rate in rates)


class _Adversarial(Objective):
    """What every objective on changed embeddings shares."""

    columns = GUARD

    def __init__(self, settings: ObjectiveSettings, context: ObjectiveContext) -> None:
        """Take the settings.

        Raises:
            TrainError: The model has no token embeddings.
        """
        super().__init__()
        context.require_embeddings(settings.kind)
        self.settings: Any = settings  # each class says which

    def _start(self, step: Step) -> tuple[Change, Float[Tensor, "batch pos 1"]]:
        """Return the token embeddings, and 1 where they may change."""
        used = step.batch.is_token.clone()
        used[:, 0] = False
        embeds = step.embed(step.batch.ids)
        return embeds, used[..., None].to(embeds.dtype)

    def _logits(self, step: Step, embeds: Change) -> Float[Tensor, "n c"]:
        logits = step.again(embeds=embeds).logits
        return counted(logits, step.batch.is_token).float()


def per_text_norm(change: Change) -> Float[Tensor, "batch 1 1"]:
    """Return the Frobenius norm of each text's change."""
    return change.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]


class VatTerm(_Adversarial):
    """VAT, 1704.03976 (equations from memory): KL(p(x) held | p(x + r)).

    r is the radius times the direction in which the KL grows fastest, found at a small random
    change. Radius and probe are shares of the norm of the text's embeddings.
    """

    settings: VirtualAdversarial

    def forward(self, step: Step) -> Loss:
        """Return the KL at the worst change that was found."""
        embeds, used = self._start(step)
        clean = counted(step.outputs.logits, step.batch.is_token).detach().float()
        size = per_text_norm(embeds.detach() * used)
        direction = torch.randn_like(embeds) * used
        for _ in range(self.settings.ascent_steps):
            probe = self.settings.probe * size * direction / per_text_norm(direction)
            probe = probe.detach().requires_grad_()
            value = kl(clean, self._logits(step, embeds.detach() + probe)).sum()
            (direction,) = torch.autograd.grad(value, probe)
            direction = direction * used
        change = self.settings.radius * size * direction / per_text_norm(direction)
        value = kl(clean, self._logits(step, embeds + change.detach())).mean()
        return Loss(value, guard(step))


class SmartTerm(_Adversarial):
    """SMART, 1911.03437, as released: symmetric KL, each target held, at changed embeddings.

    The change begins as noise and goes uphill on the KL to the held clean output, each token's step
    of one largest norm. There is no Bregman proximal term.
    """

    settings: SmoothAdversarial

    def forward(self, step: Step) -> Loss:
        """Return the symmetric KL at the change."""
        embeds, used = self._start(step)
        own = counted(step.outputs.logits, step.batch.is_token).float()
        clean, change = own.detach(), torch.randn_like(embeds) * self.settings.noise * used
        for _ in range(self.settings.ascent_steps):
            change = change.detach().requires_grad_()
            value = kl(clean, self._logits(step, embeds.detach() + change)).sum()
            (gradient,) = torch.autograd.grad(value, change)
            largest = gradient.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            change = change + self.settings.step_size * gradient / largest * used
            if self.settings.radius is not None:
                change = change.clamp(-self.settings.radius, self.settings.radius)
        other = self._logits(step, embeds + change.detach())
        value = kl(other.detach(), own) + kl(clean, other)
        return Loss(value.mean(), guard(step))


class FreeLbTerm(_Adversarial):
    """FreeLB, 1909.11764: the mean of the main loss over steps uphill from a random change.

    The paper shares dropout masks between the passes; here each draws its own.
    """

    replaces_main = True

    settings: FreeLargeBatch

    def forward(self, step: Step) -> Loss:
        """Return the mean loss at changed embeddings, which stands for the main loss."""
        how, (embeds, used) = self.settings, self._start(step)
        n_coordinates = used.sum(dim=(1, 2), keepdim=True).clamp_min(1) * embeds.shape[-1]
        uniform = 2 * torch.rand_like(embeds) - 1
        change = uniform * how.start / n_coordinates.sqrt() * used
        losses: list[Tensor] = []
        for _ in range(how.ascent_steps):
            change = change.detach().requires_grad_()
            loss = step.again(embeds=embeds + change).loss
            losses.append(loss)
            (gradient,) = torch.autograd.grad(loss, change, retain_graph=True)
            change = change + how.step_size * used * gradient / per_text_norm(gradient * used)
            if how.radius is not None:
                norm = per_text_norm(change.detach())
                change = change * (how.radius / norm).clamp_max(1.0)
        mean = torch.stack(losses).mean()
        return Loss(mean.detach(), guard(step), mean)


class LabelSmoothingTerm(Objective):
    """(1 - share) times the main loss, share times the mean of -log p over classes."""

    columns = GUARD
    replaces_main = True

    def __init__(self, settings: SmoothedLabels, context: ObjectiveContext) -> None:
        super().__init__()
        del context
        self.settings = settings

    def forward(self, step: Step) -> Loss:
        """Return the smoothed loss, which stands for the main loss."""
        logits, labels = step.outputs.logits, step.batch.labels
        if not step.is_classifier:  # logits of a token are of the next one
            logits, labels = logits[:, :-1], labels[:, 1:]
            logits = logits[labels >= 0]
        spread = -logits.float().log_softmax(dim=-1).mean()
        share = self.settings.share
        value = (1 - share) * step.outputs.loss + share * spread
        return Loss(value.detach(), guard(step), value)


class JacobianTerm(_Adversarial):
    """Mean over texts of |d logits / d embeddings|_F^2, from random directions of the logits.

    E |d (v . logits) / d embeddings|^2 for a normal v, which of a language model has an entry for
    every token and word.
    """

    settings: JacobianPenalty

    def forward(self, step: Step) -> Loss:
        """Return the mean over projections."""
        embeds, _ = self._start(step)
        leaf = embeds if embeds.requires_grad else embeds.detach().requires_grad_()
        logits = step.again(embeds=leaf, twice=True).logits.float()
        rows = logits if step.is_classifier else logits * step.batch.is_token[..., None]
        values: list[Tensor] = []
        for _ in range(self.settings.projections):
            scalar = (torch.randn_like(rows) * rows).sum()
            (gradient,) = torch.autograd.grad(scalar, leaf, create_graph=True)
            values.append(gradient.float().square().sum() / len(gradient))
        return Loss(torch.stack(values).mean(), guard(step))
