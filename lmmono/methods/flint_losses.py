"""The losses of FLINT, as numbers on tensors. Parekh, Mozharovskyi, d'Alché-Buc, arXiv 2010.09345.

Phi are the attributes of a batch, phi_j >= 0, J of them; f the logits of the predictor, h those of
the interpreter. E(v) = -sum_i p_i log p_i with p = softmax(v). The paper's formulas and those of
the authors' code differ; each function says which it is. E(Phi) is flat near 0: its gradient is of
use from activations of about log J on, so a scale may sharpen it, and the entropies begin late in
training.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Diversity = Literal["norm", "paper", "mi"]
"""`paper`: entropy of softmax of the mean. `mi`: of the mean of softmaxes. `norm`: of the mean, as
shares of its sum."""

Phi = Float[Tensor, "batch attribute"]
Scalar = Float[Tensor, ""]

TINY = 1e-12
"""Keeps shares of attributes that are all dead even: no regulariser then rewards death."""


def entropy(values: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Return E(v), the entropy of softmax(v) in nats, of each row."""
    log_p = values.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def conciseness(phi: Phi, *, scale: float = 1.0) -> Scalar:
    """Return the mean over texts of E(scale |Phi(x)|): small where few attributes explain a text.

    The paper has E(Phi); its code takes |Phi|, which is the same where attributes are not negative.
    """
    return entropy(scale * phi.abs()).mean()


def usage(phi: Phi) -> Float[Tensor, " attribute"]:
    """Return the mean of |Phi| over texts, what diversity is measured on."""
    return phi.abs().mean(0)


def diversity(phi: Phi, kind: Diversity, *, mean: Tensor | None = None) -> Scalar:
    """Return how evenly attributes are used over texts, in nats; up to log J, and to be made large.

    `paper`: E(mean_x Phi). It saturates once a handful of attributes are used. `mi`: the entropy of
    mean_x softmax(Phi), which together with `conciseness` is a mutual information. `norm`: the
    entropy of mean_x Phi / sum_j mean_x phi_j, which no scale changes and which reaches attributes
    of small mass too.

    Args:
        phi: Attributes of a batch.
        kind: Which of the three.
        mean: `usage` over more texts than the batch, for a batch of fewer texts than attributes:
            on one-hot attributes a small batch underestimates. Not taken by `mi`.
    """
    mean = usage(phi) if mean is None else mean
    match kind:
        case "paper":
            return entropy(mean)
        case "mi":
            return _of_shares(phi.abs().softmax(-1).mean(0))
        case "norm":
            return _of_shares(mean)


def _of_shares(mass: Float[Tensor, " attribute"]) -> Scalar:
    shares = (mass + TINY) / (mass + TINY).sum()
    return -(shares * shares.log()).sum()


def mean_l1(phi: Phi) -> Scalar:
    """Return the mean of |Phi| over texts and attributes, as the authors' code has it.

    The paper sums over attributes: with J = 24 and one active attribute of size m, E + eta m is
    smallest at m = 0 from eta 0.5 on, so that with weights of the paper's size every one dies.
    """
    return phi.abs().mean()


def output_fidelity(scores: Float[Tensor, "batch c"], logits: Float[Tensor, "batch c"]) -> Scalar:
    """Return -sum softmax(f) log softmax(h), f a teacher without gradient: the authors' code."""
    return -(logits.detach().softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()


def paper_output_fidelity(
    scores: Float[Tensor, "batch c"], logits: Float[Tensor, "batch c"]
) -> Scalar:
    """Return -sum softmax(h) log softmax(f), as the paper writes it: h is the target."""
    return -(scores.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def word_loss(log_p: Float[Tensor, "batch word"], counts: Float[Tensor, "batch word"]) -> Scalar:
    """Return the mean over texts of -sum_v c_v log p_v / sum_v c_v, in nats per word.

    A text without a word of the vocabulary does not count; 0 where none has one.
    """
    n_words = counts.sum(-1)
    has_words = n_words > 0
    losses = -(counts * log_p).sum(-1) / n_words.clamp_min(1.0)
    return (losses * has_words).sum() / has_words.sum().clamp_min(1)


def embedding_loss(embedding: Float[Tensor, "batch d"], target: Float[Tensor, "batch d"]) -> Scalar:
    """Return the mean over texts of 1 - cos(d(Phi), e) + mean (d(Phi) - e)^2."""
    cosine = torch.nn.functional.cosine_similarity(embedding, target, dim=-1)
    return (1.0 - cosine + (embedding - target).square().mean(-1)).mean()


def token_loss(
    log_p: Float[Tensor, "batch pos v"],
    ids: Int64[Tensor, "batch pos"],
    used: Bool[Tensor, "batch pos"],
) -> Scalar:
    """Return the mean of -log p(token t | a_t) over the tokens of all texts."""
    losses = -log_p.gather(-1, ids[..., None])[..., 0]
    return (losses * used).sum() / used.sum().clamp_min(1)


def ramp(share: float, first: float, last: float | None = None) -> float:
    """Return how much of a weight is on after a share of the training.

    0 before `first`, 1 from `last` on and a line between; a step where `last` is None.

    >>> [ramp(share, 0.25, 0.4) for share in (0.2, 0.325, 0.5)]
    [0.0, 0.5, 1.0]
    """
    if last is None or last <= first:
        return float(share >= first)
    return min(1.0, max(0.0, (share - first) / (last - first)))
