"""Monosemanticity up and down: loss terms and edits on the activations of any hooks.

Up: decorrelated units or tokens (DecPO's idea), sparse activations, MonoScore. Down: MEmeL's
deactivation. All read every token of a batch, the first of a text included; padding is left out.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmmono.models.points import Watch
from lmmono.recipe.objective_settings import (
    Decorrelation,
    MonoScore,
    ReversedDeactivation,
    SparsePenalty,
)
from lmmono.training.objectives import Loss, Objective, ObjectiveContext, Step

Acts = Float[Tensor, "n d"]

LEAST_VARIANCE = 1e-8
"""Added to variances: a unit that never changes correlates with nothing."""


def squared_correlation(acts: Acts) -> Float[Tensor, ""]:
    """Return sum over i != j of corr(a_i, a_j)^2 / d^2 over tokens: |corr(A) - I|_F^2 / d^2.

    A unit that never changes has correlation 0 with all. With n < d tokens the sum is taken from
    the n x n products of tokens, which have the same sum of squares.
    """
    acts = acts.float()
    n, d = acts.shape
    z = (acts - acts.mean(dim=0)) / (acts.var(dim=0, correction=0) + LEAST_VARIANCE).sqrt()
    products = (z @ z.T if n < d else z.T @ z) / n
    diagonal = z.square().mean(dim=0)
    return (products.square().sum() - diagonal.square().sum()) / d**2


def squared_cosine(acts: Acts) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean over pairs of tokens of cos^2, and feature decorrelation 1 - mean cos.

    A token without activation has cosine 0 with all.
    """
    a = nn.functional.normalize(acts.float(), dim=1, eps=1e-12)
    gram, n = a @ a.T, len(a)
    pairs, own = max(1, n * (n - 1)), gram.diagonal()
    mean = (gram.sum() - own.sum()) / pairs
    return (gram.square().sum() - own.square().sum()) / pairs, 1 - mean


def hoyer_density(acts: Acts) -> Float[Tensor, ""]:
    """Return the mean over tokens of 1 - Hoyer's sparseness: (|a|_1 / |a|_2 - 1) / (sqrt(d) - 1).

    0 where one unit is active, 1 where all are alike. Hoyer 2004. Tokens without activation are
    left out.
    """
    acts = acts.float()
    norm = acts.norm(dim=1)
    active = norm > 0
    ratio = acts[active].abs().sum(dim=1) / norm[active]
    total = (ratio - 1).sum() / (math.sqrt(acts.shape[1]) - 1)
    return total / active.sum().clamp_min(1)


def mono_scores(
    acts: Acts, embeddings: Float[Tensor, "n e"]
) -> tuple[Float[Tensor, "units"], Float[Tensor, ""]]:
    """Return the MonoScore of the units that have one, and the unweighted mean cosine.

    (|sum_i a_i e_i|^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2), the mean cosine of pairs of
    tokens weighted by the product of their activations. Activations are scaled to [0, 1] by each
    unit's least and largest, embeddings to length 1. A unit that is active on fewer than two tokens
    has none. The mean cosine of all pairs is what a unit that fires everywhere gets. 2602.12403.
    """
    acts = acts.float()
    least, most = acts.detach().amin(dim=0), acts.detach().amax(dim=0)
    moving = most > least
    a = (acts[:, moving] - least[moving]) / (most - least)[moving]
    e = nn.functional.normalize(embeddings.float(), dim=1)
    squares = a.square().sum(dim=0)
    weight = a.sum(dim=0).square() - squares
    # one token at 1 and the others at 0 leave only rounding
    paired = weight.detach() > 1e-4 * squares.detach()
    scores = ((a.T @ e).square().sum(dim=1) - squares)[paired] / weight[paired]
    n = len(e)
    cosine = (e.sum(dim=0).square().sum() - n) / max(1, n * (n - 1))
    return scores, cosine


class _OnTokens(Objective):
    """A term that is the mean over hooks of a number of their tokens' activations."""

    def __init__(self, patterns: tuple[str, ...], context: ObjectiveContext) -> None:
        super().__init__()
        self.hooks = context.hooks(patterns)

    def token_acts(self, step: Step) -> Iterator[Acts]:
        """Yield each hook's activations of the tokens of a step, flattened to [n, d]."""
        for acts in step.acts(self).values():
            yield acts.flatten(2)[step.batch.is_token]


class DecorrelationTerm(_OnTokens):
    """Correlations of units, or cosines of tokens, squared; see `squared_correlation`.

    The released code of DecPO has un-normalised signed products of samples, which is mostly a
    penalty of norms; neither form here is that.
    """

    columns = ("feature_decorrelation",)

    def __init__(self, settings: Decorrelation, context: ObjectiveContext) -> None:
        super().__init__(settings.hooks, context)
        self.settings = settings

    def forward(self, step: Step) -> Loss:
        """Return the mean over hooks."""
        values: list[Tensor] = []
        decorrelations: list[Tensor] = []
        for acts in self.token_acts(step):
            order = torch.randperm(len(acts))[: self.settings.max_tokens]
            some = acts[order.to(acts.device)]
            value, decorrelation = squared_cosine(some)
            decorrelations.append(decorrelation.detach())
            is_samples = self.settings.form == "samples"
            values.append(value if is_samples else squared_correlation(acts))
        columns = {"feature_decorrelation": torch.stack(decorrelations).mean()}
        return Loss(torch.stack(values).mean(), columns)


