"""Capture into a store beside the bare forward pass over the same tokens, and beside sae-lens.

    python benchmarks/capture.py [--tokens 131072] [--repeats 3] [--head] [--peer] [--device cuda]
    python benchmarks/capture.py --memory

The model is transformers' GPT-2 with ReLU, 6 layers of d_model 384 and random weights; the biases
of its neurons are shifted until each fires on 15 % of the tokens. Arms:

- bare: the forward pass. `--head` includes the vocabulary's logits, which a capture does not need.
- rows: all 9,216 neurons above 0, with statistics and exemplars of every unit.
- vectors: one residual hook, float16.
- sae-lens: `CacheActivationsRunner` on the same hook, model, tokens and type (`--peer`).

A repeat is a whole capture by each arm, from an empty store to everything on the disk. The arms
take turns every 16,384 tokens, at the end of which nothing is left to be written but the commit, so
that all find the machine in the same state; its speed changes. Opening the store and the commit
count. sae-lens cannot be stopped on the way: it runs whole, after a whole capture of vectors.

The floor of a capture is the bare pass plus the time to write the same bytes and sync them. Ratios
are of wall time and, for a machine that is not quiet, of processor time; "later" are the segments
but the first two, without opening and commit: what further tokens cost. `--memory` compares the
peak memory of a capture of 1 M and of 10 M tokens, without a model.
"""

import argparse
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import activation_store as astore
from activation_store import Rows, Vectors
from activation_store.write.writer import Writer

N_LAYERS, D_MODEL, N_CTX, BATCH, D_VOCAB = 6, 384, 128, 32, 50_257
RESIDUAL = 3
RESIDUAL_HOOK = f"blocks.{RESIDUAL}.hook_resid_post"
DENSITY = 0.15
SEGMENT, EARLY = 16_384, 2
"""Tokens after which it is another arm's turn; segments that are dearer than the later ones."""


def build(device: str, head: bool) -> nn.Module:
    """Return the model, its neurons firing on `DENSITY` of random tokens."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=N_LAYERS,
        n_embd=D_MODEL,
        n_head=6,
        n_positions=N_CTX,
        vocab_size=D_VOCAB,
        activation_function="relu",
    )
    whole = GPT2LMHeadModel(config).to(device).eval()
    ids = torch.randint(D_VOCAB, (8, N_CTX), device=device)
    for block in whole.transformer.h:
        with recorded([block.mlp.c_fc]) as found, torch.no_grad():
            whole.transformer(ids)
        pre = found[0].reshape(-1, 4 * D_MODEL)
        with torch.no_grad():
            block.mlp.c_fc.bias -= torch.quantile(pre, 1 - DENSITY, dim=0)
    return whole if head else whole.transformer


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Give the outputs of the modules' last forward pass, by place."""
    found: dict[int, Tensor] = {}

    def hook(i: int) -> Callable[..., None]:
        def record(*call: object) -> None:
            output = call[2]
            found[i] = output[0] if isinstance(output, tuple) else output

        return record

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the model, with or without a head."""
    return list(getattr(model, "transformer", model).h)


class Bench:
    """The arms over one set of tokens."""

    def __init__(self, model: nn.Module, n_tokens: int, folder: Path, device: str) -> None:
        self.model = model
        self.folder = folder
        self.device = device
        n = n_tokens // N_CTX
        self.ids = torch.randint(D_VOCAB, (n, N_CTX), generator=torch.Generator().manual_seed(1))
        self.n_bytes: dict[str, int] = {}
        self.n_values: dict[str, int] = {}

    def batches(self, ids: Tensor) -> Iterator[Tensor]:
        """Run the model over every batch and yield its tokens."""
        for batch in ids.split(BATCH):
            with torch.no_grad():
                self.model(batch.to(self.device), use_cache=False)
            yield batch
        if self.device == "cuda":
            torch.cuda.synchronize()

    def vectors(self) -> None:
        """Capture one residual hook into an empty store."""
        with self.opened("vectors") as writer:
            self.feed("vectors", writer, self.ids, 0)

    def forget(self, arm: str) -> None:
        """Remove what the arm wrote before."""
        shutil.rmtree(self.folder / arm, ignore_errors=True)

    @contextmanager
    def opened(self, arm: str) -> Iterator[Writer]:
        """Give the writer of an arm's store, which is new."""
        path = self.folder / arm
        hooks = [Rows(f"blocks.{i}.mlp.hook_post", 4 * D_MODEL) for i in range(N_LAYERS)]
        kept = {"rows": hooks} if arm == "rows" else {"vectors": [Vectors(RESIDUAL_HOOK, D_MODEL)]}
        with astore.open(path, mode="w") as store, store.writer(**kept, n_ctx=N_CTX) as writer:
            yield writer

    def feed(self, arm: str, writer: Writer, tokens: Tensor, first: int) -> None:
        """Capture sequences, numbered from `first`, and wait until their shards are written."""
        blocks = blocks_of(self.model)
        names = [f"blocks.{i}.mlp.hook_post" for i in range(N_LAYERS)]
        modules = [block.mlp.act for block in blocks]
        if arm == "vectors":
            names, modules = [RESIDUAL_HOOK], [blocks[RESIDUAL]]
        with recorded(modules) as found:
            for ids in self.batches(tokens):
                seq = np.arange(first, first + len(ids))
                docs = np.repeat(seq[:, None], N_CTX, 1)
                acts = {name: found[i] for i, name in enumerate(names)}
                writer.add(seq, ids, docs, "val", acts)
                first += len(ids)
        jobs = [job for hook in writer._accumulators for job in hook._busy if job is not None]
        wait(jobs + writer._spool._waiting_vectors)

    def measure(self, arm: str) -> None:
        """Note what the arm wrote last."""
        with astore.open(self.folder / arm) as store:
            info = store.info()
        kind = "acts" if arm == "rows" else "vectors"
        files = (self.folder / arm / "store").glob(f"{kind}-*.parquet")
        self.n_values[arm] = info.n_acts if arm == "rows" else info.n_vectors * D_MODEL
        self.n_bytes[arm] = sum(file.stat().st_size for file in files)

    def sae_lens(self) -> None:
        """Cache the same hook with sae-lens, which asks for a TransformerLens-like model."""
        from datasets import Dataset
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
        from sae_lens import cache_activations_runner as runner

        path = self.folder / "sae-lens"
        runner.load_model = lambda **_: Lensed(self)  # the name given below is never looked up
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name="",
            model_batch_size=BATCH,
            hook_name="hook",
            d_in=D_MODEL,
            training_tokens=self.ids.numel(),
            context_size=N_CTX,
            new_cached_activations_path=str(path),
            shuffle=False,
            dtype="float16",
            device=self.device,
            buffer_size_gb=self.ids.numel() * D_MODEL * 2 / 1e9,
            prepend_bos=False,
            streaming=False,
        )
        tokens = Dataset.from_dict({"tokens": self.ids.numpy()})
        tokens.set_format("torch")
        CacheActivationsRunner(config, override_dataset=tokens).run()


