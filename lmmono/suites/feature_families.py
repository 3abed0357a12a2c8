"""Feature families: the codes that a probe reads, all through one `fit` and `transform`.

A family is fitted on token rows of clean training texts, without labels, and used unchanged ever
after: on noisy labels, noisy inputs and other domains alike. Beside the codes that are asked about
stand those that learned nothing or nothing sparse, at any width, so that a gain can be laid to
sparsity, to width, or to neither.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.functional import gelu

from lmmono.dictionaries.classical import Classical
from lmmono.dictionaries.coding import random_directions
from lmmono.errors import RobustnessError
from lmmono.recipe.robustness_settings import FamilySettings
from lmmono.registry.lookup import find, load
from lmmono.registry.suites import FAMILIES, NonNegativeMap, Positives

HookRows = Float[Tensor, "n d_in"]
Encode = Callable[[Tensor], Tensor]
AE_STEPS, AE_BATCH, AE_RATE = 400, 256, 2e-3
"""Steps, rows per step and Adam's rate of the dense auto-encoder."""

WIDTH = 4
"""Width of a wide code over that of its rows, where no width is given."""

SAMPLE_ROWS = 64
"""Rows whose code tells one encoder from another, where it has no digest of its own."""


@dataclass(frozen=True, slots=True)
class CodeSettings:
    """What a family may be given; None takes its own."""

    d: int | None = None
    """Width of the code."""
    k: int | None = None
    """Coordinates that stay."""
    positives: Positives | None = None
    """What a contrastive head holds together."""
    map: NonNegativeMap | None = None
    """What keeps a code from going below 0."""
    spread: bool | None = None
    """Whether activations are spread over coordinates by a loss."""
    steps: int | None = None
    """Steps of a training."""
    seed: int = 0
    """Seed of everything random in it."""


