"""How far apart two outputs are: logits, hidden streams, gradients, attributes.

All take the clean side first and give one number per row; `held` lets no gradient into it.
"""

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from lmmono.recipe.objective_settings import LogitMeasure

Logits = Float[Tensor, "n c"]
PerRow = Float[Tensor, "n"]


def kl(p: Logits, q: Logits) -> PerRow:
    """Return KL(p | q) in nats of the distributions that two logits stand for."""
    log_p, log_q = p.log_softmax(dim=-1), q.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def symmetric_kl(p: Logits, q: Logits) -> PerRow:
    """Return KL(p | q) + KL(q | p), the form of SMART."""
    return kl(p, q) + kl(q, p)


def half_symmetric_kl(p: Logits, q: Logits) -> PerRow:
    """Return half of `symmetric_kl`, the form of R-Drop."""
    return symmetric_kl(p, q) / 2


def jensen_shannon(p: Logits, q: Logits) -> PerRow:
    """Return the mean of KL(p | m) and KL(q | m), m their mean; in nats."""
    log_m = torch.logaddexp(p.log_softmax(dim=-1), q.log_softmax(dim=-1))
    return (kl(p, log_m) + kl(q, log_m)) / 2  # log_m lacks a constant, which softmax drops


def squared_logits(p: Logits, q: Logits) -> PerRow:
    """Return the mean squared difference of logits."""
    return (p - q).square().mean(dim=-1)


def squared_probabilities(p: Logits, q: Logits) -> PerRow:
    """Return the sum of squared differences of probabilities."""
    return (p.softmax(dim=-1) - q.softmax(dim=-1)).square().sum(dim=-1)


def cosine_distance(p: Logits, q: Logits) -> PerRow:
    """Return 1 - cosine; 1 where a side is 0."""
    return 1 - functional.cosine_similarity(p, q, dim=-1)


LOGIT_DISTANCES: dict[LogitMeasure, Callable[[Tensor, Tensor], Tensor]] = {
    "symmetric_kl": symmetric_kl,
    "half_symmetric_kl": half_symmetric_kl,
    "kl": kl,
    "js": jensen_shannon,
    "squared_logits": squared_logits,
    "squared_probabilities": squared_probabilities,
    "cosine": cosine_distance,
}


def normed_cosine(h: Float[Tensor, "n d"], k: Float[Tensor, "n d"]) -> PerRow:
    """Return 1 - cosine of two streams after a layer norm without weights."""
    width = h.shape[-1:]
    return cosine_distance(
        functional.layer_norm(h.float(), width), functional.layer_norm(k.float(), width)
    )


def attribute_distance(phi: Float[Tensor, "n j"], psi: Float[Tensor, "n j"]) -> PerRow:
    """Return |phi - psi|_1 / (|phi|_1 + |psi|_1 + 1e-6)."""
    total = phi.abs().sum(dim=-1) + psi.abs().sum(dim=-1) + 1e-6
    return (phi - psi).abs().sum(dim=-1) / total


def aligned(
    ids: Int64[Tensor, "pos"],
    is_token: Bool[Tensor, "pos"],
    other: Int64[Tensor, "pos2"],
    is_other: Bool[Tensor, "pos2"],
) -> tuple[list[int], list[int]]:
    """Return the places of the tokens that two texts share, in order (difflib's longest blocks).

    >>> one, two = torch.tensor([5, 7, 8, 9]), torch.tensor([5, 6, 7, 9, 0])
    >>> aligned(one, one > 0, two, two > 0)
    ([0, 1, 3], [0, 2, 3])
    """
    first, second = ids[is_token].tolist(), other[is_other].tolist()
    blocks = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    at_a = [block.a + i for block in blocks for i in range(block.size)]
    at_b = [block.b + i for block in blocks for i in range(block.size)]
    return at_a, at_b


def gradient_distance(
    gradients: Float[Tensor, "n pos d"],
    others: Float[Tensor, "n pos2 d"],
    places: Sequence[tuple[list[int], list[int]]],
) -> PerRow:
    """Return 1 - cosine of two texts' gradients on the tokens that they share.

    Args:
        gradients: Of the loss of each text by its token embeddings.
        others: The same of the perturbed texts.
        places: Of each pair, see `aligned`.
    """
    rows = [
        cosine_distance(gradient[at_a].flatten()[None], other[at_b].flatten()[None])
        for gradient, other, (at_a, at_b) in zip(gradients, others, places, strict=True)
    ]
    return torch.cat(rows)
