"""High-impact concepts of a hidden layer, after HI-Concept (2305.02160).

A model f = tail(rows). With unit columns c_k, s = C^T h and s' = softmax(s / |h|):
    p = s' where s' > gate, scaled to sum 1;   h' = |h| W2 ReLU(W1 p)
    L = recover * mean |h' / |h| - h / |h||^2 + predict * CE(tail(h'), f's class)
        - impact * mean |P(h') - P(h'_masked)| + apart * mean (C^T C - I)^2
        - alike * mean of the top quarter of each concept's s / |h|
P are class probabilities. In h'_masked each concept is left out with probability 0.2; the first one
never is: it takes up what all texts share. Two stages: the first half without impact, then C moves
alone, with it. Two things differ from the released code: the last term is squared, where a signed
mean also rewards concepts that point apart; and h' has the length of h, since the tail was trained
on rows of that length. Concepts are judged by the model's own classes, never by labels.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lmmono.errors import RobustnessError
from lmmono.methods.storing import load_fitted, save_fitted
from lmmono.training.descent import minimise

Tail = Callable[[Tensor], Tensor]
"""The rest of a model: rows [n, d] to logits [n, c], differentiable in its rows."""

IDLE = 1e-5
"""A concept whose removal changes probabilities by less, on average, has no impact."""


@dataclass(frozen=True, slots=True)
class HiConceptSettings:
    """Weights and sizes, as in the released run script where it has them."""

    n_concepts: int = 10
    d_hidden: int = 500
    gate: float = 0.1
    masked: float = 0.2
    """Probability that a concept is left out."""
    recover: float = 1.0
    predict: float = 1.0
    impact: float = 1.0
    alike: float = 0.1
    apart: float = 0.5
    steps: int = 600
    """Of both stages together."""
    batch: int = 128
    lr: float = 3e-4
    seed: int = 0


class HiConcept:
    """Concepts of rows whose removal changes what a model says: rows in `fit`.

    Attributes:
        impacts: Mean change of probabilities, summed over classes, without each concept.
        kept: Which concepts have an impact.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = HiConceptSettings(**settings)
        self.impacts: Float[Tensor, " k"] = torch.zeros(0)
        self._net: _Concepts | None = None

    def fit(
        self, rows: Float[Tensor, "n d"], tail: Tail, *, folder: Path | None = None
    ) -> "HiConcept":
        """Learn the concepts of rows; the tail stays as it is. Equal seeds give equal bits.

        Raises:
            RobustnessError: The gate leaves no concept, or there are too few rows.
        """
        how = self.settings
        if how.n_concepts < 2 or how.gate >= 1 or len(rows) < how.n_concepts:
            got = f"{how.n_concepts} concepts, gate {how.gate}, {len(rows)} rows"
            raise RobustnessError(f"hi_concept: {got}: want 2 or more, a gate below 1, more rows")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            net = _Concepts(rows.shape[1], how)
        with torch.no_grad():
            classes = tail(rows).argmax(dim=-1)

        def loss(stage: int) -> Callable[[int], Tensor]:
            def value(step: int) -> Tensor:
                del step
                at = torch.randperm(len(rows))[: how.batch]
                return net.loss(rows[at], classes[at], tail, with_impact=stage == 1)

            return value

        for stage in (0, 1):
            net.requires_grad_(stage == 0)
            net.directions.requires_grad_(True)
            key = f"{how} {stage} {float(rows.double().sum())}"
            half, seed = how.steps // 2, how.seed + stage
            minimise(net, loss(stage), steps=half, lr=how.lr, seed=seed, folder=folder, key=key)
        self._net = net.requires_grad_(True)
        self.impacts = self._impacts(rows, tail)
        return self

    @property
    def kept(self) -> Bool[Tensor, " k"]:
        """Return which concepts have an impact."""
        return self.impacts >= IDLE

    @torch.no_grad()
    def encode(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Return the shares p of concepts in rows."""
        return self._fitted().shares(rows)

    @torch.no_grad()
    def recovered(self, rows: Float[Tensor, "n d"], tail: Tail) -> float:
        """Return the share of rows whose class is the same after decoding."""
        net = self._fitted()
        same = tail(net.decode(net.shares(rows), rows)).argmax(-1) == tail(rows).argmax(-1)
        return float(same.float().mean())

    @torch.no_grad()
    def _impacts(self, rows: Tensor, tail: Tail) -> Float[Tensor, " k"]:
        net = self._fitted()
        shares = net.shares(rows)
        whole = tail(net.decode(shares, rows)).softmax(-1)
        changes: list[Tensor] = []
        for k in range(shares.shape[1]):
            without = shares.clone()
            without[:, k] = 0.0
            changed = tail(net.decode(without, rows)).softmax(-1)
            changes.append((whole - changed).abs().sum(-1).mean())
        return torch.stack(changes)

    def save(self, folder: str | Path) -> Path:
        """Write settings and weights into a folder."""
        net = self._fitted()
        about = {"settings": asdict(self.settings), "d": net.directions.shape[0]}
        return save_fitted(Path(folder), {**about, "impacts": self.impacts.tolist()}, net)

    @classmethod
    def load(cls, folder: str | Path) -> "HiConcept":
        """Return what `save` wrote; it gives the same bits.

        Raises:
            RobustnessError: The folder holds none, or a damaged one.
        """

        def build(about: dict[str, Any], tensors: dict[str, Tensor]) -> HiConcept:
            model = cls(**about["settings"])
            model._net = _Concepts(about["d"], model.settings)
            model._net.load_state_dict(tensors)
            model.impacts = torch.tensor(about["impacts"])
            return model

        return load_fitted(Path(folder), build)

    def _fitted(self) -> "_Concepts":
        if self._net is None:
            raise RobustnessError("hi_concept: not fitted; fit it on rows and the model's tail")
        return self._net


class _Concepts(nn.Module):
    def __init__(self, d: int, how: HiConceptSettings) -> None:
        super().__init__()
        self.how = how
        self.directions = nn.Parameter(torch.randn(d, how.n_concepts))
        self.decoder = nn.Sequential(
            nn.Linear(how.n_concepts, how.d_hidden, bias=False),
            nn.ReLU(),
            nn.Linear(how.d_hidden, d, bias=False),
        )

    def scores(self, rows: Tensor) -> Float[Tensor, "n k"]:
        """Return C^T h / |h|."""
        return normalize(rows, dim=1) @ normalize(self.directions, dim=0)

    def shares(self, rows: Tensor) -> Float[Tensor, "n k"]:
        share = self.scores(rows).softmax(dim=1)
        # of flat scores the gate leaves nothing: the largest always stays
        kept = (share > self.how.gate) | (share == share.amax(dim=1, keepdim=True))
        share = share * kept
        return share / share.sum(dim=1, keepdim=True)

    def decode(self, shares: Tensor, rows: Tensor) -> Float[Tensor, "n d"]:
        return self.decoder(shares) * rows.norm(dim=1, keepdim=True)

    def loss(self, rows: Tensor, classes: Tensor, tail: Tail, *, with_impact: bool) -> Tensor:
        how, shares, scores = self.how, self.shares(rows), self.scores(rows)
        back = self.decode(shares, rows)
        logits = tail(back)
        missed = (back - rows) / rows.norm(dim=1, keepdim=True).clamp_min(1e-8)
        unit = normalize(self.directions, dim=0)
        away = unit.T @ unit - torch.eye(unit.shape[1])
        nearest = scores.topk(max(1, len(rows) // 4), dim=0).values
        value = how.recover * missed.square().sum(dim=1).mean()
        value = value + how.predict * cross_entropy(logits, classes)
        value = value - how.alike * nearest.mean() + how.apart * away.square().mean()
        if with_impact:
            left = torch.rand(shares.shape) >= how.masked
            left[:, 0] = True
            changed = tail(self.decode(shares * left, rows)).softmax(-1)
            gap = (logits.softmax(-1) - changed).abs().sum(-1).mean()
            value = value - how.impact * gap
        return value