@runtime_checkable
class TextRows(Protocol):
    """Texts, and the rows that a model gives of them at a hook."""

    @property
    def texts(self) -> Sequence[str]:
        """Some training texts."""
        ...

    def ids(self, texts: Sequence[str]) -> list[Int64[ndarray, " pos"]]:
        """Return the token ids of texts, the token before each first."""
        ...

    def means(
        self, ids: Sequence[Int64[ndarray, "_"]], dropout_seed: int | None = None
    ) -> Float[Tensor, "n d_in"]:
        """Return the mean row of each text; with a seed, under the model's dropout."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FittedCode:
    """What fitting gives."""

    encode: Encode
    """Rows [n, d_in] to codes [n, d], on the device of the rows."""
    n_parameters: int | None
    """Numbers that were learned or drawn; None where nothing is known of them."""


class FeatureFamily:
    """A code of token rows: settings in the constructor, rows in `fit`.

    Attributes:
        name: Its name; of a kind, or free for an encoder.
        point: Where it reads, unless `hook` says so.
        reads: Whether it codes each token, or the mean row of a text.
        hook: The only hook it reads, such as that of a dictionary; None for any.
        d: Width of the code; 0 before `fit`, as the next ones.
        d_in: Width of the rows.
        l0: Mean number of coordinates that are not zero, on the rows of the fit.
        n_parameters: Numbers learned or drawn; None where that is unknown.
        digest: Says which code this is, over runs.
    """

    def __init__(self, name: str, *, seed: int = 0, **settings: Any) -> None:
        """Check the settings, those of `CodeSettings`; nothing is computed before `fit`.

        Raises:
            RobustnessError: The name is unknown, or a setting is not one of the kind's.
        """
        kind = find("feature family", name, FAMILIES, RobustnessError)
        takes = ", ".join(kind.takes) or "none"
        for setting, value in settings.items():
            if value is None:
                continue
            if setting in ("d", "k", "steps") and (setting not in kind.takes or value < 1):
                raise RobustnessError(f"{name}: {setting}={value}: want a number >= 1 of {takes}")
            if setting not in kind.takes:
                raise RobustnessError(f"{name}: {setting}={value}: it has the settings: {takes}")
        self.name, self.point, self.hook, self.reads = name, kind.point, None, kind.reads
        self._settings, self._learn = CodeSettings(**settings, seed=seed), load(kind.home)
        self._given_digest: str | None = None
        self.d, self.d_in, self.l0, self.digest = 0, 0, 0.0, ""
        self.n_parameters: int | None = None
        self._encode: Encode | None = None

    @classmethod
    def of_encoder(cls, name: str, encode: Encode) -> "FeatureFamily":
        """Return the family of any function from rows to codes, such as `sae.encode`.

        A bound method's object says more, where it has it: `hook`, `digest`, `tensors()`, `reads`.
        """
        family, owner = cls("raw"), getattr(encode, "__self__", None)
        weights: Any = getattr(owner, "tensors", None)
        tensors: dict[str, Tensor] = {} if weights is None else weights()
        n_parameters = sum(tensor.numel() for tensor in tensors.values()) if tensors else None
        family.name, family.hook = name, getattr(owner, "hook", None) or None
        family.reads = getattr(owner, "reads", "tokens")
        family._learn = partial(_given, FittedCode(encode, n_parameters))
        family._given_digest = str(getattr(owner, "digest", "") or "")
        return family

    def __repr__(self) -> str:
        shape = f"d {self.d}, L0 {self.l0:.1f}" if self.d else "not fitted"
        return f"FeatureFamily({self.name}: {shape})"

    def fit(
        self, rows: HookRows, *, origin: str = "", texts: TextRows | None = None
    ) -> "FeatureFamily":
        """Learn the code of some rows.

        Args:
            rows: Rows of tokens, or the mean rows of texts where it reads those; float32.
            origin: Says which rows these are; goes into the digest.
            texts: Their texts, for a family that is learned from pairs of rows.

        Raises:
            RobustnessError: A setting does not fit the rows, or the code is not [n, d].
        """
        rows = rows.float()
        learns_pairs = self.reads == "texts" and self._given_digest is None
        if learns_pairs and texts is None:
            raise RobustnessError(
                f"{self.name}: learned from pairs of a text's rows: name it in `features` or a "
                "recipe, or fit a lmmono.methods.contrastive.ContrastiveHead and give its encode"
            )
        code = self._learn(texts if learns_pairs else rows, self._settings)
        self._encode, self.n_parameters = code.encode, code.n_parameters
        acts = self.transform(rows)
        self.d, self.d_in = acts.shape[1], rows.shape[1]
        self.l0 = float((acts != 0).sum()) / len(acts)
        self.digest = self._identity(acts, origin)
        return self

    @torch.no_grad()
    def transform(self, rows: HookRows) -> Float[Tensor, "n d"]:
        """Return the codes of rows, float32 where the rows are.

        Raises:
            RobustnessError: It is not fitted, or an encoder gives another shape than [n, d].
        """
        if self._encode is None:
            raise RobustnessError(f"{self.name}: not fitted; fit it on token rows first")
        acts = torch.as_tensor(self._encode(rows.float())).to(rows.device).float()
        if acts.ndim != 2 or len(acts) != len(rows):
            raise RobustnessError(
                f"{self.name}: want a code [{len(rows)}, d] of rows {list(rows.shape)}, got "
                f"{list(acts.shape)}"
            )
        return acts

    def _identity(self, acts: Tensor, origin: str) -> str:
        digest, settings = self._given_digest, self._settings
        if digest is None:
            parts: list[Any] = [self.name, settings.d, settings.k, settings.seed, origin]
            later = (settings.positives, settings.map, settings.spread, settings.steps)
            parts += [later] if any(value is not None for value in later) else []
        else:
            sample = acts[:SAMPLE_ROWS].cpu().contiguous().numpy().tobytes()
            parts = [digest or hashlib.sha256(sample).hexdigest()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def as_family(name: str, source: Any, *, seed: int = 0) -> FeatureFamily:
    """Return what `features={name: source}` stands for.

    Args:
        name: The name that it gets in tables.
        source: None for the rows as they are, a kind by name or as a recipe has it, a
            `FeatureFamily`, or an encoder.
        seed: Seed of what is drawn, for a kind given by name.

    Raises:
        RobustnessError: It is none of these, or an unknown kind.
    """
    if isinstance(source, FeatureFamily):
        family = source
    elif isinstance(source, FamilySettings):
        family = FeatureFamily(source.name, seed=seed, **source.model_dump(exclude={"name"}))
    elif source is None or isinstance(source, str):
        family = FeatureFamily(source or "raw", seed=seed)
    elif callable(source):
        family = FeatureFamily.of_encoder(name, cast(Encode, source))
    else:
        raise RobustnessError(
            f"features[{name!r}]: want None, a name ({', '.join(FAMILIES)}), a FeatureFamily or a "
            f"function such as sae.encode; got {type(source).__name__}"
        )
    return family


def _given(code: FittedCode, rows: Tensor, settings: CodeSettings) -> FittedCode:
    del rows, settings
    return code


def raw(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return the rows as they are."""
    del rows, settings
    return FittedCode(lambda x: x, 0)