class SparsityTerm(_OnTokens):
    """Mean |a|, or `hoyer_density`."""

    columns = ("active_fraction",)

    def __init__(self, settings: SparsePenalty, context: ObjectiveContext) -> None:
        super().__init__(settings.hooks, context)
        self.settings = settings

    def forward(self, step: Step) -> Loss:
        """Return the mean over hooks."""
        acts = list(self.token_acts(step))
        is_l1 = self.settings.measure == "l1"
        values = [act.float().abs().mean() if is_l1 else hoyer_density(act) for act in acts]
        active = torch.stack([(act != 0).float().mean() for act in acts])
        return Loss(torch.stack(values).mean(), {"active_fraction": active.mean()})


class MonoScoreTerm(_OnTokens):
    """1 - the mean MonoScore of units; see `mono_scores`.

    The paper has images and the embeddings of a frozen encoder. What stands for them in text is a
    choice of ours: the detached activation of a hook, by default the token embedding.
    """

    columns = ("mono_score", "mean_cosine")

    def __init__(self, settings: MonoScore, context: ObjectiveContext) -> None:
        super().__init__(settings.hooks, context)
        self._units = self.hooks
        (self._embedding,) = context.hooks((settings.embedding,))
        self.hooks = tuple(dict.fromkeys((*self._units, self._embedding)))

    def forward(self, step: Step) -> Loss:
        """Return the mean over hooks."""
        is_token, acts = step.batch.is_token, step.acts(self)
        embeddings = acts[self._embedding].detach().flatten(2)[is_token]
        means: list[Tensor] = []
        cosine = embeddings.new_zeros(())
        for name in self._units:
            scores, cosine = mono_scores(acts[name].flatten(2)[is_token], embeddings)
            # a hook of which no unit fires twice has nothing to raise
            means.append(scores.mean() if len(scores) else cosine.detach())
        mean = torch.stack(means).mean()
        return Loss(1 - mean, {"mono_score": mean.detach(), "mean_cosine": cosine})


def monosemantic_scale(z: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return MEmeL's scale of each activation: its squared distance from the mean in variances.

    >>> monosemantic_scale(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([4.0])).item()
    1.0
    """
    return (z - mean).square() / variance.clamp_min(LEAST_VARIANCE)


def deactivated(z: Tensor, mean: Tensor, chosen: Tensor, variant: str) -> Tensor:
    """Return activations with the chosen ones at their mean.

    `naive`: z' = mean, gradient 0. `reversed`: z' = mean + (z held) - z, which is the mean with
    gradient -1, so that what would raise z lowers it.
    """
    at_mean = mean.expand_as(z)
    return torch.where(chosen, at_mean + (z.detach() - z) if variant == "reversed" else at_mean, z)


class ReversedDeactivationTerm(Objective):
    """MEmeL's deactivation of monosemantic neurons in training passes (KDD 2024, 2312.11560).

    The paper's equations could not be read: the scale is the squared z-score against running means
    and variances, and both variants are candidates. Of every token, the share of neurons with the
    largest scale is put to its mean. The term itself is 0: what acts is the changed pass.
    """

    columns = ("scale", "changed_fraction")

    def __init__(self, settings: ReversedDeactivation, context: ObjectiveContext) -> None:
        super().__init__()
        self.settings = settings
        self._names = context.hooks(settings.hooks)
        for i, width in enumerate(context.widths(self._names).values()):
            self.register_buffer(f"mean_{i}", torch.zeros(width))
            self.register_buffer(f"variance_{i}", torch.zeros(width))
        self.register_buffer("n_seen", torch.zeros(len(self._names)))
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    def edits(self) -> Mapping[str, Watch]:
        """Return the deactivation of each hook."""
        return {name: partial(self._deactivate, i) for i, name in enumerate(self._names)}

    def _deactivate(self, i: int, acts: Tensor) -> Tensor:
        z = acts.flatten(2)
        mean, variance = self._statistics(i, z.detach())
        scale = monosemantic_scale(z.detach().float(), mean, variance)
        k = max(1, round(self.settings.share * z.shape[2]))
        chosen = torch.zeros_like(z, dtype=torch.bool)
        chosen.scatter_(2, scale.topk(k, dim=2).indices, True)
        changed = deactivated(z, mean.to(z.dtype), chosen, self.settings.variant)
        self._seen[self._names[i]] = scale.mean(), (changed.detach() != z.detach()).float().mean()
        return changed.view_as(acts)

    @torch.no_grad()
    def _statistics(self, i: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch into the running mean and variance of a hook, and return them as before.

        The first batch is its own past.
        """
        flat = z.flatten(0, 1).float()
        now: list[Tensor] = [flat.mean(dim=0), flat.var(dim=0, correction=0)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for moment in now:
                torch.distributed.all_reduce(moment)
                moment /= torch.distributed.get_world_size()
        buffers: Any = [getattr(self, f"{kind}_{i}") for kind in ("mean", "variance")]
        n_seen: Any = self.n_seen
        is_first = bool(n_seen[i] == 0)
        before = now if is_first else [buffer.clone() for buffer in buffers]
        for buffer, new in zip(buffers, now, strict=True):
            buffer.lerp_(new, 1.0 if is_first else 1 - self.settings.memory)
        n_seen[i] += 1
        return before[0], before[1]

    def forward(self, step: Step) -> Loss:
        """Return 0, with the mean scale and the share of activations that were changed."""
        scales, shares = zip(*self._seen.values(), strict=True)
        columns = {
            "scale": torch.stack(scales).mean(),
            "changed_fraction": torch.stack(shares).mean(),
        }
        return Loss(step.outputs.loss.new_zeros(()), columns)
