"""What a GPU gives beside the CPU of the same machine: the same numbers, and how fast.

    make gpu
    python benchmarks/gpu.py [--tokens 262144] [--anywhere]

One process works without a GPU and one with it, from the same recipe, weights and rows: ten steps
of training, a capture, a dictionary, probes. Each difference is printed with its tolerance; one
that is larger ends the script with exit code 1. Then, in bfloat16, GPT-2 small of random weights:
its bare pass beside a capture of all its neurons, and the peak memory of the GPU. Where torch sees
no GPU the script says so and ends well; `--anywhere` runs both processes on the CPU all the same,
whose differences must then be 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TOLERANCES = {
    # float32 sums in another order: losses of ten steps, relative
    "training loss": 1e-3,
    # sums of 128 products of numbers near 1, in another order: absolute
    "unit means": 1e-4,
    # activations within rounding of the threshold: share of those stored
    "stored activations": 1e-3,
    # 150 steps of Adam from the same weights: relative
    "dictionary error": 2e-2,
    # strictly convex, so both end at one optimum: accuracy over 16 problems
    "probe accuracy": 5e-3,
}
RECIPE = """
name: gpu
seed: 0
out: {out}
data: {{corpus: {{kind: planted, n_documents: 3000}}, tokenizer: {{kind: words}}, n_ctx: 128}}
model: {{arch: crate, n_layers: 2, d_model: 128, n_heads: 4}}
train: {{steps: 10, batch_tokens: 4096, warmup_steps: 2, eval_every_steps: 10, precision: fp32}}
"""
STREAM, NEURONS = "blocks.1.hook_resid_post", "blocks.*.mlp.hook_post"


def numbers(folder: Path, shared: Path) -> dict[str, list[float]]:
    """Train, capture, learn and probe on this process' device; return what came out."""
    import pyarrow.parquet as pq
    import torch

    import activation_store as astore
    import lmmono as lm
    from lmmono.files.processes import best_device
    from lmmono.probes.logistic import fit_path

    device = best_device()
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder))
    run = lm.train(lm.Recipe.load(path))
    log = pq.read_table(run.dir / "metrics.parquet").to_pylist()
    losses = [row["value"] for row in log if (row["split"], row["metric"]) == ("train", "loss")]
    if not (shared / "model").exists():  # the first process leaves its weights to the second
        run.model.save_pretrained(shared / "model")
    model = lm.open_model(shared / "model")
    rows = run.tokens("explain").limit(40_000, seed=0)
    with astore.open(folder / "store.duckdb", mode="w") as store:
        lm.capture(model, rows, hooks=NEURONS, vectors=STREAM, into=store, max_density=1.0)
        means = store.sql("SELECT mean FROM unit_stats ORDER BY hook, unit").fetchall()
        n_acts = store.info().n_acts
        vectors = np.concatenate(list(store.vectors(STREAM, batch_tokens=4096, shuffle=False)))
        sae = lm.SAE(arch="topk", d_sae=512, k=16, steps=150, lr=5e-3, seed=0)
        sae.fit(store.vectors(STREAM, batch_tokens=1024))
    x = torch.from_numpy(vectors[:4000].astype(np.float32)).to(device)
    turn = torch.randn(16, x.shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    y = (turn @ x.T > (turn @ x[:2000].T).mean(dim=1, keepdim=True)).long()
    # one weak penalty, so that the optimum is far from 0 and rounding could show
    found = fit_path(x[:2000], y[:, :2000], n_classes=2, l2=(1.0,)).log_probabilities(x[2000:])
    right = (found[:, 0].argmax(dim=-1) == y[:, 2000:]).float().mean()
    reconstruction = sae.decode(sae.encode(x.cpu()))
    error = float(((reconstruction - x.cpu()) ** 2).mean() / x.cpu().var())
    return {
        "training loss": losses,
        "unit means": [mean for (mean,) in means],
        "stored activations": [float(n_acts)],
        "dictionary error": [error],
        "probe accuracy": [float(right)],
    }


def speed(n_tokens: int) -> dict[str, float]:
    """Return tokens per second of GPT-2 small in bfloat16, bare and captured, and GPU memory."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    import activation_store as astore
    import lmmono as lm
    from lmmono.data.tokens import TokenRows
    from lmmono.files.processes import best_device

    device, n_ctx = best_device(), 256
    model = AutoModelForCausalLM.from_config(GPT2Config(n_positions=n_ctx))
    model = model.to(device, torch.bfloat16).eval()
    ids = np.random.default_rng(0).integers(0, 50_257, (n_tokens // n_ctx, n_ctx))
    docs = np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], n_ctx, 1)
    rows = TokenRows(ids.astype(np.uint32), docs, 0, "train")

    def bare(batches: np.ndarray) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for batch in torch.from_numpy(batches).split(64):
                model.base_model(batch.to(device), use_cache=False)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    bare(ids[:64])
    seconds = bare(ids)
    with (
        tempfile.TemporaryDirectory() as folder,
        astore.open(Path(folder) / "store.duckdb", mode="w") as store,
    ):
        began = time.perf_counter()
        settings = {"acts_per_token": 64, "max_density": 1.0, "batch_tokens": 64 * n_ctx}
        lm.capture(model, rows, into=store, **settings)
        captured = time.perf_counter() - began
        ((n_bytes,),) = store.sql("SELECT sum(n_bytes) FROM shards").fetchall()
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else 0.0
    size = ids.size
    return {
        "bare tokens/s": size / seconds,
        "captured tokens/s": size / captured,
        "bytes per token": n_bytes / size,
        "peak GPU memory, GiB": peak,
    }


def child(arguments: list[str], gpu: bool) -> dict[str, list[float]]:
    """Run a part of this script in a process that sees the GPU or not."""
    environment = dict(os.environ) if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--anywhere", action="store_true")
    parser.add_argument("--numbers", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--speed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.numbers:
        print(json.dumps(numbers(*options.numbers)))
        return
    if options.speed:
        print(json.dumps(speed(options.tokens)))
        return
    import torch

    if not torch.cuda.is_available() and not options.anywhere:
        print("skipped: torch sees no GPU; --anywhere runs both processes on the CPU")
        return
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("cpu", "gpu", "shared")]
        for path in paths:
            path.mkdir()
        cpu, gpu = (
            child(["--numbers", str(path), str(paths[2])], gpu=path.name == "gpu")
            for path in paths[:2]
        )
    for name, tolerance in TOLERANCES.items():
        a, b = np.array(cpu[name]), np.array(gpu[name])
        scale = 1.0 if name in ("unit means", "probe accuracy") else np.abs(a)
        worst = float((np.abs(a - b) / scale).max())
        failed |= not worst <= tolerance
        print(f"{name:20s} differs by {worst:.2e}, tolerance {tolerance:.0e}", flush=True)
    for name, value in child(["--speed", "--tokens", str(options.tokens)], gpu=True).items():
        print(f"{name:20s} {value:,.1f}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
