"""Contrastive heads on frozen features: CL, NCL, and CSR's top-k code with a contrastive term.

    g = LayerNorm, Linear(d_in, 4 d_in), ReLU, Linear(4 d_in, d);   CL: z = g(x), NCL: z = map(g(x))
    InfoNCE: - mean log exp(z_i z_p / t) / sum_{j != i} exp(z_i z_j / t), z of unit norm

The two arms of 2410.21331 differ in the map alone (Wang et al. 2024, 2403.12459; there the head is
a projector on a vision model that is trained with it). x is the mean row of a text, in training and
afterwards; a positive pair are two views of one text:

    dropout     two passes with the model's dropout, its weights as they are
    spans       two spans of the text without a common token
    sentences   two neighbouring sentences, each read by itself

Two identical passes are no pair: the positive term is then a constant and only uniformity is
learned, as in the text code of CSR (2503.01776). They are refused.

`spread` is -mean |z|, on z of unit norm: 2410.21331's code adds it to NCL alone, with weight 1, and
no text that could be read mentions it. It pushes against sparsity and keeps units alive; here it is
off, and CL may have it too.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lmmono.errors import RobustnessError
from lmmono.methods.nonneg import MAPS
from lmmono.methods.storing import load_fitted, save_fitted
from lmmono.registry.suites import NonNegativeMap, Positives
from lmmono.suites.feature_families import CodeSettings, FittedCode, TextRows
from lmmono.training.descent import minimise

SPAN_TOKENS = 64
"""Tokens of a span; of a short text, half of it."""

LEAST_TOKENS = 4
"""A text of fewer has no two spans worth the name."""

LEAST_PAIRS = 16
"""InfoNCE over fewer texts says next to nothing."""

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How a contrastive head is built and trained."""

    map: NonNegativeMap | None = "rep_relu"
    """NCL's non-negative map; None: CL."""
    d: int | None = None
    """Width of the code; None takes four times that of the rows."""
    temperature: float = 0.2
    """As 2410.21331; SimCSE has 0.05."""
    spread: float = 0.0
    """Weight of the undocumented -mean |z|."""
    k: int | None = None
    """A number makes it CSR: a tied SAE of which the k largest codes stay; `map` is then nothing.
    """
    steps: int = 400
    batch: int = 256
    """Pairs per step."""
    lr: float = 1e-3
    normalised: bool = False
    """Give codes of unit norm, as the loss sees them; a probe may read either."""
    seed: int = 0


class ContrastiveHead:
    """A code of mean rows of texts, learned from pairs: settings here, pairs in `fit`.

    Attributes:
        settings: The settings.
        losses: Loss of every step, after `fit`.
    """

    reads: Literal["texts"] = "texts"

    def __init__(self, **settings: Any) -> None:
        self.settings = HeadSettings(**settings)
        self.losses: list[float] = []
        self._net: nn.Module | None = None

    def fit(
        self,
        pairs: tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]],
        *,
        folder: Path | None = None,
    ) -> "ContrastiveHead":
        """Learn from pairs of rows; resumable in a folder, equal seeds give equal bits.

        Raises:
            RobustnessError: Too few pairs, or both sides of them are the same.
        """
        a, b = (side.float() for side in pairs)
        different = (a != b).any(dim=1)
        if int(different.sum()) < min(LEAST_PAIRS, len(a)) or len(a) < LEAST_PAIRS:
            raise RobustnessError(
                f"contrastive head: want at least {LEAST_PAIRS} pairs of different rows, got "
                f"{int(different.sum())} of {len(a)}: two identical passes teach nothing but "
                "uniformity; a model without dropout wants positives spans or sentences"
            )
        a, b, how = a[different], b[different], self.settings
        data = hashlib.sha256(torch.cat([a, b]).cpu().numpy().tobytes()).hexdigest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            net = _network(a.shape[1], how, torch.cat([a, b]).mean(0).cpu()).to(a.device)

        def loss(step: int) -> Tensor:
            del step
            rows = torch.randperm(len(a))[: how.batch].to(a.device)
            return net.loss(a[rows], b[rows])

        self._net = net
        self.losses = minimise(
            net, loss, steps=how.steps, lr=how.lr, seed=how.seed, folder=folder, key=f"{how} {data}"
        )
        return self

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d"]:
        """Return the codes of mean rows.

        Raises:
            RobustnessError: It is not fitted.
        """
        z = self._fitted().to(x.device).code(x.float())
        return normalize(z, dim=1) if self.settings.normalised else z

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return dict(self._fitted().state_dict())

    def save(self, folder: str | Path) -> Path:
        """Write settings and weights into a folder, whole or not at all."""
        about = {"settings": asdict(self.settings), "d_in": self._fitted().d_in}
        return save_fitted(Path(folder), about, self._fitted())

    @classmethod
    def load(cls, folder: str | Path) -> "ContrastiveHead":
        """Return the head that `save` wrote; it gives the same bits.

        Raises:
            RobustnessError: The folder holds none, or a damaged one.
        """

        def build(about: dict[str, Any], tensors: dict[str, Tensor]) -> ContrastiveHead:
            head = cls(**about["settings"])
            d_in = int(about["d_in"])
            net = _network(d_in, head.settings, torch.zeros(d_in))
            net.load_state_dict(tensors)
            head._net = net.eval()
            return head

        return load_fitted(Path(folder), build)

    def _fitted(self) -> "_Head":
        if self._net is None:
            raise RobustnessError("contrastive head: not fitted; fit it on pairs of rows first")
        return self._net  # pyright: ignore[reportReturnType]


