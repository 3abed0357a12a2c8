"""HotFlip for sub-word models: tokens exchanged by the gradient of the class margin.

Source: HotFlip (arXiv 1712.06751), with token embeddings in the place of one-hot characters. To
first order, putting token v in place of x moves the margin by (E[v] - E[x]) . gradient; the best
exchanges by that estimate are tried in the model, and a beam of them goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lmmono.errors import DataError

Score = Callable[[Float[Tensor, "b n d"]], Float[Tensor, "b c"]]
"""Takes input embeddings, returns a score of each class; must be differentiable."""

MayBecome = Callable[[int], Int64[Tensor, "k"]]
"""Takes a token id, returns the ids that may stand in its place."""

Tried = list[tuple[Tensor, tuple[int, ...]]]
"""Sequences with one more token exchanged, and the positions exchanged so far."""


@dataclass(frozen=True, slots=True, eq=False)
class Flipped:
    """What became of one sequence."""

    ids: Int64[Tensor, "n"]
    """The sequence as the attack left it."""
    places: tuple[int, ...]
    """Positions of the tokens exchanged."""
    success: bool
    """Whether the class changed."""
    skipped: bool
    """Whether the class was wrong before, so that there was nothing to attack."""
    margin: float
    """Score of the own class minus the highest other one, at the end."""
    queries: int
    """Sequences that the model scored."""
    gradients: int
    """Sequences that were differentiated."""


@dataclass(frozen=True, slots=True, eq=False)
class _Beam:
    """A sequence on the way."""

    ids: Int64[Tensor, "n"]
    places: tuple[int, ...]
    margin: float


class _Model:
    """Scores by token ids, with queries and gradients counted."""

    def __init__(self, score: Score, embedding: Float[Tensor, "v d"], label: int) -> None:
        self.queries = self.gradients = 0
        self._score, self.embedding, self._label = score, embedding.detach(), label

    def margins(self, ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b"]:
        self.queries += len(ids)
        with torch.no_grad():
            return self._margins(self.embedding[ids])

    def gradient(self, ids: Int64[Tensor, "n"]) -> Float[Tensor, "n d"]:
        self.gradients += 1
        embeds = self.embedding[ids][None].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self._margins(embeds).sum(), embeds)
        return gradient[0]

    def _margins(self, embeds: Float[Tensor, "b n d"]) -> Float[Tensor, "b"]:
        scores = self._score(embeds)
        others = scores.clone()
        others[:, self._label] = -torch.inf
        return scores[:, self._label] - others.max(dim=1).values


def hotflip(
    score: Score,
    embedding: Float[Tensor, "v d"],
    ids: Int64[Tensor, "n"],
    label: int,
    *,
    flips: int = 2,
    beam: int = 10,
    free: Bool[Tensor, "n"] | None = None,
    may_become: MayBecome | None = None,
) -> Flipped:
    """Exchange up to `flips` tokens of a sequence so that a classifier changes its mind.

    Args:
        score: The classifier on input embeddings.
        embedding: The embedding of every token.
        ids: The sequence.
        label: Its true class.
        flips: Tokens that may be exchanged, each once.
        beam: Exchanges tried per sequence, and sequences kept per round.
        free: Positions that may be exchanged; None allows all.
        may_become: What may stand in a token's place; None allows every other token.

    Raises:
        DataError: No position is free, or fewer than one flip or sequence asked for.
    """
    if flips < 1 or beam < 1:
        raise DataError(f"hotflip: want one flip and a beam of one or more, got {flips} and {beam}")
    if not len(ids) or (free is not None and not bool(free.any())):
        raise DataError("hotflip: no position of the sequence may be exchanged")
    model = _Model(score, embedding, label)
    margin = float(model.margins(ids[None])[0])
    best = _Beam(ids, (), margin)
    if margin <= 0:
        return _flipped(best, model, skipped=True)
    beams = [best]
    for _ in range(flips):
        tried = [
            exchanged
            for kept in beams
            for exchanged in _exchanges(model, kept, beam, free, may_become)
        ]
        if not tried:
            break
        margins = model.margins(torch.stack([made for made, _ in tried])).tolist()
        made = [_Beam(*pair, margin) for pair, margin in zip(tried, margins, strict=True)]
        beams = sorted(made, key=lambda one: one.margin)[:beam]
        if beams[0].margin < best.margin:
            best = beams[0]
        if best.margin <= 0:
            break
    return _flipped(best, model, skipped=False)


def _exchanges(
    model: _Model, kept: _Beam, n: int, free: Bool[Tensor, "n"] | None, may_become: MayBecome | None
) -> Tried:
    """Return the sequences of the `n` exchanges that promise to lower the margin most."""
    gradient = model.gradient(kept.ids)
    own = (model.embedding[kept.ids] * gradient).sum(dim=1, keepdim=True)
    change = gradient @ model.embedding.T - own
    closed = torch.zeros_like(kept.ids, dtype=torch.bool) if free is None else ~free
    closed[list(kept.places)] = True
    change[closed] = torch.inf
    change[torch.arange(len(kept.ids), device=kept.ids.device), kept.ids] = torch.inf
    if may_become is not None:
        for place, token in enumerate(kept.ids.tolist()):
            allowed = torch.zeros_like(change[place], dtype=torch.bool)
            allowed[may_become(token)] = True
            change[place, ~allowed] = torch.inf
    values, order = change.flatten().topk(min(n, change.numel()), largest=False)
    made: Tried = []
    for cell in order[torch.isfinite(values)].tolist():
        place, token = divmod(cell, change.shape[1])
        ids = kept.ids.clone()
        ids[place] = token
        made.append((ids, (*kept.places, place)))
    return made


def _flipped(beam: _Beam, model: _Model, *, skipped: bool) -> Flipped:
    return Flipped(
        beam.ids,
        beam.places,
        beam.margin <= 0 and not skipped,
        skipped,
        beam.margin,
        model.queries,
        model.gradients,
    )
