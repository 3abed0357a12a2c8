"""Compiles the loops of capture and scores once, into the cache beside their sources.

The test run starts this program beside its workers: while they import, it compiles what each would
compile for itself, half a minute of processor time on a fresh clone. A second run finds all of it.
"""

import tempfile
from pathlib import Path

import numpy as np
from explained_store import HOOK, planted_store

import activation_store as astore
import lmmono as lm


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with (
            astore.open(place / "vectors", mode="w") as store,
            store.writer(vectors=[astore.Vectors("resid", 4)], n_ctx=8) as writer,
        ):
            ids = np.ones((4, 8), np.int32)
            writer.add(np.arange(4), ids, ids, "val", {"resid": np.ones((4, 8, 4), np.float32)})
        for _ in astore.open(place / "vectors").vectors("resid", batch_tokens=16):
            pass
        with astore.open(planted_store(place / "rows", n_rows=4).path, mode="a") as store:
            lm.explain(store, HOOK, units=[0, 1])
            lm.score(store, HOOK, scorer="simulation_random", units=[0, 1])


if __name__ == "__main__":
    main()
