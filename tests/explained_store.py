"""A store with units of known meaning: what each fires on is written down here, in numpy."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from small_store import copied

import activation_store as astore
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorers import find_scorer
from lmmono.scores.score_job import ScoreJob

HOOK = "blocks.0.mlp.hook_post"
OTHER = "blocks.1.mlp.hook_post"
D_VOCAB, N_CTX = 40, 48
CAT, PAIR_FIRST, PAIR_THEN = 3, 7, 5
ON_CAT, ON_PAIR, SILENT, TWO_DOCUMENTS, NOISE, DENSE = range(6)
SPLITS = ("explain", "score")


@dataclass(frozen=True)
class Planted:
    """Arrays [rows, positions] of both splits, explain first; act is [rows, positions, units]."""

    path: Path
    token_ids: np.ndarray
    doc_ids: np.ndarray
    acts: np.ndarray
    n_rows: int  # of each split

    def rows(self, split: str) -> slice:
        first = SPLITS.index(split) * self.n_rows
        return slice(first, first + self.n_rows)


def rows_of(store, scorer, labels=None, units=None, **settings):
    """Return the rows of a scorer by metric, unit and control; nothing is stored."""
    typed = find_scorer(scorer).with_settings(changes=settings)
    job = ScoreJob(store, HOOK, RecordReader(store), units, typed, labels=labels)
    rows = find_scorer(scorer).load()(job)
    return {(row["metric"], row["unit"], row["control"]): row for row in rows}


def documents(rng: np.random.Generator, n_rows: int, first: int) -> np.ndarray:
    lengths = rng.integers(4, 120, n_rows * N_CTX)
    doc_ids = np.repeat(np.arange(len(lengths)), lengths)[: n_rows * N_CTX] + first
    return doc_ids.reshape(n_rows, N_CTX)


def meanings(token_ids: np.ndarray, doc_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    acts = np.zeros((*token_ids.shape, 6), np.float32)
    acts[..., ON_CAT] = 2.0 * (token_ids == CAT)
    before = np.zeros_like(token_ids)
    before[:, 1:] = np.where(doc_ids[:, 1:] == doc_ids[:, :-1], token_ids[:, :-1], 0)
    acts[..., ON_PAIR] = 1.5 * ((token_ids == PAIR_THEN) & (before == PAIR_FIRST))
    for half in np.split(np.arange(len(doc_ids)), 2):
        longest = np.bincount(doc_ids[half].reshape(-1)).argsort()[-2:]
        acts[half, :, TWO_DOCUMENTS] = np.isin(doc_ids[half], longest) * (token_ids[half] % 2)
    acts[..., NOISE] = (rng.random(token_ids.shape) < 0.1) * rng.random(token_ids.shape)
    acts[..., DENSE] = 0.1 + token_ids / D_VOCAB
    return acts


def planted_store(path: Path, n_rows: int = 40, seed: int = 0) -> Planted:
    """Return a copy of its own of the store of so many rows and that seed."""
    copied(template(n_rows, seed).path, path)
    return replace(template(n_rows, seed), path=path)


@cache
def template(n_rows: int, seed: int) -> Planted:
    """Make each store once."""
    folder = Path(tempfile.mkdtemp(prefix="explained-store-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "run"
    rng = np.random.default_rng(seed)
    shape = (2 * n_rows, N_CTX)
    token_ids = rng.integers(1, D_VOCAB, shape)
    # the pair is common enough to be learned, and each of its tokens also stands alone
    begins = (rng.random(shape) < 0.02) & (np.arange(N_CTX) < N_CTX - 1)
    token_ids[begins] = PAIR_FIRST
    token_ids[:, 1:][begins[:, :-1]] = PAIR_THEN
    first = documents(rng, n_rows, 0)
    doc_ids = np.concatenate([first, documents(rng, n_rows, int(first.max()) + 1)])
    acts = meanings(token_ids, doc_ids, rng)
    planted = Planted(path, token_ids, doc_ids, acts, n_rows)
    with astore.open(path, mode="w") as store:
        store.add_vocabulary([f" w{i}" for i in range(D_VOCAB)])
        rows = [astore.Rows(hook, 6, max_density=1.0) for hook in (HOOK, OTHER)]
        with store.writer(rows=rows, n_ctx=N_CTX) as writer:
            for split in SPLITS:
                mine = planted.rows(split)
                seq = np.arange(mine.start, mine.stop)
                here = {HOOK: acts[mine], OTHER: acts[mine, :, ::-1].copy()}
                writer.add(seq, token_ids[mine], doc_ids[mine], split, here)
    return planted
