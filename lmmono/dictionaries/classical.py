"""Classical decompositions: fitted by scikit-learn, used in torch from the tensors it learned.

Every method ends as directions of unit norm and an offset, so a coefficient is in the hook's own
units and says how far a token goes along its direction.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from lmmono.dictionaries.coding import keep_largest, non_negative_code, orthogonal_pursuit
from lmmono.dictionaries.estimator import PlainDictionary
from lmmono.dictionaries.vector_source import VectorSource
from lmmono.errors import DictionaryError
from lmmono.recipe.dictionary_settings import Decomposition
from lmmono.recipe.reference import settings_help
from lmmono.types import Progress

Array = np.ndarray
Fitted = tuple[dict[str, Array], Any]
"""Weights by name, and the scikit-learn estimator that they come from."""


class Classical(PlainDictionary):
    """PCA, ICA, NMF, sparse dictionary learning or k-means; `x` is about `acts @ W_dec + b_dec`.

    With `arch` the code of a token is
        pca: its coordinates along the principal directions; signed, dense.
        ica: its independent components (FastICA, parallel, logcosh), scaled by the length of their
            directions; signed, dense.
        nmf: the non-negative coefficients that fit best; only for vectors without negative entries.
        dictionary_learning: k signed coefficients by orthogonal matching pursuit, on directions
            fitted by online dictionary learning (Mairal et al. 2010) to vectors that are centred
            and scaled to mean norm 1, with their penalty 1.2 / sqrt(d_in).
        kmeans: one active latent, the nearest centroid's, whose act is the centroid's distance from
            the mean of all vectors; so `decode` gives the centroid.

    With `k`, pca, ica and nmf keep the k coefficients of largest size and nothing is fitted anew:
    for pca that is the best reconstruction from k of its directions, because they are orthogonal;
    for ica and nmf a least-squares fit on the same directions would be better or equal.
    """

    kind: ClassVar[str] = "classical"
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(Decomposition)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name: `W_dec` [d_sae, d_in] of unit rows, `b_dec`, and more."""
        self._check_fitted("tensors")
        return dict(self._weights)

    def _learn(self, source: VectorSource, progress: Progress) -> dict[str, Tensor]:
        from sklearn.exceptions import ConvergenceWarning

        settings = self.settings
        _check_width(settings, self.d_sae, self.d_in)
        x = source.first(settings.max_tokens)[self.hook or ""].cpu().numpy()
        if len(x) < self.d_sae:
            raise DictionaryError(
                f"{self.arch}: {len(x)} vectors for {self.d_sae} latents; want at least as many: "
                "capture more tokens, raise max_tokens or lower d_sae"
            )
        progress(f"fit {self.arch}", 0, len(x))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights, fitted = _FITS[self.arch](x, self.d_sae, settings, self.seed)
        n_iterations = int(getattr(fitted, "n_iter_", 0))
        stopped_early = any(issubclass(w.category, ConvergenceWarning) for w in caught)
        self.facts |= {
            "n_tokens": len(x),
            "n_iterations": n_iterations,
            "converged": not stopped_early and n_iterations < settings.max_iterations,
            "warnings": sorted({warning.category.__name__ for warning in caught}),
        }
        progress(f"fit {self.arch}", len(x), len(x))
        return {k: torch.from_numpy(np.ascontiguousarray(w)) for k, w in weights.items()}

    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        w = self._on(x)
        centred = x - w["b_dec"]
        match self.arch:
            case "pca" | "ica":
                return keep_largest(centred @ w["W_enc"], self.settings.k)
            case "nmf":
                return keep_largest(non_negative_code(x, w["W_dec"]), self.settings.k)
            case "dictionary_learning":
                return orthogonal_pursuit(centred, w["W_dec"], self.settings.k)
            case _:  # kmeans: |x - c|^2 without |x|^2, which is the same for every centroid
                nearness = (centred @ w["W_dec"].T) * w["distance"] - w["distance"].square() / 2
                chosen = nearness.argmax(1, keepdim=True)
                return torch.zeros_like(nearness).scatter(1, chosen, w["distance"][chosen])

    def _decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        w = self._on(acts)
        return acts @ w["W_dec"] + w["b_dec"]


Classical.__doc__ = settings_help(Classical.__doc__, Decomposition)


