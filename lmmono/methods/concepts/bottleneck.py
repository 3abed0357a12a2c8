"""A supervised concept bottleneck on frozen rows of texts, after C3M (2311.05014).

    u_k = W_k x + b_k, one logit per value of concept k;   y = V [u_1; ...; u_K] + b
    L = CE(y, label) + weight * mean_k CE(u_k, concept k), with concept MixUp where asked for

The released code puts concept logits through a sigmoid before the cross entropy, which squashes
twice: of three values none can then get a probability above e / (e + 2) = 0.576. Here it is left
out. There the language model is tuned as well; here its rows are frozen.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from lmmono.errors import RobustnessError
from lmmono.methods.storing import load_fitted, save_fitted
from lmmono.training.descent import minimise


@dataclass(frozen=True, slots=True)
class BottleneckSettings:
    """How a bottleneck is trained."""

    mode: Literal["joint", "sequential", "independent", "standard"] = "joint"
    """`joint`: the head may read what a concept's softmax cannot see, as the sum of its logits, and
    setting concepts then misleads it. `sequential`: concepts first, then the head on them.
    `independent`: the head learns from true concepts. `standard`: no loss on concepts."""
    weight: float = 0.5
    """Of the concepts' cross entropy."""
    mixup: float | None = None
    """Beta(a, a) of the share in MixUp, 0.4 in C3M; None mixes nothing."""
    steps: int = 500
    batch: int = 64
    lr: float = 1e-2
    seed: int = 0


