"""What is known of tokens or documents besides activations, as yes or no per item and concept.

With labels of tokens an item is a token; with labels of documents it is an excerpt, whose
activation is the largest in it. Items of one document hang together, so documents are what is
shuffled and left out.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.records.seeds import stream
from lmmono.records.unit_rows import read_unit_rows
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import LabelledItemSettings
from lmmono.scores.decorrelation import draw_cells, read_dense
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.unit_statistics import read_corpus
from lmmono.types import Split


@dataclass(frozen=True, slots=True, eq=False)
class TokenLabels:
    """Concepts of every token of some rows of a store."""

    seq_ids: Int[ndarray, " rows"]
    """Rows of the store; rows of both splits are wanted."""
    truth: Bool[ndarray, "rows n_ctx concepts"]
    """Which concepts each token has, such as `lmmono.data.truth.row_truth` returns."""
    names: tuple[str, ...] = ()
    """Names of the concepts; numbers where there are none."""


Labels = TokenLabels | Mapping[int, str]
"""Concepts of tokens, or the class of each document by doc_id."""


def labels_digest(labels: object) -> str:
    """Return eight hexadecimal digits that tell labels apart, in the stored preset of a score.

    Raises:
        ExplainError: Labels of another type.
    """
    digest = hashlib.sha256()
    if isinstance(labels, TokenLabels):
        for part in (labels.seq_ids.astype(np.int64), np.packbits(labels.truth), labels.names):
            digest.update(repr(part).encode() if isinstance(part, tuple) else part.tobytes())
    elif isinstance(labels, Mapping):
        digest.update(repr(sorted(labels.items())).encode())
    else:
        raise _wrong_type(labels)
    return digest.hexdigest()[:8]


def _wrong_type(labels: object) -> ExplainError:
    return ExplainError(
        f"labels: want a TokenLabels or a mapping of doc_id to class, got {type(labels).__name__}"
    )


@dataclass(frozen=True, slots=True, eq=False)
class LabelledItems:
    """Items of one split with labels and the activations of units."""

    acts: Float[ndarray, "items units"]
    """float32, in units of the hook."""
    labels: Bool[ndarray, "items concepts"]
    """Which concepts each item has."""
    doc_ids: Int[ndarray, " items"]
    """Document of each item."""
    names: tuple[str, ...]
    """Name of each concept."""

    def shuffled(self, rng: np.random.Generator) -> "Bool[ndarray, 'items concepts']":
        """Return the labels of the items after documents changed places.

        Documents come in random order, each with its labels as they stand, and the whole is moved
        round by a random number of items: what hangs together goes on hanging together.
        """
        documents = np.unique(self.doc_ids)
        if len(documents) < 2:
            return self.labels[rng.permutation(len(self.labels))]
        place = rng.permutation(len(documents))[np.searchsorted(documents, self.doc_ids)]
        order = np.argsort(place, kind="stable")
        labels = np.empty_like(self.labels)
        labels[np.argsort(self.doc_ids, kind="stable")] = np.roll(
            self.labels[order], int(rng.integers(len(order))), axis=0
        )
        return labels


def read_labelled(job: ScoreJob, split: Split) -> LabelledItems:
    """Return up to `items` items of a split, drawn by seed.

    Raises:
        ExplainError: Labels of another type, or some rows or documents of the split have none.
    """
    if isinstance(job.labels, TokenLabels):
        return _of_tokens(job, split, job.labels)
    if isinstance(job.labels, Mapping):
        return _of_documents(job, split, job.labels)
    raise _wrong_type(job.labels)


def _of_tokens(job: ScoreJob, split: Split, labels: TokenLabels) -> LabelledItems:
    corpus = read_corpus(job, split)
    grid, units = corpus.grid, checked_units(job.store, job.hook, job.units)
    rng = stream("labelled items", job.seed, job.hook, split)
    cells = draw_cells(corpus, job.settings_as(LabelledItemSettings).items, rng)
    order = np.argsort(labels.seq_ids)
    labelled_rows = labels.seq_ids[order]
    wanted = grid.seq_ids[cells // grid.n_ctx]
    at = np.minimum(np.searchsorted(labelled_rows, wanted), len(labelled_rows) - 1)
    missing = np.unique(wanted[labelled_rows[at] != wanted])
    if len(missing):
        raise ExplainError(
            f"labels: {len(missing)} rows of split {split!r} have none, such as seq_id {missing[0]}"
        )
    truth = labels.truth[order[at], cells % grid.n_ctx]
    names = labels.names or tuple(str(i) for i in range(truth.shape[1]))
    return LabelledItems(read_dense(job, corpus, cells, units), truth, grid.doc_ids[cells], names)


def _of_documents(job: ScoreJob, split: Split, labels: Mapping[int, str]) -> LabelledItems:
    excerpts = job.reader.excerpts(split)
    missing = sorted(set(excerpts.doc_ids.tolist()) - set(labels))
    if missing:
        raise ExplainError(
            f"labels: {len(missing)} documents of split {split!r} have none, such as {missing[0]}"
        )
    units = checked_units(job.store, job.hook, job.units)
    owner = excerpts.of_cells()
    parts = [
        rows.largest(owner, len(excerpts)).T
        for rows in read_unit_rows(job.store, job.hook, units, excerpts.grid)
    ]
    names = tuple(sorted(set(labels.values())))
    number = {name: i for i, name in enumerate(names)}
    classes = np.array([number[labels[doc]] for doc in excerpts.doc_ids.tolist()])
    rng = stream("labelled items", job.seed, split)
    n = min(len(excerpts), job.settings_as(LabelledItemSettings).items)
    chosen = np.sort(rng.choice(len(excerpts), n, replace=False))
    truth = classes[chosen, None] == np.arange(len(names))
    return LabelledItems(
        np.concatenate(parts, axis=1)[chosen], truth, excerpts.doc_ids[chosen], names
    )