class Lensed(nn.Module):
    """The same model with the one method that sae-lens calls."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench
        self.tokenizer = None
        self.cfg = argparse.Namespace(n_ctx=N_CTX, device=torch.device(bench.device))

    def run_with_cache(self, ids: Tensor, **_: object) -> tuple[None, dict[str, Tensor]]:
        """Return no logits and the one hook."""
        with recorded([blocks_of(self.bench.model)[RESIDUAL]]) as found, torch.no_grad():
            self.bench.model(ids.to(self.bench.device), use_cache=False)
        return None, {"hook": found[0]}


def keep_memory() -> None:
    """Have the C library keep the memory that it is given back, for every arm alike.

    Otherwise a bare forward takes all its memory from the system again at every batch, or does
    not, by what ran before it: 3,600 or 214,000 pages in the same process.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_threshold, 2**30)


def bandwidth(folder: Path, n_bytes: int) -> float:
    """Return bytes per second of writing that many bytes to one file, synced on the way."""
    chunk = np.random.default_rng(0).bytes(1 << 24)
    n_chunks = -(-n_bytes // len(chunk))
    path = folder / "bandwidth"
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(n_chunks):
            file.write(chunk)
            os.fsync(file.fileno())
            if sys.platform == "linux":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seconds = time.perf_counter() - begin
    path.unlink()
    return n_chunks * len(chunk) / seconds


class Spent(NamedTuple):
    """Wall seconds and seconds of processor time."""

    wall: float
    cpu: float


@contextmanager
def noted(into: list[Spent]) -> Iterator[None]:
    """Note what the block takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into.append(Spent(time.perf_counter() - wall, time.process_time() - cpu))


class Repeat:
    """One whole capture by each arm, the arms in turn."""

    def __init__(self, bench: Bench, ids: Tensor) -> None:
        self.segments: dict[str, list[Spent]] = {arm: [] for arm in ("bare", "rows", "vectors")}
        self.ends: dict[str, list[Spent]] = {arm: [] for arm in self.segments}
        writers: dict[str, Writer] = {}
        captures = {arm: ExitStack() for arm in ("rows", "vectors")}
        for arm, capture in captures.items():
            bench.forget(arm)
            with noted(self.ends[arm]):
                writers[arm] = capture.enter_context(bench.opened(arm))
        first = 0
        for part in ids.split(SEGMENT // N_CTX):
            for arm, spent in self.segments.items():
                with noted(spent):
                    if arm == "bare":
                        deque(bench.batches(part), maxlen=0)
                    else:
                        bench.feed(arm, writers[arm], part, first)
            first += len(part)
        for arm, capture in captures.items():
            with noted(self.ends[arm]):
                capture.close()

    def whole(self, arm: str) -> Spent:
        """Return what the arm took from an empty store to the end."""
        return total(self.segments[arm] + self.ends[arm])

    def later(self, arm: str) -> Spent:
        """Return what the arm took for its later segments."""
        return total(self.segments[arm][EARLY:])


def total(parts: list[Spent]) -> Spent:
    """Return the sum."""
    return Spent(sum(part.wall for part in parts), sum(part.cpu for part in parts))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Repeat whole captures and print what they took, beside the floors."""
    model = build(arguments.device, arguments.head)
    bench = Bench(model, arguments.tokens, folder, arguments.device)
    Repeat(bench, bench.ids[: SEGMENT // N_CTX])  # the first compiles
    repeats: list[Repeat] = []
    peers: dict[str, list[Spent]] = {"vectors": [], "sae-lens": []}
    for _ in range(arguments.repeats):
        repeats.append(Repeat(bench, bench.ids))
        for arm, run in (("vectors", bench.vectors), ("sae-lens", bench.sae_lens)):
            if arguments.peer:
                bench.forget(arm)
                with noted(peers[arm]):
                    run()
    for arm in ("rows", "vectors"):
        bench.measure(arm)
    show(bench, repeats)
    if arguments.peer:
        ratios = [peer.wall / own.wall for own, peer in zip(*peers.values(), strict=True)]
        print(f"sae-lens / vectors, each whole in turn: {spread(ratios)}")


def spread(values: list[float]) -> str:
    """Return median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def show(bench: Bench, repeats: list[Repeat]) -> None:
    """Print the table."""
    n_tokens = bench.ids.numel()
    density = bench.n_values["rows"] / (n_tokens * N_LAYERS * 4 * D_MODEL)
    print(f"{n_tokens} tokens, density {density:.3f}, {torch.get_num_threads()} threads")
    bare = statistics.median(one.whole("bare").wall for one in repeats)
    print(f"bare: {bare:.2f} s, {n_tokens / bare:.0f} tokens/s; against it:")
    for arm in ("rows", "vectors"):
        write = bench.n_bytes[arm] / bandwidth(bench.folder, bench.n_bytes[arm])
        print(f"{arm}: floor {1 + write / bare:.3f}", end="")
        print(f", {bench.n_bytes[arm] / bench.n_values[arm]:.3f} bytes per value")
        for name, part in (("whole", Repeat.whole), ("later", Repeat.later)):
            pairs = [(part(one, arm), part(one, "bare")) for one in repeats]
            print(f"  {name}: wall {spread([own.wall / base.wall for own, base in pairs])}", end="")
            print(f", CPU {spread([own.cpu / base.cpu for own, base in pairs])}")
        ends = [total(one.ends[arm]).wall for one in repeats]
        print(f"  seconds of opening and commit: {spread(ends)}")


def memory(folder: Path) -> None:
    """Print the peak memory of two captures, each in a process of its own."""
    peaks = {}
    for n_tokens in (1_000_000, 10_000_000):
        command = [sys.executable, __file__, "--fill", str(n_tokens), "--folder", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[n_tokens] = float(done.stdout)
        print(f"{n_tokens} tokens: peak {peaks[n_tokens]:.0f} MB")
    small, large = peaks.values()
    print(f"ratio {large / small:.3f}")


def fill(n_tokens: int, folder: Path) -> None:
    """Capture one made-up hook of 512 units and print this process' peak memory in MB."""
    rng = np.random.default_rng(0)
    n, d = 64, 512
    acts = np.maximum(rng.standard_normal((n, N_CTX, d), dtype=np.float32) - 1.04, 0)
    ids = rng.integers(0, D_VOCAB, (n, N_CTX))
    shutil.rmtree(folder / "fill", ignore_errors=True)
    with (
        astore.open(folder / "fill", mode="w") as store,
        store.writer(rows=[Rows("hook", d)], n_ctx=N_CTX, commit_tokens=500_000) as writer,
    ):
        for first in range(0, n_tokens // N_CTX, n):
            seq = np.arange(first, first + n)
            writer.add(seq, ids, np.repeat(seq[:, None], N_CTX, 1), "val", {"hook": acts})
    shutil.rmtree(folder / "fill")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--fill", type=int)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    keep_memory()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.fill:
            fill(arguments.fill, Path(folder))
        elif arguments.memory:
            memory(Path(folder))
        else:
            compare(arguments, Path(folder))


if __name__ == "__main__":
    main()
