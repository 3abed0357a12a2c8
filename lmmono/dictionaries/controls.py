"""What a dictionary must beat: codes that learned nothing, and a dense one.

Controls that take structure away from the vectors instead are `vector_source.shuffled`, and models
without structure in `lmmono.models.untrained`.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import normalize

from lmmono.dictionaries.coding import keep_largest, largest_projections, random_directions
from lmmono.dictionaries.estimator import PlainDictionary
from lmmono.dictionaries.sae_training import (
    FitPlan,
    SaeFit,
    check_enough,
    fit_result,
    read_first_batches,
    train_all,
)
from lmmono.dictionaries.vector_source import VectorSource
from lmmono.errors import DictionaryError
from lmmono.files.processes import best_device
from lmmono.recipe import dictionary_settings as dictionaries
from lmmono.recipe.reference import settings_help
from lmmono.types import Progress


class Control(PlainDictionary):
    """A floor or a ceiling for other dictionaries.

    With `arch` the code of a token is
        raw: the vector itself, or its k coordinates of largest size; nothing is learned.
        random: k of d_sae random unit directions, those with the largest projection of the vector
            minus the mean, with coefficients fitted by least squares. Signed, as the projections
            are: no SAE has that freedom, nor that exact fit, so this floor is not a low one.
        dense: the ReLU code of an auto-encoder without any sparsity term, trained by the loop that
            trains SAEs; what reconstruction costs when nothing has to be sparse.
    """

    kind: ClassVar[str] = "control"
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(dictionaries.Control)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name: `W_dec` [d_sae, d_in] of unit rows, and what there is."""
        self._check_fitted("tensors")
        return dict(self._weights) or {"W_dec": torch.eye(self.d_in)}

    def _learn(self, source: VectorSource, progress: Progress) -> dict[str, Tensor]:
        k = getattr(self.settings, "k", None)
        if k is not None and k > min(self.d_sae, self.d_in):
            most = min(self.d_sae, self.d_in)
            raise DictionaryError(f"{self.arch}: k: want at most {most}, got {k}")
        match self.arch:
            case "raw":
                return {}
            case "random":
                x = source.first(self.settings.max_tokens)[self.hook or ""]
                self.facts["n_tokens"] = len(x)
                directions = random_directions(self.d_sae, self.d_in, self.seed)
                # float64, or the mean of many vectors loses digits
                return {"W_dec": directions, "b_dec": x.double().mean(0).float()}
            case _:
                return self._train(source, progress)

    def _encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        w, settings = self._on(x), self.settings
        match self.arch:
            case "raw":
                return keep_largest(x, settings.k)
            case "random":
                return largest_projections(x - w["b_dec"], w["W_dec"], settings.k)
            case _:
                return torch.relu(x @ w["W_enc"] + w["b_enc"])

    def _decode(self, acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        if self.arch == "raw":
            return acts
        w = self._on(acts)
        return acts @ w["W_dec"] + w["b_dec"]

    def _train(self, source: VectorSource, progress: Progress) -> dict[str, Tensor]:
        check_enough(source, self.arch, self.settings.steps, self.d_sae)
        first, hook = read_first_batches(source), self.hook or ""
        scale = first.scales[hook] if self.settings.scaling == "norm" else 1.0
        plan = FitPlan(
            name=self.arch,
            settings=self.settings,
            seed=self.seed,
            hook=hook,
            d_in=self.d_in,
            d_sae=self.d_sae,
            digest=source.digest,
            about={},
            folder=None,
        )
        device = best_device()
        fit = SaeFit(plan, source.batch_tokens, scale, device=device)
        broken = train_all([fit], source, checkpoint_every_steps=None, progress=progress)
        for error in broken.values():
            raise error
        dead_fraction = fit.dead_fraction
        fit.fold()
        weights = _plain_weights(fit.sae)
        x = first.probes[hook].to(device)
        acts = torch.relu(x @ weights["W_enc"] + weights["b_enc"])
        reconstruction = acts @ weights["W_dec"] + weights["b_dec"]
        result = fit_result(self.arch, self.settings, x, acts, reconstruction, dead_fraction)
        self.facts |= {"input_scale": scale, "n_tokens": fit.n_tokens, **result}
        return weights


Control.__doc__ = settings_help(Control.__doc__, dictionaries.Control)


@torch.no_grad()
def _plain_weights(sae: Any) -> dict[str, Tensor]:
    """Return a trained ReLU network with unit directions; the acts take over their lengths."""
    bias = sae.b_enc - sae.b_dec @ sae.W_enc if sae.cfg.apply_b_dec_to_input else sae.b_enc
    sizes = sae.W_dec.norm(dim=1)
    return {
        "W_enc": sae.W_enc * sizes,
        "b_enc": bias * sizes,
        "W_dec": normalize(sae.W_dec, dim=1),
        "b_dec": sae.b_dec.clone(),
    }