def _pca(x: Array, d_sae: int, settings: Decomposition, seed: int) -> Fitted:
    from sklearn.decomposition import PCA

    del settings
    # "auto" may take the randomized solver, which only approximates
    solver = "full" if len(x) < x.shape[1] else "covariance_eigh"
    fitted: Any = PCA(d_sae, svd_solver=solver, random_state=seed).fit(x)
    return {
        "W_enc": fitted.components_.T,
        "W_dec": fitted.components_,
        "b_dec": fitted.mean_,
        "variance": fitted.explained_variance_,
    }, fitted


def _ica(x: Array, d_sae: int, settings: Decomposition, seed: int) -> Fitted:
    from sklearn.decomposition import FastICA

    # whitening divides by the spread of each direction, so FastICA gives NaN beyond the rank
    rank = int(np.linalg.matrix_rank(np.cov(x.T, dtype=np.float64), hermitian=True))
    if rank < d_sae:
        raise DictionaryError(
            f"ica: the vectors vary in {rank} directions, fewer than d_sae = {d_sae}; lower d_sae"
        )
    fitted: Any = FastICA(
        d_sae, whiten="unit-variance", max_iter=settings.max_iterations, random_state=seed
    ).fit(x)
    directions, sizes = _unit(fitted.mixing_.T)
    return {
        "W_enc": fitted.components_.T * sizes,
        "W_dec": directions,
        "b_dec": fitted.mean_,
    }, fitted


def _nmf(x: Array, d_sae: int, settings: Decomposition, seed: int) -> Fitted:
    from sklearn.decomposition import NMF

    negative = float((x < 0).mean())
    if negative:
        raise DictionaryError(
            f"nmf: {negative:.1%} of the entries are negative; it suits codes that are never so, "
            "such as ReLU or CRATE neurons (blocks.*.mlp.hook_post); take pca or ica here"
        )
    fitted: Any = NMF(cast(Any, d_sae), max_iter=settings.max_iterations, random_state=seed).fit(x)
    return {"W_dec": _unit(fitted.components_)[0], "b_dec": np.zeros_like(x[0])}, fitted


def _dictionary_learning(x: Array, d_sae: int, settings: Decomposition, seed: int) -> Fitted:
    from sklearn.decomposition import MiniBatchDictionaryLearning

    mean = x.mean(0)
    centred = (x - mean).astype(np.float64)  # in float32 the inner solver never meets its tolerance
    scaled = centred / max(np.linalg.norm(centred, axis=1).mean(), np.finfo(np.float32).tiny)
    fitted: Any = MiniBatchDictionaryLearning(
        d_sae,
        alpha=1.2 / np.sqrt(x.shape[1]),  # as Mairal et al. 2009, for data of norm 1
        fit_algorithm="cd",
        max_iter=settings.max_iterations,
        random_state=seed,
    ).fit(scaled)
    return {"W_dec": _unit(fitted.components_)[0].astype(np.float32), "b_dec": mean}, fitted


def _kmeans(x: Array, d_sae: int, settings: Decomposition, seed: int) -> Fitted:
    from sklearn.cluster import MiniBatchKMeans

    fitted: Any = MiniBatchKMeans(d_sae, max_iter=settings.max_iterations, random_state=seed).fit(x)
    mean = x.mean(0)
    directions, sizes = _unit(fitted.cluster_centers_ - mean)
    return {"W_dec": directions, "b_dec": mean, "distance": sizes}, fitted


_FITS: dict[str, Callable[[Array, int, Decomposition, int], Fitted]] = {
    "pca": _pca,
    "ica": _ica,
    "nmf": _nmf,
    "dictionary_learning": _dictionary_learning,
    "kmeans": _kmeans,
}


def _unit(rows: Array) -> tuple[Array, Array]:
    """Return rows of unit norm, and the norms; a zero row stays zero."""
    sizes = np.linalg.norm(rows, axis=1)
    return rows / np.where(sizes > 0, sizes, 1)[:, None], sizes


def _check_width(settings: Decomposition, d_sae: int, d_in: int) -> None:
    """Check what depends on the width of the input.

    Raises:
        DictionaryError: The method has no such number of directions, or `k` exceeds it.
    """
    if settings.arch in ("pca", "ica") and d_sae > d_in:
        raise DictionaryError(
            f"{settings.arch}: has at most d_in = {d_in} directions, got d_sae = {d_sae}; "
            "lower it, or take dictionary_learning, kmeans or an SAE, which can have more"
        )
    most = min(d_sae, d_in) if settings.arch == "dictionary_learning" else d_sae
    if settings.k is not None and settings.k > most:
        raise DictionaryError(f"{settings.arch}: k: want at most {most}, got {settings.k}")