class ConceptBottleneck:
    """A classifier whose head sees concepts alone: settings here, data in `fit`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = BottleneckSettings(**settings)
        self._net: _Bottleneck | None = None

    def fit(
        self,
        x: Float[Tensor, "n d"],
        labels: Int64[Tensor, "_"],
        concepts: Int64[Tensor, "_ k"],
        *,
        folder: Path | None = None,
    ) -> "ConceptBottleneck":
        """Learn from rows with classes and concepts; equal seeds give equal bits.

        Raises:
            RobustnessError: The data do not fit each other.
        """
        if not len(x) == len(labels) == len(concepts) or len(x) < 2:
            raise RobustnessError(
                f"bottleneck: {len(x)} rows, {len(labels)} labels, {len(concepts)} concept rows: "
                "want as many of each, two at least"
            )
        if self.settings.mode == "independent" and self.settings.mixup is not None:
            raise RobustnessError(
                "bottleneck: mode independent learns its head from true concepts, which are not "
                "mixed; leave mixup at None, or take mode joint or sequential"
            )
        how, sizes = self.settings, (int(labels.max()) + 1, int(concepts.max()) + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            net = _Bottleneck(x.shape[1], sizes[0], concepts.shape[1], sizes[1], how.mode)
        net.centre, net.scale = x.mean(0), x.std(0).clamp_min(1e-8)
        scaled = (x - net.centre) / net.scale

        def loss(parts: str) -> Any:
            def value(step: int) -> Tensor:
                del step
                rows = torch.randperm(len(x))[: how.batch]
                shown, share, other = scaled[rows], 1.0, rows
                if how.mixup is not None:
                    share = float(torch.distributions.Beta(how.mixup, how.mixup).sample())
                    other = rows[torch.randperm(len(rows))]
                    shown = share * shown + (1 - share) * scaled[other]
                u, total = net.concepts(shown), torch.zeros(())
                if "head" in parts:
                    y = net.head(net.seen(u, concepts[rows]))
                    total = total + _mixed(y, labels[rows], labels[other], share)
                if "concepts" in parts and how.mode != "standard":
                    flat = u.flatten(0, 1), concepts[rows].flatten(), concepts[other].flatten()
                    weight = how.weight if how.mode == "joint" else 1.0
                    total = total + weight * _mixed(*flat, share)
                return total

            return value

        at_once = how.mode in ("joint", "standard")
        for stage in ("head and concepts",) if at_once else ("concepts", "head"):
            net.read.requires_grad_(stage != "head")
            net.head.requires_grad_(stage != "concepts")
            key = f"{how} {stage} {float(x.double().sum())}"
            steps, lr, seed = how.steps, how.lr, how.seed
            minimise(net, loss(stage), steps=steps, lr=lr, seed=seed, folder=folder, key=key)
        net.requires_grad_(True)
        with torch.no_grad():
            u = net.concepts(scaled)
            net.low, net.high = u.quantile(0.05, dim=0), u.quantile(0.95, dim=0)
        self._net = net
        return self

    @torch.no_grad()
    def concept_logits(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k v"]:
        """Return the logits of the values of every concept."""
        net = self._fitted()
        return net.concepts((x - net.centre) / net.scale)

    @torch.no_grad()
    def predict(
        self,
        x: Float[Tensor, "n d"],
        *,
        truth: Int64[Tensor, "n k"] | None = None,
        which: tuple[int, ...] = (),
    ) -> Float[Tensor, "n c"]:
        """Return log-probabilities of classes, some concepts set to their true values where asked.

        A concept that is set gets the 95th percentile of the training logits at its value and the
        5th at the others (0 and 1 in mode independent).
        """
        net, u = self._fitted(), self.concept_logits(x)
        if which:
            is_true = one_hot(torch.as_tensor(truth), u.shape[2]).bool()
            high, low = (net.high, net.low) if net.mode != "independent" else (30.0, -30.0)
            corrected = torch.where(is_true, torch.as_tensor(high), torch.as_tensor(low))
            u = u.clone()
            u[:, list(which)] = corrected[:, list(which)]
        return net.head(net.seen(u)).log_softmax(dim=-1)

    @torch.no_grad()
    def contributions(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n c k"]:
        """Return V_{c,k} u_k, which with the class's bias sum to its logit."""
        net, u = self._fitted(), self.concept_logits(x)
        weight = net.head.weight.view(-1, *u.shape[1:])
        return torch.einsum("nkv,ckv->nck", net.seen(u).view_as(u), weight)

    def save(self, folder: str | Path) -> Path:
        """Write settings and weights into a folder."""
        net = self._fitted()
        sizes = [net.read.in_features, net.head.out_features, *net.shape]
        return save_fitted(Path(folder), {"settings": asdict(self.settings), "sizes": sizes}, net)

    @classmethod
    def load(cls, folder: str | Path) -> "ConceptBottleneck":
        """Return what `save` wrote; it gives the same bits.

        Raises:
            RobustnessError: The folder holds none, or a damaged one.
        """

        def build(about: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptBottleneck:
            model = cls(**about["settings"])
            d, n_classes, n_concepts, n_values = about["sizes"]
            model._net = _Bottleneck(d, n_classes, n_concepts, n_values, model.settings.mode)
            model._net.load_state_dict(tensors)
            return model

        return load_fitted(Path(folder), build)

    def _fitted(self) -> "_Bottleneck":
        if self._net is None:
            raise RobustnessError("bottleneck: not fitted; fit it on rows with concepts first")
        return self._net


def _mixed(logits: Tensor, labels: Tensor, others: Tensor, share: float) -> Tensor:
    return share * cross_entropy(logits, labels) + (1 - share) * cross_entropy(logits, others)


class _Bottleneck(nn.Module):
    centre: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, d: int, n_classes: int, n_concepts: int, n_values: int, mode: str) -> None:
        super().__init__()
        self.shape, self.mode = (n_concepts, n_values), mode
        self.read = nn.Linear(d, n_concepts * n_values)
        self.head = nn.Linear(n_concepts * n_values, n_classes)
        for name, width in (("centre", (d,)), ("scale", (d,)), ("low", self.shape)):
            self.register_buffer(name, torch.zeros(width))
        self.register_buffer("high", torch.zeros(self.shape))

    def concepts(self, x: Tensor) -> Float[Tensor, "n k v"]:
        return self.read(x).view(len(x), *self.shape)

    def seen(self, u: Tensor, truth: Tensor | None = None) -> Tensor:
        """Return what the head reads; in training of mode independent, the truth."""
        if self.mode == "independent":
            u = u.softmax(-1) if truth is None else one_hot(truth, self.shape[1]).float()
        elif self.mode == "sequential":
            u = u.detach()
        return u.flatten(1)