def relu(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return what is above the mean of the rows, coordinate by coordinate."""
    del settings
    centre = rows.mean(0)
    return FittedCode(lambda x: torch.relu(x - centre), centre.numel())


def random_projection(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return random directions: dense, and nothing learned."""
    weight = _directions(rows, settings, rows.shape[1])
    return FittedCode(lambda x: x @ weight, weight.numel())


def random_relu(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return the ReLU of random directions around the mean: half sparse, nothing learned."""
    centre, weight = rows.mean(0), _directions(rows, settings, WIDTH * rows.shape[1])
    n_parameters = weight.numel() + centre.numel()
    return FittedCode(lambda x: torch.relu((x - centre) @ weight), n_parameters)


def random_topk(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return the k largest of random directions, where positive: sparse, not learned."""
    centre, weight = rows.mean(0), _directions(rows, settings, WIDTH * rows.shape[1])
    k = min(settings.k or 32, weight.shape[1])

    def encode(x: Tensor) -> Tensor:
        acts = (x - centre) @ weight
        top = acts.topk(k, dim=1)
        return torch.zeros_like(acts).scatter(1, top.indices, top.values.clamp_min(0.0))

    return FittedCode(encode, weight.numel() + centre.numel())


def _directions(rows: Tensor, settings: CodeSettings, d: int) -> Float[Tensor, "d_in d"]:
    """Return random directions of unit norm, one per column."""
    return random_directions(settings.d or d, rows.shape[1], settings.seed).T.to(rows.device)


def pca(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return the leading principal directions."""
    most = min(rows.shape)
    d = settings.d or most
    if d > most:
        raise RobustnessError(
            f"pca: d={d}: {rows.shape[0]} rows of width {rows.shape[1]} have {most}"
        )
    fitted = Classical("pca", d_sae=d, max_tokens=len(rows)).fit(rows)
    weights = fitted.tensors()
    return FittedCode(fitted.encode, weights["W_enc"].numel() + weights["b_dec"].numel())


def dense_ae(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Learn x -> gelu(x W + b) -> x by Adam: as wide as a sparse code, and nothing sparse in it.

    `Control("dense")` of `lmmono.dictionaries` is no such code: its ReLU leaves zeros, as SAEs do.
    """
    d_in, d = rows.shape[1], settings.d or 4 * rows.shape[1]
    centre, scale = rows.mean(0), rows.std().clamp_min(1e-8)
    random = torch.Generator().manual_seed(settings.seed)
    encoder = (torch.randn(d_in, d, generator=random) / d_in**0.5).to(rows.device)
    decoder = (torch.randn(d, d_in, generator=random) / d**0.5).to(rows.device)
    weights = [nn.Parameter(encoder), nn.Parameter(torch.zeros(d, device=rows.device))]
    weights.append(nn.Parameter(decoder))
    optimizer = torch.optim.Adam(weights, lr=AE_RATE)
    with torch.enable_grad():
        for _ in range(AE_STEPS):
            chosen = torch.randint(len(rows), (min(AE_BATCH, len(rows)),), generator=random)
            x = (rows[chosen.to(rows.device)] - centre) / scale
            loss = (gelu(x @ weights[0] + weights[1]) @ weights[2] - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    w, b = weights[0].detach(), weights[1].detach()
    return FittedCode(lambda x: gelu((x - centre) / scale @ w + b), w.numel() + b.numel())


def top_neurons(rows: Tensor, settings: CodeSettings) -> FittedCode:
    """Return the k coordinates that vary most."""
    k = min(settings.k or 128, rows.shape[1])
    chosen = rows.var(0).topk(k).indices.sort().values
    return FittedCode(lambda x: x[:, chosen], k)