def info_nce(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], temperature: float
) -> Float[Tensor, ""]:
    """Return InfoNCE of pairs, every other row of both sides a negative (SimCLR's)."""
    z = normalize(torch.cat([a, b]), dim=1)
    alike = z @ z.T / temperature
    alike = alike.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(a))
    return cross_entropy(alike, partner)


class _Head(nn.Module):
    """What a head is: a code of rows, and the loss of pairs of rows."""

    def __init__(self, d_in: int, how: HeadSettings) -> None:
        super().__init__()
        self.d_in, self.how, d = d_in, how, how.d or 4 * d_in
        self.d = d

    def code(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        codes = self.code(a), self.code(b)
        value = info_nce(*codes, self.how.temperature)
        if self.how.spread:
            value = value - self.how.spread * normalize(torch.cat(codes), dim=1).abs().mean()
        return value


class _Projector(_Head):
    """The head of CL and NCL."""

    def __init__(self, d_in: int, how: HeadSettings) -> None:
        super().__init__(d_in, how)
        wide = 4 * d_in
        layers = (nn.LayerNorm(d_in), nn.Linear(d_in, wide), nn.ReLU(), nn.Linear(wide, self.d))
        self.layers = nn.Sequential(*layers)

    def code(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        return z if self.how.map is None else MAPS[self.how.map](z)


AUX_K, DEAD_AFTER = 512, 30
"""CSR: dead latents that mend what is left, and the steps after which a latent is dead."""


class _TiedTopK(_Head):
    """CSR's code: s = top k of ReLU(W (x - b_pre) + b), x' = s W + b_pre, with InfoNCE on s.

    Loss: MSE_k + MSE_4k / 8 + AuxK / 32 + 0.1 InfoNCE.
    """

    silent: Tensor

    def __init__(self, d_in: int, how: HeadSettings, centre: Tensor) -> None:
        super().__init__(d_in, how)
        self.weight = nn.Parameter(normalize(torch.randn(self.d, d_in), dim=1))
        self.b_pre, self.bias = nn.Parameter(centre.clone()), nn.Parameter(torch.zeros(self.d))
        self.register_buffer("silent", torch.zeros(self.d, dtype=torch.long))

    def _pre(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.b_pre) @ self.weight.T + self.bias)

    def _top(self, acts: Tensor, k: int) -> Tensor:
        top = acts.topk(min(k, self.d), dim=1)
        return torch.zeros_like(acts).scatter(1, top.indices, top.values)

    def code(self, x: Tensor) -> Tensor:
        return self._top(self._pre(x), self.how.k or 1)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        k, x = self.how.k or 1, torch.cat([a, b])
        acts = self._pre(x)
        codes = self._top(acts, k)
        with torch.no_grad():
            self.silent.copy_((self.silent + 1).where((codes == 0).all(0), 0))
        scale = (x - x.mean(0)).square().mean()
        left = x - self.b_pre - codes @ self.weight
        wide = x - self.b_pre - self._top(acts, 4 * k) @ self.weight
        value = (left.square().mean() + wide.square().mean() / 8) / scale
        dead = self.silent >= DEAD_AFTER
        if dead.any():
            aux = self._top(acts * dead, min(AUX_K, int(dead.sum()))) @ self.weight
            value = value + (left.detach() - aux).square().mean() / scale / 32
        first, second = codes.chunk(2)
        return value + 0.1 * info_nce(first, second, self.how.temperature)


def _network(d_in: int, how: HeadSettings, centre: Tensor) -> _Head:
    return _Projector(d_in, how) if how.k is None else _TiedTopK(d_in, how, centre)


def positive_pairs(
    rows: TextRows, kind: Positives, seed: int
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_in"]]:
    """Return the mean rows of two views of texts; texts too short for two views are left out.

    Raises:
        RobustnessError: Hardly any text has two views.
    """
    ids = rows.ids(rows.texts)
    if kind == "dropout":
        return rows.means(ids, 2 * seed + 1), rows.means(ids, 2 * seed + 2)
    if kind == "spans":
        random = np.random.default_rng((seed, 41))  # 41: a stream of its own
        views = [_two_spans(text, random) for text in ids if len(text) > LEAST_TOKENS]
    else:
        random = np.random.default_rng((seed, 43))
        couples = [_neighbours(text, random) for text in rows.texts]
        flat = rows.ids([sentence for couple in couples for sentence in couple or ()])
        views = list(zip(flat[::2], flat[1::2], strict=True))
    if len(views) < LEAST_PAIRS:
        raise RobustnessError(
            f"positives {kind}: {len(views)} of {len(ids)} texts have two; want at least "
            f"{LEAST_PAIRS}: take others, dropout where the model has it"
        )
    firsts, seconds = zip(*views, strict=True)
    return rows.means(firsts), rows.means(seconds)


def _two_spans(ids: Any, random: np.random.Generator) -> tuple[Any, Any]:
    """Return two spans of a text without a common token, each after the token before the text."""
    body = ids[1:]
    n = min(SPAN_TOKENS, len(body) // 2)
    room = len(body) - 2 * n
    before, between = sorted(random.integers(0, room + 1, 2).tolist())
    one, two = before, between + n
    return tuple(np.concatenate([ids[:1], body[at : at + n]]) for at in (one, two))  # pyright: ignore[reportReturnType]


def _neighbours(text: str, random: np.random.Generator) -> tuple[str, str] | None:
    sentences = [part for part in SENTENCE_END.split(text) if part.strip()]
    if len(sentences) < 2:
        return None
    at = int(random.integers(len(sentences) - 1))
    return sentences[at], sentences[at + 1]


def cl(rows: TextRows, settings: CodeSettings) -> FittedCode:
    """Learn a contrastive head: dense, and nothing non-negative in it."""
    return _learned(rows, settings, map=None)


def ncl(rows: TextRows, settings: CodeSettings) -> FittedCode:
    """Learn a contrastive head whose code is not negative."""
    return _learned(rows, settings, map=settings.map or "rep_relu")


def csr(rows: TextRows, settings: CodeSettings) -> FittedCode:
    """Learn a tied top-k SAE with a contrastive term: 8 of four times the width, where not told."""
    return _learned(rows, settings, map=None, k=settings.k or 8, lr=4e-4)


def _learned(rows: TextRows, settings: CodeSettings, **arguments: Any) -> FittedCode:
    arguments |= {"d": settings.d, "seed": settings.seed, "spread": float(settings.spread or 0)}
    if settings.steps is not None:
        arguments["steps"] = settings.steps
    pairs = positive_pairs(rows, settings.positives or "spans", settings.seed)
    head = ContrastiveHead(**arguments).fit(pairs)
    return FittedCode(head.encode, sum(w.numel() for w in head.tensors().values()))
