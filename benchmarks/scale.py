"""Capture of GPT-2 small and of a model of a billion weights, beside the bare pass and sae-lens.

    python benchmarks/scale.py [--models gpt2-small llama-1b] [--tokens 16384] [--repeats 3]
        [--peer]
    python benchmarks/scale.py --commits 8

The models have random weights and the sizes of the real ones: GPT-2 small (12 layers, 36,864 GELU
neurons, d_model 768) and a Llama of 1.2 billion weights (16 layers, 131,072 gated neurons, d_model
2,048). Their units are above 0 on about half of all tokens, as dense as units get; each arm is a
process of its own, so that its peak memory is its own:

- bare: the forward pass through all blocks, without the vocabulary's logits.
- rows: all neurons of all layers, statistics and exemplars of every unit, 64 activations stored per
  token and hook (`acts_per_token`).
- vectors: one residual hook in the middle, float16.
- sae-lens: `CacheActivationsRunner` on that hook and these tokens (`--peer`).

Arms take turns; a figure is the median over repeats. Memory is told for this many tokens and for
four times as many: a stream does not grow.

`--commits` writes 8,192 units that fire on half of all tokens without a model, 2,048 tokens a
commit in rows of 32, and prints the peak memory of each commit: what units keep is full after the
first, and later ones replace its rows.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"gpt2-small": (12, 768, 50_257), "llama-1b": (16, 2048, 32_000), "tiny": (2, 64, 500)}
N_CTX, BATCH_TOKENS, ACTS_PER_TOKEN = 256, 2048, 64
ARMS = ("bare", "rows", "vectors")


def build(name: str):  # noqa: ANN201  (torch is imported by the arms alone)
    """Return a model of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    n_layers, d_model, d_vocab = SIZES[name]
    torch.manual_seed(0)
    if name == "llama-1b":
        config = LlamaConfig(
            num_hidden_layers=n_layers,
            hidden_size=d_model,
            intermediate_size=4 * d_model,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=d_vocab,
            max_position_embeddings=N_CTX,
        )
    else:
        config = GPT2Config(
            n_layer=n_layers,
            n_embd=d_model,
            n_head=d_model // 64,
            vocab_size=d_vocab,
            n_positions=N_CTX,
        )
    return AutoModelForCausalLM.from_config(config).eval()


def run_arm(arm: str, name: str, n_tokens: int, folder: Path) -> dict[str, float]:
    """Run one arm in this process; return its seconds, bytes and peak memory."""
    import torch

    import activation_store as astore
    import lmmono as lm
    from lmmono.data.tokens import TokenRows

    model, d_vocab = build(name), SIZES[name][2]
    n = n_tokens // N_CTX
    ids = np.random.default_rng(1).integers(0, d_vocab, (n, N_CTX)).astype(np.uint32)
    rows = TokenRows(ids, np.repeat(np.arange(n, dtype=np.int32)[:, None], N_CTX, 1), 0, "train")
    hook = f"blocks.{SIZES[name][0] // 2}.hook_resid_post"
    n_bytes, started = 0, time.perf_counter()
    if arm == "bare":
        with torch.no_grad():
            for batch in torch.from_numpy(ids.astype(np.int64)).split(BATCH_TOKENS // N_CTX):
                model.base_model(batch, use_cache=False)
    elif arm == "sae-lens":
        cache(model, ids, hook, folder)
        n_bytes = sum(file.stat().st_size for file in folder.rglob("*.arrow"))
    else:
        kept = {"hooks": (), "vectors": hook} if arm == "vectors" else {}
        settings = {"acts_per_token": ACTS_PER_TOKEN, "max_density": 1.0}
        with astore.open(folder / "store.duckdb", mode="w") as store:
            lm.capture(model, rows, into=store, batch_tokens=BATCH_TOKENS, **settings, **kept)
            ((n_bytes,),) = store.sql("SELECT sum(n_bytes) FROM shards").fetchall()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "bytes": float(n_bytes), "peak_gib": peak}


