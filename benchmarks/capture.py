"""Capture into a store beside the bare forward pass over the same tokens, and beside sae-lens.

    python benchmarks/capture.py [--tokens 65536 131072] [--repeats 5] [--head] [--peer]
        [--device cuda]
    python benchmarks/capture.py --turns 10
    python benchmarks/capture.py --memory

The model is transformers' GPT-2 with ReLU, 6 layers of d_model 384 and random weights; the biases
of its neurons are shifted until each fires on 15 % of the tokens. Arms run in turn, repeat after
repeat, and each starts with an empty store and ends when everything is on the disk:

- bare: the forward pass. `--head` includes the vocabulary's logits, which a capture does not need.
- rows: all 9,216 neurons above 0, with statistics and exemplars of every unit.
- vectors: one residual hook, float16.
- sae-lens: `CacheActivationsRunner` on the same hook, model, tokens and type (`--peer`).

The floor of a capture is the bare pass plus the time to write the same bytes and sync them. Ratios
are of wall time and, for a machine that is not quiet, of processor time. With two numbers of tokens
the last lines say what the further tokens of the longer capture cost: it begins and ends as the
shorter one does. `--turns` compares within one long capture: segments of 16,384 tokens, bare and
with each arm in turn, so that all find the machine and its memory in the same state; beginning and
commit are left out. `--memory` compares the peak memory of a capture of 1 M and of 10 M tokens,
without a model.
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
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import activation_store as astore
from activation_store import Rows, Vectors
from activation_store.writer import Writer

N_LAYERS, D_MODEL, N_CTX, BATCH, D_VOCAB = 6, 384, 128, 32, 50_257
RESIDUAL = 3
RESIDUAL_HOOK = f"blocks.{RESIDUAL}.hook_resid_post"
DENSITY = 0.15
Times = dict[str, list[float]]
"""Seconds of each repeat of an arm."""


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

    def batches(self) -> Iterator[Tensor]:
        """Run the model over every batch and yield its tokens."""
        for ids in self.ids.split(BATCH):
            with torch.no_grad():
                self.model(ids.to(self.device), use_cache=False)
            yield ids

    def bare(self) -> None:
        """Run the model only."""
        for _ in self.batches():
            pass
        if self.device == "cuda":
            torch.cuda.synchronize()

    def rows(self) -> None:
        """Capture all neurons into an empty store."""
        self.capture("rows")

    def vectors(self) -> None:
        """Capture one residual hook into an empty store."""
        self.capture("vectors")

    def capture(self, arm: str) -> None:
        with self.opened(arm) as writer:
            self.feed(arm, writer, 0)

    @contextmanager
    def opened(self, arm: str) -> Iterator[Writer]:
        """Give the writer of an arm's store, which is made anew."""
        path = self.folder / arm
        shutil.rmtree(path, ignore_errors=True)
        hooks = [Rows(f"blocks.{i}.mlp.hook_post", 4 * D_MODEL) for i in range(N_LAYERS)]
        kept = {"rows": hooks} if arm == "rows" else {"vectors": [Vectors(RESIDUAL_HOOK, D_MODEL)]}
        with astore.open(path, mode="w") as store, store.writer(**kept, n_ctx=N_CTX) as writer:
            yield writer

    def feed(self, arm: str, writer: Writer, first: int) -> None:
        """Capture every batch; sequences are numbered from `first`."""
        blocks = blocks_of(self.model)
        names = [f"blocks.{i}.mlp.hook_post" for i in range(N_LAYERS)]
        modules = [block.mlp.act for block in blocks]
        if arm == "vectors":
            names, modules = [RESIDUAL_HOOK], [blocks[RESIDUAL]]
        with recorded(modules) as found:
            for ids in self.batches():
                seq = np.arange(first, first + len(ids))
                docs = np.repeat(seq[:, None], N_CTX, 1)
                acts = {name: found[i] for i, name in enumerate(names)}
                writer.add(seq, ids, docs, "val", acts)
                first += len(ids)

    def measure(self, arm: str) -> None:
        """Note what the arm wrote last."""
        if arm == "sae-lens":
            files = (self.folder / arm).rglob("*.arrow")
            self.n_values[arm] = self.ids.numel() * D_MODEL
        else:
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
        shutil.rmtree(path, ignore_errors=True)
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
    chunk = np.random.default_rng(0).bytes(min(n_bytes, 1 << 24))
    path = folder / "bandwidth"
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, n_bytes // len(chunk))):
            file.write(chunk)
            os.fsync(file.fileno())
            if sys.platform == "linux":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seconds = time.perf_counter() - begin
    path.unlink()
    return max(1, n_bytes // len(chunk)) * len(chunk) / seconds


def compare(arguments: argparse.Namespace, n_tokens: int, folder: Path) -> tuple[Times, Times]:
    """Run the arms in turn, print medians, ratios and floors; return wall and processor times."""
    model = build(arguments.device, arguments.head)
    bench = Bench(model, n_tokens, folder, arguments.device)
    arms = {"bare": bench.bare, "rows": bench.rows, "vectors": bench.vectors}
    if arguments.peer:
        arms["sae-lens"] = bench.sae_lens
    for name, arm in arms.items():
        arm()
        if name != "bare":
            bench.measure(name)
    times: Times = {arm: [] for arm in arms}
    cpu: Times = {arm: [] for arm in arms}
    for _ in range(arguments.repeats):
        for name, arm in arms.items():
            begin = time.perf_counter()
            begin_cpu = time.process_time()
            arm()
            times[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
    show(bench, times, cpu, folder)
    return times, cpu


def take_turns(arguments: argparse.Namespace, folder: Path) -> None:
    """Compare segments of one long capture; the first two rounds are not counted."""
    bench = Bench(build(arguments.device, arguments.head), 16_384, folder, arguments.device)
    times: Times = {arm: [] for arm in ("bare", "rows", "vectors")}
    cpu: Times = {arm: [] for arm in times}
    with bench.opened("rows") as rows, bench.opened("vectors") as vectors:
        writers = {"rows": rows, "vectors": vectors}
        for turn in range(arguments.turns + 2):
            for arm in times:
                begin, begin_cpu = time.perf_counter(), time.process_time()
                if arm == "bare":
                    bench.bare()
                else:
                    bench.feed(arm, writers[arm], turn * len(bench.ids))
                    settle(writers[arm])
                times[arm].append(time.perf_counter() - begin)
                cpu[arm].append(time.process_time() - begin_cpu)
    show(bench, *({arm: spent[arm][2:] for arm in spent} for spent in (times, cpu)), folder)


def settle(writer: Writer) -> None:
    """Wait until the threads of a writer have written what they were given."""
    jobs = [job for hook in writer._accumulators for job in hook._busy if job is not None]
    wait(jobs + writer._spool._waiting_vectors)


def compare_lengths(arguments: argparse.Namespace, folder: Path) -> None:
    """Compare captures of each length, then what the longest has beyond the shortest."""
    found = [compare(arguments, n, folder) for n in sorted(arguments.tokens)]
    for kind, short, long in zip(("wall", "CPU"), found[0], found[-1], strict=True):
        more = {arm: statistics.median(long[arm]) - statistics.median(short[arm]) for arm in long}
        if len(found) > 1:
            ratios = (f"{arm} {more[arm] / more['bare']:.3f}" for arm in more if arm != "bare")
            print(f"further tokens, {kind}: {', '.join(ratios)}")


def show(bench: Bench, times: Times, cpu: Times, folder: Path) -> None:
    """Print the table."""
    median = {name: statistics.median(values) for name, values in times.items()}
    n_tokens = bench.ids.numel()
    if "rows" in bench.n_values:
        density = bench.n_values["rows"] / (n_tokens * N_LAYERS * 4 * D_MODEL)
        print(f"{n_tokens} tokens, density {density:.3f}, {torch.get_num_threads()} threads")
    print("arm        seconds  tokens/s   ratio (range)            by CPU  floor  bytes/value")
    for name, seconds in median.items():
        ratios, by_cpu = (
            [t / b for t, b in zip(spent[name], spent["bare"], strict=True)]
            for spent in (times, cpu)
        )
        line = f"{name:9} {seconds:8.2f} {n_tokens / seconds:9.0f}   "
        line += f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        line += f"   {statistics.median(by_cpu):.3f}"
        if name in bench.n_bytes:
            write = bench.n_bytes[name] / bandwidth(folder, bench.n_bytes[name])
            floor = 1 + write / median["bare"]
            line += f"  {floor:.3f}  {bench.n_bytes[name] / bench.n_values[name]:.3f}"
        print(line)
    if "sae-lens" in median:
        print(f"sae-lens / vectors: {median['sae-lens'] / median['vectors']:.2f}")


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
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--turns", type=int)
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
        elif arguments.turns:
            take_turns(arguments, Path(folder))
        else:
            compare_lengths(arguments, Path(folder))


if __name__ == "__main__":
    main()
