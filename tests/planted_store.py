"""A store with planted units: each of the first four fires on one token and nothing else."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import small_store
from small_store import HOOK, WORDS, Small, copied, fill

import activation_store as astore

SILENT, RARE = 4, 5


def planted_store(path: Path) -> Path:
    """Return 120 documents of 10 tokens; unit u fires with 2.5 on token u; 4 never, 5 twice."""
    return copied(template(), path)


@cache
def template() -> Path:
    """Make the store once; every test gets a copy of its own."""
    folder = Path(tempfile.mkdtemp(prefix="planted-store-"))
    atexit.register(shutil.rmtree, folder)
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, len(WORDS), (60, 20))
    doc_ids = np.arange(1200).reshape(60, 20) // 10
    acts = np.zeros((60, 20, 6), np.float32)
    for unit in range(4):
        acts[..., unit] = 2.5 * (token_ids == unit)
    acts[3, 15, RARE] = acts[7, 15, RARE] = 1.0
    with (
        pytest.MonkeyPatch.context() as patch,
        astore.open(folder / "run", mode="w") as store,
    ):
        for name, size in (("N_SEQ", 60), ("N_CTX", 20), ("D", 6)):
            patch.setattr(small_store, name, size)
        fill(store, Small(folder, token_ids, doc_ids, {HOOK: acts}, rng.normal(size=(60, 20, 4))))
    return folder / "run"
