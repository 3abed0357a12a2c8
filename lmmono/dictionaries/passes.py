"""The passes through a model that an evaluation needs, summed over documents as they go.

first pass    clean, zeros at each hook, each dictionary's reconstruction at its hook
second pass   the mean at each hook, which is known only now
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional

from lmmono.data.tokens import TokenRows
from lmmono.dictionaries.estimator import Dictionary
from lmmono.dictionaries.measures import CodeSums, VectorSums
from lmmono.dictionaries.splicing import coded, replaced
from lmmono.errors import DictionaryError
from lmmono.models.hooks import bare, hook_width, recording
from lmmono.types import Progress


class Passage:
    """Rows of tokens with their documents numbered from 0, in batches where the model is."""

    def __init__(self, rows: TokenRows, model: nn.Module, batch_tokens: int) -> None:
        names, numbers = np.unique(rows.doc_ids, return_inverse=True)
        self.rows = rows
        self.documents: Int[ndarray, "n_rows n_ctx"] = numbers.reshape(rows.ids.shape)
        self.n_documents, self.n_tokens = len(names), rows.ids.size
        self.device = next(model.parameters()).device
        self.batch_rows = max(1, batch_tokens // rows.n_ctx)

    @property
    def predicted(self) -> Float[ndarray, " documents"]:
        """Predicted tokens per document: all but each row's first."""
        flat = self.documents[:, 1:].ravel()
        return np.bincount(flat, minlength=self.n_documents).astype(np.float64)

    def batches(self) -> Iterator[tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]:
        """Yield token ids and documents."""
        for first in range(0, len(self.rows), self.batch_rows):
            part = slice(first, first + self.batch_rows)
            ids = torch.from_numpy(self.rows.ids[part].astype(np.int64))
            documents = torch.from_numpy(self.documents[part].astype(np.int64))
            yield ids.to(self.device), documents.to(self.device)

    def sums(self) -> Tensor:
        """Return zeros, one per document."""
        return torch.zeros(self.n_documents, dtype=torch.float64, device=self.device)


@dataclass(eq=False)
class Site:
    """A hook: its vectors, and what is lost without it."""

    hook: str
    vectors: VectorSums
    loss_zero: Tensor
    loss_mean: Tensor


@dataclass(eq=False)
class Subject:
    """A dictionary at a hook: its codes, and what is lost with its reconstructions in place."""

    dictionary: Dictionary
    site: Site
    codes: CodeSums
    loss: Tensor
    kl: Tensor


@dataclass(eq=False)
class Passes:
    """What is summed in the passes; losses are nats per document."""

    passage: Passage
    subjects: list[Subject]
    sites: dict[str, Site]
    loss_clean: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.loss_clean = self.passage.sums()

    @classmethod
    def run(
        cls,
        dictionaries: Sequence[tuple[str, Dictionary]],
        model: nn.Module,
        passage: Passage,
        progress: Progress,
    ) -> "Passes":
        """Run both passes over the rows.

        Raises:
            DictionaryError: A hook has NaN or infinite activations, or another width.
        """
        hooks = dict.fromkeys(hook for hook, _ in dictionaries)
        sites = {hook: _site(model, hook, passage) for hook in hooks}
        subjects = [_subject(each, sites[hook], passage) for hook, each in dictionaries]
        passes = cls(passage, subjects, sites)
        done = 0
        with _evaluating(model):
            for add in (passes._add_first, passes._add_mean):
                for ids, documents in passage.batches():
                    add(model, ids, documents)
                    done += ids.numel()
                    progress("evaluate", done, 2 * passage.n_tokens)
        return passes

    def _add_first(self, model: nn.Module, ids: Tensor, documents: Tensor) -> None:
        with recording(model, list(self.sites)) as acts:
            clean = _logits(model, ids).log_softmax(-1)
        _add_losses(self.loss_clean, documents, clean, ids)
        for site in self.sites.values():
            _add_vectors(site, documents, acts[site.hook])
            with replaced(model, {site.hook: None}):
                _add_losses(site.loss_zero, documents, _logits(model, ids), ids)
        for subject in self.subjects:
            hook = subject.site.hook
            vectors, codes, reconstructed = coded(subject.dictionary, acts[hook])
            subject.codes.add(documents.flatten().to(vectors.device), vectors, codes, reconstructed)
            with replaced(model, {hook: reconstructed}):
                logits = _logits(model, ids)
            _add_losses(subject.loss, documents, logits, ids)
            subject.kl.index_add_(0, documents.flatten(), divergences(clean, logits).flatten())

    def _add_mean(self, model: nn.Module, ids: Tensor, documents: Tensor) -> None:
        for site in self.sites.values():
            with replaced(model, {site.hook: site.vectors.mean.float()}):
                _add_losses(site.loss_mean, documents, _logits(model, ids), ids)


def divergences(
    clean: Float[Tensor, "batch pos d_vocab"], logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch pos"]:
    """Return KL(clean || spliced) in nats at every position.

    Args:
        clean: Log-probabilities of the clean pass.
        logits: Logits of the other.
    """
    other = logits.log_softmax(-1)
    return functional.kl_div(other, clean, reduction="none", log_target=True).sum(-1).double()


def _site(model: nn.Module, hook: str, passage: Passage) -> Site:
    vectors = VectorSums(passage.n_documents, hook_width(model, hook), passage.device)
    return Site(hook, vectors, passage.sums(), passage.sums())


def _subject(dictionary: Dictionary, site: Site, passage: Passage) -> Subject:
    device = dictionary.tensors()["W_dec"].device
    codes = CodeSums(passage.n_documents, dictionary.d_sae, device)
    return Subject(dictionary, site, codes, passage.sums(), passage.sums())


def _logits(model: nn.Module, ids: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    return model(input_ids=ids, use_cache=False).logits.float()


def _add_losses(sums: Tensor, documents: Tensor, logits: Tensor, ids: Tensor) -> None:
    """Add -ln p of every token but each row's first to its own document."""
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    sums.index_add_(0, documents[:, 1:].flatten(), losses.double())


def _add_vectors(site: Site, documents: Tensor, acts: Tensor) -> None:
    vectors = acts.flatten(2).flatten(0, 1)
    if not torch.isfinite(vectors).all():
        raise DictionaryError(
            f"{site.hook}: the model's activations are NaN or infinite on some of these tokens; "
            "run it in float32, or evaluate on other rows"
        )
    site.vectors.add(documents.flatten(), vectors)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Run in eval mode without gradients; the mode is put back at the end."""
    network = bare(model)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)
