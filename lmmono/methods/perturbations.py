"""Changes of an input that leave its meaning: noise of texts, of tokens, of token embeddings.

What is drawn comes from torch's global generator, so that a training that goes on draws what it
would have drawn. Length-preserving ones keep every token in its place.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmmono.data.corruption.synonyms import (
    Synonyms,
    planted_synonyms,
    read_synonyms,
    wordnet_synonyms,
)
from lmmono.data.corruption.text_noise import corrupt_texts
from lmmono.errors import TrainError
from lmmono.recipe.objective_settings import EMBEDDING_NOISE, Perturbation
from lmmono.registry.suites import TEXT_CORRUPTIONS
from lmmono.training.objectives import ObjectiveContext, Outputs, Step, TrainingBatch


@dataclass(frozen=True, slots=True, eq=False)
class Perturbed:
    """A perturbed batch that the model has read."""

    batch: TrainingBatch
    """What was read."""
    outputs: Outputs
    """What the model made of it."""
    embeds: Tensor | None = None
    """The token embeddings, where they were changed."""


class Perturbing:
    """One kind of perturbation, ready to be applied."""

    def __init__(
        self, settings: Perturbation, context: ObjectiveContext, synonyms: str | None = None
    ) -> None:
        """Take a kind.

        Raises:
            TrainError: It is noise of texts, and rows of tokens are trained on.
            DataError: There are no synonyms.
        """
        self.settings, self.name = settings, settings.title
        if settings.kind in TEXT_CORRUPTIONS and not context.is_classifier:
            others = ", ".join((*EMBEDDING_NOISE, "token_replace"))
            raise TrainError(
                f"perturbation {settings.kind} changes texts, and language models are trained on "
                f"rows of tokens; take one of {others}"
            )
        if settings.kind in EMBEDDING_NOISE:
            context.require_embeddings(settings.kind)
        self._synonyms: Synonyms | None = None
        if settings.kind == "synonyms":
            self._synonyms = _synonyms(synonyms)

    def run(self, step: Step, *, hooks: tuple[str, ...] = ()) -> Perturbed:
        """Perturb a step's batch anew and run the model on it."""
        kind, batch = self.settings.kind, step.batch
        if kind in TEXT_CORRUPTIONS:
            assert batch.texts is not None
            # a seed of its own per step: every pass meets other noise
            seed = int(torch.randint(2**31, ()))
            texts = corrupt_texts(
                batch.texts,
                kind,
                self.settings.strength,
                seed=seed,
                synonyms=self._synonyms,
                require_change=False,
            )
            other = step.read(texts, batch.labels)
            return Perturbed(other, step.again(other, hooks=hooks))
        if kind == "token_replace":
            other = replace(batch, ids=replaced_tokens(batch, self.settings.amount))
            return Perturbed(other, step.again(other, hooks=hooks))
        change = _EMBEDDING_CHANGES[kind]
        embeds = change(step.embed(batch.ids), batch.is_token, self.settings.amount)
        return Perturbed(batch, step.again(embeds=embeds, hooks=hooks), embeds)


def _synonyms(source: str | None) -> Synonyms:
    if source is None:
        return wordnet_synonyms()
    return planted_synonyms() if source == "planted" else read_synonyms(source)


def gaussian(embeds: Tensor, is_token: Tensor, amount: float) -> Tensor:
    """Add normal noise, `amount` times the root mean square of the tokens' embeddings.

    The first token of a row, a BOS or end-of-text where there is one, stays.
    """
    rms = embeds.detach()[is_token].square().mean().sqrt()
    noise = torch.randn_like(embeds) * (amount * rms)
    used = is_token.clone()
    used[:, 0] = False
    return embeds + noise * used[..., None]


def dropped(embeds: Tensor, is_token: Tensor, amount: float) -> Tensor:  # noqa: ARG001
    """Drop coordinates of embeddings with probability `amount`, the others scaled up."""
    return torch.nn.functional.dropout(embeds, amount, training=True)


_EMBEDDING_CHANGES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "embedding_gaussian": gaussian,
    "embedding_dropout": dropped,
}


def replaced_tokens(batch: TrainingBatch, amount: float) -> Tensor:
    """Return ids of which a share `amount` is another token of the batch, the first ones kept."""
    seen_ids = batch.ids[batch.is_token]
    drawn = seen_ids[
        torch.randint(len(seen_ids), batch.ids.shape, device="cpu").to(seen_ids.device)
    ]
    chosen = (torch.rand(batch.ids.shape).to(seen_ids.device) < amount) & batch.is_token
    chosen[:, 0] = False
    return torch.where(chosen, drawn, batch.ids)
