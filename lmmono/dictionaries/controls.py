"""What a dictionary must beat: codes that learned nothing, and vectors without structure.

`Control` has dictionaries that are no result; `shuffled` takes away what there was to find, so that
any dictionary can be fitted on the rest. Models without structure are in `lmmono.models.untrained`.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import normalize

from lmmono.dictionaries.coding import keep_largest, largest_projections, random_directions
from lmmono.dictionaries.sae_training import Plan, Training, train_all
from lmmono.dictionaries.soundness import check_alive, check_enough, fvu_of, open_vectors
from lmmono.dictionaries.vector_source import Vectors, as_vectors
from lmmono.dictionaries.weight_files import PlainDictionary
from lmmono.errors import DictionaryError
from lmmono.recipe import dictionary_settings as dictionaries
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

    def _learn(self, source: Vectors, progress: Progress) -> dict[str, Tensor]:
        k = getattr(self.settings, "k", None)
        if k is not None and k > min(self.d_sae, self.d_in):
            most = min(self.d_sae, self.d_in)
            raise DictionaryError(f"{self.arch}: k: want at most {most}, got {k}")
        if self.arch == "random":
            return self._draw(source)
        return {} if self.arch == "raw" else self._train(source, progress)

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

    def _draw(self, source: Vectors) -> dict[str, Tensor]:
        x = source.first(self.settings.max_tokens)[self.hook or ""]
        self.facts["n_tokens"] = len(x)
        directions = random_directions(self.d_sae, self.d_in, self.seed)
        return {"W_dec": directions, "b_dec": x.double().mean(0).float()}

    def _train(self, source: Vectors, progress: Progress) -> dict[str, Tensor]:
        check_enough(source, self.arch, self.settings.steps, self.d_sae)
        opening, hook = open_vectors(source), self.hook or ""
        scale = opening.scales[hook] if self.settings.scaling == "norm" else 1.0
        plan = self._plan(source, hook)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        training = Training(plan, source.batch_tokens, scale, device=device)
        broken = train_all([training], source, checkpoint_every_steps=None, progress=progress)
        for error in broken.values():
            raise error
        dead = training.dead_fraction
        training.fold()
        weights = _plain_weights(training.sae)
        probe = opening.probes[hook].to(device)
        acts = torch.relu(probe @ weights["W_enc"] + weights["b_enc"])
        reached = {
            "l0": float(acts.count_nonzero()) / len(acts),
            "fvu": fvu_of(probe, acts @ weights["W_dec"] + weights["b_dec"]),
            "dead_fraction": dead,
        }
        check_alive(self.arch, self.settings, reached)
        self.facts |= {"input_scale": scale, "n_tokens": training.n_tokens, **reached}
        return weights

    def _plan(self, source: Vectors, hook: str) -> Plan:
        return Plan(
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


def shuffled(vectors: Any, seed: int = 0) -> Vectors:
    """Return vectors whose every coordinate is permuted over the tokens of its batch.

    Each coordinate keeps its own distribution and no coordinate knows of another, nor one hook of
    another. Batch k depends on the vectors, the seed and k alone.

    Args:
        vectors: What `Dictionary.fit` takes.
        seed: Seed of the permutations.

    Raises:
        DictionaryError: These are no vectors.
    """
    return _Shuffled(as_vectors(vectors), seed)


class _Shuffled(Vectors):
    def __init__(self, source: Vectors, seed: int) -> None:
        self._source, self._seed = source, seed
        self.widths, self.n_tokens = source.widths, source.n_tokens
        self.batch_tokens = source.batch_tokens
        self.digest = hashlib.sha256(
            json.dumps(["shuffled", seed, source.digest]).encode()
        ).hexdigest()
        self.facts = {**source.facts, "control": "shuffled", "control_seed": seed}

    def _batches(self, start: int) -> Iterator[dict[str, Float[Tensor, "n _"]]]:
        for number, batch in enumerate(self._source.batches(start), start=start):
            random = np.random.default_rng((self._seed, number))
            yield {
                hook: torch.from_numpy(random.permuted(x.cpu().numpy(), axis=0)).to(x.device)
                for hook, x in batch.items()
            }