def cache(model, ids: np.ndarray, hook: str, folder: Path) -> None:  # noqa: ANN001
    """Cache the hook with sae-lens, which asks for a TransformerLens-like model."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from sae_lens import cache_activations_runner as runner

    import lmmono as lm

    d_model = model.config.hidden_size
    runner.load_model = lambda **_: lm.interop.to_hooked(model)  # looks no name up
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=BATCH_TOKENS // N_CTX,
        hook_name=hook,
        d_in=d_model,
        training_tokens=ids.size,
        context_size=N_CTX,
        new_cached_activations_path=str(folder / "sae-lens"),
        shuffle=False,
        dtype="float16",
        device="cpu",
        buffer_size_gb=ids.size * d_model * 2 / 1e9,
        prepend_bos=False,
        streaming=False,
    )
    tokens = Dataset.from_dict({"tokens": ids.astype(np.int64)})
    tokens.set_format("torch")
    CacheActivationsRunner(config, override_dataset=tokens).run()


def commits(n_commits: int) -> None:
    """Print the peak memory of one commit after the other."""
    import activation_store as astore
    from lmmono.files.provenance import peak_memory_bytes, reset_peak_memory

    random = np.random.default_rng(0)
    base = random.standard_normal((64, 32, 4096), dtype=np.float32)
    hooks = [f"blocks.{i}.mlp.hook_post" for i in range(2)]
    # 2.5 standard deviations: about 25 of 4,096 are stored
    rows = [astore.Rows(hook, d=4096, max_density=1.0, cuts=(2.5,) * 4096) for hook in hooks]
    with (
        tempfile.TemporaryDirectory() as folder,
        astore.open(Path(folder) / "store.duckdb", mode="w") as store,
        store.writer(rows=rows, n_ctx=32, commit_tokens=2**40) as writer,
    ):
        for i in range(n_commits):
            seq = np.arange(64 * i, 64 * (i + 1))
            docs = np.repeat(seq[:, None], 32, 1)
            acts = base * np.float32(random.lognormal())
            writer.add(seq, docs, docs, "train", dict.fromkeys(hooks, acts))
            reset_peak_memory()
            writer.commit()
            print(f"commit {i + 1}: peak {peak_memory_bytes() / 2**20:.0f} MiB", flush=True)


def child(arm: str, name: str, n_tokens: int) -> dict[str, float]:
    """Run one arm in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--arm", arm, "--models", name, "--folder", folder]
        command += ["--tokens", str(n_tokens)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["gpt2-small", "llama-1b"], choices=SIZES)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--commits", type=int, metavar="N", help="memory of N commits, no model")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.commits:
        commits(options.commits)
        return
    if options.arm:
        result = run_arm(options.arm, options.models[0], options.tokens, options.folder)
        print(json.dumps(result))
        return
    for name in options.models:
        arms = [*ARMS, "sae-lens"] if options.peer else list(ARMS)
        runs = {arm: [] for arm in arms}
        for _ in range(options.repeats):
            for arm in arms:
                runs[arm].append(child(arm, name, options.tokens))
        bare = [run["seconds"] for run in runs["bare"]]
        print(f"{name}: {options.tokens} tokens, {options.repeats} repeats", flush=True)
        for arm, all_runs in runs.items():
            seconds = statistics.median(run["seconds"] for run in all_runs)
            ratios = [run["seconds"] / base for run, base in zip(all_runs, bare, strict=True)]
            middle = statistics.median(ratios)
            size = all_runs[0]["bytes"] / options.tokens
            peak = max(run["peak_gib"] for run in all_runs)
            print(
                f"  {arm:9s} {options.tokens / seconds:8.0f} tokens/s, {middle:.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) of bare, {size:7.0f} bytes per token, "
                f"peak {peak:.2f} GiB",
                flush=True,
            )
        long = child("rows", name, 4 * options.tokens)
        print(f"  rows, {4 * options.tokens} tokens: peak {long['peak_gib']:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
