"""Distributions over latent features of texts, after DoLFIn (2011.05295): a reconstruction.

The paper's equations could not be read. This is what its abstract and summaries allow:
    p(k | t) = softmax_k(v_t u_k),  v_t a linear map of a frozen row;
    P(k | x) = max_t p(k | t)                 presence `max`
               1 - prod_t (1 - p(k | t))      presence `noisy_or`
    r = sum_k P(k | x) u_k, or the vector P itself;   p(y | x) = softmax(W r)
A token supports a class by sum_k p(t | k) P(k | x) p(y | k), with p(t | k) proportional to p(k | t)
over the text, and p(y | k) = softmax(W u_k)_y. Features are an unordered set, none given before.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lmmono.errors import RobustnessError
from lmmono.methods.storing import load_fitted, save_fitted
from lmmono.training.descent import minimise


@dataclass(frozen=True, slots=True)
class DolfinSettings:
    """Sizes and choices; both `variant` choices are candidates."""

    n_features: int = 32
    d: int = 64
    """Width of feature embeddings."""
    presence: Literal["max", "noisy_or"] = "max"
    variant: Literal["sum", "vector"] = "sum"
    """Whether the head reads the sum of present features or the presences."""
    steps: int = 400
    batch: int = 32
    lr: float = 5e-3
    seed: int = 0


class Dolfin:
    """A classifier of texts by features that are present in them: token rows in `fit`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = DolfinSettings(**settings)
        self._net: _Features | None = None

    def fit(
        self,
        rows: Sequence[Float[Tensor, "_ d_in"]],
        labels: Int64[Tensor, " n"],
        *,
        folder: Path | None = None,
    ) -> "Dolfin":
        """Learn from the token rows of texts and their classes; equal seeds give equal bits.

        Raises:
            RobustnessError: Rows and labels do not fit each other.
        """
        if len(rows) != len(labels) or len(rows) < 2:
            raise RobustnessError(f"dolfin: {len(rows)} texts, {len(labels)} labels: want as many")
        how, whole = self.settings, torch.cat(list(rows))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            net = _Features(whole.shape[1], int(labels.max()) + 1, how)
        net.centre, net.scale = whole.mean(0), whole.std(0).clamp_min(1e-8)

        def loss(step: int) -> Tensor:
            del step
            at = torch.randperm(len(rows))[: how.batch]
            presence = torch.stack([net.presence(rows[i]) for i in at.tolist()])
            return cross_entropy(net.classes(presence), labels[at])

        key = f"{how} {float(whole.double().sum())}"
        minimise(net, loss, steps=how.steps, lr=how.lr, seed=how.seed, folder=folder, key=key)
        self._net = net
        return self

    @torch.no_grad()
    def encode(self, rows: Sequence[Float[Tensor, "_ d_in"]]) -> Float[Tensor, "n k"]:
        """Return the presence of every feature in texts."""
        return torch.stack([self._fitted().presence(of_text) for of_text in rows])

    @torch.no_grad()
    def predict(self, rows: Sequence[Float[Tensor, "_ d_in"]]) -> Float[Tensor, "n c"]:
        """Return log-probabilities of classes."""
        return self._fitted().classes(self.encode(rows)).log_softmax(dim=-1)

    @torch.no_grad()
    def support(self, rows: Float[Tensor, "pos d_in"]) -> Float[Tensor, "pos c"]:
        """Return by how much each token of a text supports each class."""
        net = self._fitted()
        of_token = net.of_tokens(rows)
        presence = net.presence(rows)
        of_feature = net.classes(torch.eye(len(presence))).softmax(dim=-1)
        shares = of_token / of_token.sum(dim=0, keepdim=True).clamp_min(1e-30)
        return (shares * presence) @ of_feature

    def save(self, folder: str | Path) -> Path:
        """Write settings and weights into a folder."""
        net = self._fitted()
        sizes = [net.centre.shape[0], net.head.out_features]
        return save_fitted(Path(folder), {"settings": asdict(self.settings), "sizes": sizes}, net)

    @classmethod
    def load(cls, folder: str | Path) -> "Dolfin":
        """Return what `save` wrote; it gives the same bits.

        Raises:
            RobustnessError: The folder holds none, or a damaged one.
        """

        def build(about: dict[str, Any], tensors: dict[str, Tensor]) -> Dolfin:
            model = cls(**about["settings"])
            d_in, n_classes = about["sizes"]
            model._net = _Features(d_in, n_classes, model.settings)
            model._net.load_state_dict(tensors)
            return model

        return load_fitted(Path(folder), build)

    def _fitted(self) -> "_Features":
        if self._net is None:
            raise RobustnessError("dolfin: not fitted; fit it on token rows and classes first")
        return self._net


class _Features(nn.Module):
    centre: Tensor
    scale: Tensor

    def __init__(self, d_in: int, n_classes: int, how: DolfinSettings) -> None:
        super().__init__()
        self.how = how
        self.project = nn.Linear(d_in, how.d)
        self.features = nn.Parameter(torch.randn(how.n_features, how.d) / how.d**0.5)
        self.head = nn.Linear(how.d if how.variant == "sum" else how.n_features, n_classes)
        self.register_buffer("centre", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(d_in))

    def of_tokens(self, rows: Tensor) -> Float[Tensor, "pos k"]:
        """Return p(k | t)."""
        tokens = self.project((rows - self.centre) / self.scale)
        return (tokens @ self.features.T).softmax(dim=-1)

    def presence(self, rows: Tensor) -> Float[Tensor, " k"]:
        of_tokens = self.of_tokens(rows)
        if self.how.presence == "max":
            return of_tokens.amax(dim=0)
        return 1 - (1 - of_tokens).prod(dim=0)

    def classes(self, presence: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
        return self.head(presence @ self.features if self.how.variant == "sum" else presence)
