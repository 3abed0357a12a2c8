"""`embedding`: is the explanation nearer to texts in which the unit fires than to silent ones?

No language model judges; a sentence encoder places the explanation and the texts, and the AUROC of
their cosines is the score. Paulo et al. 2024 (arXiv 2410.13928).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.stored_explanations import read_vocabulary
from lmmono.records.sampler import Class
from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import EmbeddingSettings
from lmmono.scores.judging import Items, area_row, no_marks, present_classes, shown_text
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.scores.two_sided import sided_rows, threshold_judge

CLASSES: tuple[Class, ...] = ("firing", "silent", "near_miss")

QUERY = "A text that fits this description: {}"
"""What is said before the explanation."""


@dataclass(frozen=True, slots=True)
class SentenceEncoder:
    """A sentence encoder with the name it has in stored rows."""

    name: str
    """Name and version."""
    encode: Callable[[Sequence[str]], Float[ndarray, "texts d"]]
    """Returns a vector per text; of any length, cosines are taken."""

    def __str__(self) -> str:
        return self.name


def open_encoder(encoder: SentenceEncoder | str) -> SentenceEncoder:
    """Return an encoder; a name is one of sentence-transformers, or a folder that holds one.

    Raises:
        ExplainError: sentence-transformers is not installed, or has no such model here.
    """
    if isinstance(encoder, SentenceEncoder):
        return encoder
    try:
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformer,
        )
    except ImportError as fault:
        raise ExplainError(
            f"encoder {encoder!r} needs sentence-transformers: pip install 'lmmono[embed]', or "
            f"pass encoder=SentenceEncoder(name, function)"
        ) from fault
    try:
        model = SentenceTransformer(encoder)
    except OSError as fault:
        raise ExplainError(f"encoder {encoder!r} cannot be opened: {fault}") from fault
    return SentenceEncoder(encoder, lambda texts: np.asarray(model.encode(list(texts))))


def score_embedding(job: ScoreJob) -> list[Row]:
    """Score units by the AUROC of the cosines of firing and silent texts, and of near misses."""
    settings = job.settings_as(EmbeddingSettings)
    encoder = open_encoder(settings.encoder)
    contrasts = job.reader.contrasts(
        job.hook,
        "score",
        settings.n,
        window=settings.window,
        units=job.units,
        ranked=settings.ranked,
    )
    units, index = contrasts.units.tolist(), contrasts.of(CLASSES)
    words, encoded = read_vocabulary(job.store), dict[str, ndarray]()

    def vectors(texts: Sequence[str]) -> Float[ndarray, "texts d"]:
        missing = sorted(set(texts) - encoded.keys())
        if missing:
            encoded.update(zip(missing, _normal(encoder.encode(missing)), strict=True))
        return np.array([encoded[text] for text in texts])

    def cosines(items: Items, explanation: Explanation) -> Float[ndarray, " items"]:
        texts = [shown_text(ids, None, words) for ids in items.token_ids]
        if explanation.text is None or not texts:
            return np.full(len(texts), np.nan)
        return vectors(texts) @ vectors([QUERY.format(explanation.text)])[0]

    explained = job.explanations(units)
    # what all units need is encoded in two batches
    used = contrasts.excerpts.token_ids[np.unique(index[index >= 0])]
    vectors([shown_text(ids, None, words) for ids in used])
    vectors([QUERY.format(e.text) for all_of in explained.values() for e in all_of if e.text])
    token_ids = contrasts.token_ids(CLASSES)
    rows: list[Row] = []
    for control, explanations in explained.items():
        for i, (unit, explanation) in enumerate(zip(units, explanations, strict=True)):
            scores, present = np.full(len(index[i]), np.nan), index[i] >= 0
            scores[present] = cosines(Items(token_ids[i][present], None), explanation)
            sides = present_classes(index[i], len(CLASSES))
            for metric, other in (("embedding", 1), ("embedding_near_miss", 2)):
                named = {"control": control, "details": {"encoder": encoder.name}}
                both = scores[sides[0]], scores[sides[other]]
                rows.append(area_row(job, metric, unit, *both, explanation.failed) | named)
            if control is None and job.controls:
                order = stream("embedding pairing", job.seed, unit).permutation(len(scores))
                mixed = scores[order][~np.isnan(scores[order])]
                n = len(sides[0])
                both = mixed[:n], mixed[n : n + len(sides[1])]
                row = area_row(job, "embedding", unit, *both, explanation.failed)
                rows.append(row | {"control": "shuffled_pairing"})
    if settings.sides:
        judge = threshold_judge(job, CLASSES[:2], no_marks, cosines)
        sides = settings.sides, settings.per_side, settings.window
        rows += sided_rows(job, "embedding", *sides, counted="records", judge=judge)
    return rows


def _normal(vectors: ndarray) -> Float[ndarray, "texts d"]:
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)
