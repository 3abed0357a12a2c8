"""Scorer `population` of every unit of a hook on every stored token.

    python benchmarks/population.py [--units 512] [--tokens 1000000] [--density 0.02] [--controls]

The store has one hook on documents of about 400 tokens, half of them to explain and half to score;
a unit's activation is a draw per token plus noise. Explanations are by `token_lookup`, made before
the clock starts. Prints processor and wall time of the scoring, with the largest memory. Wanted:
512 units on a million tokens in 60 s of two cores.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.stats import norm

import activation_store as astore
import lmmono as lm

HOOK, N_CTX, D_VOCAB = "blocks.0.mlp.hook_post", 256, 4096


def build(store: astore.Store, n_units: int, n_tokens: int, density: float) -> None:
    """Fill a store with a hook of `n_units` on `n_tokens`."""
    rng = np.random.default_rng(0)
    means = rng.normal(0, 0.8, (D_VOCAB, n_units)).astype(np.float32)
    cut = np.float32(norm.isf(density))  # of a sum of variance 0.8^2 + 0.6^2 = 1
    frequent = 1 / np.arange(1, D_VOCAB + 1)
    n_seqs = n_tokens // N_CTX
    store.add_vocabulary([f" w{i}" for i in range(D_VOCAB)])
    with store.writer(rows=[astore.Rows(HOOK, n_units, max_density=1.0)], n_ctx=N_CTX) as writer:
        for first in range(0, n_seqs, 16):
            seq = np.arange(first, min(first + 16, n_seqs))
            tokens = rng.choice(D_VOCAB, (len(seq), N_CTX), p=frequent / frequent.sum())
            noise = rng.normal(0, 0.6, (*tokens.shape, n_units)).astype(np.float32)
            docs = np.broadcast_to(seq[:, None] * N_CTX // 400, tokens.shape)
            split = "explain" if seq[-1] < n_seqs // 2 else "score"
            shift = (split == "score") * n_seqs
            writer.add(seq, tokens, docs + shift, split, {HOOK: means[tokens] + noise - cut})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--explainer", default="token_lookup")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        astore.open(Path(place) / "store", mode="w") as store,
    ):
        build(store, options.units, options.tokens, options.density)
        lm.explain(store, HOOK, explainer=options.explainer)
        processor, wall = time.process_time(), time.perf_counter()
        scores = lm.score(store, HOOK, scorer="population", explainer=options.explainer,
                          controls=options.controls)  # fmt: skip
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
        n_acts = store.info().n_acts
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(scores)
    print(f"{options.units} units, {options.tokens:,} tokens, {n_acts:,} activations: "
          f"{processor:.1f} s of a processor, {wall:.1f} s, {megabytes:,.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
