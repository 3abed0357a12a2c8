"""Losses for labels that may be wrong, one function each.

All take logits [..., classes, rows] (neighbours in memory are rows) and give one loss per row.
p is the softmax of the logits, y the given label.
"""

import math

from jaxtyping import Float, Int64
from torch import Tensor

Logits = Float[Tensor, "*batch c n"]
Labels = Int64[Tensor, "*batch n"]
Losses = Float[Tensor, "*batch n"]

SMOOTHING = 0.1  # Szegedy et al. 2016
TRUNCATION = 0.7  # Zhang and Sabuncu 2018, their q
FIT, REVERSE = 6.0, 0.1  # Wang et al. 2019, of their CIFAR-100
LOG_ZERO = math.log(1e-4)  # what stands for log 0 of a one-hot label
EARLY = 3.0  # Liu et al. 2020, of their CIFAR-10
EARLY_MEMORY = 0.7  # the same


def cross_entropy(logits: Logits, labels: Labels) -> Losses:
    """Return -log p_y."""
    return -_at_label(logits.log_softmax(dim=-2), labels)


def label_smoothing(logits: Logits, labels: Labels, share: float = SMOOTHING) -> Losses:
    """Return the cross entropy with (1 - share) 1_y + share / classes. Szegedy et al. 2016."""
    log_p = logits.log_softmax(dim=-2)
    return -(1 - share) * _at_label(log_p, labels) - share * log_p.mean(dim=-2)


def generalised_cross_entropy(logits: Logits, labels: Labels, q: float = TRUNCATION) -> Losses:
    """Return (1 - p_y^q) / q: cross entropy at q -> 0, 1 - p_y at 1. Zhang and Sabuncu 2018."""
    return (1 - (q * _at_label(logits.log_softmax(dim=-2), labels)).exp()) / q


def symmetric_cross_entropy(
    logits: Logits, labels: Labels, fit: float = FIT, reverse: float = REVERSE
) -> Losses:
    """Return fit * CE + reverse * RCE. Wang et al. 2019, numbers of their CIFAR-100.

    RCE = -sum_k p_k log 1_y[k] with log 0 set to log 1e-4, that is -log(1e-4) (1 - p_y).
    """
    log_p = _at_label(logits.log_softmax(dim=-2), labels)
    return -fit * log_p - reverse * LOG_ZERO * (1 - log_p.exp())


def forward_corrected(logits: Logits, labels: Labels, noise: Float[Tensor, "*batch c c"]) -> Losses:
    """Return -log sum_k p_k noise[k, y]: the model speaks of true labels. Patrini et al. 2017.

    Args:
        logits: Logits of the true classes.
        labels: Given labels.
        noise: P(given label = column | true label = row).
    """
    log_p = logits.log_softmax(dim=-2)
    columns = noise.log().clamp_min(-1e4).transpose(-1, -2)  # by given label, then true class
    of_given = columns.gather(-2, labels[..., None].expand(*labels.shape, columns.shape[-1]))
    return -(log_p + of_given.transpose(-1, -2)).logsumexp(dim=-2)


def early_regularised(
    logits: Logits,
    labels: Labels,
    targets: Float[Tensor, "*batch c n"],
    weight: float = EARLY,
) -> Losses:
    """Return CE + weight * log(1 - p . targets): ELR. Liu et al. 2020, numbers of their CIFAR-10.

    The targets are a running mean of what the model said before; see `early_targets`. p is kept
    within [1e-4, 1 - 1e-4] in the second term, as theirs is.
    """
    p = logits.softmax(dim=-2).clamp(1e-4, 1 - 1e-4)
    agreement = (p * targets).sum(dim=-2).clamp_max(1 - 1e-4)
    return cross_entropy(logits, labels) + weight * (1 - agreement).log()


def early_targets(
    targets: Float[Tensor, "*batch c n"], logits: Logits, memory: float = EARLY_MEMORY
) -> Float[Tensor, "*batch c n"]:
    """Return memory * targets + (1 - memory) * p, the targets of ELR after one more step."""
    p = logits.detach().softmax(dim=-2).clamp(1e-4, 1 - 1e-4)
    return memory * targets + (1 - memory) * p / p.sum(dim=-2, keepdim=True)


def mixed_cross_entropy(logits: Logits, labels: Labels, partners: Labels, shares: Losses) -> Losses:
    """Return mixup's loss of rows mixed with others. Zhang et al. 2018.

    Of a linear probe the logits of a mixed row are the mixed logits, so rows need not be mixed.

    Args:
        logits: Logits of the rows themselves.
        labels: Their labels.
        partners: Index of the row that each is mixed with.
        shares: Weight of each row itself; its partner has the rest.
    """
    of_partners = partners[..., None, :].expand(*logits.shape)
    share = shares[..., None, :]
    log_p = (share * logits + (1 - share) * logits.gather(-1, of_partners)).log_softmax(dim=-2)
    other = _at_label(log_p, labels.gather(-1, partners))
    return -shares * _at_label(log_p, labels) - (1 - shares) * other


def small_loss_rows(losses: Losses, n_kept: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch n"]:
    """Return 1 for the rows of least loss, as many as said, and 0 for the others."""
    ranks = losses.detach().argsort(dim=-1, stable=True).argsort(dim=-1)
    return (ranks < n_kept[..., None]).to(losses.dtype)


def _at_label(values: Float[Tensor, "*batch c n"], labels: Labels) -> Losses:
    return values.gather(-2, labels[..., None, :])[..., 0, :]
