"""How alike the activations of a hook are: between tokens, and between units.

`feature_decorrelation` is 1 - the mean cosine of the activation vectors of two tokens of different
documents (Yan et al. 2024, arXiv 2406.17969, there over last tokens of prompts). `unit_correlation`
is the mean squared correlation of two units over tokens (Barlow Twins' off-diagonal). Control
`shuffled`: each unit's activations are put on other tokens, each unit's on others.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.records.seeds import stream
from lmmono.records.unit_rows import read_unit_rows
from lmmono.records.units import checked_units
from lmmono.registry.scorer_settings import DecorrelationSettings
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.scores.unit_statistics import METHOD, Corpus, columns_of, read_corpus
from lmmono.stats.intervals import jackknife_interval

Dense = Float[ndarray, "tokens units"]


def read_dense(
    job: ScoreJob, corpus: Corpus, cells: Int[ndarray, " tokens"], units: Int[ndarray, " units"]
) -> Dense:
    """Return the activations of units on some tokens, float32; 0 where none is stored."""
    place = np.full(len(corpus.grid.token_ids), -1)
    place[cells] = np.arange(len(cells))
    dense = np.zeros((len(cells), len(units)), np.float32)
    done = 0
    for rows in read_unit_rows(job.store, job.hook, units, corpus.grid):
        slots = np.repeat(np.arange(len(rows.units)), np.diff(rows.starts)) + done
        at = place[rows.cells]
        dense[at[at >= 0], slots[at >= 0]] = rows.acts[at >= 0]
        done += len(rows.units)
    return dense


def draw_cells(corpus: Corpus, n: int, rng: np.random.Generator) -> Int[ndarray, " tokens"]:
    """Return up to n cells that hold a token, ascending."""
    cells = np.flatnonzero(corpus.groups < corpus.n_groups)
    return np.sort(rng.choice(cells, min(n, len(cells)), replace=False))


def score_decorrelation(job: ScoreJob) -> list[Row]:
    """Score a hook by how little its tokens and its units have in common; two rows and controls."""
    corpus = read_corpus(job, "score")
    units = checked_units(job.store, job.hook, job.units)
    rng = stream("tokens of a hook", job.seed, job.hook)
    cells = draw_cells(corpus, job.settings_as(DecorrelationSettings).tokens, rng)
    dense, groups = read_dense(job, corpus, cells, units), corpus.groups[cells]
    rng, rows = stream("shuffled tokens", job.seed, job.hook), list[Row]()
    kinds: list[tuple[str | None, Dense]] = [(None, dense)]
    if job.controls:
        kinds.append(("shuffled", rng.permuted(dense, axis=0)))
    for control, acts in kinds:
        for metric, measure in (
            ("feature_decorrelation", tokens_apart),
            ("unit_correlation", units_alike),
        ):
            parts = [measure(acts, groups)]
            for group in range(corpus.n_groups):
                left = groups != group
                parts.append(measure(acts[left], groups[left]))
            low, high = jackknife_interval(np.array(parts[0]), np.array(parts[1:]))
            columns = columns_of(parts[0], float(low), float(high), METHOD)
            counts = {"n": len(cells), "n_tokens": len(cells), "control": control}
            counts["n_documents"] = len(np.unique(corpus.grid.doc_ids[cells]))
            rows.append(job.row(metric, None, **counts, **columns))
    return rows


def tokens_apart(acts: Dense, groups: Int[ndarray, " tokens"]) -> float:
    """Return 1 - the mean cosine over pairs of tokens of different groups of documents.

    Tokens on which no unit fires have no direction and are left out.
    """
    norms = np.linalg.norm(acts, axis=1)
    unit, groups = acts[norms > 0] / norms[norms > 0, None], groups[norms > 0]
    if len(np.unique(groups)) < 2:
        return float("nan")
    sums = np.stack([unit[groups == group].sum(axis=0) for group in np.unique(groups)])
    sizes = np.array([(groups == group).sum() for group in np.unique(groups)], float)
    between = float(np.square(sums.sum(axis=0)).sum() - np.square(sums).sum())
    return 1 - between / float(sizes.sum() ** 2 - np.square(sizes).sum())


def units_alike(acts: Dense, groups: Int[ndarray, " tokens"] | None = None) -> float:  # noqa: ARG001
    """Return the mean squared correlation over pairs of different units that vary."""
    centred = acts - acts.mean(axis=0)
    spread = np.sqrt(np.square(centred).sum(axis=0))
    centred = centred[:, spread > 0] / spread[spread > 0]
    d = centred.shape[1]
    if d < 2:
        return float("nan")
    return float((np.square(centred.T @ centred).sum() - d) / (d * (d - 1)))
